"""CMSA, cross-modal structural alignment: similarities within the modalities are the soft targets across them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.losses.infonce import prepare
from sda_core.losses.twins import NO_TWINS, FalseNegatives, Twins, find_twins
from sda_core.params import Teacher

TeacherScope = Literal["all", "pair"]

REFERENCE_DIM = 768
_OF_ALL = ("mean", "agreement")
"""Teachers that use the structures of all modalities; any other teacher is the name of a modality."""


def cmsa(
    image_BD: Tensor,
    text_BD: Tensor,
    temperature: float | Tensor,
    teacher: Teacher = "mean",
    teacher_temperature: float | None = None,
    detach_teacher: bool = True,
    normalize: bool = True,
    *,
    groups_B: Tensor | None = None,
    false_negatives: FalseNegatives = "keep",
    taught_by: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Soft-target alignment of two modalities (SDA, arXiv 2512.06883).

    With ``V``, ``T`` the unit vectors of the images and the texts, row-wise softmax, and mean over rows::

        P = softmax( (V V^T + T T^T) / (2 teacher_temperature) )
        L = 1/2 [ KL(P || softmax(V T^T / temperature)) + KL(P || softmax(T V^T / temperature)) ]

    Relations: as ``teacher_temperature`` goes to 0, ``P`` becomes the identity (if all rows differ) and the loss becomes
    :func:`~sda_core.losses.infonce`.  :func:`cmsa_many` supports more modalities.

    Args:
        image_BD: ``(B, D)`` image vectors.
        text_BD: ``(B, D)`` text vectors, in the order of the images.
        temperature: temperature of the student; divides the similarities.
        teacher: ``"mean"``, as above; ``"image"``, only ``V V^T``; ``"text"``, only ``T T^T``; ``"agreement"``, the mean,
            with row ``i`` weighted by ``w_i = 1 - JS(P_V,i, P_T,i) / log 2``, with JS the Jensen-Shannon divergence
            between the rows of the image structure and the text structure: 1 if the modalities have the same neighbours, 0
            if they share none.  Weights are normalised to sum 1 and have no gradient.
        teacher_temperature: temperature of the teacher; None: ``temperature``.
        detach_teacher: no gradient through ``P``.  Without it, ``P`` also moves towards the student's distributions; equal
            vectors, for which all of them are uniform, are a minimum, and a soft ``P`` leads there (docs/results.md, geometry of
            the loss).
        normalize: scale the rows to unit length first.
        groups_B: ``(B,)`` integers, equal for rows with equal content; unused if ``false_negatives`` is ``keep``.
        false_negatives: ``keep``, as above; ``mask``, the *other* rows of a row's group are excluded from every softmax of
            teacher and student; ``share``, the mass of ``P`` on a group is spread evenly over its members, also in the rows
            that the weights of ``agreement`` compare.  Without equal groups all three are the same.
        taught_by: image and text vectors, ``(B, D')`` each, which replace ``V`` and ``T`` in ``P``; None: the vectors
            themselves, as in the paper.  Vectors that are not trained give a constant teacher.

    Returns:
        Scalar in nats, at least 0; at least float32 for any inputs.

    Raises:
        TrainingError: ``false_negatives`` needs groups, but there are none, or not one integer per row.
    """
    return cmsa_many(
        {"image": image_BD, "text": text_BD},
        temperature,
        teacher,
        teacher_temperature,
        detach_teacher,
        normalize,
        groups_B=groups_B,
        false_negatives=false_negatives,
        taught_by=None if taught_by is None else {"image": taught_by[0], "text": taught_by[1]},
    )


