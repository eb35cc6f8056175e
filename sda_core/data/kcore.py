"""k-core of a user-item graph: the largest set of interactions in which every user and every item has enough of them.

There are two filters:

* :func:`core_mask` computes the fixed point (Seidman 1983; peeling after Batagelj & Zaversnik 2003): dropping a user may
  push an item below its threshold, which may push another user below, until nothing changes.
* :func:`single_pass_mask` counts once and drops once, as several public preprocessing scripts do under the name
  "k-core"; users and items below the thresholds may remain.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import DataError

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# A full pass over the rows is efficient while it drops many of them.  After that only the neighbours of dropped rows are
# visited, so that a long cascade of single rows stays cheap.
_WHOLE_PASS_SHARE = 1 / 16


def k_core(interactions: pl.DataFrame, min_user: int = 5, min_item: int = 5) -> pl.DataFrame:
    """Keep the interactions of the (``min_user``, ``min_item``)-core.

    The result is the largest subset of the rows in which every user has at least ``min_user`` rows and every item at
    least ``min_item``.  It is unique and does not depend on the order of the rows.  A repeated user-item pair counts
    as often as it occurs.

    Args:
        interactions: columns ``user_id`` and ``item_id`` of any type, and any others.
        min_user: minimum number of rows per user; 0 or 1 for no limit.
        min_item: minimum number of rows per item; 0 or 1 for no limit.

    Returns:
        The kept rows in their original order, with all columns.

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
    """Mask of the rows in the core.

    Args:
        users: ``(rows,)`` non-negative codes, preferably dense.
        items: ``(rows,)`` the same for items.
        min_user: minimum number of rows per user.
        min_item: minimum number of rows per item.

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
    """Mask of the rows whose user and item are frequent enough, counted once over the given rows.

    Arguments and result as for :func:`core_mask`.
    """
    if len(users) == 0:
        return np.ones(0, dtype=np.bool_)
    return (np.bincount(users) >= min_user)[users] & (np.bincount(items) >= min_item)[items]


def _peel(users: Codes, items: Codes, min_user: int, min_item: int) -> Mask:
    """The fixed point by peeling: visits only the rows of users and items that just fell below their threshold."""
    alive = np.ones(len(users), dtype=np.bool_)
    sides = [_Side(users, min_user), _Side(items, min_item)]
    rows = np.concatenate([side.rows_of(np.flatnonzero((side.count > 0) & (side.count < side.minimum))) for side in sides])
    while len(rows):
        rows = np.unique(rows[alive[rows]])
        alive[rows] = False
        rows = np.concatenate([side.rows_of(side.take_away(rows)) for side in sides])
    return alive


class _Side:
    """One side of the bipartite graph: the number of remaining rows of each code, and all its rows."""

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
        """Subtract rows from the counts; return the codes that fell below the threshold."""
        codes, lost = np.unique(self.codes[rows], return_counts=True)
        before = self.count[codes]
        self.count[codes] = before - lost
        return codes[(before >= self.minimum) & (before - lost < self.minimum)]


def _codes(ids: pl.Series) -> Codes:
    """Dense codes of ids of any hashable type; equal ids get equal codes."""
    frame = ids.alias("id").to_frame()
    codes = frame.unique().with_row_index("code")
    return frame.join(codes, on="id", how="left", maintain_order="left")["code"].to_numpy().astype(np.int64)
