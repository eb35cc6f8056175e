"""Convert counts to positions, and positions to the flat metrics of ``metrics/<variant>/<recommender>.json``."""

from __future__ import annotations

import numpy as np
import polars as pl

from sda_core.errors import DataError
from sda_core.evaluation.groups import Mask, item_groups
from sda_core.evaluation.metrics import Metric, Ties, positions_under, reciprocals
from sda_core.evaluation.seeds import seed_sd, stack
from sda_core.evaluation.significance import interval
from sda_core.params import EvaluateParams
from sda_core.seed import generator

_PLACED = ("user_id", "target_item_id", "num_better", "num_tied", "candidates")
_METRICS: tuple[Metric, ...] = ("hit", "ndcg")


def score_positions(placed: pl.DataFrame, ties: Ties) -> pl.DataFrame:
    """Convert counts to the POSITIONS table.

    Args:
        placed: columns ``user_id, target_item_id, num_better, num_tied, candidates``; any order of rows.
        ties: the tie policy; see ``sda_core.evaluation.metrics``.

    Returns:
        POSITIONS table, sorted by user.

    Raises:
        DataError: a column is missing, a user occurs twice, or more items were ranked than there were candidates.
    """
    missing = [column for column in _PLACED if column not in placed.columns]
    if missing:
        raise DataError("placed targets", f"have no column {', '.join(missing)} (got {', '.join(placed.columns)})")
    if placed["user_id"].is_duplicated().any():
        raise DataError("placed targets", "a user occurs twice; there should be one target a user")
    if (placed["num_better"].cast(pl.Int64) + placed["num_tied"].cast(pl.Int64) >= placed["candidates"].cast(pl.Int64)).any():
        raise DataError("placed targets", "num_better + num_tied should be less than candidates, which include the target")
    position = positions_under(placed["num_better"].to_numpy(), placed["num_tied"].to_numpy(), ties)
    return (
        placed.with_columns(pl.Series("position", position, dtype=pl.Float64))
        .select(
            pl.col("user_id").cast(pl.Int32),
            pl.col("target_item_id").cast(pl.Int32),
            "position",
            pl.col("candidates").cast(pl.Int32),
            pl.col("num_better").cast(pl.Int32),
            pl.col("num_tied").cast(pl.Int32),
        )
        .sort("user_id")
    )


def summarise(
    positions: pl.DataFrame, interactions: pl.DataFrame, params: EvaluateParams, num_items: int | None = None
) -> dict[str, float | int]:
    """The flat metrics of one evaluation, each the mean over seeds.

    For all users, and for those whose target is a tail, head or cold item (prefixes ``tail_``, ``head_``, ``cold_``):
    ``hit@k`` and ``ndcg@k`` for every cut-off, ``mrr``, ``num_users``.  For all users and for tail also, for each ``hit@k`` and
    ``ndcg@k``, the 95 % interval over users and seeds, ``hit@k_low`` and ``hit@k_high`` (absent if ``bootstrap_samples`` is
    0), and the standard deviation over seeds, ``hit@k_seed_sd`` (absent with one seed); and ``tail_num_items``,
    ``cold_num_items``.  ``num_seeds`` for all.  An empty group has ``num_users: 0`` and no other metric.

    Args:
        positions: SEED_POSITIONS table, or POSITIONS for one seed.
        interactions: the whole table, all splits; determines the tail, head and cold items.
        params: cut-offs, definition of tail, number and seed of the draws.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.

    Raises:
        DataError: there are no positions, or a target is not in the catalogue.
    """
    if positions.is_empty():
        raise DataError("positions", "there are none: no user has a test target", "loosen the thresholds of the filter section")
    groups = item_groups(interactions, params.tail, num_items)
    placed = stack(positions)
    if placed.target_U.min() < 1 or placed.target_U.max() >= len(groups.tail):
        raise DataError("positions", "a target is not in the catalogue", "run `dvc repro` to evaluate the present data")
    everything: Mask = np.ones(len(groups.tail), dtype=np.bool_)
    numbers: dict[str, float | int] = {"num_seeds": len(placed.seeds)}
    for prefix, mask in (("", everything), ("tail_", groups.tail), ("head_", groups.head), ("cold_", groups.cold)):
        chosen = mask[placed.target_U]
        numbers[f"{prefix}num_users"] = int(chosen.sum())
        if prefix in ("tail_", "cold_"):
            numbers[f"{prefix}num_items"] = int(mask.sum())
        if not chosen.any():
            continue
        for metric in _METRICS:
            for cutoff in params.cutoffs:
                value_SU, name = placed.values(metric, cutoff, mask), f"{prefix}{metric}@{cutoff}"
                numbers[name] = float(value_SU.mean())
                if prefix not in ("", "tail_"):
                    continue
                if params.bootstrap_samples:
                    random = generator(params.bootstrap_seed, "interval", name)
                    low, high = interval(value_SU, params.bootstrap_samples, random)
                    numbers[f"{name}_low"], numbers[f"{name}_high"] = max(0.0, low), min(1.0, high)
                if (spread := seed_sd(value_SU)) is not None:
                    numbers[f"{name}_seed_sd"] = spread
        numbers[f"{prefix}mrr"] = float(reciprocals(placed.position_SU[:, chosen].ravel()).mean())
    return numbers
