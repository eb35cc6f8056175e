"""Pictures in a zip or tar file: the wanted entries are found in one pass and read one at a time; nothing is unpacked to disk.

* Archives are strangers' files and may name millions of entries.  ``zipfile`` and ``tarfile`` keep every entry in memory,
  and ``tarfile`` reads extended headers of any length; here the memory depends on what is wanted, not on the archive.
* An entry is found by its path, or by its base name ``<raw_item_id>.jpg`` (any suffix of ``image_formats``) in any folder:
  formats that are decoded before others, then the exact id before other spellings, then the order of paths.
  Where a path occurs twice, the later entry counts, as it does on unpacking.
* A path may lack the folders that all files of the archive lie in (as when ``shop/images/a.jpg`` is packed for
  ``images/a.jpg``), and may differ in case, accents and percent-encoding, where no entry has it exactly.
* Backslashes separate folders as ``/`` does.  Names that are not marked as UTF-8 are read as UTF-8, and where they are not that,
  in the code pages that Windows packs with: the first one in which something is wanted counts.
* Entries with absolute or climbing paths, links and devices are passed over, as are files of the system (``__MACOSX``).
  What is passed over is counted by reason.
* Zip (APPNOTE 6.3.9, with Zip64; stored or deflated entries) and uncompressed tar (POSIX.1-1988, pax, GNU long names).
"""

from __future__ import annotations

import itertools
import logging
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from sda_core.errors import ArtifactError
from sda_core.fetch.image_formats import SUFFIX_ORDER, SUFFIXES
from sda_core.fetch.image_names import NUM_EXAMPLES, ItemNames, composed, decoded, folded, is_system_file, split_name

_log = logging.getLogger(__name__)

_PLAIN_PATH = re.compile(r"[^\\\x00-\x1f\x7f]{1,1000}")
_DRIVE = re.compile(r"[A-Za-z]:")
_ADVICE = "give a whole zip or uncompressed tar file (dataset.image_archive), or delete it and run `dvc repro download`"

Reason = Literal["unsafe_path", "no_file", "no_image", "no_item"]
"""Why an entry is passed over: its path is absolute or climbs, it is a link or a device, its name is not that of an image,
or it is no item's."""

