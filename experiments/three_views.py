"""Train on three modalities: image, text and attributes, each with a separate gate.

The text of an item is split into two views: words (title, features, description) and attributes (brand, price, categories).
LoRA and MoDA are trained on items with CMSA over all pairs of views (cmsa_many), once with image and words only and once with
all three, and measured on held-out items: the cosine of the views' gradients for every pair, before and after training, and
retrieval@1 between the views of the held-out items.

The input is a workspace with data/filtered and data/images and its params.yaml (train_adapter.lora, .moda, .loss and
.training).  A seed determines the held-out items, the weights, the order of the items and the dropout.  Measurements are kept in
experiments/views/NAME, so an interrupted run resumes; the table is written to experiments/results/three_views-NAME, which
`sda report --experiments` shows.

    python -m experiments three_views --name demo --seeds 1,2,3
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from experiments.options import THREE_SEEDS, Name, NumSteps, Root, Seeds
from experiments.study import Panels, kept_table, markdown_table, mean_and_range, plot_intervals, write_results
from experiments.workspaces import project_params, untrained
from sda_core import backbones, log
from sda_core.adapters import base_model, modality
from sda_core.alignment.training import learning_rate
from sda_core.artifacts import ITEMS, Workspace
from sda_core.data.prompts import text_prompt
from sda_core.diagnostics import gradient_products
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.losses import cmsa_many
from sda_core.losses.geometry import Centering
from sda_core.params import AdapterParams, LossParams, Params
from sda_core.runtime import prepare_torch
from sda_core.seed import derive, generator

WORDS = ("title", "features", "description")
ATTRIBUTES = ("brand", "price", "categories")
VIEWS = ("image", "words", "attributes")
Criterion = Callable[[Mapping[str, Tensor]], Tensor]
TEACHERS = {"image": "image", "text": "words"}  # name of a loss section's teacher in this script


@dataclass(frozen=True)
class Arm:
    """An adapter, and the views on which it is trained."""

    adapter: str
    views: tuple[str, ...]

    @property
    def name(self) -> str:
        """Folder and row name."""
        return f"{self.adapter}, {len(self.views)} views"


ARMS = [Arm(adapter, views) for adapter in ("lora", "moda") for views in (VIEWS[:2], VIEWS)]
WHEN = ("before", "after")
MEASURES = {"cosine": "cosine of the gradients", "retrieval": "retrieval@1"}  # by column of the stored tables
PAIRS = list(itertools.combinations(VIEWS, 2))


class Views:
    """Model inputs of any view of any items."""

    def __init__(self, workspace: Workspace, params: Params, backbone: backbones.Backbone) -> None:
        self.source: ItemSource = item_source(workspace, params.items)
        self.backbone = backbone
        rows = list(ITEMS.read(workspace.items).iter_rows(named=True))
        self.texts: dict[str, list[str]] = {}
        for view, fields in (("words", WORDS), ("attributes", ATTRIBUTES)):
            section = params.items.model_copy(update={"fields": tuple(f for f in params.items.fields if f in fields) or fields})
            self.texts[view] = [text_prompt(row, section) for row in rows]

    def inputs(self, view: str, rows: np.ndarray) -> dict[str, Tensor]:
        """Inputs of some items, all of which have an image."""
        if view == "image":
            images = [image for image in self.source.images(rows) if image is not None]
            return self.backbone.image_inputs(images, self.source.image_prompt)
        return self.backbone.text_inputs([self.texts[view][row] for row in rows])

    def vectors(self, model: nn.Module, views: Sequence[str], rows: np.ndarray) -> dict[str, Tensor]:
        """Vectors of some items by the model, by view."""
        vectors = {}
        for view in views:
            with modality(model, view):
                vectors[view] = self.backbone.encode(model, self.inputs(view, rows))
        return vectors

    def criterion(self, model: nn.Module, views: Sequence[str], rows: np.ndarray, loss: LossParams) -> Criterion:
        """CMSA over all pairs of views of some items, with the settings of the loss section."""
        teacher = TEACHERS.get(loss.teacher, loss.teacher)
        base = None
        if loss.teacher_source == "base":
            with base_model(model):
                base = self.vectors(model, views, rows)
        center = Centering(loss.center)
        base = base and center(base, update=False)
        return lambda vectors: cmsa_many(
            center(vectors, update=False),
            loss.temperature,
            teacher,
            loss.teacher_temperature,
            loss.detach_teacher,
            loss.normalize,
            taught_by=base,
        )


def main(
    name: Name,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    num_steps: NumSteps = None,
    num_held_out: Annotated[int, typer.Option(help="Number of held-out items that are measured.")] = 64,
) -> None:
    """Measure what is missing, write table and plot."""
    params = project_params(root)
    folder = root / "experiments" / "views" / name
    parts = []
    for seed in seeds:
        for arm in ARMS:
            path = folder / arm.name.replace(", ", "-").replace(" ", "-") / f"{seed}.parquet"
            parts.append(
                kept_table(path, lambda arm=arm, seed=seed: measure(Workspace(root), params, arm, seed, num_steps, num_held_out))
            )
    measured = pl.concat(parts)
    results = write_results(table(measured, num_held_out), "three_views", name, root)
    plot_intervals(results / "plot.png", intervals(measured), "mean and range over the seeds")


# ------------------------------------------------------------------------------------------------- measuring
def measure(workspace: Workspace, params: Params, arm: Arm, seed: int, num_steps: int | None, num_held_out: int) -> pl.DataFrame:
    """One row per state and pair of views: ``when, one, other, cosine, retrieval, rung, seed`` (``rung`` is the arm)."""
    section, loss = params.train_adapter, params.train_adapter.loss
    adapter: AdapterParams = section.lora if arm.adapter == "lora" else section.moda
    device = prepare_torch(params.runtime)
    backbone = backbones.build(params.backbone, device)
    views = Views(workspace, params, backbone)
    rows = generator(seed, "held out").permutation(np.flatnonzero(views.source.has_image))
    held_out, trained_on = rows[:num_held_out], rows[num_held_out:]
    # a gate for every view in every arm, so that arms differ only by their training views
    model = untrained(backbone, adapter, VIEWS, seed).to(device)
    parts = [pairs(views, model, loss, held_out).with_columns(when=pl.lit("before"))]
    train(views, model, arm.views, params, trained_on, seed, num_steps)
    parts.append(pairs(views, model, loss, held_out).with_columns(when=pl.lit("after")))
    return pl.concat(parts).with_columns(rung=pl.lit(arm.name), seed=pl.lit(seed))


def train(
    views: Views, model: nn.Module, names: Sequence[str], params: Params, rows: np.ndarray, seed: int, num_steps: int | None
) -> None:
    """Train as in ``train_adapter``: AdamW, warm-up, clipped gradients, seeded batches without repeats within an epoch."""
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
    cosine_MM = gradient_products(
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
                "cosine": float(cosine_MM[VIEWS.index(one), VIEWS.index(other)]),
                "retrieval": retrieval_at_1(unit[one], unit[other]),
            }
            for one, other in PAIRS
        ]
    )


def retrieval_at_1(one_ND: Tensor, other_ND: Tensor) -> float:
    """Retrieval@1, mean of both directions."""
    similarity_NN = one_ND @ other_ND.T
    own = torch.arange(len(one_ND), device=one_ND.device)
    return float(torch.stack([(similarity_NN.argmax(dim) == own).float().mean() for dim in (0, 1)]).mean())


# ---------------------------------------------------------------------------------------------------- showing
def of_seeds(results: pl.DataFrame, column: str, arm: Arm, when: str, pair: tuple[str, str]) -> tuple[float, float, float]:
    """Mean and range over the seeds of one number."""
    return mean_and_range(results.filter(rung=arm.name, when=when, one=pair[0], other=pair[1])[column].to_list())


def table(results: pl.DataFrame, num_held_out: int) -> str:
    """A Markdown table: one row per arm and state, cosine and retrieval of every pair; mean and range over the seeds."""
    rows = []
    for arm, when in itertools.product(ARMS, WHEN):
        numbers = [of_seeds(results, column, arm, when, pair) for column in MEASURES for pair in PAIRS]
        rows.append([arm.name, when, *(f"{mean:+.3f} ({low:+.2f} .. {high:+.2f})" for mean, low, high in numbers)])
    heads = [f"{name} {one}, {other}" for name in ("cosine", "retrieval@1") for one, other in PAIRS]
    title = f"Three views, {results['seed'].n_unique()} seeds, {num_held_out} held-out items"
    title += f" (retrieval@1 by chance: {1 / num_held_out:.3f})"
    return markdown_table(["adapter, trained on", "state", *heads], rows, title)


def intervals(results: pl.DataFrame) -> Panels:
    """The numbers of :func:`table` for a plot: by measure and pair of views, by arm and state."""
    return {
        f"{title}: {pair[0]}, {pair[1]}": {
            f"{arm.name}, {when}": of_seeds(results, column, arm, when, pair) for arm, when in itertools.product(ARMS, WHEN)
        }
        for column, title in MEASURES.items()
        for pair in PAIRS
    }
