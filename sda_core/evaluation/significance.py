"""How sure a number is, and whether two variants really differ.

* Users are what is resampled (Sakai 2006; Smucker, Allan & Carterette 2007 for the tests in retrieval): the percentile
  bootstrap gives 95 % intervals, the sign-flip permutation test gives p-values.  Both are *paired*: the same users
  under both variants, joined by id.
* A metric with a cut-off takes few distinct values.  Resampling U users is then a multinomial draw over the distinct
  values, and flipping signs a binomial draw per distinct size: the same distributions, exactly, at a cost that does
  not grow with U.
* These intervals know of the sample of users, not of the spread between training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import ConfigError, DataError
from sda_core.evaluation.groups import Mask, item_groups
from sda_core.evaluation.metrics import Floats, Metric, per_user
from sda_core.params import EvaluateParams
from sda_core.seed import generator

Group = Literal["all", "tail"]

_TAILS = (0.025, 0.975)  # of a 95 % interval
_CHUNK_NUMBERS = 4_000_000  # drawn at a time, to bound the memory


def _distinct(values: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    distinct, counts = np.unique(values, return_counts=True)
    return distinct, counts.astype(np.int64)


def bootstrap_means(values: Floats, num_samples: int, random: np.random.Generator) -> Floats:
    """Means of ``num_samples`` resamples (with replacement, of the same size) of ``values``.

    Args:
        values: (U,) one number per user; their order is of no consequence.
        num_samples: number of resamples.
        random: where the draws come from.

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
        # einsum and not @: BLAS sums in an order that depends on its threads, and the last bits with it
        means[begin : begin + size] = np.einsum("sv,v->s", drawn.astype(np.float64), distinct)
    return means / len(values)


