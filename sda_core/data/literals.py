"""Python literals, one per line: the syntax of the 2014 metadata.

``ast.literal_eval`` is slow and needs a hundred times the memory of the text.  :func:`parse_literal` gives the same result
faster: it rewrites the quotes so that the line becomes JSON if both languages agree on its meaning, and passes every other
line to ``ast.literal_eval``, with limits on length and nesting.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

import orjson

MAX_LITERAL_CHARS = 1 << 18
"""Maximum length of a line in the slow path: a syntax tree needs about a hundred bytes per character."""

MAX_NESTING = 100
"""Maximum number of brackets in the fast path, and maximum nesting in the slow path.

Python itself stops at 200 levels, orjson at 1,024; below both, the two agree.
"""


# Escapes that are the same in Python and JSON, or that JSON can write with four hex digits.  Excluded are surrogates,
# because JSON joins a pair of them into one character and Python does not; also octal escapes, \a, \v, \N{...},
# and unknown escapes, in which Python keeps the backslash.
_ESCAPE = re.compile(
    r"\\(?:(['\"\\nrtbf])|x([0-9a-fA-F]{2})|u((?:[0-9a-ce-fA-CE-F][0-9a-fA-F]|[dD][0-7])[0-9a-fA-F]{2})|(.?))", re.DOTALL
)
_AS_JSON = {"'": r"\u0027", '"': r"\u0022", "\\": r"\u005c", "n": r"\n", "r": r"\r", "t": r"\t", "b": r"\b", "f": r"\f"}

# A JSON literal as a value.  A match inside a string is possible and only costs time.
_JSON_WORD = re.compile(r"(?:^|[:,\[])\s*(?:true|false|null)\b")

# Whole numbers beyond 64 bits, of nineteen digits and more, would become floats in orjson.
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19

_BRACKETS = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[\[\](){}]|(?:[-+~]\s*){3,}""", re.DOTALL)


def has_long_number(raw: bytes) -> bool:
    """Whether there are nineteen digits in a row, possibly an integer that orjson would convert to a float."""
    return _LONG_NUMBER in raw.translate(_DIGITS_ALIKE)


class _NotAlikeError(Exception):
    """The line has an escape that Python and JSON do not share."""


def parse_literal(line: str) -> Any:
    """Parse one line of Python literals; equal to ``ast.literal_eval(line)`` for every line that both accept.

    Args:
        line: one line, without its line feed.

    Raises:
        ValueError: the line is not a literal, too long, or nested too deeply.
    """
    text = _to_json(line)
    if text is not None:
        try:
            raw = text.encode()
            if not has_long_number(raw):
                return orjson.loads(raw)
        except ValueError:
            pass  # not JSON after all, or text that cannot be encoded: let Python decide
    return _parse_slowly(line)


def _to_json(line: str) -> str | None:
    """The line with JSON's quotes instead of Python's; None if the two languages might disagree."""
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
    # No escaped quote is left, so a quote either begins or ends a string, or is inside a string with the other quote.
    # Triple quotes and adjacent strings become '""' followed by '"', which JSON rejects.
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
    # The last piece is not followed by a quote, so remove the one that the loop has added.
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
            warnings.simplefilter("ignore")  # unknown escapes such as '\d' are common in the texts and kept
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python literal ({type(error).__name__})") from None
