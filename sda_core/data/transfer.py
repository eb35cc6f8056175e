"""One raw file from one source: into ``<name>.part``, checked; putting it in place is the caller's.

* ``<name>.part.json`` beside it holds the validator (etag or date) of what is being fetched, so that a killed run goes
  on with ``Range`` and ``If-Range`` (RFC 9110 sections 13.1.5 and 14.2); without a validator, or with another one, it
  begins anew.
* Bodies are stored as sent (``Accept-Encoding: identity``); every gzip file is read to its end before it is accepted.
* The number of retries counts attempts without progress, so that a long file survives many short connections.
* Waits are bounded on both sides: no answer, or less than 1 KiB/s over ``timeout_seconds``, is a stall, and no body may
  be longer than ``max_file_bytes``.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from sda_core.artifacts import write_json
from sda_core.data.web import RETRIED_STATUSES, backoff, content_length, reason, retry_after
from sda_core.fingerprint import sha256_file
from sda_core.log import progress
from sda_core.params import DownloadParams

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_MIN_BYTES_PER_SECOND = 1024
_PROGRESS_BYTES = 1 << 20  # an attempt that brings this much new data gives back all retries
_DISK_RESERVE_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


class RefusedError(Exception):
    """This source will not do; the text says why."""


class _RetryError(Exception):
    """This attempt failed; another one may not."""

    def __init__(self, problem: str, wait_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.wait_seconds = wait_seconds


class _Version(BaseModel):
    """What a ``.part`` file is a piece of."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """For ``If-Range``, which takes no weak etag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


def part_path(target: Path) -> Path:
    """Where a file is gathered before it is whole."""
    return target.with_name(f"{target.name}.part")


def shown(source: str) -> str:
    """A source without the user name and password that an address may carry."""
    if "://" not in source or "@" not in source:
        return source
    parts = urlsplit(source)
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))


# ------------------------------------------------------------------------------------------------- checks
def _check_head(head: bytes, name: str, content_type: str) -> None:
    """Refuse what cannot become the file, from its first bytes.

    Raises:
        RefusedError: an HTML page or other markup, or no gzip under a name that ends in ``.gz``.
    """
    if name.lower().endswith(".gz"):
        wrong = not _GZIP_MAGIC.startswith(head[:2]) if len(head) < 2 else not head.startswith(_GZIP_MAGIC)
    else:
        wrong = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")  # no edition's lines begin so
    if not wrong:
        return
    if content_type.lower().startswith("text/html") or _HTML.match(head):
        raise RefusedError(f"an HTML page came instead of the file (it begins {_quote(head)})")
    kind = "gzip file" if name.lower().endswith(".gz") else "file of JSON lines"
    raise RefusedError(f"is no {kind} (it begins {_quote(head)})")


def _quote(head: bytes) -> str:
    return repr(head[:32].decode("utf-8", "replace"))


def _check_whole(path: Path, name: str, sha256: str | None) -> str:
    """Refuse a file that is empty, damaged or not the expected one; give its sha256.

    Raises:
        RefusedError: with the reason.
    """
    if path.stat().st_size == 0:
        raise RefusedError("is empty")
    digest = sha256_file(path)
    if sha256 not in (None, digest):
        raise RefusedError(f"sha256 is {digest} (expected {sha256})")
    if name.lower().endswith(".gz"):
        try:
            with gzip.open(path) as stream:
                while stream.read(_CHUNK_BYTES):
                    pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise RefusedError(f"gzip is truncated or damaged ({reason(error)})") from None
    return digest


def _check_room(folder: Path, total: int, present: int, params: DownloadParams) -> None:
    """Refuse a size that is not allowed, or has no room; ``present`` bytes of it are on the disk already."""
    if total > params.max_file_bytes:
        raise RefusedError(f"has {total} bytes, more than download.max_file_bytes ({params.max_file_bytes})")
    free = shutil.disk_usage(folder).free
    if total - present + _DISK_RESERVE_BYTES > free:
        raise RefusedError(f"needs {total - present} more bytes, and the disk has {free} left")


# -------------------------------------------------------------------------------------------------- local
def copy_file(source: Path, target: Path, sha256: str | None, params: DownloadParams) -> str:
    """Copy a local file to the ``.part`` of ``target``, checked; gives its sha256.

    Raises:
        RefusedError: there is no such file, or it is not the expected one.
    """
    try:
        if not source.exists():
            raise RefusedError(f"there is no such file ({source})")
        if not source.is_file():
            raise RefusedError(f"is no regular file ({source})")
        size = source.stat().st_size
        reader = source.open("rb")
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot be read ({reason(error)})") from None
    part = part_path(target)
    discard_part(part)
    with reader:
        _check_room(target.parent, size, 0, params)
        _check_head(reader.read(512), target.name, "")
        reader.seek(0)
        with part.open("wb") as writer, progress(size, f"copy {target.name}", "B") as bar:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                bar.update(len(chunk))
            _sync(writer)
    try:
        digest = _check_whole(part, target.name, sha256)
    except RefusedError:
        discard_part(part)
        raise
    return digest


def _sync(writer: BinaryIO) -> None:
    writer.flush()
    os.fsync(writer.fileno())


