"""Compare ways to find images of a folder by item id: one listing of the folder, or four questions to the file system per item.

python -m bench image_folder
python -m bench image_folder --num-images 10000
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import default_params
from sda_core.fetch.image_names import ItemNames
from sda_core.fetch.image_sources import Finder, Item

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def listed(folder: Path, ids: list[str]) -> int:
    """As in the stage: any extension in any case, any spelling of the id."""
    finder = Finder(None, folder, None, default_params().fetch_images, ItemNames(ids))
    return sum(bool(finder.sources(Item(number, item_id, ()))) for number, item_id in enumerate(ids, start=1))


def asked(folder: Path, ids: list[str]) -> int:
    """The same for four extensions in lower case and no other spelling."""
    return sum(any((folder / f"{item_id}{suffix}").is_file() for suffix in SUFFIXES) for item_id in ids)


def main(num_images: int = 100_000) -> None:
    """Run both in turn and print a table."""
    ids = [f"B{number:09d}" for number in range(num_images)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, item_id in enumerate(ids):
            (folder / f"{item_id}{SUFFIXES[number % 4]}").touch()
        ways: dict[str, Callable[[Path, list[str]], int]] = {"asked": asked, "listed": listed}
        seconds: dict[str, float] = {}
        for way, find in ways.items():
            begin = time.process_time()
            num_found = find(folder, ids)
            seconds[way] = time.process_time() - begin
            print(f"| {way:<6} | {seconds[way]:6.2f} s of processor time | {num_found} of {len(ids)} found |")
    print(f"one listing is {seconds['asked'] / seconds['listed']:.1f} x as fast; load {os.getloadavg()[0]:.1f}")
