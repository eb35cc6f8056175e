"""Hit, NDCG and MRR of one target per user, computed from stored positions.

* The first position is 1.  Metrics depend on positions only, so they can be recomputed without a model.
* **Ties.**  A target that shares its score with ``t`` others after ``b`` better ones has one of the positions
  ``b + 1 .. b + t + 1``: the last one (``pessimistic``), the first one (``optimistic``) or the middle,
  ``b + 1 + t / 2`` (``mean``: the expectation over random orders of the tied items).
* **Half positions.**  Under ``mean`` the metric is that *of the expected position*, not the expectation of the metric: one
  number per user can be stored, and the published popularity baselines use it (S3-Rec, Zhou et al. 2020: zero-based
  position = items above + half the ties, a hit below k).  So ``hit@k`` is ``position < k + 1``: for whole positions the
  usual ``position <= k``; position 10.5 still counts at k = 10.  The gain is convex in the position, so NDCG and MRR of the
  expected position never exceed the expectation over the tied orders (which McSherry & Najork 2008 compute).
"""

from __future__ import annotations

from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from sda_core.errors import ConfigError, DataError

Ties = Literal["pessimistic", "mean", "optimistic"]
Metric = Literal["hit", "ndcg"]
Floats = npt.NDArray[np.float64]


def positions_under(num_better: npt.ArrayLike, num_tied: npt.ArrayLike, ties: Ties) -> Floats:
    """Positions of the targets under a tie policy.

    Args:
        num_better: (U,) candidates that score strictly higher than the target.
        num_tied: (U,) other candidates that score the same, the target itself not counted.
        ties: ``pessimistic`` (after all tied ones), ``mean`` (in their middle), ``optimistic`` (before them).

    Returns:
        (U,) float64, 1 = first position; half positions occur under ``mean`` only.

    Raises:
        DataError: a count is negative, or the two differ in length.
    """
    better, tied = np.asarray(num_better, dtype=np.float64), np.asarray(num_tied, dtype=np.float64)
    if better.shape != tied.shape:
        raise DataError(
            "positions_under", f"num_better and num_tied should be of one shape (got {better.shape} and {tied.shape})"
        )
    if better.size and min(float(better.min()), float(tied.min())) < 0:
        raise DataError("positions_under", "counts should not be negative")
    match ties:
        case "pessimistic":
            return better + tied + 1.0
        case "mean":
            return better + tied / 2.0 + 1.0
        case "optimistic":
            return better + 1.0
        case _:
            assert_never(ties)


def _checked(positions: npt.ArrayLike, k: int | None) -> Floats:
    if k is not None and k < 1:
        raise ConfigError("evaluate.cutoffs", f"a cut-off should be at least 1 (got {k})")
    array = np.asarray(positions, dtype=np.float64)
    if array.ndim != 1:
        raise DataError("positions", f"should be one number per user, shape (U,) (got shape {array.shape})")
    if not (array >= 1.0).all():  # also false for NaN
        raise DataError("positions", "should be 1 for the first place and higher below it (got a value under 1, or NaN)")
    return array


def hits(positions: npt.ArrayLike, k: int) -> Floats:
    """Per user: 1 if the target is among the first ``k``, else 0; shape (U,).  Half positions: see the module."""
    return (_checked(positions, k) < k + 1).astype(np.float64)


def gains(positions: npt.ArrayLike, k: int) -> Floats:
    """Per user: ``1 / log2(position + 1)`` if the target is among the first ``k``, else 0; shape (U,).

    NDCG of a single relevant item (Järvelin & Kekäläinen 2002): the ideal order has it first, so the ideal gain is 1.
    """
    array = _checked(positions, k)
    return np.where(array < k + 1, 1.0 / np.log2(array + 1.0), 0.0)


def reciprocals(positions: npt.ArrayLike, k: int | None = None) -> Floats:
    """Per user: ``1 / position``; with ``k``, 0 if the target is not among the first ``k``; shape (U,)."""
    array = _checked(positions, k)
    return 1.0 / array if k is None else np.where(array < k + 1, 1.0 / array, 0.0)


def per_user(metric: Metric, positions: npt.ArrayLike, k: int) -> Floats:
    """The per-user values whose mean is the metric; shape (U,)."""
    match metric:
        case "hit":
            return hits(positions, k)
        case "ndcg":
            return gains(positions, k)
        case _:
            assert_never(metric)


def _mean(values: Floats) -> float:
    if not values.size:
        raise DataError("positions", "there are none, so there is no mean", "leave the metric out for an empty group")
    return float(values.mean())


def hit(positions: npt.ArrayLike, k: int) -> float:
    """Hit@k, the share of users whose target is among the first ``k`` (= recall@k with one target).

    Args:
        positions: (U,) positions of the targets, 1 = first position; half positions allowed (see the module).
        k: cut-off, at least 1.

    Raises:
        DataError: there are no positions, or one is less than 1 or NaN.
        ConfigError: ``k`` is less than 1.
    """
    return _mean(hits(positions, k))


def ndcg(positions: npt.ArrayLike, k: int) -> float:
    """NDCG@k with one relevant item: the mean of ``1 / log2(position + 1)``, cut off at ``k``.

    Arguments and errors as for :func:`hit`.
    """
    return _mean(gains(positions, k))


def mrr(positions: npt.ArrayLike, k: int | None = None) -> float:
    """Mean reciprocal position, over the whole list or cut off at ``k``.

    Arguments and errors as for :func:`hit`.
    """
    return _mean(reciprocals(positions, k))
