"""Checkpoints by path and by hub id: what loads, and what a user reads when it does not."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from sda_core.backbones import build, save_backbone
from sda_core.errors import ArtifactError, ConfigError, DownloadError, SDAError

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def vectors_of(backbone, image):
    with torch.inference_mode():
        return torch.cat(
            [
                backbone.encode(backbone.model, backbone.text_inputs(["", "a black kettle"])),
                backbone.encode(backbone.model, backbone.image_inputs([image], "The picture shows a product.")),
            ]
        )


@pytest.fixture
def copied_folder(saved_folder, tmp_path):
    """A checkpoint folder that a test may damage."""
    return shutil.copytree(saved_folder, tmp_path / "copy")


def one_line(error: pytest.ExceptionInfo[SDAError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_saved_and_loaded_is_the_same(tiny, saved_folder, checkpoint_params, noise_image, tmp_path):
    image = noise_image(64, 48)
    loaded = build(checkpoint_params(saved_folder), CPU)
    assert torch.equal(vectors_of(loaded, image), vectors_of(tiny, image))
    assert (loaded.dim, loaded.num_adapter_layers("language"), loaded.info.attention) == (64, 14, "sdpa")
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    save_backbone(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved_folder / "model.safetensors").read_bytes()
    assert torch.equal(vectors_of(build(checkpoint_params(tmp_path / "again"), CPU), image), vectors_of(tiny, image))
    assert sorted(file.suffix for file in saved_folder.iterdir() if file.suffix not in (".json", ".jinja")) == [".safetensors"]


def test_revision_of_a_folder_is_its_content(saved_folder, copied_folder, checkpoint_params):
    before = build(checkpoint_params(copied_folder), CPU).info.revision
    assert before == build(checkpoint_params(saved_folder), CPU).info.revision
    weights = load_file(copied_folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copied_folder / "model.safetensors", metadata={"format": "pt"})
    assert build(checkpoint_params(copied_folder), CPU).info.revision != before


def test_half_precision_gives_float32_vectors(saved_folder, checkpoint_params, tiny, noise_image):
    image = noise_image(64, 48)
    half = build(checkpoint_params(saved_folder, dtype="bfloat16"), CPU)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    vectors = vectors_of(half, image)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, vectors_of(tiny, image), atol=0.1, rtol=0.1)


def test_params_rule_over_the_checkpoints_processor(saved_folder, checkpoint_params, noise_image):
    small = build(checkpoint_params(saved_folder, max_pixels=3136), CPU)
    grid = small.image_inputs([noise_image(500, 500)], "p")["image_grid_thw"]
    assert grid.tolist() == [[1, 4, 4]]


def test_processors_own_normalisation_is_kept(copied_folder, checkpoint_params, noise_image, tiny):
    file = copied_folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.0, 0.0, 0.0]}))
    ours = build(checkpoint_params(copied_folder), CPU).image_inputs([noise_image(56, 56)], "p")["pixel_values"]
    assert ours.min() >= 0 > tiny.image_inputs([noise_image(56, 56)], "p")["pixel_values"].min()


def test_template_kept_apart_from_the_tokenizer(copied_folder, checkpoint_params, tiny, noise_image):
    template = (copied_folder / "chat_template.jinja").read_text()
    (copied_folder / "chat_template.jinja").unlink()
    with pytest.raises(ArtifactError, match="chat template") as error:
        build(checkpoint_params(copied_folder), CPU)
    one_line(error)
    (copied_folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    image = noise_image(64, 48)
    assert torch.equal(vectors_of(build(checkpoint_params(copied_folder), CPU), image), vectors_of(tiny, image))
    (copied_folder / "chat_template.json").write_text("[]")
    with pytest.raises(ArtifactError, match="chat template"):
        build(checkpoint_params(copied_folder), CPU)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }",
        "{{ raise_exception('no') }}",
        "no words at all",
        "{% for part in messages[0]['content'] %}{{ part['text'] }}{{ part['text'] }}{% endfor %}",
        "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}",  # no image
    ],
)
def test_templates_that_cannot_be_used(copied_folder, checkpoint_params, template):
    (copied_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ArtifactError, match="chat template") as error:
        build(checkpoint_params(copied_folder), CPU)
    one_line(error)


def test_template_may_not_reach_python(copied_folder, checkpoint_params, tmp_path):
    mark = tmp_path / "mark"
    inner = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    (copied_folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.__builtins__.eval(" + json.dumps(inner) + ") }}"
    )
    with pytest.raises(ArtifactError, match="chat template"):
        build(checkpoint_params(copied_folder), CPU)
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------- damage
def truncate_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:-8].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled_weights_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def wrong_value_in_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = "four"
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def no_image_processor(folder):
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncate_weights,
        empty_weights,
        drop_a_weight,
        reshape_a_weight,
        pickled_weights_only,
        no_weights,
        broken_config,
        wrong_value_in_config,
        broken_tokenizer,
        no_image_processor,
    ],
)
def test_damage_is_one_line(copied_folder, checkpoint_params, damage):
    damage(copied_folder)
    with pytest.raises(ArtifactError, match="damaged or incomplete") as error:
        build(checkpoint_params(copied_folder), CPU)
    assert "fetch it again" in one_line(error)


def test_tokenizer_of_another_model(copied_folder, checkpoint_params):
    config = json.loads((copied_folder / "config.json").read_text())
    config["image_token_id"] = 3
    (copied_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="disagree") as error:
        build(checkpoint_params(copied_folder), CPU)
    one_line(error)


def test_no_tokenizer(copied_folder, checkpoint_params):
    no_tokenizer(copied_folder)
    with pytest.raises(ArtifactError, match=r"tokenizer") as error:
        build(checkpoint_params(copied_folder), CPU)
    assert "fetch" in one_line(error)


def test_another_architecture(tmp_path, checkpoint_params):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"backbone\.name: should be a Qwen2\.5-VL checkpoint .*'qwen2'") as error:
        build(checkpoint_params(tmp_path), CPU)
    one_line(error)


def test_code_of_a_checkpoint_is_never_run(copied_folder, checkpoint_params, tmp_path):
    mark = tmp_path / "mark"
    (copied_folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: ...\n")
    for name, entry in (
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
        ("config.json", {"AutoConfig": "evil.Evil"}),
    ):
        file = copied_folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": entry}))
    config = json.loads((copied_folder / "config.json").read_text())
    build(checkpoint_params(copied_folder), CPU)
    (copied_folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ArtifactError):
        build(checkpoint_params(copied_folder), CPU)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------- hub ids
@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper()])
def test_hub_id_needs_a_commit(checkpoint_params, revision):
    with pytest.raises(ConfigError, match=r"backbone\.revision: should pin a commit of Qwen/Qwen2\.5-VL-3B-Instruct") as error:
        build(checkpoint_params("Qwen/Qwen2.5-VL-3B-Instruct", revision=revision), CPU)
    one_line(error)


def test_hub_id_without_network(checkpoint_params, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="neither in the local cache nor can it be fetched") as error:
        build(checkpoint_params("Qwen/Qwen2.5-VL-7B-Instruct", revision=COMMIT), CPU)
    assert "set backbone.name to a folder" in one_line(error)


def test_hub_id_from_the_cache(saved_folder, checkpoint_params, monkeypatch, tmp_path, tiny, noise_image):
    shutil.copytree(saved_folder, tmp_path / "models--owner--name" / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = build(checkpoint_params("owner/name", revision=COMMIT), CPU)
    assert loaded.info.revision == COMMIT
    image = noise_image(64, 48)
    assert torch.equal(vectors_of(loaded, image), vectors_of(tiny, image))


@pytest.mark.parametrize("name", ["./none", "/none/such/folder", "~/none-such", "a/b/c", "name"])
def test_neither_folder_nor_hub_id(checkpoint_params, name):
    with pytest.raises(ArtifactError, match="neither a checkpoint folder nor a hub id") as error:
        build(checkpoint_params(name, revision=COMMIT), CPU)
    one_line(error)


def test_malformed_hub_id(checkpoint_params):
    with pytest.raises(ConfigError, match="is not a hub id"):
        build(checkpoint_params("own er/na..me", revision=COMMIT), CPU)


def test_folder_without_checkpoint(checkpoint_params, tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        build(checkpoint_params(tmp_path), CPU)


def test_flash_attention_where_it_cannot_run(saved_folder, checkpoint_params):
    with pytest.raises(ConfigError, match=r"backbone\.attention") as error:
        build(checkpoint_params(saved_folder, attention="flash_attention_2"), CPU)
    one_line(error)
