"""Read and check item vectors as matrices, and fill in missing vectors.

The fill (:func:`read_vectors` with ``fill``) changes the input of recommenders, so stages that read vectors list this file in
their ``deps``; ``artifacts`` has only the table's schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from sda_core.artifacts import EMBEDDINGS
from sda_core.errors import ArtifactError


def read_vectors(path: Path, column: str = "embedding", fill: Literal["mean"] | None = None) -> np.ndarray | None:
    """Item vectors as a matrix whose row number is the item id.

    Args:
        path: an :data:`EMBEDDINGS` file.
        column: ``embedding`` (fused), ``image_embedding`` or ``text_embedding``.
        fill: ``mean`` replaces a missing vector by the mean of the others; None rejects a column with missing vectors.

    Returns:
        ``(I + 1, D)`` float32, row 0 (padding) zero; None for a table of ids only (variant ``id``).

    Raises:
        ArtifactError: the file is missing or damaged, ids are not 1..I, or the column is missing or not finite.
    """
    frame = EMBEDDINGS.read(path)
    ids = frame["item_id"].to_numpy()
    if not np.array_equal(np.sort(ids), np.arange(1, len(ids) + 1)):
        raise ArtifactError(str(path), f"item ids should be 1..{len(ids)}, each once", "run `dvc repro` to make it again")
    if "embedding" not in frame.columns:
        return None
    if column not in frame.columns:
        raise ArtifactError(str(path), f"embeddings table has no column {column!r} (got {', '.join(frame.columns)})")
    dtype = frame.schema[column]
    if not (isinstance(dtype, pl.Array) and dtype.inner == pl.Float32):
        raise ArtifactError(str(path), f"column {column!r} should be fixed_size_list<float32> (got {dtype})")
    has_vector = frame[column].is_not_null().to_numpy()
    if fill is None and not has_vector.all():
        raise ArtifactError(
            str(path),
            f"column {column!r} has no vector for {frame[column].null_count()} items",
            "read 'embedding', or use placeholders",
        )
    rows = frame[column].drop_nulls().to_numpy()
    if not np.isfinite(rows).all():
        raise ArtifactError(str(path), f"column {column!r} holds values that are not finite")
    matrix = np.zeros((len(ids) + 1, dtype.size), dtype=np.float32)
    matrix[ids[has_vector]] = rows
    if len(rows):
        matrix[ids[~has_vector]] = rows.mean(axis=0)
    return matrix
