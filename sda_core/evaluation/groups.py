"""Head, tail and cold items.

============  ==================================================================================================
train_lt_k    tail: fewer than ``max_count`` interactions in the *training* split (the default: no leakage)
pareto        tail: the least popular ``share`` of the catalogue by training counts
paper         tail: fewer than ``max_count`` interactions over *all* splits, as in the public code of LLM-ESR, LLMEmb
              and SDA (including ``*_rest`` rows of a split by time).  A true 5-core has no such item if
              ``max_count`` is 4: the group is empty and has no metrics
============  ==================================================================================================

Head items are those that are not tail.  Cold items have a training count of 0 under every definition of tail; they are tail,
too.  Under ``pareto``, items with equal counts stay together (their order would be arbitrary): the cut between counts nearest
to ``share`` is used, the smaller one if two are equally near.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import DataError
from sda_core.params import TailParams

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ItemGroups:
    """Masks over item ids, each of shape (I + 1,); index 0 (padding) is in no group."""

    tail: Mask
    head: Mask
    cold: Mask


def _counts(item_ids: pl.Series, num_items: int) -> npt.NDArray[np.int64]:
    return np.bincount(item_ids.to_numpy(), minlength=num_items + 1).astype(np.int64)


def training_counts(interactions: pl.DataFrame, num_items: int) -> npt.NDArray[np.int64]:
    """Number of training interactions of each item, shape (I + 1,); index 0 is padding."""
    return _counts(interactions.filter(pl.col("split") == "train")["item_id"], num_items)


def catalogue_size(interactions: pl.DataFrame, num_items: int | None = None) -> int:
    """The number of items, I: ids run from 1 to I.

    Args:
        interactions: the whole table, all splits.
        num_items: number of rows of the items table.  None: the largest id with an interaction, which is too small if the
            last items of the catalogue have none.

    Raises:
        DataError: there are no interactions, or one has an item beyond the catalogue.
    """
    if interactions.is_empty():
        raise DataError("interactions", "there are none", "loosen the thresholds of the filter section")
    largest = int(interactions["item_id"].to_numpy().max())
    if num_items is not None and num_items < largest:
        raise DataError(
            "interactions", f"go up to item {largest}, the catalogue to {num_items}", "run `dvc repro` from filter on"
        )
    return largest if num_items is None else num_items


def _pareto(counts: npt.NDArray[np.int64], share: float) -> Mask:
    """Mask of the items below the cut between counts that is nearest to ``share`` of the catalogue; ``counts`` is (I,)."""
    values, sizes = np.unique(counts, return_counts=True)
    cuts = np.concatenate([[0], np.cumsum(sizes)]) / len(counts)  # share of items in the tail, if cut before value j
    number = int(np.argmin(np.abs(cuts - share)))  # argmin returns the first, so the smaller of two equally near cuts
    return counts < values[number] if number < len(values) else np.ones(len(counts), dtype=np.bool_)


def item_groups(interactions: pl.DataFrame, params: TailParams, num_items: int | None = None) -> ItemGroups:
    """Head, tail and cold items of a dataset.

    Args:
        interactions: the whole table, all splits.
        params: the definition of tail; see the module.
        num_items: I; None as in :func:`catalogue_size`.

    Raises:
        DataError: see :func:`catalogue_size`.
    """
    num_items = catalogue_size(interactions, num_items)
    counts = training_counts(interactions, num_items)
    match params.definition:
        case "train_lt_k":
            tail = counts < params.max_count
        case "paper":
            tail = _counts(interactions["item_id"], num_items) < params.max_count
        case "pareto":
            tail = np.concatenate([[False], _pareto(counts[1:], params.share)])
        case _:
            assert_never(params.definition)
    is_item = np.arange(num_items + 1) > 0
    return ItemGroups(tail=tail & is_item, head=~tail & is_item, cold=(counts == 0) & is_item)
