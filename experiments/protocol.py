"""Measure how results depend on the protocol: each choice of the public code, and all of them, against the fixed protocol.

The input is a workspace with data/raw and data/filtered and its params.yaml, which has the fixed protocol.  SASRec on ids is
trained with every seed for each choice that needs a separate training (TRAININGS); popularity only counts.  Every model
ranks the test targets among all items and among 100 uniform ones, so that a choice of the evaluation needs no further training.
The choices of the public code (docs/reproduction.md):

not causal         attention sees later items, including the target
BCE                binary cross-entropy with one negative instead of a sampled softmax
single pass        users and items are counted once on the raw rows and dropped once, so the rest is not a k-core
sampled            100 uniform negatives instead of all items
tail of all        items are tail by their interactions over all splits, including the test
counts of all      popularity counts all splits

If the users are the same, the difference has a paired interval over users and seeds.  The single-pass dataset has other users,
so there are no differences.  Positions are kept in the workspace's experiments/positions/NAME, and the table is written to
experiments/results/protocol-NAME (for the default name just protocol), which `sda report --experiments` shows.

    python -m experiments protocol --seeds 1,2,3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from experiments.options import THREE_SEEDS, MaxEpochs, Name, Root, Seeds
from experiments.study import (
    CUTOFF,
    PROTOCOLS,
    Interval,
    Panels,
    check_names,
    gains,
    interval,
    keep_positions,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    positions_path,
    read_positions,
    write_results,
)
from experiments.workspaces import project_params
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.data.filtering import filter_dataset
from sda_core.evaluation.groups import item_groups
from sda_core.fetch.manifest import manifest_file
from sda_core.params import Params, TailParams

NOT_CAUSAL, BCE = {"causal": False}, {"loss": "bce", "num_negatives": 1}


@dataclass(frozen=True)
class Training:
    """A model: the recommender, the changes in its section, and the data."""

    recommender: str
    changes: Mapping[str, Any]
    data: str = "kcore"


TRAININGS = {
    "sasrec": Training("sasrec", {}),
    "sasrec_not_causal": Training("sasrec", NOT_CAUSAL),
    "sasrec_bce": Training("sasrec", BCE),
    "sasrec_both": Training("sasrec", NOT_CAUSAL | BCE),
    "sasrec_single_pass": Training("sasrec", {}, "single_pass"),
    "sasrec_all": Training("sasrec", NOT_CAUSAL | BCE, "single_pass"),
    "pop": Training("pop", {"counts": "train"}),
    "pop_all": Training("pop", {"counts": "all"}),
    "pop_single_pass": Training("pop", {"counts": "train"}, "single_pass"),
    "pop_all_single_pass": Training("pop", {"counts": "all"}, "single_pass"),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: a trained model, and the choices of the evaluation."""

    label: str
    training: str
    protocol: str = "fullrank"
    tail: str = "train_lt_k"


ROWS = {
    "SASRec": [
        Row("fixed protocol", "sasrec"),
        Row("not causal", "sasrec_not_causal"),
        Row("BCE, one negative", "sasrec_bce"),
        Row("not causal, BCE", "sasrec_both"),
        Row("single pass", "sasrec_single_pass"),
        Row("100 sampled negatives", "sasrec", "uni100"),
        Row("tail of all splits", "sasrec", tail="paper"),
        Row("all together", "sasrec_all", "uni100", "paper"),
    ],
    "popularity": [
        Row("fixed protocol", "pop"),
        Row("counts of all splits", "pop_all"),
        Row("single pass", "pop_single_pass"),
        Row("100 sampled negatives", "pop", "uni100"),
        Row("tail of all splits", "pop", tail="paper"),
        Row("all together", "pop_all_single_pass", "uni100", "paper"),
    ],
}


def main(
    root: Root = Path(),
    name: Name = "protocol",
    trainings: Annotated[Names, typer.Option(parser=names, metavar="A,B,...", help="Trainings to run.")] = Names(TRAININGS),
    seeds: Seeds = THREE_SEEDS,
    max_epochs: MaxEpochs = None,
) -> None:
    """Filter and train what is missing, write table and plot."""
    check_names("--trainings", trainings, TRAININGS)
    params = project_params(root)
    folder = root / "experiments" / "positions" / name
    workspaces = {"kcore": Workspace(root), "single_pass": Workspace(folder / "single_pass")}
    if not workspaces["single_pass"].interactions.exists():
        filter_once(workspaces["kcore"], params, workspaces["single_pass"])
    for seed in seeds:
        for training in trainings:
            train(workspaces, params, training, seed, folder / training, max_epochs)
    interactions = {data: INTERACTIONS.read(place.interactions) for data, place in workspaces.items()}
    results = write_results(table(interactions, params, folder, seeds), "protocol", name, root)
    plot_intervals(results / "plot.png", intervals(params, folder, seeds), f"NDCG@{CUTOFF}, 95 % interval")


