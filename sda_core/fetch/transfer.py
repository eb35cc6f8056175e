"""One raw file from one source: into ``<name>.part``, checked; putting it in place is the caller's.

* ``<name>.part.json`` beside it holds the validator (etag or date) of what is being fetched, so that a killed run goes
  on with ``Range`` and ``If-Range`` (RFC 9110 sections 13.1.5 and 14.2); without a validator, or with another one, it
  starts over.
* Bodies are stored as sent (``Accept-Encoding: identity``).  Before a file is accepted, a gzip file is read to its end,
  and the directory of a zip file or the chain of a tar file's headers is followed; images are looked at one by one later.
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
import ssl
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sda_core.artifacts import write_json
from sda_core.data.file_kind import HEAD_BYTES, binary_kind, wrong_kind
from sda_core.fetch.archives import UnusableError, check_archive
from sda_core.fetch.folders import remove
from sda_core.fetch.http import RETRIED_STATUSES, backoff, certificate_problem, content_length, open_stream, reason, retry_after
from sda_core.fetch.manifest import Role
from sda_core.fingerprint import sha256_file
from sda_core.log import progress
from sda_core.params import DownloadParams

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_MIN_BYTES_PER_SECOND = 1024
_PROGRESS_BYTES = 1 << 20  # an attempt that brings this much new data gives back all retries
_DISK_RESERVE_BYTES = 64 << 20
_HEAD_BYTES = 512  # enough to tell what a file is
_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an empty one's
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_MAX_EXPANSION = 300  # JSON lines shrink to a fifth or so; deflate's limit is 1032
_EXPANSION_FREE_BYTES = 1 << 30
_VALIDATOR_PATTERN = r"^[\x20-\x7e]+$"  # what may stand in a header


class RefusedError(Exception):
    """This source will not do; the text says why."""


class _RetryError(Exception):
    """This attempt failed; another one may not."""

    def __init__(self, problem: str, wait_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.wait_seconds = wait_seconds


_Validator = Annotated[str, Field(pattern=_VALIDATOR_PATTERN, max_length=1000)]


class _Version(BaseModel):
    """What a ``.part`` file is a piece of."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str
    etag: _Validator | None
    last_modified: _Validator | None

    @classmethod
    def of(cls, response: httpx.Response, source: str) -> _Version:
        """What an answer says of itself; a validator that could not be sent back is none."""

        def usable(name: str) -> str | None:
            value = response.headers.get(name, "")
            return value if len(value) <= 1000 and re.fullmatch(_VALIDATOR_PATTERN, value) else None

        return cls(source=source, etag=usable("etag"), last_modified=usable("last-modified"))

    @property
    def validator(self) -> str | None:
        """For ``If-Range``, which takes no weak etag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def matches(self, response: httpx.Response) -> bool:
        """Whether an answer may be of this version: a strong etag decides, else all that both sides say."""
        names = ["etag"] if self.etag and not self.etag.startswith("W/") else ["etag", "last-modified"]
        own = {"etag": self.etag, "last-modified": self.last_modified}
        return all(own[name] is None or response.headers.get(name, own[name]) == own[name] for name in names)


@dataclass(frozen=True)
class Wanted:
    """One file to get: where it goes, and what it must be."""

    target: Path
    role: Role
    sha256: str | None

    @property
    def part(self) -> Path:
        """Where it is gathered before it is whole."""
        return self.target.with_name(f"{self.target.name}.part")


def shown(source: str) -> str:
    """A source without the user name and password that an address may carry."""
    return re.sub(r"(?<=://)[^/?#]*@", "", source)


# ------------------------------------------------------------------------------------------------- checks
def _check_head(head: bytes, wanted: Wanted, content_type: str) -> None:
    """Refuse what cannot become the file, from its first bytes; a few bytes may leave it open.

    Raises:
        RefusedError: an HTML page or other markup, no gzip under a name that ends in ``.gz``, or no archive of images.
    """
    name = wanted.target.name.lower()
    html = content_type.lower().startswith("text/html")
    if wanted.role == "images":
        kind = "zip or tar file"
        known = len(head) >= _TAR_MAGIC_AT + len(_TAR_MAGIC) or bool(_HTML.match(head)) or head.startswith(_GZIP_MAGIC)
        known = known or binary_kind(head) is not None
        wrong = known and not _is_zip(head) and not _is_tar(head)
    elif name.endswith(".gz"):
        kind = "gzip file"
        wrong = not _GZIP_MAGIC.startswith(head[:2]) if len(head) < 2 else not head.startswith(_GZIP_MAGIC)
    else:
        kind = "file of JSON lines"
        # no edition's lines begin with a tag; gzip under any name is read as such
        wrong = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") or binary_kind(head) is not None
    if not wrong:
        return
    if html or _HTML.match(head):
        raise RefusedError(f"an HTML page came instead of the file (it begins {_quote(head)})")
    if wanted.role == "images" and head.startswith(_GZIP_MAGIC):
        raise RefusedError("is a gzip file, in which single images cannot be reached; unpack it to .tar, or take a .zip")
    found, advice = wrong_kind(head), None
    if wanted.role == "images":
        found, advice = binary_kind(head), "pack the images as .zip or plain .tar"
    told = f": it is {found.name}; {advice or found.advice}" if found else ""
    raise RefusedError(f"is no {kind} (it begins {_quote(head)}){told}")


def _is_zip(head: bytes) -> bool:
    return head.startswith(_ZIP_MAGICS)


def _is_tar(head: bytes) -> bool:
    return head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC)


def _quote(head: bytes) -> str:
    return repr(head[:32].decode("utf-8", "replace"))


def _check_whole(path: Path, wanted: Wanted) -> str:
    """Refuse a file that is empty, damaged or not the expected one; give its sha256.

    Raises:
        RefusedError: with the reason.
    """
    if path.stat().st_size == 0:
        raise RefusedError("is empty")
    digest = sha256_file(path)
    if wanted.sha256 not in (None, digest):
        raise RefusedError(f"sha256 is {digest} (expected {wanted.sha256})")
    check_contents(path, wanted)
    return digest


def check_contents(path: Path, wanted: Wanted) -> None:
    """Refuse a file that is of the wrong kind or does not unpack.

    Args:
        path: the file, which need not be in its place yet.
        wanted: its name and role say what it must be.

    Raises:
        RefusedError: with the reason.
    """
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    _check_head(head[:_HEAD_BYTES], wanted, "")
    if wanted.role != "images":
        if (text := wrong_kind(head)) is not None:
            raise RefusedError(str(text))
        if head.startswith(_GZIP_MAGIC):
            _check_gzip(path)
    elif _is_zip(head):
        _check_archive(path, "zip")
    elif _is_tar(head):
        _check_archive(path, "tar")
    else:
        raise RefusedError(f"is no zip or tar file (it begins {_quote(head)})")


def _check_gzip(path: Path) -> None:
    limit = max(_EXPANSION_FREE_BYTES, _MAX_EXPANSION * path.stat().st_size)
    size = 0
    try:
        with gzip.open(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise RefusedError(f"gzip unpacks to more than {_MAX_EXPANSION} times its size; no data of a shop does")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RefusedError(f"gzip is truncated or damaged ({reason(error)})") from None


def _check_archive(path: Path, kind: str) -> None:
    try:
        check_archive(path)
    except UnusableError as problem:
        raise RefusedError(f"{kind} cannot be used ({problem})") from None
    except OSError as error:
        raise RefusedError(f"cannot be read ({reason(error)})") from None


def _check_room(folder: Path, total: int, present: int, params: DownloadParams) -> None:
    """Refuse a size that is not allowed, or has no room; ``present`` bytes of it are on the disk already."""
    if total > params.max_file_bytes:
        raise RefusedError(f"has {total} bytes, more than download.max_file_bytes ({params.max_file_bytes})")
    free = shutil.disk_usage(folder).free
    if total - present + _DISK_RESERVE_BYTES > free:
        raise RefusedError(f"needs {total - present} more bytes, and the disk has {free} left")


# -------------------------------------------------------------------------------------------------- local
def copy_file(source: Path, wanted: Wanted, params: DownloadParams) -> str:
    """Copy a local file to the ``.part`` of what is wanted, checked; gives its sha256.

    Raises:
        RefusedError: there is no such file, it cannot be read, or it is not the expected one.
    """
    part = wanted.part
    with _open(source) as reader:
        discard_part(part)
        size = os.fstat(reader.fileno()).st_size
        _check_room(part.parent, size, 0, params)
        try:
            _copy(reader, wanted, size)
            return _check_whole(part, wanted)
        except (RefusedError, OSError):
            discard_part(part)
            raise


def _copy(reader: BinaryIO, wanted: Wanted, size: int) -> None:
    copied = 0
    with wanted.part.open("wb") as writer, progress(size, f"copy {wanted.target.name}", "B") as bar:
        while copied <= size and (chunk := _read(reader)):
            if copied == 0:
                _check_head(chunk[:_HEAD_BYTES], wanted, "")
            copied += len(chunk)
            writer.write(chunk)
            bar.update(len(chunk))
        _sync(writer)
    if copied != size:
        raise RefusedError("changed while it was copied")


def _open(source: Path) -> BinaryIO:
    try:
        if not source.exists():
            raise RefusedError(f"there is no such file ({source})")
        if not source.is_file():
            raise RefusedError(f"is no regular file ({source})")
        return source.open("rb")
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot be read ({reason(error)})") from None


def _read(reader: BinaryIO) -> bytes:
    try:
        return reader.read(_CHUNK_BYTES)
    except OSError as error:
        raise RefusedError(f"cannot be read ({reason(error)})") from None


def _sync(writer: BinaryIO) -> None:
    writer.flush()
    os.fsync(writer.fileno())


# ---------------------------------------------------------------------------------------------------- web
def _part_record(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def discard_part(part: Path) -> None:
    """Remove an unfinished file and the record of what it is a piece of."""
    remove(part)
    remove(_part_record(part))


def _size(path: Path) -> int:
    """Bytes of a file of our own; a link is none, since what it leads to may lie anywhere."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def _resumable(part: Path, source: str) -> tuple[int, _Version | None]:
    """How many bytes of this source are there already, and of which version; ``(0, None)`` where one cannot tell."""
    if _size(part) == 0 or _size(_part_record(part)) == 0:
        return 0, None
    try:
        record = _Version.model_validate_json(_part_record(part).read_bytes())
    except (OSError, ValidationError):
        return 0, None
    if record.source != source or record.validator is None:
        return 0, None
    return _size(part), record


