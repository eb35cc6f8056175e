"""Readers of the raw Amazon review files: editions 2014 (McAuley et al. 2015), 2018 (Ni et al. 2019), 2023 (Hou et al. 2024).

* Files are read as streams, gzip or plain (told by their first bytes), in blocks of whole lines; memory is bounded by
  the block, whatever the file holds.
* A line that cannot be used is counted by reason, never fatal by itself; more of them than the limit is an error that
  names the first.  The first few are quoted in the log.
* Bytes that are no UTF-8 are read as Windows-1252, NUL bytes are dropped; such lines are counted as repaired.
* Review blocks go through polars' JSON reader; a block it does not take whole is halved until the odd lines are alone,
  and those are read one by one.  Both ways give the same rows.

===========  =====================================  =====================================  ====================================
             2014                                   2018                                   2023
===========  =====================================  =====================================  ====================================
reviews      JSON lines                             JSON lines                             JSON lines
metadata     Python literals (or JSON)              JSON lines                             JSON lines
user, item   ``reviewerID``, ``asin``               ``reviewerID``, ``asin``               ``user_id``, ``parent_asin``
time         ``unixReviewTime``, s                  ``unixReviewTime``, s                  ``timestamp``, ms
rating       ``overall``                            ``overall``                            ``rating``
brand        ``brand``                              ``brand``                              ``store``, else ``details.Brand``
categories   first path of ``categories``           ``category``, else ``main_cat``        ``categories``, else ``main_category``
features     \\-                                     ``feature``, else what follows the     ``features``
                                                    path in ``category``
pictures     ``imUrl``                              ``imageURLHighRes``, then              ``images``: variant MAIN first; of
                                                    ``imageURL``, then ``image``           each hi_res, large, thumb
===========  =====================================  =====================================  ====================================
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import polars as pl

from sda_core.data.cleaning import MAX_ENTRIES, clean_label, clean_name, clean_price, clean_text, clean_texts, image_references
from sda_core.data.literals import parse_literal
from sda_core.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 << 20
"""A longer line is skipped (and counted as bad) without being held in memory."""

BLOCK_BYTES = 4 << 20
"""Lines are read in blocks of about this size."""

MAX_ID_CHARS = 64

_READ_BYTES = 1 << 18
_CHUNK_BYTES = 1 << 20
_SLOW_LINES = 64  # a block of so few lines is read one by one when the fast reader refuses it
_HOPELESS_LINES = 10_000  # when so many lines have been read and none could be used, the rest is not tried
_MAX_TIME = 1 << 33  # seconds; the year 2242
_MAX_RATING = 1e6
_MAX_NAME_CHARS = 60  # of a category of 2018
_NUM_QUOTES = 5
_BLANKS = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How UTF-16 and UTF-32 begin: with their byte order marks, or with a brace and what surrounds it.
_WIDE = re.compile(rb"\xff\xfe|(?:\x00\x00)?\xfe\xff|\{\x00.\x00|\{\x00\x00\x00|\x00\{\x00|\x00\x00\x00\{", re.DOTALL)

REVIEW_SCHEMA = {
    "raw_user_id": pl.String,
    "raw_item_id": pl.String,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
    "millisecond": pl.Int16,
}
"""Columns of :func:`read_reviews`: ``timestamp`` in seconds since 1970, ``millisecond`` the rest (0 before 2023)."""

METADATA_SCHEMA = {
    "raw_item_id": pl.String,
    "title": pl.String,
    "brand": pl.String,
    "price": pl.String,
    "categories": pl.List(pl.String),
    "features": pl.List(pl.String),
    "description": pl.String,
    "image_references": pl.List(pl.String),
}
"""Columns of :func:`read_metadata`; all clean text, empty where there is none."""


@dataclass
class LineCount:
    """What became of a file's lines; blank ones are not counted."""

    total: int = 0
    bad: Counter[str] = field(default_factory=Counter[str])
    repaired: Counter[str] = field(default_factory=Counter[str])
    first_bad: int | None = None  # line number, from 1
    quotes: list[str] = field(default_factory=list[str])

    @property
    def num_bad(self) -> int:
        """Lines that could not be used."""
        return self.bad.total()

    def add_bad(self, number: int, reason: str, line: bytes) -> None:
        """Count a line that cannot be used, and quote it if it is among the first few."""
        self.total += 1
        self.bad[reason] += 1
        if self.first_bad is None:
            self.first_bad = number
        if len(self.quotes) < _NUM_QUOTES:
            self.quotes.append(f"line {number} ({reason}): {line[:80]!r}{'...' if len(line) > 80 else ''}")

    def check(self, path: Path, max_bad_share: float) -> None:
        """Say what was found, and raise when too many lines were bad.

        Raises:
            DataError: the file holds no line, or the share of bad lines is over the limit.
        """
        if self.total == 0:
            raise DataError(str(path), "holds no line", "download it again")
        if self.repaired:
            _log.warning("%s: repaired lines: %s", path, _counts(self.repaired))
        if not self.num_bad:
            return
        _log.warning(
            "%s: %d of %d lines cannot be used: %s; %s", path, self.num_bad, self.total, _counts(self.bad), "; ".join(self.quotes)
        )
        if self.num_bad / self.total > max_bad_share:  # a product would round: 0.29 * 100 is less than 29
            share = f"{self.num_bad} of {self.total} lines ({self.num_bad / self.total:.2%})"
            raise DataError(
                str(path),
                f"{share} cannot be used, at most {max_bad_share:.2%} may be ({_counts(self.bad)}); first: {self.quotes[0]}",
                "check dataset.edition and the file, or raise filter.max_bad_line_share",
            )

    def check_hopeless(self, path: Path) -> None:
        """Raise early when nothing of a long file could be used so far: it is another format.

        Raises:
            DataError: ten thousand lines or more were read, and all of them were bad.
        """
        if self.total >= _HOPELESS_LINES and self.num_bad == self.total:
            raise DataError(
                str(path),
                f"none of the first {self.total} lines can be used ({_counts(self.bad)}); the first is {self.quotes[0]}",
                "check dataset.edition and the file",
            )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counter.items()))


