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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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
    """The largest of the candidates whose mean NDCG@10 is at most ``cost`` below that of the best one.

    Args:
        ndcg_of: returns NDCG@10 by user ``(U,)`` for a value of c.
        is_new_U: ``(U,)`` whether a user's target is new.
        spread: standard deviation of a user's scores over the items, mean over users.
        cost: accepted loss as a share of the best mean, 0 to 1.
    """
    candidates: Sequence[float] = [step * spread for step in STEPS]
    found = [ndcg_of(offset) for offset in candidates]
    means = np.array([ndcg_U.mean() for ndcg_U in found])
    chosen = int(np.flatnonzero(means >= (1.0 - cost) * means.max())[-1])

    def both(ndcg_U: np.ndarray) -> tuple[float, float | None]:
        return float(ndcg_U.mean()), float(ndcg_U[is_new_U].mean()) if is_new_U.any() else None

    return Raise(candidates[chosen], both(found[0]), both(found[chosen]))
