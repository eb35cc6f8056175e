"""Losses on embeddings of several modalities: functions of tensors that return a scalar, independent of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sda_core.errors import ConfigError, TrainingError
from sda_core.losses.cmsa import cmsa, cmsa_many, cmsa_reference, log_teacher, pool_width
from sda_core.losses.geometry import Centering, effective_targets, temperature_for
from sda_core.losses.infonce import infonce, infonce_many, prepare
from sda_core.losses.keep import keep_structure
from sda_core.losses.measures import measures
from sda_core.losses.twins import Twins, find_twins, same_group
from sda_core.params import LossParams, loss_problems

__all__ = [
    "AlignmentLoss",
    "build",
    "cmsa",
    "cmsa_many",
    "cmsa_reference",
    "infonce",
    "infonce_many",
    "keep_structure",
    "measures",
]

Pair = tuple[Tensor, Tensor]
"""Image and text vectors, ``(B, D)`` each."""

_MIN_LOG_TEMPERATURE = math.log(0.01)  # CLIP's bound on a learned temperature (Radford et al. 2021, section 2.5)


class AlignmentLoss(nn.Module):
    """The loss of a params section, with its temperature.

    A learned temperature is stored as its logarithm and kept at or above 0.01 (or the start value, if that is lower); for
    ``variant: reference`` it is stored directly, as in the public code.

    All vectors, including those of the teacher, are first centred (``center``).  With ``keep_base`` above 0,
    ``keep_base`` times :func:`~sda_core.losses.keep.keep_structure` is added, at the teacher's temperature.

    Args:
        params: section of the loss.

    Attributes:
        needs_base: whether the vectors of the backbone without adapter must be given, for the teacher
            (``teacher_source: base``) or to keep their structure (``keep_base``).
        found_temperature: calibrated temperature of the teacher, for ``teacher_targets``; None before :meth:`calibrate`.

    Raises:
        ConfigError: settings of the section contradict each other; see :func:`sda_core.params.loss_problems`.
    """

    def __init__(self, params: LossParams) -> None:
        super().__init__()
        self.params = params
        if problems := list(loss_problems(params)):
            raise ConfigError("params.yaml: train_adapter loss section", "; ".join(problems))
        self._base_teaches = params.teacher_source == "base"
        self.needs_base = self._base_teaches or params.keep_base > 0
        self.found_temperature: float | None = None
        self.center = Centering(params.center)
        start = torch.tensor(params.temperature)
        start = start if params.variant == "reference" else start.log()
        self._raw = nn.Parameter(start) if params.learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """The current temperature: a number, or a differentiable scalar if it is learned."""
        if self._raw is None:
            return self.params.temperature
        return self._raw if self.params.variant == "reference" else self._raw.exp()

    def forward(
        self, image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None = None, base: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch; row ``i`` of images and texts is the same item.

        Args:
            image_BD: ``(B, D)`` image vectors.
            text_BD: ``(B, D)`` text vectors.
            groups_B: ``(B,)`` integers, equal for rows with equal content; see ``false_negatives`` of :func:`cmsa`.
            base: image and text vectors ``(B, D')`` of the same items by the backbone without its adapter; used only if
                ``needs_base`` is true.

        Raises:
            TrainingError: ``false_negatives`` needs groups, but there are none, or not one integer per row; or ``needs_base``
                is true and ``base`` is None.
        """
        self._check_base(base)
        own = self._own_teacher_temperature()  # before the running means are updated, because it may raise
        pair, base = self._centred((image_BD, text_BD), base, update=True)
        value = self._alignment(pair, groups_B, base if self._base_teaches else None, own)
        if base is None or self.params.keep_base == 0:
            return value
        twins = find_twins(groups_B, self.params.false_negatives, pair[0])
        sharpness = self.teacher_temperature
        kept = keep_structure(_by_name(pair), _by_name(base), sharpness, self.params.normalize, twins)
        return value + self.params.keep_base * kept

    @property
    def teacher_temperature(self) -> float | Tensor:
        """The temperature of the teacher.

        Raises:
            TrainingError: ``teacher_targets`` is set and :meth:`calibrate` was not called yet.
        """
        own = self._own_teacher_temperature()
        return self.temperature if own is None else own

    def _own_teacher_temperature(self) -> float | None:
        """The teacher's temperature, set or calibrated; None if it is the student's."""
        if self.params.teacher_targets is None:
            return self.params.teacher_temperature
        if self.found_temperature is None:
            raise TrainingError("loss", "teacher_targets needs calibrate() first, which finds the teacher's temperature")
        return self.found_temperature

    @torch.no_grad()
    def calibrate(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Calibrate the teacher's temperature if ``teacher_targets`` is set.

        At this temperature the teacher has that number of effective targets (the exponential of the mean entropy) over all
        rows of some batches of vectors by the backbone alone (:func:`~sda_core.losses.geometry.temperature_for`).  Running
        means are not changed; with ``center: running`` the mean of all these vectors is used instead.

        Args:
            batches: image vectors ``(B, D)``, text vectors ``(B, D)`` and groups ``(B,)`` or None, of the training's batch size.

        Raises:
            TrainingError: no temperature gives that number.
        """
        wanted = self.params.teacher_targets
        if wanted is None:
            return
        looked = self._centred_batches([(image_BD, text_BD) for image_BD, text_BD, _ in batches])
        groups = [groups_B for _, _, groups_B in batches]

        def num_targets(temperature: float) -> float:
            rows = [self._log_teacher(pair, of, temperature)[0] for pair, of in zip(looked, groups, strict=True)]
            return effective_targets(torch.cat(rows))

        self.found_temperature = temperature_for(wanted, num_targets, len(batches[0][0]))

    def _centred_batches(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Some batches, centred as in the loss, but with the mean of all of them instead of a running mean."""
        if self.params.center != "running":
            return [self._centred(pair, None, update=False)[0] for pair in pairs]
        wide = [(image_BD.float(), text_BD.float()) for image_BD, text_BD in pairs]
        means = [torch.cat(one).mean(dim=0) for one in zip(*wide, strict=True)]
        return [(image_BD - means[0], text_BD - means[1]) for image_BD, text_BD in wide]

    def _centred(self, pair: Pair, base: Pair | None, *, update: bool) -> tuple[Pair, Pair | None]:
        """The centred vectors, and the centred vectors of the base."""
        vectors = _by_name(pair)
        if base is not None and self.needs_base:
            vectors |= {f"base {name}": x_BD for name, x_BD in _by_name(base).items()}
        centred = self.center(vectors, update=update)
        own = centred["image"], centred["text"]
        return own, (centred["base image"], centred["base text"]) if "base image" in centred else None

    def _alignment(
        self, pair: Pair, groups_B: Tensor | None, taught_by: Pair | None, teacher_temperature: float | None
    ) -> Tensor:
        """The alignment loss of centred vectors."""
        params = self.params
        if self._raw is not None and params.variant == "paper":
            with torch.no_grad():  # clamp the parameter, so that it can leave the bound again
                self._raw.clamp_(min=min(_MIN_LOG_TEMPERATURE, math.log(params.temperature)))
        if params.variant == "reference":
            return cmsa_reference(*pair, self.temperature)
        if params.teacher == "none":
            return infonce(*pair, self.temperature, params.normalize, groups_B=groups_B, false_negatives=params.false_negatives)
        return cmsa(
            *pair,
            self.temperature,
            teacher=params.teacher,
            teacher_temperature=teacher_temperature,
            detach_teacher=params.detach_teacher,
            normalize=params.normalize,
            groups_B=groups_B,
            false_negatives=params.false_negatives,
            taught_by=taught_by,
        )

    def _check_base(self, base: Pair | None) -> None:
        if self.needs_base and base is None:
            option = "teacher_source 'base'" if self._base_teaches else "keep_base"
            raise TrainingError("loss", f"{option} needs the vectors of the backbone without its adapter (got none)")

    @torch.no_grad()
    def diagnostics(
        self, image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None = None, base: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """Diagnostics of a batch as plain numbers, with the names and meanings of :func:`measures`.

        With ``teacher: none`` the targets are hard: entropy 0, one target per row (more with ``false_negatives: share``).

        Args:
            image_BD: ``(B, D)`` image vectors.
            text_BD: ``(B, D)`` text vectors, in the order of the images.
            groups_B: as in :meth:`forward`; rows of one group are not counted as errors of each other in ``retrieval``.
            base: as in :meth:`forward`.  If it is the teacher, entropy, targets and agreement are those of its structures;
                the others are those of the trained vectors.

        Raises:
            TrainingError: as :meth:`forward`.
        """
        self._check_base(base)
        pair, base = self._centred((image_BD, text_BD), base, update=False)
        teaching = base if self._base_teaches and base is not None else pair
        sharpness = 1 / self.temperature if self.params.variant == "reference" else self.teacher_temperature
        log_teacher_BB, structures, twins = self._log_teacher(teaching, groups_B, sharpness)
        same_BB = None if groups_B is None else same_group(groups_B, pair[0])
        return measures(*pair, log_teacher_BB, structures, sharpness, twins, same_BB)

    def _log_teacher(
        self, teaching: Pair, groups_B: Tensor | None, sharpness: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Twins]:
        """``log P`` of centred vectors, its two structures, and the policy for rows with equal content."""
        params = self.params
        v_BD, t_BD = prepare(_by_name(teaching), params.normalize).values()
        twins = find_twins(groups_B, params.false_negatives, v_BD)
        if params.variant == "reference":
            v_BD, t_BD = pool_width(v_BD), pool_width(t_BD)
        structures = {"image": v_BD @ v_BD.T, "text": t_BD @ t_BD.T}
        return log_teacher(structures, params.teacher, sharpness, twins), structures, twins


def _by_name(pair: Pair) -> dict[str, Tensor]:
    return {"image": pair[0], "text": pair[1]}


def build(params: LossParams) -> AlignmentLoss:
    """The loss of a params section; see :class:`AlignmentLoss`."""
    return AlignmentLoss(params)
