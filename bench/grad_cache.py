"""Memory of a CMSA step of a large global batch with gradient caching, against a plain step of one chunk's size.

Each side is a training step of nano in a process of its own (``sda_core.alignment``, the stage's own path: pictures
decoded, texts tokenised, one AdamW step); what is compared is the peak of the resident memory.

    python bench/grad_cache.py                                 # 4,096 items in chunks of 64 against 64
    python bench/grad_cache.py --batch 1024 --text-tokens 96
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def step(batch: int, chunk: int | None, text_tokens: int) -> dict[str, float]:
    """One training step in this process: seconds, processor seconds, and MiB at the beginning and at the peak."""
    import torch
    from _shapes import Noise

    from sda_core import adapters, alignment, backbones
    from sda_core.items import ItemSource
    from sda_core.params import Nano, load_params

    torch.set_num_threads(1)
    params = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        curve = alignment.train_adapter(
            backbone, model, source, training, section.loss, Path(folder) / "checkpoint", "", torch.device("cpu")
        )
    return {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - used,
        "before": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": curve[-1].loss,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=96)
    parser.add_argument("--side", choices=["plain", "cached"], help="internal: measure one side in this process")
    options = parser.parse_args()
    if options.side:
        sides = {"plain": (options.chunk, None), "cached": (options.batch, options.chunk)}
        print(json.dumps(step(*sides[options.side], options.text_tokens)))
        return
    found = {}
    for side in ("plain", "cached"):
        command = [sys.executable, __file__, "--side", side]
        for name in ("batch", "chunk", "text_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(side, {name: round(value, 3) for name, value in found[side].items()}, flush=True)
    plain, cached = found["plain"], found["cached"]
    steps = {name: one["peak"] - one["before"] for name, one in found.items()}
    per_item = cached["processor"] / options.batch / (plain["processor"] / options.chunk)
    print(f"batch {options.batch} in chunks of {options.chunk}, against a plain batch of {options.chunk}:")
    print(f"  peak of the process {cached['peak']:.0f} MiB, {plain['peak']:.0f} MiB: {cached['peak'] / plain['peak']:.2f} x")
    print(f"  of it the step      {steps['cached']:.0f} MiB, {steps['plain']:.0f} MiB: {steps['cached'] / steps['plain']:.2f} x")
    print(f"  processor time an item: {per_item:.2f} x")


if __name__ == "__main__":
    main()
