"""Compare geometries of the loss: learning, collapse and forgetting.

The vectors of a backbone trained to predict the next token share one large direction, so the teacher of CMSA is nearly uniform.
This experiment trains the same MoDA adapter with several geometries of the loss and measures, at each number of steps, on all
items of the built-in shop:

* retrieval@1 among all items (mean of both directions), by cosines of embeddings without the mean of their modality, as used by
  PCA in the fusion, and by cosines of the unchanged embeddings,
* effective targets of the teacher, mean cosine of two items, whether the vectors collapsed, and whether ``check: stop`` stops
  the training (sda_core.alignment.check),
* linear probes of the attributes that a modality shows, as accuracy above chance (experiments.attribute_probe), of those that
  only this modality shows, and of the latter in fused embeddings, without and with the backbone's vectors (``with_base``).

Step 0 is the backbone without adapter.  ``mismatched`` is the negative control: every image is paired with another item's text.
``infonce``, which has no teacher, is the positive control where the paper's formula is not known to learn.
``trained`` is the paper's formula with a gradient through the teacher.  ``detached_N`` and ``trained_N`` are the same without and
with that gradient, at the temperature at which the teacher has N effective targets before step 0; ``centred_N`` is ``detached_N``
with ``center: batch``.  ``reference_T`` is the public code's loss whose temperature starts at T.
A cell (backbone, geometry, seed) is trained once; existing results are kept, and an interrupted run resumes.  The table is
written to experiments/results/loss_geometry-NAME, which `sda report --experiments` shows.

    python -m experiments loss_geometry --name nano --num-steps 100 --seeds 1,2,3
    python -m experiments loss_geometry --name generative --backbone generative=FILE --num-steps 100,300
    python -m experiments loss_geometry --name shifted --backbone tiny=conf/backbone/tiny.yaml --shift 4 --swatches

The vectors of a random backbone contain little of the shop's images.  With --swatches the items are simple enough for it
(experiments.swatches).

FILE is a section of the params for a backbone, such as the files in conf/backbone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from experiments import swatches as colours
from experiments.attribute_probe import SHOWN_BY, above_chance
from experiments.corruption import partners
from experiments.families import read_backbones
from experiments.options import THREE_SEEDS, Name, Seeds, Source
from experiments.study import (
    check_ascending,
    check_names,
    logger,
    markdown_table,
    mean_with_range,
    mutual_retrieval_at_1,
    shop_attributes,
    write_results,
)
from experiments.workspaces import project_params, untrained
from sda_core import alignment, backbones, losses
from sda_core.adapters import modality
from sda_core.alignment import check
from sda_core.artifacts import Workspace, write_json
from sda_core.backbones import Backbone
from sda_core.checkpoint import load_checkpoint, save_checkpoint
from sda_core.cli.scripts import Names, Numbers, names, numbers
from sda_core.embeddings.blocks import BlockEncoder
from sda_core.embeddings.fusion import fuse
from sda_core.errors import ConfigError, TrainingError
from sda_core.fingerprint import fingerprint
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.modalities import MODALITIES
from sda_core.params import BackboneParams, DemoDataset, ExportParams, LossParams, Params, TrainingParams
from sda_core.runtime import prepare_torch
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

REFERENCE = {
    "variant": "reference",
    "temperature": 3.0,
    "learn_temperature": True,
    "detach_teacher": False,
    "normalize": False,
    "center": "none",
}
"""The public code: dot products of unnormalised vectors, and a learned temperature that starts at 3."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "infonce": {"teacher": "none", "center": "none"},  # a positive control
    "cosine": {"center": "none"},  # the paper's formula
    "centred": {"center": "batch"},
    "reference": REFERENCE,
    "base": {"center": "none", "teacher_source": "base"},
    "base_4": {"center": "none", "teacher_source": "base", "teacher_targets": 4.0},
    "centred_base_4": {"center": "batch", "teacher_source": "base", "teacher_targets": 4.0},
    "mismatched": {"center": "batch"},  # the negative control: see mismatched
    "keep": {"center": "none", "keep_base": 1.0},  # the paper's formula and the term that keeps each modality's structure
}
SOFTNESS = (2, 4, 8, 12, 16, 24)
"""Effective targets of the teacher before step 0, for the geometries that look for the softest teacher that does not collapse."""

