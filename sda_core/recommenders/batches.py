"""Convert the interactions table to histories, and histories to training batches.

Design:

* Histories are one flat array with offsets (compressed rows), so that a batch is extracted by index arithmetic, without a
  Python loop over users.
* :func:`training_data` uses only ``train`` rows and ``valid`` targets, so ``fit`` cannot see any other row.  The history of a
  test target consists of all rows before it, including the ``valid_rest`` rows of a split by time.
* Sequences are batched by length, with an equal share of the *targets* per batch rather than of the rows.  So there is little
  padding, every step costs about the same, and a target has the same weight in any batch (with equal numbers of rows, a
  target of a long history would count less than one of a short history).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import polars as pl

from sda_core.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histories:
    """Items by user, oldest first.

    ``item_ids[offsets[u]:offsets[u + 1]]`` are the items of user ``u``; user 0 (unknown) has none.
    """

    offsets: np.ndarray  # (U + 2,) int64
    item_ids: np.ndarray  # (number of interactions,) int32

    @property
    def lengths(self) -> np.ndarray:
        """Number of items by user id, ``(U + 1,)``."""
        return np.diff(self.offsets)

    def of(self, user_id: int) -> np.ndarray:
        """One user's items, oldest first."""
        return self.item_ids[self.offsets[user_id] : self.offsets[user_id + 1]]

    def last(self, user_ids: np.ndarray, length: int) -> np.ndarray:
        """The last ``length`` items of each user, padded with 0 on the left: ``(B, length)`` int32."""
        places = self.offsets[user_ids + 1][:, None] + np.arange(-length, 0)
        is_item = places >= self.offsets[user_ids][:, None]
        if len(self.item_ids) == 0:
            return np.zeros(places.shape, dtype=np.int32)
        return np.where(is_item, self.item_ids[np.maximum(places, 0)], np.int32(0))

    def pairs(self, user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct items of each user as ``(row of user_ids, item id)``, sorted by row, then item; both int64."""
        counts = self.offsets[user_ids + 1] - self.offsets[user_ids]
        rows = np.repeat(np.arange(len(user_ids)), counts)
        starts = np.cumsum(counts) - counts
        items = self.item_ids[np.arange(len(rows)) - np.repeat(starts - self.offsets[user_ids], counts)].astype(np.int64)
        base = int(items.max(initial=0)) + 1
        keys = np.unique(rows * base + items)  # a user may have repeated items (filter.duplicates: keep)
        return keys // base, keys % base


@dataclass(frozen=True)
class TrainingData:
    """The input of ``fit``, without test rows."""

    num_users: int
    num_items: int
    train: Histories
    valid_target: np.ndarray  # (U + 1,) int32, 0 = none
    leaked_test_items: np.ndarray | None  # only to reproduce published numbers that count test interactions
    item_table: np.ndarray | None  # (I + 1, hidden) of the same recommender trained on ids, target of the alignment


@dataclass(frozen=True)
class EvaluationData:
    """Users with a target, and their histories before it."""

    num_users: int
    num_items: int
    histories: Histories  # of all users: every row before the part of the target
    users: np.ndarray  # (number of test users,) int32, ascending
    targets: np.ndarray  # (number of test users,) int32


def _histories(interactions: pl.DataFrame, num_users: int) -> Histories:
    ordered = interactions.sort("user_id", "timestamp", maintain_order=True)  # stable: equal times keep the table's order
    counts = np.bincount(ordered["user_id"].to_numpy(), minlength=num_users + 1)
    offsets = np.zeros(num_users + 2, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return Histories(offsets, ordered["item_id"].to_numpy().astype(np.int32))


def _one_target(interactions: pl.DataFrame, split: str, num_users: int) -> np.ndarray:
    rows = interactions.filter(pl.col("split") == split)
    users = rows["user_id"].to_numpy()
    if len(np.unique(users)) < len(users):
        raise DataError(
            "interactions table", f"a user has more than one {split} row (expected at most one)", "run `dvc repro` from filter on"
        )
    target = np.zeros(num_users + 1, dtype=np.int32)
    target[users] = rows["item_id"].to_numpy()
    return target


def _size(interactions: pl.DataFrame, column: str, given: int | None) -> int:
    largest = interactions[column].max()
    found = largest if isinstance(largest, int) else 0
    if given is not None and given < found:
        raise DataError(
            "interactions table", f"{column} goes up to {found} (expected at most {given})", "run `dvc repro` from filter on"
        )
    return found if given is None else given


def training_data(
    interactions: pl.DataFrame,
    num_users: int | None = None,
    num_items: int | None = None,
    leaked_test_items: np.ndarray | None = None,
    item_table: np.ndarray | None = None,
) -> TrainingData:
    """Training histories and validation targets; rows of any other split are dropped first.

    Args:
        interactions: table ``INTERACTIONS``, with or without its test rows.
        num_users, num_items: numbers of users and items; None: the largest id in the given table.  Pass them if test rows
            were dropped before, because some items occur only there.
        leaked_test_items: item ids of test interactions, only for ``PopParams.counts == "all"``.
        item_table: see :func:`sda_core.recommenders.read_item_table`; required if :func:`sda_core.traits.aligns_to_ids`.

    Raises:
        DataError: there is no training row, a user has two validation rows, or an id is too large.
    """
    num_users = _size(interactions, "user_id", num_users)
    num_items = _size(interactions, "item_id", num_items)
    if leaked_test_items is not None:
        _log.warning("%d test interactions are given to training: such numbers are not comparable", len(leaked_test_items))
    train = interactions.filter(pl.col("split") == "train")
    if train.is_empty():
        raise DataError("interactions table", "has no row of split 'train'", "loosen the thresholds of filter")
    return TrainingData(
        num_users,
        num_items,
        _histories(train, num_users),
        _one_target(interactions, "valid", num_users),
        leaked_test_items,
        item_table,
    )


def evaluation_data(interactions: pl.DataFrame, num_users: int | None = None, num_items: int | None = None) -> EvaluationData:
    """Test users with their targets, and the histories before them: ``train``, ``valid`` and ``valid_rest``.

    Raises:
        DataError: no user has a test row, a user has two, or an id is too large.
    """
    num_users = _size(interactions, "user_id", num_users)
    num_items = _size(interactions, "item_id", num_items)
    target = _one_target(interactions, "test", num_users)
    users = np.flatnonzero(target).astype(np.int32)
    if len(users) == 0:
        raise DataError("interactions table", "has no row of split 'test'", "loosen the thresholds of filter")
    known = interactions.filter(pl.col("split").is_in(["train", "valid", "valid_rest"]))
    return EvaluationData(num_users, num_items, _histories(known, num_users), users, target[users])


def validation_view(data: TrainingData) -> EvaluationData:
    """The validation targets as evaluation data; histories are the training ones."""
    users = np.flatnonzero(data.valid_target).astype(np.int32)
    return EvaluationData(data.num_users, data.num_items, data.train, users, data.valid_target[users])


def batches_by_length(num_targets: np.ndarray, rows_per_batch: int, random: np.random.Generator) -> list[np.ndarray]:
    """Split rows into batches of similar length, each with an equal share of the targets.

    Args:
        num_targets: ``(rows,)`` number of targets per row, at least 1 each.
        rows_per_batch: mean number of rows per batch; the number of batches is ``ceil(rows / rows_per_batch)``.
        random: shuffles rows of equal length, and the order of the batches.

    Returns:
        Row numbers by batch; every row occurs once.
    """
    num_rows = len(num_targets)
    num_batches = -(-num_rows // rows_per_batch)
    order = np.lexsort((random.random(num_rows), num_targets))
    sizes = num_targets[order].astype(np.float64)
    middles = np.cumsum(sizes) - sizes / 2  # in (0, total)
    batch = np.minimum((middles * (num_batches / sizes.sum())).astype(np.int64), num_batches - 1)
    pieces = np.split(order, np.flatnonzero(np.diff(batch)) + 1)
    return [pieces[index] for index in random.permutation(len(pieces))]
