"""Find or fetch the images of the kept items, check them, and store them in shards.

* Sources in order: ``<local_folder>/images/<raw_item_id>.jpg`` (or another extension of ``image_formats``, see
  ``image_names``); ``<image_folder>/<raw_item_id>.jpg``; the item's relative references, inside ``local_folder``,
  ``image_folder`` or the archive of images (the file of the manifest with the role ``images``); the archive's entry named
  after the item; the item's addresses.  With a local folder, the network is not used.
* References are untrusted: paths that are absolute, have ``..`` or are not plain are not followed.
* If several references fail, the item gets the most promising status (``hope`` in ``image_store.IMAGE_STATUSES``).
* ``429`` and ``503`` pause the whole host, not one image; a host that fails fifty times in a row is not used for the rest
  of the run, and its images keep that status.
* Every row has a key of the inputs of its image (id, references, contents of local files, limits).  A later run reuses
  each row whose key it needs, in any position, so that another filter does not fetch images again.  Rows with a transient
  status (``is_tried_again`` in ``IMAGE_STATUSES``) are fetched again, as are unsupported ones whose format can now be decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import httpx
import polars as pl

from sda_core.artifacts import IMAGES, ITEMS, write_json
from sda_core.errors import ArtifactError, DownloadError
from sda_core.fetch.archives import Entry
from sda_core.fetch.decoding import PreparedImage, prepare
from sda_core.fetch.folders import locked_folder, remove
from sda_core.fetch.http import AttemptError, backoff, content_length, exchange, new_client, run
from sda_core.fetch.image_formats import FORMATS
from sda_core.fetch.image_names import NUM_EXAMPLES, ItemNames
from sda_core.fetch.image_sources import Address, Finder, Item, LocalFile, Nothing, Source, open_archive
from sda_core.fetch.manifest import manifest_file, read_manifest
from sda_core.image_store import (
    IMAGE_STATUSES,
    STATUSES,
    ImageRow,
    ShardIndex,
    coverage_path,
    format_count,
    read_shard,
    read_shard_index,
    shard_path,
    write_shard,
)
from sda_core.local_files import inside
from sda_core.log import Progress, progress
from sda_core.params import FetchImagesParams

_log = logging.getLogger(__name__)

_TRIED_AGAIN = frozenset(name for name, status in IMAGE_STATUSES.items() if status.is_tried_again)
_ADVICE = {
    "HTML page": "it is a web page: an address gives the page around the image, or a page was saved under the image's name",
    "Git LFS pointer": "it names the image, which is not there yet: run `git lfs pull` in the repository of the images",
    "archive entry": "pack the archive again with Deflate and without a password",
    "": "the files are not damaged, but this format is not read: convert them to JPEG or PNG",
}
"""Remedies for unsupported images, by the prefix of the format's name."""
_GONE = frozenset({404, 410})
_HOST_WAITS = frozenset({429, 503})
_MAX_HOST_FAILURES = 50
_MAX_DECODERS = 4  # each may hold a few copies of 4 million pixels, and one of them of max_pixels pixels
_BLOCKS_AT_ONCE = 2  # so that one slow image at the end of a block does not idle the others


