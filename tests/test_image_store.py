"""The image table: written, read row by row, and refused where it is damaged."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sda_core.artifacts import IMAGES, write_json
from sda_core.errors import ArtifactError
from sda_core.image_store import (
    STATUSES,
    ImageRow,
    ImageStore,
    coverage_path,
    read_images,
    read_shard,
    read_shard_index,
    shard_path,
    write_shard,
)


def bytes_of(item_id: int) -> bytes:
    return np.random.default_rng(item_id).bytes(1000)


def rows_of(item_ids: range) -> list[ImageRow]:
    return [
        ImageRow(item_id, f"B{item_id}", "ok", bytes_of(item_id), 4, 5)
        if item_id % 3
        else ImageRow(item_id, f"B{item_id}", STATUSES[1 + item_id % 7], None, None, None)
        for item_id in item_ids
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 items in three shards; every third has no image."""
    for position, item_ids in enumerate((range(1, 101), range(101, 201), range(201, 301))):
        write_shard(shard_path(tmp_path, position), rows_of(item_ids), [f"key{item_id}" for item_id in item_ids])
    write_json(coverage_path(tmp_path), {})
    return tmp_path


def test_round_trip(folder: Path) -> None:
    assert read_shard(shard_path(folder, 1)) == rows_of(range(101, 201))
    index = read_shard_index(shard_path(folder, 1))
    assert index.item_ids == tuple(range(101, 201))
    assert index.keys[0] == "key101"
    frame = pl.concat(read_images(folder))
    assert dict(frame.schema) == dict(IMAGES.columns)
    assert frame["image"].to_list() == [row.image for row in rows_of(range(1, 301))]


@pytest.mark.parametrize("max_cached_bytes", [0, 100_000, 1 << 30])
def test_any_order_any_cache(folder: Path, max_cached_bytes: int) -> None:
    store = ImageStore(folder, max_cached_bytes)
    assert len(store) == 300
    assert store.item_ids.tolist() == list(range(1, 301))
    for item_id in np.random.default_rng(0).permutation(np.repeat(np.arange(1, 301), 2)):
        assert store.get(int(item_id)) == (bytes_of(int(item_id)) if item_id % 3 else None)
        assert store.status(int(item_id)) == ("ok" if item_id % 3 else STATUSES[1 + item_id % 7])
        assert store._cached_bytes <= max(max_cached_bytes, 64_000)
    assert store._cached_bytes == sum(len(image) for group in store._cached.values() for image in group if image)


def _in_child(store: ImageStore, queue: multiprocessing.Queue) -> None:
    queue.put([store.get(item_id) for item_id in (1, 150, 299)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12+ on every fork
def test_in_a_forked_process(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    store = ImageStore(folder)
    store.get(1)
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(store, queue))
    process.start()
    assert queue.get(timeout=20) == [bytes_of(1), None, bytes_of(299)]
    process.join()


def test_unknown_item(folder: Path) -> None:
    store = ImageStore(folder)
    for item_id in (0, -1, 301):
        with pytest.raises(ArtifactError, match=f"no item {item_id}"):
            store.get(item_id)
        with pytest.raises(ArtifactError):
            store.status(item_id)


def test_unfinished_folder(folder: Path, tmp_path: Path) -> None:
    coverage_path(folder).unlink()
    for call in (lambda: ImageStore(folder), lambda: list(read_images(folder)), lambda: ImageStore(tmp_path / "none")):
        with pytest.raises(ArtifactError, match="missing or not all fetched"):
            call()


def test_missing_shard(folder: Path) -> None:
    shard_path(folder, 1).unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.parquet"):
        ImageStore(folder)


def test_shards_in_the_wrong_place(folder: Path) -> None:
    first, second = shard_path(folder, 0), shard_path(folder, 1)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(ArtifactError, match="do not increase"):
        ImageStore(folder)


def test_flipped_bits_are_noticed(folder: Path) -> None:
    path = shard_path(folder, 0)
    data = bytearray(path.read_bytes())
    place = data.index(bytes_of(1)[:100])
    data[place + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        ImageStore(folder).get(1)
    with pytest.raises(ArtifactError, match="damaged"):
        read_shard(path)


def test_foreign_tables(folder: Path) -> None:
    path = shard_path(folder, 2)
    pl.concat(read_images(folder))[:5].write_parquet(path)  # the right columns, but not ours
    with pytest.raises(ArtifactError, match="does not have the keys"):
        read_shard_index(path)
    frame = pl.read_parquet(path).with_columns(status=pl.lit("nonsense"))
    frame.write_parquet(path)
    with pytest.raises(ArtifactError, match="nonsense"):
        ImageStore(folder)
    frame.drop("image").write_parquet(path)
    with pytest.raises(ArtifactError, match="'image'"):
        ImageStore(folder)


def test_same_bytes_twice(folder: Path) -> None:
    before = shard_path(folder, 0).read_bytes()
    write_shard(shard_path(folder, 0), rows_of(range(1, 101)), [f"key{item_id}" for item_id in range(1, 101)])
    assert shard_path(folder, 0).read_bytes() == before
