"""The vision tower run by itself: the same vectors, without the images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sda_core.adapters import build
from sda_core.backbones import VisionTower
from tests.sections import SHIPPED, changed
from tests.tolerances import up_to_rounding

PROMPT = "The picture shows a product."


def test_vectors_are_the_same_without_running_the_tower(tiny: Any, noise_image: Any, monkeypatch: Any) -> None:
    assert isinstance(tiny, VisionTower)
    images = [noise_image(28 + 40 * place, 90 - 20 * place, seed=place) for place in range(3)]
    with torch.no_grad():
        expected = tiny.encode(tiny.model, tiny.image_inputs(images, PROMPT))
        features = [one for image in reversed(images) for one in tiny.vision_features([image])]
        inputs = tiny.image_inputs_from(features[::-1], PROMPT)
        monkeypatch.setattr(tiny.model.model.visual, "forward", None)
        found = tiny.encode(tiny.model, inputs)
    assert len({len(one["tokens"]) for one in features}) > 1
    assert "pixel_values" not in inputs
    torch.testing.assert_close(found, expected, **up_to_rounding(expected))


def test_a_tower_that_learns_is_not_run_ahead(make_tiny: Any) -> None:
    adapter = changed(SHIPPED.train_adapter.lora, r=2, lora_alpha=2.0, lora_dropout=0.0)
    for targets, expected in (("language", []), ("language_and_vision", None)):
        backbone = make_tiny()
        layers = backbone.adapter_pattern(targets), backbone.num_adapter_layers(targets)
        build(backbone.model, adapter, ["image", "text"], *layers, seed=0)
        assert backbone.vision_features([]) == expected


@pytest.fixture
def make_tiny(tiny_params: Any) -> Any:
    from sda_core.backbones import build as build_backbone

    return lambda: build_backbone(tiny_params(), torch.device("cpu"))