LIMITS: dict[str, dict[str, Any]] = {
    "trained": {"center": "none", "detach_teacher": False},
    "trained_centred": {"center": "batch", "detach_teacher": False},
    **{f"detached_{targets}": {"center": "none", "teacher_targets": float(targets)} for targets in SOFTNESS},
    **{f"centred_{targets}": {"center": "batch", "teacher_targets": float(targets)} for targets in SOFTNESS},
    **{
        f"trained_{targets}": {"center": "none", "teacher_targets": float(targets), "detach_teacher": False}
        for targets in SOFTNESS
    },
    **{f"reference_{sharpness}": REFERENCE | {"temperature": float(sharpness)} for sharpness in (5, 8, 12, 20, 30)},
}
"""The paper's formula with a softer teacher, without and with a gradient through it, and the public code with a sharper one."""
TRAINING = {"learning_rate": 1e-3, "check": "warn"}  # from conf/adaptation/strong.yaml, the setting of most adapters here
SAMPLE = 256


def main(
    name: Name,
    source: Source = Path(),
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Backbones; default: that of params.yaml.  Repeat it for more.", show_default=False
        ),
    ] = None,
    geometries: Annotated[
        Names, typer.Option("--geometries", parser=names, metavar="A,B,...", help="Geometries of the loss to compare.")
    ] = Names(tuple(GEOMETRIES)),  # those of LIMITS only on request
    seeds: Seeds = THREE_SEEDS,
    num_steps: Annotated[
        Numbers,
        typer.Option(
            "--num-steps", parser=numbers, metavar="100,300", help="Numbers of steps after which to measure, ascending."
        ),
    ] = Numbers((100, 300)),
    shift: Annotated[
        float, typer.Option(help="Length of a constant added to all embeddings, in units of their mean distance to their centre.")
    ] = 0.0,
    swatches: Annotated[
        bool, typer.Option("--swatches", help="Items of one colour each instead of the shop's, for a random backbone.")
    ] = False,
) -> None:
    """Train and measure what is missing; write the table."""
    check_names("--geometries", geometries, [*GEOMETRIES, *LIMITS])
    check_ascending("--num-steps", num_steps)
    params = project_params(source, "--source")
    sections = read_backbones(backbone) if backbone else {params.backbone.kind: params.backbone.model_dump()}
    items = of_swatches() if swatches else of_shop(Workspace(source), params)
    folder = Path("experiments") / "runs" / f"loss_geometry-{name}"
    done: dict[tuple[str, str], list[list[dict[str, float]]]] = {}
    for seed in seeds:
        for geometry in geometries:
            for arm, section in sections.items():
                cell = Cell(folder / arm, geometry, seed, shift)
                measured = cell.run(items, params.model_copy(update={"backbone": section_of(params, section)}), num_steps)
                done.setdefault((arm, geometry), []).append(measured)
    title = f"Geometry of the loss, {len(seeds)} seeds" + (f", one constant of {shift:g} added" if shift else "")
    write_results(table(done, title), "loss_geometry", name)


def section_of(params: Params, section: Mapping[str, Any]) -> BackboneParams:
    """A backbone's section, validated like that of the params."""
    return Params.model_validate(params.model_dump() | {"backbone": dict(section)}).backbone


@dataclass(frozen=True)
class Items:
    """The items for training and measurement.

    Attributes:
        source: the items.
        rows: rows of the items with an image, which are measured.
        attributes: true attributes, ``(N,)`` values of these rows by attribute.
        shown_by: ``image``, ``text`` or ``both``, by attribute.
        inputs: fingerprint of the items.
    """

    source: ItemSource
    rows: np.ndarray
    attributes: Mapping[str, np.ndarray]
    shown_by: Mapping[str, str]
    inputs: str

    def shown(self, *by: str) -> list[str]:
        """The attributes that these modalities show, in order."""
        return [name for name, shown_by in self.shown_by.items() if shown_by in by]


