"""Write control vectors as variants: random, shuffled, one modality alone, the true attributes."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def control_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Write control vectors: random, shuffled, image_only, text_only, or an oracle (the built-in shop's true attributes)."""
    from sda_core.artifacts import EMBEDDINGS
    from sda_core.embeddings import table
    from sda_core.embeddings.controls import kind_of, make

    with stage("control-embeddings", root, params) as run:
        kind = kind_of(variant)
        made, described = make(kind, run.workspace, run.params.export_embeddings, run.params.control_embeddings.seed)
        frame = EMBEDDINGS.read(run.workspace.embeddings("zero_shot")).sort("item_id")
        table.write_embeddings(
            run.workspace.embeddings(variant),
            frame["item_id"].to_numpy(),
            frame["raw_item_id"].to_list(),
            made.image_ID,
            made.text_ID,
            made.fused_IF,
            described,
            made.has_image,
            made.has_text,
        )
        run.counts = {"variant": variant, "items": len(frame), "width": made.fused_IF.shape[1]}


if __name__ == "__main__":
    run_as_script(control_embeddings)
