"""Read references to an item's images in the forms used by shops.

==============================================  ======================================================================
``"https://h/a.jpg"``                           one address; several are separated by ``|``, ``;``, or by commas or white
                                                space before ``http`` (or ``//``, where the first begins so)
``["https://h/a.jpg", "https://h/b.jpg"]``      a list of addresses
``[{"variant": "MAIN", "large": ...}, ...]``    a list of objects: the 2023 edition; also ``url``, ``src``, ``link``, ``href``
``{"variant": [...], "large": [...]}``          an object of lists: the 2023 edition on the Hugging Face hub
``"[...]"``, ``"{...}"``                        each of them as text, in JSON or in Python's syntax
``"//h/a.jpg"``                                 an address without a scheme; https is used
``"images\\a.jpg"``                              a relative path of Windows; becomes ``images/a.jpg``
==============================================  ======================================================================

Spaces in an address become ``%20``; HTML entities are resolved.  Metadata is untrusted: absolute paths, paths with ``..`` and
paths with a scheme are rejected.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from sda_core.data.cleaning import MAX_ENTRIES
from sda_core.data.junk import is_meaningful
from sda_core.data.literals import parse_literal

MAX_REFERENCE_CHARS = 2_048

_MAX_NESTING = 4
_MAX_GIVEN = 4 * MAX_ENTRIES  # maximum number of references read per item
_SIZES = ("hi_res", "large", "thumb")  # largest first
_PUBLISHED_KEYS = frozenset({"variant", *_SIZES})
# Keys without their underscores and hyphens, in lower case; best first.
_KEYS = (
    *("hires", "large", "url", "imageurl", "src", "link", "href", "contenturl", "image"),
    *("medium", "small", "thumb", "thumbnail", "path", "file", "filename", "urls", "imageurls", "images"),
)
_MAIN = ("MAIN", "Main", "main")
_NONE = Counter[str]()  # shared; never modified
_SEVERAL = re.compile(r"\s*[|;]\s*(?=(?:https?:)?//)|\s*,\s*(?=https?://)|\s+(?=https?://)", re.IGNORECASE)
_SEVERAL_BARE = re.compile(r"(?:\s*[|;,]\s*|\s+)(?=(?:https?:)?//)", re.IGNORECASE)  # the first one has no scheme
_ONE_ADDRESS = re.compile(r"https?://[^\s|;,]+")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_WEB = re.compile(r"(?:https?:)?//[^\s/?#]+[/?].+", re.IGNORECASE)
_WEB_START = re.compile(r"https?://[^\s/]+/.")


def image_values(value: Any) -> list[Any]:
    """The raw references in a field; images of variant MAIN first, the largest size of each image first.

    Invalid entries, such as a number or an object without an address, are included, so that they can be counted.
    """
    if isinstance(value, str) and _ONE_ADDRESS.fullmatch(value):
        return [value]
    if isinstance(value, list) and (plain := _published(cast("list[Any]", value))) is not None:
        return plain
    images_found = [image for image in _images(value, 0) if image[1]]
    images_found.sort(key=lambda image: not image[0])
    return [reference for _, references in images_found for reference in references]


def _published(entries: list[Any]) -> list[Any] | None:
    """The references in a list of addresses or in a list of the 2023 edition's objects; None for any other value."""
    references = entries
    if entries and isinstance(entries[0], dict):
        try:
            if not all(map(_PUBLISHED_KEYS.issuperset, entries)):
                return None
            images = sorted(entries, key=lambda image: image.get("variant") not in _MAIN)
        except (AttributeError, TypeError):  # an entry is not an object
            return None
        references = [size for image in images for key in _SIZES if (size := image.get(key)) not in (None, "")]
    try:
        together = "\n" + "\n".join(references)
    except TypeError:  # not only strings
        return None
    return None if "\n[" in together or "\n{" in together else references


