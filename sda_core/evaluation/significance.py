"""Confidence intervals and tests for metrics and differences of variants, over users *and* training seeds.

A metric is a mean over U users and S seeds, ``x_SU``.  A repetition would have other users and other seeds.

* **Users are resampled** (Sakai 2006): the bootstrap draws U users with replacement, the same ones for every seed.
* **Three seeds cannot be resampled.**  Drawing 3 of 3 with replacement has ten outcomes, its standard deviation is too small
  by ``sqrt((S - 1) / S)``, 18 %, and its tails are meaningless.  So the seeds' part is drawn from a model instead: the means
  of the seeds are assumed to be normal, so the error of the mean of S seeds, with a spread estimated from the same S, follows
  Student's t with ``S - 1`` degrees of freedom.
* **Combination**: ``users' draw + a / sqrt(S) * t(S - 1)``, where ``a`` is the standard deviation of the seeds' means without
  the part due to chance by user and seed (:func:`own_seed_sd`), which the users' draw already contains.  The 95 % interval
  has the 2.5 and 97.5 % quantiles of these sums.
* **Pairing**: the difference of two variants is computed user by user and seed by seed (the first with the first) before
  the draws.
* ``p`` is the smallest level at which the interval excludes zero, from the same draws, so interval and p-value agree.
* With one seed the interval is over users only.

The interval covers other users from the same population and other seeds of the recommenders.  It does not cover other seeds
of the adapters or the shop, or results that are far from normal over seeds (three seeds cannot show that).  With three seeds
the interval is wide if seeds matter: t(2) is 4.3 standard errors on each side; for five seeds it is 2.8.

A metric with a cut-off has few distinct values.  Resampling U users is then a multinomial draw over the distinct values: exactly
the same distribution, at a cost that does not grow with U.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import ConfigError, DataError
from sda_core.evaluation.groups import Mask, item_groups
from sda_core.evaluation.metrics import Floats, Metric
from sda_core.evaluation.seeds import Stacked, seed_sd, stack
from sda_core.params import EvaluateParams
from sda_core.seed import generator

Group = Literal["all", "tail"]

BASELINES = ("id", "zero_shot", "lora")  # the variants that every other one is compared with

_TAILS = (0.025, 0.975)  # quantiles of a 95 % interval
_SIGNIFICANT = 0.05  # limit of an adjusted p-value
_CHUNK_NUMBERS = 4_000_000  # drawn at a time, to bound the memory


def _distinct(values: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    distinct, counts = np.unique(values, return_counts=True)
    return distinct, counts.astype(np.int64)


def bootstrap_means(values: Floats, num_samples: int, random: np.random.Generator) -> Floats:
    """Means of ``num_samples`` resamples (with replacement, of the same size) of ``values``.

    Args:
        values: (U,) one value per user, in any order.
        num_samples: number of resamples.
        random: random generator.

    Returns:
        (num_samples,) float64.

    Raises:
        DataError: there are no values.
    """
    if not values.size:
        raise DataError("bootstrap", "there are no users to resample")
    distinct, counts = _distinct(values)
    rows = max(1, _CHUNK_NUMBERS // len(distinct))
    means = np.empty(num_samples, dtype=np.float64)
    for begin in range(0, num_samples, rows):
        size = min(rows, num_samples - begin)
        drawn = random.multinomial(len(values), counts / len(values), size=size)
        # einsum and not @: in BLAS the order of summation, and so the last bits, depend on the number of threads
        means[begin : begin + size] = np.einsum("sv,v->s", drawn.astype(np.float64), distinct)
    return means / len(values)


def own_seed_sd(value_SU: Floats) -> float:
    """Standard deviation of the effect of a seed that is common to all users.

    With ``x_su = m + a_s + b_u + e_su`` the seeds' means have the variance ``var(a) + var(e) / U``.  ``var(e)`` is the
    residual mean square of the two-way layout (Scheffe 1959, ch. 4), estimated well from ``(S - 1) (U - 1)`` degrees of
    freedom, so it is subtracted: ``var(a) = max(0, s^2 - var(e) / U)``.  A draw of users contains ``b`` and ``e``: their
    means over the seeds have the variance ``var(b) + var(e) / S``.

    Returns:
        0 with one seed, or if the spread of the seeds' means is explained by chance by user and seed.
    """
    num_seeds, num_users = value_SU.shape
    if num_seeds < 2 or num_users < 2:
        return 0.0
    seed_S1 = value_SU.mean(axis=1, keepdims=True)
    residual_SU = value_SU - value_SU.mean(axis=0) - seed_S1 + value_SU.mean()
    error = float((residual_SU**2).sum()) / ((num_seeds - 1) * (num_users - 1))
    return math.sqrt(max(0.0, float(seed_S1.var(ddof=1)) - error / num_users))


def drawn_means(value_SU: Floats, num_samples: int, random: np.random.Generator) -> Floats:
    """Draws of the mean over users and seeds; see the module.

    Args:
        value_SU: ``(S, U)`` values, or paired differences, by seed and user.
        num_samples: number of draws.
        random: random generator.

    Returns:
        ``(num_samples,)`` float64.

    Raises:
        DataError: there are no values.
    """
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]; a quarter of a second to import

    num_seeds = len(value_SU)
    user_means = bootstrap_means(value_SU.mean(axis=0), num_samples, random)
    spread = own_seed_sd(value_SU)
    if not spread:
        return user_means
    levels = (np.arange(num_samples) + 0.5) / num_samples  # each quantile once, in random order: less noise in the tails
    return user_means + spread / math.sqrt(num_seeds) * stdtrit(num_seeds - 1, random.permutation(levels))


def _seed_margin(value_SU: Floats) -> float | None:
    """Half the width of the interval due to the seeds alone; None for one seed."""
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

    num_seeds = len(value_SU)
    return None if num_seeds < 2 else own_seed_sd(value_SU) / math.sqrt(num_seeds) * float(stdtrit(num_seeds - 1, _TAILS[1]))


def interval(value_SU: Floats, num_samples: int, random: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean over users and seeds; see the module.

    Args:
        value_SU: ``(S, U)``, or ``(U,)`` for one seed.
        num_samples: number of draws.
        random: random generator.

    Raises:
        DataError: there are no values.
        ConfigError: ``num_samples`` is less than 1.
    """
    if num_samples < 1:
        raise ConfigError("evaluate.bootstrap_samples", f"an interval needs at least 1 (got {num_samples})")
    low, high = np.quantile(drawn_means(np.atleast_2d(value_SU), num_samples, random), _TAILS)
    return float(low), float(high)


