"""Every family of backbones against transformers' own classes: a tiny random checkpoint of each real architecture."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file

from sda_core import adapters
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, write_json
from sda_core.backbones import JointEncoder, build, save_backbone
from sda_core.backbones._layers import LLAMA_LINEAR, VIT_LINEAR
from sda_core.errors import ArtifactError, ConfigError
from sda_core.image_store import ImageRow, coverage_path, shard_path, write_shard
from sda_core.item_vectors import read_vectors
from sda_core.local_files import watched
from sda_core.params import AdapterParams, load_params
from sda_core.seed import derive
from tests.tolerances import up_to_rounding

CPU = torch.device("cpu")
PROMPT = "The picture shows a product."
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TILED = ["llava_onevision", "internvl", "smolvlm", "idefics3"]
LANGUAGE_MODELS = [*QWEN, *TILED]
TOWERS = ["clip", "siglip"]
FAMILIES = [*LANGUAGE_MODELS, *TOWERS]

every_family = pytest.mark.parametrize("name", FAMILIES)
every_language_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)

# (language, vision) layers of the tiny checkpoints: 2 decoder layers, 3 blocks in the tower
LAYERS = {"qwen2_vl": (14, 12), "qwen2_5_vl": (14, 15), "qwen3_vl": (14, 12)}
LAYERS |= dict.fromkeys(TILED, (14, 18)) | dict.fromkeys(TOWERS, (12, 18))


def texts_of(backbone, texts):
    with torch.inference_mode():
        return backbone.encode(backbone.model, backbone.text_inputs(texts))


def images_of(backbone, images, prompt=PROMPT):
    with torch.inference_mode():
        return backbone.encode(backbone.model, backbone.image_inputs(images, prompt))


def kept_ids(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


@pytest.fixture(scope="module")
def images(noise_image):
    """Images of many shapes and modes."""
    sizes = [(24, 24), (64, 64), (30, 200), (200, 90), (1, 1), (1, 3), (3, 700), (900, 2)]
    noise = [noise_image(*size, seed=place) for place, size in enumerate(sizes)]
    grey = Image.fromarray(np.random.default_rng(9).integers(0, 256, (40, 50), dtype=np.uint8))
    return [*noise, grey, noise_image(40, 50, seed=8).convert("CMYK"), noise_image(40, 60, seed=7).convert("P")]


# ------------------------------------------------------------------------------------------- the interface
@every_family
def test_loaded_frozen_and_described(family, family_params, name):
    backbone = family(name)
    assert not backbone.model.training
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    described = backbone.info.metadata()
    assert described["backbone_kind"] == family_params(name).kind
    assert described["backbone_revision"].startswith("sha256:")
    assert ("backbone_max_pixels" in described) == (name in QWEN)
    assert ("backbone_max_tiles" in described) == (name in TILED)
    assert described["backbone_pooling"] == ("tower" if name in TOWERS else "mean")
    assert "None" not in described.values()


@every_family
def test_saved_and_loaded_is_the_same(family, family_params, images, tmp_path, name):
    backbone = family(name)
    save_backbone(backbone, tmp_path / "again")
    again = build(family_params(name, name=str(tmp_path / "again")), CPU)
    assert torch.equal(texts_of(again, ["", "tea pot"]), texts_of(backbone, ["", "tea pot"]))
    assert torch.equal(images_of(again, images[:3]), images_of(backbone, images[:3]))
    if name == "llava_onevision":
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert len(config["image_grid_pinpoints"]) == 9, "all layouts are written"
        assert len(backbone.model.config.image_grid_pinpoints) < 9, "and the ones in use are in use again"


@every_family
def test_half_precision_gives_float32_vectors(family, family_params, images, name):
    half = build(family_params(name, dtype="bfloat16"), CPU)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    whole = family(name)
    for ours, exact in (
        (texts_of(half, ["tea", "a tea pot"]), texts_of(whole, ["tea", "a tea pot"])),
        (images_of(half, images[:3]), images_of(whole, images[:3])),
    ):
        assert ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours, exact).min() > 0.99


def variants(name):
    if name not in TILED:
        return [{}]
    return [{"max_tiles": tiles} for tiles in ((0, 1, 4) if name == "llava_onevision" else (0, 4))]


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name in FAMILIES for changes in variants(name)], ids=lambda value: str(value)
)
def test_vectors_do_not_depend_on_the_batch(family_params, images, name, changes):
    backbone = build(family_params(name, **changes), CPU)
    texts = ["", " ", "tea", "A kettle with a very long description " * 4, "x" * 900, "日本語 🫖", "a cup"]
    for encode, rows in ((texts_of, texts), (images_of, images)):
        together = encode(backbone, rows)
        assert together.shape == (len(rows), backbone.dim)
        assert together.dtype == torch.float32
        assert together.isfinite().all()
        alone = torch.cat([encode(backbone, [row]) for row in rows])
        torch.testing.assert_close(together, alone, **up_to_rounding(alone))
        torch.testing.assert_close(encode(backbone, rows[::-1]).flip(0), together, **up_to_rounding(together))
        distances = torch.cdist(together, together) + 9 * torch.eye(len(rows))
        if encode is texts_of and name in TOWERS:
            distances[0, 1] = distances[1, 0] = 9  # their tokenizers drop spaces
        assert distances.min() > 1e-3, "and they are different vectors"


@every_language_model
def test_last_token_pooling_does_not_depend_on_the_batch(family_params, images, name):
    backbone = build(family_params(name, pooling="last"), CPU)
    together = images_of(backbone, images[:4])
    alone = torch.cat([images_of(backbone, [image]) for image in images[:4]])
    torch.testing.assert_close(together, alone, **up_to_rounding(alone))
    texts = ["", "tea", "a longer text about tea"]
    alone = torch.cat([texts_of(backbone, [t]) for t in texts])
    torch.testing.assert_close(texts_of(backbone, texts), alone, **up_to_rounding(alone))


# --------------------------------------------------------------------------------------- against the stock
def image_text(name, backbone, inputs, row, num_tokens):
    """What the stock processor writes in the place of an image."""
    token = backbone.image_token
    if name == "internvl":
        return f"<img>{token * num_tokens}</img>"
    if name in {"smolvlm", "idefics3"}:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        layout = inputs[row]
        return get_image_prompt_string(*layout, 4, "<fake_token_around_image>", token, "<global-img>")
    return token * num_tokens


def layouts_of(backbone, images):
    """Rows and columns of tiles, by the stock image processor (SmolVLM, Idefics3)."""
    rgb = [[image.convert("RGB")] for image in images]
    pixels = backbone._image_processor(rgb, return_row_col_info=True)
    return [(rows[0], columns[0]) for rows, columns in zip(pixels["rows"], pixels["cols"], strict=True)]


@every_language_model
def test_sequences_equal_the_rendered_template(family, images, name):
    backbone, images = family(name), images[:4]
    tokenizer = backbone._tokenizer
    inputs = backbone.image_inputs(images, PROMPT)
    layouts = layouts_of(backbone, images) if name in {"smolvlm", "idefics3"} else []
    if layouts:
        assert len(inputs["pixel_values"]) == sum(rows * columns + 1 for rows, columns in layouts), "no tile to fill up"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    rendered = tokenizer.apply_chat_template([message], tokenize=False)
    assert rendered.count(backbone.image_token) == 1
    for row in range(len(images)):
        ids = kept_ids(inputs, row)
        num_tokens = ids.count(backbone.model.config.image_token_id)
        expected = rendered.replace(backbone.image_token, image_text(name, backbone, layouts, row, num_tokens))
        assert ids == tokenizer(expected)["input_ids"]
    for text in ("A red tea pot, 100 cups", "the theory", "Ωmega & sons – été"):
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        rendered = tokenizer.apply_chat_template([message], tokenize=False)
        assert kept_ids(backbone.text_inputs([text]), 0) == tokenizer(rendered)["input_ids"]


@every_language_model
def test_encoding_equals_the_models_own_forward(family, images, name):
    """One sequence, no padding, no positions of ours: the stock model works its positions out itself."""
    backbone = family(name)
    for inputs in (backbone.text_inputs(["a tea pot of cast iron"]), backbone.image_inputs([images[2]], PROMPT)):
        stock_inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
        if name in QWEN and "pixel_values" in inputs:
            is_image = inputs["input_ids"] == backbone.model.config.image_token_id
            stock_inputs["mm_token_type_ids"] = is_image.int()
        with torch.inference_mode():
            stock = backbone.model(**stock_inputs, output_hidden_states=True).hidden_states[-1].mean(1)
            ours = backbone.encode(backbone.model, inputs)
        if name in QWEN:
            backbone.model.model.rope_deltas = None
        torch.testing.assert_close(ours, stock, **up_to_rounding(stock))


@every_language_model
def test_a_joint_sequence_is_that_of_an_image_with_the_text_in_the_prompt_s_place(family, images, name):
    """Whose tokens and vectors are compared with the stock model's above."""
    backbone = family(name)
    assert isinstance(backbone, JointEncoder)
    texts = ["a tea pot of cast iron", "", "<|im_end|> tea"]
    inputs = backbone.joint_inputs(images[:3], texts, PROMPT)
    is_image = inputs["input_ids"] == backbone.model.config.image_token_id
    assert torch.equal(backbone.token_modalities(inputs), (~is_image).long())
    with torch.inference_mode():
        together = backbone.encode(backbone.model, inputs)
    for row, text in enumerate(texts):
        alone = images_of(backbone, [images[row]], f"{PROMPT}\n{text}" if text else PROMPT)
        torch.testing.assert_close(together[row : row + 1], alone, **up_to_rounding(alone))


