"""One variant's adapter, from the backbone to the saved PEFT folder."""

from __future__ import annotations

import shutil

from sda_core import adapters, alignment, backbones
from sda_core.artifacts import Workspace, replace_directory, write_json, write_tsv
from sda_core.fingerprint import fingerprint
from sda_core.item_source import item_source
from sda_core.modalities import MODALITIES
from sda_core.params import BackboneParams, ItemsParams, RuntimeParams, TrainAdapterParams
from sda_core.processes import Processes
from sda_core.runtime import prepare_torch


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
        backbone = backbones.build(backbone_params, alignment.home(training, device))
        pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
        model = adapters.build(backbone.model, adapter, MODALITIES, pattern, num_layers, seed=training.seed)
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
