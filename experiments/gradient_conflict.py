"""Do image and text pull an adapter in different directions?  LoRA against MoDA, before and after training, per layer.

Takes a workspace with ``data/filtered`` and ``data/images`` and its ``params.yaml``.  For every seed some items are drawn and
held out; LoRA and MoDA (the sections ``train_adapter.lora`` and ``.moda``) are trained on the others, each with InfoNCE and with
CMSA (``.infonce`` and ``.loss``) as ``train_adapter.training`` says; then the gradients of the image pass and of the text pass
are compared on batches of the held-out items (``sda_core.diagnostics``).  A seed decides the held-out items, the initial weights,
the order of the batches and the dropout.  What was measured is kept as parquet below ``experiments/gradients/<name>``, so a run
that was stopped goes on, and table and plot are made from those files alone; they are left in
``experiments/results/gradient_conflict-<name>``, which ``sda report --experiments`` shows.

    python experiments/gradient_conflict.py --name demo --seeds 1 2 3

Adapters have to learn something before there is a conflict: on a GPU ``--num-steps 600``, two minutes a training.
``--rungs lora+infonce moda+cmsa`` leaves the others out.

With ``--saved lora sda`` nothing is trained: the adapters of these variants are read from ``adapters/`` and measured on batches
drawn from all items, which they may have seen in training.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
from _runs import leave
from torch import Tensor, nn

from sda_core import adapters, alignment, backbones, log, losses
from sda_core.artifacts import Workspace, replace_file
from sda_core.diagnostics import GradientProducts, gate_similarity, gradient_products
from sda_core.errors import TrainingError
from sda_core.item_source import MODALITIES, item_source
from sda_core.items import ItemSource
from sda_core.params import AdapterParams, LossParams, Params, load_params
from sda_core.runtime import prepare_torch
from sda_core.seed import generator

mpl.use("Agg")
_log = logging.getLogger("experiments")

LADDER = [("lora", "infonce"), ("lora", "cmsa"), ("moda", "infonce"), ("moda", "cmsa")]
WHEN = ("before", "after")
COLOURS = {"lora": "#b4472e", "moda": "#1f5fa8"}


@dataclass(frozen=True)
class Rung:
    """What is trained, or read, and measured."""

    adapter: str
    loss: str
    saved: str | None = None

    @property
    def name(self) -> str:
        """Folder and row name."""
        return self.saved or f"{self.adapter}+{self.loss}"


def main() -> None:
    """Read the options, measure what is missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project folder of the run")
    parser.add_argument("--name", required=True, help="folder of the results below experiments/gradients")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--num-steps", type=int, help="instead of train_adapter.training.num_steps")
    parser.add_argument("--num-batches", type=int, default=2, help="held-out batches of the training's batch size")
    parser.add_argument("--rungs", nargs="+", choices=[f"{adapter}+{loss}" for adapter, loss in LADDER], help="only these")
    parser.add_argument("--saved", nargs="+", metavar="VARIANT", help="measure adapters/<VARIANT>, train nothing")
    parser.add_argument("--plot", type=Path, help="instead of plot.png in the folder of the results (.png or .svg)")
    options = parser.parse_args()
    log.configure()
    params = load_params(options.root / "params.yaml")
    workspace = Workspace(options.root)
    folder = options.root / "experiments" / "gradients" / options.name
    rungs = [Rung(adapter, loss) for adapter, loss in LADDER]
    rungs = [rung for rung in rungs if not options.rungs or rung.name in options.rungs]
    if options.saved:
        chosen = {name: params.train_adapter.variants[name] for name in options.saved if params.train_adapter.of(name)}
        rungs = [Rung(variant.adapter, variant.loss, name) for name, variant in chosen.items()]
    for seed in options.seeds:
        for rung in rungs:
            path = folder / rung.name / f"{seed}.parquet"
            if not path.exists():
                found = measured(workspace, params, rung, seed, options.num_steps, options.num_batches)
                with replace_file(path) as temporary:
                    found.write_parquet(temporary)
    results = {rung: [pl.read_parquet(folder / rung.name / f"{seed}.parquet") for seed in options.seeds] for rung in rungs}
    left = leave(table(results), "gradient_conflict", options.name, options.root)
    place = options.plot or left / "plot.png"
    plot(results, place)
    _log.info("plot: %s", place)


