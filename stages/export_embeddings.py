"""Item vectors: one pass a modality through the frozen model, then fusion.

Alone, or in several processes on one or more GPUs: ``torchrun --nproc-per-node 4 -m stages.export_embeddings --variant sda``
(``accelerate launch`` likewise).
"""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def export_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Write the item vectors of one variant; variant id has ids only, zero_shot is the backbone as it is."""
    import shutil

    import polars as pl

    from sda_core.artifacts import INTERACTIONS, ITEMS
    from sda_core.embeddings import table
    from sda_core.fetch.local_files import BACKBONE, watches
    from sda_core.fingerprint import fingerprint
    from sda_core.item_source import item_source
    from sda_core.processes import processes

    with stage("export-embeddings", root, params, check=watches(root, BACKBONE)) as run, processes() as team:
        target = run.workspace.embeddings(variant)
        items = ITEMS.read(run.workspace.items)
        ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
        if variant == "id":
            if team.is_main:
                table.write_ids_only(target, ids, raw_ids, {"content": "none"})
            run.counts = {"variant": variant, "items": len(items)}
            return
        from sda_core.embeddings.encoding import embed  # needs seconds for its imports
        from sda_core.embeddings.fusion import fuse
        from sda_core.runtime import prepare_torch
        from sda_core.variants import is_trained

        section, path = run.params.export_embeddings, run.workspace.adapter(variant)
        adapter = path if is_trained(run.params, variant) else None
        adapter_hash = fingerprint(adapter) if adapter else ""
        device = team.device(prepare_torch(run.params.runtime))
        source = item_source(run.workspace, run.params.items)
        inputs = fingerprint(run.params.backbone, run.params.items, run.workspace.items, run.workspace.images, adapter_hash)
        scratch = run.workspace.resume("export_embeddings", variant)
        embedded = embed(run.params.backbone, adapter, source, section, scratch, inputs, device, team)
        if embedded is None:
            return
        seen = INTERACTIONS.read(run.workspace.interactions).filter(pl.col("split") == "train")
        image_ID, text_ID = embedded.image_ID, embedded.text_ID
        fused = fuse(image_ID, text_ID, embedded.has_image, seen["item_id"].to_numpy(), section)
        dims = image_ID.shape[1], fused.shape[1]
        described = table.embedding_metadata(embedded.info, section, source.prompt_hash, adapter_hash, *dims)
        table.write_embeddings(target, embedded.item_ids, raw_ids, image_ID, text_ID, fused, described, embedded.has_image)
        shutil.rmtree(scratch, ignore_errors=True)
        run.counts = {"variant": variant, "items": len(items), "width": fused.shape[1]}


if __name__ == "__main__":
    run_as_script(export_embeddings)