@pytest.mark.parametrize("name", TOWERS)
def test_two_towers_have_no_joint_sequence(family, name):
    assert not isinstance(family(name), JointEncoder)


@pytest.mark.parametrize("name", QWEN)
def test_positions_equal_the_models_own(family, images, name):
    backbone = family(name)
    inputs = backbone.image_inputs(images, PROMPT)
    expected, _ = backbone.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == backbone.model.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    assert torch.equal(inputs["position_ids"], expected)


@every_language_model
def test_no_image_token_is_lost(family_params, images, name):
    """As many places as the model makes features, image by image."""
    for changes in variants(name):
        backbone: Any = build(family_params(name, **changes), CPU)
        for image in images:
            inputs = backbone.image_inputs([image], PROMPT)
            tensors = {k: v for k, v in inputs.items() if k not in {"input_ids", "attention_mask", "position_ids"}}
            with torch.inference_mode():
                features = backbone.model.model.get_image_features(**tensors, return_dict=True).pooler_output
            made = sum(len(part) for part in features)
            if name == "internvl":
                made = features.shape[0] * features.shape[1]
            assert (inputs["input_ids"] == backbone.model.config.image_token_id).sum() == made


@pytest.fixture(scope="module")
def llava_of_any_tiles(family_params):
    return build(family_params("llava_onevision", max_tiles=9), CPU)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_llava_tokens_of_any_image(llava_of_any_tiles, width, height):
    model = llava_of_any_tiles.model.model
    config = model.config
    tiles = [torch.zeros(1 + rows * columns, 9, 32) for rows in range(1, 4) for columns in range(1, 4)]
    best = transformers.image_processing_utils.select_best_resolution((height, width), config.image_grid_pinpoints)
    tile = next(each for each in tiles if len(each) == 1 + best[0] * best[1] // 24**2)
    _, lengths = model.pack_image_features(
        [tile], torch.tensor([[height, width]]), image_newline=model.image_newline, vision_aspect_ratio="anyres_max_4"
    )
    assert llava_of_any_tiles._num_tokens(height, width) == int(lengths[0])


def test_clip_equals_the_stock_model(family, images):
    backbone = family("clip")
    texts = ["", "A Tea pot of cast IRON", "tea " * 60]
    stock_inputs = backbone._tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    assert torch.equal(backbone.text_inputs(texts)["input_ids"][2, :5], stock_inputs["input_ids"][2, :5])
    with torch.inference_mode():
        stock = backbone.model.get_text_features(**stock_inputs).pooler_output
        pixels = backbone._image_processor([image.convert("RGB") for image in images[:3]], return_tensors="pt")
        stock_images = backbone.model.get_image_features(**pixels).pooler_output
    torch.testing.assert_close(texts_of(backbone, texts), stock, **up_to_rounding(stock))
    torch.testing.assert_close(images_of(backbone, images[:3]), stock_images, **up_to_rounding(stock_images))


def test_siglip_equals_the_stock_model(family, images):
    backbone = family("siglip")
    texts = ["", "A Tea pot of cast IRON", "tea " * 60]
    stock_inputs = backbone._tokenizer(
        [text.lower() for text in texts], padding="max_length", truncation=True, max_length=40, return_tensors="pt"
    )
    assert torch.equal(backbone.text_inputs(texts)["input_ids"], stock_inputs["input_ids"])
    with torch.inference_mode():
        stock = backbone.model.get_text_features(input_ids=stock_inputs["input_ids"]).pooler_output
        pixels = backbone._image_processor([image.convert("RGB") for image in images[:3]], return_tensors="pt")
        stock_images = backbone.model.get_image_features(**pixels).pooler_output
    torch.testing.assert_close(texts_of(backbone, texts), stock, **up_to_rounding(stock))
    torch.testing.assert_close(images_of(backbone, images[:3]), stock_images, **up_to_rounding(stock_images))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the stock image processors need torchvision")
@every_family
def test_stock_image_processor_gives_the_same_tensors(family, noise_image, name):
    ours: Any = family(name)._image_processor
    stock: Any = getattr(transformers, type(ours).__name__.removesuffix("Pil")).from_dict(ours.to_dict())
    sizes = [(24, 24), (64, 64), (30, 200), (200, 90), (300, 300)]
    images: Any = [noise_image(6, 6, seed=width).resize((width, height), Image.Resampling.BICUBIC) for width, height in sizes]
    images = [[image] for image in images] if name in {"smolvlm", "idefics3"} else images
    expected, got = (processor(images, return_tensors="pt") for processor in (stock, ours))
    assert expected.keys() == got.keys()
    # torchvision and Pillow round a resized image to whole grey levels apart now and then (and more often in noise)
    levels = (expected["pixel_values"].float() - got["pixel_values"].float()).abs() * 255 * max(ours.image_std)
    assert levels.max() < 2.2
    assert levels.mean() < 0.2


@pytest.mark.parametrize("name", TOWERS)
def test_cut_texts_fill_the_limit(family_params, name):
    backbone = build(family_params(name, max_text_tokens=20), CPU)
    inputs = backbone.text_inputs(["x y " * 200, "tea"])
    assert inputs["attention_mask"].sum(1)[0] == 20
    assert inputs["attention_mask"].sum(1)[1] < 20
    frame = backbone._frame
    assert kept_ids(inputs, 0)[-len(frame.after) :] == frame.after


@every_family
def test_special_tokens_in_a_title_are_plain_characters(family, name):
    backbone = family(name)
    tokenizer = backbone._tokenizer
    special = set(tokenizer.get_added_vocab().values())
    plain = [token for token in kept_ids(backbone.text_inputs(["tea"]), 0) if token in special]
    for word in sorted(tokenizer.get_added_vocab()):
        text = f"tea {word} {word.upper()} pot"
        ids = kept_ids(backbone.text_inputs([text]), 0)
        assert [token for token in ids if token in special] == plain, word
        assert len(ids) > len(plain) + 4, "and they are not simply gone"
        if "image_token" not in word:
            assert texts_of(backbone, [text]).isfinite().all()


# ---------------------------------------------------------------------------------------------- adapters
@every_family
def test_adapter_layers(family, name):
    backbone = family(name)
    num_language, num_vision = LAYERS[name]
    modules = dict(backbone.model.named_modules())
    hit = [module for module in modules if re.fullmatch(backbone.adapter_pattern("language"), module)]
    both = [module for module in modules if re.fullmatch(backbone.adapter_pattern("language_and_vision"), module)]
    assert len(hit) == backbone.num_adapter_layers("language") == num_language
    assert len(both) == backbone.num_adapter_layers("language_and_vision") == num_language + num_vision
    assert all(isinstance(modules[module], torch.nn.Linear) for module in both)
    assert not [module for module in hit if "vis" in module], "no layer of the vision tower unless asked for"
    # by number: every linear layer of the towers' blocks, and none of projectors, pooling heads and the language-model head
    linear = {module for module, kind in modules.items() if isinstance(kind, torch.nn.Linear)}
    blocks = {module for module in linear if re.search(r"\.(layers?|blocks)\.\d+\.", module)}
    assert set(both) == blocks


PUBLISHED = {
    # kind: (class, config, language, language and vision)
    "qwen2_vl 7B": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", 196, 324, {
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                        "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                                                     "mrope_section": [16, 24, 24]}},
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    }),
    "qwen3_vl 8B": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", 252, 360, {
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                        "num_key_value_heads": 8, "head_dim": 128,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                            "mrope_interleaved": True}},
        "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
                          "deepstack_visual_indexes": [8, 16, 24]},
    }),
    "llava_onevision 7B": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", 196, 352, {
        "text_config": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152000},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 384,
                          "patch_size": 14, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False},
    }),
    "internvl 1B": ("InternVLForConditionalGeneration", "InternVLConfig", 168, 312, {
        "text_config": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    }),
    "smolvlm 500M": ("SmolVLMForConditionalGeneration", "SmolVLMConfig", 224, 296, {
        "text_config": {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                        "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280, "pad_token_id": 2},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                          "image_size": 512, "patch_size": 16},
        "scale_factor": 4,
    }),
    "clip L/14": ("CLIPModel", "CLIPConfig", 72, 216, {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                          "patch_size": 14},
        "projection_dim": 768,
    }),
    "siglip B/16": ("SiglipModel", "SiglipConfig", 72, 144, {
        "text_config": {"vocab_size": 256000, "bos_token_id": 2, "eos_token_id": 1}, "vision_config": {},
    }),
}  # fmt: skip


