"""Popularity on Amazon 2014 Beauty (5-core): the published numbers, to the fourth decimal."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from sda_core.evaluation import candidates, hit, item_groups, ndcg, score_positions
from sda_core.params import TailParams

pytestmark = pytest.mark.real_data


def placed_by_popularity(interactions: pl.DataFrame, splits: list[str]) -> pl.DataFrame:
    """Full-rank counts of a popularity scorer: all items minus the user's earlier ones, the target kept."""
    num_items = int(interactions["item_id"].to_numpy().max())
    counts = np.bincount(interactions.filter(pl.col("split").is_in(splits))["item_id"].to_numpy(), minlength=num_items + 1)
    ordered = np.sort(counts[1:])
    rows = []
    for user, items in interactions.group_by("user_id", maintain_order=True).agg("item_id").iter_rows():
        target, seen = items[-1], counts[sorted(set(items[:-1]) - {items[-1]})]
        score = counts[target]
        better = num_items - np.searchsorted(ordered, score, side="right") - (seen > score).sum()
        tied = (
            np.searchsorted(ordered, score, side="right")
            - np.searchsorted(ordered, score, side="left")
            - 1
            - (seen == score).sum()
        )
        rows.append((user, target, int(better), int(tied), num_items - len(seen)))
    columns = ["user_id", "target_item_id", "num_better", "num_tied", "candidates"]
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.Int32), orient="row")


@pytest.mark.parametrize(
    ("splits", "ties", "expected"),
    [
        (["train", "valid", "test"], "pessimistic", (0.0152, 0.0068)),  # the published baseline: it counts the test targets
        (["train", "valid", "test"], "mean", (0.0152, 0.0068)),
        (["train", "valid", "test"], "optimistic", (0.0152, 0.0068)),
        (["train", "valid"], "pessimistic", (0.0130, 0.0059)),
        (["train", "valid"], "mean", (0.0141, 0.0063)),
        (["train"], "pessimistic", (0.0110, 0.0053)),
        (["train"], "mean", (0.0120, 0.0056)),
    ],
)
def test_popularity_on_beauty(beauty: pl.DataFrame, splits: list[str], ties: str, expected: tuple[float, float]) -> None:
    positions = score_positions(placed_by_popularity(beauty, splits), ties)["position"].to_numpy()  # type: ignore[arg-type]
    assert len(positions) == 22_363
    assert (round(hit(positions, 10), 4), round(ndcg(positions, 10), 4)) == expected


def test_a_five_core_has_no_tail_by_the_papers_count(beauty: pl.DataFrame) -> None:
    """14.05 % of the test targets are tail by training counts, 0.62 % cold, none tail by counts over all splits."""
    assert (beauty["user_id"].n_unique(), beauty["item_id"].n_unique(), len(beauty)) == (22_363, 12_101, 198_502)
    targets = beauty.filter(pl.col("split") == "test")["item_id"].to_numpy()
    honest = item_groups(beauty, TailParams(definition="train_lt_k", max_count=4, share=0.8))
    assert round(float(honest.tail[targets].mean()), 4) == 0.1405
    assert round(float(honest.cold[targets].mean()), 4) == 0.0062
    assert not item_groups(beauty, TailParams(definition="paper", max_count=4, share=0.8)).tail.any()
    pareto = item_groups(beauty, TailParams(definition="pareto", max_count=4, share=0.8))
    assert 0.78 < pareto.tail[1:].mean() < 0.82


def test_negatives_of_a_real_shop(beauty: pl.DataFrame) -> None:
    table = candidates("uni100", beauty, 7)
    assert table is not None
    assert table.shape == (22_363, 100)
    assert (np.diff(table, axis=1) > 0).all()
    assert table.min() >= 1
