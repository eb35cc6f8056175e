"""Intervals that cover, p-values that mean what they say, and comparisons that refuse to compare apples with pears."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from scipy import stats

from sda_core.errors import ConfigError, DataError
from sda_core.evaluation import (
    compare,
    compare_runs,
    compare_variants,
    excludes_zero,
    flat_comparisons,
    flat_gains,
    holm,
    interval,
    is_clear,
    ndcg,
)
from sda_core.evaluation.significance import bootstrap_means, drawn_means, own_seed_sd
from sda_core.params import EvaluateParams
from sda_core.seed import generator
from tests.sections import seeded


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
        low, high = interval(values, 400, generator(number, "test"))
        covered += low <= 0.18 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_seeded_and_blind_to_order() -> None:
    values = np.random.default_rng(0).random(100).round(1)
    first = interval(values, 200, generator(7, "a"))
    assert first == interval(values[::-1].copy(), 200, generator(7, "a"))
    assert first != interval(values, 200, generator(8, "a"))
    assert interval(np.full(30, 0.25), 50, generator(1, "a")) == (0.25, 0.25)


def test_bootstrap_in_small_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(60)
    whole = bootstrap_means(values, 50, generator(7, "a"))
    monkeypatch.setattr("sda_core.evaluation.significance._CHUNK_NUMBERS", 200)
    np.testing.assert_array_equal(whole, bootstrap_means(values, 50, generator(7, "a")))


# ----------------------------------------------------------------------------------------------- users and seeds
def crossed(random: np.random.Generator, of_seeds: float, of_users: float, rest: float, shape: tuple[int, int]) -> np.ndarray:
    """Numbers with mean 0 by seed and user: an effect of each seed, of each user, and of each pair."""
    seeds, users = random.normal(size=(shape[0], 1)), random.normal(size=(1, shape[1]))
    return of_seeds * seeds + of_users * users + rest * random.normal(size=shape)


def test_one_seed_or_equal_seeds_leave_the_interval_over_users() -> None:
    values = np.random.default_rng(0).random(80).round(1)
    alone = interval(values, 300, generator(7, "a"))
    assert interval(values[None], 300, generator(7, "a")) == alone
    assert interval(np.tile(values, (3, 1)), 300, generator(7, "a")) == pytest.approx(alone, rel=1e-9)


def test_without_users_that_differ_it_is_student_s_interval_of_the_seeds() -> None:
    """Against SciPy: every user has the value of the seed."""
    of_seeds = np.array([0.09, 0.1, 0.095])
    found = interval(np.tile(of_seeds[:, None], (1, 50)), 20_000, generator(7, "a"))
    expected = stats.t.interval(0.95, 2, loc=of_seeds.mean(), scale=stats.sem(of_seeds))
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_draws_have_the_variance_of_the_crossed_design() -> None:
    """With many seeds t is normal, so the variance of the draws is that of the mean: each part once."""
    random = np.random.default_rng(1)
    value_SU = crossed(random, 0.1, 1.0, 2.0, (40, 300))
    drawn = drawn_means(value_SU, 20_000, generator(7, "a"))
    expected = 0.1**2 / 40 + 1.0 / 300 + 2.0**2 / (40 * 300)
    assert drawn.var() == pytest.approx(expected, rel=0.25)
    # by the expected mean squares of an analysis of variance, done by hand
    residual_SU = value_SU - value_SU.mean(0) - value_SU.mean(1, keepdims=True) + value_SU.mean()
    error = (residual_SU**2).sum() / (39 * 299)
    between = 300 * ((value_SU.mean(1) - value_SU.mean()) ** 2).sum() / 39
    assert own_seed_sd(value_SU) == pytest.approx(np.sqrt((between - error) / 300))
    assert own_seed_sd(crossed(random, 0.0, 1.0, 0.0, (3, 50))) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_seeds", "of_users", "rest"),
    [(0.0, 1.0, 0.5), (0.05, 1.0, 0.5), (0.1, 1.0, 1.5), (0.3, 1.0, 1.0), (0.0, 1.0, 2.0)],
    ids=["users alone", "both", "all three", "seeds most", "pairs most"],
)
def test_three_seeds_cover_the_truth_at_least_19_times_in_20(of_seeds: float, of_users: float, rest: float) -> None:
    """Simulated two-way layouts; an interval over users alone misses the truth where seeds matter."""
    random = np.random.default_rng(2)
    covered, over_users = [], []
    for number in range(800):
        value_SU = crossed(random, of_seeds, of_users, rest, (3, 400))
        low, high = interval(value_SU, 400, generator(number, "both"))
        covered.append(low <= 0.0 <= high)
        low, high = interval(value_SU.mean(0), 400, generator(number, "users"))
        over_users.append(low <= 0.0 <= high)
    assert np.mean(covered) > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 800)
    if of_seeds > 0.2:
        assert np.mean(over_users) < 0.6


def test_a_difference_that_seeds_may_have_made_is_not_clear() -> None:
    """Every seed's interval over users excludes zero, and the seeds disagree by more than the difference."""
    places = np.array([[3.0] * 400, [3.0] * 400, [3.0] * 400])
    better = places - np.array([[0.0], [1.0], [2.0]])
    ours, theirs = (seeded(*(placed_frame(row) for row in rows)) for rows in (better, places))
    found = compare(ours, theirs, "ndcg", 10, 500, 7)
    assert found is not None
    assert found.num_seeds == 3
    assert found.seed_sd == pytest.approx(np.std([ndcg(row, 10) for row in better], ddof=1))
    assert found.baseline_seed_sd == 0.0
    assert found.difference > 0.1
    assert not excludes_zero(found.low, found.high)
    assert found.p_value is not None
    assert found.p_value > 0.05


