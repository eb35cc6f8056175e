"""Match names of image files, in folders and archives, with items and references.

* A file is an item's image if its name without the extension is the item's id.  Ids are case-sensitive, extensions are not.
* macOS writes accents as separate characters (NFD), other systems as one character (NFC): both match.
* A file is the image of one item: if its name is exactly an id, other readings of the name do not count.
* An id that cannot be a file name (``a/b``) is percent-encoded (``a%2Fb.jpg``); any name may be percent-encoded.
* If an item has several files, the exact id precedes other spellings, then the order of ``image_formats.SUFFIXES``, then an
  extension in lower case, then the name.
* System files (``._x.jpg``, ``__MACOSX``, ``.DS_Store``, ``Thumbs.db``) are not images.
* A reference is matched exactly first, then ignoring case, the form of accents and percent-encoding.
"""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from sda_core.fetch.image_formats import SUFFIX_ORDER

_log = logging.getLogger(__name__)

_SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"})
_MAX_DIRECTORIES = 1_024
NUM_EXAMPLES = 3


def composed(text: str) -> str:
    """The text with composed accents (Unicode NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """The text in a form that ignores case and the form of accents."""
    return text.lower() if text.isascii() else composed(composed(text).casefold())


def decoded(text: str) -> str | None:
    """The percent-decoded text; None if it is not, or not correctly, encoded."""
    if "%" not in text:
        return None
    try:
        found = unquote(text, errors="strict")
    except UnicodeDecodeError:
        return None
    return None if found == text else found


def is_system_file(path: str) -> bool:
    """Whether a file was created by the operating system; ``path`` has ``/`` between its parts."""
    name = path.rpartition("/")[2]
    return name.startswith("._") or name.lower() in _SYSTEM_FILES or "__MACOSX" in path.split("/")[:-1]


def split_name(name: str) -> tuple[str, str] | None:
    """A file name without its extension, and the extension; None if it is not that of an image."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix}") if dot and stem and f".{suffix}".lower() in SUFFIX_ORDER else None


def spelled_like(reference: str, alike: Callable[[str], Sequence[str]]) -> str | None:
    """The name that matches a reference; percent-encoding is tried literally first, then decoded.

    Args:
        reference: a name or a path.
        alike: returns the names that equal a spelling after folding, best first.
    """
    for spelling in filter(None, (reference, decoded(reference))):
        names = alike(spelling)
        if names:
            return min(names, key=lambda name: (name != spelling, composed(name) != composed(spelling)))
    return None


class ItemNames:
    """Finds ids of items by the names of files."""

    def __init__(self, item_ids: Collection[str]) -> None:
        self._exact = frozenset(item_ids)
        # if two ids differ only in the form of accents, a name that equals neither matches the smaller one
        self._composed = {composed(item_id): item_id for item_id in sorted(item_ids, reverse=True) if not item_id.isascii()}

    def of(self, stem: str) -> tuple[str, int] | None:
        """The item of a name without extension, and the distance of the spelling from the id (0 is exact)."""
        plain = decoded(stem)
        for spelling in (stem, composed(stem), *(() if plain is None else (composed(plain),))):
            item_id = spelling if spelling in self._exact else self._composed.get(spelling)
            if item_id is not None:
                return item_id, (spelling != stem) + (spelling != item_id)
        return None


