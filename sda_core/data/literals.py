"""Python literals, one per line: the syntax of the 2014 metadata.

``ast.literal_eval`` reads them, slowly, and with memory a hundred times the text's.  :func:`parse_literal` gives the
very same result sooner: it rewrites the quotes so that the line becomes JSON wherever both languages mean the same,
and leaves every other line to ``ast.literal_eval``, behind limits on length and nesting.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

import orjson

MAX_LITERAL_CHARS = 1 << 18
"""Longer lines are refused by the slow path: a syntax tree takes about a hundred bytes a character."""

MAX_NESTING = 100
"""More brackets than this in one line are not given to the fast path; deeper nesting is refused by the slow path.

Python itself stops at 200 levels, orjson at 1,024; below both, the two agree.
"""


# Escapes that Python and JSON spell alike, or that JSON can spell with four hex digits.  Surrogates are left out,
# because JSON joins a pair of them into one character and Python does not; so are octal escapes, \a, \v, \N{...},
# and unknown escapes, in which Python keeps the backslash.
_ESCAPE = re.compile(
    r"\\(?:(['\"\\nrtbf])|x([0-9a-fA-F]{2})|u((?:[0-9a-ce-fA-CE-F][0-9a-fA-F]|[dD][0-7])[0-9a-fA-F]{2})|(.?))", re.DOTALL
)
_AS_JSON = {"'": r"\u0027", '"': r"\u0022", "\\": r"\u005c", "n": r"\n", "r": r"\r", "t": r"\t", "b": r"\b", "f": r"\f"}

# Where a JSON word would stand as a value.  May also hit inside a string, which only costs time.
_JSON_WORD = re.compile(r"(?:^|[:,\[])\s*(?:true|false|null)\b")

# Whole numbers beyond 64 bits, of nineteen digits and more, would become floats in orjson.
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19

_BRACKETS = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[\[\](){}]|(?:[-+~]\s*){3,}""", re.DOTALL)


def has_long_number(raw: bytes) -> bool:
    """Whether there are nineteen digits in a row, which may be a whole number that orjson makes a float of."""
    return _LONG_NUMBER in raw.translate(_DIGITS_ALIKE)


class _NotAlikeError(Exception):
    """The line holds an escape that Python and JSON do not share."""


def parse_literal(line: str) -> Any:
    """The value of one line of Python literals; equal to ``ast.literal_eval(line)`` on every line both accept.

    Args:
        line: one line, without its line feed.

    Raises:
        ValueError: the line is no literal, too long or nested too deep.
    """
    text = _to_json(line)
    if text is not None:
        try:
            raw = text.encode()
            if not has_long_number(raw):
                return orjson.loads(raw)
        except ValueError:
            pass  # not JSON after all, or text that has no bytes: Python decides
    return _parse_slowly(line)


def _to_json(line: str) -> str | None:
    """The line with Python's quotes turned into JSON's, or None where the two languages might not agree."""
    if line.count("[") + line.count("{") > MAX_NESTING:
        return None
    if "\\" in line:
        try:
            line = _ESCAPE.sub(_convert_escape, line)
        except _NotAlikeError:
            return None
    if ("true" in line or "false" in line or "null" in line) and _JSON_WORD.search(line):
        return None
    if '"' not in line:
        return line.replace("'", '"')
    # No escaped quote is left, so a quote either begins or ends a string, or stands in a string of the other quote.
    # Triple quotes and adjacent strings come out as '""' followed by '"', which JSON refuses.
    pieces = line.split('"')
    parts: list[str] = []
    in_single = in_double = False
    for piece in pieces:
        if in_double:
            parts.append(piece)
            in_double = False
            parts.append('"')
            continue
        parts.append(piece.replace("'", '"'))
        in_single ^= piece.count("'") % 2 == 1
        if in_single:
            parts.append('\\"')
        else:
            parts.append('"')
            in_double = True
    # The last piece is followed by no quote; what the loop has put after it goes again.
    if not in_double:
        return None
    return "".join(parts[:-1])


def _convert_escape(match: re.Match[str]) -> str:
    simple, byte, unit, _ = match.groups()
    if simple is not None:
        return _AS_JSON[simple]
    if byte is not None:
        return rf"\u00{byte}"
    if unit is not None:
        return match[0]
    raise _NotAlikeError


def _parse_slowly(line: str) -> Any:
    if len(line) > MAX_LITERAL_CHARS:
        raise ValueError(f"a literal of {len(line)} characters (at most {MAX_LITERAL_CHARS} are read)")
    depth = 0
    for match in _BRACKETS.finditer(line):
        mark = match[0]
        if mark in "[({":
            depth += 1
            if depth > MAX_NESTING:
                raise ValueError(f"nested deeper than {MAX_NESTING} levels")
        elif mark in "])}":
            depth -= 1
        elif mark[0] in "-+~":
            raise ValueError("a run of signs")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes such as '\d' are common in the texts, and kept as they are
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python literal ({type(error).__name__})") from None
