"""Read times of interactions in any unit.

Each value is read independently, so the result depends neither on the order of lines nor on the size of blocks.  For dates
from 1990 to 2100, the size of a number determines whether it counts seconds, milliseconds, microseconds or nanoseconds
since 1970, because the four ranges do not overlap.

A smaller number (0 to 631,151,999) is not a date.  If all times of a file are so small, they are a counter (1, 2, 3, ...),
day numbers or dates such as 20231114: only their order is used.  In a file that also has dates, such a number is a missing
time (``0``); see :func:`sda_core.data.filtering.filter_dataset`.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

Unit = Literal["seconds", "milliseconds", "microseconds", "nanoseconds", "text", "small"]
"""The format of a time; ``text`` is ISO 8601, ``small`` a number that is not a date."""

FIRST_SECOND = 631_152_000
"""1990-01-01, in seconds since 1970."""

END_SECOND = 4_102_444_800
"""2100-01-01."""

TICKS: dict[Unit, int] = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}
"""Number of units per second."""

MISSING = "time is missing"
NEGATIVE = "time is negative"
OUTSIDE = "time is not between 1990 and 2100 in seconds, milliseconds, microseconds or nanoseconds"
NOT_UNDERSTOOD = "time is neither a number nor ISO 8601 text"
UNDATED = "time is a small number, in a file whose other times are dates"

_NUMBER = re.compile(r"[+-]?[0-9]{1,25}(\.[0-9]{0,25})?")
_SPACE_BEFORE_OFFSET = re.compile(r"(?<=[0-9])\s+(?=(?:[+-][0-9]{2}(?::?[0-9]{2})?|Z)$)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def unit_of(number: float) -> Unit | None:
    """The unit in which a number is a date from 1990 to 2100; ``small`` below all ranges, None outside of all ranges."""
    if 0 <= number < FIRST_SECOND:
        return "small"
    for unit, ticks in TICKS.items():
        if FIRST_SECOND * ticks <= number < END_SECOND * ticks:
            return unit
    return None


def read_time(value: Any) -> tuple[int, Unit] | str:
    """Milliseconds since 1970 and the unit found, or the reason why there is no time.

    Text may be a number or ISO 8601 (``2023-11-14``, ``2023-11-14T22:13:20Z``, ``2023-11-14 22:13:20+02:00``); without an
    offset it is UTC.  Microseconds and nanoseconds are truncated to milliseconds; fractional seconds are rounded.
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return MISSING
        if _NUMBER.fullmatch(text) is None:
            return _read_text(text)
        value = float(text) if "." in text else int(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOT_UNDERSTOOD
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING if math.isnan(value) else OUTSIDE
    if value < 0:
        return NEGATIVE
    unit = unit_of(value)
    if unit is None:
        return OUTSIDE
    if unit == "small":
        return min(round(value * 1000), 1000 * FIRST_SECOND - 1), unit  # rounded, it must not become a date
    if unit == "seconds":
        return min(round(value * 1000), 1000 * END_SECOND - 1), unit
    return int(value) // (TICKS[unit] // 1000), unit


def _read_text(text: str) -> tuple[int, Unit] | str:
    text = text.upper().removesuffix(" UTC").removesuffix(" GMT")
    text = _SPACE_BEFORE_OFFSET.sub("", text)
    if re.match(r"[0-9]{4}/[0-9]{1,2}/[0-9]{1,2}", text):
        day, space, rest = text.partition(" ")
        text = "-".join(part.zfill(2) for part in day.split("/")) + space + rest
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return NOT_UNDERSTOOD
    milliseconds = (time - _EPOCH) // _MILLISECOND
    return (milliseconds, "text") if FIRST_SECOND <= milliseconds // 1000 < END_SECOND else OUTSIDE
