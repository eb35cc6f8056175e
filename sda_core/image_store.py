"""Store the images of items on disk in parquet shards, and read a few rows at a time.

``shard-00000.parquet``, ``shard-00001.parquet``, ... hold consecutive items (table ``IMAGES`` of
``sda_core.artifacts``) in row groups of 64, so that one image costs the reading of at most 64 small ones.
``coverage.json`` is written last: its existence means that the folder is complete.

Pages have checksums, which are verified on reading; images are not decoded here.  Reading starts no threads and keeps no
file open, so that a store can be used in forked data-loader workers.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sda_core.artifacts import IMAGES, replace_file
from sda_core.errors import ArtifactError


@dataclass(frozen=True)
class Status:
    """The status of an item's image.

    Attributes:
        label: its name in the report.
        hope: priority: if several references of an item failed, the item gets the status with the highest value.
        is_tried_again: whether the next run of the image stage tries again.
    """

    label: str
    hope: int
    is_tried_again: bool = False


IMAGE_STATUSES = {
    "ok": Status("Image stored", hope=9),
    "missing_url": Status("No image in the metadata", hope=1),
    "missing_file": Status("File not found", hope=2),
    "http_404": Status("Removed from the server (404)", hope=3),
    "http_error": Status("Error of the server", hope=7, is_tried_again=True),
    "corrupt": Status("Not a readable image", hope=4),
    "unsupported": Status("Unsupported format", hope=5),  # tried again if this Pillow decodes the format
    "too_large": Status("Over the size limits", hope=6),
    "timeout": Status("No answer in time", hope=8, is_tried_again=True),
}
"""The statuses by name, in the order of ``coverage.json`` and of the report."""

STATUSES = tuple(IMAGE_STATUSES)

FORMAT_PREFIX = "num_unsupported_"
"""Prefix of the counts by format in ``coverage.json``."""

_ROW_GROUP_ROWS = 64
_KEYS = b"sda.keys"
_ARROW = {pl.Int32: pa.int32(), pl.String: pa.string(), pl.Binary: pa.large_binary()}
_SCHEMA = pa.schema([(name, _ARROW[kind]) for name, kind in IMAGES.columns.items()])  # pyright: ignore[reportArgumentType]
_ADVICE = "delete its folder and run `dvc repro` to fetch the images again"


# -------------------------------------------------------------------------------------------------- shards
def shard_path(folder: Path, position: int) -> Path:
    """Path of shard number ``position``, counted from 0."""
    return folder / f"shard-{position:05d}.parquet"


def coverage_path(folder: Path) -> Path:
    """Path of the counts by status; the file is written last."""
    return folder / "coverage.json"


def format_count(reason: str | None) -> str:
    """Name of the count of unsupported images of one format, e.g. ``num_unsupported_jpeg_xl``."""
    return FORMAT_PREFIX + re.sub("[^a-z0-9]+", "_", (reason or "unknown").lower()).strip("_")


@dataclass(frozen=True)
class ImageRow:
    """One row of ``IMAGES``."""

    item_id: int
    raw_item_id: str
    status: str
    image: bytes | None
    width: int | None
    height: int | None
    reason: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The contents of a shard without the images.  ``keys`` has a hash of the inputs of each row's image."""

    item_ids: tuple[int, ...]
    statuses: tuple[str, ...]
    reasons: tuple[str | None, ...]
    keys: tuple[str, ...]


