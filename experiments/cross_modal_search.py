"""Measure search across modalities on held-out items: find an image by its text, and a text by its image.

Adapters are trained for this task, and `sda search` uses them for it.  A share of the items is held out, the same items for each
seed, and adapters are trained only on the others.  Then the text of each held-out item is the query for its image among the
images of all ``N`` held-out items, and the reverse.  The metrics are R@1, R@10 and MRR (the mean of 1 / position), for zero_shot
and each variant, with paired intervals over items and seeds.  Ties count against an item.  Random answers have an R@1 of 1 / N.

The similarities are cosines in two geometries: of the embeddings, and of the embeddings minus the mean of their modality, as in
`sda search` and the fusion by PCA.

`mismatched` is the negative control: the adapter of `sda`, trained on images with the texts of other items.  A gain of this
adapter does not come from true pairs of image and text.

The experiment needs a workspace with data/filtered, data/images and params.yaml.  Positions are kept below
experiments/cross_modal_search/NAME, so a stopped run resumes.  The table is written to
experiments/results/cross_modal_search-NAME; `sda report --experiments` shows it.

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
from experiments.study import check_names, difference, keep_settings, kept_table, logger, markdown_table, write_results
from experiments.workspaces import BASE, VARIANTS, own_params, params_file, untrained
from sda_core import alignment, backbones
from sda_core.adapters import modality
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names
from sda_core.embeddings.blocks import BlockEncoder
from sda_core.errors import TrainingError
from sda_core.evaluation.metrics import hits, reciprocals
from sda_core.item_source import item_source
from sda_core.modalities import MODALITIES
from sda_core.params import Params
from sda_core.runtime import prepare_torch
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

CONTROL = "mismatched"
DIRECTIONS = ("text to image", "image to text")
GEOMETRIES = ("as they are", "without the mean")  # also values in the kept tables
SHOWN = {"as they are": "with the mean of their modality", "without the mean": "without the mean of their modality"}
METRICS = {"R@1": lambda places: hits(places, 1), "R@10": lambda places: hits(places, 10), "MRR": reciprocals}


def main(
    name: Name,
    root: Root = Path(),
    variants: Variants = Names(("lora", "sda", CONTROL)),
    seeds: Seeds = THREE_SEEDS,
    num_steps: NumSteps = None,
    share: Annotated[float, typer.Option(help="Share of the items with an image to hold out.")] = 0.25,
    changes: Changes = None,
) -> None:
    """Train and measure what is missing; write the table."""
    check_names("--variants", variants, [*VARIANTS, CONTROL])
    folder = root / "experiments" / "cross_modal_search" / name
    steps = [] if num_steps is None else [f"train_adapter.training.num_steps={num_steps}"]
    params = own_params(params_file(root), folder, [*(changes or []), *steps])
    keep_settings(folder / "settings.json", {"share": share})
    workspace = Workspace(root)
    placed: dict[str, list[pl.DataFrame]] = {}
    for seed in seeds:
        for variant in (BASE, *variants):
            path = folder / BASE / "0.parquet" if variant == BASE else folder / variant / f"{seed}.parquet"
            made = kept_table(path, lambda variant=variant, seed=seed: place(workspace, params, variant, seed, share))
            placed.setdefault(variant, []).append(made)
    write_results(table(placed, params), "cross_modal_search", name, root)


# ------------------------------------------------------------------------------------------------- measuring
def place(workspace: Workspace, params: Params, variant: str, seed: int, share: float) -> pl.DataFrame:
    """Train a variant on the items that are not held out, and rank the held-out ones.

    Args:
        workspace: a workspace with items and images.
        params: its params.
        variant: one of :data:`experiments.workspaces.VARIANTS`, ``zero_shot`` (no training), or ``mismatched``.
        seed: seed of the adapter's initial weights and of its training.
        share: share of the items with an image to hold out.

    Returns:
        The table of :func:`places`.

    Raises:
        TrainingError: see :func:`draw`.
    """
    device = prepare_torch(params.runtime)
    source = item_source(workspace, params.items)
    _, held_out = draw(source.has_image, share, params.train_adapter.training.batch_size, "an image")
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
        shown.shows_image[held_out] = False  # training skips items without an image
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            curve = alignment.train_adapter(backbone, model, shown, training, loss, checkpoint, f"{variant} {seed}", device)
        logger.info("%s, seed %d: %d steps, last loss %.4f", variant, seed, training.num_steps, curve[-1].loss)
    source = item_source(workspace, params.items)  # new, because training used one with fewer images
    blocks = BlockEncoder(backbone, model, params.export_embeddings, device)
    blocks.prepare()
    vectors = {}
    for each in MODALITIES:
        with nullcontext() if variant == BASE else modality(model, each):
            vectors[each] = blocks.encode(source, each, held_out).vectors_BD.numpy()
    return places(vectors, source.item_ids[held_out])


def draw(
    can_be_drawn: np.ndarray, share: float, least: int, kind: str, titles: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the held-out items, the same ones for every seed of a training.

    Args:
        can_be_drawn: ``(I,)`` bool, the items of which a share is held out.
        share: their share; with titles the last title may add a few.
        least: the number of items that training needs at least.
        kind: description of these items in the error's message, e.g. ``an image``.
        titles: the title of each item, to hold out all items of a title together; None to draw single items.

    Returns:
        Rows of the items to train on and of the held-out ones, ascending.

    Raises:
        TrainingError: no item would be held out, or fewer than ``least`` would be left.
    """
    rows = np.flatnonzero(can_be_drawn)
    wanted = max(0, round(share * len(rows)))
    random = generator(0, "held out for search")
    if titles is not None and wanted:
        of_row = np.unique(np.array(titles, dtype=np.str_)[rows], return_inverse=True)[1]
        order = random.permutation(of_row.max() + 1)
        num_titles = int(np.searchsorted(np.cumsum(np.bincount(of_row)[order]), wanted)) + 1
        is_held_out = np.isin(of_row, order[:num_titles])
        known, held_out = rows[~is_held_out], rows[is_held_out]
    else:
        order = random.permutation(rows)
        known, held_out = np.sort(order[wanted:]), np.sort(order[:wanted])
    if len(held_out) < 1 or len(known) < least:
        raise TrainingError(
            "--share",
            f"it holds out {len(held_out)} of {len(rows)} items with {kind} and leaves {len(known)} for training",
            f"hold out at least one, and leave at least {least}",
        )
    return known, held_out


