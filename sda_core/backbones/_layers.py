"""The linear layers of a backbone that an adapter may target: patterns on full names, with the expected number of matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sda_core.params import Targets

LLAMA_LINEAR = r"(?:self_attn\.(?:q_proj|k_proj|v_proj|o_proj)|mlp\.(?:gate_proj|up_proj|down_proj))"
"""The seven linear layers of a decoder layer in Llama, Qwen2 and Qwen3."""

VIT_LINEAR = r"(?:self_attn\.(?:q_proj|k_proj|v_proj|out_proj)|mlp\.(?:fc1|fc2))"
"""The six linear layers of an encoder layer in CLIP and SigLIP, and in towers derived from them."""


@dataclass(frozen=True)
class AdapterLayers:
    """The linear layers of the transformer blocks, by part.

    Patch embeddings, projectors between the parts, pooling heads and the language-model head are excluded: they are few,
    and some are used without a call of their ``forward`` (SigLIP's pooling head), so that an adapter would have no effect.

    Attributes:
        language: pattern for the full names in the language model or text tower.
        num_language: number of layers it matches.
        vision: pattern for the full names in the vision tower.
        num_vision: number of layers it matches.
    """

    language: str
    num_language: int
    vision: str
    num_vision: int

    def pattern(self, targets: Targets) -> str:
        """Regular expression for PEFT's ``target_modules``."""
        match targets:
            case "language":
                return self.language
            case "language_and_vision":
                return f"(?:{self.language}|{self.vision})"

    def count(self, targets: Targets) -> int:
        """The number of modules that :meth:`pattern` should match."""
        match targets:
            case "language":
                return self.num_language
            case "language_and_vision":
                return self.num_language + self.num_vision


class WithAdapterLayers:
    """The part of :class:`~sda_core.backbones.base.Backbone` that names the layers; subclasses set ``_layers``."""

    _layers: AdapterLayers

    def adapter_pattern(self, targets: Targets) -> str:
        """Regular expression for PEFT's ``target_modules``; see :class:`~sda_core.backbones.base.Backbone`."""
        return self._layers.pattern(targets)

    def num_adapter_layers(self, targets: Targets) -> int:
        """The number of modules that :meth:`adapter_pattern` matches."""
        return self._layers.count(targets)


def base_and_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The transformers model inside a PEFT model (or the model itself), and the inputs on its device."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner, {name: tensor.to(inner.device, non_blocking=True) for name, tensor in inputs.items()}
