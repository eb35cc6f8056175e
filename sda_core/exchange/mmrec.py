"""Export for MMRec (github.com/enoche/MMRec): the folder ``data/<name>/`` that its ``RecDataset`` reads.

=======================  =====================================================================================
``<name>.inter``         tab-separated ``userID itemID rating timestamp x_label``; ids from 0; ``x_label`` 0 is
                         training, 1 validation, 2 test; 3 marks our further rows of the held-out periods, which
                         MMRec ignores
``image_feat.npy``       ``(I, D)`` float32, row = itemID
``text_feat.npy``        likewise
``i_id_mapping.csv``     tab-separated ``asin itemID``; ``u_id_mapping.csv``: ``user_id userID``; to get ids such as ``007``
                         or ``NA`` back, read them with ``pandas.read_csv(dtype=str, keep_default_na=False)``
``<name>.yaml``          goes to ``src/configs/dataset/``
=======================  =====================================================================================

MMRec counts users and items by the largest id in ``.inter``, and its models need as many rows of features: every item of
a shop has an interaction in some split, so the two agree.  MMRec does not support items without an image: such a row is the
mean of the others, as in its own preprocessing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sda_core.artifacts import replace_file, write_text
from sda_core.errors import DataError
from sda_core.exchange.shop import Shop

LABELS = {"train": 0, "valid": 1, "test": 2, "valid_rest": 3, "test_rest": 3}
_FEATURES = {"image_embedding": "image_feat.npy", "text_embedding": "text_feat.npy"}


def write_mmrec(shop: Shop, name: str, folder: Path) -> dict[str, Any]:
    """Write the folder; see the module's docstring.

    Raises:
        DataError: an item has no interaction, so that MMRec would count fewer items than there are.
    """
    largest = int(shop.interactions["item_id"].to_numpy().max(initial=0))
    if largest != len(shop.items):
        raise DataError("interactions table", f"item ids end at {largest} (expected {len(shop.items)})", "run `dvc repro`")
    interactions = shop.interactions.select(
        (pl.col("user_id") - 1).alias("userID"),
        (pl.col("item_id") - 1).alias("itemID"),
        "rating",
        "timestamp",
        pl.col("split").replace_strict(LABELS, return_dtype=pl.Int32).alias("x_label"),
    )
    _write_tsv(interactions, folder / f"{name}.inter")
    item_ids = shop.items.select(pl.col("raw_item_id").alias("asin"), (pl.col("item_id") - 1).alias("itemID"))
    user_ids = shop.users.select(pl.col("raw_user_id").alias("user_id"), (pl.col("user_id") - 1).alias("userID"))
    _write_tsv(item_ids, folder / "i_id_mapping.csv")
    _write_tsv(user_ids, folder / "u_id_mapping.csv")
    features = {column: file for column, file in _FEATURES.items() if column in shop.vectors}
    if not features and shop.vectors:  # one vector per item without a modality; MMRec accepts it as either
        features = {"embedding": "item_feat.npy"}
    for column, file in features.items():
        with replace_file(folder / file) as temporary, temporary.open("wb") as handle:
            np.save(handle, shop.vectors[column], allow_pickle=False)
    write_text(folder / f"{name}.yaml", _config(name, features))
    return shop.counts() | {"features": ", ".join(features.values()) or "none"}


def _write_tsv(frame: pl.DataFrame, path: Path) -> None:
    """Write tab-separated values, quoted if needed, for ``pandas.read_csv(sep="\\t")``."""
    with replace_file(path) as temporary:
        frame.write_csv(temporary, separator="\t", quote_style="necessary")


def _config(name: str, features: dict[str, str]) -> str:
    text = features.get("text_embedding", features.get("embedding", _FEATURES["text_embedding"]))
    lines = [
        "# For MMRec: copy to src/configs/dataset/; the folder goes to data/.",
        "USER_ID_FIELD: userID",
        "ITEM_ID_FIELD: itemID",
        "TIME_FIELD: timestamp",
        'field_separator: "\\t"',
        f"inter_file_name: '{name}.inter'",
        "inter_splitting_label: x_label",
        "filter_out_cod_start_users: True  # MMRec cannot evaluate a user without a training row",
        f"vision_feature_file: '{features.get('image_embedding', _FEATURES['image_embedding'])}'",
        f"text_feature_file: '{text}'",
        "user_graph_dict_file: 'user_graph_dict.npy'  # of DualGNN and DRAGON; MMRec's preprocessing makes it from .inter",
    ]
    if not features:
        lines.append("is_multimodal_model: False  # this variant has ids only")
    return "\n".join(lines) + "\n"