# ------------------------------------------------------------------------------------------------- measuring
def measured(
    workspace: Workspace, params: Params, rung: Rung, seed: int, num_steps: int | None, num_batches: int
) -> pl.DataFrame:
    """Inner products of the gradients on the held-out batches: a row for each state, batch, layer and matrix."""
    section = params.train_adapter
    adapter: AdapterParams = section.lora if rung.adapter == "lora" else section.moda
    loss: LossParams = section.infonce if rung.loss == "infonce" else section.loss
    training = section.training.model_copy(
        update={"seed": seed} | ({} if num_steps is None else {"num_steps": num_steps, "log_every": max(num_steps, 1)})
    )
    device = prepare_torch(params.runtime)
    source = item_source(workspace, params.items)
    held_out = draw(source, seed, num_batches, training.batch_size)
    backbone = backbones.build(params.backbone, device)
    criterion = losses.build(loss).to(device)
    if rung.saved is not None:
        model, _ = adapters.load(backbone.model, workspace.adapter(rung.saved))
        model.to(device)
        return frame(products(backbone, model, criterion, source, held_out), model, "after")
    pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    model = adapters.build(backbone.model, adapter, MODALITIES, pattern, num_layers, seed=seed).to(device)
    parts = [frame(products(backbone, model, criterion, source, held_out), model, "before")]
    source.shows_image[held_out.ravel()] = False  # so training passes them by
    with tempfile.TemporaryDirectory() as scratch:
        curve = alignment.train_adapter(
            backbone, model, source, training, loss, Path(scratch) / "checkpoint", f"{rung.name} {seed}", device
        )
    parts.append(frame(products(backbone, model, criterion, source, held_out), model, "after"))
    _log.info(
        "%s seed %d: %d steps, last loss %.4f", rung.name, seed, training.num_steps, curve[-1].loss if curve else float("nan")
    )
    return pl.concat(parts)


def draw(source: ItemSource, seed: int, num_batches: int, batch_size: int) -> np.ndarray:
    """``(num_batches, batch_size)`` rows of items with a picture of their own, each once."""
    rows = np.flatnonzero(source.has_image)
    wanted = num_batches * batch_size
    if len(rows) < wanted + batch_size:
        raise TrainingError(
            "--num-batches",
            f"{wanted} items are to be held out and {batch_size} are needed for a training batch, but {len(rows)} have a picture",
            "ask for fewer",
        )
    return generator(seed, "held out").permutation(rows)[:wanted].reshape(num_batches, batch_size)


def products(
    backbone: backbones.Backbone, model: nn.Module, criterion: losses.AlignmentLoss, source: ItemSource, held_out: np.ndarray
) -> Iterator[GradientProducts]:
    """Measure every held-out batch."""

    for rows in held_out:
        items = source.batch(rows)
        pictures = [picture for picture in items.images if picture is not None]
        images, texts = backbone.image_inputs(pictures, source.image_prompt), backbone.text_inputs(items.texts)
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


def frame(found: Iterator[GradientProducts], model: nn.Module, when: str) -> pl.DataFrame:
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
        for batch, measured in enumerate(found)
        for place, layer in enumerate(measured.layers)
        for column, matrix in enumerate("AB")
    ]
    return pl.DataFrame(rows).with_columns(kind=pl.col("layer").str.split(".").list.last())


