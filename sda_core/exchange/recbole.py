"""Export for RecBole (recbole.io): a folder of its atomic files.

==================================  ========================================================================
``<name>.inter``                    all interactions, the split as a last column
``<name>.train.inter`` and so on    the split, for general models: ``benchmark_filename: [train, valid, test]``
``<name>.seq_train.inter``, ...     the same for sequential models, which need ``item_id_list`` in such files:
                                    one row per target, with the items before it
``<name>.item``                     title, brand, categories
``<name>.itememb``                  ``iid`` and vectors as ``float_seq``
``<name>.yaml``                     for general models; ``<name>_sequential.yaml`` for the others
==================================  ========================================================================

Ids are those of the shop.  RecBole splits sequences at spaces and reads its files with ``pandas``, which treats some ids
(``NA``, ``null``, ...) as missing values.  So white space, quotation marks, ``%`` and such ids are percent-encoded
(``urllib.parse.unquote`` decodes them).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl

from sda_core.artifacts import replace_file, write_text
from sda_core.errors import DataError
from sda_core.exchange.shop import Shop

MAX_ITEM_LIST_LENGTH = 50  # RecBole's default; number of latest items of a history in a seq_ file

# Values that pandas reads as missing, and RecBole's padding.
_NOT_TEXT = frozenset(
    [
        *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL"),
        *("NaN", "None", "n/a", "nan", "null", "[PAD]"),
    ]
)
_UNSAFE = re.compile(r"[\s\x00-\x1f\x7f\"%]")
_HISTORY = {"train": ("train",), "valid": ("train",), "test": ("train", "valid", "valid_rest")}
_VECTORS = {"image_embedding": "image_emb", "text_embedding": "text_emb", "embedding": "item_emb"}


def token(raw: str) -> str:
    """Encode an id for RecBole's files; ``urllib.parse.unquote`` decodes it.

    Raises:
        DataError: the id is empty.
    """
    if not raw:
        raise DataError("RecBole export", "an id is empty, which RecBole takes for a missing value", "give it a name")
    if raw in _NOT_TEXT:
        return f"%{ord(raw[0]):02X}" + raw[1:]
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), raw)


def _tokens(raw: pl.Series) -> pl.Series:
    return pl.Series([token(each) for each in raw.to_list()], dtype=pl.String)


def write_recbole(shop: Shop, name: str, folder: Path) -> dict[str, Any]:
    """Write the folder; see the module's docstring.

    Raises:
        DataError: an id cannot be written.
    """
    items = shop.items.with_columns(token=_tokens(shop.items["raw_item_id"]))
    users = shop.users.with_columns(token=_tokens(shop.users["raw_user_id"]))
    rows = (
        shop.interactions.join(users.select("user_id", user="token"), on="user_id", how="left", maintain_order="left")
        .join(items.select("item_id", item="token"), on="item_id", how="left", maintain_order="left")
        .sort("user_id", "timestamp", maintain_order=True)
    )
    columns = {"user": "user_id:token", "item": "item_id:token", "rating": "rating:float", "timestamp": "timestamp:float"}
    headed = [pl.col(column).alias(header) for column, header in columns.items()]
    _write(rows.select(*headed, pl.col("split").alias("split:token")), folder / f"{name}.inter")
    targets: dict[str, int] = {}
    for split in ("train", "valid", "test"):
        part = rows.filter(pl.col("split") == split)
        _write(part.select(headed), folder / f"{name}.{split}.inter")
        sequences = _sequences(rows, split)
        targets[f"{split}_sequences"] = len(sequences)
        _write(sequences, folder / f"{name}.seq_{split}.inter")
    _write(_items(items), folder / f"{name}.item")
    vectors = {column: header for column, header in _VECTORS.items() if column in shop.vectors}
    if vectors:
        _write(_embeddings(shop, items["token"], vectors), folder / f"{name}.itememb")
    for suffix, prefix in (("", ""), ("_sequential", "seq_")):
        write_text(folder / f"{name}{suffix}.yaml", _config(prefix, list(vectors.values())))
    encoded = items.filter(pl.col("token") != pl.col("raw_item_id")).height
    encoded += users.filter(pl.col("token") != pl.col("raw_user_id")).height
    return shop.counts() | targets | ({"encoded_ids": encoded} if encoded else {})


def _write(frame: pl.DataFrame, path: Path) -> None:
    """Write tab-separated values, quoted if needed, for ``pandas.read_csv(delimiter="\\t")``."""
    with replace_file(path) as temporary:
        frame.write_csv(temporary, separator="\t", quote_style="necessary")


def _sequences(rows: pl.DataFrame, split: str) -> pl.DataFrame:
    """One row per target of a split, with the user's previous items; targets without a history are skipped."""
    known = rows.filter(pl.col("split").is_in([*_HISTORY[split], split]))
    users, items = known["user_id"].to_numpy(), known["item"].to_list()
    first = np.searchsorted(users, users)  # row of each user's oldest interaction: the rows are sorted by user
    is_target = (known["split"] == split).to_numpy() & (first < np.arange(len(users)))
    histories = [" ".join(items[max(first[row], row - MAX_ITEM_LIST_LENGTH) : row]) for row in np.flatnonzero(is_target).tolist()]
    return known.filter(is_target).select(
        pl.col("user").alias("user_id:token"),
        pl.Series("item_id_list:token_seq", histories, dtype=pl.String),
        pl.col("item").alias("item_id:token"),
        pl.col("timestamp").alias("timestamp:float"),
    )


