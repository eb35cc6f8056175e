"""Read images from a zip or tar file: one pass finds the requested entries, which are read one by one, not unpacked to disk.

* ``zipfile`` and ``tarfile`` read the archive.  Archives are untrusted, so the bytes read from their directories and headers
  are bounded (:class:`_Bounded`), and ``tarfile`` is prevented from keeping every member and from stopping at a damaged
  header.  The directory of a zip file with a million entries takes about 0.5 GiB of memory, once.
* An entry is found by its path, or by its base name ``<raw_item_id>.jpg`` (any suffix of ``image_formats``) in any folder:
  decodable formats before others, then the exact id before other spellings, then the order of paths.
  If a path occurs twice, the later entry is used, as in unpacking.
* A path may lack the folders that all files of the archive share (``shop/images/a.jpg`` is found as ``images/a.jpg``).  If
  no entry matches exactly, a path may differ in case, accents and percent-encoding.
* Backslashes separate folders like ``/``.  Names without the UTF-8 flag are read as UTF-8 if possible, else in the code pages
  used by Windows; the first one that gives a requested name is used.
* Entries with absolute paths or ``..``, links, devices and system files (``__MACOSX``) are skipped and counted by reason.
* Stored and deflated entries of zip files and uncompressed tar files are supported: other compressions have no bound on the
  decompressed size, or no random access.
"""

from __future__ import annotations

import io
import posixpath
import re
import stat
import struct
import sys
import tarfile
import threading
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from sda_core.errors import ArtifactError
from sda_core.fetch.image_formats import SUFFIX_ORDER, SUFFIXES
from sda_core.fetch.image_names import (
    NUM_EXAMPLES,
    ItemFiles,
    ItemNames,
    decoded,
    folded,
    is_system_file,
    spelled_like,
    split_name,
)

_PLAIN_PATH = re.compile(r"[^\\\x00-\x1f\x7f]{1,1000}")
_DRIVE = re.compile(r"[A-Za-z]:")
_ADVICE = "give a whole zip or uncompressed tar file (dataset.image_archive), or delete it and run `dvc repro download`"

Reason = Literal["unsafe_path", "no_file", "no_image", "no_item"]
"""Reasons for skipping an entry: its path is absolute or has ``..``, it is a link or a device, its name is not that of an
image, or it matches no item."""

_CODE_PAGES = (
    *("cp437", "cp850", "cp1252", "cp866", "cp1251", "cp932", "gbk", "big5", "cp949", "cp852", "cp1250", "cp857", "cp1254"),
    *("cp737", "cp1253", "cp862", "cp1255", "cp720", "cp1256", "cp775", "cp1257", "cp1258", "cp874", "mac_roman"),
)
"""Encodings of names in zip files without the UTF-8 flag: that of the standard first, then those of Windows and old Macs."""

_MAX_DIRECTORY_BYTES = 128 << 20  # of a zip file; at most 2.9 million entries, which take 1.1 GiB
_MAX_HEADER_BYTES = 1 << 20  # of one entry of a tar file, with its extended headers
_BLOCK_BYTES = 512
_ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06")  # the second is that of an empty archive
_TAR_MARK, _TAR_MARK_AT = b"ustar", 257
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_ENCRYPTED = 0x2041  # flag bits of an entry: encrypted, strongly encrypted, masked headers
_UTF8 = 0x800
_UNIX = 3  # the system that made an entry, APPNOTE 4.4.2
_UNICODE_PATH = 0x7075  # Info-ZIP's extra field
_PACKINGS = {0: "stored", 8: "deflated", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}
_UNPACKED = frozenset({"stored", "deflated"})
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, ValueError, OverflowError, NotImplementedError, EOFError,
    RecursionError,
)  # fmt: skip
"""Exceptions of ``zipfile`` and ``tarfile`` on damaged input."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Location and properties of an entry according to the archive."""

    info: zipfile.ZipInfo | None = field(compare=False, repr=False)  # of a zip file
    offset: int  # of the header in a zip file, of the contents in a tar file
    num_bytes: int
    packing: str  # compression method, for messages; only stored and deflated entries are read
    crc: int | None  # CRC-32 of the contents; tar files have none


