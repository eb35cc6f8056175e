"""The rule covers what it says it covers, in simulations; verdicts on rows and on whole runs; adjusted p-values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sda_core.errors import DataError
from sda_core.evaluation import benjamini_hochberg
from sda_core.evaluation.seed_noise import Judgement, Spread, judge, spread_of_runs, spread_of_seeds
from sda_core.evaluation.significance import Change

USERS = 1_000_000  # so many that one user's worth is nothing
REPEATS = 4000
SLACK = 4 * math.sqrt(0.05 * 0.95 / REPEATS)  # four standard errors of a coverage of 95 %


def change(difference: float, variant: str = "sda", recommender: str = "sasrec", num_users: int = USERS) -> Change:
    return Change(
        variant=variant,
        recommender=recommender,
        name="ndcg@10",
        num_users=num_users,
        num_seeds=1,
        value=0.1 + difference,
        baseline_value=0.1,
        difference=difference,
        relative=None,
        low=None,
        high=None,
        p_value=None,
        seed_margin=None,
        seed_sd=None,
        baseline_seed_sd=None,
    )


# ------------------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_the_rule_covers_95_of_100_differences_of_two_further_runs(num_seeds: int) -> None:
    random = np.random.default_rng(num_seeds)
    inside = 0
    for _ in range(REPEATS):
        runs = random.normal(0.1, 0.002, num_seeds + 2)
        inside += abs(runs[-1] - runs[-2]) <= spread_of_runs(runs[:-2]).band(USERS)
    assert inside / REPEATS == pytest.approx(0.95, abs=SLACK)


def test_adapters_and_recommenders_of_a_seed_together_cover_as_well_and_recommenders_alone_do_not() -> None:
    """A run is the sum of two draws.  With one adapter for all seeds the spread misses a part of it."""
    random = np.random.default_rng(0)
    whole = alone = 0
    for _ in range(REPEATS):
        adapters, recommenders = random.normal(0, 0.003, 8), random.normal(0, 0.002, 8)
        difference = abs(adapters[7] + recommenders[7] - adapters[6] - recommenders[6])
        whole += difference <= spread_of_runs(adapters[:6] + recommenders[:6]).band(USERS)
        alone += difference <= spread_of_runs(adapters[0] + recommenders[:6]).band(USERS)
    assert whole / REPEATS == pytest.approx(0.95, abs=SLACK)
    assert alone / REPEATS < 0.85


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_runs_own_seeds_cover_95_of_100_differences_of_their_means(num_seeds: int) -> None:
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(REPEATS):
        old, new = random.normal(0.1, 0.002, (2, num_seeds))
        inside += abs(new.mean() - old.mean()) <= own_spread(old, new).band(USERS)
    assert inside / REPEATS == pytest.approx(0.95, abs=SLACK)


def test_the_p_value_of_own_seeds_is_student_s_test_of_two_samples() -> None:
    """Against scipy.stats."""
    old, new = np.array([0.09, 0.0931, 0.0912]), np.array([0.0965, 0.0948, 0.0952])
    expected = stats.ttest_ind(new, old).pvalue
    assert own_spread(old, new).p_value(new.mean() - old.mean(), USERS) == pytest.approx(expected)


def test_one_seed_or_numbers_without_a_spread_have_none() -> None:
    assert spread_of_seeds(change(0.1)) is None
    assert spread_of_seeds(replace(change(0.1), num_seeds=3)) is None  # metrics of an older version


def own_spread(old: np.ndarray, new: np.ndarray) -> Spread:
    row = replace(
        change(0.0), num_seeds=len(old), seed_sd=float(np.std(new, ddof=1)), baseline_seed_sd=float(np.std(old, ddof=1))
    )
    found = spread_of_seeds(row)
    assert found is not None
    return found


@pytest.mark.parametrize("hits", [0.0, 0.2, 1.0, 5.0])
def test_few_hits_of_a_small_tail_are_covered(hits: float) -> None:
    """Counts: 100 tail users, of whom so many are hit on average.  Often all seeds agree, and the next run does not."""
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(REPEATS):
        runs = random.binomial(100, hits / 100, 7) / 100
        inside += abs(runs[-1] - runs[-2]) <= spread_of_runs(runs[:-2]).band(100)
    assert inside / REPEATS > 0.93


def test_the_formulas_are_those_of_the_t_and_chi_square_tables() -> None:
    """Against scipy.stats, and the t table's 2.776 for 4 degrees of freedom."""
    values = (0.091, 0.094, 0.0925, 0.0953, 0.0902)
    spread = spread_of_runs(values)
    sd = stats.tstd(values)
    assert spread.sd == pytest.approx(sd)
    assert spread.band(USERS) == pytest.approx(2.776 * sd * math.sqrt(2), rel=1e-3)
    assert spread.p_value(0.004, USERS) == pytest.approx(2 * stats.t.sf(0.004 / (sd * math.sqrt(2)), 4))
    low, high = spread.sd_interval()
    assert stats.chi2.cdf(4 * sd**2 / low**2, 4) == pytest.approx(0.975)
    assert stats.chi2.cdf(4 * sd**2 / high**2, 4) == pytest.approx(0.025)


