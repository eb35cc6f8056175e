"""The items as people name them, for the commands that ask a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sda_core.artifacts import Workspace


@dataclass(frozen=True)
class Catalogue:
    """Ids and titles of the items, by number."""

    names: dict[int, tuple[str, str]]  # item id: the shop's id, the title
    numbers: dict[str, int]  # the shop's id: item id

    @staticmethod
    def read(workspace: Workspace) -> Catalogue:
        """The items of a finished run."""
        from sda_core.artifacts import ITEMS

        rows = ITEMS.scan(workspace.items).select("item_id", "raw_item_id", "title").collect().rows()
        return Catalogue({number: (raw, title) for number, raw, title in rows}, {raw: number for number, raw, _ in rows})

    def number(self, item: str) -> int:
        """The number of an item that is named by its id in the shop, or else by its number.

        Raises:
            ConfigError: there is no such item.
        """
        from sda_core.errors import ConfigError

        if item in self.numbers:
            return self.numbers[item]
        if item.isascii() and item.isdigit() and int(item) in self.names:
            return int(item)
        raise ConfigError(
            "ITEM", f"{item!r} is not among the {len(self.names)} items", f"ids look like {next(iter(self.numbers), '')}"
        )

    def line(self, number: int) -> str:
        """An item's id and title."""
        return "  ".join(self.names[number])
