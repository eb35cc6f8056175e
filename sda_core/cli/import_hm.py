"""``sda import-hm``: convert the files of Kaggle's H&M competition."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sda_core.cli.stage import one_line_errors
from sda_core.errors import ConfigError

if TYPE_CHECKING:
    import datetime


def import_hm(
    source: Annotated[Path, typer.Argument(metavar="KAGGLE", help="The competition's folder, unpacked.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The folder to create.", metavar="FOLDER")],
    from_date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="The first day.", show_default="the first")] = None,
    to_date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="The last day.", show_default="the last")] = None,
    customer_share: Annotated[float, typer.Option(help="Share of the customers of these days to keep, drawn at random.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    products: Annotated[bool, typer.Option("--products", help="The colours of a garment are one item.")] = False,
) -> None:
    """Write interactions, items and images of Kaggle's H&M competition for the presets hm and hm_two_years.

    Reads articles.csv, transactions_train.csv and images/0xx/0xxxxxxxxx.jpg.  Images are hard links where that is possible, else
    copies.  An existing folder is replaced if this command made it; otherwise it is an error.
    """
    from sda_core.exchange.hm import Selection
    from sda_core.exchange.hm import import_hm as write

    with one_line_errors("import-hm"):
        days = _day("--from-date", from_date), _day("--to-date", to_date)
        written = write(source, to, Selection(*days, customer_share, seed, products))
        typer.echo(f"{to}: " + ", ".join(f"{name} {value}" for name, value in written.items()))


def _day(option: str, text: str | None) -> datetime.date | None:
    import datetime

    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(option, f"should be a day as 2020-09-22 (got {text!r})") from None