@pytest.mark.parametrize("published", PUBLISHED)
def test_adapter_layers_of_published_sizes(family, published):
    """The patterns of the tiny backbones on the published sizes, without memory for weights."""
    made, described, num_language, num_both, values = PUBLISHED[published]
    config = getattr(transformers, described)(**values)
    with torch.device("meta"):
        model = getattr(transformers, made)(config)
    backbone = family(published.split()[0])
    names = [name for name, _ in model.named_modules()]
    language = [n for n in names if re.fullmatch(backbone.adapter_pattern("language"), n)]
    assert len(language) == num_language
    assert not [n for n in language if "vis" in n], "no layer of the vision tower unless asked for"
    assert len([n for n in names if re.fullmatch(backbone.adapter_pattern("language_and_vision"), n)]) == num_both


def test_suffixes_would_hit_too_much(family):
    """Why the patterns are anchored: the last names alone meet vision towers and a pooling head that is never called."""
    siglip, smolvlm = (dict(family(name).model.named_modules()) for name in ("siglip", "smolvlm"))
    assert [name for name in siglip if re.search(VIT_LINEAR + "$", name) and "head" in name]
    assert [name for name in smolvlm if re.search(LLAMA_LINEAR + "$", name) and "vision" in name]


def moda(**changes) -> AdapterParams:
    values = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "num_experts": 2, "modality_dim": 4} | changes
    shipped = load_params(Path(__file__).resolve().parents[2] / "params.yaml").train_adapter.moda
    return shipped.model_copy(update={"targets": "language_and_vision"} | values)


