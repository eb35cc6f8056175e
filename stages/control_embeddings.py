"""Control vectors, as variants of their own: random, shuffled, one modality alone."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def control_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Make control vectors of the zero_shot ones: random, shuffled (on the wrong items), image_only or text_only."""
    from sda_core.artifacts import EMBEDDINGS
    from sda_core.embeddings import table
    from sda_core.embeddings.controls import control, kind_of, read_table
    from sda_core.embeddings.fusion import seen_items

    with stage("control-embeddings", root, params) as run:
        kind = kind_of(variant)
        path = run.workspace.embeddings("zero_shot")
        frame = EMBEDDINGS.read(path).sort("item_id")
        seen = seen_items(run.workspace)
        made = control(kind, read_table(path), seen, run.params.export_embeddings, run.params.control_embeddings.seed)
        described = table.read_metadata(path) | {"control": variant, "control_seed": str(run.params.control_embeddings.seed)}
        table.write_embeddings(
            run.workspace.embeddings(variant),
            frame["item_id"].to_numpy(),
            frame["raw_item_id"].to_list(),
            made.image_ID,
            made.text_ID,
            made.fused_IF,
            described,
            made.has_image,
        )
        run.counts = {"variant": variant, "items": len(frame), "width": made.fused_IF.shape[1]}


if __name__ == "__main__":
    run_as_script(control_embeddings)
