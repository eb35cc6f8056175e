"""Measure the conflict of image and text gradients in LoRA and MoDA.

The input is a workspace with data/filtered and data/images and its params.yaml.  For every seed some items are drawn and held
out.  LoRA and MoDA (the sections train_adapter.lora and .moda) are trained on the others, each with InfoNCE and with CMSA
(.infonce and .loss) and the settings of train_adapter.training.  Then the gradients of the image pass and of the text pass are
compared on batches of the held-out items (sda_core.diagnostics).  A seed determines the held-out items, the initial weights, the
order of the batches and the dropout.  Measurements are kept as parquet in experiments/gradients/NAME, so an interrupted run
resumes, and table and plot are computed from those files.  They are written to experiments/results/gradient_conflict-NAME,
which `sda report --experiments` shows.

    python -m experiments gradient_conflict --name demo --seeds 1,2,3

A conflict appears only after enough training: on a GPU --num-steps 600, two minutes per training.
--trainings lora+infonce,moda+cmsa skips the others.

With --saved lora,sda nothing is trained: the adapters of these variants are read from adapters/ and measured on batches drawn
from all items, which may have been in their training data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from torch import Tensor, nn

from experiments.options import THREE_SEEDS, Name, NumSteps, Root, Seeds
from experiments.study import check_names, kept_table, logger, markdown_table, write_results
from experiments.workspaces import project_params, untrained
from sda_core import adapters, alignment, backbones, losses
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, names
from sda_core.diagnostics import GradientProducts, gate_similarity, gradient_products
from sda_core.errors import TrainingError
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.modalities import MODALITIES
from sda_core.params import AdapterParams, LossParams, Params
from sda_core.runtime import prepare_torch
from sda_core.seed import generator

WHEN = ("before", "after")
COLOURS = {"lora": "#b4472e", "moda": "#1f5fa8"}


@dataclass(frozen=True)
class Arm:
    """An adapter that is trained, or read, and measured."""

    adapter: str
    loss: str
    saved: str | None = None

    @property
    def name(self) -> str:
        """Folder and row name."""
        return self.saved or f"{self.adapter}+{self.loss}"


Results = Mapping[Arm, list[pl.DataFrame]]  # one table per seed
ARMS = [Arm(adapter, loss) for adapter in ("lora", "moda") for loss in ("infonce", "cmsa")]


def main(
    name: Name,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    num_steps: NumSteps = None,
    num_batches: Annotated[int, typer.Option(help="Number of held-out batches, each of the training's batch size.")] = 2,
    trainings: Annotated[Names, typer.Option(parser=names, metavar="A,B,...", help="Trainings to run.")] = Names(
        arm.name for arm in ARMS
    ),
    saved: Annotated[
        Names | None,
        typer.Option(
            parser=names,
            metavar="A,B,...",
            help="Measure the adapters in adapters/VARIANT instead of training.",
            show_default=False,
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="File of the plot; default: plot.png in the folder with the results.", show_default=False),
    ] = None,
) -> None:
    """Measure what is missing, write table and plot."""
    check_names("--trainings", trainings, [arm.name for arm in ARMS])
    params, workspace = project_params(root), Workspace(root)
    folder = root / "experiments" / "gradients" / name
    arms = [arm for arm in ARMS if arm.name in trainings]
    if saved:
        variants = {variant: params.train_adapter.variants[variant] for variant in saved if params.train_adapter.of(variant)}
        arms = [Arm(section.adapter, section.loss, variant) for variant, section in variants.items()]
    results: dict[Arm, list[pl.DataFrame]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            path = folder / arm.name / f"{seed}.parquet"
            table_of_seed = kept_table(
                path, lambda arm=arm, seed=seed: measure(workspace, params, arm, seed, num_steps, num_batches)
            )
            results[arm].append(table_of_seed)
    folder = write_results(table(results), "gradient_conflict", name, root)
    place = plot_file or folder / "plot.png"
    plot(results, place)
    logger.info("plot: %s", place)


# ------------------------------------------------------------------------------------------------- measuring
def measure(workspace: Workspace, params: Params, arm: Arm, seed: int, num_steps: int | None, num_batches: int) -> pl.DataFrame:
    """Inner products of the gradients on the held-out batches: one row per state, batch, layer and matrix."""
    section = params.train_adapter
    adapter: AdapterParams = section.lora if arm.adapter == "lora" else section.moda
    loss: LossParams = section.infonce if arm.loss == "infonce" else section.loss
    training = section.training.model_copy(
        update={"seed": seed} | ({} if num_steps is None else {"num_steps": num_steps, "log_every": max(num_steps, 1)})
    )
    device = prepare_torch(params.runtime)
    source = item_source(workspace, params.items)
    held_out = draw(source, seed, num_batches, training.batch_size)
    backbone = backbones.build(params.backbone, device)
    criterion = losses.build(loss).to(device)
    if arm.saved is not None:
        model, _ = adapters.load(backbone.model, workspace.adapter(arm.saved))
        model.to(device)
        return frame(products(backbone, model, criterion, source, held_out), model, "after")
    model = untrained(backbone, adapter, MODALITIES, seed).to(device)
    parts = [frame(products(backbone, model, criterion, source, held_out), model, "before")]
    source.shows_image[held_out.ravel()] = False  # so training skips them
    with tempfile.TemporaryDirectory() as scratch:
        curve = alignment.train_adapter(
            backbone, model, source, training, loss, Path(scratch) / "checkpoint", f"{arm.name} {seed}", device
        )
    parts.append(frame(products(backbone, model, criterion, source, held_out), model, "after"))
    logger.info(
        "%s seed %d: %d steps, last loss %.4f", arm.name, seed, training.num_steps, curve[-1].loss if curve else float("nan")
    )
    return pl.concat(parts)


def draw(source: ItemSource, seed: int, num_batches: int, batch_size: int) -> np.ndarray:
    """Draw ``(num_batches, batch_size)`` distinct rows of items with an image."""
    rows = np.flatnonzero(source.has_image)
    wanted = num_batches * batch_size
    if len(rows) < wanted + batch_size:
        raise TrainingError(
            "--num-batches",
            f"{wanted} items are to be held out and {batch_size} are needed for a training batch, but {len(rows)} have an image",
            "ask for fewer",
        )
    return generator(seed, "held out").permutation(rows)[:wanted].reshape(num_batches, batch_size)


def products(
    backbone: backbones.Backbone, model: nn.Module, criterion: losses.AlignmentLoss, source: ItemSource, held_out: np.ndarray
) -> Iterator[GradientProducts]:
    """Measure every held-out batch."""

    for rows in held_out:
        items = source.batch(rows)
        pixels = [image for image in items.images if image is not None]
        images, texts = backbone.image_inputs(pixels, source.image_prompt), backbone.text_inputs(items.texts)
        base = None
        if criterion.needs_base:
            with adapters.base_model(model):
                base = backbone.encode(model, images), backbone.encode(model, texts)

        def loss(vectors: Mapping[str, Tensor], base: tuple[Tensor, Tensor] | None = base) -> Tensor:
            return criterion(vectors["image"], vectors["text"], base=base)

        yield gradient_products(
            model,
            {
                "image": lambda inputs=images: backbone.encode(model, inputs),
                "text": lambda inputs=texts: backbone.encode(model, inputs),
            },
            loss,
        )


def frame(measurements: Iterator[GradientProducts], model: nn.Module, when: str) -> pl.DataFrame:
    """Inner products and gate similarities as a table."""
    gates = {name: float(similarity_MM[0, 1]) for name, similarity_MM in gate_similarity(model).items()}
    rows = [
        {
            "when": when,
            "batch": batch,
            "place": place,
            "layer": layer,
            "matrix": matrix,
            "image_image": float(measured.products[place, column, 0, 0]),
            "image_text": float(measured.products[place, column, 0, 1]),
            "text_text": float(measured.products[place, column, 1, 1]),
            "gate_similarity": gates[layer],
        }
        for batch, measured in enumerate(measurements)
        for place, layer in enumerate(measured.layers)
        for column, matrix in enumerate("AB")
    ]
    return pl.DataFrame(rows).with_columns(kind=pl.col("layer").str.split(".").list.last())


# ---------------------------------------------------------------------------------------------------- showing
def cosines(results: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Cosine of the weights grouped by ``by`` for each batch, then the mean over the batches; 0 / 0 is skipped."""
    summed = results.group_by(*by, "batch", maintain_order=True).agg(pl.sum("image_image", "image_text", "text_text"))
    cosine = pl.col("image_text") / (pl.col("image_image") * pl.col("text_text")).sqrt()
    return (
        summed.with_columns(cosine=cosine)
        .filter(pl.col("cosine").is_finite())
        .group_by(*by, maintain_order=True)
        .agg(pl.mean("cosine"))
    )