def adapted(backbone, params, std: float = 0.2):
    pattern, count = backbone.adapter_pattern(params.targets), backbone.num_adapter_layers(params.targets)
    model = adapters.build(backbone.model, params, ["image", "text"], pattern, count, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.normal_(0.0, std, generator=torch.Generator().manual_seed(derive(0, name)))
    return model


@pytest.mark.parametrize("targets", ["language", "language_and_vision"])
@every_family
def test_merged_equals_unmerged(family_params, images, name, targets):
    """Both ways of merging; and the vision tower is adapted only where it is asked for."""
    backbone = build(family_params(name), CPU)
    inputs = {"image": backbone.image_inputs(images[:4], PROMPT), "text": backbone.text_inputs(["", "a tea pot", "tea " * 20])}
    with torch.inference_mode():
        plain = {key: backbone.encode(backbone.model, each) for key, each in inputs.items()}
    model = adapted(backbone, moda(targets=targets))
    layers = [layer for layer, module in model.named_modules() if isinstance(module, adapters.MoDALinear)]
    assert any("vis" in layer for layer in layers) == (targets == "language_and_vision")
    with torch.inference_mode():
        for key, other in (("image", "text"), ("text", "image")):
            if (name in TOWERS, key, targets) == (True, "image", "language"):
                with adapters.modality(model, key):
                    torch.testing.assert_close(
                        backbone.encode(model, inputs[key]), plain[key], **up_to_rounding(plain[key])
                    )  # the other tower
                continue
            with adapters.modality(model, key):
                unmerged = backbone.encode(model, inputs[key])
            with adapters.modality(model, other):
                swapped = backbone.encode(model, inputs[key])
            adapters.merge_modality(model, key)
            torch.testing.assert_close(backbone.encode(model, inputs[key]), unmerged, **up_to_rounding(unmerged))
            adapters.unmerge_modality(model)
            with adapters.merged_modality(model, key):  # as the export does
                assert not any(isinstance(module, adapters.MoDALinear) for module in model.modules())
                torch.testing.assert_close(backbone.encode(model, inputs[key]), unmerged, **up_to_rounding(unmerged))
            assert (unmerged - plain[key]).abs().max() > 1e-2, "the adapter is at work"
            assert (unmerged - swapped).abs().max() > 1e-3, "and looks at the modality"
            with model.disable_adapter():
                torch.testing.assert_close(backbone.encode(model, inputs[key]), plain[key], **up_to_rounding(plain[key]))


@pytest.mark.parametrize(
    ("name", "targets"), [(name, "language_and_vision") for name in FAMILIES] + [("qwen3_vl", "language"), ("clip", "language")]
)
def test_gradient_checkpointing_changes_no_gradient(family_params, images, name, targets):
    found = []
    for on in (False, True):
        backbone: Any = build(family_params(name), CPU)
        assert backbone.model.supports_gradient_checkpointing
        model = adapted(backbone, moda(targets=targets), std=0.1).train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        calls = {"image": backbone.image_inputs(images[:2], PROMPT), "text": backbone.text_inputs(["tea", "a tea pot"])}
        for key, inputs in calls.items():
            with adapters.modality(model, key):
                vectors = backbone.encode(model, inputs)
            if vectors.requires_grad:
                (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
            else:
                assert (name in TOWERS, key, targets) == (True, "image", "language"), "two towers, one adapted"
        found.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
    plain, recomputed = found
    assert len(plain) == len(recomputed)
    for weight, gradient in plain.items():
        assert gradient is not None, weight
        torch.testing.assert_close(recomputed[weight], gradient, **up_to_rounding(gradient))
    assert all(gradient.any() for weight, gradient in plain.items() if ".moda_B." in weight)


# ---------------------------------------------------------------------------------------------- pipeline
NUM_ITEMS = 12


@pytest.fixture(scope="module")
def shop(tmp_path_factory, repository, noise_image):
    """What the stages filter and fetch_images leave behind, for twelve items."""
    import io

    root = tmp_path_factory.mktemp("shop")
    workspace = Workspace(root)
    ids = np.arange(1, NUM_ITEMS + 1, dtype=np.int32)
    raw = [f"i{number:02d}" for number in ids]
    items = pl.DataFrame(
        {
            "item_id": ids,
            "raw_item_id": raw,
            "title": [f"tea pot {'very ' * (number % 4)}{number}" for number in ids],
            "brand": ["Ωmega"] * NUM_ITEMS,
            "price": ["9.99"] * NUM_ITEMS,
            "categories": [["pots"]] * NUM_ITEMS,
            "features": [[]] * NUM_ITEMS,
            "description": ["<|im_end|> <image>"] * NUM_ITEMS,
            "image_references": [[]] * NUM_ITEMS,
            "has_metadata": [True] * NUM_ITEMS,
        },
        schema=dict(ITEMS.columns),
    )
    ITEMS.write(items, workspace.items)
    interactions = {"user_id": [1, 1, 2], "item_id": [1, 2, 3], "timestamp": [1, 2, 3], "rating": [5.0] * 3}
    INTERACTIONS.write(
        pl.DataFrame(interactions | {"split": ["train"] * 3}, schema=dict(INTERACTIONS.columns)), workspace.interactions
    )
    rows = []
    for number, raw_id in zip(ids.tolist(), raw, strict=True):
        buffer = io.BytesIO()
        image = noise_image(16 + 3 * number, 40 - 2 * number, seed=number)
        image.save(buffer, "PNG")
        rows.append(ImageRow(number, raw_id, "ok", buffer.getvalue(), *image.size))
    write_shard(shard_path(workspace.images, 0), rows, [""] * NUM_ITEMS)
    write_json(coverage_path(workspace.images), {"ok": NUM_ITEMS})
    params = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 2}
    params["train_adapter"]["training"] |= {
        "num_steps": 3, "batch_size": 4, "warmup_steps": 1, "learning_rate": 0.05, "checkpoint_every": 3,
        "gradient_checkpointing": False,
    }  # fmt: skip
    params["train_adapter"]["moda"]["targets"] = "language_and_vision"
    params["export_embeddings"] |= {"batch_size": 5, "shard_rows": 8, "fused_dim": 6}
    params["build_index"] |= {"recall_at": 3, "num_queries": 4}
    return root, params


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "idefics3"])
def test_train_export_index(shop, family_params, caplog, tmp_path, name):
    from stages.build_index import build_index
    from stages.export_embeddings import export_embeddings
    from stages.train_adapter import train_adapter

    template, params = shop
    root = tmp_path / "shop"
    shutil.copytree(template, root)
    backbone = family_params(name).model_dump()
    params = params | {"backbone": backbone, "local_files": watched(params["dataset"], backbone, root)}
    YAML(typ="safe", pure=True).dump(params, root / "params.yaml")
    workspace = Workspace(root)
    with caplog.at_level(logging.INFO):
        train_adapter("sda", root)
    num_layers = sum(LAYERS[name])
    assert f"adapted layers {num_layers}" in caplog.text
    assert "never produced a gradient" not in caplog.text
    weights = load_file(workspace.adapter("sda") / "adapter_model.safetensors")
    assert len([key for key in weights if "moda_B" in key]) == num_layers
    for variant in ("zero_shot", "sda"):
        export_embeddings(variant, root)
        build_index(variant, root)
        assert (workspace.index(variant)).is_dir()
    plain, trained = (
        {column: read_vectors(workspace.embeddings(variant), column) for column in ("image_embedding", "text_embedding")}
        for variant in ("zero_shot", "sda")
    )
    for column, vectors in trained.items():
        assert vectors is not None
        assert vectors.shape[0] == NUM_ITEMS + 1
        assert np.isfinite(vectors).all()
        assert np.abs(vectors - plain[column]).max() > 1e-3, "the trained adapter is used"