def test_pairs_are_made_by_the_order_of_the_seeds() -> None:
    """Variants that follow the same luck of a seed, which moves all users, are compared without it."""
    base = np.random.default_rng(0).integers(1, 20, size=300).astype(float)
    luck = [base, base + 3.0, base + 8.0]
    ours = seeded(*(placed_frame(np.maximum(places - 1, 1)) for places in luck))
    theirs = seeded(*(placed_frame(places) for places in luck))
    other_order = seeded(*(placed_frame(places) for places in (luck[1], luck[2], luck[0])))
    paired, crossed_over = (compare(ours, given, "ndcg", 10, 500, 7) for given in (theirs, other_order))
    assert paired is not None
    assert crossed_over is not None
    assert paired.difference == pytest.approx(crossed_over.difference)
    assert paired.seed_margin is not None
    assert crossed_over.seed_margin is not None
    assert paired.seed_margin < 0.2 * crossed_over.seed_margin


def test_p_values_are_uniform_when_nothing_differs() -> None:
    random = np.random.default_rng(0)
    places = random.integers(1, 20, size=(300, 2, 120)).astype(float)
    values = []
    for ours, theirs in places:
        found = compare(placed_frame(ours), placed_frame(theirs), "ndcg", 10, 200, 7)
        assert found is not None
        values.append(found.p_value)
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(values) == pytest.approx(0.5, abs=0.08)


def test_a_p_value_is_never_zero_and_agrees_with_the_interval() -> None:
    found = compare(placed_frame([1.0] * 60), placed_frame([9.0] * 60), "hit", 5, 999, 7)
    assert found is not None
    assert found.p_value == pytest.approx(1 / 1000)
    random = np.random.default_rng(3)
    for _ in range(40):
        ours, theirs = random.integers(1, 14, size=(2, 100)).astype(float)
        found = compare(placed_frame(ours), placed_frame(theirs), "ndcg", 10, 1000, 7)
        assert found is not None
        assert found.p_value is not None
        if abs(found.p_value - 0.05) > 0.004:
            assert (found.p_value < 0.05) == excludes_zero(found.low, found.high)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_nothing_to_resample() -> None:

    with pytest.raises(DataError):
        interval(np.array([]), 10, generator(7, "a"))
    with pytest.raises(ConfigError, match="bootstrap_samples"):
        interval(np.array([1.0]), 0, generator(7, "a"))


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
    assert forth.p_value == pytest.approx(back.p_value, abs=0.1)
    assert (same.difference, same.low, same.high, same.p_value, same.relative) == (0.0, 0.0, 0.0, 1.0, 0.0)


def test_pairing_makes_the_interval_tighter_than_two_single_ones() -> None:
    places = np.random.default_rng(0).integers(1, 30, size=500).astype(float)
    paired = compare(placed_frame(np.maximum(places - 1, 1)), placed_frame(places), "ndcg", 10, 500, 7)
    assert paired is not None
    assert paired.low is not None
    assert paired.high is not None
    gains = np.where(places <= 10, 1 / np.log2(places + 1), 0)
    low, high = interval(gains, 500, generator(7, "a"))
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
        (seeded(placed_frame([1, 2, 3]), placed_frame([1, 2, 3])), "have 1 and 2 seeds"),
        (seeded(placed_frame([1, 2, 3]), placed_frame([1, 2])), "seeds 1 and 2 do not have the same users"),
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


def test_a_control_is_a_question_of_its_own() -> None:
    """Holm's correction is for the variants that compete; a control has its own p-value, and does not count for theirs."""
    targets = list(range(1, 31))
    random = np.random.default_rng(0)
    names = ("id", "zero_shot", "sda", "oracle")
    places = {name: random.integers(1, 15 if name == "oracle" else 30, size=30).tolist() for name in names}
    frames = {(name, "sasrec"): placed_frame(places[name], targets) for name in names}
    interactions = interactions_for(targets, rare=2)

    def found(names: Sequence[str], controls: Sequence[str] = ()) -> dict[tuple[str, str], float | None]:
        chosen = {key: frame for key, frame in frames.items() if key[0] in names}
        rows = compare_variants(chosen, ["id", "zero_shot"], interactions, evaluate_params(), 10, controls=controls)
        return {(row.variant, row.baseline): row.p_adjusted for row in rows if (row.group, row.metric) == ("all", "ndcg")}

    rows = compare_variants(frames, ["id", "zero_shot"], interactions, evaluate_params(), 10, controls=["oracle"])
    for row in rows:
        if row.variant == "oracle":
            assert row.p_adjusted == row.p_value
    with_control, without = found(names, ["oracle"]), found(names[:3])
    assert {pair: p for pair, p in with_control.items() if "oracle" not in pair} == without
    assert found(names)["sda", "id"] != without["sda", "id"]  # as one of five comparisons, and as one of three


@pytest.mark.parametrize(
    ("low", "high", "p_adjusted", "expected"),
    [
        (0.1, 0.2, 0.01, True),
        (-0.2, -0.1, 0.01, True),
        (0.1, 0.2, 0.05, False),
        (-0.1, 0.2, 0.01, False),
        (0.1, 0.2, None, False),
    ],
)
def test_clear_needs_interval_and_p_value(low: float, high: float, p_adjusted: float | None, expected: bool) -> None:
    assert is_clear(low, high, p_adjusted) is expected
    assert not is_clear(None, None, p_adjusted)


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
