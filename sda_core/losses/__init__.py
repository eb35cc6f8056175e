"""Losses on embeddings of several modalities: tensors in, a scalar out; none of them owns a model."""

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
    """The loss that a params section describes, with its temperature.

    A learned temperature is held as its logarithm and kept at or above 0.01 (or the start, where that is lower); for
    ``variant: reference`` it is held as it is, as in the public code.

    Vectors are centred (``center``) before anything else is done with them, those of the teacher too.  With ``keep_base`` above
    0 its multiple of :func:`~sda_core.losses.keep.keep_structure` is added, at the teacher's temperature.

    Args:
        params: the loss's section.

    Attributes:
        needs_base: whether the backbone's own vectors have to be given, because the teacher looks at them
            (``teacher_source: base``) or their structure is kept (``keep_base``).
        found_temperature: of the teacher, where ``teacher_targets`` asks for one; None before :meth:`calibrate`.

    Raises:
        ConfigError: the section contradicts itself; see :func:`sda_core.params.loss_problems`.
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
            TrainingError: the section's ``false_negatives`` needs groups, and there are none, or not one integer per row; or
                ``needs_base``, and ``base`` is None.
        """
        self._check_base(base)
        own = self._own_teacher_temperature()  # before the running means learn from this batch, since it may be missing
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
            TrainingError: ``teacher_targets`` asks for one that was not looked for yet.
        """
        own = self._own_teacher_temperature()
        return self.temperature if own is None else own

    def _own_teacher_temperature(self) -> float | None:
        """The teacher's temperature, given or found; None where it is the student's."""
        if self.params.teacher_targets is None:
            return self.params.teacher_temperature
        if self.found_temperature is None:
            raise TrainingError("loss", "teacher_targets needs calibrate() first, which finds the teacher's temperature")
        return self.found_temperature

    @torch.no_grad()
    def calibrate(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Find the teacher's temperature, where ``teacher_targets`` asks for it.

        It is the one at which the teacher has that many effective targets over all rows of some batches of the backbone's own
        vectors: the exponent of the mean entropy (:func:`~sda_core.losses.geometry.temperature_for`).  Running means are left
        as they were; with ``center: running`` the mean of all these vectors stands in for them.

        Args:
            batches: image vectors ``(B, D)``, text vectors ``(B, D)`` and groups ``(B,)`` or None, of the training's batch size.

        Raises:
            TrainingError: no temperature gives that number.
        """
        wanted = self.params.teacher_targets
        if wanted is None:
            return
        looked = self._for_a_look([(image_BD, text_BD) for image_BD, text_BD, _ in batches])
        groups = [groups_B for _, _, groups_B in batches]

        def num_targets(temperature: float) -> float:
            rows = [self._log_teacher(pair, of, temperature)[0] for pair, of in zip(looked, groups, strict=True)]
            return effective_targets(torch.cat(rows))

        self.found_temperature = temperature_for(wanted, num_targets, len(batches[0][0]))

    def _for_a_look(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Some batches, centred as the loss would, with one mean of all of them where it would use a running one."""
        if self.params.center != "running":
            return [self._centred(pair, None, update=False)[0] for pair in pairs]
        wide = [(image_BD.float(), text_BD.float()) for image_BD, text_BD in pairs]
        means = [torch.cat(one).mean(dim=0) for one in zip(*wide, strict=True)]
        return [(image_BD - means[0], text_BD - means[1]) for image_BD, text_BD in wide]

    def _centred(self, pair: Pair, base: Pair | None, *, update: bool) -> tuple[Pair, Pair | None]:
        """The vectors and those of the base without their means."""
        vectors = _by_name(pair)
        if base is not None and self.needs_base:
            vectors |= {f"base {name}": x_BD for name, x_BD in _by_name(base).items()}
        centred = self.center(vectors, update=update)
        own = centred["image"], centred["text"]
        return own, (centred["base image"], centred["base text"]) if "base image" in centred else None

    def _alignment(
        self, pair: Pair, groups_B: Tensor | None, taught_by: Pair | None, teacher_temperature: float | None
    ) -> Tensor:
        """The loss across the modalities of centred vectors."""
        params = self.params
        if self._raw is not None and params.variant == "paper":
            with torch.no_grad():  # on the parameter, so that it can come back from the bound
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
        """What the loss sees in a batch, as plain numbers: the names and meanings are those of :func:`measures`.

        With ``teacher: none`` the targets are hard: entropy 0, one target per row (``false_negatives: share`` has more).

        Args:
            image_BD: ``(B, D)``.
            text_BD: ``(B, D)``, row ``i`` belongs to row ``i`` of the images.
            groups_B: as :meth:`forward` takes it; besides, rows of one group are no rivals in ``retrieval``.
            base: as :meth:`forward` takes it.  Where it teaches, entropy, targets and agreement are those of its structures,
                the rest is about the trained vectors.

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
        """``log P`` of centred vectors, the two structures that it is made of, and the policy about rows of one content."""
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
    """The loss that a params section describes; see :class:`AlignmentLoss`."""
    return AlignmentLoss(params)
