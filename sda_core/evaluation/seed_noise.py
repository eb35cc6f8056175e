"""Variation between seeds: test whether two runs differ more than two runs that differ only in their seeds.

A paired interval compares runs with given seeds.  Reproduction is another question: on a machine that rounds differently, the
same random numbers give another model, as another seed would.  The spread between seeds bounds the difference of two such
runs.

**The rule.**  Each of two runs has ``S`` seeds.  Let ``s`` be the standard deviation of a metric over seeds, pooled over both
runs (``2 (S - 1)`` degrees of freedom).  If the runs differ only in their seeds, the difference ``d`` of their means fulfils

    ``|d| <= t_{0.975, 2 (S - 1)} * s * sqrt(2 / S)``

in 95 of 100 cases: Student's test for two samples (for seeds as a source of variance see Bouthillier et al. 2021, *Accounting
for Variance in Machine Learning Benchmarks*).  It assumes that the metric is normal over seeds.

**Adapters.**  The seeds of a run's recommenders share its adapter.  A machine that trains another adapter changes more.  If
``n`` further runs with separate adapters were measured (``python -m experiments seed_noise``), ``s`` is the standard
deviation over them, each a mean over its recommenders' seeds, with ``n - 1`` degrees of freedom; two single runs then differ
by at most ``t_{0.975, n - 1} * s * sqrt(2)`` (Hahn & Meeker 1991, *Statistical Intervals*, ch. 4).  The ``n`` runs must not
include the two.

**One user.**  Few seeds can agree by chance, especially on a small tail, where a metric counts few hits.  So ``s`` is at least
``1 / U``, the change by one of ``U`` users.  A recommender without a seed has no
variation: any difference is too large.

**Many rows.**  Of ``m`` rows ``0.05 m`` are outside by chance.  Therefore the verdict on two whole runs uses p-values adjusted
by Benjamini & Hochberg (1995): if no row differs, at most 5 of 100 comparisons report a difference (Simes 1986), for rows that
are independent or positively dependent, like Hit and NDCG of one model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sda_core.errors import DataError
from sda_core.evaluation.significance import Change, benjamini_hochberg

LEVEL = 0.95
_EQUAL = 1e-12  # equal metrics may differ in the last bits


@dataclass(frozen=True)
class Spread:
    """The spread of a metric over repetitions of a run.

    Attributes:
        sd: ``s``, the standard deviation over repetitions.
        degrees: degrees of freedom of ``s``.
        num_runs: number of repetitions over which each of the two results is a mean.
    """

    sd: float
    degrees: int
    num_runs: int

    def scale(self, num_users: int) -> float:
        """The standard error of a difference of two results; ``num_users``: see "One user" above."""
        return max(self.sd, 1 / num_users) * math.sqrt(2 / self.num_runs)

    def band(self, num_users: int) -> float:
        """The largest difference that the variation explains, ``t_{0.975, degrees} * scale``."""
        from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

        return float(stdtrit(self.degrees, (1 + LEVEL) / 2)) * self.scale(num_users)

    def p_value(self, difference: float, num_users: int) -> float:
        """The probability that repetitions alone give a difference at least as large."""
        from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs]

        return 2 * float(stdtr(self.degrees, -abs(difference) / self.scale(num_users)))

    def sd_interval(self) -> tuple[float, float]:
        """95 % interval of the true standard deviation: ``s * sqrt(degrees / chi2)`` at chi2's 97.5 and 2.5 % quantiles."""
        from scipy.special import chdtri  # pyright: ignore[reportMissingTypeStubs]; the quantile by its upper tail

        tail = (1 - LEVEL) / 2
        low, high = (math.sqrt(self.degrees / float(chdtri(self.degrees, upper))) for upper in (tail, 1 - tail))
        return self.sd * low, self.sd * high


