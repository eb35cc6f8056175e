"""The prompts of an item: a text prompt, and a line beside the image.

The text prompt starts with the noun of the dataset, followed by ``field: value`` pairs in the order of ``items.fields``::

    The beauty product has the following attributes: title: Red Shatter Crackle Nail Polish; categories: Beauty, Makeup.

Values are truncated to ``items.max_value_chars`` characters; empty values and fragments of web pages are skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sda_core.data.junk import is_meaningful, is_page_junk
from sda_core.errors import ConfigError
from sda_core.params import ItemsParams

_PLACEHOLDER = re.compile(r"\{(\w*)\}")

_PROBE: Mapping[str, Any] = {
    "title": "t" * 4096,
    "brand": "b",
    "price": "1.00",
    "categories": ["c", "d", "c"],
    "features": ["f", "g"],
    "description": "",
}


def text_prompt(row: Mapping[str, Any], params: ItemsParams) -> str:
    """The text prompt of an item.

    Args:
        row: an item as in the items table: ``title``, ``brand``, ``price``, ``description`` (strings), ``categories``,
            ``features`` (lists of strings); missing and null values count as empty.
        params: section ``items``.

    Returns:
        One line; never empty, because it always has the opening.

    Raises:
        ConfigError: ``items.text_opening`` has a placeholder other than ``{noun}``.
    """
    return prompt_of(text_pairs(row, params), params)


def text_pairs(row: Mapping[str, Any], params: ItemsParams) -> list[str]:
    """The ``field: value`` pairs of an item's text prompt; empty if the item has no text.

    Args:
        row: see :func:`text_prompt`.
        params: section ``items``.
    """
    pairs: list[str] = []
    for field in params.fields:
        value = _text(row.get(field))[: params.max_value_chars].rstrip()
        if is_meaningful(value) and not is_page_junk(value):
            pairs.append(f"{field}: {value}")
    return pairs


def prompt_of(pairs: Sequence[str], params: ItemsParams) -> str:
    """The text prompt with these pairs; without pairs, the opening and ``unknown``.

    Raises:
        ConfigError: see :func:`text_prompt`.
    """
    opening = _fill(params.text_opening, params, "text_opening")
    prompt = f"{opening} {'; '.join(pairs) or 'unknown'}"
    return prompt if prompt.endswith(".") else prompt + "."


def image_prompt(params: ItemsParams) -> str:
    """The line beside an item's image, the same for all items.

    Raises:
        ConfigError: ``items.image_prompt`` has a placeholder other than ``{noun}``.
    """
    return _fill(params.image_prompt, params, "image_prompt")


def prompt_hash(params: ItemsParams) -> str:
    """Hex SHA-256 of everything that determines the prompts: the params, and the prompts of a fixed item."""
    settings = params.model_dump(mode="json", exclude={"missing_image", "missing_text"})
    text = "\x1f".join([json.dumps(settings, sort_keys=True), text_prompt(_PROBE, params), image_prompt(params)])
    return hashlib.sha256(text.encode()).hexdigest()


def _fill(template: str, params: ItemsParams, name: str) -> str:
    # Not str.format: a noun or template with braces must neither fail nor reach into objects.
    unknown = [match[0] for match in _PLACEHOLDER.finditer(template) if match[1] != "noun"]
    if unknown:
        raise ConfigError(f"params.yaml: items.{name}", f"has the unknown placeholder {unknown[0]}", "only {noun} is filled in")
    return template.replace("{noun}", params.noun)


def _text(value: Any) -> str:
    """A field's value as one line; repeated entries of a list (``Gift Cards, Gift Cards``) are written once."""
    if value is None:
        return ""
    if isinstance(value, str):
        parts: Iterable[str] = [value]
    elif isinstance(value, Iterable):
        parts = [part for part in cast("Iterable[Any]", value) if isinstance(part, str)]
    else:
        parts = [str(value)]
    return ", ".join(dict.fromkeys(text for text in (" ".join(part.split()) for part in parts) if text))
