"""Corrupt or remove images or texts of items, to measure the effect on an adapter."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import polars as pl
from PIL import Image

from sda_core.artifacts import ITEMS, Workspace, read_json, write_json
from sda_core.errors import ConfigError
from sda_core.image_store import ImageRow, coverage_path, read_shard, shard_path, write_shard
from sda_core.seed import generator

How = Literal["shuffle", "blank", "noise", "absent"]
TEXT_COLUMNS = ("title", "brand", "price", "categories", "features", "description", "has_metadata")
REMOVED = "missing_url"
"""The status of a removed image, which is that of an item whose metadata has no image."""


def corrupt(
    source: Workspace, target: Workspace, modality: Literal["image", "text"], how: How, share: float, seed: int
) -> np.ndarray:
    """Copy ``data/filtered`` and ``data/images``, with one modality of a share of the items corrupted.

    ===========  ==================================================================================================
    ``shuffle``  images or whole texts are exchanged along a random cycle: no item keeps its own
    ``blank``    a grey image of the same size; no text
    ``noise``    an image of random pixels of the same size; random letters as the title, no other text
    ``absent``   no image; no text (as ``blank``).  ``items.missing_image`` and ``items.missing_text`` say what follows
    ===========  ==================================================================================================

    With one seed the items of a smaller share are among those of a larger one.

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
    _copy_filtered(source, target)
    random = generator(seed, "corrupt", modality, how)
    if modality == "text":
        shutil.copytree(source.images, target.images)
        return _texts(target, how, share, random)
    return _images(source, target, how, share, random)


