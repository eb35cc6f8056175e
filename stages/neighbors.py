"""What an item's vector is close to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._stage import Root, one_line_errors


def neighbors(
    item: Annotated[str, typer.Argument(help="Its id in the shop (ASIN), or its number in data/filtered/items.parquet.")],
    variant: Annotated[str, typer.Option("--variant", help="Which item vectors.")] = "zero_shot",
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    root: Root = Path(),
) -> None:
    """Show the items whose vectors are nearest to an item's, with their cosine and title."""
    import polars as pl

    from sda_core.artifacts import ITEMS, Workspace
    from sda_core.errors import ConfigError
    from sda_core.index import load_index

    with one_line_errors("neighbors"):
        workspace = Workspace(root)
        items = ITEMS.scan(workspace.items).select("item_id", "raw_item_id", "title").collect()
        found = items.filter((pl.col("raw_item_id") == item) | (pl.col("item_id").cast(pl.String) == item))
        if found.is_empty():
            raise ConfigError("ITEM", f"{item!r} is not among the {len(items)} items", f"ids look like {items['raw_item_id'][0]}")
        number = int(found["item_id"][0])
        ids, cosines = load_index(workspace.index(variant)).neighbors(number, k)
        names = dict(zip(items["item_id"], items.select("raw_item_id", "title").iter_rows(), strict=True))
        typer.echo(f"{names[number][0]}  {names[number][1]}")
        for near, cosine in zip(ids.tolist(), cosines.tolist(), strict=True):
            typer.echo(f"{cosine:7.4f}  {names[near][0]}  {names[near][1]}")