# ------------------------------------------------------------------------------------------------ network
class _Host:
    """The state of a host: current number of requests, time until which to wait, whether it is reachable."""

    def __init__(self, name: str, max_requests: int) -> None:
        self.name = name
        self.slots = asyncio.Semaphore(max_requests)
        self.num_failures = 0
        self.given_up: str | None = None
        self._is_distrusted = False
        self._resume_at = 0.0

    def pause(self, seconds: float) -> None:
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)

    async def ready(self) -> None:
        while (seconds := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(seconds)

    def distrust(self, problem: str) -> None:
        if not self._is_distrusted:
            _log.warning("%s: %s", self.name, problem)
        self._is_distrusted = True

    def failed(self, status: str) -> None:
        self.num_failures += 1
        if self.num_failures >= _MAX_HOST_FAILURES and self.given_up is None:
            self.given_up = status
            _log.warning("%s failed %d times in a row; the next run tries its other images", self.name, self.num_failures)


class _Web:
    """The HTTP client, made for the first address: without one, the environment's network settings are not used."""

    def __init__(self, params: FetchImagesParams, opened: AsyncExitStack) -> None:
        self._params = params
        self._opened = opened
        self._client: httpx.AsyncClient | None = None

    def client(self) -> httpx.AsyncClient:
        """The client; ``opened`` closes it.

        Raises:
            DownloadError: see :func:`sda_core.fetch.http.new_client`.
        """
        if self._client is None:
            self._client = new_client(self._params.timeout_seconds, self._params.num_workers)
            self._opened.push_async_callback(self._client.aclose)
        return self._client


class _Fetcher:
    """Reads or fetches images from sources; at most ``num_workers`` at a time, ``max_per_host`` of them from one host."""

    def __init__(self, finder: Finder, params: FetchImagesParams, web: _Web, decoders: ThreadPoolExecutor) -> None:
        self._finder = finder
        self._params = params
        self._web = web
        self._decoders = decoders
        self._workers = asyncio.Semaphore(params.num_workers)
        self._hosts: dict[str, _Host] = {}

    async def image(self, sources: Sequence[Source]) -> PreparedImage:
        """The first valid image, or the most promising status."""
        failed: list[PreparedImage] = []
        for source in sources:
            image = await self._one(source)
            if image.status == "ok":
                return image
            failed.append(image)
        return max(failed, key=lambda image: IMAGE_STATUSES[image.status].hope, default=PreparedImage("missing_url"))

    async def _one(self, source: Source) -> PreparedImage:
        if isinstance(source, Nothing):
            return PreparedImage(source.status)
        if isinstance(source, Address):
            return await self._fetch(source.url)
        async with self._workers:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, self._local, source)

    def _prepare(self, data: bytes) -> PreparedImage:
        return prepare(data, self._params.max_pixels, self._params.stored_pixels)

    def _local(self, source: LocalFile | Entry) -> PreparedImage:
        data = self._finder.read(source)
        if not isinstance(data, str):
            return self._prepare(data)
        if data == "unsupported" and isinstance(source, Entry):
            return PreparedImage(data, reason=f"archive entry: {source.packing}")
        return PreparedImage(data)

    async def _fetch(self, url: str) -> PreparedImage:
        """Request one address until the result is final or the retries are exhausted."""
        name = httpx.URL(url).host
        host = self._hosts.setdefault(name, _Host(name, self._params.max_per_host))
        status = "http_error"
        for attempt in range(self._params.num_retries + 1):
            if attempt:
                await asyncio.sleep(backoff(attempt - 1, self._params.backoff_seconds, url))
            async with AsyncExitStack() as held:
                async with host.slots:
                    await host.ready()
                    if host.given_up is not None:
                        return PreparedImage(host.given_up)
                    await held.enter_async_context(self._workers)
                    try:
                        answer = await self._request(url)
                    except AttemptError as error:
                        status = "timeout" if error.kind == "timeout" else "http_error"
                        if error.code in _HOST_WAITS:
                            host.pause(backoff(attempt, self._params.backoff_seconds, url, error.wait_seconds))
                        if error.kind == "certificate":
                            host.distrust(error.problem)
                        if not error.is_final:
                            host.failed(status)
                            continue
                        answer = status
                host.num_failures = 0
                if isinstance(answer, str):
                    return PreparedImage(answer)
                # release the host for another request while this image is decoded
                image = await asyncio.get_running_loop().run_in_executor(self._decoders, self._prepare, answer)
                # shops send a transparent or white dot for images that no longer exist
                return PreparedImage("http_404") if (image.width, image.height) == (1, 1) else image
        return PreparedImage(status)

    async def _request(self, url: str) -> bytes | str:
        """One request: returns the body or a final status; raises :class:`AttemptError` if another request may succeed."""
        limit = self._params.max_bytes
        async with exchange(self._web.client(), url, self._params.timeout_seconds) as response:
            if response.status_code != 200:
                return "http_404" if response.status_code in _GONE else "http_error"
            body = bytearray()
            if (content_length(response) or 0) <= limit:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > limit:
                        break
                else:
                    return bytes(body)
            return "too_large"