def bootstrap_interval(values: Floats, num_samples: int, random: np.random.Generator) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` (U,) (Efron & Tibshirani 1993, ch. 13).

    Raises:
        DataError: there are no values.
        ConfigError: ``num_samples`` is under 1.
    """
    if num_samples < 1:
        raise ConfigError("evaluate.bootstrap_samples", f"an interval needs at least 1 (got {num_samples})")
    low, high = np.quantile(bootstrap_means(values, num_samples, random), _TAILS)
    return float(low), float(high)


def sign_flip_p_value(differences: Floats, num_samples: int, random: np.random.Generator) -> float:
    """Two-sided p-value of a paired permutation test of "the mean difference is zero".

    If the two variants were exchangeable, each user's difference could as well have had the other sign:
    ``p = (1 + #{|S*| >= |S|}) / (1 + num_samples)`` over random signs, S the sum (Phipson & Smyth 2010: never 0).

    Args:
        differences: (U,) one paired difference a user.
        num_samples: number of random sign assignments.
        random: where the draws come from.

    Raises:
        DataError: there are no differences.
        ConfigError: ``num_samples`` is under 1.
    """
    if num_samples < 1:
        raise ConfigError("evaluate.bootstrap_samples", f"a p-value needs at least 1 (got {num_samples})")
    if not differences.size:
        raise DataError("permutation test", "there are no users to compare")
    sizes, counts = _distinct(np.abs(differences))
    observed = abs(float(differences.sum()))
    slack = 1e-9 * float(sizes @ counts)  # sums that are equal on paper differ in the last bits
    extreme = 0
    rows = max(1, _CHUNK_NUMBERS // len(sizes))
    for begin in range(0, num_samples, rows):
        positive = random.binomial(counts, 0.5, size=(min(rows, num_samples - begin), len(counts)))
        sums = np.abs(np.einsum("sv,v->s", (2 * positive - counts).astype(np.float64), sizes))
        extreme += int((sums >= observed - slack).sum())
    return (1 + extreme) / (1 + num_samples)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing several hypotheses at once (Holm 1979): no more than 5 % chance of any false alarm.

    Returns:
        In the order given: ``max over j <= i of min(1, (n - j) p_(j))`` for the i-th smallest, j from 0.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for number, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - number) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that at most 5 % of those under 0.05 are false alarms, on average (Benjamini & Hochberg 1995).

    Where no hypothesis is false this is Simes' test (1986): any false alarm has at most 5 % chance, for p-values that are
    independent or positively dependent.

    Returns:
        In the order given: ``min over j >= i of min(1, n p_(j) / j)`` for the i-th smallest, j from 1.
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
    """A paired difference between two evaluations of the same users.

    ``relative`` is None where the baseline scores 0; ``low``, ``high`` (95 % interval of ``difference``) and
    ``p_value`` are None where no samples were asked for.
    """

    num_users: int
    value: float
    baseline_value: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p_value: float | None


def _joined(positions: pl.DataFrame, baseline: pl.DataFrame) -> pl.DataFrame:
    for name, frame in (("positions", positions), ("baseline", baseline)):
        if frame["user_id"].is_duplicated().any():
            raise DataError(name, "a user occurs twice; there should be one target a user")
    columns = ["user_id", "target_item_id", "position", "candidates"]
    joined = (
        positions.select(columns).join(baseline.select(columns), on="user_id", how="inner", suffix="_baseline").sort("user_id")
    )
    advice = "evaluate both on the same data, split and protocol"
    if not len(positions) == len(baseline) == len(joined):
        problem = f"the two evaluations have different users ({len(positions)} and {len(baseline)}, {len(joined)} in common)"
        raise DataError("comparison", problem, advice)
    for column, what in (("target_item_id", "targets"), ("candidates", "numbers of candidates")):
        differing = int((joined[column] != joined[f"{column}_baseline"]).sum())
        if differing:
            raise DataError(
                "comparison", f"the two evaluations have different {what} for {differing} of {len(joined)} users", advice
            )
    return joined


def compare(
    positions: pl.DataFrame,
    baseline: pl.DataFrame,
    metric: Metric,
    cutoff: int,
    num_samples: int,
    seed: int,
    items: Mask | None = None,
) -> Difference | None:
    """Paired difference of a metric between two evaluations, joined by user.

    Args:
        positions: POSITIONS table of the variant.
        baseline: POSITIONS table of what it is compared with.
        metric: ``hit`` or ``ndcg``.
        cutoff: of the metric.
        num_samples: of the bootstrap and of the permutation test; 0 for neither.
        seed: of both.
        items: (I + 1,) mask; only users whose target is in it are compared.  None for all users.

    Returns:
        None where no user is left.

    Raises:
        DataError: users, targets or numbers of candidates differ, or a user occurs twice.
    """
    joined = _joined(positions, baseline)
    if items is not None:
        joined = joined.filter(pl.Series(items[joined["target_item_id"].to_numpy()], dtype=pl.Boolean))
    if joined.is_empty():
        return None
    ours = per_user(metric, joined["position"].to_numpy(), cutoff)
    theirs = per_user(metric, joined["position_baseline"].to_numpy(), cutoff)
    differences = ours - theirs
    value, baseline_value = float(ours.mean()), float(theirs.mean())
    low = high = p_value = None
    if num_samples:
        low, high = bootstrap_interval(differences, num_samples, generator(seed, "compare", "bootstrap"))
        p_value = sign_flip_p_value(differences, num_samples, generator(seed, "compare", "sign flips"))
    difference = float(differences.mean())
    relative = difference / baseline_value if baseline_value else None
    return Difference(len(joined), value, baseline_value, difference, relative, low, high, p_value)


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference):
    """One line of the comparison table: a variant against a baseline under one recommender.

    ``p_adjusted`` is Holm's, over all pairs of variant and baseline of the same recommender, group and metric.
    """

    recommender: str
    variant: str
    baseline: str
    group: Group
    metric: Metric
    cutoff: int
    p_adjusted: float | None

    def flat(self) -> dict[str, float]:
        """Scalars under stable names, e.g. ``sasrec/sda_vs_zero_shot/tail_ndcg@10_difference``; what is None is left out."""
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
    """What variants gain in NDCG over all users, under names that ``dvc metrics diff`` and ``dvc exp show`` print well.

    For each variant and baseline ``sasrec/sda_vs_id/ndcg@10_gain`` (the difference), ``..._low`` and ``..._high`` (its 95 %
    interval) and ``..._clear`` (1 where the interval excludes zero, else 0).  Where every user's NDCG is the same under
    both, there is nothing to tell (a recommender that looks at no vectors) and the pair is left out.
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
            flat |= {f"{name}_low": row.low, f"{name}_high": row.high, f"{name}_clear": int(excludes_zero(row.low, row.high))}
    return flat


def compare_variants(
    positions: Mapping[tuple[str, str], pl.DataFrame],
    baselines: Sequence[str],
    interactions: pl.DataFrame,
    params: EvaluateParams,
    cutoff: int,
    num_items: int | None = None,
) -> list[Comparison]:
    """Every variant against every baseline, per recommender, for Hit and NDCG, on all users and on tail targets.

    Args:
        positions: POSITIONS tables by (variant, recommender); the order is kept.
        baselines: variants to compare with, e.g. ``zero_shot`` and ``id``; one that is not among ``positions`` is left
            out, and no variant is compared with itself.  Two baselines are compared once: the later against the earlier.
        interactions: the whole table, all splits; says which items are tail.
        params: number of samples, seed, definition of tail.
        cutoff: of the metrics.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.

    Raises:
        DataError: evaluations that cannot be compared (see :func:`compare`).
    """
    tail = item_groups(interactions, params.tail, num_items).tail
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
                    (pair, compare(positions[pair[0], recommender], positions[pair[1], recommender], metric, cutoff,
                                   params.bootstrap_samples, params.bootstrap_seed, mask))
                    for pair in pairs
                ]  # fmt: skip
                kept = [(pair, difference) for pair, difference in found if difference is not None]
                adjusted = holm([difference.p_value for _, difference in kept if difference.p_value is not None])
                for number, ((variant, baseline), found_difference) in enumerate(kept):
                    rows.append(
                        Comparison(
                            recommender=recommender,
                            variant=variant,
                            baseline=baseline,
                            group=group,
                            metric=metric,
                            cutoff=cutoff,
                            p_adjusted=adjusted[number] if adjusted else None,
                            **vars(found_difference),
                        )
                    )
    return rows


@dataclass(frozen=True, kw_only=True)
class Change(Difference):
    """One line of a comparison of two runs: the same variant and recommender, before (``baseline_value``) and now."""

    variant: str
    recommender: str
    name: str  # of the metric, e.g. tail_ndcg@10

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval excludes zero; False without one."""
        return excludes_zero(self.low, self.high)


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval lies on one side of zero; False where there is none."""
    return low is not None and high is not None and (low > 0.0 or high < 0.0)


def compare_runs(
    old: Mapping[tuple[str, str], pl.DataFrame],
    new: Mapping[tuple[str, str], pl.DataFrame],
    interactions: pl.DataFrame | None,
    params: EvaluateParams,
    cutoff: int,
    num_items: int | None = None,
) -> list[Change]:
    """What changed from one run to another, for every variant and recommender that both have, in the order of ``new``.

    Args:
        old: POSITIONS tables by (variant, recommender).
        new: the same, of the other run.
        interactions: the whole table, all splits; says which items are tail.  None: no tail numbers.
        params: number of samples, seed, definition of tail.
        cutoff: of the metrics.
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
    """As :func:`compare_runs`, from the flat numbers of ``metrics/``, where positions are not at hand: no intervals.

    Args:
        old: metrics by (variant, recommender).
        new: the same, of the other run.
        cutoff: of the metrics.

    Raises:
        DataError: other numbers of users, or a metric is missing.
    """
    rows: list[Change] = []
    for key in (key for key in new if key in old):
        for prefix, metric in (("", "hit"), ("", "ndcg"), ("tail_", "ndcg")):
            users, name = f"{prefix}num_users", f"{prefix}{metric}@{cutoff}"
            before, after = old[key], new[key]
            pair = "/".join(key)
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
                    value=value,
                    baseline_value=baseline,
                    difference=value - baseline,
                    relative=relative,
                    low=None,
                    high=None,
                    p_value=None,
                )
            )
    return rows
