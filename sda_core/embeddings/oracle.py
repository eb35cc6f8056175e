"""Oracle vectors: the true attributes of the built-in shop's items as item vectors.

==================  ==========================================================================================
``oracle``          all attributes
``oracle_shared``   attributes that both image and text show
``oracle_image``    attributes that only the image shows
``oracle_text``     attributes that only the text shows
``oracle_named``    attributes that the item's text names; the others are zero
==================  ==========================================================================================

A vector is a one-hot block for each attribute, then an item-specific random part, so that items of equal attributes differ:

    v_i = [onehot_1 .. onehot_K, NOISE_LENGTH sqrt(K) u_i] / length,    u_i a random direction of NOISE_WIDTH dimensions

K is the number of attributes of the kind.  All kinds have the same layout, with zeros in the blocks of attributes that a kind
lacks.  So kinds differ by their attributes, and not by their width.

These vectors are an upper bound for the gain by item vectors in a recommender.  If ``oracle`` is not better than ``id`` in a
recommender, that recommender cannot show differences between item vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from sda_core.errors import ArtifactError, DataError
from sda_core.params import Oracle
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

NOISE_WIDTH = 194  # plus the 62 values of the attributes: the width `export_embeddings.fused_dim`
NOISE_LENGTH = 0.5  # length of the item-specific part relative to the attributes' part

_SHOWN_BY: dict[Oracle, frozenset[str]] = {
    "oracle": frozenset({"both", "image", "text"}),
    "oracle_shared": frozenset({"both"}),
    "oracle_image": frozenset({"image"}),
    "oracle_text": frozenset({"text"}),
    "oracle_named": frozenset({"both", "text"}),
}
_SEEN_IN = {
    "image": frozenset({"both", "image"}),
    "text": frozenset({"both", "text"}),
    "fused": frozenset({"both", "image", "text"}),
}


def oracle_vectors(
    kind: Oracle, truth: pl.DataFrame, raw_item_ids: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of the true attributes, see the module's docstring.

    Args:
        kind: the kind of oracle.
        truth: table ``TRUTH``.
        raw_item_ids: I source ids; row r of the results is that of the r-th.
        seed: seed of the item-specific part.

    Returns:
        ``(I, W)`` float32 each, rows of length 1: attributes shown by the image, by the text, and by both together.  A matrix
        is zero if its modality shows none of the kind's attributes.

    Raises:
        DataError: the table is empty, because the dataset is not the built-in shop.
        ArtifactError: an item is not in the table.
    """
    if truth.is_empty():
        raise DataError(
            f"variant {kind}",
            "needs the true attributes of the items, which only the built-in shop has",
            "remove it from control_embeddings.variants, or use dataset=demo",
        )
    items = pl.DataFrame({"raw_item_id": raw_item_ids}).with_row_index("row")
    missing = items.join(truth, on="raw_item_id", how="anti")
    if len(missing):
        raise ArtifactError("data/truth.parquet", f"has no row for item {missing['raw_item_id'][0]}", "run `dvc repro download`")
    columns = truth.select("attribute", "value").unique().sort("attribute", "value").with_row_index("column")
    cells = truth.join(items, on="raw_item_id").join(columns, on=["attribute", "value"])
    image_IW, text_IW, fused_IW = (_vectors(kind, cells, len(items), len(columns), name, seed) for name in _SEEN_IN)
    return image_IW, text_IW, fused_IW


def _vectors(kind: Oracle, cells: pl.DataFrame, num_items: int, num_columns: int, modality: str, seed: int) -> np.ndarray:
    """``(I, W)`` vectors of one modality; ``cells`` has a row for each item and a column for each attribute."""
    vectors_IW = np.zeros((num_items, num_columns + NOISE_WIDTH))
    known = cells.filter(pl.col("shown_by").is_in(_SHOWN_BY[kind] & _SEEN_IN[modality]))
    num_attributes = known["attribute"].n_unique()
    if num_attributes == 0 or (kind == "oracle_named" and modality == "image"):
        return vectors_IW.astype(np.float32)
    if kind == "oracle_named":
        known = known.filter("is_named")
    vectors_IW[known["row"], known["column"]] = 1.0
    part_IN = generator(seed, "oracle", modality).normal(size=(num_items, NOISE_WIDTH))  # the same for all kinds
    vectors_IW[:, num_columns:] = NOISE_LENGTH * np.sqrt(num_attributes) * unit_rows(part_IN)
    return unit_rows(vectors_IW).astype(np.float32)