class UnusableError(Exception):
    """The archive cannot be read or is empty; the text gives the reason."""


class _Bounded(io.BufferedReader):
    """A file of which at most ``left`` bytes can be read, because an untrusted header may state any length."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.left = _MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = self.left
        if size > self.left:
            raise UnusableError(f"its directory or a header in it has more than the {self.left} bytes that are read")
        data = super().read(size)
        self.left -= len(data)
        return data


def plain_path(reference: str) -> PurePosixPath | None:
    """A relative path without ``..``, or None."""
    path = PurePosixPath(reference)
    if not _PLAIN_PATH.fullmatch(reference) or path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return None if _DRIVE.match(reference) else path


def archive_kind(head: bytes) -> Literal["zip", "tar"] | None:
    """The kind of an archive, by its first bytes."""
    if head.startswith(_ZIP_MARKS):
        return "zip"
    return "tar" if head[_TAR_MARK_AT:].startswith(_TAR_MARK) else None


def check_archive(path: Path) -> None:
    """Check an archive's directory or headers to the end; damaged images are only detected when they are read.

    Raises:
        UnusableError: :class:`ImageArchive` would reject it; or a zip file's entries are not between its begin and its
            directory (for example, the directory is that of an archive inside a truncated one); or it has no file.
        OSError: the file cannot be opened.
    """
    with _Bounded(path) as stream:
        archive = _open(stream)
        first, num_files = sys.maxsize, 0
        for _, kind, entry in _scan(archive, stream):
            num_files += kind == "file"
            first = min(first, entry.offset)
            if entry.info is not None and isinstance(archive, zipfile.ZipFile) and not _lies_inside(entry.info, archive):
                raise UnusableError("an entry lies outside of the file")
    if not num_files:
        raise UnusableError("it holds no files")
    if isinstance(archive, zipfile.ZipFile) and first:
        raise UnusableError("its zip directory does not begin at its first entry")


class ImageArchive:
    """The requested entries of a zip or tar file.

    Args:
        path: path of the archive.
        paths: entries requested by path (relative, plain, with ``/``).
        item_ids: entries requested by base name.

    Raises:
        ArtifactError: the file cannot be read: neither zip nor tar, compressed tar, truncated, or damaged.
    """

    def __init__(self, path: Path, paths: Collection[str], item_ids: Collection[str]) -> None:
        self.path = path
        self._wanted = {folded(spelling) for wanted in paths for spelling in (wanted, decoded(wanted)) if spelling is not None}
        self._files = ItemFiles(
            ItemNames(item_ids), lambda distance, suffix: (SUFFIX_ORDER[suffix.lower()] >= len(SUFFIXES), distance > 0)
        )
        self._entries: dict[str, Entry] = {}
        self._top: str | None = None  # the folder that contains all images
        self._lock = threading.Lock()
        self.num_files = 0
        self.passed_over: Counter[Reason] = Counter()
        self.examples: dict[Reason, list[str]] = {}
        try:
            stream = _Bounded(path)
            weakref.finalize(self, stream.close)
            self._archive = _open(stream)
            for names, kind, entry in _scan(self._archive, stream):
                if kind != "folder":
                    self._add(names, kind == "file", entry)
        except (UnusableError, OSError) as error:
            raise ArtifactError(str(path), f"is not a readable image archive ({error})", _ADVICE) from None
        self._files.warn_of_several(path, "path")
        # requested paths by folded form, with all folders or without leading folders shared by all images, most folders first
        self._by_path: dict[str, dict[str, str]] = {}
        ends = sorted((place, name, end) for name in self._entries for place, end in enumerate(_ends(name, self._top)))
        for _, name, end in ends:
            if folded(end) in self._wanted:
                self._by_path.setdefault(folded(end), {}).setdefault(end, name)

    def _add(self, names: tuple[str, ...], is_file: bool, entry: Entry) -> None:
        """Keep an entry if it is requested under one of the readings of its name; else count it."""
        self.num_files += is_file
        paths = [path for path in map(_relative, names) if path is not None]
        images = [path for path in paths if split_name(path) is not None and not is_system_file(path)] if is_file else []
        for path in images:
            top = self._narrowed(path)
            if self._files.add(path) or any(folded(end) in self._wanted for end in _ends(path, top)):
                self._top = top
                self._entries[path] = entry
                return
        if images:
            self._top = self._narrowed(images[0])
        reason: Reason = "no_item" if images else "no_file" if not is_file else "no_image" if paths else "unsafe_path"
        self.passed_over[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(names[0][:200])

    def _narrowed(self, path: str) -> str:
        """The folder that contains all images including this one; "" if there is none."""
        folder = path.rpartition("/")[0]
        return folder if self._top in (None, folder) else posixpath.commonpath((self._top, folder))

    def at(self, path: PurePosixPath) -> Entry | None:
        """The entry at a requested path."""
        end = spelled_like(path.as_posix(), lambda spelling: list(self._by_path.get(folded(spelling), ())))
        return None if end is None else self._entries[self._by_path[folded(end)][end]]

    def of(self, item_id: str) -> Entry | None:
        """The entry named after a requested item."""
        path = self._files.of(item_id)
        return None if path is None else self._entries[path]

    def read(self, entry: Entry, limit: int) -> bytes | Literal["too_large", "corrupt", "unsupported"]:
        """The checked contents of an entry, or the status that explains why they cannot be read.

        Args:
            entry: an entry of this archive.
            limit: maximum size of the contents in bytes; memory use is about this.

        Raises:
            OSError: the archive can no longer be read.
        """
        if entry.num_bytes > limit:
            return "too_large"
        if entry.packing not in _UNPACKED:
            return "unsupported"
        archive = self._archive
        try:
            if entry.info is None or not isinstance(archive, zipfile.ZipFile):
                with self.path.open("rb") as stream:  # one stream per call, so that threads do not share a position
                    stream.seek(entry.offset)
                    data = stream.read(entry.num_bytes)
            elif not _lies_inside(entry.info, archive):
                return "corrupt"
            else:
                with self._lock, archive.open(entry.info) as stream:
                    data = stream.read(entry.num_bytes + 1)  # one more byte triggers the comparison of the checksum
        except _DAMAGE:
            return "corrupt"
        return data if len(data) == entry.num_bytes else "corrupt"


_Kind = Literal["file", "folder", "other"]
"""The kind of an entry; the last are links and devices, which are counted but never read."""


def _ends(path: str, top: str | None) -> list[str]:
    """The path, and the path without one or more of the leading folders shared by all images."""
    num_folders = top.count("/") + 1 if top else 0
    return [path.split("/", number)[-1] for number in range(num_folders + 1)]


def _relative(name: str) -> str | None:
    """The path of an entry with ``/``, without ``.`` parts; None if it is absolute or has ``..``."""
    path = plain_path(name.replace("\\", "/"))
    return None if path is None else path.as_posix()


def _kind(name: str) -> _Kind:
    return "folder" if name.endswith(("/", "\\")) else "file"


def _readings(name: bytes) -> tuple[str, ...]:
    """The possible readings of a name, the most likely first."""
    if name.isascii():
        return (name.decode("ascii"),)
    readings = dict[str, None]()
    for code_page in ("utf-8", *_CODE_PAGES):
        try:
            readings[name.decode(code_page)] = None
        except UnicodeDecodeError:
            continue
    return tuple(readings)  # never empty: cp437 decodes every byte


def _open(stream: _Bounded) -> zipfile.ZipFile | tarfile.TarFile:
    head = stream.peek(_BLOCK_BYTES)
    try:
        if head.startswith(_ZIP_MARKS):
            return zipfile.ZipFile(stream)
        if head.startswith(_COMPRESSED):
            raise UnusableError("it is compressed as a whole, so that single images cannot be reached; unpack it to a plain .tar")
        stream.left = _MAX_HEADER_BYTES
        return tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape")
    except _DAMAGE as error:
        what = "truncated or damaged" if head.startswith(_ZIP_MARKS) else "neither a zip nor a tar file"
        raise UnusableError(f"it is {what} ({error}); it begins {head[:16]!r}") from None


def _scan(archive: zipfile.ZipFile | tarfile.TarFile, stream: _Bounded) -> Iterator[tuple[tuple[str, ...], _Kind, Entry]]:
    """All entries in the archive's order: readings of the name, kind, and location."""
    try:
        yield from _scan_zip(archive, stream) if isinstance(archive, zipfile.ZipFile) else _scan_tar(archive, stream)
    except _DAMAGE as error:
        raise UnusableError(f"it is truncated or damaged ({error})") from None


