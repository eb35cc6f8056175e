"""The export of item vectors: encode all blocks, and assemble the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import torch
from torch import nn

from sda_core import backbones
from sda_core.adapters.saving import load
from sda_core.backbones import Backbone
from sda_core.embeddings.blocks import BlockEncoder, BlockFolder, EmbeddedItems, ModalityContext, blocks_of
from sda_core.errors import ConfigError
from sda_core.fingerprint import fingerprint as fingerprint_of
from sda_core.items import ItemSource
from sda_core.log import progress
from sda_core.modalities import MODALITIES, Pass
from sda_core.params import BackboneParams, ExportParams
from sda_core.processes import ALONE, Processes


def embed(
    backbone_params: BackboneParams,
    adapter: Path | None,
    source: ItemSource,
    params: ExportParams,
    resume: Path,
    fingerprint: str,
    device: torch.device,
    team: Processes,
    passes: Sequence[Pass] = MODALITIES,
) -> EmbeddedItems | None:
    """Encode every item with the engine of the params.

    Args:
        backbone_params: section of the backbone.
        adapter: folder of the adapter; None for the backbone alone.
        source: the items.
        params: engine, batch and block sizes, whether to merge and to compile.
        resume: as in :func:`embed_items`.
        fingerprint: as in :func:`embed_items`.
        device: device for the engine ``local``; the workers of a cluster choose their own.
        team: the processes of this launch.
        passes: as in :func:`embed_items`.

    Returns:
        The vectors; None in a process that is not the main one.

    Raises:
        ConfigError: as :func:`embed_items`; or Ray is not installed, or is used with several processes.
        ArtifactError, DataError, SDAError: as :func:`embed_items`.
    """
    match params.engine:
        case "local":
            backbone = backbones.build(backbone_params, device)
            model, context = load(backbone.model, adapter, merge=params.merge)
            return embed_items(backbone, model, source, params, resume, fingerprint, device, context, team, passes)
        case "ray":
            if team.count > 1:
                problem = f"is 'ray', which finds its own workers, but this is one of {team.count} processes"
                raise ConfigError("params.yaml: export_embeddings.engine", problem, "start one process, or use 'local'")
            from sda_core.embeddings.ray_engine import embed_with_ray

            return embed_with_ray(backbone_params, adapter, source, params, resume, fingerprint, device.type, passes)
        case _:
            assert_never(params.engine)


def embed_items(
    backbone: Backbone,
    model: nn.Module,
    source: ItemSource,
    params: ExportParams,
    resume: Path,
    fingerprint: str,
    device: torch.device,
    modality_context: ModalityContext,
    team: Processes = ALONE,
    passes: Sequence[Pass] = MODALITIES,
) -> EmbeddedItems | None:
    """Encode every item in this launch, one kind of pass after the other; of N processes each encodes every N-th block.

    Args:
        backbone: makes inputs and pools hidden states.
        model: ``backbone.model``, or the PEFT model around it; set to evaluation mode.
        source: the items.
        params: batch and block sizes; whether to compile.
        resume: folder of finished blocks, shared by all processes; created if missing; the caller deletes it.
        fingerprint: hash of everything on which the vectors depend besides these arguments (weights, adapter, prompts,
            images).
        device: device of the model.
        modality_context: makes the context for the passes of ``"image"`` and ``"text"``, e.g. the adapter's modality;
            entered once per modality, and only if blocks are missing.  For joint passes see
            :meth:`~sda_core.embeddings.blocks.BlockEncoder.around`.
        team: the processes that share the work.
        passes: the kinds of pass: modalities, or ``joint`` for image and text in one sequence.

    Returns:
        The vectors; None in a process that is not the main one.

    Raises:
        ArtifactError: an image cannot be decoded.
        DataError: a vector is not finite.
        ConfigError: a batch does not fit into the device's memory, or the model does not support a joint pass.
        SDAError: another process has ended.
    """
    encoder = BlockEncoder(backbone, model, params, device)
    encoder.check(passes)
    encoder.prepare()
    folder = BlockFolder(resume, fingerprint_of(fingerprint, repr(backbone.info), backbone.dim), source, params, passes)
    blocks = blocks_of(source, params.shard_rows, passes)
    unfinished = team.broadcast_flags(folder.unfinished(blocks) if team.is_main else None, len(blocks))
    own = [block for block, open_ in zip(blocks, unfinished, strict=True) if open_][team.index :: team.count]
    for name in passes:
        todo = [block for block in own if block.name == name]
        if not todo:
            continue
        around = encoder.around(name, modality_context)
        with around, progress(sum(len(b.rows) for b in todo), f"embed {name}", "items") as bar:
            for block in todo:
                folder.save(block, encoder.encode(source, name, block.rows))
                bar.update(len(block.rows))
    team.wait()
    if not team.is_main:
        return None
    return folder.assemble(source, blocks, int((~unfinished).sum()))