def cmsa_many(
    vectors: Mapping[str, Tensor],
    temperature: float | Tensor,
    teacher: str = "mean",
    teacher_temperature: float | None = None,
    detach_teacher: bool = True,
    normalize: bool = True,
    *,
    teacher_scope: TeacherScope = "all",
    groups_B: Tensor | None = None,
    false_negatives: FalseNegatives = "keep",
    taught_by: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """:func:`cmsa` for any number M of modalities: the mean over all unordered pairs.

    With ``X_m`` the unit vectors of modality ``m``::

        P    = softmax( sum_m X_m X_m^T / (M teacher_temperature) )
        L_ab = 1/2 [ KL(P || softmax(X_a X_b^T / temperature)) + KL(P || softmax(X_b X_a^T / temperature)) ]
        L    = mean of L_ab over the pairs a < b

    The paper has two modalities and does not define the teacher of a pair among more.  By default all modalities form one
    teacher, so that a third view influences the alignment of the first two, and all pairs have the same targets.

    Args:
        vectors: ``(B, D)`` by modality, at least two; row ``i`` of each is the same item.
        temperature: see :func:`cmsa`.
        teacher: ``"mean"``, ``"agreement"`` (``w_i = 1 - JS / log M`` over the M rows) or the name of the modality that
            is the teacher of every pair.
        teacher_temperature: see :func:`cmsa`.
        detach_teacher: see :func:`cmsa`.
        normalize: see :func:`cmsa`.
        teacher_scope: the structures used by ``"mean"`` and ``"agreement"``: those of ``"all"`` modalities, or of the ``"pair"``.
        groups_B: see :func:`cmsa`.
        false_negatives: see :func:`cmsa`.
        taught_by: see :func:`cmsa`; by modality.

    Returns:
        Scalar in nats; with two modalities bit-equal to :func:`cmsa`.

    Raises:
        TrainingError: as :func:`cmsa`; or fewer than two modalities, or a teacher that is not one of them.
    """
    prepared = prepare(vectors, normalize)
    teaching = prepared if taught_by is None else prepare(taught_by, normalize)
    assert teaching.keys() == prepared.keys(), f"taught by {', '.join(prepared)} (got {', '.join(teaching)})"
    if teacher not in (*_OF_ALL, *prepared):
        raise _unknown(teacher, [*_OF_ALL, *prepared])
    twins = find_twins(groups_B, false_negatives, next(iter(prepared.values())))
    # a learned temperature sharpens the teacher, but gets no gradient from it
    sharpness = temperature if teacher_temperature is None else teacher_temperature
    sharpness = sharpness.detach() if isinstance(sharpness, Tensor) else sharpness
    own = {name: x_BD @ x_BD.T for name, x_BD in teaching.items()}
    log_teacher_BB = log_teacher(own, teacher, sharpness, twins)
    losses = []
    for one, two in combinations(prepared, 2):
        structures = own
        if teacher_scope == "pair" and teacher not in own:
            structures = {one: own[one], two: own[two]}
            log_teacher_BB = log_teacher(structures, teacher, sharpness, twins)
        if detach_teacher:
            log_teacher_BB = log_teacher_BB.detach()
        logits_BB = prepared[one] @ prepared[two].T / temperature
        row_B = twins.divergence(log_teacher_BB, twins.log_softmax(logits_BB))
        row_B = (row_B + twins.divergence(log_teacher_BB, twins.log_softmax(logits_BB.T))) / 2
        if teacher == "agreement":
            weight_B = agreement([structure_BB.detach() for structure_BB in structures.values()], sharpness, twins)
            losses.append((weight_B * row_B).sum() / weight_B.sum().clamp_min(torch.finfo(weight_B.dtype).tiny))
        else:
            losses.append(row_B.mean())
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def log_teacher(
    structures: Mapping[str, Tensor], teacher: str, teacher_temperature: float | Tensor, twins: Twins = NO_TWINS
) -> Tensor:
    """The teacher's targets, ``log P``, of the formula in :func:`cmsa`.

    Args:
        structures: ``(B, B)`` similarities within each modality, ``X_m X_m^T``.
        teacher: ``"mean"`` and ``"agreement"``, the mean of all structures; the name of a modality, only its structure;
            ``"none"``, hard targets, which make CMSA InfoNCE.
        teacher_temperature: divides the structure.
        twins: policy for rows with equal content, see :func:`~sda_core.losses.twins.find_twins`.

    Returns:
        ``(B, B)`` log-probabilities, row by row.

    Raises:
        TrainingError: no such teacher.
    """
    if teacher in structures:
        structure_BB = structures[teacher]
    else:
        match teacher:
            case "none":
                structure_BB = torch.full_like(next(iter(structures.values())), -torch.inf).fill_diagonal_(0)
            case "mean" | "agreement":
                structure_BB = reduce(torch.add, structures.values()) / len(structures)
            case _:
                raise _unknown(teacher, [*_OF_ALL, "none", *structures])
    return twins.log_target(structure_BB / teacher_temperature)


def _unknown(teacher: str, known: Sequence[str]) -> TrainingError:
    return TrainingError("loss", f"teacher should be one of {', '.join(known)} (got {teacher!r})")


def agreement(structures: Sequence[Tensor], temperature: float | Tensor, twins: Twins = NO_TWINS) -> Tensor:
    """Agreement of the similarity structures of M modalities, row by row: ``1 - JS / log M``, in [0, 1].

    Args:
        structures: ``(B, B)`` similarities within each modality.
        temperature: temperature of the row-wise softmax.
        twins: policy for rows with equal content, see :func:`~sda_core.losses.twins.find_twins`.

    Returns:
        ``(B,)``.
    """
    num = len(structures)
    logs = [twins.log_target(structure_BB / temperature) for structure_BB in structures]
    log_middle_BB = reduce(torch.logaddexp, logs) - math.log(num)
    js_B = reduce(torch.add, [twins.divergence(log_BB, log_middle_BB) for log_BB in logs]) / num
    return (1 - js_B / math.log(num)).clamp(0, 1)


def cmsa_reference(image_BD: Tensor, text_BD: Tensor, temperature: float | Tensor) -> Tensor:
    """The loss of the authors' public code, for comparison (github.com/RaoZhongtao/SDA, commit 28637db).

    It uses unnormalised dot products of vectors that are first averaged to width 768 (:func:`pool_width`)::

        logits  = V T^T / temperature
        targets = softmax( (V V^T + T T^T) / 2 * temperature )
        L       = 1/2 [ CE(targets, logits) + CE(targets^T, logits^T) ]

    Differences from :func:`cmsa`: the teacher multiplies by the temperature; nothing is detached; the second direction
    uses the *transposed* targets, whose rows do not sum to 1; cross-entropy instead of KL.  The public code learns the
    temperature, starting at 3, and ignores the one on its command line.

    Args:
        image_BD: ``(B, D)`` image vectors.
        text_BD: ``(B, D)`` text vectors, in the order of the images.
        temperature: see the formula.

    Returns:
        Scalar, mean over rows.
    """
    image_BD, text_BD = (pool_width(x_BD) for x_BD in prepare({"image": image_BD, "text": text_BD}, normalize=False).values())
    logits_BB = image_BD @ text_BD.T / temperature
    targets_BB = torch.softmax((image_BD @ image_BD.T + text_BD @ text_BD.T) / 2 * temperature, dim=-1)
    across_B = -(targets_BB * torch.log_softmax(logits_BB, dim=-1)).sum(dim=1)
    back_B = -(targets_BB.T * torch.log_softmax(logits_BB.T, dim=-1)).sum(dim=1)
    return ((across_B + back_B) / 2).mean()


def pool_width(x_BD: Tensor, width: int = REFERENCE_DIM) -> Tensor:
    """Average neighbouring columns to ``width`` columns: the narrow groups first, then those with one more column.

    For the 3,584 columns of the 7B model and width 768: 256 groups of 4, then 512 groups of 5, as hard-coded in the public
    code.  Vectors that are not wider than ``width`` are not changed.
    """
    D = x_BD.shape[-1]
    if width >= D:
        return x_BD
    size, num_wider = divmod(D, width)
    num_narrow = width - num_wider
    narrow, wider = x_BD.split([num_narrow * size, num_wider * (size + 1)], dim=-1)
    parts = [narrow.unflatten(-1, (num_narrow, size)).mean(dim=-1)]
    if num_wider:
        parts.append(wider.unflatten(-1, (num_wider, size + 1)).mean(dim=-1))
    return torch.cat(parts, dim=-1)
