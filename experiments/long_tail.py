"""Compare variants on long-tail items: some popular items lose most of their interactions.

Some popular items are made rare: most of their training interactions are dropped, while the validation and test targets are
kept.  Recommenders are trained on the rest with each variant's vectors.  Two groups of test users are evaluated separately:
those whose target was made rare, and all others.

Does a gain depend on the structure?  For each item that was made rare, the purity of its neighbourhood is the share of its ten
nearest items in the base vectors (mean of the cosines within images and within texts, as in CMSA's teacher) that are of the same
kind: equal in at least half of the true attributes on the built-in shop, the same leaf category elsewhere.  The gain of a variant
over zero_shot is shown for the halves of users with higher and lower purity, with Spearman's correlation of purity and gain.

The input is a finished workspace ({seed} in --root is replaced by the seed).  Positions are kept in experiments/long_tail/NAME,
and the table is written to experiments/results/long_tail-NAME, which `sda report --experiments` shows.

    python -m experiments long_tail --name demo --root 'experiments/runs/effect/seed-{seed}' \\
        --variants zero_shot,lora,infonce,sda
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from scipy.stats import spearmanr

from experiments.options import THREE_SEEDS, FusedDim, Name, Recommender, SeedRoot, Seeds, Variants
from experiments.study import (
    CUTOFF,
    Panels,
    difference,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    read_gains,
    read_positions,
    shop_attributes,
    write_results,
)
from experiments.workspaces import BASE, train_on, workspace_of
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names
from sda_core.embeddings.controls import read_table
from sda_core.params import DemoDataset, Params
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

NUM_NEIGHBORS = 10


def main(
    name: Name,
    root: SeedRoot = ".",
    variants: Variants = Names(("id", BASE, "lora", "sda")),
    recommender: Recommender = "sasrec",
    seeds: Seeds = THREE_SEEDS,
    share: Annotated[float, typer.Option(help="Share of the popular items that is made rare.")] = 0.3,
    kept: Annotated[int, typer.Option(help="Training interactions that a rare item keeps.")] = 1,
    min_count: Annotated[int, typer.Option(help="Fewest training interactions of a popular item.")] = 6,
    fused_dim: FusedDim = None,
) -> None:
    """Train what is missing, write table and plot."""
    folder = Path("experiments") / "long_tail" / name
    workspace, params = workspace_of(root, seeds[0])
    rare, shop = make_rare(workspace, folder, share, kept, min_count)
    positions = folder / recommender
    for seed in seeds:
        of_seed, _ = workspace_of(root, seed)
        link_vectors(of_seed, shop, variants)
        for variant in variants:
            train_on(shop, params, variant, recommender, seed, positions / variant, fused_dim=fused_dim)
    groups, purity_U = groups_of(workspace, params, rare, read_positions(positions / BASE, seeds)[0])
    ndcg = {variant: read_gains("ndcg", positions / variant, seeds) for variant in variants}
    title = f"{recommender}, {len(rare)} items made rare, {len(seeds)} seeds"
    results = write_results(table(title, params, groups, purity_U, ndcg), "long_tail", name)
    plot_intervals(results / "plot.png", intervals(params, groups, ndcg), f"NDCG@{CUTOFF} - {BASE}", zero=True, columns=2)


def make_rare(workspace: Workspace, folder: Path, share: float, kept: int, min_count: int) -> tuple[np.ndarray, Workspace]:
    """Ids of the items, and a workspace without the dropped interactions."""
    interactions = INTERACTIONS.read(workspace.interactions).with_row_index("row")
    train = interactions.filter(pl.col("split") == "train")
    counts = train["item_id"].value_counts().filter(pl.col("count") >= min_count).sort("item_id")
    random = generator(0, "made rare")
    rare = np.sort(random.permutation(counts["item_id"].to_numpy())[: round(share * len(counts))])
    dropped: list[int] = []
    for item in rare:
        rows = train.filter(pl.col("item_id") == int(item))["row"].to_numpy()
        dropped += random.permutation(rows)[kept:].tolist()
    shop = Workspace(folder / "shop")
    INTERACTIONS.write(interactions.filter(~pl.col("row").is_in(dropped)).drop("row"), shop.interactions)
    shutil.copy(workspace.items, shop.items)
    return rare, shop


def link_vectors(source: Workspace, shop: Workspace, variants: Sequence[str]) -> None:
    """Link the vectors of a seed to the workspace."""
    for variant in {BASE, *variants}:
        place = shop.embeddings(variant)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(source.embeddings(variant).resolve())


def purity(workspace: Workspace, params: Params) -> np.ndarray:
    """``(I + 1,)``: share of an item's nearest neighbours of the same kind; see the module's docstring."""
    vectors = read_table(workspace.embeddings(BASE))
    image_ID, text_ID = unit_rows(vectors.image_ID), unit_rows(vectors.text_ID)
    similarity_II = image_ID @ image_ID.T + text_ID @ text_ID.T
    np.fill_diagonal(similarity_II, -np.inf)
    nearest_IN = np.argpartition(-similarity_II, NUM_NEIGHBORS, axis=1)[:, :NUM_NEIGHBORS]
    items = ITEMS.read(workspace.items).sort("item_id")
    if isinstance(params.dataset, DemoDataset):
        values_IA = np.stack(list(shop_attributes(workspace, params.dataset).values()), axis=1)
        alike_IN = (values_IA[nearest_IN] == values_IA[:, None]).mean(axis=2) >= 0.5
    else:
        leaves = np.array([path[-1] if path else "" for path in items["categories"].to_list()])
        alike_IN = leaves[nearest_IN] == leaves[:, None]
    return np.concatenate([[0.0], alike_IN.mean(axis=1)])


def table(
    title: str, params: Params, groups: Mapping[str, np.ndarray], purity_U: np.ndarray, ndcg: Mapping[str, np.ndarray]
) -> str:
    """A Markdown table with one row per variant; gains over zero_shot with paired intervals over users and seeds.

    Args:
        title: title of the table.
        params: params of the workspace.
        groups: see :func:`groups_of`.
        purity_U: see :func:`groups_of`.
        ndcg: NDCG by seed and user ``(S, U)``, by variant.
    """
    is_rare = groups["made rare"]
    base_SU = ndcg[BASE]
    rows = []
    for name, ndcg_SU in ndcg.items():
        cells = [name]
        for mask in groups.values():
            cell = f"{ndcg_SU[:, mask].mean():.4f}" if mask.any() else ""
            if name != BASE and mask.any():
                cell += f" ({difference((ndcg_SU - base_SU)[:, mask], params.evaluate, name)})"
            cells.append(cell)
        gain_U = (ndcg_SU - base_SU).mean(0)[is_rare]
        has_order = bool(np.ptp(gain_U) and np.ptp(purity_U[is_rare]))
        rows.append([*cells, f"{spearmanr(purity_U[is_rare], gain_U)[0]:+.3f}" if has_order else ""])
    heads = ["variant", *(f"{name} ({mask.sum()})" for name, mask in groups.items())]
    heads.append("Spearman of purity and gain (made rare)")
    return markdown_table(heads, rows, f"{title}: NDCG@{CUTOFF}, and the gain over {BASE} [95 %]")


def intervals(params: Params, groups: Mapping[str, np.ndarray], ndcg: Mapping[str, np.ndarray]) -> Panels:
    """The gains of :func:`table` for a plot: by group of users, by variant."""
    return {
        f"{group} ({mask.sum()})": {
            name: mean_and_interval((ndcg_SU - ndcg[BASE])[:, mask], params.evaluate, name)
            for name, ndcg_SU in ndcg.items()
            if name != BASE
        }
        for group, mask in groups.items()
        if mask.any()
    }


def groups_of(
    workspace: Workspace, params: Params, rare: np.ndarray, positions: pl.DataFrame
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Test users as masks by group, and the purity of each user's target."""
    targets = positions["target_item_id"].to_numpy()
    is_rare = np.isin(targets, rare)
    purity_U = purity(workspace, params)[targets]
    pure = purity_U > np.median(purity_U[is_rare])
    groups = {
        "made rare": is_rare,
        "others": ~is_rare,
        "made rare, purer half": is_rare & pure,
        "made rare, other half": is_rare & ~pure,
    }
    return groups, purity_U
