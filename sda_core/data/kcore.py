"""k-core of a user-item graph: the largest set of interactions in which every user and every item has enough of them.

Two filters live here, on purpose side by side:

* :func:`core_mask` is the fix-point (Seidman 1983; peeling after Batagelj & Zaversnik 2003): taking a user away may
  push an item below its threshold, which may push another user below, until nothing moves.
* :func:`single_pass_mask` counts once and drops once, as several public preprocessing scripts do under the name
  "k-core"; what is left may hold users and items below the thresholds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import DataError

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# A whole pass over the rows pays while it takes many of them away; after that only the neighbourhood of what was
# taken is looked at, so that a long cascade of single rows stays cheap.
_WHOLE_PASS_SHARE = 1 / 16


def k_core(interactions: pl.DataFrame, min_user: int = 5, min_item: int = 5) -> pl.DataFrame:
    """Keep the interactions of the (``min_user``, ``min_item``)-core.

    The result is the largest subset of the rows in which every user has at least ``min_user`` rows and every item at
    least ``min_item``; it is unique, and does not depend on the order of the rows.  A repeated user-item pair counts
    as often as it occurs.

    Args:
        interactions: columns ``user_id`` and ``item_id`` of any type, and any others.
        min_user: rows a user needs; 0 or 1 for no limit.
        min_item: rows an item needs; 0 or 1 for no limit.

    Returns:
        The rows kept, in their old order, with all columns.

    Raises:
        DataError: a column is missing, or an id is null.
    """
    for column in ("user_id", "item_id"):
        if column not in interactions.columns:
            raise DataError(
                "k_core", f"the table has no column {column!r} (got {', '.join(interactions.columns) or 'no columns'})"
            )
        if interactions[column].null_count():
            raise DataError(
                "k_core", f"column {column!r} holds {interactions[column].null_count()} null ids", "drop those rows first"
            )
    mask = core_mask(_codes(interactions["user_id"]), _codes(interactions["item_id"]), min_user, min_item)
    return interactions.filter(pl.Series(mask, dtype=pl.Boolean))


def core_mask(users: Codes, items: Codes, min_user: int, min_item: int) -> Mask:
    """Which rows belong to the core.

    Args:
        users: ``(rows,)`` non-negative codes, best dense.
        items: ``(rows,)`` the same for items.
        min_user: rows a user needs.
        min_item: rows an item needs.

    Returns:
        ``(rows,)`` True for rows of the core.
    """
    mask = np.ones(len(users), dtype=np.bool_)
    rows = np.arange(len(users))
    while len(rows):
        keep = single_pass_mask(users, items, min_user, min_item)
        num_dropped = len(rows) - int(np.count_nonzero(keep))
        mask[rows[~keep]] = False
        users, items, rows = users[keep], items[keep], rows[keep]
        if num_dropped == 0:
            return mask
        if num_dropped < _WHOLE_PASS_SHARE * len(rows):
            mask[rows[~_peel(users, items, min_user, min_item)]] = False
            return mask
    return mask


def single_pass_mask(users: Codes, items: Codes, min_user: int, min_item: int) -> Mask:
    """Which rows have a user and an item that are frequent enough, counted once over the rows given.

    Args and result as for :func:`core_mask`.
    """
    if len(users) == 0:
        return np.ones(0, dtype=np.bool_)
    return (np.bincount(users) >= min_user)[users] & (np.bincount(items) >= min_item)[items]


def _peel(users: Codes, items: Codes, min_user: int, min_item: int) -> Mask:
    """The fix-point by peeling: only the rows of users and items that just fell below their threshold are visited."""
    alive = np.ones(len(users), dtype=np.bool_)
    sides = [_Side(users, min_user), _Side(items, min_item)]
    rows = np.concatenate([side.rows_of(np.flatnonzero((side.count > 0) & (side.count < side.minimum))) for side in sides])
    while len(rows):
        rows = np.unique(rows[alive[rows]])
        alive[rows] = False
        rows = np.concatenate([side.rows_of(side.take_away(rows)) for side in sides])
    return alive


class _Side:
    """One side of the bipartite graph: how many rows each code has left, and which rows it had."""

    def __init__(self, codes: Codes, minimum: int) -> None:
        self.codes = codes
        self.minimum = minimum
        self.count = np.bincount(codes)
        self._order = np.argsort(codes, kind="stable")
        self._start = np.cumsum(self.count) - self.count
        self._length = self.count.copy()

    def rows_of(self, codes: Codes) -> Codes:
        """All rows of some codes, one code after the other."""
        length = self._length[codes]
        total = int(length.sum())
        offset = np.arange(total) - np.repeat(np.cumsum(length) - length, length)
        return self._order[np.repeat(self._start[codes], length) + offset]

    def take_away(self, rows: Codes) -> Codes:
        """Uncount rows; give the codes that were frequent enough before and are not now."""
        codes, lost = np.unique(self.codes[rows], return_counts=True)
        before = self.count[codes]
        self.count[codes] = before - lost
        return codes[(before >= self.minimum) & (before - lost < self.minimum)]


def _codes(ids: pl.Series) -> Codes:
    """Dense codes of ids of any hashable type; equal ids get equal codes."""
    frame = ids.alias("id").to_frame()
    codes = frame.unique().with_row_index("code")
    return frame.join(codes, on="id", how="left", maintain_order="left")["code"].to_numpy().astype(np.int64)