# ------------------------------------------------------------------------------------------- earlier runs
def _is_tried_again(status: str, reason: str | None) -> bool:
    return status in _TRIED_AGAIN or (status == "unsupported" and reason in FORMATS)  # this Pillow decodes it


class _EarlierShards:
    """Rows of earlier runs, of which the valid ones are reused.

    All shards are renamed first, because any block may need rows of any shard; a shard that is valid as a whole is renamed
    back.  After an interrupted run, the next one uses the renamed shards.
    """

    def __init__(self, folder: Path) -> None:
        coverage_path(folder).unlink(missing_ok=True)  # from now on the folder is incomplete
        self._folder = folder
        self._indexes: dict[Path, ShardIndex] = {}
        self._rows: dict[str, tuple[Path, int]] = {}
        for path in sorted([*folder.glob("shard-*.parquet"), *folder.glob(".old-*.parquet")]):
            try:
                index = read_shard_index(path)
            except ArtifactError as error:
                _log.warning("%s", error)
                remove(path)
                continue
            renamed = path.replace(self._renamed(index.keys))
            self._indexes[renamed] = index
            for row, (key, status, reason) in enumerate(zip(index.keys, index.statuses, index.reasons, strict=True)):
                if status in STATUSES and not _is_tried_again(status, reason):
                    self._rows[key] = (renamed, row)

    def _renamed(self, keys: Sequence[str]) -> Path:
        digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        return self._folder / f".old-{digest}.parquet"

    def put_back(self, path: Path, items: Sequence[Item], keys: Sequence[str]) -> bool:
        """Rename an earlier shard back if it is valid as a whole; returns whether there is one."""
        renamed = self._renamed(keys)
        index = self._indexes.get(renamed)
        if index is None or index.item_ids != tuple(item.item_id for item in items):
            return False
        is_right = not any(map(_is_tried_again, index.statuses, index.reasons))
        if is_right:
            renamed.replace(path)
        return is_right

    def take(self, keys: Sequence[str]) -> dict[str, PreparedImage]:
        """Images of earlier rows with these keys; holds one shard in memory at a time."""
        places = [(*self._rows[key], key) for key in keys if key in self._rows]
        taken: dict[str, PreparedImage] = {}
        for path, of_shard in groupby(sorted(places), key=itemgetter(0)):
            try:
                rows = read_shard(path)
            except ArtifactError as error:
                _log.warning("%s", error)
                continue
            for _, row, key in of_shard:
                taken[key] = PreparedImage(rows[row].status, rows[row].image, rows[row].width, rows[row].height, rows[row].reason)
        return taken


# ------------------------------------------------------------------------------------------------- public
def fetch_images(
    items: pl.DataFrame, raw: Path, local_folder: Path | None, image_folder: Path | None, params: FetchImagesParams, out: Path
) -> dict[str, int | float]:
    """Write the images of all items to ``out``, in shards of ``shard_rows`` items in ``item_id`` order.

    ``out`` is kept between runs: valid shards and rows are reused, everything else in it is removed.  The result depends
    neither on the number of workers nor on interruptions.

    Args:
        items: table ``ITEMS``.
        raw: folder of raw files with its manifest; an archive of images in the manifest is used.
        local_folder: base folder of relative references; with it, the network is not used.
        image_folder: another folder of images; missing ones are fetched.
        params: limits, retries, rates.
        out: folder of the shards and of ``coverage.json``, which is written last.

    Returns:
        Coverage: ``num_items``, ``num_ok``, ``share_ok``, and ``num_<status>`` for every other status;
        ``num_unsupported_<format>`` for each format found; counts of unused files by ``Finder.passed_over``.

    Raises:
        ArtifactError: ``items`` has another schema, or the manifest or the archive cannot be read.
        DownloadError: a folder of images is missing or in ``out``, or another run is writing to ``out``.
        StorageError: ``out`` cannot be written.
    """
    _check_apart(local_folder, image_folder, out)
    table, finder = _open(items, raw, local_folder, image_folder, params)
    _reject_links(table, finder)
    blocks = [table[start : start + params.shard_rows] for start in range(0, len(table), params.shard_rows)]
    shards = [shard_path(out, position) for position in range(len(blocks))]
    with locked_folder(out):
        run(_fetch_all(blocks, shards, finder, params, out))
        for path in sorted({*out.iterdir()} - {*shards, coverage_path(out)}):
            remove(path)
        coverage = _coverage(shards) | finder.passed_over()
        write_json(coverage_path(out), coverage)
        return coverage