def mean_and_range_cell(values: list[float]) -> str:
    """Mean and range over the seeds."""
    if not values:
        return "-"
    low, high = (f"{value:+.2f}" for value in (min(values), max(values)))
    return f"{np.mean(values):+.3f} ({low} .. {high})"


def joint_cosine(part: pl.DataFrame) -> float | None:
    """Cosine of some weights concatenated to one vector; None if a gradient is 0."""
    joint = cosines(part, ["when"])
    return float(joint["cosine"][0]) if len(joint) else None


def table(results: Results) -> str:
    """Two Markdown tables with one row per arm and state: all weights, and each kind of layer."""
    first = next(iter(results.values()))
    kinds = list(dict.fromkeys(first[0]["kind"]))
    summary: dict[str, Callable[[pl.DataFrame], float | None]] = {
        "all, as one vector": joint_cosine,
        "A": lambda part: joint_cosine(part.filter(pl.col("matrix") == "A")),
        "B": lambda part: joint_cosine(part.filter(pl.col("matrix") == "B")),
        "mean of the layers": lambda part: float(cosines(part, ["layer"])["cosine"].to_numpy().mean()),
        "share of layers below 0": lambda part: float((cosines(part, ["layer"])["cosine"] < 0).to_numpy().mean()),
        "length, image / text": lambda part: (
            float(part["image_image"].to_numpy().sum() / part["text_text"].to_numpy().sum()) ** 0.5
        ),
        "cosine of the gates": lambda part: float(part["gate_similarity"].to_numpy().mean()),
    }
    by_kind: dict[str, Callable[[pl.DataFrame], float | None]] = {
        kind: (lambda part, kind=kind: joint_cosine(part.filter(pl.col("kind") == kind))) for kind in kinds
    }
    title = f"Cosine of the gradients of the image pass and of the text pass, {len(first)} seeds: mean (range)"
    return markdown_table(*_rows(results, summary), title) + "\n" + markdown_table(*_rows(results, by_kind))


