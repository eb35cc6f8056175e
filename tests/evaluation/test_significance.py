"""Intervals that cover, p-values that mean what they say, and comparisons that refuse to compare apples with pears."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.errors import ConfigError, DataError
from sda_core.evaluation import (
    bootstrap_interval,
    compare,
    compare_runs,
    compare_variants,
    excludes_zero,
    flat_comparisons,
    flat_gains,
    holm,
    ndcg,
    sign_flip_p_value,
)
from sda_core.evaluation.significance import bootstrap_means
from sda_core.params import EvaluateParams
from sda_core.seed import generator


def evaluate_params(**changes: object) -> EvaluateParams:
    values: dict[str, object] = {
        "protocol": "fullrank", "cutoffs": (5, 10), "ties": "pessimistic",
        "tail": {"definition": "train_lt_k", "max_count": 4, "share": 0.8},
        "negatives_seed": 7, "bootstrap_samples": 500, "bootstrap_seed": 7, "batch_size": 64, "retrieval": None,
    }  # fmt: skip
    return EvaluateParams.model_validate({**values, **changes})


def placed_frame(positions: list[float] | np.ndarray, targets: list[int] | None = None, candidates: int = 50) -> pl.DataFrame:
    number = len(positions)
    return pl.DataFrame(
        {
            "user_id": range(1, number + 1),
            "target_item_id": targets or [1] * number,
            "position": positions,
            "candidates": [candidates] * number,
            "num_better": [0] * number,
            "num_tied": [0] * number,
        },
        schema={
            "user_id": pl.Int32, "target_item_id": pl.Int32, "position": pl.Float64,
            "candidates": pl.Int32, "num_better": pl.Int32, "num_tied": pl.Int32,
        },
    )  # fmt: skip


def test_bootstrap_has_the_moments_of_resampling() -> None:
    """Against resampling done naively: mean and spread of the resampled means agree with theory and with each other."""
    values = np.random.default_rng(0).choice([0.0, 0.3, 1.0], size=400, p=[0.6, 0.3, 0.1])
    means = bootstrap_means(values, 20_000, generator(1, "test"))
    naive_random = np.random.default_rng(2)
    naive = np.array([naive_random.choice(values, size=400).mean() for _ in range(4000)])
    error = values.std() / np.sqrt(400)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * error / np.sqrt(20_000))
    assert means.std() == pytest.approx(error, rel=0.03)
    np.testing.assert_allclose(
        np.quantile(means, [0.025, 0.5, 0.975]), np.quantile(naive, [0.025, 0.5, 0.975]), atol=0.12 * error
    )


def test_interval_covers_the_truth_about_19_times_in_20() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for number in range(400):
        values = random.choice([0.0, 0.4, 1.0], size=300, p=[0.7, 0.2, 0.1])
        low, high = bootstrap_interval(values, 400, generator(number, "test"))
        covered += low <= 0.18 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_seeded_and_blind_to_order() -> None:
    values = np.random.default_rng(0).random(100).round(1)
    first = bootstrap_interval(values, 200, generator(7, "a"))
    assert first == bootstrap_interval(values[::-1].copy(), 200, generator(7, "a"))
    assert first != bootstrap_interval(values, 200, generator(8, "a"))
    assert bootstrap_interval(np.full(30, 0.25), 50, generator(1, "a")) == (0.25, 0.25)


def test_bootstrap_in_small_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(60)
    whole = bootstrap_means(values, 50, generator(7, "a"))
    p_value = sign_flip_p_value(values - 0.45, 50, generator(7, "a"))
    monkeypatch.setattr("sda_core.evaluation.significance._CHUNK_NUMBERS", 200)
    np.testing.assert_array_equal(whole, bootstrap_means(values, 50, generator(7, "a")))
    assert p_value == sign_flip_p_value(values - 0.45, 50, generator(7, "a"))


def test_p_value_is_one_without_any_difference() -> None:
    assert sign_flip_p_value(np.zeros(50), 200, generator(7, "a")) == 1.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([-1.0, -0.63, -0.5, 0.0, 0.13, 0.5, 1.0]), min_size=1, max_size=9))
def test_p_value_is_the_exact_one_up_to_sampling(differences: list[float]) -> None:
    array = np.array(differences)
    sums = [abs(float(np.dot(signs, array))) for signs in itertools.product([-1, 1], repeat=len(array))]
    exact = np.mean([value >= abs(array.sum()) - 1e-9 for value in sums])
    assert sign_flip_p_value(array, 8000, generator(7, "a")) == pytest.approx(exact, abs=0.03)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    random = np.random.default_rng(0)
    values = [sign_flip_p_value(random.choice([-0.6, -0.2, 0.2, 0.6], size=80), 200, generator(n, "a")) for n in range(400)]
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(values) == pytest.approx(0.5, abs=0.07)


def test_p_value_sees_a_difference_and_is_never_zero() -> None:
    assert sign_flip_p_value(np.full(60, 0.1), 999, generator(7, "a")) == pytest.approx(1 / 1000)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_nothing_to_resample() -> None:
    for function in (bootstrap_interval, sign_flip_p_value):
        with pytest.raises(DataError):
            function(np.array([]), 10, generator(7, "a"))
        with pytest.raises(ConfigError, match="bootstrap_samples"):
            function(np.array([1.0]), 0, generator(7, "a"))


def test_compare_joins_by_user_not_by_place() -> None:
    ours, theirs = placed_frame([1, 3, 20, 2, 9]), placed_frame([2, 3, 4, 30, 9])
    straight = compare(ours, theirs, "ndcg", 10, 200, 7)
    assert straight is not None
    assert straight == compare(ours.reverse(), theirs.sample(fraction=1.0, shuffle=True, seed=4), "ndcg", 10, 200, 7)
    assert straight.value == pytest.approx(ndcg([1, 3, 20, 2, 9], 10))
    assert straight.baseline_value == pytest.approx(ndcg([2, 3, 4, 30, 9], 10))
    assert straight.difference == pytest.approx(straight.value - straight.baseline_value)
    assert straight.relative == pytest.approx(straight.value / straight.baseline_value - 1)
    assert straight.low is not None
    assert straight.high is not None
    assert straight.low <= straight.difference <= straight.high
    assert straight.num_users == 5


def test_compare_is_antisymmetric_and_null_on_itself() -> None:
    ours, theirs = placed_frame([1, 3, 20, 2, 9] * 8), placed_frame([2, 3, 4, 30, 9] * 8)
    forth, back = compare(ours, theirs, "hit", 5, 300, 7), compare(theirs, ours, "hit", 5, 300, 7)
    same = compare(ours, ours, "hit", 5, 300, 7)
    assert forth is not None
    assert back is not None
    assert same is not None
    assert forth.difference == -back.difference
    assert forth.p_value == back.p_value
    assert (same.difference, same.low, same.high, same.p_value, same.relative) == (0.0, 0.0, 0.0, 1.0, 0.0)


def test_pairing_makes_the_interval_tighter_than_two_single_ones() -> None:
    places = np.random.default_rng(0).integers(1, 30, size=500).astype(float)
    paired = compare(placed_frame(np.maximum(places - 1, 1)), placed_frame(places), "ndcg", 10, 500, 7)
    assert paired is not None
    assert paired.low is not None
    assert paired.high is not None
    gains = np.where(places <= 10, 1 / np.log2(places + 1), 0)
    low, high = bootstrap_interval(gains, 500, generator(7, "a"))
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (high - low)


def test_compare_on_some_items_only() -> None:
    ours, theirs = placed_frame([1, 3, 5], targets=[1, 2, 3]), placed_frame([9, 9, 9], targets=[1, 2, 3])
    mask = np.array([False, True, False, True])
    found = compare(ours, theirs, "ndcg", 10, 0, 7, mask)
    assert found is not None
    assert found.num_users == 2
    assert found.value == pytest.approx(ndcg([1, 5], 10))
    assert (found.low, found.high, found.p_value) == (None, None, None)
    assert compare(ours, theirs, "ndcg", 10, 0, 7, np.zeros(4, dtype=bool)) is None


def test_no_relative_difference_to_zero() -> None:
    found = compare(placed_frame([1, 2]), placed_frame([40, 40]), "ndcg", 10, 100, 7)
    assert found is not None
    assert found.relative is None


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (placed_frame([1, 2, 3, 4]), "different users"),
        (placed_frame([1, 2, 3]).with_columns(pl.col("user_id") + 1), "different users"),
        (placed_frame([1, 2, 3], targets=[1, 1, 2]), "different targets for 1 of 3"),
        (placed_frame([1, 2, 3], candidates=101), "different numbers of candidates"),
        (placed_frame([1, 2, 3]).with_columns(pl.lit(1, dtype=pl.Int32).alias("user_id")), "occurs twice"),
    ],
)
def test_compare_refuses_what_is_not_comparable(other: pl.DataFrame, what: str) -> None:
    with pytest.raises(DataError, match=what):
        compare(placed_frame([1, 2, 3]), other, "hit", 10, 10, 7)


def interactions_for(targets: list[int], rare: int) -> pl.DataFrame:
    """Every target once in test; all but ``rare`` five times in training."""
    rows = [(user, target, "test") for user, target in enumerate(targets, 1)]
    rows += [(100 + turn, item, "train") for item in set(targets) for turn in range(1 if item == rare else 5)]
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String}, orient="row")


def test_compare_variants_makes_every_pair_once() -> None:
    targets = [1, 2, 3, 1]
    positions = {
        ("id", "sasrec"): placed_frame([9, 8, 7, 30], targets),
        ("zero_shot", "sasrec"): placed_frame([5, 4, 3, 2], targets),
        ("sda", "sasrec"): placed_frame([1, 1, 1, 2], targets),
        ("id", "pop"): placed_frame([9, 8, 7, 30], targets),
    }
    rows = compare_variants(positions, ["zero_shot", "id"], interactions_for(targets, rare=2), evaluate_params(), 10)
    assert {(row.recommender, row.variant, row.baseline) for row in rows} == {
        ("sasrec", "zero_shot", "id"),
        ("sasrec", "sda", "zero_shot"),
        ("sasrec", "sda", "id"),
    }
    tail = [row for row in rows if row.group == "tail"]
    assert {row.num_users for row in tail} == {1}  # only the second user's target is rare
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        assert row.p_value is not None
        assert row.p_adjusted is not None
        assert row.p_value <= row.p_adjusted <= 1
    flat = flat_comparisons(rows)
    assert flat["sasrec/sda_vs_zero_shot/tail_ndcg@10_difference"] == pytest.approx(1 - 1 / np.log2(5))
    assert all(isinstance(value, float) for value in flat.values())
    assert rows == compare_variants(positions, ["zero_shot", "id"], interactions_for(targets, rare=2), evaluate_params(), 10)


def test_compare_variants_without_samples_or_tail() -> None:
    targets = [1, 3, 3, 1]
    positions = {("id", "vbpr"): placed_frame([1, 2, 3, 4], targets), ("sda", "vbpr"): placed_frame([1, 1, 1, 1], targets)}
    rows = compare_variants(
        positions, ["zero_shot", "id"], interactions_for(targets, rare=2), evaluate_params(bootstrap_samples=0), 5
    )
    assert {row.group for row in rows} == {"all"}  # no target is rare
    assert {(row.p_value, row.p_adjusted, row.low) for row in rows} == {(None, None, None)}
    assert not [key for key in flat_comparisons(rows) if key.endswith(("_p", "_low", "_p_adjusted"))]


def test_gains_are_those_of_the_trained_variants() -> None:
    targets = [1, 2, 3, 1] * 10
    positions = {
        ("id", "sasrec"): placed_frame([9, 8, 7, 30] * 10, targets),
        ("zero_shot", "sasrec"): placed_frame([5, 4, 3, 2] * 10, targets),
        ("sda", "sasrec"): placed_frame([1, 1, 1, 2] * 10, targets),
        ("id", "pop"): placed_frame([9, 8, 7, 30] * 10, targets),
        ("sda", "pop"): placed_frame([9, 8, 7, 30] * 10, targets),
    }
    rows = compare_variants(positions, ["zero_shot", "id"], interactions_for(targets, rare=2), evaluate_params(), 10)
    flat = flat_gains(rows, ("sda",), ("zero_shot", "id"))
    names = [f"sasrec/sda_vs_{base}/ndcg@10_{end}" for base in ("zero_shot", "id") for end in ("gain", "low", "high", "clear")]
    assert sorted(flat) == sorted(names)  # nothing of pop, whose positions are equal
    assert flat["sasrec/sda_vs_id/ndcg@10_gain"] == pytest.approx(ndcg([1, 1, 1, 2], 10) - ndcg([9, 8, 7, 30], 10))
    assert 0 < flat["sasrec/sda_vs_id/ndcg@10_low"] < flat["sasrec/sda_vs_id/ndcg@10_high"]
    assert flat["sasrec/sda_vs_id/ndcg@10_clear"] == 1
    assert [excludes_zero(*ends) for ends in ((-1.0, 1.0), (0.0, 1.0), (-2.0, -1.0), (None, None))] == [False, False, True, False]


def test_two_runs_are_compared_where_both_have_an_evaluation() -> None:
    targets = [1, 2, 3, 1]
    old = {("id", "bpr"): placed_frame([9, 8, 7, 30], targets), ("sda", "bpr"): placed_frame([1, 1, 1, 1], targets)}
    new = {("id", "vbpr"): placed_frame([1, 1, 1, 1], targets), ("sda", "bpr"): placed_frame([2, 1, 1, 1], targets)}
    found = compare_runs(old, new, interactions_for(targets, rare=2), evaluate_params(), 10)
    assert [(row.variant, row.recommender, row.name) for row in found] == [
        ("sda", "bpr", name) for name in ("hit@10", "ndcg@10", "tail_ndcg@10")
    ]
    assert [row.difference for row in found] == pytest.approx([0.0, (1 / np.log2(3) - 1) / 4, 0.0])
    assert [row.num_users for row in found] == [4, 4, 1]
    assert len(compare_runs(old, new, None, evaluate_params(), 10)) == 2
