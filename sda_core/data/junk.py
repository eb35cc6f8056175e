"""Recognize placeholders and fragments of scripts and style sheets in the place of values."""

from __future__ import annotations

import re

# Scripts (the publishers of the 2018 edition advise to drop titles with getTime) and rules of a style sheet.  The patterns
# are applied after white space was collapsed, so runs of white space are short.
_PAGE_JUNK = re.compile(
    r"getTime ?\(|P\.when ?\(|^var \w+ ?=|\bfunction ?\w* ?\([^()]{0,200}\) ?\{"
    r"|[.#][\w-]+[^{}]{0,100}\{[^{}]{0,500}:[^{}]{0,500}\}"
)
_ALPHANUMERIC = re.compile(r"[^\W_]")
_NO_VALUE = frozenset({"none", "null", "nan", "n/a", "na", "unknown"})


def is_meaningful(text: str) -> bool:
    """Whether a text has a letter or a digit and is not a placeholder for a missing value."""
    if not text[:1].isalnum() and _ALPHANUMERIC.search(text) is None:
        return False
    return len(text) > 7 or text.lower() not in _NO_VALUE


def is_page_junk(text: str) -> bool:
    """Whether a text is a fragment of a script or style sheet."""
    suspect = "{" in text or "getTime" in text or "P.when" in text or text.startswith("var ")
    return suspect and _PAGE_JUNK.search(text) is not None
