"""CMSA, cross-modal structural alignment: the structure inside each modality teaches the one across."""

from __future__ import annotations

import math
from typing import Literal, assert_never

import torch
from torch import Tensor

from sda_core.losses.infonce import prepare

Teacher = Literal["mean", "image", "text", "agreement"]

REFERENCE_DIM = 768


def cmsa(
    image_BD: Tensor,
    text_BD: Tensor,
    temperature: float | Tensor,
    teacher: Teacher = "mean",
    teacher_temperature: float | None = None,
    detach_teacher: bool = True,
    normalize: bool = True,
) -> Tensor:
    """Soft-target alignment of two modalities (SDA, arXiv 2512.06883).

    With ``V``, ``T`` the unit vectors of the images and the texts, row-wise softmax, and mean over rows::

        P = softmax( (V V^T + T T^T) / (2 teacher_temperature) )
        L = 1/2 [ KL(P || softmax(V T^T / temperature)) + KL(P || softmax(T V^T / temperature)) ]

    Relations: as ``teacher_temperature`` goes to 0, ``P`` becomes the identity (rows of one batch differing) and the
    loss :func:`~sda_core.losses.infonce`.

    Args:
        image_BD: ``(B, D)``, row ``i`` belongs to row ``i`` of ``text_BD``.
        text_BD: ``(B, D)``.
        temperature: of the student, divides the similarities.
        teacher: ``"mean"``, as above; ``"image"``, ``V V^T`` alone; ``"text"``, ``T T^T`` alone; ``"agreement"``, the
            mean, but row ``i`` weighs ``w_i = 1 - JS(P_V,i, P_T,i) / log 2``, with JS the Jensen-Shannon divergence
            between the image's and the text's own rows: 1 where the modalities see the same neighbours, 0 where they
            share none.  Weights are normalised to sum 1 and carry no gradient.
        teacher_temperature: of the teacher; None for the same as ``temperature``.
        detach_teacher: no gradient through ``P``.  Without it the entropy of ``P`` is part of what is minimised.
        normalize: scale the rows to unit length first.

    Returns:
        Scalar in nats, at least 0; in float32 at least, whatever the inputs are.
    """
    image_BD, text_BD = prepare(image_BD, text_BD, normalize)
    sharpness: float | Tensor = temperature if teacher_temperature is None else teacher_temperature
    if isinstance(sharpness, Tensor):
        sharpness = sharpness.detach()  # a learned temperature sharpens the teacher, but learns nothing from it
    image_BB, text_BB = image_BD @ image_BD.T, text_BD @ text_BD.T
    match teacher:
        case "mean" | "agreement":
            structure_BB = (image_BB + text_BB) / 2
        case "image":
            structure_BB = image_BB
        case "text":
            structure_BB = text_BB
        case _:
            assert_never(teacher)
    log_teacher_BB = torch.log_softmax(structure_BB / sharpness, dim=-1)
    if detach_teacher:
        log_teacher_BB = log_teacher_BB.detach()
    logits_BB = image_BD @ text_BD.T / temperature
    log_across_BB = torch.log_softmax(logits_BB, dim=-1)
    log_back_BB = torch.log_softmax(logits_BB.T, dim=-1)
    row_B = (_divergence(log_teacher_BB, log_across_BB) + _divergence(log_teacher_BB, log_back_BB)) / 2
    if teacher != "agreement":
        return row_B.mean()
    weight_B = agreement(image_BB.detach(), text_BB.detach(), sharpness)
    return (weight_B * row_B).sum() / weight_B.sum().clamp_min(torch.finfo(weight_B.dtype).tiny)


def agreement(image_BB: Tensor, text_BB: Tensor, temperature: float | Tensor) -> Tensor:
    """How far two similarity structures agree, row by row: ``1 - JS / log 2``, in [0, 1].

    Args:
        image_BB: similarities inside the image modality.
        text_BB: similarities inside the text modality.
        temperature: of the softmax that makes a row a distribution.
    """
    log_image_BB = torch.log_softmax(image_BB / temperature, dim=-1)
    log_text_BB = torch.log_softmax(text_BB / temperature, dim=-1)
    log_middle_BB = torch.logaddexp(log_image_BB, log_text_BB) - math.log(2)
    js_B = (_divergence(log_image_BB, log_middle_BB) + _divergence(log_text_BB, log_middle_BB)) / 2
    return (1 - js_B / math.log(2)).clamp(0, 1)


def _divergence(log_p_BB: Tensor, log_q_BB: Tensor) -> Tensor:
    """``KL(p || q)`` of each row, in nats, from log-probabilities."""
    return (log_p_BB.exp() * (log_p_BB - log_q_BB)).sum(dim=-1)


def cmsa_reference(image_BD: Tensor, text_BD: Tensor, temperature: float | Tensor) -> Tensor:
    """The loss as the authors' public code computes it, for comparison (github.com/RaoZhongtao/SDA, commit 28637db).

    Un-normalised dot products of vectors whose width is first averaged down to 768 (:func:`pool_width`)::

        logits  = V T^T / temperature
        targets = softmax( (V V^T + T T^T) / 2 * temperature )
        L       = 1/2 [ CE(targets, logits) + CE(targets^T, logits^T) ]

    Differences from :func:`cmsa`: the teacher multiplies by the temperature; nothing is detached; the second direction
    takes the *transposed* targets, whose rows do not sum to 1; cross-entropy, not KL.  The public code learns the
    temperature, beginning at 3, and ignores the one given on its command line.

    Args:
        image_BD: ``(B, D)``.
        text_BD: ``(B, D)``.
        temperature: see the formula.

    Returns:
        Scalar, mean over rows.
    """
    image_BD, text_BD = prepare(image_BD, text_BD, normalize=False)
    image_BD, text_BD = pool_width(image_BD), pool_width(text_BD)
    logits_BB = image_BD @ text_BD.T / temperature
    targets_BB = torch.softmax((image_BD @ image_BD.T + text_BD @ text_BD.T) / 2 * temperature, dim=-1)
    across_B = -(targets_BB * torch.log_softmax(logits_BB, dim=-1)).sum(dim=1)
    back_B = -(targets_BB.T * torch.log_softmax(logits_BB.T, dim=-1)).sum(dim=1)
    return ((across_B + back_B) / 2).mean()


def pool_width(x_BD: Tensor, width: int = REFERENCE_DIM) -> Tensor:
    """Average neighbouring columns down to ``width``: the narrow groups first, then those that are one column wider.

    For the 3,584 columns of the 7B model and 768: 256 groups of 4, then 512 groups of 5, which is what the public code
    spells out.  Vectors that are not wider than ``width`` stay as they are.
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
