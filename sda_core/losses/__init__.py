"""Losses on embeddings of several modalities: tensors in, a scalar out; none of them owns a model."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor, nn

from sda_core.errors import ConfigError, TrainingError
from sda_core.losses.cmsa import cmsa, cmsa_many, cmsa_reference, log_teacher, pool_width
from sda_core.losses.infonce import infonce, infonce_many, prepare
from sda_core.losses.measures import measures
from sda_core.losses.twins import find_twins, same_group
from sda_core.params import LossParams, loss_problems

__all__ = ["AlignmentLoss", "build", "cmsa", "cmsa_many", "cmsa_reference", "infonce", "infonce_many", "measures"]

_MIN_LOG_TEMPERATURE = math.log(0.01)  # CLIP's bound on a learned temperature (Radford et al. 2021, section 2.5)


class AlignmentLoss(nn.Module):
    """The loss that a params section describes, with its temperature.

    A learned temperature is held as its logarithm and kept at or above 0.01 (or the start, where that is lower); for
    ``variant: reference`` it is held as it is, as in the public code.

    Args:
        params: the loss's section.

    Attributes:
        needs_base: whether the teacher looks at the backbone's own vectors (``teacher_source: base``), which have to be given.

    Raises:
        ConfigError: the section contradicts itself; see :func:`sda_core.params.loss_problems`.
    """

    def __init__(self, params: LossParams) -> None:
        super().__init__()
        self.params = params
        self.needs_base = params.teacher_source == "base"
        if problems := list(loss_problems(params)):
            raise ConfigError("params.yaml: train_adapter loss section", "; ".join(problems))
        start = torch.tensor(params.temperature)
        start = start if params.variant == "reference" else start.log()
        self._raw = nn.Parameter(start) if params.learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a differentiable scalar where it is learned."""
        if self._raw is None:
            return self.params.temperature
        return self._raw if self.params.variant == "reference" else self._raw.exp()

    def forward(
        self, image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None = None, base: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch; row ``i`` of one belongs to row ``i`` of the other.

        Args:
            image_BD: ``(B, D)``.
            text_BD: ``(B, D)``.
            groups_B: ``(B,)`` integers, equal for rows that show the same thing; see ``false_negatives`` of :func:`cmsa`.
            base: image and text vectors ``(B, D')`` of the same items by the backbone without its adapter, which teach where
                ``needs_base`` is true, and are not looked at elsewhere.

        Raises:
            TrainingError: the section's ``false_negatives`` needs groups, and there are none, or not one integer a row; or
                ``needs_base``, and ``base`` is None.
        """
        params = self.params
        teaching = self._teaching(base)
        if self._raw is not None and params.variant == "paper":
            with torch.no_grad():  # on the parameter, so that it can come back from the bound
                self._raw.clamp_(min=min(_MIN_LOG_TEMPERATURE, math.log(params.temperature)))
        if params.variant == "reference":
            return cmsa_reference(image_BD, text_BD, self.temperature)
        match params.teacher:
            case "none":
                return infonce(
                    image_BD,
                    text_BD,
                    self.temperature,
                    params.normalize,
                    groups_B=groups_B,
                    false_negatives=params.false_negatives,
                )
            case "mean" | "image" | "text" | "agreement":
                return cmsa(
                    image_BD,
                    text_BD,
                    self.temperature,
                    teacher=params.teacher,
                    teacher_temperature=params.teacher_temperature,
                    detach_teacher=params.detach_teacher,
                    normalize=params.normalize,
                    groups_B=groups_B,
                    false_negatives=params.false_negatives,
                    taught_by=teaching,
                )
            case _:
                assert_never(params.teacher)

    def _teaching(self, base: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Image and text vectors that teach, where they are not the trained ones."""
        if not self.needs_base:
            return None
        if base is None:
            raise TrainingError("loss", "teacher_source 'base' needs the vectors of the backbone without its adapter (got none)")
        return base

    @torch.no_grad()
    def diagnostics(
        self, image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None = None, base: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """What the loss sees in a batch, as plain numbers: the names and meanings are those of :func:`measures`.

        With ``teacher: none`` the targets are hard: entropy 0, one target a row (``false_negatives: share`` has more).

        Args:
            image_BD: ``(B, D)``.
            text_BD: ``(B, D)``, row ``i`` belongs to row ``i`` of the images.
            groups_B: as :meth:`forward` takes it; besides, rows of one group are no rivals in ``retrieval``.
            base: as :meth:`forward` takes it.  Where it teaches, entropy, targets and agreement are those of its structures,
                the rest is about the trained vectors.

        Raises:
            TrainingError: as :meth:`forward`.
        """
        params = self.params
        v_BD, t_BD = self._teaching(base) or (image_BD, text_BD)
        v_BD, t_BD = prepare({"image": v_BD, "text": t_BD}, params.normalize).values()
        twins = find_twins(groups_B, params.false_negatives, v_BD)
        if params.variant == "reference":
            v_BD, t_BD, teacher_temperature = pool_width(v_BD), pool_width(t_BD), 1 / self.temperature
        else:
            teacher_temperature = params.teacher_temperature or self.temperature
        structures = {"image": v_BD @ v_BD.T, "text": t_BD @ t_BD.T}
        log_teacher_BB = log_teacher(structures, params.teacher, teacher_temperature, twins)
        same_BB = None if groups_B is None else same_group(groups_B, v_BD)
        return measures(image_BD, text_BD, log_teacher_BB, structures, teacher_temperature, twins, same_BB)


def build(params: LossParams) -> AlignmentLoss:
    """The loss that a params section describes; see :class:`AlignmentLoss`."""
    return AlignmentLoss(params)
