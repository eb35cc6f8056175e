"""Item vectors: one pass a modality through the frozen model, then fusion."""

from __future__ import annotations

from pathlib import Path

from stages._stage import ParamsFile, Root, Variant, run_as_script, stage


def export_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Write the item vectors of one variant; variant id has ids only, zero_shot is the backbone as it is."""
    import shutil

    import polars as pl

    from sda_core import backbones, embeddings
    from sda_core.adapters.loading import load
    from sda_core.artifacts import INTERACTIONS, ITEMS
    from sda_core.fingerprint import fingerprint
    from sda_core.runtime import prepare_torch
    from stages._items import item_source

    with stage("export-embeddings", root, params) as run:
        target = run.workspace.embeddings(variant)
        items = ITEMS.read(run.workspace.items)
        if variant == "id":
            embeddings.write_ids_only(target, items["item_id"].to_numpy(), items["raw_item_id"].to_list(), {"content": "none"})
            run.counts = {"variant": variant, "items": len(items)}
            return
        section, path = run.params.export_embeddings, run.workspace.adapter(variant)
        device = prepare_torch(run.params.runtime)
        source = item_source(run.workspace, run.params.items)
        backbone = backbones.build(run.params.backbone, device)
        adapter = path if run.params.is_trained(variant) else None
        model, context = load(backbone.model, adapter)
        inputs = fingerprint(section, run.params.backbone, run.params.items, run.workspace.items, run.workspace.images, adapter)
        scratch = run.workspace.resume("export_embeddings", variant)
        embedded = embeddings.embed_items(backbone, model, source, section, scratch, inputs, device, context)
        seen = INTERACTIONS.read(run.workspace.interactions).filter(pl.col("split") == "train")
        fused = embeddings.fuse(embedded.image_ID, embedded.text_ID, embedded.has_image, seen["item_id"].to_numpy(), section)
        described = embeddings.embedding_metadata(
            backbone.info, section, source.prompt_hash, fingerprint(adapter) if adapter else "", backbone.dim, fused.shape[1]
        )
        raw_ids, image_ID, text_ID = items["raw_item_id"].to_list(), embedded.image_ID, embedded.text_ID
        embeddings.write_embeddings(target, embedded.item_ids, raw_ids, image_ID, text_ID, fused, described, embedded.has_image)
        shutil.rmtree(scratch, ignore_errors=True)
        run.counts = {"variant": variant, "items": len(items), "width": fused.shape[1]}


if __name__ == "__main__":
    run_as_script(export_embeddings)