def _scan_zip(archive: zipfile.ZipFile, stream: _Bounded) -> Iterator[tuple[tuple[str, ...], _Kind, Entry]]:
    stream.left = sys.maxsize  # the directory has been read; entries have their own limit
    entries = archive.filelist.copy()
    archive.filelist.clear()  # keep only the requested ones in memory
    archive.NameToInfo.clear()
    for info in entries:
        names = (info.orig_filename,)
        if not info.flag_bits & _UTF8 and not names[0].isascii():
            name = names[0].encode("cp437")  # zipfile decodes names without the flag as cp437
            names = _readings(_unicode_path(info.extra, name) or name)
        packing = _PACKINGS.get(info.compress_type, f"method {info.compress_type}")
        packing = "encrypted" if info.flag_bits & _ENCRYPTED else packing
        is_link = info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16)  # its contents are the target's path
        kind: _Kind = "other" if is_link else _kind(names[0])
        yield names, kind, Entry(info, info.header_offset, info.file_size, packing, info.CRC)


def _lies_inside(info: zipfile.ZipInfo, archive: zipfile.ZipFile) -> bool:
    return 0 <= info.header_offset <= archive.start_dir - info.compress_size


def _unicode_path(extra: bytes, name: bytes) -> bytes | None:
    """The name in UTF-8 from Info-ZIP's extra field (APPNOTE 4.6.9), if its checksum matches this name."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and extra[4:9] == struct.pack("<BL", 1, zlib.crc32(name)):
            return extra[9 : 4 + length]
        extra = extra[4 + length :]
    return None


def _scan_tar(archive: tarfile.TarFile, stream: _Bounded) -> Iterator[tuple[tuple[str, ...], _Kind, Entry]]:
    while (member := archive.next()) is not None:
        vars(archive)["members"].clear()  # else all members stay in memory
        if member.size < 0 or archive.offset <= member.offset:
            raise UnusableError(f"its tar header at byte {member.offset} has a size that is not a number")
        if not member.isdir() and member.type in tarfile.SUPPORTED_TYPES:
            names = _readings(member.name.encode("utf-8", "surrogateescape"))
            packing = "sparse" if member.issparse() else "stored"
            kind = _kind(names[0]) if member.isreg() else "other"
            yield names, kind, Entry(None, member.offset_data, member.size, packing, None)
        stream.left = _MAX_HEADER_BYTES
    stream.seek(archive.offset)
    end = stream.read(_BLOCK_BYTES)
    if len(end) < _BLOCK_BYTES:
        raise UnusableError("it is truncated: its end is cut off")
    if any(end):  # tarfile treats a damaged header as the end
        raise UnusableError(f"its tar header at byte {archive.offset} is damaged")
