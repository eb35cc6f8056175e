"""``sda check-adapter``: check in minutes whether the loss of an adapter is informative on these items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, stage

Variant = Annotated[str, typer.Option("--variant", help="Name of a trained variant in params.yaml, for example sda.")]

# Explanation of each figure, in display order.
FIGURES = {
    "items": "items in the sample",
    "cosine_images": "mean cosine of the images of two items; near 1, all images are alike",
    "cosine_texts": "mean cosine of the texts of two items",
    "cosine_own_pair": "mean cosine of an item's image and text",
    "cosine_other_pair": "mean cosine of an item's image and another item's text",
    "rank_images": "effective number of directions in which the images differ",
    "rank_texts": "effective number of directions in which the texts differ",
    "retrieval": "retrieval@1 within a batch: share of items whose other modality is the nearest",
    "teacher_targets": "effective targets of the teacher; 1 means InfoNCE, the batch size means a uniform teacher",
    "teacher_temperature": "teacher temperature that gives teacher_targets",
}


def check_adapter(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Measure the backbone's embeddings of a few hundred items as a variant's loss gets them; trains nothing.

    Needs data/filtered and data/images (`dvc repro fetch_images`). The exit code is 1 if training would collapse the
    embeddings or have little effect, and train_adapter.training.check is stop.
    """
    from sda_core.steps.train_adapter import AdapterTraining

    with stage("check-adapter", root, params, keeps_cost=False) as run:
        sections = run.params.train_adapter, run.params.backbone, run.params.items, run.params.runtime
        found = AdapterTraining(run.workspace, variant, *sections).measure()
        for name, value in found.items():
            if value is not None:
                typer.echo(f"{value:10.4g}  {name}: {FIGURES[name]}")
        run.counts = {"variant": variant, "batch size": run.params.train_adapter.training.batch_size}
