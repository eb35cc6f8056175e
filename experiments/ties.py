"""What is a number worth when equal times stand in the order of the raw file?  ``filter.ties: file`` against ``random``.

The published files of 2014 and 2018 have days only and are nearly sorted by item id.  A stable sort by time then makes the
item with the largest id of a day the "last" one.  This script filters the raw files of a workspace both ways and trains every
recommender on each.  With ``random`` every seed has an order of its own, so that the mean over seeds covers the draw.

The k-core, the users and the item ids are the same in all of these data sets; the targets are not.  Differences are paired by
user, of the mean over the seeds, with a 95 % bootstrap interval over users.  A change of ``pop`` and ``bpr``, which know no
order, says that other targets are easier or harder.  What a sequence model gains beyond that is its lead over ``bpr``: the last
column shows how the lead changes.

Two controls: ``shuffled`` takes ``ties: file`` after the lines were shuffled (a random order again: no difference is expected),
and a file whose lines are not sorted by id should give none either.

Takes ``data/raw``, ``data/filtered`` and, for ``vbpr`` and ``slmrec``, ``embeddings/zero_shot.parquet``.  The sequential
recommenders are trained on ids.  A run that was stopped resumes.  Filtered tables and positions are kept below
``experiments/positions/<name>``, the table and the plot in ``experiments/results/ties-<name>``.

    python experiments/ties.py --name gift_cards --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import gzip
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from _runs import CUTOFF, Reach, difference, dots, gains, keep_positions, leave, positions_path, reach, read_positions

from sda_core import log, recommenders
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, read_json, write_json
from sda_core.data.filtering import filter_dataset
from sda_core.errors import DataError
from sda_core.fetch.manifest import manifest_file
from sda_core.params import Params, SequentialParams, load_params
from sda_core.seed import generator

_log = logging.getLogger("experiments")

Order = Literal["file", "random", "shuffled"]
ORDERS: tuple[Order, ...] = ("file", "random", "shuffled")
RECOMMENDERS = ("pop", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec")
TAKES_VECTORS = ("vbpr", "slmrec")
REFERENCE = "bpr"


def main() -> None:
    """Read the options, filter and train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project folder of the run")
    parser.add_argument("--name", default="ties", help="folder of the results below experiments/positions")
    parser.add_argument("--recommenders", nargs="+", choices=RECOMMENDERS, default=list(RECOMMENDERS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["file", "random"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-epochs", type=int, help="at most so many epochs of every recommender that has epochs")
    options = parser.parse_args()
    log.configure()
    source, params = Workspace(options.root), load_params(options.root / "params.yaml")
    folder = options.root / "experiments" / "positions" / options.name
    for seed in options.seeds:
        for recommender in options.recommenders:
            for order in options.orders:
                data = filtered(source, params, order, seed, folder)
                train(source, data, params, recommender, seed, folder / order / recommender, options.max_epochs)
    shown = params, folder, options.recommenders, options.orders, options.seeds
    place = leave(shares(folder, options.orders, options.seeds) + "\n" + table(*shown), "ties", options.name, options.root)
    dots(place / "plot.png", reaches(*shown), f"NDCG@{CUTOFF}, 95 % interval over users")


def filtered(source: Workspace, params: Params, order: Order, seed: int, folder: Path) -> Workspace:
    """The tables of the filter stage with one order of equal times; ``file`` has no seed and is made once.

    Raises:
        DataError: its items are not those of the workspace, so that the workspace's vectors would be other items'.
    """
    made = Workspace(folder / order / "data" / ("0" if order == "file" else str(seed)))
    if made.statistics.exists():
        return made
    section = params.filter.model_copy(update={"ties": "random" if order == "random" else "file", "ties_seed": seed})
    reviews, metadata = manifest_file(source.raw, "reviews"), manifest_file(source.raw, "metadata")
    if order == "shuffled":
        reviews = shuffled_lines(reviews, seed, made.root / "shuffled.jsonl")
    data = filter_dataset(reviews, metadata, params.dataset.edition, section)
    if not data.items["raw_item_id"].equals(ITEMS.read(source.items)["raw_item_id"]):
        raise DataError(str(source.items), "has other items than its raw files give now", "run `dvc repro filter`")
    ITEMS.write(data.items, made.items)
    INTERACTIONS.write(data.interactions, made.interactions)
    write_json(made.statistics, data.statistics)
    (made.root / "shuffled.jsonl").unlink(missing_ok=True)
    return made


def shuffled_lines(path: Path, seed: int, target: Path) -> Path:
    """A copy of a raw file, unpacked, with its lines in a random order."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).splitlines()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"\n".join(lines[row] for row in generator(seed, "ties", "lines").permutation(len(lines))))
    return target


def train(
    source: Workspace, data: Workspace, params: Params, recommender: str, seed: int, folder: Path, max_epochs: int | None
) -> None:
    """Train a recommender on one data set and place its targets, unless that was done."""
    if positions_path(folder, seed).exists():
        return
    section = params.train_recommender.of(recommender)
    if isinstance(section, SequentialParams):
        section = section.model_copy(update={"representation": "id"})
    if max_epochs is not None and recommender != "pop":
        section = section.model_copy(update={"max_epochs": max_epochs})
    vectors = recommenders.read_item_vectors(source.embeddings("zero_shot"), section) if recommender in TAKES_VECTORS else None
    keep_positions(data, params, section, seed, folder, vectors=vectors)


def shares(folder: Path, orders: Sequence[Order], seeds: Sequence[int]) -> str:
    """A sentence: how much of the data the order decides; the same for every order."""
    order = orders[0]
    counts = read_json(
        folder / order / "data" / ("0" if order == "file" else str(seeds[0])) / "data/filtered/statistics.json", ""
    )
    return (
        f"{counts['share_tied_pairs']:.1%} of the neighbouring interactions of a user have equal times,"
        f" and {counts['share_tied_test_targets']:.1%} of the test targets share their time with another interaction.\n"
    )


def table(params: Params, folder: Path, names: Sequence[str], orders: Sequence[Order], seeds: Sequence[int]) -> str:
    """A markdown table: a row per recommender and order; the first order is what the others are compared with.

    Args:
        params: of the workspace.
        folder: of the positions.
        names: recommenders.
        orders: with ``random`` among them, which all others are compared with.
        seeds: of the mean.
    """
    lines = [
        f"| recommender | equal times | users | NDCG@{CUTOFF} | by seed | difference to random [95 %] |"
        f" lead over {REFERENCE} | lead, difference to random [95 %] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ndcg = {name: {order: gains("ndcg", read_positions(folder / order / name, seeds)) for order in orders} for name in names}
    for name in names:
        for order in orders:
            gain_SU = ndcg[name][order]
            by_seed = " ".join(f"{value:.4f}" for value in gain_SU.mean(1))
            row = [name, order, f"{gain_SU.shape[1]:,}", f"{gain_SU.mean():.4f}", by_seed, "", "", ""]
            compared = order != "random" and "random" in orders
            if compared:
                row[5] = difference(gain_SU - ndcg[name]["random"], params.evaluate, f"{name} {order}")
            if REFERENCE in names and name != REFERENCE:
                lead_SU = gain_SU - ndcg[REFERENCE][order]
                row[6] = f"{lead_SU.mean():+.4f}"
                if compared:
                    random_SU = ndcg[name]["random"] - ndcg[REFERENCE]["random"]
                    row[7] = difference(lead_SU - random_SU, params.evaluate, f"lead {name} {order}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def reaches(
    params: Params, folder: Path, names: Sequence[str], orders: Sequence[Order], seeds: Sequence[int]
) -> dict[str, dict[str, Reach]]:
    """The NDCG of :func:`table` for a plot: one panel, a line per recommender and order, so that all share an axis."""
    lines = {
        f"{name}, {order}": reach(gains("ndcg", read_positions(folder / order / name, seeds)), params.evaluate, f"{name} {order}")
        for name in names
        for order in orders
    }
    return {"Equal times in the order of the file, or in a random order": lines}


if __name__ == "__main__":
    main()
