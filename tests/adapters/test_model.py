"""MoDA as a PEFT method: what a PEFT user does with an adapter, done with this one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sda_core.adapters import (
    MoDAConfig,
    MoDALinear,
    MoDAModel,
    adapter_is_zero,
    gate_values,
    load,
    merge_modality,
    modality,
    save,
    unmerge_modality,
)
from sda_core.errors import ArtifactError, ConfigError, TrainingError

Make = Callable[..., peft.PeftModel]


def batch() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def outputs(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in ("image", "text"):
        with modality(model, name), torch.no_grad():
            found[name] = model(batch())
    assert not torch.allclose(found["image"], found["text"])
    return found


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def bare(model: peft.PeftModel) -> nn.Module:
    """A fresh copy of the base model."""
    return copy.deepcopy(model).unload()


# ----------------------------------------------------------------------------------------- save and load
def test_saved_and_loaded_is_the_same_to_the_bit(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path)
    assert isinstance(again.base_model, MoDAModel)
    assert_equal(outputs(again), outputs(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoDAConfig)
    written = {key: value for key, value in config.to_dict().items() if key not in {"auto_mapping", "inference_mode"}}
    assert written.items() <= model.peft_config["default"].to_dict().items()
    assert {"r", "lora_alpha", "num_experts", "expert_rank", "gate", "modalities", "modality_dim"} <= written.keys()


def test_the_files_hold_what_they_should(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack(depth=1)
    save(model, tmp_path / "adapter")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == files
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "MODA"
    assert config["target_modules"] == ["down", "up"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = [f"base_model.model.blocks.0.{name}" for name in ("down", "up")]
    assert sorted(tensors) == sorted(f"{layer}.moda_{part}" for layer in layers for part in ("A", "B", "embedding", "gate"))
    save(model, tmp_path / "again")
    for name in files:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_further_ways_to_load(make_stack: Make, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = make_stack().eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(outputs(again.eval()), outputs(model))
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 3 * 2 * 4


def test_load_says_what_is_wrong(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: adapter is missing"):
        load(bare(model), tmp_path)
    save(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-20])
    with pytest.raises(ArtifactError, match="cannot be loaded onto this Stack"):
        load(bare(model), tmp_path / "adapter")
    weights.write_bytes(whole)
    with pytest.raises(ArtifactError, match="cannot be loaded onto this Sequential"):
        load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "adapter")
    wider = nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 3)})
    with pytest.raises(ArtifactError, match="cannot be loaded onto this ModuleDict"):
        load(wider, tmp_path / "adapter")
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("0.up.moda_A")}, weights)
    with pytest.raises(ArtifactError, match=r"Found missing adapter keys"):
        load(bare(model), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"r": 8', '"r": 7'), encoding="utf-8")
    with pytest.raises(ConfigError, match="7 cannot be split among 4 experts"):
        load(bare(model), tmp_path / "adapter")


def test_load_gives_the_model_and_its_context(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    save(model, tmp_path)
    loaded, context = load(bare(model), tmp_path)
    assert not loaded.training
    for name, expected in outputs(model).items():
        with context(name):
            assert torch.equal(loaded(batch()), expected)
    base = bare(model)
    plain, context = load(base, None)
    with context("image"):
        assert torch.equal(plain(batch()), base(batch()))


def test_the_model_card_says_what_the_adapter_is(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack(depth=2, use_rslora=True)
    save(model, tmp_path / "a", "Some/Model-7B", "0" * 40)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    number = sum(parameter.numel() for name, parameter in model.named_parameters() if "moda_" in name)
    for part in (
        "base_model: Some/Model-7B\n",
        "# MoDA adapter of Some/Model-7B",
        f"at `{'0' * 40}`, a Stack",
        "over 4 experts of rank 2",
        f"`s = lora_alpha / sqrt(r) = {32 / 8**0.5:.6g}`",
        "Modalities, in the order of their ids: `image`, `text`.",
        f"{number:,} parameters in 4 linear layers.",
        "| `gate` | modality |",
        "| `blocks.*.up` | 2 |",
    ):
        assert part in card
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert (config.base_model_name_or_path, config.revision) == ("Some/Model-7B", "0" * 40)
    assert model.peft_config["default"].base_model_name_or_path is None  # the model stays as it was
    # its example runs
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "a"))
    names: dict[str, Any] = {"base_model": bare(model), "inputs": {"x": batch()}}
    exec(code, names)
    with modality(model, "image"):
        torch.testing.assert_close(names["output"], model(batch()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(names["plain"](batch()), names["output"], rtol=1e-12, atol=1e-12)


def test_nothing_saved_tells_where_the_base_model_lay(make_stack: Make, tmp_path: Path) -> None:
    folders = []
    for place in ("here", "there"):
        (tmp_path / place / "base").mkdir(parents=True)
        model = make_stack(depth=1)
        model.base_model.model.name_or_path = str(tmp_path / place / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / place / "base")  # as get_peft_model does
        save(model, tmp_path / place / "adapter", revision="sha256:1")
        folders.append({path.name: path.read_bytes() for path in (tmp_path / place / "adapter").iterdir()})
    assert folders[0] == folders[1]
    assert json.loads(folders[0]["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert b"base_model:" not in folders[0]["README.md"]  # that is for hub ids
    assert b"`base` at `sha256:1`" in folders[0]["README.md"]


def test_cards_of_the_other_gates(make_stack: Make, tmp_path: Path) -> None:
    for number, (options, part) in enumerate(
        (
            ({"gate": "onehot"}, "an independent LoRA per modality"),
            ({"gate": "uniform"}, "the same share"),
            ({"num_experts": 1}, "`y = W0 x + s B A x`: one expert, plain LoRA"),
        )
    ):
        model = make_stack(depth=1, **options)
        model.add_adapter("other", MoDAConfig(target_modules=["up"]))
        save(model, tmp_path / str(number))
        card = (tmp_path / str(number) / "README.md").read_text(encoding="utf-8")
        assert part in card
        assert "## Adapter `other`" in card
        assert ("with modality" in card.split("## Adapter `other`")[0]) == (number == 0)
        assert (tmp_path / str(number) / "other" / "adapter_model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------- merge
@pytest.mark.parametrize("gate", ["modality", "onehot"])
def test_merged_is_unmerged_for_each_modality(make_stack: Make, gate: str) -> None:
    model = make_stack(gate=gate).eval()
    expected, weights = outputs(model), {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    for name in ("image", "text", "image"):
        merge_modality(model, name, safe_merge=True)
        torch.testing.assert_close(model(batch()), expected[name], rtol=1e-12, atol=1e-12)
        with modality(model, name):
            torch.testing.assert_close(model(batch()), expected[name], rtol=1e-12, atol=1e-12)
        other = {"image": "text", "text": "image"}[name]
        with modality(model, other), pytest.raises(TrainingError, match=f"merged for '{name}', but the pass is for '{other}'"):
            model(batch())
        with modality(model, [0, 1, 1]), pytest.raises(TrainingError, match="but the pass is for ids of 3 rows"):
            model(batch())
        with modality(model, [[0, 1]] * 3), pytest.raises(TrainingError, match="for ids of 3 rows of 2 tokens"):
            model(batch().unsqueeze(1).expand(3, 2, 6))
        with modality(model, [["image", "text"].index(name)] * 3):  # ids that are all of the modality are as good as its name
            torch.testing.assert_close(model(batch()), expected[name], rtol=1e-12, atol=1e-12)
    unmerge_modality(model)
    unmerge_modality(model)
    assert all(torch.equal(parameter, weights[n]) for n, parameter in model.named_parameters() if n in weights)
    assert_equal(outputs(model), expected)


def test_unmerging_restores_bfloat16_weights_to_the_bit() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)).bfloat16(), MoDAConfig(target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].moda_B["default"])
    before = model.base_model.model[0].base_layer.weight.clone()
    delta = model.base_model.model[0].get_delta_weight("default", "image")
    merge_modality(model, "image")
    merged = model.base_model.model[0].base_layer.weight
    assert torch.equal(merged, (before.float() + delta).bfloat16())  # rounded once
    assert not torch.equal(merged, before)
    unmerge_modality(model)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_pefts_own_merge_takes_the_open_modality(make_stack: Make) -> None:
    model = make_stack().eval()
    expected = outputs(model)
    with pytest.raises(TrainingError, match=r"call sda_core.adapters.merge_modality\(model, 'image'\)"):
        model.merge_adapter()
    assert not model.base_model.model.blocks[0].up.merged
    assert_equal(outputs(model), expected)
    with modality(model, [0, 1, 0]), pytest.raises(TrainingError, match="has a weight for each modality"):
        model.merge_adapter()
    with modality(model, "text"):
        model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected["text"], rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with modality(model, "text"):
        plain = model.merge_and_unload()
    assert not any(isinstance(module, MoDALinear) for module in plain.modules())
    torch.testing.assert_close(plain(batch()), expected["text"], rtol=1e-12, atol=1e-12)


def test_a_uniform_adapter_merges_like_any_lora(make_stack: Make) -> None:
    model = make_stack(gate="uniform").eval()
    expected = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    with modality(model, "text"):  # merged for all of them
        torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(batch()), expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_merged(make_stack: Make) -> None:
    model = make_stack()
    with torch.no_grad():
        model.base_model.model.blocks[2].down.moda_B["default"][0, 0] = torch.inf
    with pytest.raises(TrainingError, match="not finite"):
        merge_modality(model, "image", safe_merge=True)
    with pytest.raises(TrainingError, match="should be one of image, text"):
        merge_modality(make_stack(), "audio")
    with pytest.raises(TrainingError, match="has no MoDA layer"):
        merge_modality(nn.Linear(2, 2), "image")
    quantised = make_stack()
    layer = quantised.base_model.model.blocks[0].up
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TrainingError, match=r"cannot merge into a base weight of type torch\.int8"):
        merge_modality(quantised, "image")


# ------------------------------------------------------------------------------ disable, unload, several
def test_disabled_is_the_base_model(make_stack: Make) -> None:
    model = make_stack().eval()
    base = bare(model)
    expected = outputs(model)
    with model.disable_adapter():
        assert torch.equal(model(batch()), base(batch()))  # and no modality is needed
    assert_equal(outputs(model), expected)
    merge_modality(model, "image")
    with model.disable_adapter():
        assert torch.equal(model(batch()), base(batch()))
    assert torch.equal(model.unload()(batch()), base(batch()))


def test_only_the_adapter_is_trained(make_stack: Make) -> None:
    model = make_stack()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".moda_" in name for name in trainable)
    assert all(".moda_" not in name for name, p in model.named_parameters() if not p.requires_grad)


def test_several_adapters(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    first = outputs(model)
    model.add_adapter(
        "other", MoDAConfig(target_modules=["up"], modalities=["text", "image", "audio"], num_experts=2, lora_dropout=0.0)
    )
    assert_equal(outputs(model), first)
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if ".moda_" in name and name.endswith(".other"):
            assert parameter.requires_grad
            nn.init.normal_(parameter, std=0.3)
        else:
            assert not parameter.requires_grad
    second = outputs(model)
    assert not torch.allclose(second["image"], first["image"])
    with modality(model, "audio"):
        model(batch())
    model.set_adapter("default")
    assert_equal(outputs(model), first)
    with pytest.raises(TrainingError, match="should be one of image, text"):
        modality(model, "audio")

    model.base_model.set_adapter(["default", "other"])  # both at once: the sum of their changes, layer by layer
    layer = model.base_model.model.blocks[0].up
    with modality(model, "image"):
        both = layer(batch())
    delta = layer.get_delta_weight("default", "image") + layer.get_delta_weight("other", "image")
    torch.testing.assert_close(both, layer.base_layer(batch()) + batch() @ delta.T, rtol=1e-12, atol=1e-12)
    merge_modality(model, "image")
    torch.testing.assert_close(layer(batch()), both, rtol=1e-12, atol=1e-12)
    unmerge_modality(model)

    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path / "other", adapter_name="other")
    assert_equal(outputs(again), second)
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert_equal(outputs(again), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_equal(outputs(model), first)
    assert sorted(gate_values(model, "default")) == sorted(name for name, m in model.named_modules() if isinstance(m, MoDALinear))


def test_injected_without_a_wrapper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    peft.inject_adapter_in_model(MoDAConfig(target_modules=["0"], lora_dropout=0.0), model)
    nn.init.normal_(model[0].moda_B["default"])
    outputs(model)
    state = peft.get_peft_model_state_dict(model)
    assert sorted(state) == ["0.moda_A", "0.moda_B", "0.moda_embedding", "0.moda_gate"]
    assert set(peft.set_peft_model_state_dict(model, state).unexpected_keys) == set()


# ------------------------------------------------------------------------------- a real vision-language model
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def images_and_words() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.tensor([[5, 91, 90, 90, 90, 90, 92, 7], [91, 90, 90, 90, 90, 92, 8, 9]]),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def randomise(model: nn.Module, seed: int, part: str = "moda_") -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.2)


def logits(model: nn.Module, value: str | Tensor) -> Tensor:
    with modality(model, value), torch.no_grad():
        return model(**images_and_words(), use_cache=False).logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_a_real_model(tiny_vl: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Two adapters of different kinds with a trained module beside one: add, set, both, save, load, merge, delete."""
    first = MoDAConfig(target_modules=LANGUAGE, lora_dropout=0.0, modules_to_save=["lm_head"])
    second = MoDAConfig(
        target_modules=["q_proj", "up_proj"],
        exclude_modules=r".*visual.*",
        gate="onehot",
        num_experts=3,
        r=6,
        modalities=["text", "image", "audio"],
        lora_dropout=0.0,
    )
    base = tiny_vl()
    with torch.no_grad():
        plain = base(**images_and_words(), use_cache=False).logits
    model = peft.get_peft_model(base, first).eval()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "moda_" not in name} == {"base_model.model.lm_head.modules_to_save.default.weight"}
    randomise(model, 1)
    randomise(model, 2, "modules_to_save")
    tokens = (images_and_words()["input_ids"] != 90).long()  # images 0, words 1
    mixed, image = logits(model, tokens), logits(model, "image")
    assert not torch.allclose(mixed, image)
    torch.testing.assert_close(logits(model, torch.zeros_like(tokens)), image)
    torch.testing.assert_close(logits(model, [0, 0]), image)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**images_and_words(), use_cache=False).logits, plain)

    model.add_adapter("second", second)
    assert torch.equal(logits(model, "image"), image)
    randomise(model, 3, ".second")
    model.set_adapter("second")
    audio = logits(model, "audio")
    assert not torch.allclose(audio, plain)
    with pytest.raises(TrainingError, match=r"one of text, image, audio \(got 'video'\)"):
        modality(model, "video")
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, "image")
    other = copy.deepcopy(model)
    with modality(other, "image"):
        merged = other.merge_and_unload()
    with torch.no_grad():
        got = merged(**images_and_words(), use_cache=False).logits
    torch.testing.assert_close(got, both, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(base)

    model.set_adapter("default")
    save(model, tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_vl(), tmp_path, adapter_name="one").eval()
    assert torch.equal(logits(again, tokens), mixed)
    again.load_adapter(tmp_path / "second", "two")
    assert torch.equal(logits(again, tokens), mixed)
    again.set_adapter("two")
    assert torch.equal(logits(again, "audio"), audio)
    with pytest.warns(UserWarning, match="Adapter two was active which is now deleted"):
        again.delete_adapter("two")
    again.set_adapter("one")  # PEFT turns the layers to it by itself, but not the head that is saved beside it
    assert torch.equal(logits(again, "image"), image)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_plain_lora_in_the_vision_tower_as_in_the_public_code(tiny_vl: Callable[[], nn.Module], tmp_path: Path) -> None:
    suffixes = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = MoDAConfig(target_modules=suffixes, plain_modules=r".*\.visual\..*", variant="reference", lora_dropout=0.0)
    model = peft.get_peft_model(tiny_vl(), config).eval()
    plain = {name for name, module in model.named_modules() if isinstance(module, MoDALinear) and not module.moda_gate}
    assert len(plain) == 6
    assert all(".visual." in name for name in plain)
    for name, values in gate_values(model).items():
        assert values.shape == ((2, 1) if ".visual." in name else (2, 4))
    randomise(model, 1)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_vl(), tmp_path).eval()
    assert torch.equal(logits(again, "text"), logits(model, "text"))
    by_suffix = MoDAConfig(target_modules=suffixes, plain_modules=["up_proj", "q_proj"])
    assert by_suffix.for_module("a.q_proj").num_experts == 1
    assert by_suffix.for_module("a.xq_proj") is by_suffix


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_pefts_word_for_all_linear_layers(tiny_vl: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_vl(), MoDAConfig(target_modules="all-linear")).eval()
    names = set(gate_values(model))
    assert not any("lm_head" in name for name in names)
    assert any(".visual." in name for name in names)
    save(model, tmp_path / "a")
    save(model, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == (tmp_path / "b" / "adapter_config.json").read_bytes()


class Tied(nn.Module):
    """A head that is the input embedding, as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_a_tied_weight_is_not_merged() -> None:
    model = peft.get_peft_model(Tied(), MoDAConfig(target_modules=["head"]))
    nn.init.normal_(model.base_model.model.head.moda_B["default"])
    before = model.base_model.model.embedding.weight.clone()
    for merge in (
        lambda: merge_modality(model, "image"),
        model.merge_and_unload,
        model.merge_adapter,
    ):
        with (
            modality(model, "image"),
            pytest.raises(TrainingError, match=r"shares its weight with .*embedding\.weight, which a merge"),
        ):
            merge()
    assert torch.equal(model.base_model.model.embedding.weight, before)


# --------------------------------------------------------------------------------------------------- errors
def test_targets_that_cannot_be_adapted() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "linear": nn.Linear(2, 2)})
    with pytest.raises(TrainingError, match=r"module conv: is a Conv1d, and MoDA adapts torch\.nn\.Linear only"):
        peft.get_peft_model(model, MoDAConfig(target_modules=["conv", "linear"]))
    with pytest.raises(ConfigError, match="target_modules: is empty"):
        peft.get_peft_model(nn.ModuleDict({"linear": nn.Linear(2, 2)}), MoDAConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"MoDAConfig\.r: should be at least 1 \(got 0\)"),
        ({"num_experts": 0}, "num_experts: should be at least 1"),
        ({"modality_dim": 0}, "modality_dim: should be at least 1"),
        ({"r": 6}, "6 cannot be split among 4 experts; make r a multiple of num_experts, or set expert_rank='full'"),
        ({"lora_alpha": 0}, "lora_alpha: should be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout: should be at least 0 and below 1 \(got 1\.0\)"),
        ({"variant": "code"}, r"variant: should be one of paper, reference \(got 'code'\)"),
        ({"modules_to_save": "head"}, r"modules_to_save: should be a list of names \(got 'head'\)"),
        ({"target_modules": "*_proj"}, r"target_modules: '\*_proj' is not a regular expression"),
        ({"gate": "router"}, r"gate: should be one of modality, onehot, uniform \(got 'router'\)"),
        ({"expert_rank": "half"}, "expert_rank: should be one of split, full"),
        ({"modalities": []}, "modalities: should be a list of different names"),
        ({"modalities": ["image", "image"]}, "modalities: should be a list of different names"),
        ({"gate": "onehot", "modalities": ["a", "b", "c"]}, "4 experts cannot be divided equally among the modalities a, b, c"),
    ],
)
def test_configs_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoDAConfig(**options)


def test_config_details() -> None:
    assert MoDAConfig(r=6, expert_rank="full").rank_per_expert == 6
    assert MoDAConfig(r=8).rank_per_expert == 2
    assert MoDAConfig().depends_on_modality
    assert not MoDAConfig(gate="uniform").depends_on_modality
    assert not MoDAConfig(num_experts=1).depends_on_modality
    assert MoDAConfig(target_modules=["b", "a"]).target_modules == ["a", "b"]
    assert MoDAConfig(target_modules="x.*").target_modules == "x.*"


def test_zero_adapters_are_noticed(make_stack: Make) -> None:
    model = make_stack()
    assert not adapter_is_zero(model)
    for module in model.modules():
        if isinstance(module, MoDALinear):
            nn.init.zeros_(module.moda_B["default"])
    assert adapter_is_zero(model)
