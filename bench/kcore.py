"""The k-core of ten million interactions: this project's, pandas' and plain Python's, each in a process of its own.

Users have geometric numbers of interactions, items are popular by Zipf's law.  All three start from the same two arrays of
codes and must keep the same rows.  pandas counts with groupby-transform and filters until nothing changes; plain Python does
the same with two Counters.  Peak memory is that of the whole process, the two arrays (16 bytes a row) included.  On a busy
machine compare the CPU seconds.

    pip install -e .[bench]
    python bench/kcore.py
    python bench/kcore.py --num-interactions 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
WAYS = ("core_mask", "pandas", "dictionaries")


def write_codes(folder: Path, num_interactions: int, num_items: int, mean_history_length: float) -> None:
    """Save ``users.npy`` and ``items.npy``."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1.0 / mean_history_length, size=int(1.1 * num_interactions / mean_history_length))
    users = np.repeat(np.arange(len(lengths)), lengths)[:num_interactions]
    popularity = np.cumsum(1.0 / np.arange(1, num_items + 1) ** 0.8)
    items = np.searchsorted(popularity, random.random(num_interactions) * popularity[-1])
    random.shuffle(users)
    np.save(folder / "users.npy", users)
    np.save(folder / "items.npy", items)


def by_core_mask(users: Codes, items: Codes, minimum: int) -> npt.NDArray[np.bool_]:
    """What the filter stage does."""
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


def run_way(way: str, folder: Path, minimum: int) -> None:
    """Run one way in this process; save its rows and what it took."""
    functions = {"core_mask": by_core_mask, "pandas": by_pandas, "dictionaries": by_dictionaries}
    functions[way](np.arange(20) % 4, np.arange(20) % 5, 2)  # imports are not timed
    users, items = np.load(folder / "users.npy"), np.load(folder / "items.npy")
    begin, cpu_begin = time.perf_counter(), time.process_time()
    mask = functions[way](users, items, minimum)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.save(folder / f"{way}.npy", mask)
    (folder / f"{way}.json").write_text(
        json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "mebibytes": mebibytes}), encoding="utf-8"
    )


def main() -> None:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-interactions", type=int, default=10_000_000)
    parser.add_argument("--num-items", type=int, default=400_000)
    parser.add_argument("--mean-history-length", type=float, default=3.0)
    parser.add_argument("--minimum", type=int, default=5, help="interactions that a user and an item need")
    parser.add_argument("--way", choices=("write", *WAYS), help="write the arrays to --folder, or run one way on them")
    parser.add_argument("--folder", type=Path, help="with --way")
    options = parser.parse_args()
    if options.way == "write":
        write_codes(options.folder, options.num_interactions, options.num_items, options.mean_history_length)
        return
    if options.way:
        run_way(options.way, options.folder, options.minimum)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = os.getloadavg()[0]
        # This process stays small while the others run: to the system, a child's peak is at least its parent's.
        for way in ("write", *WAYS):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", name], check=True)
        masks = [np.load(folder / f"{way}.npy") for way in WAYS]
        assert all(np.array_equal(mask, masks[0]) for mask in masks), "the ways keep different rows"
        measured = {way: json.loads((folder / f"{way}.json").read_text(encoding="utf-8")) for way in WAYS}
    kept = int(masks[0].sum())
    print(f"{options.num_interactions:,} interactions, {kept:,} in the core; {os.cpu_count()} CPU cores, load {load:.1f}")
    own = measured["core_mask"]
    for way, cost in measured.items():
        took = f"{cost['seconds']:7.2f} s | {cost['cpu_seconds']:7.2f} CPU s | {cost['mebibytes']:6.0f} MiB"
        ratios = [f"{cost[name] / own[name]:.2f}" for name in ("seconds", "cpu_seconds", "mebibytes")]
        print(f"| {way:<12} | {took} | {' / '.join(ratios)} x core_mask |")


if __name__ == "__main__":
    main()
