"""Write nano_lvlm as a checkpoint folder: ``pretraining/nano_lvlm``, which ``-S backbone=nano_lvlm`` loads.

The DVC stage exports to ``work/nano_lvlm`` instead: DVC would join both pipelines if the main one read an output of this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from pretraining.common import HERE, WORK, Work, settings, tower_folder
from pretraining.export import write_checkpoint
from pretraining.train import resume
from pretraining.train_lvlm import Learner


def main(
    work: Work = WORK,
    folder: Path = HERE / "nano_lvlm",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Export the model before its first step, for comparison.")
    ] = False,
) -> None:
    """Export the last saved state of the training."""
    params = settings()
    learner = Learner.first(params, tower_folder(params))
    step = 0 if untrained else resume(work / "lvlm_training.safetensors", learner.model, nn.Identity(), None)
    write_checkpoint(learner.model, learner.reader.tokenizer, folder, torch.float16)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"step {step}: {sum(weight.numel() for weight in learner.model.parameters())} weights, {size / 1e6:.1f} MB in {folder}")
