"""Export the item vectors of one variant: load the adapter, encode the items, write the table."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sda_core.artifacts import ITEMS, Workspace
from sda_core.embeddings import table
from sda_core.fingerprint import fingerprint
from sda_core.item_source import item_source
from sda_core.modalities import JOINT, Pass
from sda_core.params import BackboneParams, ExportParams, ItemsParams, RuntimeParams
from sda_core.processes import Processes
from sda_core.sources import package_sources, sources_of


def export(
    workspace: Workspace,
    variant: str,
    adapter: Path | None,
    backbone: BackboneParams,
    items_params: ItemsParams,
    params: ExportParams,
    runtime: RuntimeParams,
    team: Processes,
    passes: Sequence[Pass],
) -> dict[str, object]:
    """Encode every item, fuse its vectors, and write the table (with ids only for ``id``); an interrupted run is resumed.

    Args:
        workspace: paths of the run.
        variant: name of the variant.
        adapter: folder of its adapter; None for the backbone alone.
        backbone: section of the backbone.
        items_params: section of the prompts.
        params: settings of encoding and fusion.
        runtime: device and threads.
        team: the processes of this launch, which share the blocks; the main one writes.
        passes: the kinds of pass: modalities, or ``joint``, for which the table has one vector per item.

    Returns:
        The counts for the closing line of the stage; empty in a process that is not the main one.

    Raises:
        ArtifactError: an input is missing or damaged.
        SDAError: see :func:`sda_core.embeddings.encoding.embed`.
    """
    if variant == "id":  # recommenders use interactions only: no model, no images
        return _write_ids(workspace, variant, team)
    from sda_core.embeddings.encoding import embed  # the import takes seconds
    from sda_core.embeddings.fusion import fuse, fuse_joint, seen_items
    from sda_core.runtime import prepare_torch

    adapter_hash = fingerprint(adapter) if adapter else ""
    device = team.device(prepare_torch(runtime))
    source = item_source(workspace, items_params)
    # blocks of another version of the code must not be reused
    code = (*sources_of("sda_core.steps.export_embeddings"), *package_sources("sda_core.backbones"))
    inputs = fingerprint(backbone, items_params, workspace.items, workspace.images, adapter_hash, *code)
    scratch = workspace.resume("export_embeddings", variant)
    embedded = embed(backbone, adapter, source, params, scratch, inputs, device, team, passes)
    if embedded is None:
        return {}
    seen, joint, has_image, has_text = seen_items(workspace), passes == JOINT, embedded.has_image, embedded.has_text
    image_ID = text_ID = None
    if joint:
        fused_IF = fuse_joint(embedded.joint_ID, seen, params)
    else:
        image_ID, text_ID = embedded.image_ID, embedded.text_ID
        base = table.read_modalities(workspace.embeddings("zero_shot")) if adapter and params.with_base else None
        fused_IF = fuse(image_ID, text_ID, has_image, seen, params, base, has_text)
    dims = embedded.dim, fused_IF.shape[1]
    described = table.embedding_metadata(embedded.info, params, source.prompt_hash, adapter_hash, *dims, joint=joint)
    raw_ids = ITEMS.read(workspace.items)["raw_item_id"].to_list()
    target = workspace.embeddings(variant)
    table.write_embeddings(target, embedded.item_ids, raw_ids, image_ID, text_ID, fused_IF, described, has_image, has_text)
    shutil.rmtree(scratch, ignore_errors=True)
    return {"variant": variant, "items": len(raw_ids), "width": fused_IF.shape[1]}


def _write_ids(workspace: Workspace, variant: str, team: Processes) -> dict[str, object]:
    items = ITEMS.read(workspace.items)
    if team.is_main:
        ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
        table.write_ids_only(workspace.embeddings(variant), ids, raw_ids, {"content": "none"})
    return {"variant": variant, "items": len(items)}