def _interval_and_p_value(value_SU: Floats, num_samples: int, random: np.random.Generator) -> tuple[float, float, float]:
    """The 95 % interval of a mean difference, and the two-sided p-value of "the mean difference is zero"."""
    drawn = drawn_means(value_SU, num_samples, random)
    low, high = np.quantile(drawn, _TAILS)
    beyond = min(int((drawn <= 0.0).sum()), int((drawn >= 0.0).sum()))
    return float(low), float(high), min(1.0, (1 + 2 * beyond) / (1 + num_samples))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for several hypotheses (Holm 1979): the probability of any false alarm is at most 5 %.

    Returns:
        In the given order: ``max over j <= i of min(1, (n - j) p_(j))`` for the i-th smallest, j from 0.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for number, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - number) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that on average at most 5 % of those below 0.05 are false alarms (Benjamini & Hochberg 1995).

    If all null hypotheses are true this is Simes' test (1986): the probability of any false alarm is at most 5 %, for p-values
    that are independent or positively dependent.

    Returns:
        In the given order: ``min over j >= i of min(1, n p_(j) / j)`` for the i-th smallest, j from 1.
    """
    adjusted = [0.0] * len(p_values)
    least = 1.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for number in range(len(order), 0, -1):
        least = min(least, len(order) * p_values[order[number - 1]] / number)
        adjusted[order[number - 1]] = least
    return adjusted


@dataclass(frozen=True)
class Difference:
    """A paired difference between two evaluations of the same users, mean over seeds and users.

    ``relative`` is None if the baseline's metric is 0; ``low``, ``high`` (95 % interval of ``difference``) and ``p_value`` are
    None if no samples were requested; ``seed_margin`` is half the width of the interval due to the seeds alone, None with one
    seed; ``seed_sd`` and ``baseline_seed_sd`` (standard deviations of the two values over seeds) are None with one seed.
    """

    num_users: int
    num_seeds: int
    value: float
    baseline_value: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p_value: float | None
    seed_margin: float | None
    seed_sd: float | None
    baseline_seed_sd: float | None


def _check_same(ours: Stacked, theirs: Stacked) -> None:
    advice = "evaluate both on the same data, split and protocol"
    if not np.array_equal(ours.user_U, theirs.user_U):
        common = len(np.intersect1d(ours.user_U, theirs.user_U))
        sizes = f"{len(ours.user_U)} and {len(theirs.user_U)}, {common} in common"
        raise DataError("comparison", f"the two evaluations have different users ({sizes})", advice)
    for one, other, what in (
        (ours.target_U, theirs.target_U, "targets"),
        (ours.candidates_U, theirs.candidates_U, "numbers of candidates"),
    ):
        differing = int((one != other).sum())
        if differing:
            problem = f"the two evaluations have different {what} for {differing} of {len(one)} users"
            raise DataError("comparison", problem, advice)
    if len(ours.seeds) != len(theirs.seeds):
        problem = f"the two evaluations have {len(ours.seeds)} and {len(theirs.seeds)} seeds"
        raise DataError("comparison", problem, "train both with as many (train_recommender.seeds)")


def compare(
    positions: pl.DataFrame | Stacked,
    baseline: pl.DataFrame | Stacked,
    metric: Metric,
    cutoff: int,
    num_samples: int,
    seed: int,
    items: Mask | None = None,
) -> Difference | None:
    """Paired difference of a metric between two evaluations, joined by user and by the seeds' order.

    Args:
        positions: SEED_POSITIONS table of the variant, or the result of :func:`stack`.
        baseline: the same for the baseline.
        metric: ``hit`` or ``ndcg``.
        cutoff: cut-off of the metric.
        num_samples: number of draws for the interval and the p-value; 0 for neither.
        seed: seed of the draws.
        items: (I + 1,) mask; only users with a target in it are compared.  None for all users.

    Returns:
        The difference; None if there is no user.

    Raises:
        DataError: users, targets, numbers of candidates or of seeds differ, or a user occurs twice.
    """
    ours = positions if isinstance(positions, Stacked) else stack(positions)
    theirs = baseline if isinstance(baseline, Stacked) else stack(baseline, "baseline")
    _check_same(ours, theirs)
    our_SU, their_SU = ours.values(metric, cutoff, items), theirs.values(metric, cutoff, items)
    if not our_SU.size:
        return None
    difference_SU = our_SU - their_SU
    value, baseline_value, difference = (float(value_SU.mean()) for value_SU in (our_SU, their_SU, difference_SU))
    low = high = p_value = None
    if num_samples:
        low, high, p_value = _interval_and_p_value(difference_SU, num_samples, generator(seed, "compare", "bootstrap"))
    relative = difference / baseline_value if baseline_value else None
    return Difference(
        num_users=our_SU.shape[1],
        num_seeds=len(our_SU),
        value=value,
        baseline_value=baseline_value,
        difference=difference,
        relative=relative,
        low=low,
        high=high,
        p_value=p_value,
        seed_margin=_seed_margin(difference_SU),
        seed_sd=seed_sd(our_SU),
        baseline_seed_sd=seed_sd(their_SU),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference):
    """One line of the comparison table: a variant against a baseline under one recommender.

    ``p_adjusted`` is adjusted by :func:`holm` over the pairs of the same recommender, group and metric, without the controls: a
    comparison with a control is a question of its own, and has its unadjusted p-value here.
    """

    recommender: str
    variant: str
    baseline: str
    group: Group
    metric: Metric
    cutoff: int
    p_adjusted: float | None

    @property
    def is_clear(self) -> bool:
        """See :func:`is_clear`."""
        return is_clear(self.low, self.high, self.p_adjusted)

    def flat(self) -> dict[str, float]:
        """Scalars with stable names, e.g. ``sasrec/sda_vs_zero_shot/tail_ndcg@10_difference``; without None values."""
        prefix = "" if self.group == "all" else f"{self.group}_"
        name = f"{self.recommender}/{self.variant}_vs_{self.baseline}/{prefix}{self.metric}@{self.cutoff}"
        values = {
            "difference": self.difference,
            "relative": self.relative,
            "low": self.low,
            "high": self.high,
            "p": self.p_value,
            "p_adjusted": self.p_adjusted,
        }
        return {f"{name}_{key}": value for key, value in values.items() if value is not None}


def flat_comparisons(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """All comparisons as one flat mapping, in order."""
    return {key: value for comparison in comparisons for key, value in comparison.flat().items()}


def flat_gains(comparisons: Sequence[Comparison], variants: Sequence[str], baselines: Sequence[str]) -> dict[str, float]:
    """Gains of variants in NDCG over all users, with names that ``dvc metrics diff`` and ``dvc exp show`` print well.

    For each variant and baseline ``sasrec/sda_vs_id/ndcg@10_gain`` (the difference), ``..._low`` and ``..._high`` (its 95 %
    interval) and ``..._clear`` (1 or 0, see :func:`is_clear`).  Pairs with equal NDCG for every user are skipped (the
    recommender does not use vectors).
    """
    flat: dict[str, float] = {}
    for row in comparisons:
        if row.group != "all" or row.metric != "ndcg" or row.variant not in variants or row.baseline not in baselines:
            continue
        if row.difference == row.low == row.high == 0.0:
            continue
        name = f"{row.recommender}/{row.variant}_vs_{row.baseline}/{row.metric}@{row.cutoff}"
        flat[f"{name}_gain"] = row.difference
        if row.low is not None and row.high is not None:
            flat |= {f"{name}_low": row.low, f"{name}_high": row.high, f"{name}_clear": int(row.is_clear)}
    return flat


def compare_variants(
    positions: Mapping[tuple[str, str], pl.DataFrame],
    baselines: Sequence[str],
    interactions: pl.DataFrame,
    params: EvaluateParams,
    cutoff: int,
    num_items: int | None = None,
    controls: Sequence[str] = (),
) -> list[Comparison]:
    """Every variant against every baseline, per recommender, for Hit and NDCG, on all users and on tail targets.

    Args:
        positions: SEED_POSITIONS tables by (variant, recommender); the order is kept.
        baselines: variants to compare with, e.g. ``zero_shot`` and ``id``; one that is not in ``positions`` is skipped, and
            no variant is compared with itself.  Two baselines are compared once: the later against the earlier.
        interactions: the whole table, all splits; determines the tail items.
        params: number of samples, seed, definition of tail.
        cutoff: cut-off of the metrics.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.
        controls: variants that cannot be chosen.  Their p-values are not adjusted, and do not count for those of others.

    Raises:
        DataError: evaluations that cannot be compared (see :func:`compare`).
    """
    tail = item_groups(interactions, params.tail, num_items).tail
    stacked = {key: stack(table) for key, table in positions.items()}
    masks: dict[Group, Mask | None] = {"all": None, "tail": tail}
    metrics: tuple[Metric, ...] = ("hit", "ndcg")
    rows: list[Comparison] = []
    for recommender in dict.fromkeys(recommender for _, recommender in positions):
        variants = [variant for variant, name in positions if name == recommender]
        pairs = [
            (variant, baseline)
            for variant in variants
            for baseline in baselines
            if baseline in variants
            and variant != baseline
            and not (variant in baselines and variants.index(variant) < variants.index(baseline))
        ]
        for group, mask in masks.items():
            for metric in metrics:
                found = [
                    (pair, compare(stacked[pair[0], recommender], stacked[pair[1], recommender], metric, cutoff,
                                   params.bootstrap_samples, params.bootstrap_seed, mask))
                    for pair in pairs
                ]  # fmt: skip
                kept = [(pair, difference) for pair, difference in found if difference is not None]
                adjusted = _adjusted(kept, controls)
                for (variant, baseline), found_difference in kept:
                    rows.append(
                        Comparison(
                            recommender=recommender,
                            variant=variant,
                            baseline=baseline,
                            group=group,
                            metric=metric,
                            cutoff=cutoff,
                            p_adjusted=adjusted[variant, baseline],
                            **vars(found_difference),
                        )
                    )
    return rows


def _adjusted(
    found: Sequence[tuple[tuple[str, str], Difference]], controls: Sequence[str]
) -> dict[tuple[str, str], float | None]:
    """The adjusted p-value of each pair of variants; see :class:`Comparison`."""
    values = {pair: difference.p_value for pair, difference in found}
    competing = {pair: value for pair, value in values.items() if value is not None and not {*pair} & {*controls}}
    return {**values, **dict(zip(competing, holm(list(competing.values())), strict=True))}


@dataclass(frozen=True, kw_only=True)
class Change(Difference):
    """One line of a comparison of two runs: the same variant and recommender in the old (``baseline_value``) and new run."""

    variant: str
    recommender: str
    name: str  # name of the metric, e.g. tail_ndcg@10

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval excludes zero; False without one."""
        return excludes_zero(self.low, self.high)


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval is on one side of zero; False without an interval."""
    return low is not None and high is not None and (low > 0.0 or high < 0.0)


def is_clear(low: float | None, high: float | None, p_adjusted: float | None) -> bool:
    """Whether a difference is clear: its 95 % interval excludes zero, and its adjusted p-value is below 0.05.

    The interval alone would call one in twenty differences clear although there is none; see :func:`holm`.
    """
    return excludes_zero(low, high) and p_adjusted is not None and p_adjusted < _SIGNIFICANT


def compare_runs(
    old: Mapping[tuple[str, str], pl.DataFrame],
    new: Mapping[tuple[str, str], pl.DataFrame],
    interactions: pl.DataFrame | None,
    params: EvaluateParams,
    cutoff: int,
    num_items: int | None = None,
) -> list[Change]:
    """The changes between two runs, for every variant and recommender that both have, in the order of ``new``.

    Args:
        old: SEED_POSITIONS tables by (variant, recommender).
        new: the same for the other run.
        interactions: the whole table, all splits; determines the tail items.  None: no metrics of the tail.
        params: number of samples, seed, definition of tail.
        cutoff: cut-off of the metrics.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.

    Raises:
        DataError: evaluations that cannot be compared (see :func:`compare`).
    """
    groups: list[tuple[str, Metric, Mask | None]] = [("", "hit", None), ("", "ndcg", None)]
    if interactions is not None:
        groups.append(("tail_", "ndcg", item_groups(interactions, params.tail, num_items).tail))
    rows: list[Change] = []
    for key in (key for key in new if key in old):
        for prefix, metric, mask in groups:
            found = compare(new[key], old[key], metric, cutoff, params.bootstrap_samples, params.bootstrap_seed, mask)
            if found is not None:
                name = f"{prefix}{metric}@{cutoff}"
                rows.append(Change(variant=key[0], recommender=key[1], name=name, **vars(found)))
    return rows


def compare_metrics(
    old: Mapping[tuple[str, str], Mapping[str, float]], new: Mapping[tuple[str, str], Mapping[str, float]], cutoff: int
) -> list[Change]:
    """As :func:`compare_runs`, but from the numbers in ``metrics/``, without positions and so without intervals.

    Args:
        old: metrics by (variant, recommender).
        new: the same for the other run.
        cutoff: cut-off of the metrics.

    Raises:
        DataError: the numbers of users differ, or a metric is missing.
    """
    rows: list[Change] = []
    for key in (key for key in new if key in old):
        for prefix, metric in (("", "hit"), ("", "ndcg"), ("tail_", "ndcg")):
            users, name = f"{prefix}num_users", f"{prefix}{metric}@{cutoff}"
            before, after = old[key], new[key]
            pair = "/".join(key)
            if before.get("num_seeds", 1) != after.get("num_seeds", 1):
                problem = f"{pair} has {before.get('num_seeds', 1)} and {after.get('num_seeds', 1)} seeds"
                raise DataError("comparison", problem, "train both with as many (train_recommender.seeds)")
            if before.get(users) != after.get(users):
                problem = f"{users} of {pair} is {before.get(users)} and {after.get(users)}"
                raise DataError("comparison", problem, "evaluate both on the same data, split and protocol")
            if not before.get(users):
                continue
            if name not in before or name not in after:
                problem = f"{pair} has no {name}"
                raise DataError("metrics", problem, "set report.cutoff to one of evaluate.cutoffs of both runs")
            value, baseline = float(after[name]), float(before[name])
            relative = (value - baseline) / baseline if baseline else None
            rows.append(
                Change(
                    variant=key[0],
                    recommender=key[1],
                    name=name,
                    num_users=int(after[users]),
                    num_seeds=int(after.get("num_seeds", 1)),
                    value=value,
                    baseline_value=baseline,
                    difference=value - baseline,
                    relative=relative,
                    low=None,
                    high=None,
                    p_value=None,
                    seed_margin=None,
                    seed_sd=after.get(f"{name}_seed_sd"),
                    baseline_seed_sd=before.get(f"{name}_seed_sd"),
                )
            )
    return rows
