"""Clean product texts of shops for a prompt: entities, markup, style sheets, numbers, prices.

Every function accepts any JSON value, because the same field is a string in one release and a list, a number or null in
the next.

* A whole number becomes its digits, even if it is stored as a float (``1984.0`` gives ``1984``: tables with missing values
  store whole numbers as floats); any other number becomes its shortest decimal notation.
* An object with one of the keys ``value``, ``@value``, ``name``, ``title``, ``text``, ``label`` is replaced by that value.
* Booleans, NaN, infinities and other objects are not text.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from sda_core.data.junk import is_meaningful, is_page_junk
from sda_core.data.prices import MAX_PRICE_CHARS, is_not_positive, is_price

MAX_TEXT_CHARS = 10_000
"""Maximum length of a value; longer ones are truncated before cleaning."""

MAX_ENTRIES = 100
"""Maximum number of entries of a list (features, categories, image references)."""

# A letter or digit, then printable ASCII that does not start an entity, tag or rule.
_PLAIN = re.compile(r"[A-Za-z0-9][ -%'-;=-z|}~]*+")
_BLOCK_START = re.compile("<[sS][cCtT]")  # a cheap test before the expensive pattern
_BLOCK = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*+>|<!--.*?-->|<![A-Za-z][^<>]*+>", re.DOTALL)
# Control characters, direction overrides, lone surrogates, byte order marks and the two non-characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
_MARKUP_START = re.compile(r"\s*</?[A-Za-z!]")
_BY_LINE = re.compile(r"\s*by\s*\n\s*", re.IGNORECASE)
# The most common form of prices.
_DOLLARS = re.compile(r"(?:from )?\$?(?=[0.,]*[1-9])[0-9][0-9.,]{0,20}(?: - \$[0-9][0-9.,]{0,20})?")
_VALUE_KEYS = ("value", "@value", "name", "title", "text", "label")
_AMOUNT_KEYS = ("value", "amount", "price")
_CURRENCY_KEYS = ("currency", "currency_code", "currencyCode", "priceCurrency", "price_currency", "unit")
_MAX_NESTING = 4
_MAX_DIGITS = 64


def leaves(value: Any, depth: int = 0) -> Iterator[str | None]:
    """The texts of a value that may be a text, a number, or nested lists of them; None for an entry that is not text.

    Null and blank text are skipped.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return
    if isinstance(value, list | tuple) and depth < _MAX_NESTING:
        for entry in cast("list[Any]", value):
            yield from leaves(entry, depth + 1)
    elif isinstance(value, dict) and depth < _MAX_NESTING and (key := _key_of(cast("dict[str, Any]", value))) is not None:
        yield from leaves(value[key], depth + 1)
    else:
        yield _as_text(value)


def _key_of(record: dict[str, Any]) -> str | None:
    return next((key for key in _VALUE_KEYS if record.get(key) is not None), None)


def _as_text(value: Any) -> str | None:
    """A string unchanged, a number in decimal notation, None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if not value.is_integer() or abs(value) >= 1e15:
            return repr(value)
        value = int(value)
    return str(value) if abs(value) < 10**_MAX_DIGITS else None


def strings(value: Any) -> list[str]:
    """The texts of a value, including numbers; at most :data:`MAX_ENTRIES`."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, (list, tuple)):  # `list | tuple` would be built at every call
        entries = cast("list[Any]", value)
        found: list[str] = [entry for entry in entries if isinstance(entry, str) and entry]
        if len(found) == len(entries):
            return found[:MAX_ENTRIES]
    return [text for text in leaves(value) if text is not None][:MAX_ENTRIES]


def clean_text(value: Any) -> str:
    """Plain text on one line: entities resolved, markup and page junk removed, white space collapsed; ``""`` if empty.

    A list is joined with spaces.
    """
    return " ".join(clean_texts(value))[:MAX_TEXT_CHARS]


def clean_texts(value: Any) -> list[str]:
    """As :func:`clean_text`, entry by entry, without empty ones."""
    return [text for part in strings(value) if (text := _clean(part))]


def clean_name(value: Any) -> str:
    """A title, brand or category: as :func:`clean_text`, but a value that begins with markup is dropped as a whole.

    Such values (``<span class=...``, ``<img src=...``) are fragments of the page, not names with a bold word.  From a list,
    the first usable value is taken.
    """
    if not isinstance(value, str):
        return next((name for text in leaves(value) if text is not None and (name := clean_name(text))), "")
    if not value:
        return ""
    raw = value[:MAX_TEXT_CHARS]
    if _is_plain(raw):
        return raw
    if by := _BY_LINE.match(raw):  # "by", a line feed and much space before some brands of 2018
        raw = raw[by.end() :]
    raw = _unescape(raw)
    return "" if _MARKUP_START.match(raw) else _clean_unescaped(raw)


