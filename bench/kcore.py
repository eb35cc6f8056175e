"""Compare k-cores of ten million interactions: this project, pandas and plain Python, each in a separate process.

Users have geometric numbers of interactions, items have Zipf popularity.  All three start from the same two arrays of codes
and must keep the same rows.  pandas counts with groupby-transform and filters until nothing changes; plain Python does the
same with two Counters.  Peak memory is that of the whole process, including the two arrays (16 bytes per row).  On a busy
machine compare the CPU seconds.

    pip install -e .[bench]
    python -m bench kcore
    python -m bench kcore --num-interactions 1000000
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from bench.common import in_own_process, now, peak_mebibytes, since

Codes = npt.NDArray[np.int64]
WAYS = ("core_mask", "pandas", "dictionaries")


def write_codes(folder: str, num_interactions: int, num_items: int, mean_history_length: float) -> None:
    """Save ``users.npy`` and ``items.npy``."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1.0 / mean_history_length, size=int(1.1 * num_interactions / mean_history_length))
    users = np.repeat(np.arange(len(lengths)), lengths)[:num_interactions]
    popularity = np.cumsum(1.0 / np.arange(1, num_items + 1) ** 0.8)
    items = np.searchsorted(popularity, random.random(num_interactions) * popularity[-1])
    random.shuffle(users)
    np.save(Path(folder) / "users.npy", users)
    np.save(Path(folder) / "items.npy", items)


def by_core_mask(users: Codes, items: Codes, minimum: int) -> npt.NDArray[np.bool_]:
    """The function of the filter stage."""
    from sda_core.data.kcore import core_mask

    return core_mask(users, items, minimum, minimum)


def by_pandas(users: Codes, items: Codes, minimum: int) -> npt.NDArray[np.bool_]:
    """The usual loop over a frame."""
    import pandas as pd

    frame = pd.DataFrame({"user": users, "item": items}, copy=False)
    while True:
        enough = frame.groupby("user")["item"].transform("size") >= minimum
        enough &= frame.groupby("item")["user"].transform("size") >= minimum
        if enough.all():
            break
        frame = frame[enough]
    mask = np.zeros(len(users), dtype=np.bool_)
    mask[frame.index.to_numpy()] = True
    return mask


def by_dictionaries(users: Codes, items: Codes, minimum: int) -> npt.NDArray[np.bool_]:
    """Counters over lists of numbers."""
    from collections import Counter

    user_list, item_list, rows = users.tolist(), items.tolist(), list(range(len(users)))
    while True:
        user_count, item_count = Counter(user_list), Counter(item_list)
        kept = [
            place
            for place, (user, item) in enumerate(zip(user_list, item_list, strict=True))
            if user_count[user] >= minimum and item_count[item] >= minimum
        ]
        if len(kept) == len(rows):
            break
        user_list = [user_list[place] for place in kept]
        item_list = [item_list[place] for place in kept]
        rows = [rows[place] for place in kept]
    mask = np.zeros(len(users), dtype=np.bool_)
    mask[rows] = True
    return mask


def run_way(way: str, folder: str, minimum: int) -> dict[str, float]:
    """Run one side in this process and save its rows; returns its cost."""
    functions = {"core_mask": by_core_mask, "pandas": by_pandas, "dictionaries": by_dictionaries}
    functions[way](np.arange(20) % 4, np.arange(20) % 5, 2)  # imports are not timed
    users, items = np.load(Path(folder) / "users.npy"), np.load(Path(folder) / "items.npy")
    begin = now()
    mask = functions[way](users, items, minimum)
    seconds, cpu_seconds = since(begin)
    mebibytes = peak_mebibytes()
    np.save(Path(folder) / f"{way}.npy", mask)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "mebibytes": mebibytes}


def main(
    num_interactions: int = 10_000_000,
    num_items: int = 400_000,
    mean_history_length: float = 3.0,
    minimum: Annotated[int, typer.Option(help="Fewest interactions of a user and an item.")] = 5,
) -> None:
    """Run all sides and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        # Keep this process small: the system reports at least the parent's memory as peak of a child.
        in_own_process(write_codes, folder, num_interactions, num_items, mean_history_length)
        measured = {way: in_own_process(run_way, way, folder, minimum) for way in WAYS}
        masks = [np.load(Path(folder) / f"{way}.npy") for way in WAYS]
    assert all(np.array_equal(mask, masks[0]) for mask in masks), "the implementations keep different rows"
    kept = int(masks[0].sum())
    print(f"{num_interactions:,} interactions, {kept:,} in the core; {os.cpu_count()} CPU cores, load {load:.1f}")
    own = measured["core_mask"]
    for way, cost in measured.items():
        took = f"{cost['seconds']:7.2f} s | {cost['cpu_seconds']:7.2f} CPU s | {cost['mebibytes']:6.0f} MiB"
        ratios = [f"{cost[name] / own[name]:.2f}" for name in ("seconds", "cpu_seconds", "mebibytes")]
        print(f"| {way:<12} | {took} | {' / '.join(ratios)} x core_mask |")
