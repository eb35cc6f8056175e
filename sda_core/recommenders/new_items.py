"""How much to raise the scores of new items, those that training never saw, chosen on the validation split.

A model that is trained on purchases learns how popular an item is, and of a new item it knows nothing but content.  So new
items rank below nearly all others, however well their content fits: on a quarter of Amazon 2014 Beauty none of 835 users whose
next item is new finds it among ten (docs/results.md).  One number for all new items mends the difference in level:

    score'(u, i) = score(u, i) + c    if training never saw i, else score(u, i)

The larger c, the more new items are recommended, and the more known ones they displace.  The largest c is taken that costs at
most a given share of NDCG@10 over all validation users.  Their targets are new about as often as those of the test, so the
gain of users whose next item is new counts as well as the loss of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STEPS = tuple(step / 4 for step in range(17))
"""Candidates of c, as multiples of the standard deviation of a user's scores over the items."""


@dataclass(frozen=True)
class Raise:
    """What was chosen, and what it does on the validation split.

    Attributes:
        offset: c.
        before: NDCG@10 over all users without it, and over those whose target is new; None where there is none.
        after: the same with it.
    """

    offset: float
    before: tuple[float, float | None]
    after: tuple[float, float | None]


def choose(ndcg_of: Callable[[float], np.ndarray], is_new_U: np.ndarray, spread: float, cost: float) -> Raise:
    """The largest of the candidates whose mean NDCG@10 is at most ``cost`` below the best one's.

    Args:
        ndcg_of: NDCG@10 by user ``(U,)`` for a value of c.
        is_new_U: ``(U,)`` whether a user's target is new.
        spread: standard deviation of a user's scores over the items, mean over users.
        cost: share of the best mean that may be given up, 0 to 1.
    """
    candidates: Sequence[float] = [step * spread for step in STEPS]
    found = [ndcg_of(offset) for offset in candidates]
    means = np.array([ndcg_U.mean() for ndcg_U in found])
    chosen = int(np.flatnonzero(means >= (1.0 - cost) * means.max())[-1])

    def both(ndcg_U: np.ndarray) -> tuple[float, float | None]:
        return float(ndcg_U.mean()), float(ndcg_U[is_new_U].mean()) if is_new_U.any() else None

    return Raise(candidates[chosen], both(found[0]), both(found[chosen]))
