"""The cached outputs of a frozen vision tower change nothing and are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sda_core.adapters import build
from sda_core.errors import ConfigError
from tests.alignment.toy import (
    MODA,
    TRAINING,
    assert_bit_equal,
    items,
    run,
    run_tiny,
    tiny_backbone,
    weights,
)
from tests.sections import changed
from tests.tolerances import a_tenth_of_a_step


def test_a_vision_cache_changes_nothing_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sda_core.backbones.qwen2_5_vl import Qwen25VLBackbone

    shown: list[int] = []
    features = Qwen25VLBackbone.vision_features

    def counting(self: Any, images: Any) -> Any:
        shown.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Qwen25VLBackbone, "vision_features", counting)
    plain, curve = run_tiny(tmp_path / "plain")
    assert not shown
    cached, cached_curve = run_tiny(tmp_path / "cached", vision_cache="always")
    assert sum(shown) == 19
    assert [record.loss for record in cached_curve] == pytest.approx([record.loss for record in curve], rel=1e-3)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], value, **a_tenth_of_a_step(TRAINING.learning_rate))
    (tmp_path / "cached" / "checkpoint").unlink()
    shown.clear()
    again, again_curve = run_tiny(tmp_path / "cached", vision_cache="always")
    assert sum(shown) == 0
    assert again_curve == cached_curve
    assert_bit_equal(again, cached)
    (block,) = (tmp_path / "cached").glob("vision-*.safetensors")
    whole = block.read_bytes()
    (tmp_path / "cached" / "checkpoint").unlink()
    block.write_bytes(whole[: len(whole) // 2])
    run_tiny(tmp_path / "cached", vision_cache="always", num_steps=1)
    assert sum(shown) == 19  # a torn block is made again
    assert block.read_bytes() == whole


def test_auto_makes_a_vision_cache_where_it_pays() -> None:
    from sda_core.alignment.vision_cache import open_cache

    backbone, source = tiny_backbone(), items()
    rows = np.flatnonzero(source.shows_image)

    def asked(**changes: Any) -> bool:
        training = changed(TRAINING, **({"vision_cache": "auto", "num_steps": 10, "batch_size": 4} | changes))
        return open_cache(backbone, source, rows, training, Path(), "inputs") is not None

    assert asked()  # 40 shows of 19 items
    assert not asked(num_steps=9)
    assert asked(num_steps=9, vision_cache="always")
    assert not asked(vision_cache="never")
    assert not asked(sharding="fsdp")
    build(backbone.model, MODA, ["image", "text"], backbone.adapter_pattern("language"), 14, seed=1)
    assert asked()
    backbone = tiny_backbone()
    num_layers = backbone.num_adapter_layers("language_and_vision")
    build(backbone.model, MODA, ["image", "text"], backbone.adapter_pattern("language_and_vision"), num_layers, seed=1)
    assert not asked()  # the tower learns


def test_a_vision_cache_that_cannot_be_had(tmp_path: Path) -> None:
    message = "vision_cache: is 'always', and a Encoder has no frozen vision tower"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, changed(TRAINING, vision_cache="always"))
    with pytest.raises(ConfigError, match="has no frozen vision tower"):
        run_tiny(tmp_path, vision_cache="always", targets="language_and_vision")
    with pytest.raises(ConfigError, match="sharding: is 'fsdp', which shards the model over several processes"):
        run_tiny(tmp_path, sharding="fsdp")
