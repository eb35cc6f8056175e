"""Import item vectors from a file as a variant."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def import_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Import item vectors from a file: join them to the shop's items by id, check them, and write them as a variant."""
    from sda_core.artifacts import ITEMS
    from sda_core.embeddings import table
    from sda_core.embeddings.fusion import fuse, seen_items
    from sda_core.exchange.vectors import read_vectors

    with stage("import-embeddings", root, params) as run:
        section, export = run.params.import_embeddings, run.params.export_embeddings
        path = run.workspace.root / section.of(variant).path
        items = ITEMS.read(run.workspace.items)
        ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
        found = read_vectors(path, raw_ids, section, export.normalize)
        fused = found.embedding
        if fused is None:
            assert found.image is not None
            assert found.text is not None
            fused = fuse(found.image, found.text, found.has_image, seen_items(run.workspace), export, has_text=found.has_text)
        described = found.metadata(path.name, export.fusion, export.normalize, fused.shape[1])
        target = run.workspace.embeddings(variant)
        table.write_embeddings(target, ids, raw_ids, found.image, found.text, fused, described, found.has_image, found.has_text)
        run.counts = {"variant": variant, "items": len(items), "width": fused.shape[1], "without a vector": found.num_missing}
        run.counts["rows of other items"] = found.num_other


if __name__ == "__main__":
    run_as_script(import_embeddings)