def partners(random: np.random.Generator, size: int) -> np.ndarray:
    """For each of some rows the row before it on a random cycle of all, ``(size,)``: a permutation that keeps no row in place."""
    order = random.permutation(size)
    partner = np.empty(size, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def draw(
    complete: np.ndarray, text_share: float, image_share: float, seed: int, *, overlapping: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the items that lose their text, and those that lose their image.

    With one seed the sets are nested: the items of a smaller share are among those of a larger one.  The two sets are disjoint
    unless ``overlapping``: one is taken from the beginning of one random order, the other from its end.

    Args:
        complete: ids of the items with both modalities.
        text_share: share of them that lose their text, 0 to 1.
        image_share: share of them that lose their image, 0 to 1.
        seed: seed of the draw.
        overlapping: whether to draw the two sets independently, so that some items lose both.

    Returns:
        Ids without a text and ids without an image, ascending.

    Raises:
        ConfigError: a share is not between 0 and 1, or the sum of the shares is greater than 1 and the sets may not overlap.
    """
    shares = text_share, image_share
    if not all(0.0 <= share <= 1.0 for share in shares) or (sum(shares) > 1.0 and not overlapping):
        problem = f"{text_share:g} of the items cannot lose their text and another {image_share:g} their image"
        raise ConfigError("--shares", problem, "use shares from 0 to 1 whose sum is at most 1, or let the sets overlap")
    random = generator(seed, "missing modalities")
    order = random.permutation(np.sort(complete))
    other = random.permutation(order) if overlapping else order[::-1]
    num_texts, num_images = (round(share * len(order)) for share in shares)
    if not overlapping:
        num_images = min(num_images, len(order) - num_texts)  # both may have been rounded up
    return np.sort(order[:num_texts]), np.sort(other[:num_images])


def remove(source: Workspace, target: Workspace, without_text: np.ndarray, without_image: np.ndarray) -> None:
    """Copy ``data/filtered`` and ``data/images`` without the texts of some items and the images of some items.

    Interactions, users and ids are unchanged.

    Args:
        source: workspace with filtered data and images.
        target: workspace of the copy; existing files are replaced.
        without_text: ids of the items that lose all fields of their text.
        without_image: ids of the items that lose their image.
    """
    _copy_filtered(source, target)
    items = ITEMS.read(target.items)
    if len(without_text):
        ITEMS.write(_replaced(items, np.isin(items["item_id"].to_numpy(), without_text), [""] * len(items)), target.items)
    lost = set(without_image.tolist())
    _copy_images(source, target, lambda row: _without_image(row) if row.item_id in lost else row)


def _copy_filtered(source: Workspace, target: Workspace) -> None:
    """Copy the filtered data, and delete earlier copies of it and of the images."""
    for folder in (target.filtered, target.images):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source.filtered, target.filtered)


def _circle(random: np.random.Generator, members: np.ndarray, share: float) -> np.ndarray:
    """The given share of the members, in random order."""
    return random.permutation(members)[: round(share * len(members))]


def _texts(target: Workspace, how: How, share: float, random: np.random.Generator) -> np.ndarray:
    items = ITEMS.read(target.items)
    rows = _circle(random, np.arange(len(items)), share)
    giver = np.arange(len(items))
    giver[rows] = np.roll(rows, 1)
    match how:
        case "shuffle":
            made = items.with_columns(items.select(TEXT_COLUMNS)[giver])
        case "blank" | "noise" | "absent":
            titles = [_letters(random, len(title)) if how == "noise" else "" for title in items["title"]]
            made = _replaced(items, np.isin(np.arange(len(items)), rows), titles)
        case _:
            assert_never(how)
    ITEMS.write(made, target.items)
    return np.sort(items["item_id"].to_numpy()[rows])


def _replaced(items: pl.DataFrame, is_replaced: np.ndarray, titles: list[str]) -> pl.DataFrame:
    """The items, of which some have these titles and no other text."""
    empty = {name: pl.lit("", pl.String) for name in ("brand", "price", "description")}
    empty |= {name: pl.lit([], pl.List(pl.String)) for name in ("categories", "features")}
    made = items.select(TEXT_COLUMNS).with_columns(title=pl.Series(titles, dtype=pl.String), **empty)
    chosen = pl.Series(is_replaced)
    texts = {name: pl.when(chosen).then(made[name]).otherwise(items[name]) for name in TEXT_COLUMNS}
    return items.with_columns(pl.select(**texts))  # type: ignore[arg-type]


def _letters(random: np.random.Generator, length: int) -> str:
    return "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz "), size=length))


def _images(source: Workspace, target: Workspace, how: How, share: float, random: np.random.Generator) -> np.ndarray:
    rows = {row.item_id: row for path in _shards(source) for row in read_shard(path)}
    chosen = _circle(random, np.array([item for item, row in rows.items() if row.image is not None]), share)
    givers = dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))
    _copy_images(
        source, target, lambda row: _image(row, rows[givers[row.item_id]], how, random) if row.item_id in givers else row
    )
    return np.sort(chosen)


def _shards(workspace: Workspace) -> list[Path]:
    """Paths of the shards of images, in order."""
    return sorted(workspace.images.glob(shard_path(Path(), 0).name.replace("00000", "*")))


def _copy_images(source: Workspace, target: Workspace, changed: Callable[[ImageRow], ImageRow]) -> None:
    """Copy the images, each row as changed, and adjust their counts by status."""
    num_lost = 0
    for number, path in enumerate(_shards(source)):
        before = read_shard(path)
        after = [changed(row) for row in before]
        write_shard(shard_path(target.images, number), after, ["corrupted" for _ in after])
        num_lost += sum(old.image is not None and new.image is None for old, new in zip(before, after, strict=True))
    counts = read_json(coverage_path(source.images), "the counts of the images")
    if num_lost:
        num_ok = counts["num_ok"] - num_lost
        counts |= {"num_ok": num_ok, "share_ok": num_ok / counts["num_items"]}
        counts[f"num_{REMOVED}"] += num_lost
    write_json(coverage_path(target.images), counts)


def _without_image(row: ImageRow) -> ImageRow:
    return replace(row, status=REMOVED, image=None, width=None, height=None, reason=None)


def _image(row: ImageRow, giver: ImageRow, how: How, random: np.random.Generator) -> ImageRow:
    if how == "shuffle":
        return replace(giver, item_id=row.item_id, raw_item_id=row.raw_item_id)
    if how == "absent":
        return _without_image(row)
    assert row.height is not None, "it has an image"
    assert row.width is not None, "it has an image"
    shape = (row.height, row.width, 3)
    pixels = np.full(shape, 128, np.uint8) if how == "blank" else random.integers(0, 256, size=shape, dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="png")
    return replace(row, image=encoded.getvalue())