@given(
    values=st.lists(st.floats(0, 1), min_size=2, max_size=8),
    difference=st.floats(-1, 1),
    num_users=st.integers(1, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_band_and_p_value_say_the_same(values: list[float], difference: float, num_users: int) -> None:
    spread = spread_of_runs(values)
    band, p_value = spread.band(num_users), spread.p_value(difference, num_users)
    assert 0 <= p_value <= 1
    assert p_value == spread.p_value(-difference, num_users)
    assert band >= 1.96 * math.sqrt(2) / num_users
    if abs(abs(difference) - band) > 1e-9:
        assert (abs(difference) < band) == (p_value > 0.05)


@pytest.mark.parametrize("values", [(), (0.1,), (0.1, math.nan), (0.1, math.inf)])
def test_a_spread_needs_two_finite_values(values: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="variation between seeds"):
        spread_of_runs(values)


# ------------------------------------------------------------------------------------------------- many rows
@given(p_values=st.lists(st.floats(0, 1), max_size=12))
def test_adjusted_p_values_are_those_of_scipy(p_values: list[float]) -> None:
    expected = stats.false_discovery_control(p_values) if p_values else []
    assert benjamini_hochberg(p_values) == pytest.approx(list(expected))


def runs_of(random: np.random.Generator, shift: float = 0.0) -> Judgement:
    """Two runs of 12 models with 3 correlated metrics each, held against the noise of 6 seeds; the second run is shifted."""
    models = random.normal(0, 1, (8, 12, 1))
    values = 0.1 + 0.002 * (0.9 * models + math.sqrt(1 - 0.9**2) * random.normal(0, 1, (8, 12, 3)))
    values[7] += shift
    old, new = values[6].ravel(), values[7].ravel()
    spreads = [spread_of_runs(column) for column in values[:6].reshape(6, -1).T]
    return judge([change(float(difference)) for difference in new - old], spreads)


def test_equal_settings_are_rarely_called_different_and_5_of_100_rows_are_outside() -> None:
    random = np.random.default_rng(3)
    found = [runs_of(random) for _ in range(600)]
    different = np.mean([judgement.outcome == "different" for judgement in found])
    assert different < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    assert np.mean([len(judgement.outside) / 36 for judgement in found]) == pytest.approx(0.05, abs=0.01)


def test_runs_that_are_far_apart_are_called_different() -> None:
    random = np.random.default_rng(4)
    found = [runs_of(random, shift=0.012) for _ in range(100)]  # six standard deviations of a run
    assert np.mean([judgement.outcome == "different" for judgement in found]) > 0.9


# ------------------------------------------------------------------------------------------------- verdicts
def test_verdicts_of_rows() -> None:
    spread = spread_of_runs((0.09, 0.092, 0.094))  # band: 4.303 * 0.002 * 1.414 = 0.01217
    rows = [change(0.0121), change(-0.0123), change(0.5, variant="lora"), change(0.0, variant="id")]
    judgement = judge(rows, [spread, spread, None, None])
    assert [row.is_within for row in judgement.rows] == [True, False, None, True]
    assert judgement.rows[0].band == pytest.approx(4.3027 * 0.002 * math.sqrt(2), rel=1e-4)
    assert judgement.outside == (judgement.rows[1],)
    assert judgement.unknown == (judgement.rows[2],)
    assert judgement.different == ()  # p = 0.049 twice: one row of twenty does that by chance
    assert judgement.outcome == "unknown"
    assert judge(rows[:2], [spread] * 2).outcome == "same"
    assert judge([change(0.2), *rows], [spread, spread, spread, None, None]).outcome == "different"


def test_a_recommender_without_a_seed_has_no_noise() -> None:
    spread = spread_of_runs((0.09, 0.092, 0.094))
    rows = [change(0.0, recommender="pop"), change(1e-17, recommender="pop"), change(0.001)]
    assert judge(rows, [None, spread, spread], {"pop"}).outcome == "same"
    judgement = judge([change(1e-4, recommender="pop"), change(0.001)], [spread, spread], {"pop"})
    assert judgement.outcome == "different"
    assert judgement.different == (judgement.rows[0],)
    assert judgement.measured == (judgement.rows[1],)  # chance pushes no row of pop out


def test_nothing_measured() -> None:
    assert judge([change(0.0)], [None]).outcome == "same"
    assert judge([change(0.1)], [None]).outcome == "unknown"
