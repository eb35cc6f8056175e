"""Measure training steps of the stage train_adapter: seconds, items per second and memory, by adapter and by setting.

Images are decoded, texts are tokenised, and the losses, AdamW, gradient caching, checkpointing and the vision cache are
those of ``sda_core.alignment``; the weights are random, which costs the same as trained ones.  Each setting trains a separate
adapter in a separate process.  The first steps are for warm-up and do not count; a setting that does not fit is reported.

    python -m bench adapter_training                                 # the tiny shape, on the CPU or the GPU
    python -m bench adapter_training --shape 7b --side 256           # Qwen2.5-VL-7B's shape, bfloat16 on a GPU; one or two
                                                                     # minutes per setting
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.common import default_params, in_own_process
from bench.shapes import Noise, backbone_of
from sda_core import adapters, alignment
from sda_core.backbones import Backbone
from sda_core.cli.scripts import Numbers, numbers
from sda_core.items import ItemSource
from sda_core.params import RuntimeParams
from sda_core.runtime import prepare_torch

WARM_UP = 2


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    adapter: str
    loss: str
    changes: dict[str, Any]
    loss_changes: dict[str, Any] = field(default_factory=dict[str, Any])


SETTINGS = (
    Setting("LoRA, InfoNCE", "lora", "infonce", {}),
    Setting("MoDA, CMSA", "moda", "loss", {}),
    Setting("MoDA, CMSA, no vision cache", "moda", "loss", {"vision_cache": "never"}),
    Setting("MoDA, CMSA, micro batch 16", "moda", "loss", {"micro_batch_size": 16}),
    Setting("MoDA, CMSA, micro batch 8", "moda", "loss", {"micro_batch_size": 8}),
    Setting("MoDA, CMSA, micro batch 4", "moda", "loss", {"micro_batch_size": 4}),
    Setting("LoRA, InfoNCE, micro batch 4", "lora", "infonce", {"micro_batch_size": 4}),
    Setting("MoDA, CMSA, checkpointing", "moda", "loss", {"gradient_checkpointing": True}),
    Setting("LoRA, InfoNCE, checkpointing", "lora", "infonce", {"gradient_checkpointing": True}),
    Setting("MoDA, CMSA, micro batch 4, checkpointing", "moda", "loss", {"micro_batch_size": 4, "gradient_checkpointing": True}),
    Setting("MoDA, CMSA, base vectors as teacher", "moda", "loss", {}, {"teacher_source": "base"}),
    Setting("MoDA, CMSA, keep_base 0.5", "moda", "loss", {}, {"keep_base": 0.5}),
)


def main(
    shape: Annotated[Literal["tiny", "7b"], typer.Option()] = "tiny",
    batch: int = 32,
    side: Annotated[int, typer.Option(help="Width and height of an image in pixels.")] = 112,
    characters: Annotated[int, typer.Option(help="Mean length of a text in characters, which are also its tokens.")] = 150,
    steps: Annotated[int, typer.Option(help="Measured steps.")] = 5,
    only: Annotated[
        Numbers, typer.Option(parser=numbers, metavar="0,1,...", help="Settings to run, by number from 0.")
    ] = Numbers(range(len(SETTINGS))),
) -> None:
    """Measure and print."""
    for place, number in enumerate(only):
        found = in_own_process(measure, number, shape, batch, side, characters, steps)
        if not place:
            print(f"{found['where']}, shape {shape}, batch {batch}, {found['tokens']}\n")
            print("| setting | s/step | items/s | peak GiB | 4,000 steps, h |\n|---|---|---|---|---|")
        cells = ["does not fit", "", "", ""]
        if found["seconds"]:
            seconds, held = found["seconds"], f"{found['peak'] / 2**30:.1f}" if found["peak"] else ""
            cells = [f"{seconds:.3f}", f"{batch / seconds:.1f}", held, f"{seconds * 4000 / 3600:.2f}"]
        print(f"| {SETTINGS[number].name} | {' | '.join(cells)} |", flush=True)


def measure(number: int, shape: str, batch: int, side: int, characters: int, steps: int) -> dict[str, Any]:
    """Measure a setting in this process."""
    device = prepare_torch(RuntimeParams(device="auto", num_threads=0, num_trainings=1))
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = backbone_of(shape, side, device, dtype)
    lengths = np.random.default_rng(0).integers(characters // 2, characters * 3 // 2 + 1, 2 * batch)
    texts = [("a word " * length)[:length] for length in lengths.tolist()]
    prompt = "The picture shows a product."
    source = ItemSource(np.arange(1, len(texts) + 1), texts, prompt, "", Noise(side), "text_only")
    images = [image for image in source.images(np.arange(1)) if image is not None]
    inputs = backbone.image_inputs(images, prompt), backbone.text_inputs(texts)
    tokens = [batch["attention_mask"].sum(-1).float().mean().item() for batch in inputs]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread, processor time"
    held = sum(weight.nbytes for weight in backbone.model.parameters()) / 2**30
    seconds, peak = None, 0
    with contextlib.suppress(torch.OutOfMemoryError):
        seconds, peak = run(SETTINGS[number], backbone, source, batch, steps, device)
    return {
        "where": f"{where}, {dtype}",
        "tokens": f"{tokens[0]:.0f} tokens per image, {tokens[1]:.0f} per text, weights {held:.1f} GiB",
        "seconds": seconds,
        "peak": peak,
    }


def run(
    setting: Setting, backbone: Backbone, source: ItemSource, batch: int, steps: int, device: torch.device
) -> tuple[float, int]:
    """Median seconds of a step, and the peak of the GPU's memory in bytes (0 on a CPU)."""
    section = default_params().train_adapter
    layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, getattr(section, setting.adapter), ["image", "text"], *layers, seed=0)
    changes = {"num_steps": WARM_UP + steps, "batch_size": batch, "log_every": 1000, "vision_cache": "always", **setting.changes}
    training = section.training.model_copy(update=changes)
    times: list[float] = []

    def note(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() if device.type == "cuda" else time.process_time())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    handle = register_optimizer_step_post_hook(note)
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            loss = getattr(section, setting.loss).model_copy(update=setting.loss_changes)
            alignment.train_adapter(backbone, model, source, training, loss, checkpoint, "", device)
    finally:
        handle.remove()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return statistics.median(np.diff(times)[WARM_UP - 1 :].tolist()), peak