@dataclass(frozen=True)
class _ReviewFields:
    """Where an edition's review lines keep what is wanted."""

    user: str
    item: str
    rating: str
    time: str
    ticks_per_second: int


def _review_fields(edition: int) -> _ReviewFields:
    match edition:
        case 2014 | 2018:
            return _ReviewFields("reviewerID", "asin", "overall", "unixReviewTime", 1)
        case 2023:
            return _ReviewFields("user_id", "parent_asin", "rating", "timestamp", 1000)
        case _:
            raise ConfigError("params.yaml: dataset.edition", f"should be 2014, 2018 or 2023 (got {edition})")


# --------------------------------------------------------------------------------------------------- reviews
def read_reviews(
    path: Path,
    edition: int,
    *,
    max_bad_line_share: float,
    lines: LineCount | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[pl.DataFrame]:
    """Read a file of reviews as a stream of tables.

    Args:
        path: JSON lines, gzip or plain.
        edition: 2014, 2018 or 2023.
        max_bad_line_share: of all lines; checked when the file ends.
        lines: counts are added here; complete once the stream is used up.
        block_bytes: how much is held at a time; has no influence on the rows.

    Yields:
        Tables of :data:`REVIEW_SCHEMA`, rows in file order.

    Raises:
        ConfigError: no such edition.
        DataError: the file is missing, empty, damaged, or has too many bad lines.
    """
    fields = _review_fields(edition)
    return _stream_reviews(path, fields, max_bad_line_share, LineCount() if lines is None else lines, block_bytes)


def _stream_reviews(
    path: Path, fields: _ReviewFields, max_bad_line_share: float, lines: LineCount, block_bytes: int
) -> Iterator[pl.DataFrame]:
    number = 1
    for block, whole in _ahead(_blocks(path, block_bytes)):
        if whole:
            yield from _reviews_of_block(block, number, fields, lines)
        else:
            lines.add_bad(number, "too long", block)
        number += max(block.count(b"\n"), 1)
        lines.check_hopeless(path)
    lines.check(path, max_bad_line_share)


def _reviews_of_block(block: bytes, number: int, fields: _ReviewFields, lines: LineCount) -> list[pl.DataFrame]:
    if not block.strip(_BLANKS):
        return []
    frame = _reviews_fast(block, fields)
    if frame is not None:
        lines.total += len(frame)
        return [frame]
    if block.count(b"\n") <= _SLOW_LINES:
        return [_reviews_slowly(block, number, fields, lines)]
    middle = block.index(b"\n", len(block) // 2) + 1
    if middle == len(block):
        middle = block.rindex(b"\n", 0, len(block) // 2) + 1
    head = _reviews_of_block(block[:middle], number, fields, lines)
    return head + _reviews_of_block(block[middle:], number + block.count(b"\n", 0, middle), fields, lines)


def _reviews_fast(block: bytes, fields: _ReviewFields) -> pl.DataFrame | None:
    """A block through polars' JSON reader, or None where one line of it is anything but ordinary.

    The reader turns numbers, words and lists into strings where a string is asked for (``1e20`` into twenty-one digits).
    The pattern for ids keeps lists out; where an id could have been a number or a word, the bytes are looked at.
    """
    if b"\x00" in block:
        return None
    schema = {fields.user: pl.String, fields.item: pl.String, fields.rating: pl.Float64, fields.time: pl.Int64}
    try:
        block.decode("utf-8")
        frame = pl.read_ndjson(io.BytesIO(block), schema=schema)
    except (UnicodeDecodeError, pl.exceptions.PolarsError):
        return None
    if len(frame) != block.count(b"\n") + (not block.endswith(b"\n")):
        return None
    ids = pl.col(fields.user, fields.item)
    ordinary = frame.select(
        ids.str.contains(r"^[A-Za-z0-9_-]{1,64}$").all().name.suffix(" id"),
        pl.col(fields.rating).abs().le(_MAX_RATING).all().name.suffix(" rating"),
        pl.col(fields.time).is_between(0, _MAX_TIME * fields.ticks_per_second, closed="left").all().name.suffix(" time"),
        pl.all_horizontal(pl.all().is_not_null()).all().alias("present"),
    )
    if not all(ordinary.row(0)):
        return None
    unquoted = frame.select(ids.str.contains(r"^-?[0-9]+(?:[eE]|$)|^true$|^false$|^null$").any())
    if any(unquoted.row(0)) and any(re.search(rb'"%s"\s*:\s*[^"\s]' % key.encode(), block) for key in (fields.user, fields.item)):
        return None
    ticks = fields.ticks_per_second
    return frame.select(
        pl.col(fields.user).alias("raw_user_id"),
        pl.col(fields.item).alias("raw_item_id"),
        pl.col(fields.rating).alias("rating"),
        (pl.col(fields.time) // ticks).alias("timestamp"),
        (pl.col(fields.time) % ticks * (1000 // ticks)).cast(pl.Int16).alias("millisecond"),
    )


def _reviews_slowly(block: bytes, number: int, fields: _ReviewFields, lines: LineCount) -> pl.DataFrame:
    rows: list[tuple[str, str, float, int, int]] = []
    for offset, line in enumerate(block.split(b"\n")):
        text = _decode(line, number + offset, lines)
        if text is None:
            continue
        row = _review_row(text, fields)
        if isinstance(row, str):
            lines.add_bad(number + offset, row, line)
        else:
            lines.total += 1
            rows.append(row)
    return pl.DataFrame(rows, schema=REVIEW_SCHEMA, orient="row")


def _review_row(text: str, fields: _ReviewFields) -> tuple[str, str, float, int, int] | str:
    """One review, or the reason why there is none."""
    record = _json_record(text)
    if isinstance(record, str):
        return record
    user, item = _as_id(record.get(fields.user)), _as_id(record.get(fields.item))
    if user is None:
        return "no user id"
    if item is None:
        return "no item id"
    rating = _as_number(record.get(fields.rating))
    if rating is None or abs(rating) > _MAX_RATING:
        return "no rating"
    time = _as_number(record.get(fields.time))
    if time is None or time != math.floor(time) or not 0 <= time < _MAX_TIME * fields.ticks_per_second:
        return "no time"
    seconds, rest = divmod(int(time), fields.ticks_per_second)
    return user, item, float(rating), seconds, rest * (1000 // fields.ticks_per_second)


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which the first of equal keys counts, as in polars' reader."""
    return dict(reversed(pairs))


_REVIEW_JSON = json.JSONDecoder(strict=False, object_pairs_hook=_first_of_each)
_METADATA_JSON = json.JSONDecoder(strict=False)


def _json_record(text: str, decoder: json.JSONDecoder = _REVIEW_JSON) -> dict[str, Any] | str:
    """A JSON object, or the reason why there is none."""
    try:
        record = decoder.decode(text)
    except (ValueError, RecursionError):
        return "no JSON"
    return cast("dict[str, Any]", record) if isinstance(record, dict) else "no object"


def _as_id(value: Any) -> str | None:
    """A usable id: printable, 1 to 64 characters, no slash, no white space at its ends, no leading dot.

    Ids become file names (``<id>.jpg``) and table keys.  Whole numbers are taken as their digits.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**MAX_ID_CHARS:
        value = str(value)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
        return None
    if "/" in value or "\\" in value or value[0] == "." or value != value.strip() or "\ufffd" in value:
        return None
    return value


def _as_number(value: Any) -> float | int | None:
    """A finite number; numbers in strings count, booleans do not."""
    if isinstance(value, str):
        # Plain decimal notation only: Python would take underscores, 'nan' and other digits too.
        if not re.fullmatch(r"\s*-?[0-9]{1,18}(\.[0-9]{0,18})?\s*", value):
            return None
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------- metadata
def read_metadata(
    path: Path,
    edition: int,
    *,
    max_bad_line_share: float,
    keep: Collection[str] | None = None,
    lines: LineCount | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> pl.DataFrame:
    """Read a file of item metadata into clean fields, one row an item.

    Of several lines of one item one counts, whatever their order: one with a usable title before one without, then the
    one with the most fields filled, then the longest, then the first by code point.  Lines are not mixed, since they may
    describe different offers.

    Args:
        path: Python literals (2014) or JSON lines, gzip or plain.
        edition: 2014, 2018 or 2023.
        max_bad_line_share: of all lines.
        keep: item ids wanted, or None for all.  A line that plainly names another item is counted, but not parsed.
        lines: counts are added here.
        block_bytes: how much of the file is held at a time; has no influence on the rows.

    Returns:
        Table of :data:`METADATA_SCHEMA`, sorted by ``raw_item_id``.

    Raises:
        ConfigError: no such edition.
        DataError: the file is missing, empty, damaged, or has too many bad lines.
    """
    _review_fields(edition)  # tells of an unknown edition
    wanted = None if keep is None else frozenset(keep)
    lines = LineCount() if lines is None else lines
    frames = [pl.DataFrame(schema=METADATA_SCHEMA)]
    number = 1
    for block, whole in _ahead(_blocks(path, block_bytes)):
        if whole:
            frames.append(_metadata_of_block(block, number, edition, wanted, lines))
        else:
            lines.add_bad(number, "too long", block)
        number += max(block.count(b"\n"), 1)
        lines.check_hopeless(path)
    lines.check(path, max_bad_line_share)
    return _one_line_per_item(pl.concat(frames)).sort("raw_item_id")


def _one_line_per_item(table: pl.DataFrame) -> pl.DataFrame:
    """Of the rows of one item, the one that :func:`read_metadata` promises."""
    repeated = table["raw_item_id"].is_duplicated()
    if not repeated.any():
        return table
    lists = [name for name, dtype in METADATA_SCHEMA.items() if dtype == pl.List(pl.String)]
    texts = [pl.col(name).list.join(_SEPARATOR) if name in lists else pl.col(name) for name in METADATA_SCHEMA]
    whole = pl.concat_str(texts, separator=_SEPARATOR + _SEPARATOR).alias("whole")
    num_filled = pl.sum_horizontal((text != "").cast(pl.Int32) for text in texts).alias("num_filled")
    rows = table.filter(repeated).with_columns(whole, num_filled)
    best = ["raw_item_id", pl.col("title") == "", -pl.col("num_filled"), -pl.col("whole").str.len_chars().cast(pl.Int64), "whole"]
    chosen = rows.sort(best).unique("raw_item_id", keep="first", maintain_order=True).drop("whole", "num_filled")
    return pl.concat([table.filter(~repeated), chosen])


def _metadata_of_block(block: bytes, number: int, edition: int, wanted: frozenset[str] | None, lines: LineCount) -> pl.DataFrame:
    if not block.strip(_BLANKS):
        return pl.DataFrame(schema=METADATA_SCHEMA)
    rows: list[tuple[Any, ...]] = []
    key = "parent_asin" if edition == 2023 else "asin"
    for offset, line in enumerate(block.split(b"\n")):
        if not line:
            continue
        if wanted is not None and _names_another(line, key, wanted):
            lines.total += 1
            continue
        record = None if edition == 2014 else _ordinary_record(line, key)
        if record is None:
            text = _decode(line, number + offset, lines)
            if text is None:
                continue
            record = _literal_record(text) if edition == 2014 else _json_record(text, _METADATA_JSON)
        if isinstance(record, str):
            lines.add_bad(number + offset, record, line)
            continue
        item = _as_id(record.get(key))
        if item is None:
            lines.add_bad(number + offset, "no item id", line)
            continue
        lines.total += 1
        if wanted is None or item in wanted:
            rows.append((item, *_metadata_row(record, edition)))
    # Lists travel as joined strings: polars would make a series of each.  Clean texts hold no control character.
    columns = list(zip(*rows, strict=True)) or [()] * len(METADATA_SCHEMA)
    frame = pl.DataFrame(dict(zip(METADATA_SCHEMA, columns, strict=True)), schema=dict.fromkeys(METADATA_SCHEMA, pl.String))
    lists = [name for name, dtype in METADATA_SCHEMA.items() if dtype == pl.List(pl.String)]
    entries = pl.col(lists).str.split(_SEPARATOR)
    return frame.with_columns(
        pl.when(pl.col(lists) == "").then(pl.lit([], dtype=pl.List(pl.String))).otherwise(entries).name.keep()
    )


_SEPARATOR = "\x1f"

# The id in the raw bytes; begins with letters, so that the search is fast.  In a JSON string the quote after the key
# would have a backslash before it, so this is a key, if perhaps one inside another object.
_RAW_ID = {key: re.compile(key.encode() + rb"""['"]\s*:\s*['"]([\w-]{1,64})['"]""") for key in ("asin", "parent_asin")}


def _names_another(line: bytes, key: str, wanted: frozenset[str]) -> bool:
    """Whether a line plainly is about an item that is not wanted: it need not be parsed then."""
    ids = _RAW_ID[key].findall(line)
    return len(ids) == 1 and ids[0].decode("ascii") not in wanted


def _ordinary_record(line: bytes, key: str) -> dict[str, Any] | None:
    """A JSON object, if both readers of JSON agree on it, else None.

    orjson is several times faster than Python's reader.  It refuses bytes that are no UTF-8, NUL bytes, raw control
    characters, lone surrogates and NaN, and takes the last of equal keys as Python does; but a whole number beyond 64
    bits becomes a float, which matters where the id is such a number.
    """
    try:
        record = _object(orjson.loads(line))
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record.get(key), str) else None


def _literal_record(text: str) -> dict[str, Any] | str:
    """A dict in Python's syntax (or, in mirrors that were converted, JSON's), or the reason why there is none."""
    try:
        record = parse_literal(text)
    except ValueError:
        converted = _json_record(text, _METADATA_JSON)
        return "no Python literal" if isinstance(converted, str) else converted
    return cast("dict[str, Any]", record) if isinstance(record, dict) else "no dict"


def _metadata_row(record: dict[str, Any], edition: int) -> tuple[str, ...]:
    """title, brand, price, categories, features, description, image_references; lists joined with the separator."""
    match edition:
        case 2014:
            brand, features = record.get("brand"), None
            categories = _names(_first_path(record.get("categories")))
            pictures = [record.get("imUrl")]
        case 2018:
            path, bullets = _path_and_bullets(_first_path(record.get("category")))
            brand, features = record.get("brand"), record.get("feature") or bullets
            categories = _names(path) or _names([record.get("main_cat")])
            pictures = _entries(record.get("imageURLHighRes")) + _entries(record.get("imageURL")) + _entries(record.get("image"))
        case _:
            brand = record.get("store") or _object(record.get("details")).get("Brand")
            features = record.get("features")
            categories = _names(_first_path(record.get("categories"))) or _names([record.get("main_category")])
            pictures = _pictures_2023(record.get("images"))
    return (
        clean_name(record.get("title")),
        clean_label(brand),
        clean_price(record.get("price")),
        _SEPARATOR.join(categories),
        _SEPARATOR.join(clean_texts(features)),
        clean_text(record.get("description")),
        _SEPARATOR.join(image_references(pictures)),
    )


def _entries(value: Any) -> list[Any]:
    """A list as it is, one string as a list of one, anything else as an empty one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, tuple):
        value = list(cast("tuple[Any, ...]", value))
    return cast("list[Any]", value)[: 4 * MAX_ENTRIES] if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    """An object as it is, anything else as an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _names(values: list[Any]) -> list[str]:
    return [name for name in map(clean_label, values) if name]


def _first_path(value: Any) -> list[Any]:
    """The first category path of a list of paths, or the list itself where it is one path."""
    entries = _entries(value)
    for entry in entries:
        if isinstance(entry, list | tuple):
            entries = _entries(entry)
            break
    return entries[:MAX_ENTRIES]


def _path_and_bullets(entries: list[Any]) -> tuple[list[Any], list[Any]]:
    """A path of 2018, and the product's bullet points that follow it in many items.

    They begin after a piece of markup (``</span></span></span>``), or with the first entry that is no name: a sentence
    of four words or more, or a longer text than any category's name.
    """
    for position, entry in enumerate(entries):
        if isinstance(entry, str):
            if entry.startswith("</"):
                return entries[:position], entries[position + 1 :]
            if position and (len(entry) > _MAX_NAME_CHARS or (entry.endswith(".") and entry.count(" ") >= 3)):
                return entries[:position], entries[position:]
    return entries, []


def _pictures_2023(value: Any) -> list[Any]:
    """Addresses of all pictures, variant MAIN first; of each the largest first.

    ``images`` is a list of objects in the published files, and an object of lists in the data set hub's copies.
    """
    if isinstance(value, dict):
        columns = {key: _entries(_object(value).get(key)) for key in ("variant", "hi_res", "large", "thumb")}
        length = max(map(len, columns.values()))
        pictures = [{key: column[row] for key, column in columns.items() if row < len(column)} for row in range(length)]
    else:
        pictures = [cast("dict[str, Any]", entry) for entry in _entries(value) if isinstance(entry, dict)]
    pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")
    return [picture.get(size) for picture in pictures for size in ("hi_res", "large", "thumb")]


# ----------------------------------------------------------------------------------------------------- lines
def _decode(line: bytes, number: int, lines: LineCount) -> str | None:
    """A line's text, repaired where that is possible; None for a blank or hopeless one."""
    stripped = line.strip(_BLANKS)
    if not stripped:
        return None
    if stripped.startswith(_BYTE_ORDER_MARK):  # inside a file: it was put together from several
        stripped = stripped.removeprefix(_BYTE_ORDER_MARK).strip(_BLANKS)
        lines.repaired["byte order mark"] += 1
    if b"\x00" in stripped:
        stripped = stripped.replace(b"\x00", b"").strip(_BLANKS)
        if not stripped:
            lines.add_bad(number, "NUL bytes only", line)
            return None
        lines.repaired["NUL bytes"] += 1
    try:
        return stripped.decode("utf-8")
    except UnicodeDecodeError:
        lines.repaired["not UTF-8"] += 1
        return stripped.decode("cp1252", errors="replace")


def _blocks(path: Path, block_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Blocks of whole lines (True), and the beginnings of lines that are too long to be held (False)."""
    held: list[bytes] = []  # whole lines, then the beginning of one
    num_held = 0
    line_start = 0  # where in the held bytes the unfinished line begins
    skipping = False
    for chunk in _chunks(path):
        first = chunk.find(b"\n")
        if skipping:
            if first < 0:
                continue
            chunk = chunk[first + 1 :]
            skipping = False
            first = chunk.find(b"\n")
        if num_held - line_start + (len(chunk) if first < 0 else first) > MAX_LINE_BYTES:
            together = b"".join(held) + chunk
            if line_start:
                yield together[:line_start], True
            yield together[line_start : line_start + 200].split(b"\n")[0], False
            held, num_held, line_start = [], 0, 0
            skipping = first < 0
            chunk = b"" if skipping else chunk[first + 1 :]
        last = chunk.rfind(b"\n")
        if last >= 0 and num_held + last + 1 >= block_bytes:
            yield b"".join(held) + chunk[: last + 1], True
            held, num_held, line_start = [chunk[last + 1 :]], len(chunk) - last - 1, 0
        else:
            held.append(chunk)
            if last >= 0:
                line_start = num_held + last + 1
            num_held += len(chunk)
    if num_held:
        yield b"".join(held), True


def _ahead(blocks: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    """The same blocks; the next one is read and unpacked while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = pool.submit(next, blocks, None)
            yield block


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, unpacked if it is gzip, in pieces of at most :data:`_CHUNK_BYTES`; without a byte order mark."""
    try:
        with path.open("rb") as handle:
            head = handle.read(_READ_BYTES)
            if not head:
                raise DataError(str(path), "is empty", "download it again")
            rest = iter(lambda: handle.read(_READ_BYTES), b"")
            pieces = _gunzip(path, head, rest) if head.startswith(b"\x1f\x8b") else _chain(head, rest)
            for position, piece in enumerate(pieces):
                yield _text_start(path, piece) if position == 0 else piece
    except OSError as error:
        raise DataError(
            str(path), f"cannot be read ({error.strerror or error})", "run the download stage, or name the right file"
        ) from None


def _text_start(path: Path, piece: bytes) -> bytes:
    """The first bytes of a text without UTF-8's byte order mark.

    Raises:
        DataError: it is UTF-16 or UTF-32, which would look like lines full of NUL bytes.
    """
    if _WIDE.match(piece):
        raise DataError(str(path), "is UTF-16 or UTF-32 text, expected UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
    return piece.removeprefix(_BYTE_ORDER_MARK)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _gunzip(path: Path, head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack a gzip file of one or several members; a small file that unpacks to a huge one is unpacked bit by bit."""
    unpacker = zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    fresh = True  # between two members
    for packed in _chain(head, rest):
        data = packed
        while data:
            if fresh:
                data = data.lstrip(b"\x00")  # some writers pad the end of a file
                if not data:
                    break
                fresh = False
            try:
                piece = unpacker.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise DataError(str(path), f"is a damaged gzip file ({error})", "delete it and download it again") from None
            if piece:
                yield piece
            data = unpacker.unconsumed_tail
            if unpacker.eof:
                data = unpacker.unused_data
                unpacker, fresh = zlib.decompressobj(wbits=31), True
    if not fresh:
        raise DataError(str(path), "is a gzip file that ends too early", "delete it and download it again")
