"""Metrics against plain definitions, and tie policies against every order of the tied items."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from sda_core.errors import ConfigError, DataError
from sda_core.evaluation import hit, mrr, ndcg, positions_under


def test_by_hand() -> None:
    positions = np.array([1, 2, 10, 11])
    assert hit(positions, 10) == 3 / 4
    assert hit(positions, 1) == 1 / 4
    assert ndcg(positions, 10) == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4)
    assert mrr(positions) == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4)
    assert mrr(positions, 10) == pytest.approx((1 + 1 / 2 + 1 / 10) / 4)
    assert isinstance(hit(positions, 10), float)


def test_halves_count_until_the_next_place() -> None:
    """Zero-based place (better + tied / 2) below k is a hit: 10.5 is the zero-based 9.5."""
    assert hit([10.5], 10) == 1.0
    assert hit([11.0], 10) == 0.0
    assert ndcg([10.5], 10) == pytest.approx(1 / math.log2(11.5))
    assert ndcg([11.0], 10) == 0.0
    assert mrr([10.5], 10) == pytest.approx(1 / 10.5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30, unique=True), st.integers(1, 12), st.data())
def test_ndcg_is_sklearns(scores: list[float], k: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    relevance = np.zeros((1, len(scores)))
    relevance[0, target] = 1
    position = 1 + sum(score > scores[target] for score in scores)
    assert ndcg([position], k) == pytest.approx(ndcg_score(relevance, np.array([scores]), k=k))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.data())
def test_policies_are_worst_mean_and_best_over_all_orders(scores: list[int], data: st.DataObject) -> None:
    """Sort by score and by every possible order of the items: the target's place is then known without any policy."""
    target = data.draw(st.integers(0, len(scores) - 1))
    places = [
        1 + sorted(range(len(scores)), key=lambda item: (-scores[item], order[item])).index(target)
        for order in itertools.permutations(range(len(scores)))
    ]
    better = [sum(score > scores[target] for score in scores)]
    tied = [sum(score == scores[target] for score in scores) - 1]
    assert positions_under(better, tied, "pessimistic")[0] == max(places)
    assert positions_under(better, tied, "optimistic")[0] == min(places)
    assert positions_under(better, tied, "mean")[0] == pytest.approx(sum(places) / len(places))


@pytest.mark.parametrize(("ties", "position"), [("pessimistic", 101.0), ("mean", 51.0), ("optimistic", 1.0)])
def test_a_constant_scorer_scores_what_the_policy_says(ties: str, position: float) -> None:
    positions = positions_under(np.zeros(8, dtype=np.int32), np.full(8, 100, dtype=np.int32), ties)  # type: ignore[arg-type]
    assert positions.dtype == np.float64
    assert set(positions) == {position}
    assert hit(positions, 10) == float(position <= 10)
    assert ndcg(positions, 10) == float(position == 1)
    assert mrr(positions) == pytest.approx(1 / position)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 30))
def test_bounds_and_monotony(positions: list[int], k: int) -> None:
    assert 0 <= ndcg(positions, k) <= hit(positions, k) <= 1
    assert mrr(positions, k) <= ndcg(positions, k) + 1e-12
    assert hit(positions, k) <= hit(positions, k + 1)
    assert hit(positions, k) == sum(position <= k for position in positions) / len(positions)
    worse = [position + 1 for position in positions]
    assert ndcg(worse, k) <= ndcg(positions, k)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(0, 20))
def test_mean_ties_never_flatter(num_better: int, num_tied: int) -> None:
    """The gain is convex: NDCG of the expected position is at most the expectation of NDCG over the tied orders."""
    places = np.arange(num_better + 1, num_better + num_tied + 2)
    expected = positions_under([num_better], [num_tied], "mean")
    assert ndcg(expected, 1000) <= np.mean([ndcg([place], 1000) for place in places]) + 1e-12
    assert mrr(expected) <= np.mean([mrr([place]) for place in places]) + 1e-12


@pytest.mark.parametrize("bad", [[], [0], [0.5], [float("nan")], [[1, 2]]])
@pytest.mark.parametrize("metric", [hit, ndcg, mrr])
def test_positions_that_are_none(bad: list[float], metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="positions"):
        metric(bad, 10)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="cutoffs"):
        hit([1], 0)
    with pytest.raises(DataError, match="negative"):
        positions_under([-1], [0], "mean")
    with pytest.raises(DataError, match="shape"):
        positions_under([1], [0, 0], "mean")
