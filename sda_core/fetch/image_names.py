"""Names of image files, in folders and in archives, as the systems of different makers write them.

* A file is an item's image when its name without the extension is the item's id.  Ids are compared exactly, also in upper
  and lower case; the extension may be in any case.
* macOS writes accents as characters of their own (NFD), others as one character (NFC): both count.
* A file is the image of one item: where its name is an id as it stands, no other spelling of it counts.
* An id that cannot be a file name (``a/b``) is written percent-encoded (``a%2Fb.jpg``); any name may be.
* Several files of one item: the exact id before other spellings, then the order of ``image_formats.SUFFIXES``, then an
  extension in lower case, then the name.
* What an operating system puts in a folder for itself (``._x.jpg``, ``__MACOSX``, ``.DS_Store``, ``Thumbs.db``) is no image.
* A reference is looked up exactly first, then in other cases, in the other form of accents and percent-decoded.
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
    """The text with accents as parts of their characters (Unicode NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """The text in one form for all cases and all forms of accents."""
    return text.lower() if text.isascii() else composed(composed(text).casefold())


def decoded(text: str) -> str | None:
    """The text without percent-encoding, or None where there is none, or a wrong one."""
    if "%" not in text:
        return None
    try:
        found = unquote(text, errors="strict")
    except UnicodeDecodeError:
        return None
    return None if found == text else found


def is_system_file(path: str) -> bool:
    """Whether an operating system made this file for itself; ``path`` has ``/`` between its parts."""
    name = path.rpartition("/")[2]
    return name.startswith("._") or name.lower() in _SYSTEM_FILES or "__MACOSX" in path.split("/")[:-1]


def split_name(name: str) -> tuple[str, str] | None:
    """A file name without its extension, and the extension, or None where it is no image's."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix}") if dot and stem and f".{suffix}".lower() in SUFFIX_ORDER else None


def spelled_like(reference: str, alike: Callable[[str], Sequence[str]]) -> str | None:
    """The name that a reference means; a spelling with percent-encoding counts as it stands first, then decoded.

    Args:
        reference: a name or a path.
        alike: the names that equal a spelling when both are folded, best first.
    """
    for spelling in filter(None, (reference, decoded(reference))):
        names = alike(spelling)
        if names:
            return min(names, key=lambda name: (name != spelling, composed(name) != composed(spelling)))
    return None


class ItemNames:
    """Ids of items, to be found by the names of files."""

    def __init__(self, item_ids: Collection[str]) -> None:
        self._exact = frozenset(item_ids)
        # where two ids differ in the form of their accents only, the smaller one is taken for a name that is neither
        self._composed = {composed(item_id): item_id for item_id in sorted(item_ids, reverse=True) if not item_id.isascii()}

    def of(self, stem: str) -> tuple[str, int] | None:
        """The item of a name without its extension, and how far the spelling is from the id (0 is exact)."""
        plain = decoded(stem)
        for spelling in (stem, composed(stem), *(() if plain is None else (composed(plain),))):
            item_id = spelling if spelling in self._exact else self._composed.get(spelling)
            if item_id is not None:
                return item_id, (spelling != stem) + (spelling != item_id)
        return None


class ItemFiles:
    """The best file of each item, among files that are named after items.

    Args:
        items: whose files are wanted.
        order: sorts the files of one item by the distance of the name from the id (0 is exact) and the extension, best
            first; files that are equal in both are sorted by their paths.
    """

    def __init__(self, items: ItemNames, order: Callable[[int, str], tuple[Any, ...]]) -> None:
        self._items = items
        self._order = order
        self._best: dict[str, tuple[Any, ...]] = {}
        self._several: set[str] = set()

    def add(self, path: str) -> bool:
        """Take in a file if it is an item's, and say whether it is."""
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
        """Log which file counts where an item has several."""
        if self._several:
            example = min(self._several)
            _log.warning(
                "%s: %d items have several images of their name; the first %s counts (for %s: %s)",
                *(where, len(self._several), which, example, self.of(example)),
            )


class Directory:
    """What is in one directory, listed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: set[str] = set()
        self.directories: set[str] = set()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    with suppress(OSError):  # a link that leads to itself
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
        """Names by their folded form; several are joined with "/", which stands in no name and takes less than a list."""
        names: dict[str, str] = {}
        for name in itertools.chain(self.files, self.directories):
            key = folded(name)
            names[key] = f"{names[key]}/{name}" if key in names else name
        return names

    def named(self, name: str, among: Collection[str]) -> str | None:
        """The name of an entry that is spelled like this one."""

        def alike(spelling: str) -> list[str]:
            if spelling in among:  # then the other names need not be folded
                return [spelling]
            return sorted(known for known in self._folded.get(folded(spelling), "").split("/") if known in among)

        return spelled_like(name, alike)


class ImageFolder:
    """A folder of images, in which files are found by an item's id or by a relative path; each directory is listed once.

    Args:
        root: the folder that relative paths are relative to.
        named: the directory below it whose files are named after items; ``""`` is the folder itself.
        items: all ids, so that a file counts for one item only: for ``a%2Fb``, if there is such an id, and not for ``a/b``.
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
        """The file that is named after an item."""
        name = self._files.of(item_id)
        return None if name is None else self.directory.path / name

    def at(self, path: PurePosixPath) -> Path | None:
        """The file at a relative path; the path may begin with the folder's own name."""
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
        """Names of images that are no item's, and of files that are no images; each sorted.  Logs which items have several."""
        self._files.warn_of_several(self.directory.path, "in the order of docs/data.md")
        images, others = list[str](), list[str]()
        for name in sorted(self.directory.files - self._used):
            (others if split_name(name) is None or is_system_file(name) else images).append(name)
        return images, others
