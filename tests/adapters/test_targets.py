"""What a pattern would hit, seen before a model is touched."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
from torch import nn

from sda_core.adapters import MoDAConfig, MoDALinear, targets
from sda_core.errors import ConfigError, TrainingError

SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_suffixes_that_hit_the_vision_tower_are_seen(tiny_vl: Callable[[], nn.Module]) -> None:
    model = tiny_vl()
    hit = targets(model, SUFFIXES)
    vision = {kind: count for kind, count in hit.by_kind.items() if ".visual." in kind}
    assert vision == {f"model.visual.blocks.*.mlp.{name}_proj": 2 for name in ("down", "gate", "up")}
    assert len(hit) == 3 * 7 + 2 * 3
    assert "model.visual.blocks.*.mlp.up_proj x2" in str(hit)
    assert str(hit).startswith("27 linear layers: ")
    assert len(targets(model, SUFFIXES, exclude=r".*visual.*")) == 21
    assert targets(model, r".*\.layers\.0\.mlp\.up_proj").names == ("model.language_model.layers.0.mlp.up_proj",)


def test_what_is_seen_is_what_is_adapted(tiny_vl: Callable[[], nn.Module]) -> None:
    expected = targets(tiny_vl(), SUFFIXES).names
    model = peft.inject_adapter_in_model(MoDAConfig(target_modules=SUFFIXES), tiny_vl())
    assert [name for name, module in model.named_modules() if isinstance(module, MoDALinear)] == list(expected)
    assert targets(model, SUFFIXES).names == expected  # an adapted layer is one layer


def test_what_is_not_linear_is_named() -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    hit = targets(model, r"up|norm|nothing")
    assert hit.others == {"norm": "LayerNorm"}
    assert str(hit) == "1 linear layer: up x1; not linear: norm (LayerNorm)"
    assert str(targets(model, "nothing")) == "0 linear layers"
    with pytest.raises(ConfigError, match=r"target_modules: '\(' is not a regular expression"):
        targets(model, "(")


def test_targets_that_match_nothing(tiny_vl: Callable[[], nn.Module]) -> None:
    with pytest.raises(TrainingError, match=r"\['nowhere'\] matches no module of this Qwen2_5_VL.*; linear layers here are .*x3"):
        peft.inject_adapter_in_model(MoDAConfig(target_modules=["nowhere"]), tiny_vl())
    everything = MoDAConfig(target_modules=["0"], exclude_modules=["0"])
    with pytest.raises(TrainingError, match=r"matches no module of this Sequential outside of \['0'\]"):
        peft.inject_adapter_in_model(everything, nn.Sequential(nn.Linear(2, 2)))


def test_layers_that_are_never_called_are_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TrainingError, match=r"attention\.out_proj: is part of a torch\.nn\.MultiheadAttention"):
        peft.inject_adapter_in_model(MoDAConfig(target_modules=["out_proj"]), model)