def changed_images(
    items: pl.DataFrame, raw: Path, local_folder: Path | None, image_folder: Path | None, params: FetchImagesParams, out: Path
) -> list[str]:
    """Items whose image :func:`fetch_images` would read again, because its local file was changed, added or removed.

    Nothing is changed or fetched.

    Args:
        items: as in :func:`fetch_images`, like the other arguments.

    Returns:
        The raw ids of the items, in the order of ``item_id``.

    Raises:
        ArtifactError, DownloadError: as :func:`fetch_images`; a shard cannot be read.
    """
    table, finder = _open(items, raw, local_folder, image_folder, params)
    stored: dict[int, str] = {}
    for path in sorted(out.glob("shard-*.parquet")):
        index = read_shard_index(path)
        stored.update(zip(index.item_ids, index.keys, strict=True))
    return [item.raw_item_id for item in table if stored.get(item.item_id) != finder.key(item, finder.sources(item))]


def _check_apart(local_folder: Path | None, image_folder: Path | None, out: Path) -> None:
    """Reject images of the user in the folder of the results, where all other files are removed."""
    local_images = None if local_folder is None else local_folder / "images"
    for name, folder in (("local_folder", local_folder), ("local_folder", local_images), ("image_folder", image_folder)):
        if folder is not None and inside(folder, out):
            raise DownloadError(
                f"params.yaml: dataset.{name}",
                f"{folder} is in {out}, which this stage clears of everything else",
                "move the images to another folder, and give its path",
            )


def _open(
    items: pl.DataFrame, raw: Path, local_folder: Path | None, image_folder: Path | None, params: FetchImagesParams
) -> tuple[list[Item], Finder]:
    ITEMS.check(dict(items.schema), Path("items"))
    columns = items.sort("item_id").select("item_id", "raw_item_id", "image_references")
    table = [
        Item(item_id, raw_item_id, tuple(filter(None, references or ())))
        for item_id, raw_item_id, references in columns.iter_rows()
    ]
    for name, folder in (("local_folder", local_folder), ("image_folder", image_folder)):
        if folder is not None and not folder.is_dir():
            raise DownloadError(
                f"params.yaml: dataset.{name}", f"there is no folder {folder}", "correct the path, or set it to null"
            )
    archive = None
    if any(file.role == "images" for file in read_manifest(raw)):
        archive = open_archive(manifest_file(raw, "images"), table)
    names = ItemNames([item.raw_item_id for item in table])
    return table, Finder(local_folder, image_folder, archive, params, names)


def _reject_links(table: Sequence[Item], finder: Finder) -> None:
    """Reject images behind a linked folder inside a folder, because DVC does not follow it and would miss changes."""
    folders = [folder for folder in (finder.local_folder, finder.image_folder) if folder is not None]
    watched = {*folders, *(folder / "images" for folder in folders[:1] if finder.local_folder is not None)}
    links = {link for folder in watched for link in linked_folders(folder)} - watched
    if not links:
        return
    for item in table:
        for source in finder.sources(item):
            found = links.intersection(source.path.parents) if isinstance(source, LocalFile) else set[Path]()
            if found:
                raise DownloadError(
                    str(min(found)),
                    f"is a link to a folder, behind which DVC does not see images change ({item.raw_item_id!r} has one there)",
                    "put the folder there instead of the link, or name the linked folder in dataset.image_folder",
                )


