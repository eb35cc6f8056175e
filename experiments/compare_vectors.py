"""Compare item vectors in several recommenders over several seeds.

The input is a finished workspace (data/filtered and embeddings/) with its params.yaml.  Every recommender is trained on every
variant's vectors with every seed, and ranks the test targets.  Positions are kept in the workspace's
experiments/positions/NAME, so that an interrupted run resumes, and the table is computed from them.  It is written to
experiments/results/compare_vectors-NAME, which `sda report --experiments` shows.  With
--root 'experiments/runs/effect/seed-{seed}' every seed has a separate workspace with its own adapters (made by train_seeds) and
positions.

In addition to the variants of the pipeline there are controls computed from embeddings/zero_shot.parquet: random, shuffled,
image_only and text_only (sda_core.embeddings.controls).

The interval of the difference between two variants is over users and seeds, paired by both; the range of the difference over
the single seeds is also shown.

    python -m experiments compare_vectors --name signal --variants zero_shot,random,shuffled \\
        --baselines random,shuffled --recommenders sasrec,vbpr --seeds 1,2,3

With --representation id+content the sequential recommenders add the vectors to the learned ids (see text_matters).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import typer

from experiments.options import THREE_SEEDS, Baselines, FusedDim, MaxEpochs, Name, Recommenders, SeedRoot, Seeds, Variants
from experiments.study import (
    CUTOFF,
    Panels,
    difference,
    gains,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    range_over_seeds,
    read_positions,
    write_results,
)
from experiments.workspaces import train_on, workspace_of
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.evaluation.groups import item_groups
from sda_core.params import Params

Representation = Annotated[
    Literal["id+content", "content"] | None,
    typer.Option(
        "--representation", help="Replaces train_recommender.*.representation of sequential recommenders.", show_default=False
    ),
]


def main(
    name: Name,
    variants: Variants,
    baselines: Baselines,
    recommenders: Recommenders,
    root: SeedRoot = ".",
    seeds: Seeds = THREE_SEEDS,
    max_epochs: MaxEpochs = None,
    fused_dim: FusedDim = None,
    representation: Representation = None,
) -> None:
    """Train what is missing, write table and plot."""
    common = Path(root).parent if "{seed}" in Path(root).name else Path(root)
    folder = common / "experiments" / "positions" / name
    given = {"max_epochs": max_epochs, "representation": representation}
    changes = {key: value for key, value in given.items() if value is not None}
    for seed in seeds:
        workspace, params = workspace_of(root, seed)
        for recommender in recommenders:
            for variant in dict.fromkeys([*variants, *baselines]):
                train_on(workspace, params, variant, recommender, seed, folder / recommender / variant, changes, fused_dim)
    workspace, params = workspace_of(root, seeds[0])
    tables, panels = [], {}
    for recommender in recommenders:
        shown = workspace, params, folder / recommender, variants, baselines, seeds
        tables.append(table(*shown))
        panels |= intervals(*shown)
    results = write_results("\n".join(tables), "compare_vectors", name, root)
    plot_intervals(results / "plot.png", panels, f"difference in NDCG@{CUTOFF}", zero=True)


def table(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> str:
    """A Markdown table of one recommender: all users, and those whose target is a tail or a cold item, if there are any."""
    names, read, groups = _read(workspace, params, folder, variants, baselines, seeds)
    rows = []
    for group, mask in groups.items():
        ndcg = {name: gains("ndcg", frames, mask) for name, frames in read.items()}
        for name in names:
            hit_SU = gains("hit", read[name], mask)
            first = [f"{group} ({mask.sum()})", name, f"{hit_SU.mean():.4f}", f"{ndcg[name].mean():.4f}"]
            rivals = [rival for rival in baselines if rival != name] if name in variants else []
            if not rivals:
                rows.append([*first, "", "", ""])
            for rival in rivals:
                difference_SU = ndcg[name] - ndcg[rival]
                rows.append([*first, rival, difference(difference_SU, params.evaluate, rival), range_over_seeds(difference_SU)])
    heads = ["group (users)", "variant", f"Hit@{CUTOFF}", f"NDCG@{CUTOFF}", "against", f"NDCG@{CUTOFF} difference [95 %]"]
    return markdown_table([*heads, "over seeds"], rows, f"{folder.name}, full rank, {len(seeds)} seeds")


def intervals(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> Panels:
    """The differences of :func:`table` for a plot: by group of users, by pair of variants; without groups of equal results."""
    _, read, groups = _read(workspace, params, folder, variants, baselines, seeds)
    panels: Panels = {}
    for group, mask in groups.items():
        ndcg = {name: gains("ndcg", frames, mask) for name, frames in read.items()}
        differences = {(name, rival): ndcg[name] - ndcg[rival] for name in variants for rival in baselines if rival != name}
        if any(gain_SU.any() for gain_SU in differences.values()):
            panels[f"{folder.name}, {group} ({mask.sum()})"] = {
                f"{name} - {rival}": mean_and_interval(gain_SU, params.evaluate, rival)
                for (name, rival), gain_SU in differences.items()
            }
    return panels


def _read(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], dict[str, list[pl.DataFrame]], dict[str, np.ndarray]]:
    """Read names, their positions by seed, and the existing groups of users as masks."""
    interactions = INTERACTIONS.read(workspace.interactions)
    items = item_groups(interactions, params.evaluate.tail, ITEMS.count(workspace.items))
    names = list(dict.fromkeys([*variants, *baselines]))
    read = {name: read_positions(folder / name, seeds) for name in names}
    targets = read[names[0]][0]["target_item_id"].to_numpy()
    groups = {"all": np.ones(len(targets), dtype=bool), "tail": items.tail[targets], "cold": items.cold[targets]}
    return names, read, {group: mask for group, mask in groups.items() if mask.any()}
