"""Write nano 2 as a checkpoint folder, in float16.

python -m pretraining export_nano2 [--params FILE] [--folder FOLDER] [--untrained]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from pretraining.common import WORK, Work
from pretraining.export import write_checkpoint
from pretraining.train import resume
from pretraining.train_nano2 import first_model, nano2_settings


def main(
    params: Annotated[Path | None, typer.Option("--params", help="Settings that replace those of section nano2.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder to write; work/NAME/export by default.")] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Export the same model with random weights, for comparison.")
    ] = False,
    work: Work = WORK,
) -> None:
    """Export the last saved state of the training."""
    whole = nano2_settings(params)
    first = whole["nano2"]["start_from"]
    model, encoder, _ = first_model(work, whole, None if untrained or first is None else Path(first), turned=False)
    target = work / whole["nano2"]["name"]
    step = 0 if untrained else resume(target / "training.safetensors", model, nn.Module(), None)
    goal = folder or target / ("untrained" if untrained else "export")
    write_checkpoint(model, encoder.tokenizer, goal, torch.float16)
    size = sum(file.stat().st_size for file in goal.iterdir())
    print(f"step {step}: {sum(weight.numel() for weight in model.parameters())} weights, {size / 1e6:.1f} MB in {goal}")
