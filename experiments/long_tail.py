"""A long tail made on purpose: items whose place among the others is known lose their history.  Who still finds them?

Some items that are bought often are *made rare*: all but a few of their training interactions are dropped, the targets of
validation and test stay.  Recommenders are trained on what is left, on each variant's vectors; two groups of test users are
looked at apart, those whose target was made rare, and all others.

Does a gain follow the structure?  For each item that was made rare the *purity* of its neighbourhood is the share of its ten
nearest items in the base vectors (mean of the cosines within pictures and within texts, as CMSA's teacher sees them) that are of
its own kind: equal in at least half of the shop's true attributes on the built-in shop, of its own leaf category elsewhere.  The
gain of a variant over ``zero_shot`` is shown for the purer and the less pure half of the users, with Spearman's correlation of
purity and gain.

Takes a finished workspace (``{seed}`` in ``--root`` stands for the seed).  Positions are kept below
``experiments/long_tail/<name>``, and the table is left in ``experiments/results/long_tail-<name>``,
which ``sda report --experiments`` shows.

    python experiments/long_tail.py --name demo --root 'experiments/runs/effect/seed-{seed}' --variants zero_shot lora infonce sda
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from _runs import CUTOFF, Reach, difference, dots, gains, leave, reach, read_positions, shop_attributes, unit
from compare_vectors import train_on, workspace_of
from scipy.stats import spearmanr

from sda_core import log
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.embeddings.controls import read_table
from sda_core.params import DemoDataset, Params
from sda_core.seed import generator

BASE = "zero_shot"
NUM_NEIGHBORS = 10


def main() -> None:
    """Read the options, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".", help="the project folder of the run; {seed} in it stands for the seed")
    parser.add_argument("--name", required=True, help="folder of the results below experiments/long_tail")
    parser.add_argument("--variants", nargs="+", default=["id", BASE, "lora", "sda"])
    parser.add_argument("--recommender", default="sasrec")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--share", type=float, default=0.3, help="of the items that are bought often enough, made rare")
    parser.add_argument("--kept", type=int, default=1, help="training interactions that are left to an item")
    parser.add_argument("--min-count", type=int, default=6, help="training interactions from which an item is bought often")
    parser.add_argument("--fused-dim", type=int, help="fuse the picture and text vectors anew, to this many components")
    options = parser.parse_args()
    log.configure()
    folder = Path("experiments") / "long_tail" / options.name
    workspace, params = workspace_of(options.root, options.seeds[0])
    rare, shop = make_rare(workspace, folder, options.share, options.kept, options.min_count)
    for seed in options.seeds:
        of_seed, _ = workspace_of(options.root, seed)
        link(of_seed, shop, options.variants)
        for variant in options.variants:
            positions = folder / options.recommender / variant
            train_on(shop, params, variant, options.recommender, seed, positions, {}, options.fused_dim)
    positions = folder / options.recommender
    groups, purity_U = groups_of(workspace, params, rare, read_positions(positions / BASE, options.seeds)[0])
    ndcg = {name: gains("ndcg", read_positions(positions / name, options.seeds)) for name in options.variants}
    title = f"{options.recommender}, {len(rare)} items made rare, {len(options.seeds)} seeds"
    place = leave(table(title, params, groups, purity_U, ndcg), "long_tail", options.name)
    dots(place / "plot.png", reaches(params, groups, ndcg), f"NDCG@{CUTOFF} - {BASE}", zero=True, columns=2)


def make_rare(workspace: Workspace, folder: Path, share: float, kept: int, min_count: int) -> tuple[np.ndarray, Workspace]:
    """Ids of the items, and a workspace whose interactions are without what they lose."""
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


def link(source: Workspace, shop: Workspace, variants: Sequence[str]) -> None:
    """Let the shop's vectors be those of a seed."""
    for variant in {BASE, *variants}:
        place = shop.embeddings(variant)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(source.embeddings(variant).resolve())


def purity(workspace: Workspace, params: Params) -> np.ndarray:
    """``(I + 1,)``: share of an item's nearest neighbours that are of its own kind; see the module's docstring."""
    vectors = read_table(workspace.embeddings(BASE))
    image_ID, text_ID = unit(vectors.image_ID), unit(vectors.text_ID)
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
    """A markdown table: a row for each variant; gains over zero_shot with paired intervals over users.

    Args:
        title: what was run.
        params: of the workspace.
        groups, purity_U: see :func:`groups_of`.
        ndcg: of each seed and user ``(S, U)``, by variant.
    """
    is_rare = groups["made rare"]
    heads = [f"{name} ({mask.sum()})" for name, mask in groups.items()]
    lines = [
        f"### {title}: NDCG@{CUTOFF}, and the gain over {BASE} [95 %]",
        "",
        f"| variant | {' | '.join(heads)} | Spearman of purity and gain (made rare) |",
        "|---" * (2 + len(heads)) + "|",
    ]
    base_SU = ndcg[BASE]
    for name, ndcg_SU in ndcg.items():
        cells = []
        for mask in groups.values():
            cell = f"{ndcg_SU[:, mask].mean():.4f}" if mask.any() else ""
            if name != BASE and mask.any():
                gain_SU = (ndcg_SU - base_SU)[:, mask]
                cell += f" ({difference(gain_SU, params.evaluate, name)})"
            cells.append(cell)
        gain_U = (ndcg_SU - base_SU).mean(0)[is_rare]
        correlation = f"{spearmanr(purity_U[is_rare], gain_U)[0]:+.3f}" if np.ptp(gain_U) and np.ptp(purity_U[is_rare]) else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {correlation} |")
    return "\n".join(lines)


def reaches(params: Params, groups: Mapping[str, np.ndarray], ndcg: Mapping[str, np.ndarray]) -> dict[str, dict[str, Reach]]:
    """The gains of :func:`table` for a plot: by group of users, by variant."""
    return {
        f"{group} ({mask.sum()})": {
            name: reach((ndcg_SU - ndcg[BASE])[:, mask], params.evaluate, name) for name, ndcg_SU in ndcg.items() if name != BASE
        }
        for group, mask in groups.items()
        if mask.any()
    }


def groups_of(
    workspace: Workspace, params: Params, rare: np.ndarray, positions: pl.DataFrame
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Test users as masks by group, and the purity of each one's target."""
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


if __name__ == "__main__":
    main()