def write_shard(path: Path, rows: Sequence[ImageRow], keys: Sequence[str]) -> None:
    """Write a shard atomically; the bytes depend only on the rows and keys, and on the pyarrow version."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in _SCHEMA}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_KEYS: "\n".join(keys).encode()}))
    with replace_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=_ROW_GROUP_ROWS,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def _read_columns(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """Columns of a shard as Python lists.

    Raises:
        ArtifactError: the file is missing or damaged, or has another schema.
    """
    IMAGES.scan(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=list(columns), use_threads=False).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(str(path), f"image table is damaged ({error})", _ADVICE) from None


def read_shard_index(path: Path) -> ShardIndex:
    """Ids, statuses and keys of a shard.

    Raises:
        ArtifactError: the file is missing, damaged, or was not written by :func:`write_shard`.
    """
    columns = _read_columns(path, ["item_id", "status", "reason"])
    keys = (pq.read_schema(path).metadata or {}).get(_KEYS, b"").decode().split("\n")
    if len(keys) != len(columns["item_id"]):
        raise ArtifactError(str(path), "image table does not have the keys of its rows", _ADVICE)
    return ShardIndex(tuple(columns["item_id"]), tuple(columns["status"]), tuple(columns["reason"]), tuple(keys))


def read_shard(path: Path) -> list[ImageRow]:
    """All rows of a shard; raises as :func:`read_shard_index`."""
    columns = _read_columns(path, _SCHEMA.names)
    return [ImageRow(*values) for values in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]


def _shards(folder: Path) -> list[Path]:
    """Paths of the shards of a finished folder, in order.

    Raises:
        ArtifactError: the folder is not finished, or a shard is missing.
    """
    if not coverage_path(folder).is_file():
        raise ArtifactError(str(folder), "images are missing or not all fetched", "run `dvc repro` to fetch them")
    paths = sorted(folder.glob("shard-*.parquet"))
    for position, path in enumerate(paths):
        if path != shard_path(folder, position):
            raise ArtifactError(str(shard_path(folder, position)), "image table is missing", _ADVICE)
    return paths


def read_images(folder: Path) -> Iterator[pl.DataFrame]:
    """Read the image table, one checked shard (table ``IMAGES``) at a time, in the order of item ids.

    Raises:
        ArtifactError: the folder is not finished, or a shard is missing or damaged.
    """
    for path in _shards(folder):
        yield IMAGES.read(path)


# --------------------------------------------------------------------------------------------------- store
class ImageStore:
    """Encoded images by item id.

    Args:
        folder: output folder of the image stage.
        max_cached_bytes: maximum size of cached images; the least recently used row groups are evicted first.

    Raises:
        ArtifactError: the folder is not finished, a shard is missing or damaged, or ids are not increasing.
    """

    def __init__(self, folder: Path, max_cached_bytes: int = 256 << 20) -> None:
        self._paths = _shards(folder)
        self._folder = folder
        self._max_cached_bytes = max_cached_bytes
        self._cached: OrderedDict[tuple[int, int], list[bytes | None]] = OrderedDict()
        self._cached_bytes = 0
        codes = {status: code for code, status in enumerate(STATUSES)}
        ids: list[int] = []
        statuses: list[int] = []
        self._starts: list[int] = []  # position of each shard's first row
        for path in self._paths:
            columns = _read_columns(path, ["item_id", "status"])
            unknown = set(columns["status"]) - set(STATUSES)
            if unknown:
                raise ArtifactError(str(path), f"unknown image status {min(unknown)!r}", _ADVICE)
            self._starts.append(len(ids))
            ids += columns["item_id"]
            statuses += [codes[status] for status in columns["status"]]
        self._ids = np.array(ids, dtype=np.int32)
        self._statuses = np.array(statuses, dtype=np.int8)
        if (np.diff(self._ids) <= 0).any():
            raise ArtifactError(str(folder), "item ids of the image table do not increase", _ADVICE)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def item_ids(self) -> np.ndarray:
        """Ids of all items, with or without an image, increasing; ``(I,)`` int32."""
        return self._ids

    def status(self, item_id: int) -> str:
        """One of :data:`STATUSES`.

        Raises:
            ArtifactError: the table has no such item.
        """
        return STATUSES[self._statuses[self._position(item_id)]]

    def get(self, item_id: int) -> bytes | None:
        """The encoded image (JPEG or PNG, RGB), or None if the item has none.

        Raises:
            ArtifactError: the table has no such item, or its shard is damaged.
        """
        position = self._position(item_id)
        if STATUSES[self._statuses[position]] != "ok":
            return None
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        group, row = divmod(position - self._starts[shard], _ROW_GROUP_ROWS)
        images = self._group(shard, group)
        image = images[row] if row < len(images) else None
        if image is None:
            raise ArtifactError(str(self._paths[shard]), f"image of item {item_id} is marked ok, but is missing", _ADVICE)
        return image

    def _position(self, item_id: int) -> int:
        position = int(np.searchsorted(self._ids, item_id))
        if position == len(self._ids) or self._ids[position] != item_id:
            raise ArtifactError(str(self._folder), f"image table has no item {item_id}", "run `dvc repro` to fetch its image")
        return position

    def _group(self, shard: int, group: int) -> list[bytes | None]:
        """Images of one row group, from the cache if possible."""
        place = (shard, group)
        if place in self._cached:
            self._cached.move_to_end(place)
            return self._cached[place]
        try:
            with pq.ParquetFile(self._paths[shard], page_checksum_verification=True) as file:
                table = file.read_row_group(group, columns=["image"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(str(self._paths[shard]), f"image table is damaged ({error})", _ADVICE) from None
        images: list[bytes | None] = table.column("image").to_pylist()
        self._cached[place] = images
        self._cached_bytes += _num_bytes(images)
        while self._cached_bytes > self._max_cached_bytes and len(self._cached) > 1:
            _, dropped = self._cached.popitem(last=False)
            self._cached_bytes -= _num_bytes(dropped)
        return images


def _num_bytes(images: Sequence[bytes | None]) -> int:
    return sum(len(image) for image in images if image is not None)
