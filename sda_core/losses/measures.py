"""Diagnostics of a batch of vectors for the training curve: plain numbers without gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sda_core.losses.cmsa import agreement
from sda_core.losses.infonce import prepare
from sda_core.losses.twins import Twins


@torch.no_grad()
def measures(
    image_BD: Tensor,
    text_BD: Tensor,
    log_teacher_BB: Tensor,
    structures: Mapping[str, Tensor],
    teacher_temperature: float | Tensor,
    twins: Twins,
    same_BB: Tensor | None = None,
) -> dict[str, float]:
    """Diagnostics of a batch, with flat names.

    ==================  ===========================================================================================
    ``teacher_entropy``  mean over rows of the entropy of the teacher's targets, nats; 0 = hard targets
    ``teacher_targets``  its exponential: the effective number of targets of a row, 1 to B
    ``agreement``        mean of ``1 - JS / log 2`` between the rows of the image structure and the text structure, 0 to 1
    ``alignment``        mean squared distance of matching unit vectors, 0 to 4 (Wang & Isola 2020, exponent 2)
    ``uniformity_image``, ``uniformity_text``
                         ``log mean exp(-2 d^2)`` over the pairs of different rows of unit vectors, -8 to 0; 0 = all equal
                         (Wang & Isola 2020, t = 2); NaN for a single row
    ``retrieval``        retrieval@1 within the batch, mean of both directions; a tie counts as a miss
    ==================  ===========================================================================================

    Args:
        image_BD: ``(B, D)`` image vectors of any length.
        text_BD: ``(B, D)`` text vectors, in the order of the images.
        log_teacher_BB: ``log P``, row by row.
        structures: similarities ``(B, B)`` within each modality, as in :func:`sda_core.losses.cmsa.log_teacher`.
        teacher_temperature: temperature of the row-wise softmax of the structures.
        twins: the loss's policy for rows with equal content.
        same_BB: true if two rows have equal content; such rows are not counted as errors of each other in ``retrieval``.
    """
    image_BD, text_BD = prepare({"image": image_BD, "text": text_BD}, normalize=True).values()
    B = len(image_BD)
    teacher_BB = log_teacher_BB.exp()
    entropy = torch.special.entr(teacher_BB).sum(dim=-1).mean()
    other_BB = ~torch.eye(B, dtype=torch.bool, device=image_BD.device)
    rival_BB = other_BB if same_BB is None else ~same_BB
    across_BB = image_BD @ text_BD.T
    own_B = across_BB.diagonal()
    found = [
        (own_B > across.masked_fill(~rival_BB, -torch.inf).amax(dim=-1)).to(own_B.dtype).mean()
        for across in (across_BB, across_BB.T)
    ]
    values = {
        "teacher_entropy": entropy,
        "teacher_targets": entropy.exp(),
        "agreement": agreement(list(structures.values()), teacher_temperature, twins).mean(),
        "alignment": (image_BD - text_BD).square().sum(dim=-1).mean(),
        "uniformity_image": _uniformity(image_BD, other_BB),
        "uniformity_text": _uniformity(text_BD, other_BB),
        "retrieval": (found[0] + found[1]) / 2,
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _uniformity(x_BD: Tensor, other_BB: Tensor) -> Tensor:
    """``log mean exp(-2 d^2)`` over different rows of unit vectors, with ``d^2 = 2 - 2 cos``."""
    exponents = (-4 * (1 - x_BD @ x_BD.T).clamp_min(0))[other_BB]
    if len(exponents) == 0:
        return x_BD.new_tensor(torch.nan)
    return torch.logsumexp(exponents, dim=0) - torch.log(exponents.new_tensor(len(exponents)))
