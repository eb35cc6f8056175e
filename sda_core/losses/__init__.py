"""Losses on pairs of embeddings: tensors in, a scalar out; none of them owns a model."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor, nn

from sda_core.errors import ConfigError
from sda_core.losses.cmsa import cmsa, cmsa_reference
from sda_core.losses.infonce import infonce
from sda_core.params import LossParams

__all__ = ["AlignmentLoss", "build", "cmsa", "cmsa_reference", "infonce"]

_MIN_LOG_TEMPERATURE = math.log(0.01)  # CLIP's bound on a learned temperature (Radford et al. 2021, section 2.5)


class AlignmentLoss(nn.Module):
    """The loss that a params section describes, with its temperature.

    A learned temperature is held as its logarithm and kept at or above 0.01 (or the start, where that is lower); for
    ``variant: reference`` it is held as it is, as in the public code.

    Args:
        params: the loss's section.

    Raises:
        ConfigError: ``variant: reference`` together with options that the public code does not have.
    """

    def __init__(self, params: LossParams) -> None:
        super().__init__()
        self.params = params
        start = torch.tensor(params.temperature)
        match params.variant:
            case "paper":
                value = start.log()
            case "reference":
                _check_reference(params)
                value = start
            case _:
                assert_never(params.variant)
        self._raw = nn.Parameter(value) if params.learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a differentiable scalar where it is learned."""
        if self._raw is None:
            return self.params.temperature
        return self._raw if self.params.variant == "reference" else self._raw.exp()

    def forward(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """The loss of a batch; row ``i`` of one belongs to row ``i`` of the other."""
        params = self.params
        if self._raw is not None and params.variant == "paper":
            with torch.no_grad():  # on the parameter, so that it can come back from the bound
                self._raw.clamp_(min=min(_MIN_LOG_TEMPERATURE, math.log(params.temperature)))
        if params.variant == "reference":
            return cmsa_reference(image_BD, text_BD, self.temperature)
        match params.teacher:
            case "none":
                return infonce(image_BD, text_BD, self.temperature, params.normalize)
            case "mean" | "image" | "text" | "agreement":
                return cmsa(
                    image_BD,
                    text_BD,
                    self.temperature,
                    teacher=params.teacher,
                    teacher_temperature=params.teacher_temperature,
                    detach_teacher=params.detach_teacher,
                    normalize=params.normalize,
                )
            case _:
                assert_never(params.teacher)


def _check_reference(params: LossParams) -> None:
    """The public code has no such options; a section that sets them would not say what is computed."""
    fixed = {"teacher": "mean", "teacher_temperature": None, "detach_teacher": False, "normalize": False}
    wrong = {name: value for name, value in fixed.items() if getattr(params, name) != value}
    if wrong:
        raise ConfigError(
            "params.yaml: train_adapter loss section",
            "variant 'reference' computes what the public code does, whatever "
            f"{', '.join(f'{name} (got {getattr(params, name)!r})' for name in wrong)} should say",
            "set "
            + ", ".join(f"{name}: {'null' if value is None else str(value).lower()}" for name, value in wrong.items())
            + "; the public code also has temperature: 3.0, learn_temperature: true",
        )


def build(params: LossParams) -> AlignmentLoss:
    """The loss that a params section describes; see :class:`AlignmentLoss`."""
    return AlignmentLoss(params)
