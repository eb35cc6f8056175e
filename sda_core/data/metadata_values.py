"""Convert a metadata record to clean values, and count dropped values by field and reason.

Every value of a field is either used or dropped for one of ``REASONS``.  Null, blank text and empty lists do not count as
values.  Each entry of a list is a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from sda_core.data import image_references as images
from sda_core.data.cleaning import (
    MAX_ENTRIES,
    MAX_TEXT_CHARS,
    clean_label,
    clean_name,
    clean_text,
    clean_texts,
    leaves,
    read_price,
    why_no_text,
)
from sda_core.data.literals import parse_literal
from sda_core.dropped_values import ValueCount

_MAX_NAME_CHARS = 60  # maximum length of a category in 2018

Row = tuple[str, str, str, list[str], list[str], str, list[str]]
"""title, brand, price, categories, features, description, image references."""

_SIGNATURES: Mapping[int, frozenset[str]] = {
    2014: frozenset({"imUrl", "salesRank"}),
    2018: frozenset({"imageURL", "imageURLHighRes", "also_buy", "also_view", "similar_item", "tech1", "main_cat"}),
}
"""Metadata fields that only this edition has; in both, the item's id is ``asin``."""


def metadata_row(record: dict[str, Any], edition: int, count: ValueCount) -> Row:
    """The clean values of a record."""
    match edition:
        case 2014:
            brand, features = _name("brand", record.get("brand"), count), []
            categories = _names(_first_path(record.get("categories")), count)
            references = images.image_values(record.get("imUrl"))
        case 2018:
            path, bullets = _path_and_bullets(_first_path(record.get("category")))
            brand = _name("brand", record.get("brand"), count)
            given = record.get("feature")
            features = _texts("features", bullets if given is None or given == "" or given == [] else given, count)
            categories = _names(path, count) or _names([record.get("main_cat")], count)
            fields = (record.get("imageURLHighRes"), record.get("imageURL"), record.get("image"))
            references = [reference for value in fields for reference in images.image_values(value)]
        case _:
            brand = _name("brand", record.get("store"), count) or _brand_of_details(record.get("details"), count)
            features = _texts("features", record.get("features"), count)
            categories = _names(_first_path(record.get("categories")), count) or _names([record.get("main_category")], count)
            references = images.image_values(record.get("images"))
    return (
        _name("title", record.get("title"), count),
        brand,
        _price(record.get("price"), count),
        categories,
        features,
        _text("description", record.get("description"), count),
        _references(references, count),
    )


def other_edition(record: dict[str, Any], edition: int) -> int | None:
    """The edition to which a record's fields belong, if it is 2014 read as 2018 or the reverse."""
    other = 2014 if edition == 2018 else 2018
    keys = record.keys()
    return other if keys.isdisjoint(_SIGNATURES[edition]) and not keys.isdisjoint(_SIGNATURES[other]) else None


def _name(name: str, value: Any, count: ValueCount) -> str:
    if value is None or value == "":
        return ""
    text = clean_label(value) if name == "brand" else clean_name(value)
    if text and isinstance(value, str):
        count.used[name] += 1
        return text
    is_used = False
    for leaf in leaves(value):
        if leaf is None or not clean_name(leaf):
            count.dropped[name, why_no_text(leaf)] += 1
        elif is_used:
            count.dropped[name, "surplus"] += 1
        else:
            count.used[name] += 1
            is_used = True
    return text


def _names(values: list[Any], count: ValueCount) -> list[str]:
    names = [name for name in map(clean_label, values) if name]
    if len(names) == len(values):
        count.used["categories"] += len(names)
    else:
        for value in values:
            _name("categories", value, count)
    return names


def _texts(name: str, value: Any, count: ValueCount) -> list[str]:
    if value is None:
        return []
    texts = clean_texts(value)
    if isinstance(value, list) and len(texts) == len(value):  # pyright: ignore[reportUnknownArgumentType]
        count.used[name] += len(texts)
        return texts
    if isinstance(value, str) and texts:
        count.used[name] += 1
        return texts
    num_taken = 0  # texts passed to the cleaning so far, which is limited to a maximum
    for leaf in leaves(value):
        num_taken += leaf is not None
        if leaf is not None and num_taken > MAX_ENTRIES:
            count.dropped[name, "surplus"] += 1
        elif leaf is None or not clean_text(leaf):
            count.dropped[name, why_no_text(leaf)] += 1
        else:
            count.used[name] += 1
    return texts


def _text(name: str, value: Any, count: ValueCount) -> str:
    return " ".join(_texts(name, value, count))[:MAX_TEXT_CHARS]


def _price(value: Any, count: ValueCount) -> str:
    price, reason = read_price(value)
    if price:
        count.used["price"] += 1
    elif reason:
        count.dropped["price", reason] += 1
    return price


def _references(values: list[Any], count: ValueCount) -> list[str]:
    references, num_used, rejected = images.image_references(values)
    count.used["image_references"] += num_used
    if rejected:
        for reason, number in rejected.items():
            count.dropped["image_references", reason] += number
    return references


def _brand_of_details(value: Any, count: ValueCount) -> str:
    """The brand in an item's details, which are an object or its text in JSON or Python syntax."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = parse_literal(value.strip())
            except ValueError:
                value = False
    if not isinstance(value, dict):
        if value is not None and value != "" and value != []:
            count.dropped["brand", "details"] += 1
        return ""
    details = cast("dict[Any, Any]", value)
    if "Brand" in details and (brand := _name("brand", details["Brand"], count)):
        return brand
    for wanted in ("brand", "brand name"):
        for key, entry in details.items():
            is_wanted = (
                isinstance(key, str) and key != "Brand" and key.strip(" :\u200e\u200f").replace("_", " ").lower() == wanted
            )
            if is_wanted and (brand := _name("brand", entry, count)):
                return brand
    return ""


def _entries(value: Any) -> list[Any]:
    """A list unchanged; a single text, number or object as a list of one; null as an empty list."""
    if isinstance(value, (list, tuple)):  # `list | tuple` would be built at every call
        return list(cast("list[Any]", value))[: 4 * MAX_ENTRIES]
    return [] if value is None or value == "" else [value]


def _first_path(value: Any) -> list[Any]:
    """The first non-empty path of a list of category paths, or the list itself if it is a single path."""
    entries = _entries(value)
    for entry in entries:
        if isinstance(entry, (list, tuple)) and entry:
            entries = _entries(entry)
            break
    return entries[:MAX_ENTRIES]


def _path_and_bullets(entries: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split a 2018 category list into the path and the product's bullet points, which follow it in many items.

    The bullet points begin after a fragment of markup (``</span></span></span>``), or with the first entry that is not a
    name: a sentence of four words or more, or a text longer than any category name.
    """
    for position, entry in enumerate(entries):
        if isinstance(entry, str):
            if entry.startswith("</"):
                return entries[:position], entries[position + 1 :]
            if position and (len(entry) > _MAX_NAME_CHARS or (entry.endswith(".") and entry.count(" ") >= 3)):
                return entries[:position], entries[position:]
    return entries, []