def of_shop(workspace: Workspace, params: Params) -> Items:
    """The items of a run on the built-in shop.

    Raises:
        ConfigError: the run has another dataset.
    """
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError("params.yaml: dataset.source", "the truth is known of the built-in shop only", "use dataset=demo")
    source = item_source(workspace, params.items)
    rows = np.flatnonzero(source.has_image)
    truth = {name: values_I[rows] for name, values_I in shop_attributes(workspace, params.dataset).items()}
    return Items(source, rows, truth, SHOWN_BY, fingerprint(workspace.items, workspace.images, params.items))


def of_swatches() -> Items:
    """The items of :mod:`experiments.swatches`."""
    source = colours.source()
    rows = np.arange(len(source))
    inputs = fingerprint(*(str(key) for key in source.content_keys(rows)))
    return Items(source, rows, colours.attributes(), colours.SHOWN_BY, inputs)


class Cell:
    """One backbone, geometry and seed.

    Args:
        folder: folder of the backbone, which contains the cell's files.
        geometry: name in :data:`GEOMETRIES` or :data:`LIMITS`.
        seed: seed of the adapter and its training.
        shift: see :class:`Shifted`; 0 for none.
    """

    def __init__(self, folder: Path, geometry: str, seed: int, shift: float) -> None:
        self.folder = folder / geometry / f"seed-{seed}"
        self.base = folder / "base.json"
        self.geometry = geometry
        self.seed = seed
        self.shift = shift

    def run(self, items: Items, params: Params, num_steps: Sequence[int]) -> list[dict[str, float]]:
        """The measurements at step 0 and after each number of steps, read from disk if they exist."""
        section = params.train_adapter
        loss = LossParams.model_validate(section.loss.model_dump() | (GEOMETRIES | LIMITS)[self.geometry])
        training = section.training.model_copy(update={**TRAINING, "seed": self.seed})
        inputs = fingerprint(items.inputs, loss, training, section.moda, params.backbone, self.shift)
        of_base = fingerprint(items.inputs, params.backbone, self.shift)
        paths = {steps: self.folder / f"{steps}.json" for steps in num_steps}
        found = {0: self._kept(self.base, of_base)} | {steps: self._kept(path, inputs) for steps, path in paths.items()}
        if None in found.values():
            device = prepare_torch(params.runtime)
            backbone = backbones.build(params.backbone, device)
            model = untrained(backbone, section.moda, MODALITIES, self.seed)
            encoder = Shifted(backbone, self.shift, model, items.source, device) if self.shift else backbone
            kept = load_checkpoint(self.base.with_suffix(".safetensors"), of_base)
            if kept is None or found[0] is None:  # an untrained adapter has no effect
                base = embed(encoder, model, items, params.export_embeddings, device)
                save_checkpoint(self.base.with_suffix(".safetensors"), base, {}, of_base)
                found[0] = self._save(self.base, of_base, measure(base, base, items, params.export_embeddings))
            else:
                base, _ = kept
            source = mismatched(items.source, self.seed) if self.geometry == "mismatched" else items.source
            for steps in num_steps:
                if found[steps] is None:
                    logger.info("%s, seed %d, %d steps", self.geometry, self.seed, steps)
                    looked = self._train(encoder, model, source, training, loss, steps, inputs, device)
                    vectors = embed(encoder, model, items, params.export_embeddings, device)
                    measured = measure(vectors, base, items, params.export_embeddings)
                    found[steps] = self._save(paths[steps], inputs, measured | looked)
        return [one for one in found.values() if one is not None]

    def _train(
        self,
        encoder: Any,
        model: nn.Module,
        source: ItemSource,
        training: TrainingParams,
        loss: LossParams,
        steps: int,
        inputs: str,
        device: torch.device,
    ) -> dict[str, float]:
        """Train up to a step, from the checkpoint of fewer steps, because the rate is constant after the warm-up."""
        training = training.model_copy(update={"num_steps": steps})
        checkpoint = self.folder / "checkpoint.safetensors"
        curve = alignment.train_adapter(encoder, model, source, training, loss, checkpoint, inputs, device)
        refused = float(_is_stopped(curve.check.before, training, loss))
        return {"steps": steps, "last_loss": curve[-1].loss, "refused": refused} | curve.check.metrics()

    @staticmethod
    def _kept(path: Path, inputs: str) -> dict[str, float] | None:
        """The content of a file if it was measured with the same inputs."""
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["measured"] if kept["inputs"] == inputs else None

    @staticmethod
    def _save(path: Path, inputs: str, measured: dict[str, float]) -> dict[str, float]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"inputs": inputs, "measured": measured})
        return measured


