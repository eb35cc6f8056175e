"""Fetch one raw file from one source to ``<name>.part`` and check it; the caller moves it into place.

* ``<name>.part.json`` beside it holds the validator (etag or date), so that an interrupted download resumes with ``Range``
  and ``If-Range`` (RFC 9110 sections 13.1.5 and 14.2); without a validator, or with another one, it restarts.
* Bodies are stored as sent (``Accept-Encoding: identity``).  Before a file is accepted, a gzip file is read to its end,
  and the directory of a zip file or all headers of a tar file are checked; images are checked one by one later.
* Retries count attempts without progress, so a long file may need many short connections.
* Time and size are bounded: no response, or less than 1 KiB/s over ``timeout_seconds``, is a stall, and a body may not be
  longer than ``max_file_bytes``.
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
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sda_core.artifacts import write_json
from sda_core.data.file_kind import HEAD_BYTES, binary_kind, wrong_kind
from sda_core.fetch.archives import UnusableError, archive_kind, check_archive
from sda_core.fetch.folders import remove
from sda_core.fetch.http import AttemptError, backoff, content_length, exchange, reason, status_line
from sda_core.fetch.manifest import Role
from sda_core.fingerprint import sha256_file
from sda_core.log import progress
from sda_core.params import DownloadParams

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_MIN_BYTES_PER_SECOND = 1024
_PROGRESS_BYTES = 1 << 20  # an attempt with this much new data resets the number of retries
_DISK_RESERVE_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_MAX_EXPANSION = 300  # JSON lines compress to about a fifth; the limit of deflate is 1032
_EXPANSION_FREE_BYTES = 1 << 30


class RejectedError(Exception):
    """The source cannot be used; the text gives the reason."""


def _usable(value: object) -> str | None:
    """A validator, or None if it cannot be sent in a header."""
    return value if isinstance(value, str) and re.fullmatch(r"[\x20-\x7e]{1,1000}", value) else None


_Validator = Annotated[str | None, BeforeValidator(_usable)]


class _Version(BaseModel):
    """The version of the file to which a ``.part`` file belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str
    etag: _Validator
    last_modified: _Validator

    @classmethod
    def of(cls, response: httpx.Response, source: str) -> _Version:
        """The version in a response."""
        return cls(source=source, etag=response.headers.get("etag"), last_modified=response.headers.get("last-modified"))

    @property
    def validator(self) -> str | None:
        """The validator for ``If-Range``, which does not allow weak etags."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def matches(self, response: httpx.Response) -> bool:
        """Whether a response may have this version: a strong etag decides, else all fields that both have."""
        own = {"etag": self.etag} if self.validator == self.etag else {"etag": self.etag, "last-modified": self.last_modified}
        return all(value is None or response.headers.get(name, value) == value for name, value in own.items())


@dataclass(frozen=True)
class Wanted:
    """One file to fetch: its target and its expected properties."""

    target: Path
    role: Role
    sha256: str | None

    @property
    def part(self) -> Path:
        """Path of the partial file."""
        return self.target.with_name(f"{self.target.name}.part")


def without_credentials(source: str) -> str:
    """A source without user name and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "", source)


# ------------------------------------------------------------------------------------------------- checks
def _check_kind(head: bytes, wanted: Wanted, is_html: bool = False) -> None:
    """Reject a file of a wrong kind, by its first :data:`HEAD_BYTES` bytes.

    Raises:
        RejectedError: an HTML page or other markup, a name that ends in ``.gz`` without gzip contents, or images that are
            not in an archive.
    """
    found, advice = wrong_kind(head), ""
    if wanted.role == "images":
        kind, is_wrong = "zip or tar file", archive_kind(head) is None
        found, advice = binary_kind(head), "pack the images as .zip or plain .tar"
    elif wanted.target.name.lower().endswith(".gz"):
        kind, is_wrong = "gzip file", not head.startswith(_GZIP_MAGIC)
    else:
        kind = "file of JSON lines"
        # lines never begin with a tag in any edition; gzip is detected under any name
        is_wrong = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") or binary_kind(head) is not None
    begin = repr(head[:32].decode("utf-8", "replace"))
    if is_wrong and (is_html or _HTML.match(head)):
        raise RejectedError(f"the server sent an HTML page instead of the file (it begins {begin})")
    if wanted.role == "images" and head.startswith(_GZIP_MAGIC):
        raise RejectedError("is a gzip file, in which single images cannot be reached; unpack it to .tar, or take a .zip")
    if is_wrong:
        known = f": it is {found.name}; {advice or found.advice}" if found else ""
        raise RejectedError(f"is not a {kind} (it begins {begin}){known}")
    if wanted.role != "images" and found is not None:
        raise RejectedError(str(found))


