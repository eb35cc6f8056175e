"""The base weight as a merge needs it: read in full precision, replaced, and put back to the bit.

An ordinary weight is a floating-point tensor.  The linear layers of bitsandbytes hold 8 or 4 bits a number, packed,
with scales beside them; they are merged as PEFT merges them: taken apart, added to, and quantised anew.  Nothing here
imports bitsandbytes: a layer's weight brings its class along, and PEFT knows how to read it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from sda_core.errors import TrainingError


def bits(layer: nn.Module) -> int | None:
    """8 or 4 where bitsandbytes has quantised the layer's weight, else None."""
    weight = layer.weight
    match type(weight).__name__:
        case "Int8Params" if isinstance(weight, Tensor) and weight.dtype == torch.int8:
            return 8
        case "Params4bit" if getattr(weight, "quant_state", None) is not None:
            return 4
        case _:
            return None


def read(layer: nn.Module) -> Tensor:
    """The weight ``(O, D)``, in float32 at least, in memory of its own or as it is.

    Raises:
        TrainingError: the weight is quantised by something else than bitsandbytes, or is sharded.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    match bits(layer):
        case 8:
            full = dequantize_bnb_weight(cast(nn.Parameter, weight), state=layer.state)
        case 4:
            if getattr(cast(Any, weight).quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # a CPU's inference packs the weight in another way; this is what undoes it
            full = dequantize_bnb_weight(cast(nn.Parameter, weight))
        case _:
            kind = type(weight.data)
            if not weight.is_floating_point() or kind is not torch.Tensor:
                shown = weight.dtype if kind is torch.Tensor else kind.__name__
                raise TrainingError(
                    "merge",
                    f"a base weight of type {shown} takes no sum (floating-point and bitsandbytes' weights do)",
                    "load the base model whole and without quantisation, or do without merging",
                )
            full = weight.data
    return full.to(torch.promote_types(full.dtype, torch.float32))


def rounded(layer: nn.Module, full_OD: Tensor) -> Tensor:
    """What :func:`replace` will put in, as far as it can be told before: in the weight's own type where that is a float."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return full_OD.to(weight.dtype) if bits(layer) is None else full_OD


@dataclass
class Kept:
    """What :func:`put_back` needs: a copy on the CPU of an ordinary weight; a quantised one itself, and its scales."""

    weight: Any
    scales: Tensor | None = None


def keep(layer: nn.Module) -> Kept:
    """The weight as it is now."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    match bits(layer):
        case 8:
            return Kept(weight, cast(Any, layer).state.SCB)
        case 4:
            return Kept(weight)
        case _:
            return Kept(weight.data.to("cpu"))


def replace(layer: nn.Module, full_OD: Tensor) -> None:
    """Put another weight in: an ordinary one as it comes from :func:`rounded`, a quantised one quantised anew."""
    anything = cast(Any, layer)
    weight = anything.weight
    number = bits(layer)
    if number is None:
        weight.data = full_OD
        return
    warnings.warn(
        f"merging into weights of {number} bits rounds the sum to {number} bits, so that outputs differ from the unmerged ones",
        stacklevel=3,
    )
    if number == 8:
        new = type(weight)(full_OD.to("cpu"), requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
        anything.weight = new.to(weight.device)
        anything.state.reset_grads()
    else:
        # attributes with an underscore are torch.compile's
        options = {name: value for name, value in vars(weight).items() if not name.startswith("_") and name != "data"}
        options.update(requires_grad=False, bnb_quantized=False, quant_state=None)
        anything.weight = type(weight)(full_OD.to("cpu", weight.quant_state.dtype), **options).to(weight.device)


def put_back(layer: nn.Module, kept: Kept) -> None:
    """Restore what :func:`keep` kept."""
    anything = cast(Any, layer)
    match bits(layer):
        case 8:
            anything.weight = kept.weight
            anything.state.reset_grads()  # forgets the merged weight's scales ...
            anything.state.SCB = kept.scales  # ... and has those that the layer had taken over from its weight
            if kept.scales is not None:
                anything.state.CB = kept.weight.data
        case 4:
            anything.weight = kept.weight
            anything.quant_state = kept.weight.quant_state
        case _:
            weight = anything.weight
            weight.data = kept.weight.to(weight.device, weight.dtype)
