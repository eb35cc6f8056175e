"""Gate mass by layer, modality and expert."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from sda_core.adapters import MoDAConfig
from sda_core.diagnostics import gate_mass, gate_similarity
from sda_core.errors import TrainingError


def adapted(**options: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return peft.get_peft_model(base, MoDAConfig(**{"r": 4, "target_modules": ["0", "1"], "modality_dim": 2, **options}))


def test_mass_is_the_softmax_of_the_gate() -> None:
    model = adapted(num_experts=2, modalities=["image", "text", "sound"])
    layer = model.base_model.model[1]
    with torch.no_grad():
        layer.moda_embedding["default"].copy_(torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)], [0.0, 0.0]]))
        layer.moda_gate["default"].copy_(torch.eye(2))
    found = gate_mass(model)
    assert [(record.layer.rpartition(".")[2], record.modality) for record in found] == [
        (name, modality) for name in "01" for modality in ("image", "text", "sound")
    ]
    image, text, sound = found[3:]
    assert image.mass == pytest.approx((0.75, 0.25))
    assert text.mass == pytest.approx((0.25, 0.75))
    assert sound.mass == pytest.approx((0.5, 0.5))
    assert sound.num_effective == pytest.approx(2)
    assert image.num_effective == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    similarity = list(gate_similarity(model).values())[1]
    assert similarity[0, 1].item() == pytest.approx(2 * 0.75 * 0.25 / (0.75**2 + 0.25**2))
    assert similarity[0, 2].item() == pytest.approx(math.sqrt(0.5) / math.sqrt(0.75**2 + 0.25**2))
    assert similarity.diagonal().tolist() == pytest.approx([1, 1, 1])


def test_gates_that_are_not_learned() -> None:
    own = gate_mass(adapted(num_experts=4, gate="onehot"))
    assert [record.mass for record in own[:2]] == [(1, 1, 0, 0), (0, 0, 1, 1)]
    assert own[0].num_effective == pytest.approx(2)
    assert next(iter(gate_similarity(adapted(num_experts=4, gate="onehot")).values()))[0, 1].item() == 0
    lora = gate_mass(adapted(num_experts=1, gate="uniform"))
    assert {record.mass for record in lora} == {(1.0,)}
    with pytest.raises(TrainingError, match="has no MoDA adapter"):
        gate_mass(nn.Linear(2, 2))
