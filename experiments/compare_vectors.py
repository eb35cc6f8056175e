"""Do these item vectors help?  Variants against one another in several recommenders, over several seeds, with intervals.

Takes a finished workspace (``data/filtered`` and ``embeddings/``) and its ``params.yaml``; trains every recommender on every
variant's vectors with every seed, and places the test targets.  Positions are kept as parquet below the workspace's
``experiments/positions/<name>``, so that a run that was stopped goes on, and the table is made from them alone;
it is left in ``experiments/results/compare_vectors-<name>``, which ``sda report --experiments`` shows.
With ``--root 'experiments/runs/effect/seed-{seed}'`` every seed has a workspace of its own, hence adapters of its own
(``experiments/train_seeds.py`` makes them), and positions are kept beside these.

Besides the variants of the pipeline there are controls, made of ``embeddings/zero_shot.parquet``: ``random``, ``shuffled``,
``image_only`` and ``text_only`` (``sda_core.embeddings.controls``).

For each user the gain is averaged over the seeds first; the interval is a paired bootstrap over users of the difference between
two variants, and beside it stands the range of the difference over the single seeds.

    python experiments/compare_vectors.py --name signal --variants zero_shot random shuffled --baselines random shuffled \\
        --recommenders sasrec vbpr --seeds 1 2 3

With ``--representation id+content`` the sequential recommenders add the vectors to the ids they learn (text_matters.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
from _runs import (
    CUTOFF,
    Reach,
    difference,
    dots,
    gains,
    keep_positions,
    leave,
    over_seeds,
    positions_path,
    reach,
    read_positions,
)

from sda_core import log
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.embeddings import controls
from sda_core.embeddings.fusion import fuse
from sda_core.evaluation.groups import item_groups
from sda_core.item_vectors import read_vectors
from sda_core.params import Control, Params, SequentialParams, load_params


def main() -> None:
    """Read the options, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".", help="the project folder of the run; {seed} in it stands for the seed")
    parser.add_argument("--name", required=True, help="folder of the results below experiments/positions")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--baselines", nargs="+", required=True)
    parser.add_argument("--recommenders", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-epochs", type=int, help="instead of each recommender's own max_epochs")
    parser.add_argument("--fused-dim", type=int, help="fuse the picture and text vectors anew, to this many components")
    parser.add_argument("--representation", choices=["id+content", "content"], help="instead of the recommender's own")
    options = parser.parse_args()
    log.configure()
    common = Path(options.root)
    common = common.parent if "{seed}" in common.name else common
    folder = common / "experiments" / "positions" / options.name
    changes = {"max_epochs": options.max_epochs, "representation": options.representation}
    changes = {name: value for name, value in changes.items() if value is not None}
    for seed in options.seeds:
        workspace, params = workspace_of(options.root, seed)
        for recommender in options.recommenders:
            for variant in dict.fromkeys([*options.variants, *options.baselines]):
                target = folder / recommender / variant
                train_on(workspace, params, variant, recommender, seed, target, changes, options.fused_dim)
    workspace, params = workspace_of(options.root, options.seeds[0])
    shown = options.variants, options.baselines, options.seeds
    tables = [table(workspace, params, folder / recommender, *shown) for recommender in options.recommenders]
    place = leave("\n".join(tables), "compare_vectors", options.name, options.root)
    panels: dict[str, dict[str, Reach]] = {}
    for recommender in options.recommenders:
        panels |= reaches(workspace, params, folder / recommender, *shown)
    dots(place / "plot.png", panels, f"difference in NDCG@{CUTOFF}", zero=True)


def workspace_of(root: str, seed: int) -> tuple[Workspace, Params]:
    """The workspace that a seed's vectors come from, and its params."""
    folder = Path(root.replace("{seed}", str(seed)))
    return Workspace(folder), load_params(folder / "params.yaml")


def vectors_of(workspace: Workspace, params: Params, variant: str, fused_dim: int | None = None) -> np.ndarray | None:
    """Item vectors of a variant or a control, row number = item id, row 0 zero.

    Args:
        workspace: with ``embeddings/``.
        params: its params.
        variant: or a control, which is made of zero_shot.
        fused_dim: components of vectors that are fused anew; None takes them as they are.
    """
    kind = next((name for name in get_args(Control) if name == variant), None)
    source = workspace.embeddings(variant if kind is None else "zero_shot")
    if variant == "id" or (kind is None and fused_dim is None):
        return read_vectors(source)
    vectors = fused_again(workspace, params, controls.read_table(source), fused_dim)
    if kind is not None:
        seen = _seen_items(workspace)
        vectors = controls.control(kind, vectors, seen, params.export_embeddings, params.control_embeddings.seed)
    return np.concatenate([np.zeros((1, vectors.fused_IF.shape[1]), dtype=np.float32), vectors.fused_IF])


def fused_again(workspace: Workspace, params: Params, vectors: controls.Vectors, fused_dim: int | None) -> controls.Vectors:
    """The vectors with others in place of the fused ones, of ``fused_dim`` components; with None as they are."""
    if fused_dim is None:
        return vectors
    section = params.export_embeddings.model_copy(update={"fusion": "late_concat_pca", "fused_dim": fused_dim})
    fused = fuse(vectors.image_ID, vectors.text_ID, vectors.has_image, _seen_items(workspace), section)
    return replace(vectors, fused_IF=fused)


def _seen_items(workspace: Workspace) -> np.ndarray:
    """Item ids of the training interactions."""
    return INTERACTIONS.read(workspace.interactions).filter(pl.col("split") == "train")["item_id"].to_numpy()


def train_on(
    workspace: Workspace,
    params: Params,
    variant: str,
    recommender: str,
    seed: int,
    folder: Path,
    changes: dict[str, Any],
    fused_dim: int | None = None,
) -> None:
    """Train a recommender on a variant's vectors, unless its positions are there.

    Args:
        workspace, params: where the vectors and the interactions are.
        variant: or a control.
        recommender: its section of the params is used.
        seed: of the training.
        folder: where the positions are kept.
        changes: of the section; ``representation`` says nothing to a recommender that has none.
        fused_dim: see :func:`vectors_of`.
    """
    if positions_path(folder, seed).exists():
        return
    section = params.train_recommender.of(recommender)
    if not isinstance(section, SequentialParams):
        changes = {name: value for name, value in changes.items() if name != "representation"}
    section = section.model_copy(update=changes)
    keep_positions(workspace, params, section, seed, folder, vectors=vectors_of(workspace, params, variant, fused_dim))


def table(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> str:
    """A markdown table of one recommender: all users, and those whose target is a tail or a cold item, where there are any."""
    names, read, groups = _read(workspace, params, folder, variants, baselines, seeds)
    lines = [
        f"### {folder.name}, full rank, {len(seeds)} seeds",
        "",
        f"| group (users) | variant | Hit@{CUTOFF} | NDCG@{CUTOFF} | against | NDCG@{CUTOFF} difference [95 %] | over seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, mask in groups.items():
        ndcg = {name: gains("ndcg", frames, mask) for name, frames in read.items()}
        for name in names:
            hit_SU = gains("hit", read[name], mask)
            first = f"| {group} ({mask.sum()}) | {name} | {hit_SU.mean():.4f} | {ndcg[name].mean():.4f} |"
            rivals = [rival for rival in baselines if rival != name] if name in variants else []
            if not rivals:
                lines.append(f"{first} | | |")
            for rival in rivals:
                difference_SU = ndcg[name] - ndcg[rival]
                told = difference(difference_SU, params.evaluate, rival)
                lines.append(f"{first} {rival} | {told} | {over_seeds(difference_SU)} |")
    return "\n".join([*lines, ""])


def reaches(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, Reach]]:
    """The differences of :func:`table` for a plot: by group of users, by pair of variants; no group in which nothing differs."""
    _, read, groups = _read(workspace, params, folder, variants, baselines, seeds)
    panels: dict[str, dict[str, Reach]] = {}
    for group, mask in groups.items():
        ndcg = {name: gains("ndcg", frames, mask) for name, frames in read.items()}
        differences = {(name, rival): ndcg[name] - ndcg[rival] for name in variants for rival in baselines if rival != name}
        if any(gain_SU.any() for gain_SU in differences.values()):
            panels[f"{folder.name}, {group} ({mask.sum()})"] = {
                f"{name} - {rival}": reach(gain_SU, params.evaluate, rival) for (name, rival), gain_SU in differences.items()
            }
    return panels


def _read(
    workspace: Workspace, params: Params, folder: Path, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], dict[str, list[pl.DataFrame]], dict[str, np.ndarray]]:
    """Names, their positions by seed, and the groups of users that there are, as masks."""
    interactions = INTERACTIONS.read(workspace.interactions)
    items = item_groups(interactions, params.evaluate.tail, ITEMS.count(workspace.items))
    names = list(dict.fromkeys([*variants, *baselines]))
    read = {name: read_positions(folder / name, seeds) for name in names}
    targets = read[names[0]][0]["target_item_id"].to_numpy()
    groups = {"all": np.ones(len(targets), dtype=bool), "tail": items.tail[targets], "cold": items.cold[targets]}
    return names, read, {group: mask for group, mask in groups.items() if mask.any()}


if __name__ == "__main__":
    main()