_CODE_PAGES = (
    *("cp437", "cp850", "cp1252", "cp866", "cp1251", "cp932", "gbk", "big5", "cp949", "cp852", "cp1250", "cp857", "cp1254"),
    *("cp737", "cp1253", "cp862", "cp1255", "cp720", "cp1256", "cp775", "cp1257", "cp1258", "cp874", "mac_roman"),
)
"""Of names in zip files without the mark of UTF-8: the one of the standard first, then those of Windows and of old Macs."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END_MARK, _END64_MARK, _END64_LOCATOR_MARK = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL_MARK, _LOCAL_MARK = b"PK\x01\x02", b"PK\x03\x04"
_ZIP_MARKS = (_LOCAL_MARK, _END_MARK)  # the second is an empty one's
_MAX_COMMENT_BYTES = 65_535
_ENCRYPTED = 0x2041  # flag bits of an entry: encrypted, strongly, with masked headers
_UTF8 = 0x800
_UNICODE_PATH = 0x7075  # Info-ZIP's extra field
_PACKINGS = {0: "stored", 8: "deflated", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}
_UNPACKED = frozenset({"stored", "deflated"})
_PACKED_SLACK_BYTES = 65_536  # by how much packing may lengthen a picture

_BLOCK_BYTES = 512
_MAX_NAME_BYTES = 65_536
_MAX_PAX_BYTES = 1 << 20
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]*)=")
_NO_FILES = frozenset(b"12346")
_WITHOUT_CONTENTS = frozenset(b"123456")  # links, devices, folders, pipes: their size says nothing
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


@dataclass(frozen=True)
class Entry:
    """Where one entry lies, and what the archive states of it."""

    offset: int  # of the local header in a zip file, of the contents in a tar file
    num_bytes: int
    num_packed_bytes: int
    packing: str  # how it is packed, for people; only stored and deflated entries are unpacked
    crc: int | None  # CRC-32 of the contents; tar files have none


class UnusableError(Exception):
    """The archive cannot be read, or holds nothing; the text says why."""


def plain_path(reference: str) -> PurePosixPath | None:
    """A relative path that stays where it begins, or None."""
    path = PurePosixPath(reference)
    if not _PLAIN_PATH.fullmatch(reference) or path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return None if _DRIVE.match(reference) else path


def check_archive(path: Path) -> None:
    """Follow an archive's directory, or its headers, to the end; a damaged picture is found by whoever reads it.

    Memory does not depend on the number of entries.

    Raises:
        UnusableError: as :class:`PictureArchive` would refuse it; or a zip file's entries do not lie between its begin and
            its directory, as where the directory is that of an archive inside a truncated one; or there is no file in it.
        OSError: it cannot be opened.
    """
    with path.open("rb") as stream:
        num_bytes = path.stat().st_size
        is_zip = stream.read(len(_LOCAL_MARK)).startswith(_ZIP_MARKS)
        end = _zip_directory(stream, num_bytes)[0] if is_zip else num_bytes
        stream.seek(0)
        first, num_files = end, 0
        for name, entry in _scan(stream, num_bytes, lambda names, _: names[0]):
            first = min(first, entry.offset)
            num_files += not name.endswith(("/", "\\"))  # a folder
            if entry.offset + entry.num_packed_bytes > end:
                raise UnusableError("an entry lies outside of the file")
    if not num_files:
        raise UnusableError("it holds no files")
    if is_zip and first:
        raise UnusableError("its zip directory does not begin at its first entry")


class PictureArchive:
    """The wanted entries of a zip or tar file.

    Args:
        path: the archive.
        paths: entries wanted by their path (relative, plain, with ``/``).
        item_ids: entries wanted by their base name.

    Raises:
        ArtifactError: it cannot be read: neither zip nor tar, compressed tar, truncated, or damaged.
    """

    def __init__(self, path: Path, paths: Collection[str], item_ids: Collection[str]) -> None:
        self.path = path
        self._paths = {folded(spelling) for wanted in paths for spelling in (wanted, decoded(wanted)) if spelling is not None}
        self._items = ItemNames(item_ids)
        self._by_path: dict[str, dict[str, Entry]] = {}  # folded path: the paths that are so written
        self._by_id: dict[str, tuple[tuple[bool, bool, str], Entry]] = {}
        self._top: tuple[str, ...] | None = None  # folders in which all files lie
        self.num_files = 0
        self.passed_over: Counter[Reason] = Counter()
        self.examples: dict[Reason, list[str]] = {}
        ambiguous: set[str] = set()
        try:
            with path.open("rb") as stream:
                self._num_bytes = path.stat().st_size
                for name, entry in _scan(stream, self._num_bytes, self._wanted):
                    self._add(name, entry, ambiguous)
        except (UnusableError, OSError) as error:
            raise ArtifactError(str(path), f"is no readable picture archive ({error})", _ADVICE) from None
        if ambiguous:
            example = min(ambiguous)
            _log.warning(
                "%s: %d items have several pictures of their name; the first path counts (for %s: %s)",
                path, len(ambiguous), example, self._by_id[example][0][-1],
            )  # fmt: skip

    def _wanted(self, names: tuple[str, ...], kind: _Kind) -> str | None:
        """The reading of an entry's name in which something is wanted, or None; counts what is passed over."""
        if kind == "folder":
            return None
        is_file = kind == "file"
        self.num_files += is_file
        paths = [path for path in map(_relative, names) if path is not None]
        images = [path for path in paths if split_name(path) is not None and not is_system_file(path)] if is_file else []
        for path in images:
            top = self._narrowed(path)
            if self._item_of(path) is not None or any(map(self._is_path, _short(path, top))):
                self._top = top
                return path
        if images:
            self._top = self._narrowed(images[0])
        reason: Reason = "no_item" if images else "no_file" if not is_file else "no_image" if paths else "unsafe_path"
        self.passed_over[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(names[0][:200])
        return None

    def _narrowed(self, path: str) -> tuple[str, ...]:
        """The folders in which all images lie, this one too."""
        folders = tuple(path.split("/")[:-1])
        if self._top is None or self._top == folders:
            return folders
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._top, folders, strict=False))
        return tuple(one for one, _ in pairs)

    def _is_path(self, path: str) -> bool:
        return folded(path) in self._paths

    def _item_of(self, path: str) -> tuple[str, int] | None:
        parts = split_name(path.rpartition("/")[2])
        return None if parts is None else self._items.of(parts[0])

    def _add(self, name: str, entry: Entry, ambiguous: set[str]) -> None:
        for path in _short(name, self._top or ()):
            if self._is_path(path):
                self._by_path.setdefault(folded(path), {})[name] = entry
        found = self._item_of(name)
        if found is None:
            return
        item_id, distance = found
        place = (SUFFIX_ORDER[f".{name.rpartition('.')[2]}".lower()] >= len(SUFFIXES), distance > 0, name)
        known = self._by_id.get(item_id)
        if known is not None and known[0] != place:
            ambiguous.add(item_id)
        if known is None or place <= known[0]:
            self._by_id[item_id] = (place, entry)

    def at(self, path: PurePosixPath) -> Entry | None:
        """The entry at a wanted path."""
        wanted, num_common = path.as_posix(), len(self._top or ())
        for spelling in filter(None, (wanted, decoded(wanted))):
            alike: list[tuple[bool, bool, int, str]] = []
            entries = self._by_path.get(folded(spelling), {})
            for name in entries:
                num_folders = name.count("/") - spelling.count("/")
                if num_folders <= num_common:  # else it lies in a folder that turned out not to be common to all
                    end = name.split("/", num_folders)[-1]
                    alike.append((end != spelling, composed(end) != composed(spelling), num_folders, name))
            if alike:
                return entries[min(alike)[-1]]
        return None

    def of(self, item_id: str) -> Entry | None:
        """The entry that is named after a wanted item."""
        found = self._by_id.get(item_id)
        return None if found is None else found[1]

    def read(self, entry: Entry, limit: int) -> bytes | Literal["too_large", "corrupt", "unsupported"]:
        """The contents of an entry, checked, or the status that says why there are none.

        Args:
            entry: of this archive.
            limit: bound on the contents in bytes; never more than about this is held.

        Raises:
            OSError: the archive itself cannot be read any more.
        """
        if entry.num_bytes > limit or entry.num_packed_bytes > limit + _PACKED_SLACK_BYTES:
            return "too_large"
        if entry.packing not in _UNPACKED:
            return "unsupported"
        if entry.offset + entry.num_packed_bytes > self._num_bytes:
            return "corrupt"
        with self.path.open("rb") as stream:  # one each, so that threads do not move each other's place
            stream.seek(entry.offset)
            if entry.crc is not None:
                head = stream.read(_LOCAL.size)
                if len(head) < _LOCAL.size or not head.startswith(_LOCAL_MARK):
                    return "corrupt"
                name_bytes, extra_bytes = _LOCAL.unpack(head)[-2:]
                stream.seek(entry.offset + _LOCAL.size + name_bytes + extra_bytes)
            data = stream.read(entry.num_packed_bytes)
        if entry.packing == "deflated":
            try:  # one byte more than stated is enough to see that there is more
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.num_bytes + 1)
            except zlib.error:
                return "corrupt"
        if len(data) != entry.num_bytes or entry.crc not in (None, zlib.crc32(data)):
            return "corrupt"
        return data


