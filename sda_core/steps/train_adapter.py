"""One variant's adapter, from the backbone to the saved PEFT folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sda_core import adapters, alignment, backbones
from sda_core.artifacts import Workspace, replace_directory, write_json, write_tsv
from sda_core.backbones import Backbone
from sda_core.fingerprint import fingerprint
from sda_core.item_source import item_source
from sda_core.modalities import MODALITIES
from sda_core.params import BackboneParams, ItemsParams, RuntimeParams, TrainAdapterParams
from sda_core.processes import ALONE, Processes
from sda_core.runtime import prepare_torch

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def look(
    workspace: Workspace,
    variant: str,
    section: TrainAdapterParams,
    backbone_params: BackboneParams,
    items_params: ItemsParams,
    runtime: RuntimeParams,
) -> dict[str, float | None]:
    """What the backbone's vectors of a few hundred items look like to a variant's loss; nothing is trained or written.

    Args:
        workspace: of the run.
        variant: its name.
        section: adapter and loss of every variant, and the optimisation.
        backbone_params: of the model that would be adapted.
        items_params: what the backbone is shown.
        runtime: device and threads.

    Returns:
        The figures of :class:`sda_core.alignment.check.Figures`, and the teacher's temperature where one was looked for.

    Raises:
        ArtifactError: an input is missing or damaged.
        TrainingError, ConfigError: as :func:`train`; a teacher that has nothing to teach, where ``training.check`` is ``stop``.
    """
    training = section.training.model_copy(update={"num_steps": 0, "vision_cache": "never"})
    _, loss = section.of(variant)
    device = prepare_torch(runtime)
    source = item_source(workspace, items_params)
    backbone, model, _ = _adapted(section, variant, backbone_params, device)
    where = f"params.yaml: train_adapter.{section.variants[variant].loss}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.safetensors"
        curve = alignment.train_adapter(backbone, model, source, training, loss, checkpoint, "", device, ALONE, where)
    found = {name.removeprefix("before_"): value for name, value in curve.check.items() if not name.startswith("after_")}
    del found["collapsed"]
    return found


def _adapted(
    section: TrainAdapterParams, variant: str, params: BackboneParams, device: torch.device
) -> tuple[Backbone, PeftModel, int]:
    """The backbone, the model with an untrained adapter, and how many layers that adapts."""
    adapter, _ = section.of(variant)
    backbone = backbones.build(params, alignment.home(section.training, device))
    pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    return (
        backbone,
        adapters.build(backbone.model, adapter, MODALITIES, pattern, num_layers, seed=section.training.seed),
        num_layers,
    )


def train(
    workspace: Workspace,
    variant: str,
    section: TrainAdapterParams,
    backbone_params: BackboneParams,
    items_params: ItemsParams,
    runtime: RuntimeParams,
    team: Processes,
) -> dict[str, object]:
    """Train an adapter on items alone and save it; an interrupted run is resumed.

    Args:
        workspace: of the run.
        variant: its name.
        section: adapter and loss of every variant, and the optimisation.
        backbone_params: of the model that is adapted.
        items_params: what the backbone is shown.
        runtime: device and threads.
        team: the processes of this launch, which share every batch; the main one saves.

    Returns:
        What the stage says at its end; nothing in a process that is not the main one.

    Raises:
        ArtifactError: an input is missing or damaged.
        TrainingError, ConfigError: see :func:`sda_core.alignment.train_adapter` and :func:`sda_core.adapters.build`.
    """
    with team.raise_on_all_ranks():
        training = section.training
        adapter, loss = section.of(variant)
        device = team.device(prepare_torch(runtime))
        source = item_source(workspace, items_params)
        backbone, model, num_layers = _adapted(section, variant, backbone_params, device)
    parts = adapter, loss, training, backbone_params, items_params, workspace.items, workspace.images
    # the revision, since a local checkpoint's files may change under one name
    inputs = team.broadcast_bytes(fingerprint(*parts, backbone.info.revision).encode() if team.is_main else None).decode()
    scratch = workspace.resume("train_adapter", variant)
    checkpoint = scratch / "checkpoint.safetensors"
    where = f"params.yaml: train_adapter.{section.variants[variant].loss}"
    records = alignment.train_adapter(backbone, model, source, training, loss, checkpoint, inputs, device, team, where)
    if not team.is_main:
        return {}
    with replace_directory(workspace.adapter(variant)) as folder:
        adapters.save(model, folder, backbone.info.name, backbone.info.revision)
        write_tsv(folder / "loss.tsv", records)
        write_json(folder / "check.json", records.check)
    shutil.rmtree(scratch, ignore_errors=True)
    last_loss = records[-1].loss if records else "none"
    counts: dict[str, object] = {"variant": variant, "adapted layers": num_layers, "steps": training.num_steps}
    counts["last loss"] = last_loss
    if records.first_step:  # the cost of this run is that of its own steps
        counts |= {"resumed after step": records.first_step, "steps of this run": training.num_steps - records.first_step}
    return counts
