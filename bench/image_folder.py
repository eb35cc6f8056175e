"""Finding the images of a folder by item id: one listing of the folder against four questions to the file system per item.

python bench/image_folder.py
python bench/image_folder.py --num-images 10000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sda_core.fetch.image_sources import Finder, Item
from sda_core.params import load_params

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def listed(folder: Path, ids: list[str]) -> int:
    """As the stage does it: any extension in any case, any spelling of the id."""
    finder = Finder(None, folder, None, load_params(Path(__file__).resolve().parents[1] / "params.yaml").fetch_images)
    return sum(bool(finder.sources(Item(number, item_id, ()))) for number, item_id in enumerate(ids, start=1))


def asked(folder: Path, ids: list[str]) -> int:
    """The same for four extensions in lower case and no other spelling."""
    return sum(any((folder / f"{item_id}{suffix}").is_file() for suffix in SUFFIXES) for item_id in ids)


def main() -> None:
    """Run both in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=100_000)
    options = parser.parse_args()
    ids = [f"B{number:09d}" for number in range(options.num_images)]
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
    print(f"listed is {seconds['asked'] / seconds['listed']:.1f} x as fast; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
