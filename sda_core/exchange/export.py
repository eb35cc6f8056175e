"""Write an export: the folder is written atomically, and replaces only an older export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, assert_never

from sda_core import __version__
from sda_core.artifacts import replace_directory
from sda_core.errors import ConfigError
from sda_core.exchange import Format
from sda_core.exchange.own_folder import check_replaceable, describe
from sda_core.exchange.shop import Shop

DESCRIPTION = "sda_export.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def export(shop: Shop, target: Format, folder: Path) -> dict[str, Any]:
    """Write a shop in another library's format, with a description in ``sda_export.json``.

    Args:
        shop: the shop to write.
        target: the format.
        folder: the target folder; its name becomes the dataset's.  An older export there is replaced.

    Returns:
        A description of the export: flat counts and texts.

    Raises:
        ConfigError: the folder's name is not a valid name of a dataset, or the folder has anything but an older export.
        DataError: the shop cannot be written in this format.
    """
    name = folder.resolve().name
    if not _NAME.fullmatch(name):
        problem = f"the data set gets the folder's name, and {name!r} is not a valid name"
        raise ConfigError("--to", problem, "use letters, digits, _ and -")
    check_replaceable(folder, DESCRIPTION)
    with replace_directory(folder) as temporary:
        written = _write(shop, target, name, temporary)
        described = {"format": target, "variant": shop.variant, "sda_version": __version__, **written}
        describe(temporary, DESCRIPTION, described)
    return written


def _write(shop: Shop, target: Format, name: str, folder: Path) -> dict[str, Any]:
    match target:
        case Format.MMREC:
            from sda_core.exchange.mmrec import write_mmrec

            return write_mmrec(shop, name, folder)
        case Format.RECBOLE:
            from sda_core.exchange.recbole import write_recbole

            return write_recbole(shop, name, folder)
        case Format.DATASETS:
            from sda_core.exchange.hf_datasets import write_datasets

            return write_datasets(shop, name, folder)
        case _:
            assert_never(target)
