"""Readers of the raw Amazon review files: editions 2014 (McAuley et al. 2015), 2018 (Ni et al. 2019), 2023 (Hou et al. 2024).

* Files, gzip or plain (detected from their first bytes), are streamed in blocks of whole lines; the block size bounds the
  memory for any file.
* Bad lines are skipped and counted by reason; if their share exceeds the limit, an error names the first one.  The first
  few are quoted in the log.
* Bytes that are not UTF-8 are read as Windows-1252, and NUL bytes are dropped; such lines are counted as repaired.
* polars' JSON reader reads blocks of reviews.  A block that it rejects is halved until the unusual lines are isolated, and
  those are read one by one.  Both ways give the same rows.
* Times may have another unit than the edition's (:mod:`sda_core.data.times`); dropped values are counted by field and
  reason (:mod:`sda_core.data.metadata_values`).
* A file of another kind or edition is an error that names it (:mod:`sda_core.data.file_kind`).

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
images       ``imUrl``                              ``imageURLHighRes``, then              ``images``: variant MAIN first; of
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import polars as pl

from sda_core.data import times
from sda_core.data.file_kind import HEAD_BYTES, wrong_contents
from sda_core.data.identifiers import MAX_ITEM_ID_CHARS, MAX_USER_ID_CHARS, BadId, read_id
from sda_core.data.literals import has_long_number, parse_literal
from sda_core.data.metadata_values import metadata_row, other_edition
from sda_core.dropped_values import ValueCount
from sda_core.errors import ConfigError, DataError
from sda_core.read_ahead import read_ahead

_log = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 << 20
"""Longer lines are skipped (and counted as bad) without being held in memory."""

BLOCK_BYTES = 4 << 20
"""Lines are read in blocks of about this size."""

_READ_BYTES = 1 << 18
_CHUNK_BYTES = 1 << 20
_SLOW_LINES = 64  # a block with at most so many lines is read one by one if the fast reader rejects it
_HOPELESS_LINES = 10_000  # stop if so many lines were read and all of them were bad
_MAX_RATING = 1e6
_NUM_QUOTES = 5
_NUM_FIELDS = 12  # in a message
_BLANKS = b" \t\r\n"
_AGAIN = "if it is a copy of your own file, correct that file; else delete it and download it again"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

REVIEW_SCHEMA = {
    "raw_user_id": pl.String,
    "raw_item_id": pl.String,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
    "millisecond": pl.Int16,
}
"""Columns of :func:`read_reviews`: ``timestamp`` in seconds since 1970, ``millisecond`` the rest."""

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
"""Columns of :func:`read_metadata`; all clean text, empty if missing."""


@dataclass
class LineCount:
    """Counts of a file's lines by outcome; blank lines are not counted."""

    total: int = 0
    bad: Counter[str] = field(default_factory=Counter[str])
    repaired: Counter[str] = field(default_factory=Counter[str])
    first_bad: int | None = None  # line number, from 1
    quotes: list[str] = field(default_factory=list[str])
    not_parsed: int = 0  # metadata of items that are not requested
    not_used: int = 0  # metadata of items that have a better line
    units: Counter[times.Unit] = field(default_factory=Counter[times.Unit])  # of the times of usable reviews
    stripped_ids: Counter[str] = field(default_factory=Counter[str])  # white space removed, by column
    values: ValueCount = field(default_factory=ValueCount)  # of metadata
    without_id: dict[str, str] = field(default_factory=dict[str, str])  # reason of a bad line: the field it lacks, those it has

    @property
    def num_bad(self) -> int:
        """The number of bad lines."""
        return self.bad.total()

    def add_bad(self, number: int, reason: str, line: bytes) -> None:
        """Count a bad line, and quote it in the log if it is among the first few."""
        self.total += 1
        self.bad[reason] += 1
        if self.first_bad is None:
            self.first_bad = number
        if len(self.quotes) < _NUM_QUOTES:
            self.quotes.append(f"line {number} ({reason}): {line[:80]!r}{'...' if len(line) > 80 else ''}")

    def note_fields(self, reason: str, key: str, record: dict[str, Any]) -> None:
        """Store the fields of the first line that is bad because the field of an id is not among them."""
        if key not in record and reason not in self.without_id:
            some = [repr(name) for name in list(record)[:_NUM_FIELDS]] + ["..."] * (len(record) > _NUM_FIELDS)
            self.without_id[reason] = f"the id is expected in the field {key!r}, and the first such line has {', '.join(some)}"

    def check(self, path: Path, max_bad_share: float) -> None:
        """Log the counts, and raise if too many lines were bad.

        Raises:
            DataError: the file has no line, or the share of bad lines exceeds the limit.
        """
        if self.total == 0:
            raise DataError(str(path), "has no lines", _AGAIN)
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
                f"{share} cannot be used, at most {max_bad_share:.2%} may be ({_counts(self.bad)}); first: {self._first_quote}",
                self._advice("check dataset.edition and the file, or raise filter.max_bad_line_share"),
            )
        num_parsed = self.total - self.not_parsed
        if (others := self._of_other_editions()) / num_parsed > max_bad_share:
            raise DataError(
                str(path), f"{others} of {num_parsed} lines read have {self._common_reason()}", self._advice("check it")
            )

    def check_hopeless(self, path: Path) -> None:
        """Raise early if all lines so far were bad, which means another format.

        Raises:
            DataError: ten thousand lines or more were read, and all of them were bad.
        """
        if self.total >= _HOPELESS_LINES and self.num_bad == self.total:
            raise DataError(
                str(path),
                f"none of the first {self.total} lines can be used ({_counts(self.bad)}); the first is {self._first_quote}",
                self._advice("check dataset.edition and the file"),
            )

    def undate(self, path: Path, count: int, max_bad_share: float) -> None:
        """Count reviews whose time is a small number as bad, in a file whose other times are dates.

        Raises:
            DataError: with them, the share of bad lines exceeds the limit.
        """
        self.bad[times.UNDATED] += count
        self.units["small"] -= count
        _log.warning("%s: %d of %d lines cannot be used: %s", path, count, self.total, times.UNDATED)
        if self.num_bad / self.total > max_bad_share:
            raise DataError(
                str(path),
                f"{self.num_bad} of {self.total} lines ({self.num_bad / self.total:.2%}) cannot be used, at most"
                f" {max_bad_share:.2%} may be ({_counts(self.bad)})",
                "give all times in one unit since 1970, or raise filter.max_bad_line_share",
            )

    def log_adapted(self, path: Path, own_unit: times.Unit) -> None:
        """Log the times and ids that did not have the edition's format."""
        others = {unit: count for unit, count in self.units.items() if unit not in (own_unit, "small") and count}
        if others:
            found = ", ".join(
                f"{count} in {'ISO 8601 text' if unit == 'text' else unit}" for unit, count in sorted(others.items())
            )
            _log.warning("%s: times that are not in %s, the edition's unit, were converted: %s", path, own_unit, found)
        if self.units["small"]:
            _log.warning(
                "%s: %d of %d times are numbers below %d, which cannot be dates since 1990; they are used for the order only",
                path, self.units["small"], self.units.total(), times.FIRST_SECOND,
            )  # fmt: skip
        if self.stripped_ids:
            _log.warning("%s: white space at the ends of ids was removed: %s", path, _counts(self.stripped_ids))

    def time_statistics(self, edition: int) -> dict[str, int]:
        """Counts of usable reviews by unit of time; the first, ``times_converted``, counts times not in the edition's unit."""
        own = _review_fields(edition).unit
        return {
            "times_converted": sum(count for unit, count in self.units.items() if unit not in (own, "small")),
            **{f"times_in_{unit}": self.units[unit] for unit in times.TICKS},
            "times_as_text": self.units["text"],
            "times_without_date": self.units["small"],
        }

    @property
    def _first_quote(self) -> str:
        return self.quotes[0] if self.quotes else ""

    def _common_reason(self) -> str:
        return max(self.bad, key=lambda reason: (self.bad[reason], reason))

    def _of_other_editions(self) -> int:
        return sum(count for reason, count in self.bad.items() if reason.startswith(_OTHER_EDITION))

    def _advice(self, otherwise: str) -> str:
        """The remedy for bad lines: set the edition if most of them are of another one."""
        reason = self._common_reason()
        if reason in self.without_id:
            return f"{self.without_id[reason]}; rename the field, or {otherwise}"
        return f"set dataset.edition to {reason.removeprefix(_OTHER_EDITION)}" if reason.startswith(_OTHER_EDITION) else otherwise


