"""Does it extend to a third modality?  Picture, words and attributes of an item, each with a gate of its own.

The text of an item is parted into two views: *words* (title, features, description) and *attributes* (brand, price,
categories).  LoRA and MoDA are trained on items with CMSA over all pairs of views (``cmsa_many``), once with picture and words
alone and once with all three, and measured on items that were held out: the cosine of the views' gradients for every pair,
before and after training, and how often a view finds its own item's other view first among the held-out ones.

Takes a workspace with ``data/filtered`` and ``data/images`` and its ``params.yaml`` (``train_adapter.lora``, ``.moda``, ``.loss``
and ``.training``).  A seed decides the held-out items, the weights, the order of the items and the dropout.  What was measured
is kept below ``experiments/views/<name>``, so a run that was stopped goes on; the table is left in
``experiments/results/three_views-<name>``, which ``sda report --experiments`` shows.

    python experiments/three_views.py --name demo --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from _runs import Reach, dots, leave
from torch import Tensor, nn

from sda_core import adapters, backbones, log
from sda_core.adapters import base_model, modality
from sda_core.alignment.training import learning_rate
from sda_core.artifacts import ITEMS, Workspace, replace_file
from sda_core.data.prompts import text_prompt
from sda_core.diagnostics import gradient_products
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.losses import cmsa_many
from sda_core.params import AdapterParams, LossParams, Params, load_params
from sda_core.runtime import prepare_torch
from sda_core.seed import derive, generator

_log = logging.getLogger("experiments")

WORDS = ("title", "features", "description")
ATTRIBUTES = ("brand", "price", "categories")
VIEWS = ("image", "words", "attributes")
Criterion = Callable[[Mapping[str, Tensor]], Tensor]
TEACHERS = {"image": "image", "text": "words"}  # a loss section's teacher, as it is called here


@dataclass(frozen=True)
class Rung:
    """Which adapter is trained on which views."""

    adapter: str
    views: tuple[str, ...]

    @property
    def name(self) -> str:
        """Folder and row name."""
        return f"{self.adapter}, {len(self.views)} views"


LADDER = [Rung(adapter, views) for adapter in ("lora", "moda") for views in (VIEWS[:2], VIEWS)]
PAIRS = list(itertools.combinations(VIEWS, 2))


class Views:
    """Model inputs of any view of any items."""

    def __init__(self, workspace: Workspace, params: Params, backbone: backbones.Backbone) -> None:
        self.source: ItemSource = item_source(workspace, params.items)
        self.backbone = backbone
        rows = list(ITEMS.read(workspace.items).iter_rows(named=True))
        self._texts: dict[str, list[str]] = {}
        for view, fields in (("words", WORDS), ("attributes", ATTRIBUTES)):
            section = params.items.model_copy(update={"fields": tuple(f for f in params.items.fields if f in fields) or fields})
            self._texts[view] = [text_prompt(row, section) for row in rows]

    def inputs(self, view: str, rows: np.ndarray) -> dict[str, Tensor]:
        """Of some items, which all show a picture."""
        if view == "image":
            pictures = [picture for picture in self.source.images(rows) if picture is not None]
            return self.backbone.image_inputs(pictures, self.source.image_prompt)
        return self.backbone.text_inputs([self._texts[view][row] for row in rows])

    def vectors(self, model: nn.Module, views: Sequence[str], rows: np.ndarray) -> dict[str, Tensor]:
        """Of some items through the model, by view."""
        found = {}
        for view in views:
            with modality(model, view):
                found[view] = self.backbone.encode(model, self.inputs(view, rows))
        return found

    def criterion(self, model: nn.Module, views: Sequence[str], rows: np.ndarray, loss: LossParams) -> Criterion:
        """CMSA over all pairs of views of some items, as the loss section says."""
        teacher = TEACHERS.get(loss.teacher, loss.teacher)
        base = None
        if loss.teacher_source == "base":
            with base_model(model):
                base = self.vectors(model, views, rows)
        return lambda vectors: cmsa_many(
            vectors,
            loss.temperature,
            teacher,
            loss.teacher_temperature,
            loss.detach_teacher,
            loss.normalize,
            taught_by=base,
        )


def main() -> None:
    """Read the options, measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project folder of the run")
    parser.add_argument("--name", required=True, help="folder of the results below experiments/views")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--num-steps", type=int, help="instead of train_adapter.training.num_steps")
    parser.add_argument("--num-held-out", type=int, default=64)
    options = parser.parse_args()
    log.configure()
    params = load_params(options.root / "params.yaml")
    folder = options.root / "experiments" / "views" / options.name
    for seed in options.seeds:
        for rung in LADDER:
            path = folder / rung.name.replace(", ", "-").replace(" ", "-") / f"{seed}.parquet"
            if not path.exists():
                found = measured(Workspace(options.root), params, rung, seed, options.num_steps, options.num_held_out)
                with replace_file(path) as temporary:
                    found.with_columns(rung=pl.lit(rung.name), seed=pl.lit(seed)).write_parquet(temporary)
    results = pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*/*.parquet"))])
    results = results.filter(pl.col("seed").is_in(options.seeds))
    place = leave(table(results, options.num_held_out), "three_views", options.name, options.root)
    dots(place / "plot.png", reaches(results), "mean and range over the seeds")


# ------------------------------------------------------------------------------------------------- measuring
def measured(
    workspace: Workspace, params: Params, rung: Rung, seed: int, num_steps: int | None, num_held_out: int
) -> pl.DataFrame:
    """A row for each state and pair of views: ``when, one, other, cosine, retrieval``."""
    section, loss = params.train_adapter, params.train_adapter.loss
    adapter: AdapterParams = section.lora if rung.adapter == "lora" else section.moda
    device = prepare_torch(params.runtime)
    backbone = backbones.build(params.backbone, device)
    views = Views(workspace, params, backbone)
    rows = generator(seed, "held out").permutation(np.flatnonzero(views.source.has_image))
    held_out, trained_on = rows[:num_held_out], rows[num_held_out:]
    pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    # a gate for every view in every rung, so that a rung differs by what it is trained on and by nothing else
    model = adapters.build(backbone.model, adapter, VIEWS, pattern, num_layers, seed=seed).to(device)
    parts = [pairs(views, model, loss, held_out).with_columns(when=pl.lit("before"))]
    train(views, model, rung.views, params, trained_on, seed, num_steps)
    parts.append(pairs(views, model, loss, held_out).with_columns(when=pl.lit("after")))
    return pl.concat(parts)


def train(
    views: Views, model: nn.Module, names: Sequence[str], params: Params, rows: np.ndarray, seed: int, num_steps: int | None
) -> None:
    """As ``train_adapter`` trains: AdamW, warm-up, clipped gradients, seeded batches without repeats in an epoch."""
    training = params.train_adapter.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    per_epoch = len(rows) // training.batch_size
    model.train()
    for step in log.track(range(num_steps or training.num_steps), num_steps or training.num_steps, "train", "steps"):
        epoch, place = divmod(step, per_epoch)
        order = generator(seed, "batches", epoch).permutation(rows)
        batch = order[place * training.batch_size : (place + 1) * training.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        torch.manual_seed(derive(seed, "step", step))
        optimizer.zero_grad(set_to_none=True)
        loss_of = views.criterion(model, names, batch, params.train_adapter.loss)
        loss_of(views.vectors(model, names, batch)).backward()
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
    model.eval()


def pairs(views: Views, model: nn.Module, loss: LossParams, rows: np.ndarray) -> pl.DataFrame:
    """Gradient cosine and retrieval of every pair of views on some items."""
    inputs = {view: views.inputs(view, rows) for view in VIEWS}
    encode = views.backbone.encode
    found = gradient_products(
        model,
        {view: (lambda view=view: encode(model, inputs[view])) for view in VIEWS},
        views.criterion(model, VIEWS, rows, loss),
    ).cosine()
    with torch.no_grad():
        unit = {view: F.normalize(vectors, dim=-1) for view, vectors in views.vectors(model, VIEWS, rows).items()}
    return pl.DataFrame(
        [
            {
                "one": one,
                "other": other,
                "cosine": float(found[VIEWS.index(one), VIEWS.index(other)]),
                "retrieval": retrieval(unit[one], unit[other]),
            }
            for one, other in PAIRS
        ]
    )


def retrieval(one_ND: Tensor, other_ND: Tensor) -> float:
    """How often an item is the first among all, from either view to the other."""
    similarity_NN = one_ND @ other_ND.T
    own = torch.arange(len(one_ND), device=one_ND.device)
    return float(torch.stack([(similarity_NN.argmax(dim) == own).float().mean() for dim in (0, 1)]).mean())


# ---------------------------------------------------------------------------------------------------- showing
def table(results: pl.DataFrame, num_held_out: int) -> str:
    """A markdown table: a row for each rung and state, cosine and retrieval of every pair; mean and range over the seeds."""
    heads = [f"{one}, {other}" for one, other in PAIRS]
    num_seeds = results["seed"].n_unique()
    lines = [
        f"### Three views, {num_seeds} seeds, {num_held_out} held-out items (found by chance: {1 / num_held_out:.3f})",
        "",
        "| adapter, trained on | state | "
        + " | ".join([f"cosine {head}" for head in heads] + [f"found {head}" for head in heads])
        + " |",
        "|---" * (2 + 2 * len(heads)) + "|",
    ]
    for rung in LADDER:
        for when in ("before", "after"):
            cells = []
            for column in ("cosine", "retrieval"):
                for one, other in PAIRS:
                    chosen = results.filter(rung=rung.name, when=when, one=one, other=other)[column]
                    cells.append(f"{chosen.mean():+.3f} ({chosen.min():+.2f} .. {chosen.max():+.2f})")
            lines.append(f"| {rung.name} | {when} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reaches(results: pl.DataFrame) -> dict[str, dict[str, Reach]]:
    """The numbers of :func:`table` for a plot: by measure and pair of views, by rung and state."""
    panels: dict[str, dict[str, Reach]] = {}
    for column, name in (("cosine", "cosine of the gradients"), ("retrieval", "found")):
        for one, other in PAIRS:
            rows = panels.setdefault(f"{name}: {one}, {other}", {})
            for rung in LADDER:
                for when in ("before", "after"):
                    chosen = results.filter(rung=rung.name, when=when, one=one, other=other)[column].to_numpy()
                    rows[f"{rung.name}, {when}"] = float(chosen.mean()), float(chosen.min()), float(chosen.max())
    return panels


if __name__ == "__main__":
    main()
