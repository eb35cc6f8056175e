"""Product texts as shops store them, made fit for a prompt: entities, markup, style sheets, prices, picture references.

Every function takes any JSON value, because the same field is a string in one release and a list or null in the next.
"""

from __future__ import annotations

import html
import math
import re
from functools import lru_cache
from typing import Any, cast

MAX_TEXT_CHARS = 10_000
"""Of one value; what is longer is cut before it is cleaned."""

MAX_ENTRIES = 100
"""Of one list (features, categories, picture references)."""

MAX_REFERENCE_CHARS = 2_048

_BLOCK = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*+>|<!--.*?-->|<![A-Za-z][^<>]*+>", re.DOTALL)
# Control characters, direction overrides, lone surrogates, byte order marks and the two non-characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
# What a page leaves behind where a value should be: scripts (the publishers of the 2018 edition tell to drop titles
# with getTime) and rules of a style sheet.  Searched for after white space was collapsed, so that no run of it is long.
_PAGE_JUNK = re.compile(
    r"getTime ?\(|P\.when ?\(|^var \w+ ?=|\bfunction ?\w* ?\([^()]{0,200}\) ?\{"
    r"|[.#][\w-]+[^{}]{0,100}\{[^{}]{0,500}:[^{}]{0,500}\}"
)
_MARKUP_START = re.compile(r"\s*</?[A-Za-z!]")
_BY_LINE = re.compile(r"\s*by\s*\n\s*", re.IGNORECASE)
_CURRENCY = r"(?:US ?\$|C(?:DN|A) ?\$|USD|EUR|GBP|CAD|INR|JPY|AUD|Rs\.?|[$€£¥₹])"
_AMOUNT = rf"(?:{_CURRENCY}\s?)?\d[\d.,]*(?:\s?{_CURRENCY})?"
_PRICE = re.compile(rf"(?:from\s+)?{_AMOUNT}(?:\s?[-\u2013]\s?{_AMOUNT})?", re.IGNORECASE)
_ALPHANUMERIC = re.compile(r"[^\W_]")
_NO_VALUE = frozenset({"none", "null", "nan", "n/a", "na", "unknown"})
_WEB = re.compile(r"https?://[^\s/]+/\S*", re.IGNORECASE)
_RELATIVE = re.compile(r"[^\s:\\/~][^\s:\\]*")


def strings(value: Any) -> list[str]:
    """The strings of a value that may be one string, a list of them (nested once or not), or something else."""
    if isinstance(value, str):
        return [value] if value else []
    found: list[str] = []
    for entry in cast("list[Any]", value) if isinstance(value, list | tuple) else []:
        inner = cast("list[Any]", entry) if isinstance(entry, list | tuple) else [entry]
        found.extend(text for text in inner if isinstance(text, str) and text)
        if len(found) >= MAX_ENTRIES:
            break
    return found[:MAX_ENTRIES]


def clean_text(value: Any) -> str:
    """Plain text on one line: entities resolved, markup and page junk gone, white space collapsed; ``""`` if nothing is left.

    A list is joined with spaces.
    """
    return " ".join(text for text in (_clean(part) for part in strings(value)) if text)[:MAX_TEXT_CHARS]


def clean_texts(value: Any) -> list[str]:
    """As :func:`clean_text`, entry by entry; empty ones left out."""
    return [text for text in (_clean(part) for part in strings(value)) if text]


def clean_name(value: Any) -> str:
    """A title, brand or category: as :func:`clean_text`, but a value that begins with markup is junk as a whole.

    Such values (``<span class=...``, ``<img src=...``) are pieces of the page, not names with a bold word in them.
    """
    if not isinstance(value, str):
        return ""
    raw = value[:MAX_TEXT_CHARS]
    if by := _BY_LINE.match(raw):  # "by", a line feed and much space before some brands of 2018
        raw = raw[by.end() :]
    raw = _unescape(raw)
    return "" if _MARKUP_START.match(raw) else _clean_unescaped(raw)


def clean_label(value: Any) -> str:
    """As :func:`clean_name`, for brands and categories, of which a shop has few: results are remembered."""
    return _remembered_name(value) if isinstance(value, str) and len(value) <= 200 else clean_name(value)


@lru_cache(maxsize=1 << 16)
def _remembered_name(value: str) -> str:
    return clean_name(value)


def clean_price(value: Any) -> str:
    """A price, or a range of prices, as text; numbers get two decimals; whatever is no price gives ``""``."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        # Compared before it is formatted: an integer may be too large for a float.
        return f"{value:.2f}" if 0 < value < 1e9 and math.isfinite(value) else ""
    text = clean_name(value)
    return text if len(text) <= 64 and _PRICE.fullmatch(text) else ""


def image_reference(value: Any) -> str | None:
    """A picture's web address or relative path, or None where the value is neither.

    Paths that are absolute, climb (``..``) or carry a scheme are refused: metadata is not trusted to name local files.
    So is the shop's own "no image" icon.
    """
    if not isinstance(value, str):
        return None
    text = html.unescape(value.strip())
    if not text or len(text) > MAX_REFERENCE_CHARS or not text.isprintable() or "/no-img" in text:
        return None
    if _WEB.fullmatch(text):
        return text
    if _RELATIVE.fullmatch(text) and ".." not in text.split("/"):
        return text
    return None


def is_meaningful(text: str) -> bool:
    """Whether a text says anything: it has a letter or a digit, and is no placeholder for a missing value."""
    return _ALPHANUMERIC.search(text) is not None and not (len(text) <= 7 and text.lower() in _NO_VALUE)


def is_page_junk(text: str) -> bool:
    """Whether a text is a piece of a page's script or style sheet."""
    suspect = "{" in text or "getTime" in text or "P.when" in text or text.startswith("var ")
    return suspect and _PAGE_JUNK.search(text) is not None


def _unescape(text: str) -> str:
    """Resolve entities; some values were escaped twice."""
    for _ in range(3):
        if "&" not in text:
            break
        resolved = html.unescape(text)
        if resolved == text:
            break
        text = resolved
    return text


def _clean(raw: str) -> str:
    return _clean_unescaped(_unescape(raw[:MAX_TEXT_CHARS]))


def _clean_unescaped(text: str) -> str:
    if "<" in text:
        text = _BLOCK.sub(" ", text)
        text = _cut_open_tag(_TAG.sub(" ", text))
    if not text.isprintable():
        text = _UNPRINTABLE.sub(" ", text)
    text = " ".join(text.split())
    return text if is_meaningful(text) and not is_page_junk(text) else ""


def _cut_open_tag(text: str) -> str:
    """Drop a tag that the end of the value cuts off (``... <div class="a-section``)."""
    start = text.rfind("<")
    if start >= 0 and "=" in text[start:] and text[start + 1 : start + 2].isalpha():
        return text[:start]
    return text