_Kind = Literal["file", "folder", "other"]
_Wants = Callable[[tuple[str, ...], _Kind], str | None]
"""Gets the readings of an entry's name and what it is, and gives the reading by which it is wanted, or None.

What is ``other`` (a link, a device) is asked about to be counted, and never given.
"""


def _short(path: str, top: tuple[str, ...]) -> Iterator[str]:
    """The path, and the path without the first folders that all images have in common, one by one."""
    yield path
    for _ in top:
        path = path.partition("/")[2]
        yield path


def _relative(name: str) -> str | None:
    """The path of an entry with ``/``, without ``.`` parts; None where it is absolute or climbs."""
    path = plain_path(name.replace("\\", "/"))
    return None if path is None else path.as_posix()


def _kind(name: str) -> _Kind:
    return "folder" if name.endswith(("/", "\\")) else "file"


def _readings(name: bytes, is_utf8: bool) -> tuple[str, ...]:
    """What a name may say, the likeliest first."""
    if name.isascii():
        return (name.decode("ascii"),)
    if is_utf8:
        return (name.decode("utf-8", "replace"),)
    readings = dict[str, None]()
    for code_page in ("utf-8", *_CODE_PAGES):
        try:
            readings[name.decode(code_page)] = None
        except UnicodeDecodeError:
            continue
    return tuple(readings)  # never empty: cp437 has a character for each byte