def test_another_number_of_layers_is_refused(family_params):
    backbone: Any = build(family_params("clip"), CPU)
    from sda_core.errors import TrainingError

    with pytest.raises(TrainingError, match="matches 12 modules, expected 30"):
        adapters.build(
            backbone.model,
            moda(),
            ["image", "text"],
            backbone.adapter_pattern("language"),
            backbone.num_adapter_layers("language_and_vision"),
            seed=1,
        )


# ------------------------------------------------------------------------------------------------- errors
def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@every_family
def test_folder_of_another_family(family_params, tiny_folder, name):
    other = FAMILIES[(FAMILIES.index(name) + 3) % len(FAMILIES)]
    with pytest.raises(ConfigError, match=r"backbone\.name: should be an? .* checkpoint") as error:
        build(family_params(name, name=str(tiny_folder(other))), CPU)
    assert "set backbone.kind" in one_line(error)


@every_family
def test_hub_id_needs_a_commit(family_params, name):
    with pytest.raises(ConfigError, match=r"backbone\.revision: should pin a commit of owner/name") as error:
        build(family_params(name, name="owner/name"), CPU)
    one_line(error)


PROCESSOR_SIZES = {
    "qwen2_vl": {"patch_size": 16}, "qwen3_vl": {"patch_size": 14},
    "llava_onevision": {"size": {"height": 32, "width": 32}}, "internvl": {"size": {"height": 32, "width": 32}},
    "smolvlm": {"max_image_size": {"longest_edge": 64}}, "clip": {"crop_size": {"height": 32, "width": 32}},
    "siglip": {"size": {"height": 32, "width": 32}},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSOR_SIZES)