def filter_once(source: Workspace, params: Params, target: Workspace) -> None:
    """Filter the same raw files with ``filter.method: single_pass``."""
    section = params.filter.model_copy(update={"method": "single_pass"})
    reviews, metadata = manifest_file(source.raw, "reviews"), manifest_file(source.raw, "metadata")
    data = filter_dataset(reviews, metadata, params.dataset.edition, section)
    ITEMS.write(data.items, target.items)
    INTERACTIONS.write(data.interactions, target.interactions)


def train(
    workspaces: Mapping[str, Workspace], params: Params, name: str, seed: int, folder: Path, max_epochs: int | None
) -> None:
    """Run one of ``TRAININGS`` with one seed, unless it exists; popularity has no seed and is counted once."""
    training = TRAININGS[name]
    changes = dict(training.changes)
    if training.recommender == "pop":
        seed = 0
    elif max_epochs is not None:
        changes["max_epochs"] = max_epochs
    section = params.train_recommender.of(training.recommender).model_copy(update=changes)
    keep_positions(workspaces[training.data], params, section, seed, folder, protocols=PROTOCOLS)


def table(interactions: Mapping[str, pl.DataFrame], params: Params, folder: Path, seeds: Sequence[int]) -> str:
    """A Markdown table without rows whose training is missing.

    Args:
        interactions: interactions by dataset, ``kcore`` and ``single_pass``.
        params: params of the workspace.
        folder: folder of the positions.
        seeds: seeds; a row is the mean over the existing ones.
    """
    lines = []
    for recommender, rows in ROWS.items():
        fixed_SU: np.ndarray | None = None
        for row in rows:
            own, done = _seeds(row, folder, seeds)
            if not done:
                continue
            table_of_row = interactions[TRAININGS[row.training].data]
            frames = read_positions(folder / row.training, done, row.protocol)
            hit_SU, ndcg_SU = gains("hit", frames), gains("ndcg", frames)
            fixed_SU = ndcg_SU if fixed_SU is None else fixed_SU
            cells = [recommender, row.label + (f" ({len(done)} seeds)" if own is seeds and len(done) < len(seeds) else "")]
            cells.append(f"{ndcg_SU.shape[1]:,}, {table_of_row['item_id'].n_unique():,}")
            cells += [f"{hit_SU.mean():.4f}", f"{ndcg_SU.mean():.4f}", difference_to_fixed(ndcg_SU, fixed_SU, row, params)]
            cells += tail_cells(table_of_row, frames, params.evaluate.tail.model_copy(update={"definition": row.tail}))
            lines.append(cells)
    heads = ["recommender", "choice", "users, items", f"Hit@{CUTOFF}", f"NDCG@{CUTOFF}"]
    heads += ["NDCG, difference to the fixed [95 %]", "tail targets", f"tail NDCG@{CUTOFF}"]
    return markdown_table(heads, lines)


def intervals(params: Params, folder: Path, seeds: Sequence[int]) -> Panels:
    """The NDCG of :func:`table` for a plot: by recommender, by choice."""
    panels: Panels = {}
    for recommender, rows in ROWS.items():
        lines: dict[str, Interval] = {}
        for row in rows:
            _, done = _seeds(row, folder, seeds)
            if done:
                ndcg_SU = gains("ndcg", read_positions(folder / row.training, done, row.protocol))
                lines[row.label] = mean_and_interval(ndcg_SU, params.evaluate, row.label)
        if lines:
            panels[recommender] = lines
    return panels


def _seeds(row: Row, folder: Path, seeds: Sequence[int]) -> tuple[Sequence[int], list[int]]:
    """The seeds of a row, and those of them that are done."""
    own = seeds if TRAININGS[row.training].recommender != "pop" else [0]
    return own, [seed for seed in own if positions_path(folder / row.training, seed, row.protocol).exists()]


def difference_to_fixed(ndcg_SU: np.ndarray, fixed_SU: np.ndarray, row: Row, params: Params) -> str:
    """The cell of a row's difference to the fixed protocol, with an interval if the users are the same."""
    value = ndcg_SU.mean() - fixed_SU.mean()
    if ndcg_SU is fixed_SU or not value:
        return ""
    relative = f"{value:+.4f} ({value / fixed_SU.mean():+.0%})" if fixed_SU.mean() else f"{value:+.4f}"
    if TRAININGS[row.training].data != "kcore":
        return f"{relative}, other users"
    low, high = interval(ndcg_SU.mean(0, keepdims=True) - fixed_SU.mean(0, keepdims=True), params.evaluate, row.label)
    return f"{relative} [{low:+.4f}, {high:+.4f}]"


def tail_cells(interactions: pl.DataFrame, frames: Sequence[pl.DataFrame], definition: TailParams) -> list[str]:
    """The number of users with a tail target, and their NDCG; empty if there are none."""
    is_tail = item_groups(interactions, definition).tail[frames[0]["target_item_id"].to_numpy()]
    return [f"{is_tail.sum():,}", f"{gains('ndcg', frames, is_tail).mean():.4f}" if is_tail.any() else "none"]