def _scan(stream: BinaryIO, num_bytes: int, wants: _Wants) -> Iterator[tuple[str, Entry]]:
    """The wanted entries of an archive, with their paths, in its own order."""
    head = stream.read(_BLOCK_BYTES)
    if head.startswith(_ZIP_MARKS):
        return _scan_zip(stream, num_bytes, wants)
    if head.startswith(_COMPRESSED):
        raise UnusableError("it is compressed as a whole, so that single pictures cannot be reached; unpack it to a plain .tar")
    if len(head) == _BLOCK_BYTES and (not any(head) or _tar_checksum_fits(head)):
        return _scan_tar(stream, num_bytes, wants)
    raise UnusableError(f"it is neither a zip nor a tar file; it begins {head[:16]!r}")


# ---------------------------------------------------------------------------------------------------- zip
def _read_exactly(stream: BinaryIO, num_bytes: int, what: str) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise UnusableError(f"it is truncated: {what} is cut off")
    return data


def _zip_directory(stream: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """First byte and end of the central directory."""
    tail_start = max(0, num_bytes - _END.size - _MAX_COMMENT_BYTES)
    stream.seek(tail_start)
    tail = stream.read()
    place = tail.rfind(_END_MARK)
    while place >= 0 and place + _END.size > len(tail):
        place = tail.rfind(_END_MARK, 0, place)
    if place < 0:
        raise UnusableError("it is truncated: the zip file has no directory at its end")
    size, start = _END.unpack_from(tail, place)[5:7]
    end = tail_start + place
    if place >= _END64_LOCATOR.size and tail.startswith(_END64_LOCATOR_MARK, place - _END64_LOCATOR.size):
        end = _END64_LOCATOR.unpack_from(tail, place - _END64_LOCATOR.size)[2]
        if end > num_bytes:
            raise UnusableError("the place of its zip directory lies beyond its end")
        stream.seek(end)
        record = _read_exactly(stream, _END64.size, "the end of the zip directory")
        if not record.startswith(_END64_MARK):
            raise UnusableError("the end of its zip directory is damaged")
        size, start = _END64.unpack(record)[-2:]
    if start + size > end:
        raise UnusableError("its zip directory overlaps its end")
    return start, start + size


def _scan_zip(stream: BinaryIO, num_bytes: int, wants: _Wants) -> Iterator[tuple[str, Entry]]:
    place, end = _zip_directory(stream, num_bytes)
    stream.seek(place)
    while place < end:
        head = _read_exactly(stream, _CENTRAL.size, "the zip directory")
        if not head.startswith(_CENTRAL_MARK):
            raise UnusableError(f"its zip directory is damaged at byte {place}")
        fields = _CENTRAL.unpack(head)
        flags, method, crc, packed, size, name_bytes, extra_bytes, comment_bytes = (*fields[3:5], *fields[7:13])
        rest = _read_exactly(stream, name_bytes + extra_bytes + comment_bytes, "the zip directory")
        place += len(head) + len(rest)
        extra = rest[name_bytes : name_bytes + extra_bytes]
        raw_name, is_utf8 = rest[:name_bytes], bool(flags & _UTF8)
        unicode_name = None if is_utf8 or raw_name.isascii() else _unicode_path(extra, raw_name)
        readings = _readings(raw_name, is_utf8) if unicode_name is None else _readings(unicode_name, is_utf8=True)
        name = wants(readings, _kind(readings[0]))
        if name is not None:
            size, packed, offset = _wide(extra, size, packed, fields[16])
            packing = "encrypted" if flags & _ENCRYPTED else _PACKINGS.get(method, f"method {method}")
            yield name, Entry(offset, size, packed, packing, crc)


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        yield kind, extra[4 : 4 + length]
        extra = extra[4 + length :]


def _unicode_path(extra: bytes, name: bytes) -> bytes | None:
    """The name in UTF-8 from Info-ZIP's extra field (APPNOTE 4.6.9), where it was made of this very name."""
    for kind, field in _extra_fields(extra):
        if kind == _UNICODE_PATH and field[:5] == struct.pack("<BL", 1, zlib.crc32(name)):
            return field[5:]
    return None


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those of 32 one bits replaced by the 64 bits of the Zip64 field, as far as it has them."""
    found = list(values)
    for kind, field in _extra_fields(extra):
        if kind == 1:
            for position, value in enumerate(found):
                if value == 0xFFFFFFFF and len(field) >= 8:
                    found[position] = int.from_bytes(field[:8], "little")
                    field = field[8:]
            break
    return found


# ---------------------------------------------------------------------------------------------------- tar
def _tar_checksum_fits(head: bytes) -> bool:
    try:
        stated = _tar_number(head[148:156])
    except UnusableError:
        return False
    return stated == sum(head[:148]) + sum(b"        ") + sum(head[156:])


def _tar_number(digits: bytes) -> int:
    """Octal digits, or GNU's big-endian number behind a byte 0x80."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0")[0].strip()
    if text.strip(b"01234567"):
        raise UnusableError(f"a number in it is no number ({text!r})")
    return int(text or b"0", 8)


def _pax_values(data: bytes) -> dict[str, bytes]:
    """The records ``<length> <key>=<value>`` that matter here, a line each."""
    values: dict[str, bytes] = {}
    place, end = 0, len(data.rstrip(b"\0"))
    while place < end:
        match = _PAX_RECORD.match(data, place)
        if match is None or not match.end() < place + int(match[1]) <= len(data):
            raise UnusableError("an extended header in it is damaged")
        place += int(match[1])
        key = match[2].decode("utf-8", "replace")
        if key in ("path", "size") or key.startswith("GNU.sparse"):
            values[key] = data[match.end() : place - 1]
    return values


def _scan_tar(stream: BinaryIO, num_bytes: int, wants: _Wants) -> Iterator[tuple[str, Entry]]:
    place = 0
    long_name: bytes | None = None
    pax: dict[str, bytes] = {}
    while True:
        stream.seek(place)
        head = _read_exactly(stream, _BLOCK_BYTES, "its end")
        if not any(head):
            return
        if not _tar_checksum_fits(head):
            raise UnusableError(f"its tar header at byte {place} is damaged")
        kind = head[156]
        start = place + _BLOCK_BYTES
        size = _tar_number(head[124:136])
        if kind in b"Lx":
            if size > (_MAX_NAME_BYTES if kind == ord("L") else _MAX_PAX_BYTES):
                raise UnusableError(f"its extended header at byte {place} has {size} bytes")
            data = _read_exactly(stream, size, "an extended header")
            if kind == ord("L"):
                long_name = data.split(b"\0")[0]
            else:
                pax = _pax_values(data)
        elif kind in b"Kg":  # long link names, and what is common to all entries
            pass
        elif kind == ord("S"):
            raise UnusableError("it holds sparse files; pack it without --sparse")
        else:
            stated = pax.get("size", b"0").decode("utf-8", "replace")
            if not re.fullmatch(r"[0-9]{1,19}", stated):
                raise UnusableError(f"an extended header in it states the size {stated[:20]!r}")
            size = 0 if kind in _WITHOUT_CONTENTS else int(pax.get("size", size))
            readings = _readings(pax.get("path", long_name or _tar_name(head)), is_utf8=False)
            if kind in _NO_FILES:
                wants(readings, "other")
            elif kind in b"\x0007":
                name = wants(readings, _kind(readings[0]))
                sparse = any(key.startswith("GNU.sparse") for key in pax)
                if name is not None:
                    yield name, Entry(start, size, size, "sparse" if sparse else "stored", None)
            long_name, pax = None, {}
        if start + size > num_bytes:
            raise UnusableError(f"it is truncated: an entry ends at byte {start + size} of {num_bytes}")
        place = start + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _tar_name(head: bytes) -> bytes:
    name, prefix = (head[begin:end].split(b"\0")[0] for begin, end in ((0, 100), (345, 500)))
    return prefix + b"/" + name if prefix and head[257:263] == b"ustar\0" else name