def _is_stopped(before: check.Figures, training: TrainingParams, loss: LossParams) -> bool:
    """Whether ``train_adapter.training.check: stop`` would have stopped the training before step 0."""
    stopping = training.model_copy(update={"check": "stop"})
    try:
        check.check(before, losses.build(loss), loss, stopping, "params.yaml: train_adapter.loss", say=False)
    except TrainingError:
        return True
    return False


def mismatched(source: ItemSource, seed: int) -> ItemSource:
    """The items with exchanged texts: every text moves by one position along a seeded cycle of all items."""
    partner = partners(generator(seed, "mismatched"), len(source))
    return ItemSource(
        source.item_ids, source.texts(partner), source.image_prompt, source.prompt_hash, source.store, "placeholder"
    )


class Shifted:
    """A backbone with a constant added to its embeddings: a large direction that all of them share.

    Args:
        backbone: the backbone.
        shift: length of the constant, as a multiple of the root mean square distance of embeddings to their centre.
        model: model for the embeddings of a sample, from which that distance is computed.
        source: the items.
        device: device of the constant.
    """

    def __init__(self, backbone: Backbone, shift: float, model: nn.Module, source: ItemSource, device: torch.device) -> None:
        self._backbone = backbone
        rows = np.flatnonzero(source.has_image)[:SAMPLE]
        model.eval()
        with torch.no_grad(), modality(model, "text"):
            inputs = backbone.text_inputs(source.texts(rows))
            text_BD = backbone.encode(model, {name: tensor.to(device) for name, tensor in inputs.items()})
        distance = float((text_BD - text_BD.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        direction_D = generator(0, "shift").normal(size=text_BD.shape[1])
        constant_D = shift * distance * direction_D / np.linalg.norm(direction_D)
        self._constant_D = torch.tensor(constant_D, dtype=text_BD.dtype, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled embeddings ``(B, D)`` with the constant."""
        return self._backbone.encode(model, inputs) + self._constant_D


# ------------------------------------------------------------------------------------------------- numbers
def embed(encoder: Any, model: nn.Module, items: Items, export: ExportParams, device: torch.device) -> dict[str, Tensor]:
    """Embeddings ``(N, D)`` of the items with an image, by modality."""
    blocks = BlockEncoder(encoder, model, export, device)
    blocks.prepare()
    vectors: dict[str, Tensor] = {}
    for name in MODALITIES:
        with modality(model, name):
            vectors[name] = blocks.encode(items.source, name, items.rows).vectors_BD
    return vectors


def measure(
    of_items: Mapping[str, Tensor], of_base: Mapping[str, Tensor], items: Items, export: ExportParams
) -> dict[str, float]:
    """Retrieval over all items with an image, and the probes.

    Args:
        of_items: embeddings ``(N, D)`` by modality.
        of_base: the same for the backbone without its adapter.
        items: the items with their true attributes.
        export: settings of the fusion, with at most a quarter as many components as items; it is fitted on all items, because
            there are no interactions here.
    """
    vectors, base = ({name: of[name].numpy() for name in MODALITIES} for of in (of_items, of_base))
    image_ND, text_ND = (unit_rows(vectors[name] - vectors[name].mean(axis=0)) for name in MODALITIES)
    measured = {"retrieval@1": mutual_retrieval_at_1(image_ND, text_ND)}
    image_ND, text_ND = (unit_rows(vectors[name]) for name in MODALITIES)
    measured["retrieval@1 with the mean"] = mutual_retrieval_at_1(image_ND, text_ND)

    def probe(label: str, vectors_ND: np.ndarray, attributes: Sequence[str]) -> dict[str, float]:
        return {f"probe {label} {name}": above_chance(vectors_ND, items.attributes[name]) for name in attributes}

    for name in MODALITIES:
        probes = probe(name, vectors[name], items.shown(name, "both"))
        measured |= probes | {f"probes {name}": float(np.mean(list(probes.values())))}
        measured[f"own {name}"] = float(np.mean([probes[f"probe {name} {attribute}"] for attribute in items.shown(name)]))
    every = np.arange(len(items.rows))
    # A probe with about as many columns as rows fits noise, and its accuracy is meaningless.
    export = export.model_copy(update={"fused_dim": min(export.fused_dim, len(every) // 4)})
    for label, beside in {"fused": None, "with base": (base["image"], base["text"])}.items():
        fused_NF = fuse(vectors["image"], vectors["text"], np.ones(len(every), dtype=bool), every + 1, export, beside)
        probes = probe(label, fused_NF, items.shown(*MODALITIES))
        measured |= probes | {f"own {label}": float(np.mean(list(probes.values())))}
    return measured


def table(done: Mapping[tuple[str, str], Sequence[Sequence[Mapping[str, float]]]], title: str) -> str:
    """Two Markdown tables: one row per backbone, geometry and number of steps; means over the seeds with their range.

    Args:
        done: measurements by backbone and geometry, for each seed, at step 0 and at each number of steps.
        title: title of the table.
    """
    rows, others, seen = [], [], set[str]()
    for (arm, geometry), of_seeds in done.items():
        at_first, *later = zip(*of_seeds, strict=True)
        before = [one | {name: later[0][seed][f"{name}_before"] for name in COSINES} for seed, one in enumerate(at_first)]
        if arm not in seen:
            rows.append([arm, "none", "0", "", *_cells(FIGURES, before), "", ""])
            others.append([arm, "none", "0", *_cells(PROBES, before)])
            seen.add(arm)
        for at in later:
            after = [one | {name: one[f"{name}_after"] for name in COSINES} for one in at]
            targets = [np.mean([one[f"effective_targets_{when}"] for one in at]) for when in ("before", "after")]
            counts = [f"{sum(one[name] for one in at):.0f} of {len(at)}" for name in ("collapsed", "refused")]
            first = [arm, geometry, f"{at[0]['steps']:.0f}"]
            rows.append([*first, f"{targets[0]:.2f} -> {targets[1]:.2f}", *_cells(FIGURES, after), *counts])
            others.append([*first, *_cells(PROBES, after)])
    heads = ["backbone", "geometry", "steps"]
    figures = markdown_table([*heads, "effective targets", *FIGURES.values(), "collapsed", "stopped"], rows, title)
    probes = markdown_table([*heads, *PROBES.values()], others, f"{title}: probes, accuracy above chance")
    return f"{figures}\n{probes}"


COSINES = ("image_cosine", "text_cosine")
FIGURES = {
    "retrieval@1": "retrieval@1",
    "retrieval@1 with the mean": "with the mean",
    "image_cosine": "cosine of two images",
    "text_cosine": "of two texts",
}
PROBES = {
    "probes image": "images",
    "probes text": "texts",
    "own image": "images, image-only attributes",
    "own text": "texts, text-only attributes",
    "own fused": "fused, attributes of one modality",
    "own with base": "fused with base, attributes of one modality",
}


def _cells(names: Mapping[str, str], at: Sequence[Mapping[str, float]]) -> list[str]:
    """Means over the seeds, followed by the range if they differ."""
    return [mean_with_range([one[name] for one in at], 3) for name in names]