def spread_of_runs(values: Sequence[float]) -> Spread:
    """The spread of whole runs, from one value per run.

    Raises:
        DataError: fewer than two values, or one that is not finite.
    """
    if len(values) < 2:
        raise DataError("variation between seeds", f"a spread needs at least 2 runs (got {len(values)})")
    if not all(math.isfinite(value) for value in values):
        raise DataError("variation between seeds", f"a value is not finite (got {tuple(values)})")
    return Spread(float(np.std(values, ddof=1)), len(values) - 1, 1)


def spread_of_seeds(change: Change) -> Spread | None:
    """The spread between the seeds of the two runs; None if each has one seed, or if the spread is not known."""
    if change.num_seeds < 2 or change.seed_sd is None or change.baseline_seed_sd is None:
        return None
    pooled = math.sqrt((change.seed_sd**2 + change.baseline_seed_sd**2) / 2)
    return Spread(pooled, 2 * (change.num_seeds - 1), change.num_seeds)


@dataclass(frozen=True)
class Judged:
    """One row of a comparison of two runs, compared with the variation between seeds.

    Attributes:
        change: the row.
        band: the largest difference that the variation explains; None if it was not measured.
        p_value: the probability of such a difference by seeds alone; None if the variation was not measured.
        p_adjusted: the p-value adjusted for all rows, see the module.
    """

    change: Change
    band: float | None
    p_value: float | None
    p_adjusted: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both runs have the same value."""
        return abs(self.change.difference) <= _EQUAL

    @property
    def is_within(self) -> bool | None:
        """Whether the single row is within its band; None if the variation was not measured and the values differ."""
        if self.is_equal:
            return True
        return None if self.band is None else abs(self.change.difference) <= self.band


@dataclass(frozen=True)
class Judgement:
    """The rows, and the conclusion for the two runs."""

    rows: tuple[Judged, ...]

    @property
    def measured(self) -> tuple[Judged, ...]:
        """Rows with a measured variation above 0, which can be outside by chance."""
        return tuple(row for row in self.rows if row.band)

    @property
    def outside(self) -> tuple[Judged, ...]:
        """Measured rows outside their band, each tested separately."""
        return tuple(row for row in self.measured if row.is_within is False)

    @property
    def different(self) -> tuple[Judged, ...]:
        """Rows that differ after adjustment for the number of rows."""
        return tuple(row for row in self.rows if row.p_adjusted is not None and row.p_adjusted < 1 - LEVEL)

    @property
    def unknown(self) -> tuple[Judged, ...]:
        """Rows that differ and have no measured variation."""
        return tuple(row for row in self.rows if row.is_within is None)

    @property
    def outcome(self) -> Literal["same", "different", "unknown"]:
        """The verdict; ``unknown`` if no row is too large and some row was not measured."""
        return "different" if self.different else "unknown" if self.unknown else "same"


def judge(changes: Sequence[Change], spreads: Sequence[Spread | None], seedless: Collection[str] = ()) -> Judgement:
    """Compare the rows of a comparison of two runs with the variation between seeds.

    Args:
        changes: the result of :func:`sda_core.evaluation.compare_runs`.
        spreads: the spread of each row, None if it was not measured.
        seedless: recommenders whose results do not depend on a seed.
    """
    p_values: list[float | None] = []
    for change, spread in zip(changes, spreads, strict=True):
        if change.recommender in seedless:
            p_values.append(None)
        else:
            p_values.append(None if spread is None else spread.p_value(change.difference, change.num_users))
    adjusted = iter(benjamini_hochberg([value for value in p_values if value is not None]))
    rows: list[Judged] = []
    for change, spread, p_value in zip(changes, spreads, p_values, strict=True):
        if change.recommender in seedless:
            exact = float(abs(change.difference) <= _EQUAL)
            rows.append(Judged(change, 0.0, exact, exact))
        elif spread is None or p_value is None:
            rows.append(Judged(change, None, None, None))
        else:
            rows.append(Judged(change, spread.band(change.num_users), p_value, next(adjusted)))
    return Judgement(tuple(rows))
