"""Measure how much the order of equal times matters: filter.ties=file, the order of the raw file, against random.

The published files of 2014 and 2018 have times in days and are nearly sorted by item id.  With a stable sort by time, the item
with the largest id of a day is the "last" one.  This script filters the raw files of a workspace both ways and trains every
recommender on each.  With random every seed has a separate order, so that the mean over seeds covers the draw.

The k-core, the users and the item ids are the same in all of these datasets; the targets differ.  Differences are paired by
user, of the mean over the seeds, with a 95 % interval over users and seeds.  A change of pop and bpr, which do not use the order,
means that other targets are easier or harder.  The gain of a sequence model beyond that is its lead over bpr; the last column
shows the change of the lead.

Two controls: shuffled uses ties: file after the lines were shuffled (also a random order: no difference is expected), and a file
whose lines are not sorted by id should show no difference either.

The input is data/raw, data/filtered and, for vbpr and slmrec, embeddings/zero_shot.parquet.  The sequential recommenders are
trained on ids.  An interrupted run resumes.  Filtered tables and positions are kept in experiments/positions/NAME, table and
plot are written to experiments/results/ties-NAME.

    python -m experiments ties --name gift_cards --seeds 1,2,3
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from experiments.options import THREE_SEEDS, MaxEpochs, Name, Recommenders, Root, Seeds
from experiments.study import (
    CUTOFF,
    Panels,
    check_names,
    difference,
    keep_positions,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    positions_path,
    read_gains,
    write_results,
)
from experiments.workspaces import project_params
from sda_core import recommenders as models
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, read_json, write_json
from sda_core.cli.scripts import Names, names
from sda_core.data.filtering import filter_dataset
from sda_core.errors import DataError
from sda_core.fetch.manifest import manifest_file
from sda_core.params import Params, SequentialParams
from sda_core.seed import generator

Order = Literal["file", "random", "shuffled"]
ORDERS: tuple[Order, ...] = ("file", "random", "shuffled")
RECOMMENDERS = ("pop", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec")
TAKES_VECTORS = ("vbpr", "slmrec")
REFERENCE = "bpr"


def main(
    root: Root = Path(),
    name: Name = "ties",
    recommenders: Recommenders = Names(RECOMMENDERS),
    orders: Annotated[
        Names, typer.Option(parser=names, metavar="A,B,...", help=f"Orders to compare: {', '.join(ORDERS)}.")
    ] = Names(("file", "random")),
    seeds: Seeds = THREE_SEEDS,
    max_epochs: MaxEpochs = None,
) -> None:
    """Filter and train what is missing, write table and plot."""
    check_names("--recommenders", recommenders, RECOMMENDERS)
    check_names("--orders", orders, ORDERS)
    chosen = cast(Sequence[Order], orders)
    source, params = Workspace(root), project_params(root)
    folder = root / "experiments" / "positions" / name
    for seed in seeds:
        for recommender in recommenders:
            for order in chosen:
                data = filtered(source, params, order, seed, folder)
                train(source, data, params, recommender, seed, folder / order / recommender, max_epochs)
    shown = params, folder, recommenders, chosen, seeds
    results = write_results(shares(folder, chosen, seeds) + "\n" + table(*shown), "ties", name, root)
    plot_intervals(results / "plot.png", intervals(*shown), f"NDCG@{CUTOFF}, 95 % interval")


def filtered(source: Workspace, params: Params, order: Order, seed: int, folder: Path) -> Workspace:
    """The tables of the filter stage with one order of equal times; ``file`` has no seed and is computed once.

    Raises:
        DataError: the items are not those of the workspace, so that the workspace's vectors would be those of other items.
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
    """A decompressed copy of a raw file with its lines in a random order."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).splitlines()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"\n".join(lines[row] for row in generator(seed, "ties", "lines").permutation(len(lines))))
    return target


def train(
    source: Workspace, data: Workspace, params: Params, recommender: str, seed: int, folder: Path, max_epochs: int | None
) -> None:
    """Train a recommender on one dataset and rank its targets, unless this was done."""
    if positions_path(folder, seed).exists():
        return
    section = params.train_recommender.of(recommender)
    if isinstance(section, SequentialParams):
        section = section.model_copy(update={"representation": "id"})
    if max_epochs is not None and recommender != "pop":
        section = section.model_copy(update={"max_epochs": max_epochs})
    vectors = models.read_item_vectors(source.embeddings("zero_shot"), section) if recommender in TAKES_VECTORS else None
    keep_positions(data, params, section, seed, folder, vectors=vectors)


def shares(folder: Path, orders: Sequence[Order], seeds: Sequence[int]) -> str:
    """A sentence on the share of the data affected by the order, which is the same for every order."""
    order = orders[0]
    counts = read_json(
        folder / order / "data" / ("0" if order == "file" else str(seeds[0])) / "data/filtered/statistics.json", ""
    )
    return (
        f"{counts['share_tied_pairs']:.1%} of the neighbouring interactions of a user have equal times,"
        f" and {counts['share_tied_test_targets']:.1%} of the test targets share their time with another interaction.\n"
    )


def table(params: Params, folder: Path, names: Sequence[str], orders: Sequence[Order], seeds: Sequence[int]) -> str:
    """A Markdown table: one row per recommender and order; the other orders are compared with the first.

    Args:
        params: params of the workspace.
        folder: folder of the positions.
        names: names of the recommenders.
        orders: the orders, including ``random``, with which all others are compared.
        seeds: seeds of the mean.
    """
    ndcg = {name: {order: read_gains("ndcg", folder / order / name, seeds) for order in orders} for name in names}
    rows = []
    for name in names:
        for order in orders:
            gain_SU = ndcg[name][order]
            by_seed = " ".join(f"{value:.4f}" for value in gain_SU.mean(1))
            row = [name, order, f"{gain_SU.shape[1]:,}", f"{gain_SU.mean():.4f}", by_seed, "", "", ""]
            is_compared = order != "random" and "random" in orders
            if is_compared:
                row[5] = difference(gain_SU - ndcg[name]["random"], params.evaluate, f"{name} {order}")
            if REFERENCE in names and name != REFERENCE:
                lead_SU = gain_SU - ndcg[REFERENCE][order]
                row[6] = f"{lead_SU.mean():+.4f}"
                if is_compared:
                    random_SU = ndcg[name]["random"] - ndcg[REFERENCE]["random"]
                    row[7] = difference(lead_SU - random_SU, params.evaluate, f"lead {name} {order}")
            rows.append(row)
    heads = ["recommender", "equal times", "users", f"NDCG@{CUTOFF}", "by seed", "difference to random [95 %]"]
    return markdown_table([*heads, f"lead over {REFERENCE}", "lead, difference to random [95 %]"], rows)


def intervals(params: Params, folder: Path, names: Sequence[str], orders: Sequence[Order], seeds: Sequence[int]) -> Panels:
    """The NDCG of :func:`table` for a plot: one panel with one line per recommender and order, on a common axis."""
    lines = {
        f"{name}, {order}": mean_and_interval(
            read_gains("ndcg", folder / order / name, seeds), params.evaluate, f"{name} {order}"
        )
        for name in names
        for order in orders
    }
    return {"Equal times in the order of the file, or in a random order": lines}