def test_image_processor_of_another_model(family_params, tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder(name), tmp_path / "copy")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PROCESSOR_SIZES[name]))
    with pytest.raises(ArtifactError, match="image processor and model disagree") as error:
        build(family_params(name, name=str(folder)), CPU)
    one_line(error)


@pytest.mark.parametrize(("name", "tokens"), [("clip", 2), ("clip", 41), ("siglip", 1), ("siglip", 41), ("smolvlm", 5)])
def test_text_lengths_that_cannot_work(family_params, name, tokens):
    with pytest.raises(ConfigError, match=r"backbone\.max_text_tokens: should be more than \d+") as error:
        build(family_params(name, max_text_tokens=tokens), CPU)
    one_line(error)


@every_family
def test_missing_weight_is_one_line(family_params, tiny_folder, tmp_path, name):
    from safetensors.torch import save_file

    folder = shutil.copytree(tiny_folder(name), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    dropped = next(key for key in sorted(weights) if re.search(r"layers\.1\.mlp", key))
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="weights missing") as error:
        build(family_params(name, name=str(folder)), CPU)
    one_line(error)


def test_loading_is_quiet(family_params, capfd):
    for name in FAMILIES:
        build(family_params(name), CPU)
    said = capfd.readouterr()
    assert said.out + said.err == ""


# ------------------------------------------------------------------------------------------------ presets
def presets(repository: Path) -> dict[str, dict]:
    yaml = YAML(typ="safe", pure=True)
    return {file.stem: yaml.load(file) for file in sorted((repository / "conf" / "backbone").glob("*.yaml"))}


def test_there_is_a_preset_of_every_family(repository):
    kinds = {preset["kind"] for preset in presets(repository).values()}
    assert kinds >= {"tiny_qwen2_5_vl", *FAMILIES} - {"idefics3"}


def test_presets_pin_a_commit_or_say_that_one_is_needed(repository):
    from pydantic import TypeAdapter

    from sda_core.params import BackboneParams

    for name, preset in presets(repository).items():
        params = TypeAdapter(BackboneParams).validate_python(preset)
        if params.kind in {"tiny_qwen2_5_vl", "nano", "nano2"} or not re.fullmatch(r"[\w.-]+/[\w.-]+", params.name):
            continue
        if (repository / params.name).is_dir():  # weights of this repository
            continue
        if params.revision is None:
            with pytest.raises(ConfigError, match="should pin a commit"):
                build(params, CPU)
        else:
            assert re.fullmatch(r"[0-9a-f]{40}", params.revision), name
