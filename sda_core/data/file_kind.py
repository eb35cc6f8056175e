"""Recognize files that are not JSON lines by their first bytes, and suggest a remedy.

The download calls :func:`wrong_kind` before it puts a file in place.  The readers call :func:`wrong_contents`, which also
rejects binary data of an unknown kind.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

HEAD_BYTES = 1 << 16
"""Number of first bytes that the detection needs."""

_GZIP = b"\x1f\x8b"
_BLANKS = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_POLARS = "python -c \"import polars; polars.{read}('FILE').write_ndjson('FILE.jsonl')\""
_UNPACK = "unpack it: {command}"
_PACK = "convert it to JSON lines (plain or gzip)"


@dataclass(frozen=True)
class WrongKind:
    """The kind of a file, worded to follow "is", and the remedy."""

    name: str
    advice: str
    expected: str = "JSON lines (one object per line, plain or gzip)"

    def __str__(self) -> str:
        return f"is {self.name}, expected {self.expected}; {self.advice}"


_MAGIC: Sequence[tuple[int, bytes, WrongKind]] = (
    (0, b"PAR1", WrongKind("a parquet file", f"convert it: {_POLARS.format(read='read_parquet')}")),
    (0, b"ARROW1", WrongKind("an Arrow (Feather) file", f"convert it: {_POLARS.format(read='read_ipc')}")),
    (0, b"FEA1", WrongKind("a Feather file (version 1)", _PACK)),
    (0, b"\xff\xff\xff\xff", WrongKind("an Arrow stream", f"convert it: {_POLARS.format(read='read_ipc_stream')}")),
    (0, b"Obj\x01", WrongKind("an Avro file", f"convert it: {_POLARS.format(read='read_avro')}")),
    (0, b"ORC", WrongKind("an ORC file", _PACK)),
    (0, b"BZh", WrongKind("a bzip2 file", _UNPACK.format(command="bunzip2 -k FILE"))),
    (0, b"\xfd7zXZ\x00", WrongKind("an xz file", _UNPACK.format(command="unxz -k FILE"))),
    (0, b"\x5d\x00\x00", WrongKind("an lzma file", _UNPACK.format(command="unlzma -k FILE"))),
    (0, b"\x28\xb5\x2f\xfd", WrongKind("a zstandard file", _UNPACK.format(command="unzstd FILE"))),
    (0, b"\x04\x22\x4d\x18", WrongKind("an lz4 file", _UNPACK.format(command="unlz4 FILE"))),
    (0, b"\x1f\x9d", WrongKind("a file of compress (.Z)", _UNPACK.format(command="uncompress FILE"))),
    (0, b"\xff\x06\x00\x00sNaPpY", WrongKind("a snappy file", "unpack it")),
    (0, b"PK\x05\x06", WrongKind("an empty zip archive", "use the archive that contains the file")),
    (0, b"7z\xbc\xaf\x27\x1c", WrongKind("a 7z archive", _UNPACK.format(command="7z x FILE"))),
    (0, b"Rar!\x1a\x07", WrongKind("a rar archive", _UNPACK.format(command="unrar x FILE"))),
    (257, b"ustar", WrongKind("a tar archive", _UNPACK.format(command="tar -xf FILE"))),
    (0, b"SQLite format 3\x00", WrongKind("an SQLite database", "export its tables as JSON lines")),
    (0, b"\x89HDF\r\n\x1a\n", WrongKind("an HDF5 file", _PACK)),
    (0, b"\x93NUMPY", WrongKind("a NumPy array", _PACK)),
    (
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        WrongKind("an old Excel or Office document", "save it as CSV and convert it to JSON lines"),
    ),
    (0, b"%PDF-", WrongKind("a PDF document", "take the data file itself")),
    (0, b"\xff\xd8\xff", WrongKind("a JPEG image", "take the data file itself")),
    (0, b"\x89PNG\r\n\x1a\n", WrongKind("a PNG image", "take the data file itself")),
    (0, b"RDX", WrongKind("an R data file", _PACK)),
    (0, b"version https://git-lfs", WrongKind("a Git LFS pointer instead of the file", "fetch the file: git lfs pull")),
)
_TWICE_PACKED = WrongKind("gzip inside gzip", _UNPACK.format(command="gunzip FILE.gz"))
_PICKLE = re.compile(rb"\x80[\x02-\x05](?:\x95.{8}|[\]})(cX\x8c])", re.DOTALL)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_ARRAY = re.compile(rb"\[\s*(?:\{|\]\s*$|\[\s*[\"'0-9])")
_CONTROL = re.compile(rb"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
# Text with two or four bytes per character: its byte order mark, or two ASCII characters.
_WIDE = tuple(
    (
        re.compile(pattern, re.DOTALL),
        WrongKind(f"{name} text", f"convert it: iconv -f {code} -t UTF-8 FILE > FILE.jsonl", "UTF-8"),
    )
    for pattern, name, code in (
        (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32", "UTF-32"),
        (rb"\xff\xfe|\xfe\xff", "UTF-16", "UTF-16"),
        (rb"(?:[\t\r\n -~]\x00\x00\x00){2}", "UTF-32", "UTF-32LE"),
        (rb"(?:\x00\x00\x00[\t\r\n -~]){2}", "UTF-32", "UTF-32BE"),
        (rb"(?:[\t\r\n -~]\x00){2}", "UTF-16", "UTF-16LE"),
        (rb"(?:\x00[\t\r\n -~]){2}", "UTF-16", "UTF-16BE"),
    )
)
_SEPARATORS = (b"\t", b",", b";", b"|", b"::")
_ARRAY_KIND = WrongKind("a JSON array (a list)", "convert it: jq -c '.[]' FILE > FILE.jsonl")
_INDENTED_KIND = WrongKind("JSON that is indented over several lines", "convert it: jq -c . FILE > FILE.jsonl")
_COLUMNS_KIND = WrongKind(
    "one JSON object of columns", "write it by rows: pandas.DataFrame.to_json(FILE, orient='records', lines=True)"
)
_ROWS_BY_KEY_KIND = WrongKind("one JSON object with a row under each key", "convert it: jq -c '.[]' FILE > FILE.jsonl")
_ID_FIELDS = frozenset({"reviewerID", "asin", "user_id", "parent_asin"})
_FIELD_NAMES = (
    "reviewerID asin overall unixReviewTime user_id parent_asin rating timestamp title brand store price details images features "
    "categories category description imUrl imageURL imageURLHighRes image related salesRank main_category main_cat videos "
    "author bought_together also_buy also_view feature rank tech1 tech2 helpful style reviewText text reviewerName summary "
    "reviewTime vote verified verified_purchase helpful_vote average_rating rating_number fit similar_item date subtitle"
)
_FIELDS = frozenset(_FIELD_NAMES.split())  # fields of all editions
# In objects that are too long to parse, or indented: a single-valued field that holds a list, or a row under a key.
_SCALAR = rb'"(?:reviewerID|asin|user_id|parent_asin|rating|overall|timestamp|unixReviewTime)"'
_COLUMN = re.compile(rb"\{\s*" + _SCALAR + rb"\s*:\s*\[")
_KEYED_ROW = re.compile(rb'\{\s*"((?:[^"\\]|\\.){1,200})"\s*:\s*\{\s*' + _SCALAR + rb"\s*:")
_ROWS_INSIDE = re.compile(rb'\{\s*"((?:[^"\\]|\\.){1,200})"\s*:\s*(?:\[\s*[\[{]|\{\s*"[01]"\s*:)')


def wrong_kind(head: bytes) -> WrongKind | None:
    """The kind of a file that is not JSON lines; None if it may be JSON lines or is not recognized.

    Args:
        head: the first :data:`HEAD_BYTES` bytes of the file, or the whole file.  One layer of gzip is removed.
    """
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return None  # damaged; decompression will report where
        if head.startswith(_GZIP):
            return _TWICE_PACKED
    return _kind(head)


def wrong_contents(head: bytes) -> WrongKind | None:
    """As :func:`wrong_kind`, for decompressed bytes; also detects binary data of an unknown kind."""
    if head.startswith(_GZIP):
        return _TWICE_PACKED
    kind = _kind(head)
    if kind is None and len(head) >= 64 and head[:1] != b"{" and len(_CONTROL.findall(head[:1024])) > len(head[:1024]) // 10:
        return WrongKind("binary data of an unknown kind", _PACK)
    return kind


def _kind(head: bytes) -> WrongKind | None:
    wide = next((kind for pattern, kind in _WIDE if pattern.match(head)), None)
    return wide or binary_kind(head) or _wrong_text(head)


def binary_kind(head: bytes) -> WrongKind | None:
    """The kind of a binary file, by its signature in the first few bytes."""
    for place, magic, kind in _MAGIC:
        if head.startswith(magic, place):
            return kind
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return WrongKind("an Excel or Office document", "save it as CSV and convert it to JSON lines")
        if re.match(rb"PK\x03\x04.{26}[^/]{1,200}?\.npy", head, re.DOTALL):
            return WrongKind("a file of NumPy arrays (npz)", _PACK)
        return WrongKind("a zip archive", _UNPACK.format(command="unzip FILE"))
    if _PICKLE.match(head):
        return WrongKind("a Python pickle, which is not read because it can run code", _PACK)
    return None


def _wrong_text(head: bytes) -> WrongKind | None:
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANKS)
    if text.startswith(b"<"):
        name = "an HTML page" if _HTML.match(text) else "XML or HTML markup"
        return WrongKind(name, "check the address, or export the data as JSON lines")
    if _ARRAY.match(text):
        return _ARRAY_KIND
    if text.startswith(b"{"):
        return _wrong_object(text)
    return _table(text)


def _wrong_object(text: bytes) -> WrongKind | None:
    first, feed, rest = text.partition(b"\n")
    first = first.strip(_BLANKS)
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return _wrong_record(cast("dict[str, Any]", record))
    if (match := _ROWS_INSIDE.match(text)) is not None:
        key = match[1].decode("utf-8", "replace")
        if key not in _FIELDS:
            return _rows_inside(key)
        if match[0].endswith(b":"):
            return _COLUMNS_KIND
    if _COLUMN.match(text):
        return _COLUMNS_KIND
    if (match := _KEYED_ROW.match(text)) is not None and match[1].decode("utf-8", "replace") not in _FIELDS:
        return _ROWS_BY_KEY_KIND
    # A lone brace, or a first field that ends in a comma or an open bracket, continued on the next line.
    if feed and re.fullmatch(rb'\{(?:\s*"(?:[^"\\]|\\.)*+"\s*:.*[,{\[])?', first, re.DOTALL):
        following = rest.lstrip(_BLANKS)[:1]
        return _INDENTED_KIND if following in (b'"', b"}") or (first[-1:] in b"[" and following in (b"{", b"[", b"]")) else None
    return None


def _wrong_record(record: dict[str, Any]) -> WrongKind | None:
    """The kind of a file that is a single object: rows in a list under a key, or columns instead of rows."""
    if record and all(isinstance(value, dict) and "0" in value for value in record.values()):
        return _COLUMNS_KIND
    if not _ID_FIELDS.isdisjoint(record) and all(isinstance(value, list) for value in record.values()):
        return _COLUMNS_KIND
    rows = [cast("dict[str, Any]", value) for value in record.values() if isinstance(value, dict)]
    if rows and len(rows) == len(record) and not any(map(_ID_FIELDS.isdisjoint, rows)):
        return _ROWS_BY_KEY_KIND
    for key, value in record.items():
        if isinstance(value, list) and _FIELDS.isdisjoint(record):
            rows = cast("list[Any]", value)
            if rows and isinstance(rows[0], dict) and not _FIELDS.isdisjoint(cast("dict[str, Any]", rows[0])):
                return _rows_inside(key)
            if key == "data" and "columns" in record:
                return _COLUMNS_KIND
    return None


def _rows_inside(key: str) -> WrongKind:
    name = key if key.isprintable() and len(key) <= 60 else key[:60].encode("ascii", "replace").decode()
    return WrongKind(f"one JSON object with the rows inside (under {name!r})", f"convert it: jq -c '.{name}[]' FILE > FILE.jsonl")


def _table(text: bytes) -> WrongKind | None:
    """The kind of a table: the first two lines have equally many separators."""
    lines = [line for line in text.split(b"\n")[:4] if line.strip(_BLANKS)]
    if (
        len(lines) < 2
        or any(line[:1] in (b"{", b"[") for line in lines[:2])
        or _CONTROL.search(text[:1024])
        or b"\x00" in text[:1024]
    ):
        return None
    for separator in _SEPARATORS:
        counts = [line.count(separator) for line in lines[:2]]
        quoted = any(b'"' in line for line in lines[:2])
        if counts[0] and (counts[0] == counts[1] or (quoted and counts[1])):
            name = {b"\t": "a table of tab-separated values (TSV)", b",": "a table of comma-separated values (CSV)"}.get(
                separator, f"a table of values separated by {separator.decode()!r}"
            )
            advice = "convert it, with the names of the edition's fields"
            if len(separator) == 1:  # the reader of tables accepts single characters only
                shown = repr(separator.decode())
                advice += f": python -c \"import polars; polars.read_csv('FILE', separator={shown}).write_ndjson('FILE.jsonl')\""
            return WrongKind(name, advice)
    return None