# ---------------------------------------------------------------------------------------------------- web
def _part_record(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def discard_part(part: Path) -> None:
    """Remove an unfinished file and the record of what it is a piece of."""
    part.unlink(missing_ok=True)
    _part_record(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _resumable(part: Path, source: str) -> tuple[int, _Version | None]:
    """How many bytes of this source are there already, and of which version; ``(0, None)`` where one cannot tell."""
    try:
        record = _Version.model_validate_json(_part_record(part).read_bytes())
    except (OSError, ValidationError):
        return 0, None
    if record.source != source or record.validator is None or _size(part) == 0:
        return 0, None
    return _size(part), record


async def fetch_file(
    client: httpx.AsyncClient, source: str, target: Path, sha256: str | None, params: DownloadParams
) -> tuple[str, str | None]:
    """Fetch one address to the ``.part`` of ``target``, checked; gives its sha256 and etag.

    Raises:
        RefusedError: what the address gives is not the file, or it gave nothing in all attempts.
    """
    part = part_path(target)
    highest, _ = _resumable(part, shown(source))
    num_failures = 0
    while True:
        wait_seconds = None
        try:
            return await _attempt(client, source, target.name, part, sha256, params)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise RefusedError(reason(error)) from None
        except (httpx.TimeoutException, TimeoutError):
            problem = f"no answer for {params.timeout_seconds:g} s"
        except httpx.TransportError as error:
            problem = reason(error)
        except _RetryError as error:
            problem = str(error)
            wait_seconds = error.wait_seconds
        if _size(part) >= highest + _PROGRESS_BYTES:
            num_failures = 0
        highest = max(highest, _size(part))
        num_failures += 1
        if num_failures > params.num_retries:
            raise RefusedError(f"{problem} (retries without progress: {num_failures - 1})")
        if wait_seconds is None:
            wait_seconds = backoff(num_failures - 1, params.backoff_seconds, source)
        _log.warning("%s: %s; trying again in %.1f s", shown(source), problem, wait_seconds)
        await asyncio.sleep(wait_seconds)


async def _attempt(
    client: httpx.AsyncClient, source: str, name: str, part: Path, sha256: str | None, params: DownloadParams
) -> tuple[str, str | None]:
    """One request: go on with the ``.part`` file, or begin anew."""
    offset, record = _resumable(part, shown(source))
    headers = {"Range": f"bytes={offset}-", "If-Range": record.validator or ""} if record else {}
    async with asyncio.timeout(params.timeout_seconds):
        response = await client.send(client.build_request("GET", source, headers=headers), stream=True)
    try:
        start, total = _where(response, offset, record, part)
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity" and not name.lower().endswith(".gz"):
            raise RefusedError(f"came with Content-Encoding {encoding}, though identity was asked for")
        if total is not None:
            _check_room(part.parent, total, start, params)
        if start == 0 or record is None:
            record = _Version(
                source=shown(source), etag=response.headers.get("etag"), last_modified=response.headers.get("last-modified")
            )
            discard_part(part)
            write_json(_part_record(part), record.model_dump(mode="json"))
        if start != total:
            await _receive(response, part, name, start, total, params)
    finally:
        await response.aclose()
    try:
        if not part.exists():
            raise RefusedError("is empty")
        digest = _check_whole(part, name, sha256)
    except RefusedError as problem:
        discard_part(part)
        if start > 0 or total is None:  # the old piece may be bad, or the end came early without our noticing
            raise _RetryError(str(problem)) from None
        raise
    return digest, record.etag


def _where(response: httpx.Response, offset: int, record: _Version | None, part: Path) -> tuple[int, int | None]:
    """At which byte the body begins, and how many bytes the whole file has (None: unknown).

    Raises:
        RefusedError: the answer is an error that stays.
        _RetryError: an error that may pass, or a range that does not fit what is there.
    """
    status = response.status_code
    if status in RETRIED_STATUSES:
        raise _RetryError(f"HTTP {status} {response.reason_phrase}", retry_after(response))
    if status == 200:
        return 0, content_length(response)
    if record is None or status not in (206, 416):
        raise RefusedError(f"HTTP {status} {response.reason_phrase}".rstrip())
    span = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", response.headers.get("content-range", "").strip())
    total = int(span[2]) if span and span[2] != "*" else None
    begin = int(span[1]) if span and span[1] else None
    same_version = record.etag is None or response.headers.get("etag", record.etag) == record.etag
    if same_version and status == 206 and begin == offset and (total is None or total > offset):
        return offset, total
    if same_version and status == 416 and total == offset:  # the killed run had all of it
        return offset, total
    discard_part(part)
    raise _RetryError(f"the server cannot go on from byte {offset}, beginning anew", 0.0)


async def _receive(
    response: httpx.Response, part: Path, name: str, start: int, total: int | None, params: DownloadParams
) -> None:
    """Append a body to the ``.part`` file.

    Raises:
        RefusedError: the wrong kind of file, or too long.
        _RetryError: too slow, or too short.
    """
    size = start
    head = bytearray()
    window_began, window_bytes = time.monotonic(), 0
    try:
        with part.open("ab") as writer, progress(total, f"download {name}", "B", initial=start) as bar:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > (params.max_file_bytes if total is None else min(total, params.max_file_bytes)):
                    raise RefusedError(
                        f"the body is longer than {'allowed' if total is None else 'announced'} ({size} bytes and more)"
                    )
                if start == 0 and len(head) < 512:
                    head += chunk[:512]
                    _check_head(bytes(head), name, response.headers.get("content-type", ""))
                writer.write(chunk)
                bar.update(len(chunk))
                window_bytes += len(chunk)
                elapsed = time.monotonic() - window_began
                if elapsed >= params.timeout_seconds:
                    if window_bytes < _MIN_BYTES_PER_SECOND * elapsed:
                        raise _RetryError(f"the body drips ({window_bytes} bytes in {elapsed:.1f} s)")
                    window_began, window_bytes = time.monotonic(), 0
            _sync(writer)
    except RefusedError:
        discard_part(part)
        raise
    if total is not None and size != total:
        raise _RetryError(f"the body ended at byte {size} of {total}")
