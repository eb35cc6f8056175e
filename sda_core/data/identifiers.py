"""Read ids of users and items from raw files.

An id is a table key, never a path: images are found by comparing names with ids.  So an id may contain any displayable
character, including slashes and spaces.  Only unusable values are rejected, with a reason.
"""

from __future__ import annotations

import math
import re
from typing import Any

MAX_USER_ID_CHARS = 512
MAX_ITEM_ID_CHARS = 256
"""Maximum length of an id, to bound memory."""

_MAX_WHOLE_FLOAT = 2.0**53  # beyond it, floats cannot represent every integer

# Control characters, line and paragraph separators, direction controls, byte order marks: they can break a line of a
# log or a table, or make an id look like another one.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_NO_UNICODE = re.compile("[\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff]")


class BadId(str):
    """The reason why a value is not an id."""

    __slots__ = ()


def read_id(value: Any, owner: str, max_chars: int) -> tuple[str, bool] | BadId:
    """An id, and whether leading or trailing white space was removed.

    Whole numbers become their digits, even if stored as floats: ``17``, ``17.0`` and ``"17"`` are the same id, because
    tables with missing values store whole numbers as floats.  Strings are unchanged: ``"17.0"`` is another id.

    Args:
        value: any JSON value.
        owner: ``user`` or ``item``, the first word of the reason.
        max_chars: maximum length of an id.
    """
    if value is None or value == "":
        return BadId(f"{owner} id is missing")
    if isinstance(value, bool):
        return BadId(f"{owner} id is neither text nor a whole number")
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < _MAX_WHOLE_FLOAT:
        value = int(value)
    elif isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return BadId(f"{owner} id is a number of more digits than a float holds")
    if isinstance(value, int):
        if abs(value) >= 10**max_chars:
            return BadId(f"{owner} id is longer than {max_chars} characters")
        return str(value), False
    if not isinstance(value, str):
        return BadId(f"{owner} id is neither text nor a whole number")
    text = value.strip()
    if not text:
        return BadId(f"{owner} id is missing")
    if len(text) > max_chars:
        return BadId(f"{owner} id is longer than {max_chars} characters")
    if not text.isprintable():
        if _CONTROL.search(text):
            return BadId(f"{owner} id holds a control character")
        if _NO_UNICODE.search(text):
            return BadId(f"{owner} id is not valid Unicode text")
    elif "\ufffd" in text:
        return BadId(f"{owner} id is not valid Unicode text")
    return text, text != value
