"""Decode photographs for nano 2: of clothes and groceries, and of fashion, which is not used for released weights.

Reads the zip files of a folder, whose sources are in ``pretraining/README.md``.  For each it writes ``work/seen/NAME.npy``
(uint8 RGB ``(images, side, side, 3)``, scaled to a square) and ``work/seen/NAME.parquet`` with split, captions, and labels as
``attribute=value``.

    python -m pretraining seen [--folder FOLDER] [--sources clothing_cc0,grocery_mit,fashion_products_60x80]
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from PIL import Image

from pretraining.common import WORK, Work, number, settings
from pretraining.images import normalised


@dataclass(frozen=True)
class Photo:
    """One photograph.

    Attributes:
        member: its path in the zip file.
        split: ``train``, ``valid`` or ``test``.
        captions: its captions.
        labels: known attributes, as ``attribute=value``.
    """

    member: str
    split: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]


def split_by(seed: int, key: str, share_held_out: float) -> str:
    """The split of a key: ``valid`` and ``test`` have half of the held-out share each."""
    place = number(seed, "seen", key) / 2**63
    return "train" if place >= share_held_out else "valid" if place < share_held_out / 2 else "test"


def clothing(rows: list[dict[str, Any]], seed: int, share: float) -> Iterator[Photo]:
    """Photographs of clothes; all of one sender are in one split."""
    for row in rows:
        words = row["label"].lower() if row["label"] != "Outwear" else "outerwear, jacket or coat"
        captions = (f"kids {words}",) if row["kids"] else (words, f"a photo of a {words}")
        yield Photo(
            f"images/{row['id']}.jpg", split_by(seed, f"sender {row['sender_id']}", share), captions, (f"garment={row['label']}",)
        )


def grocery(rows: list[dict[str, Any]], seed: int, share: float) -> Iterator[Photo]:  # noqa: ARG001 - the set has its own split
    """Photographs of groceries, with the split of the data set; images and descriptions of grocers' sites are not used."""
    for row in rows:
        label, coarse = row["label"].replace("-", " ").lower(), row["coarse"].replace("-", " ").lower()
        yield Photo(
            f"images/{row['id']}.jpg",
            "valid" if row["split"] == "val" else row["split"],
            tuple(dict.fromkeys((f"{label}, {coarse}", label))),
            (f"grocery={row['label']}", f"grocery kind={row['coarse']}"),
        )


def fashion(rows: list[dict[str, Any]], seed: int, share: float) -> Iterator[Photo]:
    """Photographs of fashion products; all of one title are in one split."""
    for row in rows:
        (master, sub, article), (colour, usage) = row["categories"], row["features"]
        yield Photo(
            f"images/{row['parent_asin']}.jpg",
            split_by(seed, f"title {normalised(row['title'])}", share),
            (row["title"], f"{colour} {article}".lower()),
            (f"article={article}", f"article kind={master} {sub}", f"colour of article={colour}", f"usage={usage}"),
        )


SOURCES = {
    "clothing_cc0": ("items.jsonl.gz", clothing),
    "grocery_mit": ("items.jsonl.gz", grocery),
    "fashion_products_60x80": ("items_44k.jsonl.gz", fashion),
}


def write(archive: Path, work: Path, params: dict[str, Any], seed: int) -> pl.DataFrame:
    """Decode one zip file, write its images and table, and return the table."""
    lines, photos_of = SOURCES[archive.stem]
    side = params["side_pixels"]
    with zipfile.ZipFile(archive) as files:
        rows = [json.loads(line) for line in gzip.decompress(files.read(lines)).splitlines()]
        photos = list(photos_of(rows, seed, params["share_held_out"]))
        pixels = np.empty((len(photos), side, side, 3), np.uint8)
        for place, photo in enumerate(photos):
            with Image.open(io.BytesIO(files.read(photo.member))) as image:
                pixels[place] = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    table = pl.DataFrame({
        "split": [photo.split for photo in photos],
        "captions": [list(photo.captions) for photo in photos],
        "labels": [list(photo.labels) for photo in photos],
    })  # fmt: skip
    write_pool(archive.stem, pixels, table, work)
    return table


def write_pool(name: str, pixels: np.ndarray, table: pl.DataFrame, work: Path) -> None:
    """Write the images of a source, and then its table."""
    (work / "seen").mkdir(parents=True, exist_ok=True)
    np.save(work / "seen" / f"{name}.npy", pixels)
    table.write_parquet(work / "seen" / f"{name}.parquet")


def main(
    folder: Annotated[Path | None, typer.Option(help="Folder with the zip files; by default that of the settings.")] = None,
    sources: Annotated[str, typer.Option(help="Sources to decode, separated by commas.")] = "clothing_cc0,grocery_mit",
    work: Work = WORK,
) -> None:
    """Decode the photographs."""
    params = settings()
    folder = folder or Path(params["nano2"]["photo_folder"])
    for source in sources.split(","):
        if source not in SOURCES:
            raise SystemExit(f"--sources: expected some of {', '.join(SOURCES)} (got {source!r})")
        table = write(folder / f"{source}.zip", work, params["nano2"]["seen"], params["seed"])
        print(source, table.group_by("split").agg(pl.len()).sort("split").rows())
