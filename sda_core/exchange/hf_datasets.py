"""Export for Hugging Face ``datasets``: a folder of parquet files for ``load_dataset(FOLDER, CONFIG)`` or for the hub.

``README.md`` is the dataset's card; its YAML header lists the configurations ``interactions`` (the default, with our splits),
``items`` and ``embeddings``.  Missing vectors are null.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from sda_core.artifacts import replace_file, write_parquet, write_text
from sda_core.exchange.shop import Shop

SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "test": "test",
    "valid_rest": "validation_rest",
    "test_rest": "test_rest",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def write_datasets(shop: Shop, name: str, folder: Path) -> dict[str, Any]:
    """Write the folder; see the module's docstring."""
    raw_ids = shop.interactions.join(shop.users, on="user_id", how="left", maintain_order="left").join(
        shop.items.select("item_id", "raw_item_id"), on="item_id", how="left", maintain_order="left"
    )
    columns = ["user_id", "raw_user_id", "item_id", "raw_item_id", "timestamp", "rating"]
    splits = {split: SPLIT_NAMES[split] for split in shop.split_counts()}
    for split, theirs in splits.items():
        write_parquet(raw_ids.filter(pl.col("split") == split).select(columns), folder / "interactions" / f"{theirs}.parquet")
    write_parquet(shop.items, folder / "items.parquet")
    if shop.vectors:
        with replace_file(folder / "embeddings.parquet") as temporary:
            shutil.copyfile(shop.vectors_file, temporary)  # unchanged, with nulls and metadata
    write_text(folder / "README.md", _card(shop, name, list(splits.values())))
    return shop.counts() | {
        f"{theirs}_rows": count for theirs, count in zip(splits.values(), shop.split_counts().values(), strict=True)
    }


def _card(shop: Shop, name: str, splits: list[str]) -> str:
    """The card: a YAML header for the library, prose for people."""
    size = next((text for limit, text in _SIZES if len(shop.interactions) < limit), "n>10M")
    config_names = ["interactions", "items", *(["embeddings"] if shop.vectors else [])]
    header = [
        f"pretty_name: {json.dumps(name)}",
        "license: unknown",
        "tags: [recommendation, multimodal]",
        f"size_categories: ['{size}']",
        "configs:",
        "- config_name: interactions",
        "  default: true",
        "  data_files:",
        *(line for split in splits for line in (f"  - split: {split}", f"    path: interactions/{split}.parquet")),
        *(line for table in config_names[1:] for line in (f"- config_name: {table}", f"  data_files: {table}.parquet")),
    ]
    counts = shop.split_counts()
    body = [
        f"# {name}",
        "",
        f"{len(shop.users):,} users, {len(shop.items):,} items, {len(shop.interactions):,} interactions"
        f" ({', '.join(f'{SPLIT_NAMES[split]} {count:,}' for split, count in counts.items())}), exported from SDA.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        *(f'{table} = load_dataset("FOLDER", "{table}")' for table in config_names),
        "```",
        "",
        "`item_id` and `user_id` run from 1 (0 is left for padding); `raw_item_id` and `raw_user_id` are the source's own."
        " Tables are joined by these, never by position. Times are seconds since 1970.",
        "",
        *_about_vectors(shop),
        "The data come from a shop or a published data set with its own terms: find out under which licence this may be shared"
        " before you share it.",
    ]
    return "\n".join(["---", *header, "---", "", *body]) + "\n"


def _about_vectors(shop: Shop) -> list[str]:
    if not shop.vectors:
        return []
    widths = ", ".join(f"`{column}` ({matrix.shape[1]})" for column, matrix in shop.vectors.items())
    lines = [f"Vectors of the variant `{shop.variant}`: {widths}.", ""]
    for column, has in shop.has_vector.items():
        if not has.all():
            lines += [f"`{column}` is null for {int((~has).sum()):,} items: they have no input for it.", ""]
    described = pq.read_schema(shop.vectors_file).metadata or {}
    own = sorted((key.decode(), value.decode()) for key, value in described.items() if not key.startswith(b"ARROW:"))
    return lines + ([*(f"- {key}: {' '.join(value.split())}" for key, value in own if value), ""] if own else [])
