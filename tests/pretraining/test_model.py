"""The batched forward pass of the pre-training against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

import sda_core.backbones
from pretraining.common import settings
from pretraining.model import Encoder, configuration, first_weights, patches, principal_axes, vision_forward
from pretraining.tokenizer import train_tokenizer
from sda_core.backbones import build, save_backbone
from sda_core.backbones.qwen2_5_vl import SPECIAL_TOKENS, Qwen25VLBackbone
from sda_core.params import Qwen25VL

TEXTS = ["red apple", "A small GREEN pear, 12 oz", "", "pair of well-made leather shoes for men, size 8"]
PROMPT = "picture of an item"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    params = settings()["model"] | {"num_layers": 2, "intermediate_size": 128, "vision_intermediate_size": 128}
    rng = np.random.default_rng(0)
    num_plain = len(tokenizer) - len(SPECIAL_TOKENS)
    shares = np.full(num_plain, 1 / num_plain)
    vectors = rng.normal(size=(num_plain, params["hidden_size"] - params["num_free_columns"]))
    model = first_weights(configuration(params, tokenizer), vectors, shares, params["num_free_columns"], 3)
    return Encoder(model.eval(), tokenizer, ["another line", PROMPT])


@pytest.fixture(scope="module")
def backbone(encoder, tmp_path_factory) -> Qwen25VLBackbone:
    """The same model as the project loads it."""
    from pretraining.export import write_checkpoint

    folder = tmp_path_factory.mktemp("nano")
    write_checkpoint(encoder.model, encoder.tokenizer, folder, torch.float32)
    params = Qwen25VL(
        kind="qwen2_5_vl", name=str(folder), revision=None, dtype="float32", attention="sdpa",
        min_pixels=784, max_pixels=12544, max_text_tokens=128, pooling="mean",
    )  # fmt: skip
    loaded = build(params, torch.device("cpu"))
    save_backbone(loaded, folder.parent / "again")
    return loaded


def test_the_settings_are_those_of_the_released_checkpoint():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(sda_core.backbones.__file__).parent / "nano")
    made = configuration(settings()["model"], tokenizer).to_dict()
    released = Qwen2_5_VLConfig.from_pretrained(Path(sda_core.backbones.__file__).parent / "nano").to_dict()
    apart = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {name: value for name, value in made.items() if name not in apart} == {
        name: value for name, value in released.items() if name not in apart
    }


def test_texts_equal_the_backbone(encoder, backbone):
    with torch.no_grad():
        ours = encoder.texts(encoder.words(TEXTS, 64))
        theirs = backbone.encode(backbone.model, backbone.text_inputs(TEXTS))
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(112, 112), (84, 112), (112, 84), (56, 140)])
def test_images_equal_the_backbone(encoder, backbone, height, width):
    rng = np.random.default_rng(height + width)
    pixels = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    rgb = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        ours = encoder.images(rgb, prompt=1)
        theirs = backbone.encode(backbone.model, backbone.image_inputs([Image.fromarray(image) for image in pixels], PROMPT))
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_tower_equals_the_stock_tower(encoder):
    visual = encoder.model.model.visual
    cut = patches(torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        ours = vision_forward(visual, cut, encoder.grid(8, 8))
        theirs = visual(cut.flatten(0, 1), torch.tensor([[1, 8, 8]] * 3)).pooler_output
    assert torch.allclose(ours.flatten(0, 1), theirs, atol=1e-5)


def test_windows_are_in_force(encoder):
    grid = encoder.grid(8, 8)
    assert grid.window_mask_NN.sum(1).tolist() == [16] * 64  # 56 pixels = 4 x 4 patches
    assert not grid.window_mask_NN[0, 63]


def test_principal_axes_keep_cosines_and_have_one_sign():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 12)) @ np.diag([5, 4, 3, 2] + [0.01] * 8)
    axes = principal_axes(vectors, 4)
    assert np.allclose(axes.T @ axes, np.eye(4))
    assert np.allclose((vectors @ axes) @ (vectors @ axes).T, vectors @ vectors.T, atol=0.1)
    assert np.all(axes[np.abs(axes).argmax(0), np.arange(4)] > 0)
    assert np.allclose(axes, principal_axes(-vectors, 4))
