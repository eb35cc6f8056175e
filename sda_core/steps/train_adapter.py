"""Train the adapter of one variant: load the backbone, train, save the PEFT folder."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
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
from sda_core.sources import package_sources, sources_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@dataclass(frozen=True)
class AdapterTraining:
    """The training of one variant's adapter on items alone.

    Attributes:
        workspace: paths of the run.
        variant: name of the variant.
        section: adapter and loss of every variant, and the optimisation.
        backbone_params: section of the adapted model.
        items_params: section of the prompts.
        runtime: device and threads.
    """

    workspace: Workspace
    variant: str
    section: TrainAdapterParams
    backbone_params: BackboneParams
    items_params: ItemsParams
    runtime: RuntimeParams

    def measure(self) -> dict[str, float | None]:
        """Measure the backbone's vectors of a few hundred items as the loss uses them; trains and writes nothing.

        Returns:
            The figures of :class:`sda_core.alignment.check.Figures`, and the teacher's temperature if it was calibrated.

        Raises:
            ArtifactError: an input is missing or damaged.
            TrainingError, ConfigError: as :meth:`train`; or an uninformative teacher, if ``training.check`` is ``stop``.
        """
        training = self.section.training.model_copy(update={"num_steps": 0, "vision_cache": "never"})
        _, loss = self.section.of(self.variant)
        device = prepare_torch(self.runtime)
        source = item_source(self.workspace, self.items_params)
        backbone, model, _ = self._adapted(device)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.safetensors"
            curve = alignment.train_adapter(backbone, model, source, training, loss, checkpoint, "", device, ALONE, self._where)
        return {**asdict(curve.check.before), "teacher_temperature": curve.check.teacher_temperature}

    def train(self, team: Processes) -> dict[str, object]:
        """Train the adapter and save it; an interrupted run is resumed.

        Args:
            team: the processes of this launch, which share every batch; the main one saves.

        Returns:
            The counts for the closing line of the stage; empty in a process that is not the main one.

        Raises:
            ArtifactError: an input is missing or damaged.
            TrainingError, ConfigError: see :func:`sda_core.alignment.train_adapter` and :func:`sda_core.adapters.build`.
        """
        workspace, training = self.workspace, self.section.training
        with team.raise_on_all_ranks():
            adapter, loss = self.section.of(self.variant)
            device = team.device(prepare_torch(self.runtime))
            source = item_source(workspace, self.items_params)
            backbone, model, num_layers = self._adapted(device)
        parts = adapter, loss, training, self.backbone_params, self.items_params, workspace.items, workspace.images
        # include the revision, because a local checkpoint's files may change under the same name, and the code, because a
        # checkpoint of another version must not be resumed
        code = (*sources_of("sda_core.steps.train_adapter"), *package_sources("sda_core.backbones"))
        made_of = fingerprint(*parts, *code, backbone.info.revision).encode() if team.is_main else None
        inputs = team.broadcast_bytes(made_of).decode()
        scratch = workspace.resume("train_adapter", self.variant)
        checkpoint = scratch / "checkpoint.safetensors"
        records = alignment.train_adapter(backbone, model, source, training, loss, checkpoint, inputs, device, team, self._where)
        if not team.is_main:
            return {}
        with replace_directory(workspace.adapter(self.variant)) as folder:
            adapters.save(model, folder, backbone.info.name, backbone.info.revision)
            write_tsv(folder / "loss.tsv", records)
            write_json(folder / "check.json", records.check.metrics())
            write_json(folder / "check_details.json", records.check.details())
        shutil.rmtree(scratch, ignore_errors=True)
        last_loss = records[-1].loss if records else "none"
        counts: dict[str, object] = {"variant": self.variant, "adapted layers": num_layers, "steps": training.num_steps}
        counts["last loss"] = last_loss
        if records.first_step:  # the cost of this run is for its own steps only
            counts |= {"resumed after step": records.first_step, "steps of this run": training.num_steps - records.first_step}
        return counts

    @property
    def _where(self) -> str:
        """The loss section's path in the params, for messages."""
        return f"params.yaml: train_adapter.{self.section.variants[self.variant].loss}"

    def _adapted(self, device: torch.device) -> tuple[Backbone, PeftModel, int]:
        """The backbone, the model with an untrained adapter, and the number of adapted layers."""
        adapter, _ = self.section.of(self.variant)
        backbone = backbones.build(self.backbone_params, alignment.home(self.section.training, device))
        pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
        seed = self.section.training.seed
        return backbone, adapters.build(backbone.model, adapter, MODALITIES, pattern, num_layers, seed=seed), num_layers
