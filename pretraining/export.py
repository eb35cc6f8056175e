"""Write the trained model as a checkpoint folder: float16 weights, tokenizer, chat template, image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pretraining.common import CHECKPOINT, WORK, Work, settings
from pretraining.train import resume, start


def write_checkpoint(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint folder with all files that its loader needs.

    Args:
        model: the model; not changed.
        tokenizer: its tokenizer.
        folder: the folder to write.
        dtype: type of the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the output head is the token table, so it is stored once
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    # save_pretrained writes the dtype of the weights in memory, and a file that only its owner can read
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def main(
    work: Work = WORK,
    folder: Annotated[
        Path, typer.Option(help="Folder to write.", show_default="sda_core/backbones/nano of this clone")
    ] = CHECKPOINT,
    float32: Annotated[bool, typer.Option("--float32", help="Keep the weights in float32, for comparison.")] = False,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Export the model before its first step, for comparison.")
    ] = False,
) -> None:
    """Export the last saved state of the training."""
    model, heads, encoder, _ = start(work, settings())
    step = 0 if untrained else resume(work / "training.safetensors", model, heads, None)
    write_checkpoint(model, encoder.tokenizer, folder, torch.float32 if float32 else torch.float16)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"step {step}: {sum(weight.numel() for weight in model.parameters())} weights, {size / 1e6:.1f} MB in {folder}")