class ItemFiles:
    """The best file of each item, among files that are named after items.

    Args:
        items: the items whose files are requested.
        order: sort key of an item's files from the distance of the name to the id (0 is exact) and the extension, best
            first; ties are sorted by path.
    """

    def __init__(self, items: ItemNames, order: Callable[[int, str], tuple[Any, ...]]) -> None:
        self._items = items
        self._order = order
        self._best: dict[str, tuple[Any, ...]] = {}
        self._several: set[str] = set()

    def add(self, path: str) -> bool:
        """Add a file if it matches an item; returns whether it does."""
        parts = None if is_system_file(path) else split_name(path.rpartition("/")[2])
        owner = None if parts is None else self._items.of(parts[0])
        if parts is None or owner is None:
            return False
        item_id, distance = owner
        place = (*self._order(distance, parts[1]), path)
        known = self._best.setdefault(item_id, place)
        if known != place:
            self._several.add(item_id)
            self._best[item_id] = min(known, place)
        return True

    def of(self, item_id: str) -> str | None:
        """The path of an item's file."""
        return self._best[item_id][-1] if item_id in self._best else None

    def warn_of_several(self, where: Path, which: str) -> None:
        """Log the chosen file for items with several files."""
        if self._several:
            example = min(self._several)
            _log.warning(
                "%s: %d items match several images; the first %s is used (for %s: %s)",
                *(where, len(self._several), which, example, self.of(example)),
            )


class Directory:
    """The entries of a directory, listed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: set[str] = set()
        self.directories: set[str] = set()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    with suppress(OSError):  # a link to itself
                        if entry.is_file():
                            self.files.add(entry.name)
                        elif entry.is_dir():
                            self.directories.add(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _log.warning("%s cannot be listed (%s), so no image is taken from there", path, error.strerror)

    @cached_property
    def _folded(self) -> dict[str, str]:
        """Names by folded form; several are joined with "/", which no name contains, because that needs less than a list."""
        names: dict[str, str] = {}
        for name in itertools.chain(self.files, self.directories):
            key = folded(name)
            names[key] = f"{names[key]}/{name}" if key in names else name
        return names

    def named(self, name: str, among: Collection[str]) -> str | None:
        """The name of an entry with this spelling."""

        def alike(spelling: str) -> list[str]:
            if spelling in among:  # no need to fold the other names
                return [spelling]
            return sorted(known for known in self._folded.get(folded(spelling), "").split("/") if known in among)

        return spelled_like(name, alike)


class ImageFolder:
    """A folder of images, which finds files by an item's id or by a relative path; each directory is listed once.

    Args:
        root: base folder of relative paths.
        named: the directory below it whose files are named after items; ``""`` is the folder itself.
        items: all ids, so that a file matches only one item: ``a%2Fb`` if there is such an id, and then not ``a/b``.
    """

    def __init__(self, root: Path, named: str, items: ItemNames) -> None:
        self.root = root
        self._list = lru_cache(maxsize=_MAX_DIRECTORIES)(Directory)
        top = self._list(root)
        found = top.named(named, top.directories) if named else None
        self.directory = self._list(root / (found or named))
        self._files = ItemFiles(
            items, lambda distance, suffix: (distance, SUFFIX_ORDER[suffix.lower()], suffix != suffix.lower())
        )
        self._used = {name for name in self.directory.files if self._files.add(name)}

    def of(self, item_id: str) -> Path | None:
        """The file named after an item."""
        name = self._files.of(item_id)
        return None if name is None else self.directory.path / name

    def at(self, path: PurePosixPath) -> Path | None:
        """The file at a relative path; the path may begin with the name of the folder."""
        found = self._below(path.parts)
        if found is None and len(path.parts) > 1 and folded(path.parts[0]) == folded(self.root.name):
            found = self._below(path.parts[1:])
        return found

    def _below(self, parts: tuple[str, ...]) -> Path | None:
        place = self.root
        for part in parts[:-1]:
            directory = self._list(place)
            name = directory.named(part, directory.directories)
            if name is None:
                return None
            place /= name
        directory = self.directory if place == self.directory.path else self._list(place)
        name = directory.named(parts[-1], directory.files)
        if name is None:
            return None
        if directory is self.directory:
            self._used.add(name)
        return place / name

    def unused(self) -> tuple[list[str], list[str]]:
        """Names of images without an item, and of files that are not images; each sorted.  Logs items with several files."""
        self._files.warn_of_several(self.directory.path, "in the order of docs/data.md")
        images, others = list[str](), list[str]()
        for name in sorted(self.directory.files - self._used):
            (others if split_name(name) is None or is_system_file(name) else images).append(name)
        return images, others