def _rows(results: Results, columns: Mapping[str, Callable[[pl.DataFrame], float | None]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table: one row per arm and state, one column per number of a table of gradients."""
    rows = []
    for arm, frames in results.items():
        for when in WHEN:
            parts = [part for part in (frame.filter(pl.col("when") == when) for frame in frames) if len(part)]
            if parts:
                values = [[value for value in map(of, parts) if value is not None] for of in columns.values()]
                rows.append([f"{arm.name}, {when}", *map(mean_and_range_cell, values)])
    return ["adapter, state", *columns], rows


def plot(results: Results, path: Path) -> None:
    """Small multiples: one row per loss, one column per kind of layer, cosine by depth, LoRA next to MoDA."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(next(iter(results.values()))[0]["kind"]))
    rows = list(dict.fromkeys(arm.loss for arm in results))
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "gradient_conflict"})
    figure, axes = plt.subplots(
        len(rows), len(kinds), figsize=(2.1 * len(kinds) + 1, 2.9 * len(rows) + 0.9), sharex=True, sharey=True, squeeze=False
    )
    for arm, frames in results.items():
        colour, marker = COLOURS[arm.adapter], "o" if arm.adapter == "lora" else "s"
        for when, dashes in zip(WHEN, (":", "-"), strict=True):
            for column, kind in enumerate(kinds):
                values_of_seeds = []
                for frame in frames:
                    part = cosines(frame.filter((pl.col("when") == when) & (pl.col("kind") == kind)), ["place"]).sort("place")
                    values_of_seeds.append(part["cosine"].to_list())
                if not values_of_seeds[0]:
                    continue
                axis, values = axes[rows.index(arm.loss)][column], np.array(values_of_seeds)
                depth = np.arange(1, values.shape[1] + 1)
                axis.plot(
                    depth,
                    values.mean(0),
                    dashes,
                    color=colour,
                    marker=marker if when == "after" else None,
                    markersize=4,
                    linewidth=1.8 if when == "after" else 1.3,
                )
                if when == "after":
                    axis.fill_between(depth, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    for row, loss in enumerate(rows):
        axes[row][0].set_ylabel(f"{'CMSA' if loss in ('cmsa', 'loss') else 'InfoNCE'}\ncosine")
        for column, kind in enumerate(kinds):
            axis = axes[row][column]
            axis.axhline(0, color="0.35", linewidth=0.9)
            axis.grid(axis="y", color="0.88", linewidth=0.7)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(kind, fontsize=11)
            if row == len(rows) - 1:
                axis.set_xlabel("block")
                axis.xaxis.get_major_locator().set_params(integer=True)
    handles = [
        Line2D([], [], color=COLOURS[name], marker=marker, linestyle="-", label=f"{label}, after training")
        for name, marker, label in (("lora", "o", "LoRA"), ("moda", "s", "MoDA"))
    ]
    handles += [
        Line2D([], [], color=COLOURS[name], linestyle=":", label=f"{label}, before")
        for name, label in (("lora", "LoRA"), ("moda", "MoDA"))
    ]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)