def _items(items: pl.DataFrame) -> pl.DataFrame:
    """Items with texts without line breaks and tabs; a category is one token, with underscores for spaces."""

    def plain(column: str, space: str = " ") -> pl.Expr:
        return pl.col(column).str.replace_all(r"\s+", space)

    categories = pl.col("categories").list.eval(pl.element().str.replace_all(r"\s+", "_")).list.join(" ")
    return items.select(
        pl.col("token").alias("item_id:token"),
        plain("title").alias("title:token_seq"),
        plain("brand").alias("brand:token"),
        categories.alias("categories:token_seq"),
    )


def _embeddings(shop: Shop, tokens: pl.Series, vectors: dict[str, str]) -> pl.DataFrame:
    """Vectors as the shortest decimal numbers that round-trip to the same float32."""
    made = {"iid:token": tokens}
    for column, header in vectors.items():
        matrix = shop.vectors[column]
        numbers = pl.Series(matrix.reshape(-1)).cast(pl.String).reshape(matrix.shape)
        made[f"{header}:float_seq"] = numbers.arr.join(" ")
    return pl.DataFrame(made)


def _config(prefix: str, vectors: list[str]) -> str:
    columns = "[user_id, item_id_list, item_id, timestamp]" if prefix else "[user_id, item_id]"
    aliases = [name for name, there in (("item_id_list", bool(prefix)), ("iid", bool(vectors))) if there]
    lines = [
        "# For RecBole: the folder goes to data_path, whose default is dataset/.",
        f"benchmark_filename: [{prefix}train, {prefix}valid, {prefix}test]",
        "load_col:",
        f"    inter: {columns}",
        *([f"    itememb: [iid, {vectors[-1]}]  # {', '.join(vectors)}"] if vectors else []),
        *([f"alias_of_item_id: [{', '.join(aliases)}]"] if aliases else []),
        *(["additional_feat_suffix: [itememb]", f"preload_weight: {{iid: {vectors[-1]}}}"] if vectors else []),
        *([f"MAX_ITEM_LIST_LENGTH: {MAX_ITEM_LIST_LENGTH}"] if prefix else []),
        *(["train_neg_sample_args: ~  # for loss_type CE; with BPR say how many negatives"] if prefix else []),
        f"eval_args: {{order: {'TO' if prefix else 'RO'}, mode: full}}  # the split is in the files",
    ]
    return "\n".join(lines) + "\n"
