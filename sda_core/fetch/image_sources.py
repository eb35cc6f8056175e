"""Possible sources of an item's image (folders, an archive, an address), and the key that identifies its contents.

References are untrusted: paths that are absolute, have ``..`` or are not plain are not followed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import assert_never

import httpx

from sda_core.fetch.archives import Entry, ImageArchive, Reason, plain_path
from sda_core.fetch.image_names import NUM_EXAMPLES, ImageFolder, ItemNames
from sda_core.fingerprint import sha256_file
from sda_core.params import FetchImagesParams

_log = logging.getLogger(__name__)

_REASONS: dict[Reason, str] = {
    "no_item": "do not match a kept item (an image is named <item id>.jpg, or its path is in the metadata)",
    "no_image": "have no image extension",
    "unsafe_path": "have absolute paths, or paths that leave the folder, and are skipped; pack the folder with relative paths",
    "no_file": "are links or devices and are skipped; pack the files themselves (tar --dereference --hard-dereference)",
}

_FORMAT = "pictures 3"  # part of every key; changing it would fetch all images again, hence the old word
_MAX_REFERENCES = 16


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
    """A reference without a source, with the status that explains it."""

    status: str


Source = Address | LocalFile | Entry | Nothing


@dataclass(frozen=True)
class Item:
    """The metadata about one item's image."""

    item_id: int
    raw_item_id: str
    references: tuple[str, ...]

    def relative_paths(self) -> list[str]:
        """The references that are plain, relative paths."""
        paths = (_relative_path(reference) for reference in self.references[:_MAX_REFERENCES])
        return [path.as_posix() for path in paths if path is not None]


def _relative_path(reference: str) -> PurePosixPath | None:
    return plain_path(reference.strip().replace("\\", "/"))


def _is_address(reference: str) -> bool:
    return reference.lower().startswith(("http://", "https://", "//"))


def open_archive(path: Path, items: Collection[Item]) -> ImageArchive:
    """Open the image archive for the entries of these items.

    Raises:
        ArtifactError: the file is not a readable archive.
    """
    paths = {wanted for item in items for wanted in item.relative_paths()}
    return ImageArchive(path, paths, {item.raw_item_id for item in items})


@dataclass
class Finder:
    """Finds the sources of images and their keys; folders are listed on construction.

    ``items`` are the ids of all items, because a file in a folder matches only one item.
    """

    local_folder: Path | None
    image_folder: Path | None
    archive: ImageArchive | None
    params: FetchImagesParams
    items: ItemNames

    def __post_init__(self) -> None:
        """List the folders."""
        places = ((self.local_folder, "images"), (self.image_folder, ""))
        self._folders = [ImageFolder(root, named, self.items) for root, named in places if root is not None]

    def sources(self, item: Item) -> list[Source]:
        """The sources of an item's image, best first; empty if there are none."""
        references = [reference.strip() for reference in item.references[:_MAX_REFERENCES]]
        found: list[Source] = []
        named = (folder.of(item.raw_item_id) for folder in self._folders)
        found += [LocalFile(path) for path in named if path is not None]
        found += [self._relative(reference) for reference in references if not _is_address(reference)]
        if self.archive is not None and (entry := self.archive.of(item.raw_item_id)) is not None:
            found.append(entry)
        found += [self._address(reference) for reference in references if _is_address(reference)]
        return list(dict.fromkeys(found))

    def _relative(self, reference: str) -> Source:
        path = _relative_path(reference)
        if path is None:
            return Nothing("missing_file" if reference else "missing_url")
        for folder in self._folders:
            file = folder.at(path)
            if file is not None:
                return LocalFile(file)
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
        """Hash of everything on which an item's image depends."""
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

    def passed_over(self) -> dict[str, int]:
        """Count the unused files by reason, and log the first ones; call this after all items were processed.

        Returns:
            ``num_folder_<reason>`` if there is a folder, ``num_archive_<reason>`` if there is an archive.
        """
        counts: dict[str, int] = {}
        for folder in self._folders:
            reasons: tuple[Reason, Reason] = ("no_item", "no_image")
            for reason, names in zip(reasons, folder.unused(), strict=True):
                name = f"num_folder_{reason}"
                counts[name] = counts.get(name, 0) + len(names)
                _log_unused(folder.directory.path, reason, len(names), names, len(folder.directory.files))
        if self.archive is not None:
            for reason in _REASONS:
                number = self.archive.passed_over[reason]
                counts[f"num_archive_{reason}"] = number
                _log_unused(self.archive.path, reason, number, self.archive.examples.get(reason, []), self.archive.num_files)
        return counts

    def read(self, source: LocalFile | Entry) -> bytes | str:
        """The bytes of a local image, or the status that explains why it cannot be read."""
        limit = self.params.max_bytes
        try:
            if isinstance(source, Entry):
                return "missing_file" if self.archive is None else self.archive.read(source, limit)
            with source.path.open("rb") as stream:
                data = stream.read(limit + 1)
            return "too_large" if len(data) > limit else data
        except OSError as error:
            _log.warning("%s", error)
            return "missing_file"


def _log_unused(place: Path, reason: Reason, number: int, names: Sequence[str], num_files: int) -> None:
    if number:
        level = logging.WARNING if number == num_files or reason in ("unsafe_path", "no_file") else logging.INFO
        shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names[:NUM_EXAMPLES]]
        more = ["..."] if number > NUM_EXAMPLES else []
        _log.log(level, "%s: %d files %s: %s", place, number, _REASONS[reason], ", ".join(shown + more))
