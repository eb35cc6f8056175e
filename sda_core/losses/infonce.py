"""InfoNCE: the matching pair against the rest of the batch, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.losses.twins import FalseNegatives, Twins, find_twins


def infonce(
    image_BD: Tensor,
    text_BD: Tensor,
    temperature: float | Tensor,
    normalize: bool = True,
    *,
    groups_B: Tensor | None = None,
    false_negatives: FalseNegatives = "keep",
) -> Tensor:
    """Symmetric contrastive loss with hard targets (van den Oord et al. 2018; Radford et al. 2021).

    ``L = 1/2 [ CE(V T^T / temperature, i) + CE(T V^T / temperature, i) ]``, mean over the rows ``i`` of the batch,
    with ``V``, ``T`` the unit vectors of the images and the texts.

    Also known as: CLIP loss, NT-Xent between two views, multiple-negatives ranking loss in both directions.

    Relations: it equals :func:`~sda_core.losses.cmsa` with hard targets, for every ``false_negatives``.

    Args:
        image_BD: ``(B, D)`` image vectors.
        text_BD: ``(B, D)`` text vectors, in the order of the images.
        temperature: divides the similarities (the inverse of the logit scale).
        normalize: scale the rows to unit length first; else plain dot products.
        groups_B: ``(B,)`` integers, equal for rows with equal content; unused if ``false_negatives`` is ``keep``.
        false_negatives: ``keep``, as above; ``mask``, other rows of a row's group are excluded from its denominator;
            ``share``, the target is ``1 / |group|`` on every row of the group, and its entropy is subtracted, so that the
            minimum is 0 (the divergence from the target; the gradient is that of cross-entropy).

    Returns:
        Scalar in nats, at least 0; at least float32 for any inputs.

    Raises:
        TrainingError: ``false_negatives`` needs groups, but there are none, or not one integer per row.
    """
    return infonce_many(
        {"image": image_BD, "text": text_BD}, temperature, normalize, groups_B=groups_B, false_negatives=false_negatives
    )


def infonce_many(
    vectors: Mapping[str, Tensor],
    temperature: float | Tensor,
    normalize: bool = True,
    *,
    groups_B: Tensor | None = None,
    false_negatives: FalseNegatives = "keep",
) -> Tensor:
    """:func:`infonce` for any number of modalities: the mean over all unordered pairs.

    Args:
        vectors: ``(B, D)`` by modality, at least two; row ``i`` of each is the same item.
        temperature: see :func:`infonce`.
        normalize: see :func:`infonce`.
        groups_B: see :func:`infonce`.
        false_negatives: see :func:`infonce`.

    Raises:
        TrainingError: as :func:`infonce`, or fewer than two modalities.
    """
    prepared = prepare(vectors, normalize)
    twins = find_twins(groups_B, false_negatives, next(iter(prepared.values())))
    losses = [_pair(one_BD @ two_BD.T / temperature, twins) for one_BD, two_BD in combinations(prepared.values(), 2)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _pair(logits_BB: Tensor, twins: Twins) -> Tensor:
    """The loss of one pair of modalities from ``V T^T / temperature``."""
    if twins.spread_BB is not None:
        entropy = torch.special.entr(twins.spread_BB).sum(dim=-1).mean()
        across = F.cross_entropy(logits_BB, twins.spread_BB) - entropy
        return (across + F.cross_entropy(logits_BB.T, twins.spread_BB) - entropy) / 2
    if twins.hidden_BB is not None:
        logits_BB = logits_BB.masked_fill(twins.hidden_BB, -torch.inf)
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def prepare(vectors: Mapping[str, Tensor], normalize: bool) -> dict[str, Tensor]:
    """All inputs in one dtype, at least float32 (half precision is too coarse for similarity / temperature), normalised if set.

    Raises:
        TrainingError: fewer than two modalities.
    """
    if len(vectors) < 2:
        raise TrainingError("loss", f"should align at least two modalities (got {', '.join(vectors) or 'none'})")
    shapes = {name: tuple(x_BD.shape) for name, x_BD in vectors.items()}
    assert len(set(shapes.values())) == 1, f"one {' row a '.join(shapes)} row (got {', '.join(map(str, shapes.values()))})"
    dtype = torch.float32
    for x_BD in vectors.values():
        assert x_BD.dim() == 2, f"(B, D) inputs (got {tuple(x_BD.shape)})"
        dtype = torch.promote_types(dtype, x_BD.dtype)
    cast = {name: x_BD.to(dtype) for name, x_BD in vectors.items()}
    return {name: F.normalize(x_BD, dim=-1) for name, x_BD in cast.items()} if normalize else cast
