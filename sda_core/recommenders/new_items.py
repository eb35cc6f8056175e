"""Choose an offset for the scores of new items (not seen in training) on the validation split.

A model trained on purchases learns the popularity of items, but has only content for a new item.  So new items rank below
nearly all others, even if their content fits: on a quarter of Amazon 2014 Beauty none of 835 users whose next item is new
finds it among ten (docs/results.md).  A single offset for all new items corrects the difference in level:

    score'(u, i) = score(u, i) + c    if i is not in the training rows, else score(u, i)

A larger c recommends more new items, which displace known ones.  The chosen c is the largest that costs at most a given share
of NDCG@10 over all validation users.  Their targets are new about as often as those of the test, so both the gain of users
whose next item is new and the loss of the others are included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sda_core.recommenders.base import Recommender
from sda_core.recommenders.batches import TrainingData, validation_view
from sda_core.recommenders.position import USERS_PER_CHUNK, count_positions, ndcg_at_10_by_user, users_at_once

_log = logging.getLogger(__name__)

STEPS = tuple(step / 4 for step in range(17))
"""Candidates of c, as multiples of the standard deviation of a user's scores over the items."""


@dataclass(frozen=True)
class Raise:
    """The chosen offset, and its effect on the validation split.

    Attributes:
        offset: c.
        before: NDCG@10 without the offset over all users, and over those whose target is new; None if there are none.
        after: the same with the offset.
    """

    offset: float
    before: tuple[float, float | None]
    after: tuple[float, float | None]


def choose(ndcg_of: Callable[[float], np.ndarray], is_new_U: np.ndarray, spread: float, cost: float) -> Raise:
    """The largest of the candidates whose mean NDCG@10 is at most ``cost`` below that of the best one; 0 if all means are 0.

    Args:
        ndcg_of: returns NDCG@10 by user ``(U,)`` for a value of c.
        is_new_U: ``(U,)`` whether a user's target is new.
        spread: standard deviation of a user's scores over the items, mean over users.
        cost: accepted loss as a share of the best mean, 0 to 1.
    """
    candidates: Sequence[float] = [step * spread for step in STEPS]
    found = [ndcg_of(offset) for offset in candidates]
    means = np.array([ndcg_U.mean() for ndcg_U in found])
    # If no candidate finds a target, nothing speaks for an offset.
    chosen = int(np.flatnonzero(means >= (1.0 - cost) * means.max())[-1]) if means.max() > 0 else 0

    def both(ndcg_U: np.ndarray) -> tuple[float, float | None]:
        return float(ndcg_U.mean()), float(ndcg_U[is_new_U].mean()) if is_new_U.any() else None

    return Raise(candidates[chosen], both(found[0]), both(found[chosen]))


def raise_new_items(recommender: Recommender, offset_I: Tensor, data: TrainingData, cost: float, device: torch.device) -> None:
    """Set the offsets of the scores of a fitted recommender: one number for new items, 0 for the others.

    Without new items, or without validation targets, all offsets stay 0.

    Args:
        recommender: a recommender whose ``score`` adds ``offset_I``.
        offset_I: ``(I + 1,)``, by item id; all 0.  It is changed in place.
        data: training histories and validation targets.
        cost: accepted loss of NDCG@10, see :func:`choose`.
        device: device of the recommender.
    """
    validation = validation_view(data)
    is_new_I = torch.ones(len(offset_I), dtype=torch.bool)
    is_new_I[0] = is_new_I[np.unique(data.train.item_ids).astype(np.int64)] = False
    if not is_new_I.any() or not len(validation.users):
        return
    is_new_on_device_I = is_new_I.to(device)

    def ndcg_of(offset: float) -> np.ndarray:
        offset_I.copy_(offset * is_new_on_device_I)
        return ndcg_at_10_by_user(count_positions(recommender, validation, None, USERS_PER_CHUNK, device))

    offset_I.zero_()
    some = validation.users[: users_at_once(USERS_PER_CHUNK, len(offset_I))].astype(np.int64)
    history = validation.histories.last(some, recommender.history_length)
    score_BI = recommender.score(torch.from_numpy(some).to(device), torch.from_numpy(history).to(device, torch.int64))
    spread = float(score_BI[:, 1:].std(dim=1).mean())
    made = choose(ndcg_of, is_new_I.numpy()[validation.targets], spread, cost)
    offset_I.copy_(made.offset * is_new_on_device_I)
    of_new = "" if made.after[1] is None else f", of users whose target is new {made.before[1]:.4f} -> {made.after[1]:.4f}"
    _log.info(
        "%s: the scores of %d new items are raised by %.2f; validation ndcg@10 %.4f -> %.4f%s",
        *(recommender.params.kind, int(is_new_I.sum()), made.offset, made.before[0], made.after[0], of_new),
    )
