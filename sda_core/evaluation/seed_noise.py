"""Whether two runs lie further apart than two runs that differ only in their seeds.

An interval takes the runs' seeds as they are paired.  Whether a run was reproduced is another question: on a machine that
rounds differently a training draws the same numbers and gives another model, as another seed would.  The spread between seeds
says how far apart two such runs may lie.

**The rule.**  Each of two runs has ``S`` seeds.  Let ``s`` be the standard deviation of a metric over seeds, pooled over both
runs (``2 (S - 1)`` degrees of freedom).  If the runs differ only in their seeds, the difference ``d`` of their means fulfils

    ``|d| <= t_{0.975, 2 (S - 1)} * s * sqrt(2 / S)``

in 95 of 100 cases: Student's test for two samples (for seeds as a source of variance Bouthillier et al. 2021, *Accounting for
Variance in Machine Learning Benchmarks*).  It takes the metric as normal over seeds.

**Adapters.**  The seeds of a run's recommenders share its adapter.  A machine that trains another adapter changes more.  Where
``n`` further runs with adapters of their own were measured (``python -m experiments seed_noise``), ``s`` is the standard
deviation over them, each a mean over its recommenders' seeds, with ``n - 1`` degrees of freedom; two single runs then differ
by at most ``t_{0.975, n - 1} * s * sqrt(2)`` (Hahn & Meeker 1991, *Statistical Intervals*, ch. 4).  The ``n`` runs must not
include the two.

**One user.**  Few seeds can agree by luck, above all on a small tail, where a metric is a count of few hits.  So ``s`` is never
taken below ``1 / U``, what one of ``U`` users can change.  A recommender without a seed has no noise: any difference is too
large.

**Many rows.**  Of ``m`` rows ``0.05 m`` lie outside by chance.  The verdict on two whole runs therefore takes p-values adjusted
by Benjamini & Hochberg (1995): where no row differs, some row is called different in at most 5 of 100 cases (Simes 1986), for
rows that are independent or depend on one another positively, as Hit and NDCG of one model do.
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
_EQUAL = 1e-12  # metrics that are equal on paper may differ in the last bits


@dataclass(frozen=True)
class Spread:
    """How far a metric of one run spreads over repetitions.

    Attributes:
        sd: ``s``, the standard deviation over repetitions.
        degrees: of freedom of ``s``.
        num_runs: how many repetitions each of the two results is a mean over.
    """

    sd: float
    degrees: int
    num_runs: int

    def scale(self, num_users: int) -> float:
        """The standard error of a difference of two results; ``num_users``: see "One user" above."""
        return max(self.sd, 1 / num_users) * math.sqrt(2 / self.num_runs)

    def band(self, num_users: int) -> float:
        """The largest difference that the repetitions explain, ``t_{0.975, degrees} * scale``."""
        from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

        return float(stdtrit(self.degrees, (1 + LEVEL) / 2)) * self.scale(num_users)

    def p_value(self, difference: float, num_users: int) -> float:
        """How often repetitions alone make a difference at least as large."""
        from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs]

        return 2 * float(stdtr(self.degrees, -abs(difference) / self.scale(num_users)))

    def sd_interval(self) -> tuple[float, float]:
        """95 % interval of the true standard deviation: ``s * sqrt(degrees / chi2)`` at chi2's 97.5 and 2.5 % quantiles."""
        from scipy.special import chdtri  # pyright: ignore[reportMissingTypeStubs]; the quantile by its upper tail

        tail = (1 - LEVEL) / 2
        low, high = (math.sqrt(self.degrees / float(chdtri(self.degrees, upper))) for upper in (tail, 1 - tail))
        return self.sd * low, self.sd * high


def spread_of_runs(values: Sequence[float]) -> Spread:
    """The spread of whole runs, by one number for each.

    Raises:
        DataError: fewer than two values, or one that is not finite.
    """
    if len(values) < 2:
        raise DataError("seeds' noise", f"a spread needs at least 2 runs (got {len(values)})")
    if not all(math.isfinite(value) for value in values):
        raise DataError("seeds' noise", f"a value is not finite (got {tuple(values)})")
    return Spread(float(np.std(values, ddof=1)), len(values) - 1, 1)


def spread_of_seeds(change: Change) -> Spread | None:
    """The spread between the seeds of the two runs themselves; None where each has one seed, or where it is not known."""
    if change.num_seeds < 2 or change.seed_sd is None or change.baseline_seed_sd is None:
        return None
    pooled = math.sqrt((change.seed_sd**2 + change.baseline_seed_sd**2) / 2)
    return Spread(pooled, 2 * (change.num_seeds - 1), change.num_seeds)


@dataclass(frozen=True)
class Judged:
    """One row of a comparison of two runs, held against the seeds' noise.

    Attributes:
        change: the row.
        band: the largest difference that the seeds explain; None where no noise was measured.
        p_value: how often seeds alone make such a difference; None where no noise was measured.
        p_adjusted: the same for all rows together, see the module.
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
        """Whether the row by itself is within the noise; None where no noise was measured and the values differ."""
        if self.is_equal:
            return True
        return None if self.band is None else abs(self.change.difference) <= self.band


@dataclass(frozen=True)
class Judgement:
    """The rows, and what follows for the two runs as wholes."""

    rows: tuple[Judged, ...]

    @property
    def measured(self) -> tuple[Judged, ...]:
        """Rows with a measured noise above 0: those that chance can push out."""
        return tuple(row for row in self.rows if row.band)

    @property
    def outside(self) -> tuple[Judged, ...]:
        """Measured rows that are larger than the noise, each by itself."""
        return tuple(row for row in self.measured if row.is_within is False)

    @property
    def different(self) -> tuple[Judged, ...]:
        """Rows that are too large also in view of the number of rows."""
        return tuple(row for row in self.rows if row.p_adjusted is not None and row.p_adjusted < 1 - LEVEL)

    @property
    def unknown(self) -> tuple[Judged, ...]:
        """Rows that differ, and for which no noise was measured."""
        return tuple(row for row in self.rows if row.is_within is None)

    @property
    def outcome(self) -> Literal["same", "different", "unknown"]:
        """``unknown`` where nothing is too large and some row was not measured."""
        return "different" if self.different else "unknown" if self.unknown else "same"


def judge(changes: Sequence[Change], spreads: Sequence[Spread | None], seedless: Collection[str] = ()) -> Judgement:
    """Hold the rows of a comparison of two runs against the seeds' noise.

    Args:
        changes: of :func:`sda_core.evaluation.compare_runs`.
        spreads: of each row, None where none was measured.
        seedless: recommenders whose results depend on no seed.
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
