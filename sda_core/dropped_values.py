"""Reasons for dropping metadata values, and counts by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

TEXT_REASONS = {
    "markup": "Markup, script or style sheet",
    "blank": "Empty, or a placeholder (n/a, null, punctuation)",
    "kind": "Not text (a boolean, NaN, an object)",
    "surplus": "Extra values, where one is expected or beyond the limit of a list",
}

PRICE_REASONS = {
    "not_understood": "A price format that is not recognized",
    "markup": "Markup, script or style sheet",
    "blank": "Empty, or a placeholder (n/a, null, punctuation)",
    "not_positive": "Zero or less",
    "kind": "Neither text nor a number (a boolean, NaN, an object)",
    "surplus": "Several values where one is expected",
}

IMAGE_REASONS = {
    "blank": "Empty, or a placeholder (n/a, null, punctuation)",
    "data_uri": "An image inside the text (data: URI)",
    "scheme": "Neither http nor https",
    "local_path": "An absolute path, or one that leaves the folder",
    "no_image_icon": "The shop's icon for a missing image",
    "address": "An address without a host or a path",
    "characters": "Control characters",
    "too_long": "Too long",
    "kind": "Not text (a number, a boolean, an object without an address)",
    "surplus": "Extra values, beyond the limit of a list",
}

REASONS: Mapping[str, Mapping[str, str]] = {
    "title": TEXT_REASONS,
    "brand": {**TEXT_REASONS, "details": "Details that cannot be read as an object"},
    "price": PRICE_REASONS,
    "categories": TEXT_REASONS,
    "features": TEXT_REASONS,
    "description": TEXT_REASONS,
    "image_references": IMAGE_REASONS,
}
"""Reasons for dropping a value, by field: short name and meaning."""


@dataclass
class ValueCount:
    """Counts of used values by field, and of dropped values by field and reason."""

    used: Counter[str] = field(default_factory=Counter[str])
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])

    def num_dropped(self, name: str) -> int:
        """The number of dropped values of a field."""
        return sum(count for (of, _), count in self.dropped.items() if of == name)

    def statistics(self) -> dict[str, int]:
        """Flat counts with the same names for every file: ``values_used_*``, ``values_dropped_*``, the latter also by reason."""
        counts: dict[str, int] = {}
        for name, reasons in REASONS.items():
            counts[f"values_used_{name}"] = self.used[name]
            counts[f"values_dropped_{name}"] = self.num_dropped(name)
            counts |= {f"values_dropped_{name}_{reason}": self.dropped[name, reason] for reason in reasons}
        return counts