async def fetch_file(client: httpx.AsyncClient, source: str, wanted: Wanted, params: DownloadParams) -> tuple[str, str | None]:
    """Fetch one address to the ``.part`` of what is wanted, checked; gives its sha256 and etag.

    Raises:
        RefusedError: what the address gives is not the file, or it gave nothing in all attempts.
    """
    part = wanted.part
    highest, _ = _resumable(part, shown(source))
    num_failures = 0
    while True:
        wait_seconds = None
        try:
            return await _attempt(client, source, wanted, params)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise RefusedError(reason(error)) from None
        except (httpx.TimeoutException, TimeoutError):
            problem = f"no answer for {params.timeout_seconds:g} s"
        except (httpx.TransportError, ssl.SSLError) as error:  # the latter where a stream is garbled midway
            untrusted = certificate_problem(error)
            if untrusted is not None:
                raise RefusedError(untrusted) from None
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


async def _attempt(client: httpx.AsyncClient, source: str, wanted: Wanted, params: DownloadParams) -> tuple[str, str | None]:
    """One request: continue the ``.part`` file, or start over."""
    part = wanted.part
    offset, record = _resumable(part, shown(source))
    headers = {"Range": f"bytes={offset}-", "If-Range": record.validator or ""} if record else {}
    async with asyncio.timeout(params.timeout_seconds):
        response = await open_stream(client, source, headers)
    try:
        start, total = _where(response, offset, record, part)
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity" and (wanted.role == "images" or not wanted.target.name.lower().endswith(".gz")):
            raise RefusedError(f"came with Content-Encoding {encoding}, though identity was asked for")
        if start == 0 or record is None:
            record = _Version.of(response, shown(source))
            discard_part(part)
        if total is not None:
            _check_room(part.parent, total, start, params)
        if start == 0:
            write_json(_part_record(part), record.model_dump(mode="json"))
        if start != total:
            await _receive(response, wanted, start, total, params)
    finally:
        await response.aclose()
    try:
        if not part.exists():
            raise RefusedError("is empty")
        digest = _check_whole(part, wanted)
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
        raise _RetryError(_status_line(response), retry_after(response))
    if status == 200:
        return 0, content_length(response)
    if record is None or status not in (206, 416):
        raise RefusedError(_status_line(response))
    span = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", response.headers.get("content-range", "").strip())
    total = int(span[2]) if span and span[2] != "*" else None
    begin = int(span[1]) if span and span[1] else None
    same_version = record.matches(response)
    if same_version and status == 206 and begin == offset and (total is None or total > offset):
        return offset, total
    if same_version and status == 416 and total == offset:  # the killed run had all of it
        return offset, total
    discard_part(part)
    raise _RetryError(f"the server cannot continue from byte {offset}, starting over", 0.0)


def _status_line(response: httpx.Response) -> str:
    return f"HTTP {response.status_code} {response.reason_phrase[:80]}".rstrip()


async def _receive(response: httpx.Response, wanted: Wanted, start: int, total: int | None, params: DownloadParams) -> None:
    """Append a body to the ``.part`` file.

    Raises:
        RefusedError: the wrong kind of file, or too long.
        _RetryError: too slow, or too short.
    """
    part = wanted.part
    size = start
    head = bytearray()
    window_began, window_bytes = time.monotonic(), 0
    try:
        with part.open("ab") as writer, progress(total, f"download {wanted.target.name}", "B", initial=start) as bar:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > (params.max_file_bytes if total is None else min(total, params.max_file_bytes)):
                    raise RefusedError(
                        f"the body is longer than {'allowed' if total is None else 'announced'} ({size} bytes and more)"
                    )
                if start == 0 and len(head) < _HEAD_BYTES:
                    head += chunk[:_HEAD_BYTES]
                    _check_head(bytes(head), wanted, response.headers.get("content-type", ""))
                writer.write(chunk)
                writer.flush()  # so that a killed run loses nothing that came
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
