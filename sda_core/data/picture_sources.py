"""Where an item's picture may lie: folders, an archive, an address; and what identifies it there.

References are strangers' text: a path that is absolute, climbs (``..``) or is not plain is not followed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import httpx

from sda_core.data.picture_archives import SUFFIXES, Entry, PictureArchive, plain_path
from sda_core.fingerprint import sha256_file
from sda_core.params import FetchImagesParams

_log = logging.getLogger(__name__)

_FORMAT = "pictures 2"  # part of every key: another number makes all pictures anew
_MAX_REFERENCES = 16
_PLAIN_ID = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True)
class Address:
    """An http or https address."""

    url: str


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path


@dataclass(frozen=True)
class Nothing:
    """A reference that leads nowhere, and the status that says so."""

    status: str


Source = Address | LocalFile | Entry | Nothing


@dataclass(frozen=True)
class Item:
    """What is told about one item's picture."""

    item_id: int
    raw_item_id: str
    references: tuple[str, ...]

    def relative_paths(self) -> list[str]:
        """The references that are plain relative paths."""
        paths = (plain_path(reference.strip()) for reference in self.references[:_MAX_REFERENCES])
        return [path.as_posix() for path in paths if path is not None]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system
        return False


def _is_address(reference: str) -> bool:
    return reference.lower().startswith(("http://", "https://", "//"))


def open_archive(path: Path, items: Iterable[Item]) -> PictureArchive:
    """The picture archive, with what these items want of it.

    Raises:
        ArtifactError: it is no readable archive.
    """
    paths: set[str] = set()
    raw_item_ids: set[str] = set()
    for item in items:
        paths.update(item.relative_paths())
        raw_item_ids.add(item.raw_item_id)
    return PictureArchive(path, paths, raw_item_ids)


@dataclass(frozen=True)
class Finder:
    """Knows where pictures may lie, and what identifies them."""

    local_folder: Path | None
    image_folder: Path | None
    archive: PictureArchive | None
    params: FetchImagesParams

    def sources(self, item: Item) -> list[Source]:
        """Where to look for an item's picture, best first; empty where nothing is said about it."""
        references = [reference.strip() for reference in item.references[:_MAX_REFERENCES]]
        found: list[Source] = []
        if _PLAIN_ID.fullmatch(item.raw_item_id):
            for folder in (self.local_folder and self.local_folder / "images", self.image_folder):
                if folder is not None:
                    names = (folder / f"{item.raw_item_id}{suffix}" for suffix in SUFFIXES)
                    found += [LocalFile(path) for path in names if _is_file(path)][:1]
        found += [self._relative(reference) for reference in references if not _is_address(reference)]
        if self.archive is not None and (entry := self.archive.of(item.raw_item_id)) is not None:
            found.append(entry)
        found += [self._address(reference) for reference in references if _is_address(reference)]
        return list(dict.fromkeys(found))

    def _relative(self, reference: str) -> Source:
        path = plain_path(reference)
        if path is None:
            return Nothing("missing_file" if reference else "missing_url")
        for folder in (self.local_folder, self.image_folder):
            if folder is not None and _is_file(folder / path):
                return LocalFile(folder / path)
        entry = None if self.archive is None else self.archive.at(path)
        return Nothing("missing_file") if entry is None else entry

    def _address(self, reference: str) -> Source:
        if self.local_folder is not None:
            return Nothing("missing_file")
        url = f"https:{reference}" if reference.startswith("//") else reference
        try:
            return Address(url) if httpx.URL(url).host else Nothing("missing_url")
        except (httpx.InvalidURL, ValueError):  # ValueError: an internationalised name that cannot be encoded
            return Nothing("missing_url")

    def key(self, item: Item, sources: Sequence[Source]) -> str:
        """Hash of all that an item's picture depends on."""
        parts = [
            _FORMAT,
            item.raw_item_id,
            item.references,
            [self.params.max_bytes, self.params.max_pixels, self.params.stored_pixels],
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
            case Entry(num_bytes=size, crc=int(crc)):
                return ["entry", size, crc]
            case Entry(num_bytes=size):
                data = self.read(source)
                return ["entry", size, data if isinstance(data, str) else hashlib.sha256(data).hexdigest()]
            case Nothing(status):
                return ["nothing", status]
            case _:
                assert_never(source)

    def read(self, source: LocalFile | Entry) -> bytes | str:
        """The bytes of a local picture, or the status that says why there are none."""
        limit = self.params.max_bytes
        try:
            match source:
                case LocalFile(path):
                    with path.open("rb") as stream:
                        data = stream.read(limit + 1)
                    return "too_large" if len(data) > limit else data
                case Entry():
                    return "missing_file" if self.archive is None else self.archive.read(source, limit)
                case _:
                    assert_never(source)
        except OSError as error:
            _log.warning("%s", error)
            return "missing_file"
