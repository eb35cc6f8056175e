"""Base weights that are no plain tensors: passes work beside those of bitsandbytes, and merges are rejected by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import MoDAConfig, merge_modality, modality
from sda_core.errors import TrainingError


def linear_of(bits: int) -> Callable[[int, int], nn.Module]:
    bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quantized`)")
    if bits == 8:
        return lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)
    return lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4")


def quantised(bits: int) -> peft.PeftModel:
    """Two layers of 8 or 4 bits with a random adapter."""
    linear = linear_of(bits)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model = nn.Sequential(linear(64, 128), nn.Tanh(), linear(128, 64))
    model.load_state_dict(plain.state_dict())
    config = MoDAConfig(target_modules=["0", "2"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model.to("cpu"), config)  # .to quantises
    for name, parameter in adapted.named_parameters():
        if "moda_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("bits", [8, 4])
def test_forward_and_gradients_go_through_the_base_layer(bits: int) -> None:
    model = quantised(bits)
    layer = model.base_model.model[0]
    assert not layer.base_layer.weight.is_floating_point()
    assert {p.dtype for name, p in model.named_parameters() if "moda_" in name} == {torch.float32}
    x = torch.randn(4, 3, 64, requires_grad=True)
    with modality(layer, [0, 1, 1, 0]):
        y = layer(x)
    base = layer.base_layer(x)
    for row, name in enumerate(("image", "text", "text", "image")):
        expected = base[row] + x[row] @ layer.get_delta_weight("default", name).T
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-5)
    with modality(model, "text"):
        model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert x.grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_a_merge_is_rejected(bits: int) -> None:
    model = quantised(bits)
    with pytest.raises(
        TrainingError, match=r"cannot merge into a base weight of type torch\.u?int8; load .* without quantisation"
    ):
        merge_modality(model, "image")


class Sharded(Tensor):
    """A tensor of another kind, as those of FSDP and torchao are."""


def test_merging_into_other_kinds_of_weights_is_rejected() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), MoDAConfig(target_modules=["0"]))
    layer = model.base_model.model[0].base_layer
    weight = layer.weight.data
    for other, name in ((weight.as_subclass(Sharded), "Sharded"), (weight.to(torch.int8), r"torch\.int8")):
        layer.weight = nn.Parameter(other, requires_grad=False)
        with pytest.raises(TrainingError, match=f"cannot merge into a base weight of type {name}"):
            merge_modality(model, "image")
