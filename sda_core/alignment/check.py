"""Measure the vectors of some items before, while and after an adapter is trained.

If the vectors share one large direction, the teacher of CMSA is nearly uniform before the first step, and training makes all
vectors equal.  If the teacher is nearly certain of the own pair, CMSA is InfoNCE.  A few hundred items suffice to see both.
Not every collapse is visible before step 0, so some items are measured again during the training (:func:`watch`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.losses import AlignmentLoss
from sda_core.params import LossParams, TrainingParams

_log = logging.getLogger(__name__)

SAMPLE_ITEMS = 256
"""Approximate size of the sample in items; whole batches, at least one."""

FEWEST_TARGETS = 1.05
"""With fewer effective targets the teacher counts as certain of the own pair."""

MOST_OF_UNCENTRED = 2.0
"""A teacher computed from trained vectors that are not centred may have at most this number of effective targets.

It is a careful limit.  Measured on nano in batches of 32: with 1.13 targets it learned; with 4 it learned on one shop and
collapsed on another; with 8 and 16 it collapsed (docs/archive/geometry.md, how soft may a teacher be).
"""

_FEWEST_OF_REFERENCE = 1.001  # the public code's loss collapsed with 1.03 targets (docs/archive/geometry.md)
_PAPER = {
    "variant": "paper",
    "detach_teacher": True,
    "normalize": True,
    "temperature": 0.05,
    "learn_temperature": False,
    "center": "batch",
}
"""Settings of a loss that learns, instead of those of the public code."""

_SMALLEST_BATCH = 8  # smaller batches are too small for a soft teacher
_NARROWER = 10
_EQUAL = 1e-6  # mean of 1 - cosine of vectors that are equal up to rounding errors


@dataclass(frozen=True)
class Batch:
    """Vectors of one batch of the sample.

    Attributes:
        image_BD: ``(B, D)`` image vectors.
        text_BD: ``(B, D)`` text vectors, in the order of the images.
        groups_B: ``(B,)`` integers, equal for items with equal content.
        base: the vectors of the same items by the backbone alone; before step 0 these equal the first two.
    """

    image_BD: Tensor
    text_BD: Tensor
    groups_B: Tensor
    base: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Figures:
    """Statistics of the vectors of a sample.

    Attributes:
        items: number of items in the sample.
        cosine_images: mean cosine between the images of two different items; near 1, all images are alike.
        cosine_texts: the same for texts.
        cosine_own_pair: mean cosine between an item's image and its own text.
        cosine_other_pair: mean cosine between an item's image and another item's text.
        rank_images: effective rank of the images: the exponential of the entropy of the squared singular values of the unit
            vectors without their mean (Roy & Vetterli 2007); from 1 to the smaller of items and width.
        rank_texts: the same for texts.
        retrieval: retrieval@1 within a batch, mean of both directions.
        teacher_targets: effective targets of the loss's teacher; 1 for hard targets.
    """

    items: int
    cosine_images: float
    cosine_texts: float
    cosine_own_pair: float
    cosine_other_pair: float
    rank_images: float
    rank_texts: float
    retrieval: float
    teacher_targets: float


@torch.no_grad()
def measure(batches: Sequence[Batch], criterion: AlignmentLoss) -> Figures:
    """Compute the figures of a sample, batch by batch as in the loss.

    Args:
        batches: batches of the training's batch size.
        criterion: the loss; it is not changed.
    """
    image_ND = F.normalize(torch.cat([batch.image_BD for batch in batches]).float(), dim=-1)
    text_ND = F.normalize(torch.cat([batch.text_BD for batch in batches]).float(), dim=-1)
    measured = [criterion.diagnostics(batch.image_BD, batch.text_BD, batch.groups_B, batch.base) for batch in batches]
    return Figures(
        items=len(image_ND),
        cosine_images=_mean_cosine(image_ND, image_ND),
        cosine_texts=_mean_cosine(text_ND, text_ND),
        cosine_own_pair=float((image_ND * text_ND).sum(dim=-1).mean()),
        cosine_other_pair=_mean_cosine(image_ND, text_ND),
        rank_images=effective_rank(image_ND),
        rank_texts=effective_rank(text_ND),
        retrieval=sum(one["retrieval"] for one in measured) / len(measured),
        teacher_targets=float(torch.tensor([one["teacher_entropy"] for one in measured]).mean().exp()),
    )


def _mean_cosine(one_ND: Tensor, two_ND: Tensor) -> float:
    """Mean cosine over pairs of different rows of unit vectors, computed from the sum over all pairs."""
    N = len(one_ND)
    every = one_ND.double().sum(dim=0) @ two_ND.double().sum(dim=0)
    return float((every - (one_ND * two_ND).double().sum()) / max(N * N - N, 1))


@dataclass(frozen=True)
class Spread:
    """The spread of the vectors of one modality.

    Attributes:
        cosine: mean cosine of two different items.
        rank: effective rank, see :class:`Figures`.
    """

    cosine: float
    rank: float


@torch.no_grad()
def spreads(image_BD: Tensor, text_BD: Tensor) -> dict[str, Spread]:
    """The spread of the images and of the texts of some items.

    Args:
        image_BD: ``(B, D)`` image vectors, not centred.
        text_BD: ``(B, D)`` text vectors, not centred.
    """
    units = {"images": F.normalize(image_BD.float(), dim=-1), "texts": F.normalize(text_BD.float(), dim=-1)}
    return {name: Spread(_mean_cosine(unit_BD, unit_BD), effective_rank(unit_BD)) for name, unit_BD in units.items()}


def effective_rank(x_ND: Tensor) -> float:
    """The exponential of the entropy of the squared singular values of ``x (N, D)`` without its mean.

    0 if all rows are equal; NaN if a value is not finite.
    """
    if not bool(torch.isfinite(x_ND).all()):  # the training step reports the items
        return float("nan")
    energy = torch.linalg.svdvals((x_ND - x_ND.mean(dim=0)).double()).square()
    total = energy.sum()
    return float(torch.special.entr(energy / total).sum().exp()) if float(total) > 1e-12 * len(x_ND) else 0.0


def check(
    before: Figures, criterion: AlignmentLoss, loss: LossParams, training: TrainingParams, section: str, *, say: bool
) -> None:
    """Log the figures before step 0, and stop or warn if the teacher is not informative.

    Three kinds of teachers stop the training (docs/archive/geometry.md, how soft may a teacher be).  A nearly uniform teacher
    makes all vectors equal, or, if the teacher is the fixed backbone, teaches little.  A soft teacher through which gradients
    pass (``detach_teacher: false``, and the public code's loss) makes all vectors equal even if it has few targets.  So may a
    soft teacher that is computed from the trained vectors and not centred, because equal vectors make it uniform, and a uniform
    teacher makes vectors equal.  A teacher that is nearly certain of the own pair turns CMSA into InfoNCE, which learns, so it
    causes a warning.

    Centering by a running mean causes a warning: the figures can look sound and training may still make all vectors equal
    (:class:`~sda_core.losses.geometry.Centering`).

    Args:
        before: figures of the backbone without its adapter.
        criterion: the loss.
        loss: section of the loss.
        training: section with the setting ``check``: stop or warn.
        section: the loss section's path in ``params.yaml``, for the message.
        say: whether this process logs.

    Raises:
        TrainingError: the teacher has more effective targets than it may have (:func:`problem`), and
            ``train_adapter.training.check`` is ``stop``.
    """
    if say:
        _log.info("before training: %s", describe(before))
    if say and criterion.found_temperature is not None:
        _log.info("teacher temperature %.4g gives %.3g effective targets", criterion.found_temperature, before.teacher_targets)
    if say and loss.center == "running":
        _log.warning(
            "%s: center is running, and no gradient passes through a running mean, so all vectors may become alike; "
            "set %s.center to batch",
            section,
            section.removeprefix("params.yaml: "),
        )
    found = problem(before, training.batch_size, section, loss)
    if loss.teacher == "none" or found is None:
        return
    if training.check == "stop" and found.stops:
        raise TrainingError(section, found.what, f"{found.advice}; or set train_adapter.training.check to warn")
    if say:
        _log.warning("%s: %s; %s", section, found.what, found.advice)


def describe(figures: Figures) -> str:
    """The figures as one line of text."""
    return (
        f"{figures.items} items, mean cosine of two items {figures.cosine_images:.2f} (images) and"
        f" {figures.cosine_texts:.2f} (texts),"
        f" of an item's own pair {figures.cosine_own_pair:.2f} and of others' {figures.cosine_other_pair:.2f},"
        f" retrieval@1 in a batch {figures.retrieval:.1%}, effective targets {figures.teacher_targets:.3g}"
    )


@dataclass(frozen=True)
class Problem:
    """A problem with a teacher.

    Attributes:
        what: description.
        advice: the setting to change.
        stops: whether the training should not start.
    """

    what: str
    advice: str
    stops: bool


def problem(figures: Figures, batch_size: int, section: str, loss: LossParams) -> Problem | None:
    """Describe what is wrong with the teacher and which setting to change; None if nothing is wrong.

    A teacher may have at most half of the batch as effective targets; computed from the trained vectors without centering, at
    most :data:`MOST_OF_UNCENTRED`; with gradients through it, at most :data:`FEWEST_TARGETS`.

    Args:
        figures: figures of the sample.
        batch_size: batch size of the training.
        section: the loss section's path in ``params.yaml``.
        loss: section of the loss.
    """
    targets, path = figures.teacher_targets, section.removeprefix("params.yaml: ")
    is_fixed = loss.teacher_source == "base"
    count = f"{targets:.3g} of {batch_size} effective targets"
    fewest = _FEWEST_OF_REFERENCE if loss.variant == "reference" else FEWEST_TARGETS
    if _exceeds(targets, fewest) and not loss.detach_teacher and not is_fixed:
        return Problem(
            f"gradients pass through the teacher, and it is soft ({count}), so training would make all vectors alike",
            _set(loss, path, _PAPER)
            if loss.variant == "reference"
            else _fewer_targets(loss, path, {"detach_teacher": True, "center": "batch"}, batch_size),
            stops=True,
        )
    centred = {} if is_fixed else {"center": "batch"}
    images, texts = figures.cosine_images, figures.cosine_texts
    cosines = f"two items have a mean cosine of {images:.2f} by their images and {texts:.2f} by their texts"
    if _exceeds(targets, batch_size / 2):
        effect = "training would teach little" if is_fixed else "training may make all vectors alike"
        return Problem(
            f"the teacher is nearly uniform ({count}; {cosines}), so {effect}",
            _fewer_targets(loss, path, centred, batch_size),
            stops=True,
        )
    if not is_fixed and loss.center != "batch" and _exceeds(targets, MOST_OF_UNCENTRED):
        return Problem(
            f"the teacher is computed from the trained vectors, and it is soft ({count}), so training may make all vectors alike",
            f"{_set(loss, path, centred)}, or {path}.teacher_source to base",
            stops=True,
        )
    if targets < FEWEST_TARGETS and loss.variant == "paper":
        detached = {} if is_fixed else {"detach_teacher": True}
        return Problem(
            f"the teacher gives nearly all weight to the item's own pair ({targets:.3g} effective targets), so CMSA is InfoNCE",
            f"{_fewer_targets(loss, path, centred | detached, batch_size)}, or {path}.teacher to none",
            stops=False,
        )
    return None


def _exceeds(targets: float, limit: float) -> bool:
    """Whether a number of targets is above a limit by more than the error of its calibration."""
    return targets > limit * (1 + 1e-3)


def _fewer_targets(loss: LossParams, path: str, changes: Mapping[str, Any], batch_size: int) -> str:
    """The advice to calibrate the teacher, with other changes; a larger batch if this one is too small for a soft teacher."""
    if batch_size < _SMALLEST_BATCH:
        return f"set train_adapter.training.batch_size to {_SMALLEST_BATCH} or more"
    return _set(loss, path, {**changes, "teacher_temperature": None, "teacher_targets": _recommended_targets(batch_size)})


def _set(loss: LossParams, path: str, wanted: Mapping[str, Any]) -> str:
    """The advice to change settings of the loss; those that have the value already are left out.

    If all have it (the teacher was calibrated, and is outside the limits nevertheless), the advice is a larger batch.
    """
    changes = [f"{path}.{name} to {json.dumps(value)}" for name, value in wanted.items() if getattr(loss, name) != value]
    if not changes:
        return "raise train_adapter.training.batch_size"
    *most, last = changes
    return f"set {', '.join(most)} and {last}".replace('"', "") if most else f"set {last}".replace('"', "")


def _recommended_targets(batch_size: int) -> int:
    """A recommended number of effective targets: an eighth of the batch, from 2 to 8."""
    return max(2, min(8, batch_size // 8))


def collapsed(before: Figures, after: Figures) -> list[str]:
    """The modalities whose vectors have collapsed: ten times closer to each other, or a tenth of the effective rank."""
    spreads_before, spreads_after = spreads_of(before), spreads_of(after)
    return [name for name, spread in spreads_after.items() if _has_collapsed(spreads_before[name], spread)]


def spreads_of(figures: Figures) -> dict[str, Spread]:
    """The spread of the images and of the texts of a sample."""
    return {
        "images": Spread(figures.cosine_images, figures.rank_images),
        "texts": Spread(figures.cosine_texts, figures.rank_texts),
    }


def _has_collapsed(before: Spread, after: Spread) -> bool:
    """Whether vectors are ten times closer than before, or have a tenth of the effective rank; equal ones cannot collapse."""
    distance = 1 - before.cosine
    return distance > _EQUAL and (1 - after.cosine < distance / _NARROWER or after.rank < before.rank / _NARROWER)


def watch(
    before: Mapping[str, Spread],
    now: Mapping[str, Spread],
    step: int,
    loss: LossParams,
    training: TrainingParams,
    section: str,
) -> str | None:
    """Look for a collapse during training that the figures before step 0 did not show.

    The definition is that of :func:`collapsed`.

    Args:
        before: the spread of some items' vectors by the backbone without its adapter, by modality.
        now: the spread of the same items' vectors with the adapter and without dropout.
        step: number of the step, from 0.
        loss: section of the loss.
        training: section with the setting ``check``: stop or warn.
        section: the loss section's path in ``params.yaml``, for the message.

    Returns:
        A warning, if the vectors have collapsed and ``check`` is ``warn``; else None.

    Raises:
        TrainingError: the vectors have collapsed, and ``check`` is ``stop``.
    """
    alike = [name for name, spread in now.items() if _has_collapsed(before[name], spread)]
    if not alike:
        return None
    what = f"after {step + 1} steps " + " and ".join(_describe_collapse(name, before[name], now[name]) for name in alike)
    advice = _remedies(loss, section)
    if training.check == "stop":
        raise TrainingError(section, what, f"{advice}; or set train_adapter.training.check to warn, which starts again at step 0")
    return f"{section}: {what}; {advice}"


def _describe_collapse(name: str, before: Spread, after: Spread) -> str:
    """The description of a collapsed modality."""
    return (
        f"the embeddings of {name} have collapsed (mean of 1 - cosine of two items {1 - after.cosine:.2g}, "
        f"{1 - before.cosine:.2g} before; effective rank {after.rank:.3g}, {before.rank:.3g} before)"
    )


def _remedies(loss: LossParams, section: str) -> str:
    """The settings that may prevent a collapse and are not set already."""
    path = section.removeprefix("params.yaml: ")
    if loss.variant == "reference":
        return f"lower the learning rate, or {_set(loss, path, _PAPER)}"
    changes = ["lower the learning rate"]
    if loss.center != "batch":
        changes.append(f"set {path}.center to batch")
    if loss.teacher != "none" and loss.teacher_source == "adapted":
        if not loss.detach_teacher:
            changes.append(f"set {path}.detach_teacher to true")
        changes.append(f"set {path}.teacher_source to base")
    return ", or ".join(changes)


def report(before: Figures, after: Figures, loss: LossParams, section: str) -> None:
    """Log the figures of a trained adapter, with a warning if vectors have collapsed."""
    _log.info("after training: %s", describe(after))
    for name in collapsed(before, after):
        collapse = _describe_collapse(name, spreads_of(before)[name], spreads_of(after)[name])
        _log.warning("%s: %s; %s", section, collapse, _remedies(loss, section))


@dataclass(frozen=True)
class Checked:
    """Figures of a sample before and after training.

    Attributes:
        before: figures of the backbone alone.
        after: figures with the trained adapter.
        teacher_temperature: the calibrated temperature, if the loss is set by a number of targets.
    """

    before: Figures
    after: Figures
    teacher_temperature: float | None

    def metrics(self) -> dict[str, float]:
        """The main figures with flat names, to compare runs: ``check.json``."""
        flat: dict[str, float] = {}
        for name, value_of in _METRICS.items():
            flat |= {f"{name}_before": value_of(self.before), f"{name}_after": value_of(self.after)}
        return flat | {"collapsed": float(bool(collapsed(self.before, self.after)))}

    def details(self) -> dict[str, Any]:
        """All figures: ``check_details.json``."""
        before, after = asdict(self.before), asdict(self.after)
        del before["items"], after["items"]
        return {
            "items": self.before.items,
            "teacher_temperature": self.teacher_temperature,
            "before": before,
            "after": after,
        }


_METRICS: dict[str, Callable[[Figures], float]] = {
    "effective_targets": lambda figures: figures.teacher_targets,
    "retrieval@1": lambda figures: figures.retrieval,
    "image_cosine": lambda figures: figures.cosine_images,
    "text_cosine": lambda figures: figures.cosine_texts,
    "own_pair_gap": lambda figures: figures.cosine_own_pair - figures.cosine_other_pair,
}
