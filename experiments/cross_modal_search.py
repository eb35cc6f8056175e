"""Does adaptation help to find an image by a text, and a text by an image?

This is what an adapter is trained for, and what `sda search` does.  Some items are held out, the same ones for every seed.
Adapters are trained on the other items alone.  Then each held-out item's text looks for its own image among the images of all
held-out items, and the other way round: R@1, R@10 and MRR (mean of 1 / place), of the backbone alone (zero_shot) and of each
variant, with paired intervals over items and seeds.  Ties count against an item.

Two geometries: cosines of the embeddings as they are, which `sda search` takes, and of embeddings without the mean of their
modality, which the fusion by PCA takes.

`mismatched` is the negative control: the adapter of `sda` is trained on images with the texts of other items.  What it gains has
nothing to do with what belongs together.  An answer by chance has R@1 of 1 / N.

Takes a workspace with data/filtered and data/images and its params.yaml.  Positions are kept below
experiments/cross_modal_search/NAME, so a stopped run resumes, and the table is written to
experiments/results/cross_modal_search-NAME, which `sda report --experiments` shows.

    python -m experiments cross_modal_search --name demo --num-steps 100 --set train_adapter.training.learning_rate=0.001
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from torch import nn

from experiments.loss_geometry import mismatched
from experiments.options import THREE_SEEDS, Changes, Name, NumSteps, Root, Seeds, Variants
from experiments.study import check_names, difference, kept_table, logger, markdown_table, write_results
from experiments.workspaces import BASE, VARIANTS, own_params, untrained
from sda_core import alignment, backbones
from sda_core.adapters import modality
from sda_core.artifacts import Workspace, read_json, write_json
from sda_core.cli.scripts import Names
from sda_core.embeddings.blocks import BlockEncoder
from sda_core.errors import ConfigError, TrainingError
from sda_core.evaluation.metrics import hits, reciprocals
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.modalities import MODALITIES
from sda_core.params import Params
from sda_core.runtime import prepare_torch
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

CONTROL = "mismatched"
DIRECTIONS = ("text to image", "image to text")
GEOMETRIES = ("as they are", "without the mean")
METRICS = {"R@1": lambda places: hits(places, 1), "R@10": lambda places: hits(places, 10), "MRR": reciprocals}


def main(
    name: Name,
    root: Root = Path(),
    variants: Variants = Names(("lora", "sda", CONTROL)),
    seeds: Seeds = THREE_SEEDS,
    num_steps: NumSteps = None,
    share: Annotated[float, typer.Option(help="Share of the items with an image that is held out.")] = 0.25,
    changes: Changes = None,
) -> None:
    """Train and measure what is missing, write the table."""
    check_names("--variants", variants, [*VARIANTS, CONTROL])
    folder = root / "experiments" / "cross_modal_search" / name
    steps = [] if num_steps is None else [f"train_adapter.training.num_steps={num_steps}"]
    params = own_params(root / "params.yaml", folder, [*(changes or []), *steps])
    keep_share(folder / "settings.json", share)
    workspace = Workspace(root)
    placed: dict[str, list[pl.DataFrame]] = {}
    for seed in seeds:
        for variant in (BASE, *variants):
            path = folder / BASE / "0.parquet" if variant == BASE else folder / variant / f"{seed}.parquet"
            made = kept_table(path, lambda variant=variant, seed=seed: place(workspace, params, variant, seed, share))
            placed.setdefault(variant, []).append(made)
    write_results(table(placed, params), "cross_modal_search", name, root)


def keep_share(path: Path, share: float) -> None:
    """Write which share of the items is held out.

    Raises:
        ConfigError: tables of the same name were made with another share.
    """
    if path.exists() and read_json(path, "settings of an experiment").get("share") != share:
        raise ConfigError(
            "--name", f"the tables in {path.parent} were made with another --share", "use another name, or delete the folder"
        )
    write_json(path, {"share": share})


# ------------------------------------------------------------------------------------------------- measuring
def place(workspace: Workspace, params: Params, variant: str, seed: int, share: float) -> pl.DataFrame:
    """Train a variant on the items that are not held out, and give the places of the held-out ones.

    Args:
        workspace: with items and images.
        params: its params.
        variant: of :data:`experiments.workspaces.VARIANTS`, ``zero_shot`` (nothing is trained), or ``mismatched``.
        seed: of the adapter and its training.
        share: of the items with an image, which are held out.

    Returns:
        A row for each direction, geometry and held-out item: its place among all held-out items, from 1.
    """
    device = prepare_torch(params.runtime)
    source = item_source(workspace, params.items)
    held_out = draw(source, share, params.train_adapter.training.batch_size)
    backbone = backbones.build(params.backbone, device)
    model: nn.Module = backbone.model
    if variant != BASE:
        section = params.train_adapter
        chosen = VARIANTS["sda" if variant == CONTROL else variant]
        adapter = section.lora if chosen["adapter"] == "lora" else section.moda
        loss = section.infonce if chosen["loss"] == "infonce" else section.loss
        training = section.training.model_copy(update={"seed": seed})
        model = untrained(backbone, adapter, MODALITIES, seed).to(device)
        shown = mismatched(source, seed) if variant == CONTROL else source
        shown.shows_image[~source.has_image] = False
        shown.shows_image[held_out] = False  # so training skips them
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            curve = alignment.train_adapter(backbone, model, shown, training, loss, checkpoint, f"{variant} {seed}", device)
        logger.info("%s, seed %d: %d steps, last loss %.4f", variant, seed, training.num_steps, curve[-1].loss)
    source = item_source(workspace, params.items)  # with all images again
    blocks = BlockEncoder(backbone, model, params.export_embeddings, device)
    blocks.prepare()
    vectors = {}
    for each in MODALITIES:
        with nullcontext() if variant == BASE else modality(model, each):
            vectors[each] = blocks.encode(source, each, held_out).vectors_BD.numpy()
    return places(vectors, source.item_ids[held_out])


def draw(source: ItemSource, share: float, batch_size: int) -> np.ndarray:
    """Rows of the held-out items, ascending; all of them have an image.

    Raises:
        TrainingError: fewer items than a batch are left for training, or none is held out.
    """
    rows = np.flatnonzero(source.has_image)
    wanted = round(share * len(rows))
    if wanted < 1 or len(rows) - wanted < batch_size:
        raise TrainingError(
            "--share",
            f"of {len(rows)} items with an image {wanted} would be held out and {len(rows) - wanted} left",
            f"leave at least {batch_size}, one batch, and hold out at least one",
        )
    return np.sort(generator(0, "held out for search").permutation(rows)[:wanted])


def places(vectors: Mapping[str, np.ndarray], item_ids: np.ndarray) -> pl.DataFrame:
    """Where each item's own other side is found, by direction and geometry; ties count against it.

    Args:
        vectors: ``(N, D)`` of ``image`` and of ``text``, row ``i`` of both is one item.
        item_ids: ``(N,)``.
    """
    parts = []
    for geometry in GEOMETRIES:
        image_ND, text_ND = (
            unit_rows(vectors[name] - (vectors[name].mean(axis=0) if geometry == GEOMETRIES[1] else 0.0))
            for name in ("image", "text")
        )
        similarity_NN = text_ND @ image_ND.T
        for direction, of_queries in zip(DIRECTIONS, (similarity_NN, similarity_NN.T), strict=True):
            position_N = (of_queries >= of_queries.diagonal()[:, None]).sum(axis=1)
            parts.append(
                pl.DataFrame({"item_id": item_ids, "position": position_N}).with_columns(
                    direction=pl.lit(direction), geometry=pl.lit(geometry)
                )
            )
    return pl.concat(parts)


# ---------------------------------------------------------------------------------------------------- showing
def of_seeds(frames: Sequence[pl.DataFrame], direction: str, geometry: str, metric: str) -> np.ndarray:
    """A metric of each seed and held-out item, ``(S, N)``."""
    return np.array(
        [
            METRICS[metric](frame.filter(direction=direction, geometry=geometry).sort("item_id")["position"].to_numpy())
            for frame in frames
        ]
    )


def table(placed: Mapping[str, Sequence[pl.DataFrame]], params: Params) -> str:
    """A markdown table for each geometry: a row for each direction and variant.

    Args:
        placed: tables of :func:`place` by variant, one for each seed, those of zero_shot among them.
        params: with the settings of the intervals.
    """
    tables = []
    num_seeds = len(placed[BASE])
    num_items = placed[BASE][0]["item_id"].n_unique()
    for geometry in GEOMETRIES:
        rows = []
        for direction in DIRECTIONS:
            for variant, frames in placed.items():
                found = {metric: of_seeds(frames, direction, geometry, metric) for metric in METRICS}
                base = {metric: of_seeds(placed[BASE], direction, geometry, metric) for metric in METRICS}
                cells = [f"{value_SN.mean():.3f}" for value_SN in found.values()]
                cells += [
                    "" if variant == BASE else difference(found[metric] - base[metric], params.evaluate, f"search {metric}")
                    for metric in ("R@10", "MRR")
                ]
                rows.append([direction, variant, *cells])
        title = f"{num_items} held-out items, {num_seeds} seeds, cosines of embeddings {geometry}"
        heads = ["search", "vectors", *METRICS, f"R@10 - {BASE}", f"MRR - {BASE}"]
        tables.append(markdown_table(heads, rows, title))
    return "\n".join(tables)
