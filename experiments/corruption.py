"""Corrupt images or texts of items, to measure the effect on an adapter."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import polars as pl
from PIL import Image

from sda_core.artifacts import ITEMS, Workspace
from sda_core.image_store import ImageRow, coverage_path, read_shard, shard_path, write_shard
from sda_core.seed import generator

How = Literal["shuffle", "blank", "noise"]
TEXT_COLUMNS = ("title", "brand", "price", "categories", "features", "description", "has_metadata")


def corrupt(
    source: Workspace, target: Workspace, modality: Literal["image", "text"], how: How, share: float, seed: int
) -> np.ndarray:
    """Copy ``data/filtered`` and ``data/images``, with one modality of a share of the items corrupted.

    ===========  ==================================================================================================
    ``shuffle``  images or whole texts are exchanged along a random cycle: no item keeps its own
    ``blank``    a grey image of the same size; no text
    ``noise``    an image of random pixels of the same size; random letters as the title, no other text
    ===========  ==================================================================================================

    Args:
        source: workspace with filtered data and images.
        target: workspace of the copy; existing files are replaced.
        modality: the modality to corrupt; the other one is unchanged.
        how: kind of corruption, see above.
        share: share of the items (with an image, for images), 0 to 1.
        seed: seed of the selection and the corruption.

    Returns:
        Ids of the corrupted items, ascending.
    """
    for folder in (target.filtered, target.images):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source.filtered, target.filtered)
    random = generator(seed, "corrupt", modality, how)
    if modality == "text":
        shutil.copytree(source.images, target.images)
        return _texts(target, how, share, random)
    return _images(source, target, how, share, random)


def _circle(random: np.random.Generator, members: np.ndarray, share: float) -> np.ndarray:
    """The given share of the members, in random order."""
    return random.permutation(members)[: round(share * len(members))]


def _texts(target: Workspace, how: How, share: float, random: np.random.Generator) -> np.ndarray:
    items = ITEMS.read(target.items)
    rows = _circle(random, np.arange(len(items)), share)
    giver = np.arange(len(items))
    giver[rows] = np.roll(rows, 1)
    is_corrupted = pl.Series(np.isin(np.arange(len(items)), rows))
    match how:
        case "shuffle":
            texts = items.select(TEXT_COLUMNS)[giver]
        case "blank" | "noise":
            letters = [_letters(random, len(title)) if how == "noise" else "" for title in items["title"]]
            empty = {name: pl.lit("", pl.String) for name in ("brand", "price", "description")}
            empty |= {name: pl.lit([], pl.List(pl.String)) for name in ("categories", "features")}
            made = items.select(TEXT_COLUMNS).with_columns(title=pl.Series(letters, dtype=pl.String), **empty)
            texts = pl.select(
                **{name: pl.when(is_corrupted).then(made[name]).otherwise(items[name]) for name in TEXT_COLUMNS}  # type: ignore[arg-type]
            )
        case _:
            assert_never(how)
    ITEMS.write(items.with_columns(texts), target.items)
    return np.sort(items["item_id"].to_numpy()[rows])


def _letters(random: np.random.Generator, length: int) -> str:
    return "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz "), size=length))


def _images(source: Workspace, target: Workspace, how: How, share: float, random: np.random.Generator) -> np.ndarray:
    paths = sorted(source.images.glob(shard_path(Path(), 0).name.replace("00000", "*")))
    rows = {row.item_id: row for path in paths for row in read_shard(path)}
    chosen = _circle(random, np.array([item for item, row in rows.items() if row.image is not None]), share)
    givers = dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))
    for number, path in enumerate(paths):
        shard = [row.item_id for row in read_shard(path)]
        made = [_image(rows[item], rows[givers[item]], how, random) if item in givers else rows[item] for item in shard]
        write_shard(shard_path(target.images, number), made, ["corrupted" for _ in made])
    shutil.copy(coverage_path(source.images), coverage_path(target.images))
    return np.sort(chosen)


def _image(row: ImageRow, giver: ImageRow, how: How, random: np.random.Generator) -> ImageRow:
    if how == "shuffle":
        return replace(giver, item_id=row.item_id, raw_item_id=row.raw_item_id)
    assert row.height is not None, "it has an image"
    assert row.width is not None, "it has an image"
    shape = (row.height, row.width, 3)
    pixels = np.full(shape, 128, np.uint8) if how == "blank" else random.integers(0, 256, size=shape, dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="png")
    return replace(row, image=encoded.getvalue())