def linked_folders(folder: Path) -> list[Path]:
    """Links to folders below a folder, which DVC does not follow when it hashes the folder."""
    found: list[Path] = []
    for here, folders, _ in os.walk(folder):
        found += [path for name in folders if (path := Path(here, name)).is_symlink()]
    return sorted(found)


def to_try_again(coverage: Mapping[str, int | float]) -> dict[str, str]:
    """A message about images with a transient failure: their number and the remedy; empty if there are none."""
    num_failed = sum(coverage[f"num_{status}"] for status in _TRIED_AGAIN)
    advice = "to retry only these: `dvc repro --single-item --force fetch_images`"
    return {"temporary failures": f"{num_failed} ({advice})"} if num_failed else {}


def _coverage(shards: Sequence[Path]) -> dict[str, int | float]:
    """Counts by status, and of unsupported images by format; logs one line per unsupported format."""
    columns = ("raw_item_id", "status", "reason")
    empty = pl.DataFrame(schema={name: IMAGES.columns[name] for name in columns})
    rows = pl.concat([empty, *(IMAGES.query(path, lambda rows: rows.select(columns)) for path in shards)])
    counts = Counter(rows["status"])
    share_ok = counts["ok"] / max(len(rows), 1)
    coverage: dict[str, int | float] = {"num_items": len(rows), "num_ok": counts["ok"], "share_ok": share_ok}
    coverage |= {f"num_{status}": counts[status] for status in STATUSES if status != "ok"}
    unsupported = rows.filter(status="unsupported").with_columns(pl.col("reason").fill_null("unknown"))
    for (name,), group in sorted(unsupported.group_by("reason")):
        key = format_count(name)
        coverage[key] = coverage.get(key, 0) + len(group)
        _log.warning(
            "%d items have images of an unsupported format (%s), first %s: %s",
            *(len(group), name, ", ".join(map(ascii, group["raw_item_id"][:NUM_EXAMPLES]))),
            next(advice for begin, advice in _ADVICE.items() if name.startswith(begin)),
        )
    return coverage


async def _fetch_all(
    blocks: Sequence[Sequence[Item]], shards: Sequence[Path], finder: Finder, params: FetchImagesParams, out: Path
) -> None:
    running: deque[asyncio.Task[None]] = deque()
    with (
        ThreadPoolExecutor(max_workers=min(_MAX_DECODERS, os.cpu_count() or 1)) as decoders,
        progress(sum(map(len, blocks)), "fetch_images", "items") as bar,
    ):
        async with AsyncExitStack() as opened:
            fetcher = _Fetcher(finder, params, _Web(params, opened), decoders)
            earlier = _EarlierShards(out)
            for block, path in zip(blocks, shards, strict=True):
                running.append(asyncio.create_task(_block(block, path, finder, fetcher, earlier, bar)))
                if len(running) == _BLOCKS_AT_ONCE:
                    await running.popleft()
            while running:
                await running.popleft()


async def _block(
    items: Sequence[Item], path: Path, finder: Finder, fetcher: _Fetcher, earlier: _EarlierShards, bar: Progress
) -> None:
    """Write one shard, unless an earlier one is valid."""

    def look() -> tuple[list[list[Source]], list[str]]:
        sources = [finder.sources(item) for item in items]
        return sources, [finder.key(item, found) for item, found in zip(items, sources, strict=True)]

    async def image(sources: Sequence[Source], known: PreparedImage | None) -> PreparedImage:
        made = known or await fetcher.image(sources)
        bar.update(1)
        return made

    sources, keys = await asyncio.to_thread(look)
    if earlier.put_back(path, items, keys):
        bar.update(len(items))
        return
    known = await asyncio.to_thread(earlier.take, keys)
    images = await asyncio.gather(*(image(found, known.get(key)) for found, key in zip(sources, keys, strict=True)))
    rows = [
        ImageRow(item.item_id, item.raw_item_id, made.status, made.image, made.width, made.height, made.reason)
        for item, made in zip(items, images, strict=True)
    ]
    await asyncio.to_thread(write_shard, path, rows, keys)
