"""Measure the memory of gradient caching: a CMSA step of a large batch in chunks, against a plain step of one chunk.

Each side is a training step of nano in a separate process (``sda_core.alignment``, as in the stage: images decoded, texts
tokenised, one AdamW step); the peak of the resident memory is compared.

    python -m bench grad_cache                                 # 4,096 items in chunks of 64 against 64
    python -m bench grad_cache --batch 1024 --text-tokens 96
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bench.common import default_params, in_own_process, now, peak_mebibytes, since


def step(batch: int, chunk: int | None, text_tokens: int) -> dict[str, float]:
    """One training step in this process: seconds, processor seconds, and MiB at the beginning and at the peak."""
    import torch

    from bench.shapes import Noise
    from sda_core import adapters, alignment, backbones
    from sda_core.items import ItemSource
    from sda_core.params import Nano

    torch.set_num_threads(1)
    params = default_params()
    section = params.train_adapter
    nano = Nano(kind="nano", min_pixels=784, max_pixels=784, max_text_tokens=text_tokens, pooling="mean")
    backbone = backbones.build(nano, torch.device("cpu"))
    layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, section.moda, ["image", "text"], *layers, seed=0)
    texts = [" ".join(f"item {number * 7919 + place}" for place in range(text_tokens)) for number in range(batch)]
    source = ItemSource(np.arange(1, batch + 1), texts, "The picture shows a product.", "", Noise(28), "text_only")
    changes = {
        "num_steps": 1, "batch_size": batch, "micro_batch_size": chunk, "vision_cache": "never",
    }  # fmt: skip
    training = section.training.model_copy(update=changes)
    before = peak_mebibytes()
    begin = now()
    with tempfile.TemporaryDirectory() as folder:
        curve = alignment.train_adapter(
            backbone, model, source, training, section.loss, Path(folder) / "checkpoint", "", torch.device("cpu")
        )
    seconds, processor = since(begin)
    return {
        "seconds": seconds,
        "processor": processor,
        "before": before,
        "peak": peak_mebibytes(),
        "loss": curve[-1].loss,
    }


def main(batch: int = 4096, chunk: int = 64, text_tokens: int = 96) -> None:
    """Measure and print."""
    sides = {"plain": (chunk, None), "cached": (batch, chunk)}
    found = {}
    for side, sizes in sides.items():
        found[side] = in_own_process(step, *sizes, text_tokens)
        print(side, {name: round(value, 3) for name, value in found[side].items()}, flush=True)
    plain, cached = found["plain"], found["cached"]
    steps = {name: one["peak"] - one["before"] for name, one in found.items()}
    per_item = cached["processor"] / batch / (plain["processor"] / chunk)
    print(f"batch {batch} in chunks of {chunk}, against a plain batch of {chunk}:")
    print(f"  peak of the process   {cached['peak']:.0f} MiB, {plain['peak']:.0f} MiB: {cached['peak'] / plain['peak']:.2f} x")
    print(
        f"  of which the step     {steps['cached']:.0f} MiB, {steps['plain']:.0f} MiB: {steps['cached'] / steps['plain']:.2f} x"
    )
    print(f"  processor time per item: {per_item:.2f} x")
