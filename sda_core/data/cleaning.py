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

# A letter or digit, then anything of ASCII that is printable and begins no entity, tag or rule.
_PLAIN = re.compile(r"[A-Za-z0-9][ -%'-;=-z|}~]*+")
_BLOCK_START = re.compile("<[sS][cCtT]")  # cheap, and told before the costly pattern is tried
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
_DOLLARS = re.compile(r"\$[0-9][0-9.,]{0,20}(?: - \$[0-9][0-9.,]{0,20})?")  # prices as they nearly always are
_ALPHANUMERIC = re.compile(r"[^\W_]")
_NO_VALUE = frozenset({"none", "null", "nan", "n/a", "na", "unknown"})
_WEB = re.compile(r"https?://[^\s/]+/\S*", re.IGNORECASE)
_WEB_START = re.compile(r"https?://[^\s/]+/")
_RELATIVE = re.compile(r"[^\s:\\/~][^\s:\\]*")


def strings(value: Any) -> list[str]:
    """The strings of a value that may be one string, a list of them (nested once or not), or something else."""
    if isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, list | tuple):
        return []
    entries = cast("list[Any]", value)
    found: list[str] = [entry for entry in entries if isinstance(entry, str) and entry]
    if len(found) == len(entries):
        return found[:MAX_ENTRIES]
    found = []
    for entry in entries:
        inner = cast("list[Any]", entry) if isinstance(entry, list | tuple) else [entry]
        found.extend(text for text in inner if isinstance(text, str) and text)
        if len(found) >= MAX_ENTRIES:
            break
    return found[:MAX_ENTRIES]


def clean_text(value: Any) -> str:
    """Plain text on one line: entities resolved, markup and page junk gone, white space collapsed; ``""`` if nothing is left.

    A list is joined with spaces.
    """
    return " ".join(clean_texts(value))[:MAX_TEXT_CHARS]


def clean_texts(value: Any) -> list[str]:
    """As :func:`clean_text`, entry by entry; empty ones left out."""
    return [text for part in strings(value) if (text := _clean(part))]


def clean_name(value: Any) -> str:
    """A title, brand or category: as :func:`clean_text`, but a value that begins with markup is junk as a whole.

    Such values (``<span class=...``, ``<img src=...``) are pieces of the page, not names with a bold word in them.
    """
    if not isinstance(value, str) or not value:
        return ""
    raw = value[:MAX_TEXT_CHARS]
    if _is_plain(raw):
        return raw
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
    if isinstance(value, str) and _DOLLARS.fullmatch(value):
        return value
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


def image_references(values: list[Any]) -> list[str]:
    """The usable ones of many references, as :func:`image_reference` gives them; each once, in order."""
    given = [value for value in values if value]
    usable = given if _are_plain(given) else [text for value in given if (text := image_reference(value)) is not None]
    return list(dict.fromkeys(usable))[:MAX_ENTRIES]


def _are_plain(references: list[Any]) -> bool:
    """Whether all are web addresses in which there is nothing to resolve or to refuse, which is nearly always so."""
    try:
        together = " ".join(references)
    except TypeError:  # not only strings
        return False
    return (
        together.isprintable()
        and together.count(" ") == len(references) - 1
        and "&" not in together
        and "/no-img" not in together
        and (len(together) <= MAX_REFERENCE_CHARS or max(map(len, references)) <= MAX_REFERENCE_CHARS)
        and all(map(_WEB_START.match, references))
    )


def is_meaningful(text: str) -> bool:
    """Whether a text says anything: it has a letter or a digit, and is no placeholder for a missing value."""
    if not text[:1].isalnum() and _ALPHANUMERIC.search(text) is None:
        return False
    return len(text) > 7 or text.lower() not in _NO_VALUE


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


def _is_plain(text: str) -> bool:
    """Whether cleaning would leave a text as it is, as far as that can be told cheaply; most texts are like this."""
    return (
        _PLAIN.fullmatch(text) is not None
        and len(text) > 7  # placeholders are shorter
        and "  " not in text
        and text[-1] != " "
        and "getTime" not in text
        and "P.when" not in text
        and not text.startswith("var ")
    )


def _clean(raw: str) -> str:
    raw = raw[:MAX_TEXT_CHARS]
    return raw if _is_plain(raw) else _clean_unescaped(_unescape(raw))


def _clean_unescaped(text: str) -> str:
    if "<" in text:
        if _BLOCK_START.search(text):
            text = _BLOCK.sub(" ", text)
        text = _cut_open_tag(_TAG.sub(" ", text))
    if not text.isprintable():
        return _or_empty(" ".join(_UNPRINTABLE.sub(" ", text).split()))
    while "  " in text:  # of all white space, only the space is printable
        text = text.replace("  ", " ")
    return _or_empty(text.strip(" "))


def _or_empty(text: str) -> str:
    """The text, or nothing where it says nothing."""
    return text if is_meaningful(text) and not is_page_junk(text) else ""


def _cut_open_tag(text: str) -> str:
    """Drop a tag that the end of the value cuts off (``... <div class="a-section``)."""
    start = text.rfind("<")
    if start >= 0 and "=" in text[start:] and text[start + 1 : start + 2].isalpha():
        return text[:start]
    return text
