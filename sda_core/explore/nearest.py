"""Nearest items by cosine, computed exactly."""

from __future__ import annotations

import numpy as np

from sda_core.unit_rows import unit_rows


def nearest(vectors_ID: np.ndarray, query_D: np.ndarray, k: int, leave_out: int | None = None) -> list[tuple[int, float]]:
    """The items whose vectors have the largest cosine with a query.

    Args:
        vectors_ID: ``(I + 1, D)``, row r for item r; row 0 is padding.  Items with a zero vector are skipped.
        query_D: ``(D,)``, not zero.
        k: maximum number of items.
        leave_out: an item to exclude, usually that of the query.

    Returns:
        Item ids and cosines, largest first; equal cosines by id.
    """
    query = unit_rows(np.asarray(query_D, dtype=np.float32)[None])[0]
    cosines_I = unit_rows(vectors_ID.astype(np.float32, copy=False)) @ query
    has_vector = np.asarray(vectors_ID.any(axis=1))
    has_vector[0] = False
    if leave_out is not None:
        has_vector[leave_out] = False
    items = np.flatnonzero(has_vector)
    order = items[np.argsort(-cosines_I[items], kind="stable")][:k]
    return [(int(item), float(cosines_I[item])) for item in order]
