"""Find items by id or number, for the commands that read a finished run."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sda_core.artifacts import Workspace

ITEM_HELP = "Item id as in the shop's own files (for Amazon the ASIN). Put `--` before an id that begins with a dash."
ByNumber = Annotated[
    bool, typer.Option("--by-number", help="ITEM is the number in column item_id of data/filtered/items.parquet.")
]
Top = Annotated[int, typer.Option("--top", "-k", min=1, help="Number of items to list.")]

_NUM_PROPOSED = 3
_MAX_COMPARED = 200_000  # ids compared letter by letter; more would take seconds


@dataclass(frozen=True)
class Catalogue:
    """Ids and titles of the items, by number."""

    names: dict[int, tuple[str, str]]  # item id: the shop's id, the title
    numbers: dict[str, int]  # the shop's id: item id

    @staticmethod
    def read(workspace: Workspace) -> Catalogue:
        """The items of a finished run."""
        from sda_core.artifacts import ITEMS

        rows = ITEMS.query(workspace.items, lambda items: items.select("item_id", "raw_item_id", "title")).rows()
        return Catalogue({number: (raw, title) for number, raw, title in rows}, {raw: number for number, raw, _ in rows})

    def number(self, item: str, by_number: bool = False) -> int:
        """The number of the item with this id in the shop (exact match).

        The ids of a shop may look like numbers, so the two are never mixed: ``3`` and ``003`` are ids of the shop, or
        unknown, unless ``by_number`` is set.

        Args:
            item: the user's input.
            by_number: whether the input is the item's number (column ``item_id``) instead of its id.

        Raises:
            ConfigError: there is no such item.
        """
        from sda_core.errors import ConfigError

        if by_number:
            if item in (str(number) for number in self.names):
                return int(item)
            problem = f"{item!r} is not the number of an item"
            raise ConfigError("ITEM", problem, f"numbers run from 1 to {len(self.names)}; without --by-number ITEM is an id")
        if item in self.numbers:
            return self.numbers[item]
        advice = [f"ids look like {next(iter(self.numbers), '')}"]
        if near := self._near(item):
            advice.append(f"similar ids are {', '.join(map(repr, near))}")
        if item in (str(number) for number in self.names):
            advice.append("add --by-number to name an item by its number")
        raise ConfigError("ITEM", f"{item!r} is not among the {len(self.names)} items", "; ".join(advice))

    def _near(self, item: str) -> list[str]:
        """Ids similar to a mistyped one, most similar first."""
        plain = _plain(item)
        same = [raw for raw in self.numbers if _plain(raw) == plain]
        alike: Iterable[str] = ()
        if len(self.numbers) <= _MAX_COMPARED:
            alike = difflib.get_close_matches(item, self.numbers, _NUM_PROPOSED)
        return list(dict.fromkeys((*same, *alike)))[:_NUM_PROPOSED]

    def line(self, number: int) -> str:
        """An item's id and title."""
        return "  ".join(self.names[number])


def _plain(name: str) -> str:
    """Normalise an id: remove blanks, case, width of letters, leading zeros and a final ``.0``, which are easily lost."""
    folded = "".join(unicodedata.normalize("NFKC", name).casefold().split()).removesuffix(".0")
    return folded.lstrip("0") or folded