_OTHER_EDITION = "fields that look like edition "  # prefix of a reason, followed by the editions


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counter.items()))


@dataclass(frozen=True)
class _ReviewFields:
    """The names of the used fields in the review lines of an edition."""

    user: str
    item: str
    rating: str
    time: str
    unit: times.Unit


def _review_fields(edition: int) -> _ReviewFields:
    match edition:
        case 2014 | 2018:
            return _ReviewFields("reviewerID", "asin", "overall", "unixReviewTime", "seconds")
        case 2023:
            return _ReviewFields("user_id", "parent_asin", "rating", "timestamp", "milliseconds")
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
        max_bad_line_share: maximum share of bad lines, checked at the end of the file.
        lines: counts are added here; complete once the stream is exhausted.
        block_bytes: size of a block; does not affect the rows.

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
    for block, whole in read_ahead(_blocks(path, block_bytes)):
        if whole:
            yield from _reviews_of_block(block, number, fields, lines)
        else:
            lines.add_bad(number, "too long", block)
        number += max(block.count(b"\n"), 1)
        lines.check_hopeless(path)
    lines.log_adapted(path, fields.unit)
    lines.check(path, max_bad_line_share)


def _reviews_of_block(block: bytes, number: int, fields: _ReviewFields, lines: LineCount) -> list[pl.DataFrame]:
    if not block.strip(_BLANKS):
        return []
    found = _reviews_fast(block, fields)
    if found is not None:
        frame, unit = found
        lines.total += len(frame)
        lines.units[unit] += len(frame)
        return [frame]
    if block.count(b"\n") <= _SLOW_LINES:
        return [_reviews_slowly(block, number, fields, lines)]
    middle = block.index(b"\n", len(block) // 2) + 1
    if middle == len(block):
        middle = block.rindex(b"\n", 0, len(block) // 2) + 1
    head = _reviews_of_block(block[:middle], number, fields, lines)
    return head + _reviews_of_block(block[middle:], number + block.count(b"\n", 0, middle), fields, lines)


# Ordinary ids: printable ASCII without leading or trailing spaces, starting neither like a list nor like an object.
_ORDINARY_ID = r"^[!-Z\\^-z|}~](?:[ -~]*[!-~])?$"
# Strings that polars' reader may have made from a number or a literal.
_UNQUOTED = r"^-?[0-9][0-9.eE+-]*$|^true$|^false$|^null$"


def _reviews_fast(block: bytes, fields: _ReviewFields) -> tuple[pl.DataFrame, times.Unit] | None:
    """Read a block with polars' JSON reader; returns its rows and unit of times, or None if a line is unusual.

    The reader converts numbers, literals and lists to strings if the schema asks for a string (``1e20`` to twenty-one digits).
    The pattern for ids excludes lists; if an id could be a converted number or literal, the bytes are checked.
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
    ids, time = pl.col(fields.user, fields.item), pl.col(fields.time)
    ordinary = frame.select(
        ids.str.contains(_ORDINARY_ID).all().name.suffix(" id"),
        pl.col(fields.user).str.len_bytes().le(MAX_USER_ID_CHARS).all().alias("user length"),
        pl.col(fields.item).str.len_bytes().le(MAX_ITEM_ID_CHARS).all().alias("item length"),
        pl.col(fields.rating).abs().le(_MAX_RATING).all().name.suffix(" rating"),
        pl.all_horizontal(pl.all().is_not_null()).all().alias("present"),
    )
    if not all(ordinary.row(0)):
        return None
    earliest, latest = frame.select(time.min().alias("first"), time.max().alias("last")).row(0)
    unit = times.unit_of(earliest)
    if unit is None or times.unit_of(latest) != unit:  # several units in a block: check each value
        return None
    unquoted = frame.select(ids.str.contains(_UNQUOTED).any())
    if any(unquoted.row(0)) and any(re.search(rb'"%s"\s*:\s*[^"\s]' % key.encode(), block) for key in (fields.user, fields.item)):
        return None
    ticks = 1 if unit == "small" else times.TICKS[unit]
    millisecond = pl.lit(0) if ticks == 1 else time % ticks // (ticks // 1000)
    frame = frame.select(
        pl.col(fields.user).alias("raw_user_id"),
        pl.col(fields.item).alias("raw_item_id"),
        pl.col(fields.rating).alias("rating"),
        (time // ticks).alias("timestamp"),
        millisecond.cast(pl.Int16).alias("millisecond"),
    )
    return frame, unit


def _reviews_slowly(block: bytes, number: int, fields: _ReviewFields, lines: LineCount) -> pl.DataFrame:
    rows: list[tuple[str, str, float, int, int]] = []
    for offset, line in enumerate(block.split(b"\n")):
        text = _decode(line, number + offset, lines)
        if text is None:
            continue
        row = _review_row(text, fields, lines)
        if isinstance(row, str):
            lines.add_bad(number + offset, row, line)
        else:
            lines.total += 1
            rows.append(row)
    return pl.DataFrame(rows, schema=REVIEW_SCHEMA, orient="row")


def _review_row(text: str, fields: _ReviewFields, lines: LineCount) -> tuple[str, str, float, int, int] | str:
    """One review, or the reason why there is none."""
    record = _json_record(text)
    if isinstance(record, str):
        return record
    user = read_id(record.get(fields.user), "user", MAX_USER_ID_CHARS)
    item = read_id(record.get(fields.item), "item", MAX_ITEM_ID_CHARS)
    if isinstance(user, BadId) or isinstance(item, BadId):
        if (other := _looks_like(record, fields)) is not None:
            return other
        reason, key = (str(user), fields.user) if isinstance(user, BadId) else (str(item), fields.item)
        lines.note_fields(reason, key, record)
        return reason
    given = record.get(fields.rating)
    rating = _as_number(given)
    if rating is None:
        return "rating is missing" if given is None or given == "" else "rating is not a number"
    if abs(rating) > _MAX_RATING:
        return f"rating is beyond {_MAX_RATING:.0f}"
    time = times.read_time(record.get(fields.time))
    if isinstance(time, str):
        return time
    milliseconds, unit = time
    lines.units[unit] += 1
    for column, is_stripped in (("user", user[1]), ("item", item[1])):
        if is_stripped:
            lines.stripped_ids[column] += 1
    seconds, rest = divmod(milliseconds, 1000)
    return user[0], item[0], float(rating), seconds, rest


def _looks_like(record: dict[str, Any], fields: _ReviewFields) -> str | None:
    """The reason for a bad review that has the fields of another edition, else None."""
    others = (
        ({"user_id", "parent_asin"}, "2023")
        if fields.user == "reviewerID"
        else ({"reviewerID", "unixReviewTime"}, "2014 or 2018")
    )
    has_own = fields.user in record or fields.time in record
    return None if has_own or record.keys().isdisjoint(others[0]) else _OTHER_EDITION + others[1]


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which the first of duplicate keys counts, as in polars' reader."""
    return dict(reversed(pairs))


_REVIEW_JSON = json.JSONDecoder(strict=False, object_pairs_hook=_first_of_each)
_METADATA_JSON = json.JSONDecoder(strict=False)
_JSON_START = re.compile(r'\{\s*"')


def _json_record(text: str, decoder: json.JSONDecoder = _REVIEW_JSON) -> dict[str, Any] | str:
    """A JSON object, or the reason why there is none."""
    try:
        record = decoder.decode(text)
    except (ValueError, RecursionError):
        return "no JSON"
    return cast("dict[str, Any]", record) if isinstance(record, dict) else "no object"


def _as_number(value: Any) -> float | int | None:
    """A finite number; numbers in strings count, booleans do not."""
    if isinstance(value, str):
        # Plain decimal notation only: Python would also accept underscores, 'nan' and other digits.
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
    """Read a file of item metadata into clean fields, one row per item.

    If an item has several lines, one of them is used, independent of their order: a line with a usable title is preferred,
    then the one with the most fields, then the longest, then the first by code point.  Lines are not merged, because they
    may describe different offers.

    Args:
        path: Python literals (2014) or JSON lines, gzip or plain.
        edition: 2014, 2018 or 2023.
        max_bad_line_share: maximum share of bad lines.
        keep: item ids to read; None for all.  A line that clearly names another item is counted, but not parsed.
        lines: counts are added here.
        block_bytes: size of a block; does not affect the rows.

    Returns:
        Table of :data:`METADATA_SCHEMA`, sorted by ``raw_item_id``.

    Raises:
        ConfigError: no such edition.
        DataError: the file is missing, empty, damaged, or has too many bad lines.
    """
    _review_fields(edition)  # raises for an unknown edition
    wanted = None if keep is None else frozenset(keep)
    lines = LineCount() if lines is None else lines
    frames = [pl.DataFrame(schema=METADATA_SCHEMA)]
    number = 1
    for block, whole in read_ahead(_blocks(path, block_bytes)):
        if whole:
            frames.append(_metadata_of_block(block, number, edition, wanted, lines))
        else:
            lines.add_bad(number, "too long", block)
        number += max(block.count(b"\n"), 1)
        lines.check_hopeless(path)
    if lines.stripped_ids:
        _log.warning("%s: white space at the ends of ids was removed: %s", path, _counts(lines.stripped_ids))
    lines.check(path, max_bad_line_share)
    table = pl.concat(frames)
    chosen = _one_line_per_item(table)
    lines.not_used += len(table) - len(chosen)
    if len(chosen) < len(table):
        _log.info("%s: %d lines are not used, because their items have a line with more fields", path, len(table) - len(chosen))
    return chosen.sort("raw_item_id")


def _one_line_per_item(table: pl.DataFrame) -> pl.DataFrame:
    """Select the row of each item as described in :func:`read_metadata`."""
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
    long_numbers = edition != 2014 and has_long_number(block)
    for offset, line in enumerate(block.split(b"\n")):
        if not line:
            continue
        if wanted is not None and _names_another(line, key, wanted):
            lines.total += 1
            lines.not_parsed += 1
            continue
        may_differ = edition == 2014 or (long_numbers and has_long_number(line))
        record = None if may_differ else _ordinary_record(line, key)
        if record is None:
            text = _decode(line, number + offset, lines)
            if text is None:
                continue
            record = _literal_record(text) if edition == 2014 else _metadata_record(text)
        if isinstance(record, str):
            lines.add_bad(number + offset, record, line)
            continue
        problem = _metadata_problem(record, edition, key)
        item = read_id(record.get(key), "item", MAX_ITEM_ID_CHARS)
        if problem is not None or isinstance(item, BadId):
            lines.add_bad(number + offset, problem or str(item), line)
            if problem is None:
                lines.note_fields(str(item), key, record)
            continue
        lines.total += 1
        if item[1]:
            lines.stripped_ids["item"] += 1
        if wanted is None or item[0] in wanted:
            title, brand, price, categories, features, description, references = metadata_row(record, edition, lines.values)
            lists = (_SEPARATOR.join(categories), _SEPARATOR.join(features), _SEPARATOR.join(references))
            rows.append((item[0], title, brand, price, lists[0], lists[1], description, lists[2]))
    # Lists are passed as joined strings: polars would make a series of each.  Clean texts contain no control characters.
    columns = list(zip(*rows, strict=True)) or [()] * len(METADATA_SCHEMA)
    frame = pl.DataFrame(dict(zip(METADATA_SCHEMA, columns, strict=True)), schema=dict.fromkeys(METADATA_SCHEMA, pl.String))
    lists = [name for name, dtype in METADATA_SCHEMA.items() if dtype == pl.List(pl.String)]
    entries = pl.col(lists).str.split(_SEPARATOR)
    return frame.with_columns(
        pl.when(pl.col(lists) == "").then(pl.lit([], dtype=pl.List(pl.String))).otherwise(entries).name.keep()
    )


_SEPARATOR = "\x1f"

# The id in the raw bytes; no match if the value has another form.  The pattern starts with letters, so the search is fast.
# Inside a JSON string the quote after the key would be escaped, so this is a key, although it may belong to a nested
# object.
_RAW_ID = {key: re.compile(key.encode() + rb"""['"]\s*:(?:\s*['"]([\w-]{1,64})['"])?""") for key in ("asin", "parent_asin")}


def _names_another(line: bytes, key: str, wanted: frozenset[str]) -> bool:
    """Whether a line is clearly about an item that is not requested, so that it need not be parsed."""
    ids = _RAW_ID[key].findall(line)  # exactly one key: with two, one may belong to a nested object
    return len(ids) == 1 and ids[0] != b"" and ids[0].decode("ascii") not in wanted


def _ordinary_record(line: bytes, key: str) -> dict[str, Any] | None:
    """Parse a JSON object with orjson; None if Python's reader might give another result.

    orjson is several times faster than Python's reader.  It rejects bytes that are not UTF-8, NUL bytes, raw control
    characters, lone surrogates and NaN, and uses the last of duplicate keys as Python does.  But it converts integers
    beyond 64 bits to floats, so lines that may contain one are left to Python's reader.
    """
    try:
        record = _object(orjson.loads(line))
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record.get(key), str) else None


def _metadata_record(text: str) -> dict[str, Any] | str:
    """A JSON object, or the reason why there is none; Python's syntax is edition 2014's."""
    record = _json_record(text, _METADATA_JSON)
    if record == "no JSON" and text.startswith("{'"):
        try:
            return f"{_OTHER_EDITION}2014" if isinstance(parse_literal(text), dict) else record
        except ValueError:
            return record
    return record


def _literal_record(text: str) -> dict[str, Any] | str:
    """A dict in Python's syntax (or JSON's, in converted mirrors), or the reason why there is none.

    Python writes dicts with single quotes.  A line that begins with a double quote is parsed as JSON first, because the
    two languages read some strings differently (``"\\/"``, pairs of surrogates).
    """
    if _JSON_START.match(text) and isinstance(converted := _json_record(text, _METADATA_JSON), dict):
        return converted
    try:
        record = parse_literal(text)
    except ValueError:
        converted = _json_record(text, _METADATA_JSON)
        return "no Python literal" if isinstance(converted, str) else converted
    return cast("dict[str, Any]", record) if isinstance(record, dict) else "no dict"


def _metadata_problem(record: dict[str, Any], edition: int, key: str) -> str | None:
    """The reason why a record is not metadata of this edition, or None."""
    if key not in record:
        if edition == 2023 and "asin" in record:
            old = not record.keys().isdisjoint(("imUrl", "salesRank"))
            new = not record.keys().isdisjoint(("imageURL", "imageURLHighRes", "also_buy", "main_cat"))
            return _OTHER_EDITION + ("2014" if old and not new else "2018" if new and not old else "2014 or 2018")
        return _OTHER_EDITION + "2023" if edition != 2023 and "parent_asin" in record else None
    if ("user_id" if edition == 2023 else "reviewerID") in record and ("rating" if edition == 2023 else "overall") in record:
        return "a review, not an item"
    other = None if edition == 2023 else other_edition(record, edition)
    return None if other is None else f"{_OTHER_EDITION}{other}"


def _object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty object."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


# ----------------------------------------------------------------------------------------------------- lines
def _decode(line: bytes, number: int, lines: LineCount) -> str | None:
    """A line's text, repaired if possible; None for a blank or unreadable line."""
    stripped = line.strip(_BLANKS)
    if not stripped:
        return None
    if stripped.startswith(_BYTE_ORDER_MARK):  # within a file that was concatenated from several
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
    """Blocks of whole lines (True), and the beginnings of lines that are too long (False)."""
    held: list[bytes] = []  # whole lines, then the beginning of one
    num_held = 0
    line_start = 0  # offset of the unfinished line in the held bytes
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


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces of at most :data:`_CHUNK_BYTES`, decompressed if gzip, without a byte order mark."""
    try:
        with path.open("rb") as handle:
            head = handle.read(_READ_BYTES)
            if not head:
                raise DataError(str(path), "is empty", _AGAIN)
            rest = iter(lambda: handle.read(_READ_BYTES), b"")
            pieces = _gunzip(path, head, rest) if head.startswith(b"\x1f\x8b") else _chain(head, rest)
            for position, piece in enumerate(pieces):
                yield _text_start(path, piece) if position == 0 else piece
    except OSError as error:
        raise DataError(
            str(path), f"cannot be read ({error.strerror or error})", "run the download stage, or name the right file"
        ) from None


def _text_start(path: Path, piece: bytes) -> bytes:
    """The first bytes of a text without the UTF-8 byte order mark.

    Raises:
        DataError: the file is of another kind (an array, a table, an archive, text in another encoding).
    """
    if (kind := wrong_contents(piece[:HEAD_BYTES])) is not None:
        raise DataError(str(path), str(kind).partition("; ")[0], kind.advice)
    return piece.removeprefix(_BYTE_ORDER_MARK)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _gunzip(path: Path, head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a gzip file of one or several members, in bounded pieces even for extreme compression ratios."""
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
                raise DataError(str(path), f"is a damaged gzip file ({error})", _AGAIN) from None
            if piece:
                yield piece
            data = unpacker.unconsumed_tail
            if unpacker.eof:
                data = unpacker.unused_data
                unpacker, fresh = zlib.decompressobj(wbits=31), True
    if not fresh:
        raise DataError(str(path), "is a gzip file that ends too early", _AGAIN)
