"""Hit, NDCG and MRR beside torchmetrics and ranx, on the same scores: with ties and without."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from sda_core.evaluation import hit, mrr, ndcg, positions_under

Scores = npt.NDArray[np.float32]
NUM_USERS, NUM_ITEMS = 60, 40
CUTOFFS = (1, 5, 10)

Library = Callable[[Scores, npt.NDArray[np.int64], int], tuple[float, float, float]]
"""Scores (U, I), targets (U,) and a cut-off to Hit@k, NDCG@k and MRR@k."""


def by_torchmetrics(scores: Scores, targets: npt.NDArray[np.int64], k: int) -> tuple[float, float, float]:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (it comes with the extra dev)")
    import torch
    from torchmetrics.functional.retrieval import (
        retrieval_hit_rate,
        retrieval_normalized_dcg,
        retrieval_reciprocal_rank,
    )

    pairs = [(torch.from_numpy(row), torch.arange(NUM_ITEMS) == target) for row, target in zip(scores, targets, strict=True)]
    metrics = (retrieval_hit_rate, retrieval_normalized_dcg, retrieval_reciprocal_rank)
    hits, gains, reciprocals = (np.mean([float(metric(*pair, top_k=k)) for pair in pairs]) for metric in metrics)
    return float(hits), float(gains), float(reciprocals)


def by_ranx(scores: Scores, targets: npt.NDArray[np.int64], k: int) -> tuple[float, float, float]:
    ranx = pytest.importorskip("ranx", reason="ranx is not installed (pip install ranx; it brings 700 MB)")
    qrels = ranx.Qrels({f"u{user}": {f"i{target}": 1} for user, target in enumerate(targets)})
    run = ranx.Run({f"u{user}": {f"i{item}": float(x) for item, x in enumerate(row)} for user, row in enumerate(scores)})
    found = ranx.evaluate(qrels, run, [f"hit_rate@{k}", f"ndcg@{k}", f"mrr@{k}"])
    return found[f"hit_rate@{k}"], found[f"ndcg@{k}"], found[f"mrr@{k}"]


LIBRARIES = pytest.mark.parametrize("library", [by_torchmetrics, by_ranx])


def drawn(num_values: int) -> tuple[Scores, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Scores of so many values at the most, targets, and the counts of better and of tied items."""
    random = np.random.default_rng(num_values)
    scores = random.integers(1, num_values + 1, size=(NUM_USERS, NUM_ITEMS)).astype(np.float32)
    if num_values > NUM_ITEMS:  # no ties at all
        scores = random.permuted(np.tile(np.arange(1, NUM_ITEMS + 1, dtype=np.float32), (NUM_USERS, 1)), axis=1)
    targets = random.integers(0, NUM_ITEMS, size=NUM_USERS)
    own = scores[np.arange(NUM_USERS), targets][:, None]
    return scores, targets, (scores > own).sum(axis=1), (scores == own).sum(axis=1) - 1


@LIBRARIES
@pytest.mark.parametrize("k", CUTOFFS)
def test_equal_without_ties(library: Library, k: int) -> None:
    scores, targets, better, tied = drawn(10**6)
    assert not tied.any()
    positions = positions_under(better, tied, "pessimistic")
    assert 0 < hit(positions, k) < 1
    assert (hit(positions, k), ndcg(positions, k), mrr(positions, k)) == pytest.approx(library(scores, targets, k), abs=1e-6)


@LIBRARIES
@pytest.mark.parametrize("k", CUTOFFS)
@pytest.mark.parametrize(("ties", "step"), [("pessimistic", -0.5), ("optimistic", 0.5)])
def test_equal_with_ties_once_the_target_is_put_behind_or_before_them(library: Library, k: int, ties: str, step: float) -> None:
    """Whole numbers as scores: half a step down puts a target behind all that tie with it, half a step up before them."""
    scores, targets, better, tied = drawn(6)
    assert tied.mean() > 3
    positions = positions_under(better, tied, ties)  # type: ignore[arg-type]
    scores[np.arange(NUM_USERS), targets] += np.float32(step)
    assert (hit(positions, k), ndcg(positions, k), mrr(positions, k)) == pytest.approx(library(scores, targets, k), abs=1e-6)


@pytest.mark.parametrize("k", CUTOFFS)
def test_the_mean_over_tied_orders_is_that_of_torchmetrics(k: int) -> None:
    """torchmetrics takes NDCG's expectation over the orders of tied items: ours, of each place from the first to the last one."""
    scores, targets, better, tied = drawn(6)
    first, last = positions_under(better, tied, "optimistic"), positions_under(better, tied, "pessimistic")
    expected = [ndcg(np.arange(low, high + 1), k) for low, high in zip(first, last, strict=True)]
    assert np.mean(expected) == pytest.approx(by_torchmetrics(scores, targets, k)[1], abs=1e-6)
