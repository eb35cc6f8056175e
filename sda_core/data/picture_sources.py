"""Where an item's picture may lie: a local folder, an archive, an address; and what identifies it there.

References are strangers' text: a path that is absolute, climbs (``..``) or is not plain is not followed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import assert_never

import httpx

from sda_core.fingerprint import sha256_file
from sda_core.params import FetchImagesParams

_log = logging.getLogger(__name__)

_FORMAT = "pictures 1"  # part of every key: another number makes all pictures anew
_MAX_REFERENCES = 16
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ENCRYPTED = 0x1  # flag bit of a zip entry
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PLAIN_ID = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")
_PLAIN_PATH = re.compile(r"[^\\:\x00-\x1f\x7f]{1,1000}")


@dataclass(frozen=True)
class Address:
    """An http or https address."""

    url: str


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path


@dataclass(frozen=True)
class ZipEntry:
    """An entry of ``raw/images.zip``."""

    info: zipfile.ZipInfo


@dataclass(frozen=True)
class Nothing:
    """A reference that leads nowhere, and the status that says so."""

    status: str


Source = Address | LocalFile | ZipEntry | Nothing


@dataclass(frozen=True)
class Item:
    """What is told about one item's picture."""

    item_id: int
    raw_item_id: str
    references: tuple[str, ...]


def _plain_path(reference: str) -> PurePosixPath | None:
    """A relative path that stays where it begins, or None."""
    path = PurePosixPath(reference)
    if not _PLAIN_PATH.fullmatch(reference) or path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system
        return False


@dataclass(frozen=True)
class Finder:
    """Knows where pictures may lie, and what identifies them."""

    local_folder: Path | None
    archive: zipfile.ZipFile | None
    params: FetchImagesParams
    archive_lock: threading.Lock = field(default_factory=threading.Lock)  # zipfile counts its readers without one

    def sources(self, item: Item) -> list[Source]:
        """Where to look for an item's picture, best first; empty where nothing is said about it."""
        found: list[Source] = []
        if self.local_folder is not None and _PLAIN_ID.fullmatch(item.raw_item_id):
            names = (self.local_folder / "images" / f"{item.raw_item_id}{suffix}" for suffix in _SUFFIXES)
            found += [LocalFile(path) for path in names if _is_file(path)][:1]
        found += [self._source(reference.strip()) for reference in item.references[:_MAX_REFERENCES]]
        return found

    def _source(self, reference: str) -> Source:
        if reference.startswith("//"):
            reference = f"https:{reference}"
        if reference.lower().startswith(("http://", "https://")):
            if self.local_folder is not None:
                return Nothing("missing_file")
            try:
                return Address(reference) if httpx.URL(reference).host else Nothing("missing_url")
            except (httpx.InvalidURL, ValueError):  # ValueError: an internationalised name that cannot be encoded
                return Nothing("missing_url")
        path = _plain_path(reference)
        if path is None:
            return Nothing("missing_file" if reference else "missing_url")
        if self.local_folder is not None and _is_file(self.local_folder / path):
            return LocalFile(self.local_folder / path)
        if self.archive is not None:
            try:
                return ZipEntry(self.archive.getinfo(path.as_posix()))
            except KeyError:
                pass
        return Nothing("missing_file")

    def key(self, item: Item, sources: Sequence[Source]) -> str:
        """Hash of all that an item's picture depends on."""
        parts = [
            _FORMAT,
            item.raw_item_id,
            item.references,
            [self.params.max_bytes, self.params.max_pixels, self.params.max_side],
            [self._identity(source) for source in sources],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _identity(self, source: Source) -> list[str | int]:
        match source:
            case Address(url):
                return ["address", url]
            case LocalFile(path):
                try:
                    size = path.stat().st_size
                    return ["file", size, sha256_file(path) if size <= self.params.max_bytes else ""]
                except OSError:
                    return ["file", -1, ""]
            case ZipEntry(info):
                return ["entry", info.file_size, info.CRC]
            case Nothing(status):
                return ["nothing", status]
            case _:
                assert_never(source)

    def read(self, source: LocalFile | ZipEntry) -> bytes | str:
        """The bytes of a local picture, or the status that says why there are none."""
        limit = self.params.max_bytes
        try:
            match source:
                case LocalFile(path):
                    with path.open("rb") as stream:
                        data = stream.read(limit + 1)
                case ZipEntry(info):
                    if info.file_size > limit:
                        return "too_large"
                    if self.archive is None or info.flag_bits & _ENCRYPTED or info.compress_type not in _PACKINGS:
                        return "corrupt"
                    with self.archive_lock, self.archive.open(info) as stream:
                        data = stream.read(limit + 1)  # what the entry declares may be less than it holds
                case _:
                    assert_never(source)
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError):
            return "corrupt"
        except OSError as error:
            _log.warning("%s", error)
            return "missing_file"
        return "too_large" if len(data) > limit else data