def check_contents(path: Path, wanted: Wanted) -> None:
    """Reject a file of the wrong kind, or one that cannot be decompressed.

    Args:
        path: the file, which need not be in its final place yet.
        wanted: name and role, which determine the expected kind.

    Raises:
        RejectedError: with the reason.
    """
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    _check_kind(head, wanted)
    try:
        if wanted.role == "images":
            check_archive(path)
        elif head.startswith(_GZIP_MAGIC):
            _check_gzip(path)
    except UnusableError as problem:
        raise RejectedError(f"{archive_kind(head)} cannot be used ({problem})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RejectedError(f"gzip is truncated or damaged ({reason(error)})") from None
    except OSError as error:
        raise RejectedError(f"cannot be read ({reason(error)})") from None


def _check_gzip(path: Path) -> None:
    limit = max(_EXPANSION_FREE_BYTES, _MAX_EXPANSION * path.stat().st_size)
    size = 0
    with gzip.open(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise RejectedError(f"gzip unpacks to more than {_MAX_EXPANSION} times its size; no data of a shop does")


def _check_whole(wanted: Wanted) -> str:
    """Reject a ``.part`` file that is empty, damaged or not the expected one; return its sha256."""
    if wanted.part.stat().st_size == 0:
        raise RejectedError("is empty")
    digest = sha256_file(wanted.part)
    if wanted.sha256 not in (None, digest):
        raise RejectedError(f"sha256 is {digest} (expected {wanted.sha256})")
    check_contents(wanted.part, wanted)
    return digest


def _check_room(folder: Path, total: int, present: int, params: DownloadParams) -> None:
    """Reject a size above the limit or the free space; ``present`` bytes of it are already on the disk."""
    if total > params.max_file_bytes:
        raise RejectedError(f"has {total} bytes, more than download.max_file_bytes ({params.max_file_bytes})")
    free = shutil.disk_usage(folder).free
    if total - present + _DISK_RESERVE_BYTES > free:
        raise RejectedError(f"needs {total - present} more bytes, and the disk has {free} left")


async def _store(
    chunks: AsyncGenerator[bytes], wanted: Wanted, verb: str, start: int, total: int | None, max_bytes: int, is_html: bool = False
) -> int:
    """Append bytes to the ``.part`` file and return its size; reject a wrong kind or length as early as possible."""
    size, head = start, bytearray()
    with (
        wanted.part.open("ab") as writer,
        progress(total, f"{verb} {wanted.target.name}", "B", initial=start) as bar,
    ):
        async with aclosing(chunks):
            async for chunk in chunks:
                size += len(chunk)
                if size > (max_bytes if total is None else total):
                    bound = "allowed" if total is None else "announced"
                    raise RejectedError(f"the body is longer than {bound} ({size} bytes and more)")
                if start == 0 and len(head) < HEAD_BYTES:
                    head += chunk[: HEAD_BYTES - len(head)]
                    if len(head) == HEAD_BYTES:
                        _check_kind(bytes(head), wanted, is_html)
                writer.write(chunk)
                writer.flush()  # so that an interruption loses no received data
                bar.update(len(chunk))
        os.fsync(writer.fileno())
    if 0 < len(head) < HEAD_BYTES and total in (None, size):
        _check_kind(bytes(head), wanted, is_html)
    return size


# -------------------------------------------------------------------------------------------------- local
async def copy_file(source: Path, wanted: Wanted, params: DownloadParams) -> str:
    """Copy a local file to the ``.part`` file and check it; returns its sha256.

    Raises:
        RejectedError: there is no such file, it cannot be read, or it is not the expected one.
    """
    part = wanted.part
    with _open(source) as reader:
        discard_part(part)
        size = os.fstat(reader.fileno()).st_size
        _check_room(part.parent, size, 0, params)
        try:
            await _store(_contents(reader, size), wanted, "copy", 0, size, params.max_file_bytes)
            return _check_whole(wanted)
        except (RejectedError, OSError):
            discard_part(part)
            raise


async def _contents(reader: BinaryIO, size: int) -> AsyncGenerator[bytes]:
    copied = 0
    while copied <= size and (chunk := _read(reader)):
        copied += len(chunk)
        if copied <= size:
            yield chunk
    if copied != size:
        raise RejectedError("changed while it was copied")


def _open(source: Path) -> BinaryIO:
    try:
        if not source.is_file():
            raise RejectedError(f"{'is not a regular file' if source.exists() else 'there is no such file'} ({source})")
        return source.open("rb")
    except (OSError, ValueError) as error:
        raise RejectedError(f"cannot be read ({reason(error)})") from None


def _read(reader: BinaryIO) -> bytes:
    try:
        return reader.read(_CHUNK_BYTES)
    except OSError as error:
        raise RejectedError(f"cannot be read ({reason(error)})") from None


# ---------------------------------------------------------------------------------------------------- web
def _part_record(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def discard_part(part: Path) -> None:
    """Remove a partial file and its validator."""
    remove(part)
    remove(_part_record(part))


def _size(path: Path) -> int:
    """Size of a partial file; 0 for a link, because its target may be anywhere."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def _resumable(part: Path, source: str) -> tuple[int, _Version | None]:
    """The number of bytes already fetched from this source, and their version; ``(0, None)`` if unknown."""
    num_bytes, path = _size(part), _part_record(part)
    try:
        record = _Version.model_validate_json(path.read_bytes()) if num_bytes and _size(path) else None
    except (OSError, ValidationError):
        return 0, None
    return (num_bytes, record) if record and record.source == source and record.validator else (0, None)


async def fetch_file(client: httpx.AsyncClient, source: str, wanted: Wanted, params: DownloadParams) -> tuple[str, str | None]:
    """Fetch one address to the ``.part`` file and check it; returns its sha256 and etag.

    Raises:
        RejectedError: the response is not the expected file, or all attempts failed.
    """
    part = wanted.part
    highest, _ = _resumable(part, without_credentials(source))
    num_failures = 0
    while True:
        try:
            return await _attempt(client, source, wanted, params)
        except AttemptError as error:
            if error.is_final:
                raise RejectedError(str(error)) from None
            failure = error
        if _size(part) >= highest + _PROGRESS_BYTES:
            num_failures = 0
        highest = max(highest, _size(part))
        if num_failures == params.num_retries:
            raise RejectedError(f"{failure} (retries without progress: {num_failures})")
        wait_seconds = backoff(num_failures, params.backoff_seconds, source, failure.wait_seconds)
        num_failures += 1
        _log.warning("%s: %s; trying again in %.1f s", without_credentials(source), failure, wait_seconds)
        await asyncio.sleep(wait_seconds)


async def _attempt(client: httpx.AsyncClient, source: str, wanted: Wanted, params: DownloadParams) -> tuple[str, str | None]:
    """One request, which continues the ``.part`` file or restarts it."""
    part = wanted.part
    offset, record = _resumable(part, without_credentials(source))
    headers = {"Range": f"bytes={offset}-", "If-Range": record.validator or ""} if record else {}
    async with exchange(client, source, params.timeout_seconds, headers, whole=False) as response:
        start, total = _where(response, offset, record, part)
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity" and (wanted.role == "images" or not wanted.target.name.lower().endswith(".gz")):
            raise RejectedError(f"came with Content-Encoding {encoding}, though identity was asked for")
        if start == 0 or record is None:
            record = _Version.of(response, without_credentials(source))
            discard_part(part)
        if total is not None:
            _check_room(part.parent, total, start, params)
        if start == 0:
            write_json(_part_record(part), record.model_dump(mode="json"))
        if start == 0 or start != total:
            is_html = response.headers.get("content-type", "").lower().startswith("text/html")
            try:
                body = _body(response, params.timeout_seconds)
                size = await _store(body, wanted, "download", start, total, params.max_file_bytes, is_html)
            except RejectedError:
                discard_part(part)
                raise
            if total is not None and size != total:
                raise AttemptError(f"the body ended at byte {size} of {total}")
    try:
        digest = _check_whole(wanted)
    except RejectedError as problem:
        discard_part(part)
        if start > 0 or total is None:  # the old part may be damaged, or the body ended early without notice
            raise AttemptError(str(problem)) from None
        raise
    return digest, record.etag


async def _body(response: httpx.Response, timeout_seconds: float) -> AsyncGenerator[bytes]:
    """The chunks of the body; raises :class:`AttemptError` if it is too slow."""
    window_began, window_bytes = time.monotonic(), 0
    async for chunk in response.aiter_raw():
        yield chunk
        window_bytes += len(chunk)
        elapsed = time.monotonic() - window_began
        if elapsed >= timeout_seconds:
            if window_bytes < _MIN_BYTES_PER_SECOND * elapsed:
                raise AttemptError(f"the transfer is too slow ({window_bytes} bytes in {elapsed:.1f} s)")
            window_began, window_bytes = time.monotonic(), 0


def _where(response: httpx.Response, offset: int, record: _Version | None, part: Path) -> tuple[int, int | None]:
    """The byte at which the body begins, and the size of the whole file (None: unknown).

    Raises:
        RejectedError: the response is a permanent error.
        AttemptError: the range does not fit the partial file.
    """
    status = response.status_code
    if status == 200:
        return 0, content_length(response)
    if record is None or status not in (206, 416):
        raise RejectedError(status_line(response))
    span = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", response.headers.get("content-range", "").strip())
    total = int(span[2]) if span and span[2] != "*" else None
    begin = int(span[1]) if span and span[1] else None
    same_version = record.matches(response)
    if same_version and status == 206 and begin == offset and (total is None or total > offset):
        return offset, total
    if same_version and status == 416 and total == offset:  # the interrupted run had fetched all of it
        return offset, total
    discard_part(part)
    raise AttemptError(f"the server cannot continue from byte {offset}, starting over", wait_seconds=0.0)