def _images(value: Any, depth: int) -> list[tuple[bool, list[Any]]]:
    """The images in a value: whether each is the main one, and its references."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in ("[", "{") and depth < _MAX_NESTING and (parsed := _parse(text)) is not None:
            return _images(parsed, depth + 1)
        parts = (_SEVERAL_BARE if text.startswith("//") else _SEVERAL).split(text) if depth == 0 else [text]
        return [(False, [part]) for part in parts]
    if isinstance(value, list | tuple) and depth < _MAX_NESTING:
        return [image for entry in cast("list[Any]", value) for image in _images(entry, depth + 1)]
    if isinstance(value, dict) and depth < _MAX_NESTING:
        return _images_of_object(cast("dict[str, Any]", value), depth)
    return [(False, [value])]


def _images_of_object(record: dict[str, Any], depth: int) -> list[tuple[bool, list[Any]]]:
    named = {str(key).lower().replace("_", "").replace("-", ""): value for key, value in record.items()}
    columns = {key: value for key in _KEYS if (value := named.get(key)) is not None}
    variant = named.get("variant")
    if not columns:  # only a variant, or only null sizes
        return [] if named.keys() <= {"variant", *_KEYS} else [(False, [record])]
    if any(isinstance(column, list) for column in columns.values()):
        lists = {key: cast("list[Any]", column) if isinstance(column, list) else [column] for key, column in columns.items()}
        variants = cast("list[Any]", variant) if isinstance(variant, list) else [variant]
        rows: list[dict[str, Any]] = [
            {key: column[row] for key, column in lists.items() if row < len(column)}
            | {"variant": variants[row] if row < len(variants) else None}
            for row in range(max(map(len, lists.values())))
        ]
        return [image for row in rows for image in _images_of_object(row, depth + 1)]
    references = [reference for column in columns.values() for _, found in _images(column, depth + 1) for reference in found]
    return [(_is_main(variant), references)]


def _is_main(variant: Any) -> bool:
    return isinstance(variant, str) and variant in _MAIN


def _parse(text: str) -> Any:
    """Parse a value given as text, in JSON or as a Python literal; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return parse_literal(text)
        except ValueError:
            return None


def image_reference(value: Any) -> str | None:
    """An image's web address or relative path; None if the value is neither."""
    return _read(value)[0]


def image_references(values: Iterable[Any]) -> tuple[list[str], int, Counter[str]]:
    """The usable references among the given values, without repetitions, in order.

    Returns:
        The references; the number of usable values, repetitions included; and the number of rejected values by reason
        (``IMAGE_REASONS``).  Empty values are not counted.
    """
    given = [value for value in values if value is not None and value != ""]
    if len(given) <= MAX_ENTRIES and _are_plain(given):
        return list(dict.fromkeys(given)), len(given), _NONE
    rejected = Counter[str]()
    usable: list[str] = []
    for value in given[:_MAX_GIVEN]:
        reference, reason = _read(value)
        if reference is not None:
            usable.append(reference)
        elif reason:
            rejected[reason] += 1
    rejected["surplus"] += len(given[_MAX_GIVEN:])
    distinct = list(dict.fromkeys(usable))
    num_used = len(usable)
    if len(distinct) > MAX_ENTRIES:
        kept = frozenset(distinct[:MAX_ENTRIES])
        num_used = sum(reference in kept for reference in usable)
        rejected["surplus"] += len(usable) - num_used
    return distinct[:MAX_ENTRIES], num_used, +rejected


def _read(value: Any) -> tuple[str | None, str]:
    """A reference, or None and the reason for the rejection; the reason is empty for an empty value."""
    if not isinstance(value, str):
        return None, "kind"
    text = value.strip()
    if not text:
        return None, ""
    if text[:5].lower() == "data:":
        return None, "data_uri"
    if len(text) > MAX_REFERENCE_CHARS:
        return None, "too_long"
    if "&" in text:  # only complete entities: html.unescape alone would convert the '&copy' in '&copy=1'
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text).strip()
    if not text.isprintable():
        return None, "characters"
    if "/no-img" in text:
        return None, "no_image_icon"
    if text.startswith("\\"):
        return None, "local_path"
    scheme = _SCHEME.match(text)
    if scheme is not None and _HTTP.match(text) is None:
        return None, "local_path" if len(scheme[0]) == 2 or scheme[0].lower() == "file:" else "scheme"
    text = text.replace("\\", "/")
    if text.startswith("www."):
        text = f"//{text}"
    if scheme is not None or text.startswith("//"):
        return (text.replace(" ", "%20"), "") if _WEB.fullmatch(text) else (None, "address")
    if text[:1] in ("", "/", "~") or ".." in text.split("/"):
        return None, "local_path"
    if ":" in text:
        return None, "scheme"
    return (text, "") if is_meaningful(text) else (None, "blank")


def _are_plain(references: list[Any]) -> bool:
    """Whether all are web addresses that need no change and no rejection, the common case."""
    try:
        together = " ".join(references)
    except TypeError:  # not only strings
        return False
    return (
        together.isprintable()
        and together.count(" ") == len(references) - 1
        and "&" not in together
        and "\\" not in together
        and "/no-img" not in together
        and "?" not in together
        and "#" not in together
        and (len(together) <= MAX_REFERENCE_CHARS or max(map(len, references)) <= MAX_REFERENCE_CHARS)
        and all(map(_WEB_START.match, references))
    )
