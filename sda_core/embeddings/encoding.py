"""One export: every block encoded by somebody, and all vectors put together."""

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
    """Encode every item with the engine that the params name.

    Args:
        backbone_params: of the backbone.
        adapter: folder of the adapter; None for the backbone as it is.
        source: the items.
        params: engine, batch and block sizes, whether to merge and to compile.
        resume: as in :func:`embed_items`.
        fingerprint: as in :func:`embed_items`.
        device: for the engine ``local``; the workers of a cluster choose their own.
        team: the processes of this launch.
        passes: as in :func:`embed_items`.

    Returns:
        The vectors; None in a process that is not the main one.

    Raises:
        ConfigError: as :func:`embed_items`; Ray is not installed, or is asked for in several processes.
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
    """Encode every item here, one kind of pass after the other; of N processes each takes every N-th block.

    Args:
        backbone: makes inputs and pools.
        model: ``backbone.model``, or the PEFT model around it; put into evaluation mode.
        source: the items.
        params: batch and block sizes; whether to compile.
        resume: folder of finished blocks, one for all processes; made where absent, and left to the caller to delete.
        fingerprint: of everything the vectors depend on besides these arguments (weights, adapter, prompts, images).
        device: where the model is.
        modality_context: what to enter around the passes of ``"image"`` and of ``"text"``, e.g. the adapter's modality;
            entered once a modality, and only where there is something left to encode.  For joint passes see
            :meth:`~sda_core.embeddings.blocks.BlockEncoder.around`.
        team: the processes that share the work.
        passes: the kinds of pass: a modality each, or ``joint`` for image and text in one sequence.

    Returns:
        The vectors; None in a process that is not the main one.

    Raises:
        ArtifactError: an image cannot be decoded.
        DataError: a vector is not finite.
        ConfigError: a batch does not fit into the device's memory, or the model cannot make a joint pass.
        SDAError: another process is gone.
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