def places(vectors: Mapping[str, np.ndarray], item_ids: np.ndarray) -> pl.DataFrame:
    """The position of each item's other modality, by direction and geometry.

    The position is the number of items with at least the similarity of the correct one, so ties count against it.

    Args:
        vectors: ``(N, D)`` for ``image`` and for ``text``; row ``i`` of both is the same item.
        item_ids: ``(N,)``.

    Returns:
        A row for each direction, geometry and item, with the columns ``item_id``, ``position`` (1 is best), ``direction`` and
        ``geometry``.
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
    """``(S, N)`` values of a metric, by seed and held-out item."""
    return np.array(
        [
            METRICS[metric](frame.filter(direction=direction, geometry=geometry).sort("item_id")["position"].to_numpy())
            for frame in frames
        ]
    )


def table(placed: Mapping[str, Sequence[pl.DataFrame]], params: Params) -> str:
    """A markdown table for each geometry, with a row for each direction and variant.

    Args:
        placed: tables of :func:`place`, one for each seed, by variant; must include zero_shot.
        params: the params, for the settings of the intervals.
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
        title = f"{num_items} held-out items, {num_seeds} seeds, cosines of embeddings {SHOWN[geometry]}"
        heads = ["search", "vectors", *METRICS, f"R@10 - {BASE}", f"MRR - {BASE}"]
        tables.append(markdown_table(heads, rows, title))
    return "\n".join(tables)