# ---------------------------------------------------------------------------------------------------- showing
def cosines(results: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Cosine of the weights that ``by`` puts together, by batch, then the mean over the batches; 0 / 0 counts for nothing."""
    summed = results.group_by(*by, "batch", maintain_order=True).agg(pl.sum("image_image", "image_text", "text_text"))
    cosine = pl.col("image_text") / (pl.col("image_image") * pl.col("text_text")).sqrt()
    return (
        summed.with_columns(cosine=cosine)
        .filter(pl.col("cosine").is_finite())
        .group_by(*by, maintain_order=True)
        .agg(pl.mean("cosine"))
    )


def spread(values: list[float]) -> str:
    """Mean and range over the seeds."""
    if not values:
        return "-"
    low, high = (f"{value:+.2f}" for value in (min(values), max(values)))
    return f"{np.mean(values):+.3f} ({low} .. {high})"


def together(part: pl.DataFrame) -> float | None:
    """Cosine of some weights taken as one vector; None where a gradient is 0."""
    found = cosines(part, ["when"])
    return float(found["cosine"][0]) if len(found) else None


def table(results: Mapping[Rung, list[pl.DataFrame]]) -> str:
    """Two markdown tables, a row for each rung and state: all weights, and each kind of layer."""
    first = next(iter(results.values()))
    kinds = list(dict.fromkeys(first[0]["kind"]))
    summary: dict[str, Callable[[pl.DataFrame], float | None]] = {
        "all, as one vector": together,
        "A": lambda part: together(part.filter(pl.col("matrix") == "A")),
        "B": lambda part: together(part.filter(pl.col("matrix") == "B")),
        "mean of the layers": lambda part: float(cosines(part, ["layer"])["cosine"].to_numpy().mean()),
        "share of layers below 0": lambda part: float((cosines(part, ["layer"])["cosine"] < 0).to_numpy().mean()),
        "length, image / text": lambda part: (
            float(part["image_image"].to_numpy().sum() / part["text_text"].to_numpy().sum()) ** 0.5
        ),
        "cosine of the gates": lambda part: float(part["gate_similarity"].to_numpy().mean()),
    }
    by_kind: dict[str, Callable[[pl.DataFrame], float | None]] = {
        kind: (lambda part, kind=kind: together(part.filter(pl.col("kind") == kind))) for kind in kinds
    }
    title = f"### Cosine of the gradients of the image pass and of the text pass, {len(first)} seeds: mean (range)"
    lines = [title, ""]
    for columns in (summary, by_kind):
        lines += ["| adapter, state | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for rung, frames in results.items():
            for when in WHEN:
                parts = [part for part in (frame.filter(pl.col("when") == when) for frame in frames) if len(part)]
                if parts:
                    found = [[value for value in map(of, parts) if value is not None] for of in columns.values()]
                    lines.append(f"| {rung.name}, {when} | " + " | ".join(map(spread, found)) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Mapping[Rung, list[pl.DataFrame]], path: Path) -> None:
    """Small multiples: a row for each loss, a column for each kind of layer, depth against cosine, LoRA beside MoDA."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(next(iter(results.values()))[0]["kind"]))
    rows = list(dict.fromkeys(rung.loss for rung in results))
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "gradient_conflict"})
    figure, axes = plt.subplots(
        len(rows), len(kinds), figsize=(2.1 * len(kinds) + 1, 2.9 * len(rows) + 0.9), sharex=True, sharey=True, squeeze=False
    )
    for rung, frames in results.items():
        colour, marker = COLOURS[rung.adapter], "o" if rung.adapter == "lora" else "s"
        for when, dashes in zip(WHEN, (":", "-"), strict=True):
            for column, kind in enumerate(kinds):
                found = []
                for frame in frames:
                    part = cosines(frame.filter((pl.col("when") == when) & (pl.col("kind") == kind)), ["place"]).sort("place")
                    found.append(part["cosine"].to_list())
                if not found[0]:
                    continue
                axis, values = axes[rows.index(rung.loss)][column], np.array(found)
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


if __name__ == "__main__":
    main()