def clean_label(value: Any) -> str:
    """As :func:`clean_name`, with cached results, for brands and categories, which have few distinct values."""
    return _cached_name(value) if isinstance(value, str) and len(value) <= 200 else clean_name(value)


@lru_cache(maxsize=1 << 16)
def _cached_name(value: str) -> str:
    return clean_name(value)


def why_no_text(text: str | None) -> str:
    """The reason why a text is empty after cleaning (``TEXT_REASONS``); None means a value that is not text."""
    if text is None:
        return "kind"
    raw = _unescape(text[:MAX_TEXT_CHARS])
    if "<" in raw and (_MARKUP_START.match(raw) or _TAG.search(raw) or _BLOCK_START.search(raw)):
        return "markup"
    return "markup" if is_meaningful(raw.strip()) else "blank"


def clean_price(value: Any) -> str:
    """A price or a range of prices as text; numbers get two decimals; ``""`` for a value that is not a price.

    An object with an amount and a currency (``{"amount": 9.5, "currency": "EUR"}``) gives both.
    """
    return read_price(value)[0]


def read_price(value: Any) -> tuple[str, str]:
    """A price in the format of :func:`clean_price` and ``""``; or ``""`` and the reason (``PRICE_REASONS``).

    Both are empty if no value was given.
    """
    if isinstance(value, str):
        return _price_of_text(value)
    if value is None:
        return "", ""
    if isinstance(value, bool):
        return "", "kind"
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            return "", "kind"
        if value <= 0:
            return "", "not_positive"
        # Compare before formatting: an integer may be too large for a float.
        if value >= 1e9:
            return "", "not_understood"
        price = f"{value:.2f}"
        return ("", "not_positive") if price == "0.00" else (price, "")
    if isinstance(value, list | tuple):
        entries = [entry for entry in cast("list[Any]", value) if entry is not None and entry != ""]
        if len(entries) > 1:
            return "", "surplus"
        return read_price(entries[0]) if entries and not isinstance(entries[0], list | tuple) else ("", "kind" if entries else "")
    if isinstance(value, dict):
        record = cast("dict[str, Any]", value)
        amount, currency = (next((record[key] for key in keys if key in record), None) for keys in (_AMOUNT_KEYS, _CURRENCY_KEYS))
        if isinstance(amount, dict | list | tuple) or amount is None:
            return "", "kind"
        price, reason = read_price(amount)
        return (
            (price, reason)
            if not (price and isinstance(currency, str))
            else _price_of_text(f"{price} {currency.strip()}".strip())
        )
    return "", "kind"


def _price_of_text(value: str) -> tuple[str, str]:
    if _DOLLARS.fullmatch(value):
        return value, ""
    if not value.strip():
        return "", ""
    text = clean_name(value)
    if not text:
        return "", why_no_text(value)
    if is_not_positive(text):
        return "", "not_positive"
    return (text, "") if len(text) <= MAX_PRICE_CHARS and is_price(text) else ("", "not_understood")


def _unescape(text: str) -> str:
    """Resolve HTML entities, up to three times, because some values were escaped more than once."""
    for _ in range(3):
        if "&" not in text:
            break
        resolved = html.unescape(text)
        if resolved == text:
            break
        text = resolved
    return text


def _is_plain(text: str) -> bool:
    """A cheap test that cleaning would not change a text; true for most texts."""
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
        text = _drop_truncated_tag(_TAG.sub(" ", text))
    if not text.isprintable():
        return _or_empty(" ".join(_UNPRINTABLE.sub(" ", text).split()))
    while "  " in text:  # the space is the only printable white space
        text = text.replace("  ", " ")
    return _or_empty(text.strip(" "))


def _or_empty(text: str) -> str:
    """The text, or ``""`` if it is not meaningful."""
    return text if is_meaningful(text) and not is_page_junk(text) else ""


def _drop_truncated_tag(text: str) -> str:
    """Drop a tag that is truncated by the end of the value (``... <div class="a-section``)."""
    start = text.rfind("<")
    if start >= 0 and "=" in text[start:] and text[start + 1 : start + 2].isalpha():
        return text[:start]
    return text
