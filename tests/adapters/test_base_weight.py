"""Base weights that are no plain tensors: those of bitsandbytes work as in PEFT, all others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import MoDAConfig, merge_modality, merged_modality, modality, unmerge_modality
from sda_core.errors import TrainingError

MERGE_WARNING = "ignore:merging into weights of .* bits:UserWarning"


def linear_of(bits: int) -> Callable[[int, int], nn.Module]:
    bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quantized`)")
    if bits == 8:
        return lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)
    return lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4")


def quantised(bits: int, gate: str = "modality") -> peft.PeftModel:
    """Two layers of 8 or 4 bits with a random adapter."""
    linear = linear_of(bits)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model = nn.Sequential(linear(64, 128), nn.Tanh(), linear(128, 64))
    model.load_state_dict(plain.state_dict())
    config = MoDAConfig(target_modules=["0", "2"], lora_dropout=0.0, gate=gate)
    adapted = peft.get_peft_model(model.to("cpu"), config)  # .to quantises
    for name, parameter in adapted.named_parameters():
        if "moda_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def as_saved(layer: nn.Module) -> Tensor:
    """The weight in the form of a file: a pass without gradients packs 4 bits otherwise on processors with AVX512-BF16."""
    return layer.state_dict()["weight"]


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("image", "text"):
        with modality(model, name), torch.no_grad():
            found[name] = model(x)
    return found


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


@pytest.mark.filterwarnings(MERGE_WARNING)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_merge_is_pefts_and_comes_off_to_the_bit(bits: int) -> None:
    model = quantised(bits).eval()
    x = torch.randn(5, 64)
    before = outputs(model, x)
    base_weight = as_saved(model.base_model.model[0].base_layer).clone()
    error = {8: 0.05, 4: 0.4}[bits]  # of quantising the sum anew; outputs are about 1
    for name in ("image", "text", "image"):
        merge_modality(model, name)
        merged = model(x)
        assert 0 < (merged - before[name]).abs().max() < error
        other = {"image": "text", "text": "image"}[name]
        assert (merged - before[name]).norm() < (merged - before[other]).norm()
        assert not model.base_model.model[0].base_layer.weight.is_floating_point()
    unmerge_modality(model)
    assert torch.equal(as_saved(model.base_model.model[0].base_layer), base_weight)
    after = outputs(model, x)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with merged_modality(model, "text"):
        assert torch.equal(model(x), model(x))
    assert all(torch.equal(output, before[name]) for name, output in outputs(model, x).items())


@pytest.mark.filterwarnings(MERGE_WARNING, "ignore:Merge lora module to .-bit:UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_uniform_adapter_merges_as_pefts_lora_does(bits: int) -> None:
    ours = quantised(bits, gate="uniform").eval()
    theirs = quantised(bits).unload()
    setattr(theirs, f"is_loaded_in_{bits}bit", True)  # as transformers marks a model; PEFT's LoRA asks for it
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["0", "2"])
    ).eval()  # alpha 32 over four experts
    for index in (0, 2):
        layer, target = ours.base_model.model[index], theirs.base_model.model[index]
        with torch.no_grad():
            target.lora_A["default"].weight.copy_(layer.moda_A["default"])
            target.lora_B["default"].weight.copy_(layer.moda_B["default"])
    x = torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.state_dict()  # PEFT reads the weight as it lies, and where a pass has packed it, that is another one
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs.merge_and_unload()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(MERGE_WARNING, "ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_merges_of_two_adapters_one_by_one(bits: int) -> None:
    """Quantised once, from the weights that were there, whatever was merged before; and off to the bit."""
    model = quantised(bits).eval()
    model.add_adapter("other", model.peft_config["default"])
    nn.init.normal_(model.base_model.model[0].moda_B["other"], std=0.1)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 64)
    before, base = outputs(model, x), model.base_model.model[0].base_layer
    base_weight = as_saved(base).clone()
    found = []
    for steps in ([None], [["default"], ["other"]]):
        for names in steps:
            with modality(model, "text"):
                model.merge_adapter(adapter_names=names)
            error = (outputs_of_text(model, x) - before["text"]).abs().max()
            assert 0 < error < {8: 0.05, 4: 0.4}[bits]
        found.append(as_saved(base).clone())
        model.unmerge_adapter()
        assert torch.equal(as_saved(base), base_weight)
    assert torch.equal(*found)
    after = outputs(model, x)
    assert all(torch.equal(after[name], before[name]) for name in before)


def outputs_of_text(model: nn.Module, x: Tensor) -> Tensor:
    with modality(model, "text"), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_merge_says_that_it_rounds(bits: int) -> None:
    model = quantised(bits)
    with pytest.warns(UserWarning, match=f"merging into weights of {bits} bits rounds the sum to {bits} bits"):
        merge_modality(model, "image")


class Sharded(Tensor):
    """A tensor of another kind, as those of FSDP and torchao are."""


def test_other_kinds_of_weights_take_no_sum() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), MoDAConfig(target_modules=["0"]))
    layer = model.base_model.model[0].base_layer
    weight = layer.weight.data
    for other, name in ((weight.as_subclass(Sharded), "Sharded"), (weight.to(torch.int8), r"torch\.int8")):
        layer.weight = nn.Parameter(other, requires_grad=False)
        with pytest.raises(TrainingError, match=f"a base weight of type {name} takes no sum"):
            merge_modality(model, "image")
