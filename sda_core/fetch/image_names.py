"""Names of image files, in folders and in archives, as the systems of different makers write them.

* A file is an item's image when its name without the extension is the item's id.  Ids are compared exactly, also in upper
  and lower case; the extension may be in any case.
* macOS writes accents as characters of their own (NFD), others as one character (NFC): both count.
* A file is the image of one item: where its name is an id as it stands, no other spelling of it counts.
* An id that cannot be a file name (``a/b``) is written percent-encoded (``a%2Fb.jpg``); any name may be.
* Several files of one item: the exact id before other spellings, then the order of ``image_formats.SUFFIXES``, then an
  extension in lower case, then the name.
* What an operating system leaves in a folder (``._x.jpg``, ``__MACOSX``, ``.DS_Store``, ``Thumbs.db``) is no image.
* A reference is looked up exactly first, then in other cases, in the other form of accents and percent-decoded.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
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


def spellings(stem: str) -> Iterator[str]:
    """The ids that a file name without its extension may stand for, best first, each in composed form but the first."""
    yield stem
    if not stem.isascii():
        yield composed(stem)
    plain = decoded(stem)
    if plain is not None:
        yield composed(plain)


class ItemNames:
    """Ids of items, to be found by the names of files."""

    def __init__(self, item_ids: Collection[str]) -> None:
        self._exact = frozenset(item_ids)
        # where two ids differ in the form of their accents only, the smaller one is taken for a name that is neither
        self._composed = {composed(item_id): item_id for item_id in sorted(item_ids, reverse=True) if not item_id.isascii()}

    def of(self, stem: str) -> tuple[str, int] | None:
        """The item of a name without its extension, and how far the spelling is from the id (0 is exact)."""
        for distance, spelling in enumerate(spellings(stem)):
            if spelling in self._exact:
                return spelling, distance
            if spelling in self._composed:
                return self._composed[spelling], distance + 1
        return None


class Directory:
    """What is in one directory, listed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: set[str] = set()
        self.directories: set[str] = set()
        self._lock = threading.Lock()
        self._folded: dict[str, str] | None = None  # names that are alike, with a "/" between them: it stands in no name
        self._stems: dict[str, str] | None = None  # likewise
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    self._add(entry)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _log.warning("%s cannot be listed (%s), so no image is taken from there", path, error.strerror)

    def _add(self, entry: os.DirEntry[str]) -> None:
        try:
            if entry.is_file():
                self.files.add(entry.name)
            elif entry.is_dir():
                self.directories.add(entry.name)
        except OSError:  # a link that leads to itself
            return

    def _alike(self, name: str) -> list[str]:
        with self._lock:
            if self._folded is None:
                self._folded = {}
                for known in itertools.chain(self.files, self.directories):
                    _append(self._folded, folded(known), known)
        return _names(self._folded, folded(name))

    def named(self, name: str, among: Collection[str]) -> str | None:
        """The name of an entry that is spelled like this one."""
        plain = decoded(name)
        for spelling in (name,) if plain is None else (name, plain):
            if spelling in among:
                return spelling
            alike = [(composed(known) != composed(spelling), known) for known in self._alike(spelling) if known in among]
            if alike:
                return min(alike)[1]
        return None

    def of(self, item_id: str) -> list[str]:
        """File names of an item's images, best first."""
        with self._lock:
            if self._stems is None:
                self._stems = self._by_spelling()
        found: dict[str, tuple[int, int, bool, str]] = {}
        for distance, spelling in enumerate(dict.fromkeys((item_id, composed(item_id)))):
            for name in _names(self._stems, spelling):
                stem, suffix = split_name(name) or (name, "")
                place = SUFFIX_ORDER[suffix.lower()]
                found.setdefault(name, (distance + (stem != spelling), place, suffix != suffix.lower(), name))
        return sorted(found, key=found.__getitem__)

    def _by_spelling(self) -> dict[str, str]:
        stems: dict[str, str] = {}
        for name in self.files:
            parts = None if is_system_file(name) else split_name(name)
            if parts is not None:
                for spelling in dict.fromkeys(spellings(parts[0])):
                    _append(stems, spelling, name)
        return stems


def _append(names: dict[str, str], key: str, name: str) -> None:
    names[key] = f"{names[key]}/{name}" if key in names else name


def _names(names: dict[str, str], key: str) -> list[str]:
    return names[key].split("/") if key in names else []


@dataclass
class FolderUse:
    """What became of the files of one folder: which ones are an item's, and which items have several."""

    directory: Directory
    used: set[str] = field(default_factory=set[str])
    several: dict[str, str] = field(default_factory=dict[str, str])  # item id: the file that counts

    def unused(self) -> tuple[list[str], list[str]]:
        """Names of images that are no item's, and of files that are no images; each sorted."""
        images, others = list[str](), list[str]()
        for name in sorted(self.directory.files - self.used):
            known = split_name(name) is not None and not is_system_file(name)
            (images if known else others).append(name)
        return images, others


class ImageFolder:
    """A folder of images, in which files are found by an item's id or by a relative path; each directory is listed once.

    Args:
        root: the folder that relative paths are relative to.
        named: the directory below it whose files are named after items; ``""`` is the folder itself.
        items: all ids, so that a file counts for one item only: for ``a%2Fb``, if there is such an id, and not for ``a/b``.
    """

    def __init__(self, root: Path, named: str, items: ItemNames | None = None) -> None:
        self.root = root
        self._items = items
        self._lock = threading.Lock()
        self._listed: OrderedDict[Path, Directory] = OrderedDict()
        top = self._list(root)
        found = top.named(named, top.directories) if named else None
        self.use = FolderUse(self._list(root / (found or named)))

    def _list(self, path: Path) -> Directory:
        with self._lock:
            if path in self._listed:
                self._listed.move_to_end(path)
                return self._listed[path]
        directory = Directory(path)
        with self._lock:
            self._listed[path] = directory
            while len(self._listed) > _MAX_DIRECTORIES:
                self._listed.popitem(last=False)
        return directory

    def of(self, item_id: str) -> Path | None:
        """The file that is named after an item."""
        names = [name for name in self.use.directory.of(item_id) if self._is_of(name, item_id)]
        if not names:
            return None
        self.use.used.update(names)
        if len(names) > 1:
            self.use.several[item_id] = names[0]
        return self.use.directory.path / names[0]

    def _is_of(self, name: str, item_id: str) -> bool:
        """Whether no other item has a better claim to a file."""
        parts = split_name(name)
        owner = None if self._items is None or parts is None else self._items.of(parts[0])
        return owner is None or owner[0] == item_id

    def at(self, path: PurePosixPath) -> Path | None:
        """The file at a relative path; the path may begin with the folder's own name."""
        found = self._below(self.root, path.parts)
        if found is None and len(path.parts) > 1 and folded(path.parts[0]) == folded(self.root.name):
            found = self._below(self.root, path.parts[1:])
        return found

    def _below(self, place: Path, parts: tuple[str, ...]) -> Path | None:
        for part in parts[:-1]:
            directory = self._list(place)
            name = directory.named(part, directory.directories)
            if name is None:
                return None
            place /= name
        directory = self.use.directory if place == self.use.directory.path else self._list(place)
        name = directory.named(parts[-1], directory.files)
        if name is None:
            return None
        if directory is self.use.directory:
            self.use.used.add(name)
        return place / name
