"""Measure the additional cost of a step with a teacher from the base.

Each round makes one step with ``teacher_source: adapted`` and one with ``base`` in one process, on the same items, model and
inputs, in alternating order; the ratio of the two is reported.  The base's vectors are read from disk, as in a run, where they
are computed once before step 0.  The cost of this computation is printed, too.

    python -m bench base_teacher                # nano with its vision cache, MoDA and CMSA, batches of 32
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.common import default_params
from bench.shapes import Noise
from sda_core import adapters, backbones, losses
from sda_core.alignment import batch_rows
from sda_core.alignment.base_vectors import BaseVectors
from sda_core.alignment.inputs import InputMaker, chunks_of
from sda_core.alignment.state import parameter_groups, trained_parameters
from sda_core.alignment.training import Run, Step
from sda_core.alignment.vision_cache import open_cache
from sda_core.items import ItemSource
from sda_core.losses import AlignmentLoss
from sda_core.modalities import MODALITIES
from sda_core.processes import ALONE

WARM_UP = 2
SIDES = ("adapted", "base")


def main(rounds: int = 20, batch: int = 32, side: int = 64, characters: int = 300) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    params, device = default_params(), torch.device("cpu")
    section = params.train_adapter
    backbone = backbones.build(params.backbone, device)
    layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, section.moda, MODALITIES, *layers, seed=0)
    rows = np.arange(4 * batch)
    texts = [(f"item {row * 7919} of a shop " * characters)[:characters] for row in rows.tolist()]
    source = ItemSource(rows + 1, texts, "The picture shows a product.", "", Noise(side), "text_only")
    changes = {"num_steps": WARM_UP + rounds, "batch_size": batch, "vision_cache": "always"}
    training = section.training.model_copy(update=changes)
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(backbone, source, rows, training, Path(folder), "")
        assert cache is not None
        cache.fill(batch, ALONE)
        maker = InputMaker(backbone, source, cache)
        begin = time.process_time()
        vectors = BaseVectors(backbone, model, maker, rows, Path(folder), "")
        vectors.fill(batch, ALONE, sharded=False)
        once = time.process_time() - begin
        run = Run(training, chunks_of(training, ALONE), ALONE, backbone, model, maker, device)
        criteria = {name: losses.build(section.loss.model_copy(update={"teacher_source": name})) for name in SIDES}
        optimizer = torch.optim.AdamW(parameter_groups(trained_parameters(model, criteria["base"]), training))
        model.train()
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(WARM_UP + rounds):
            for name in SIDES[:: 1 if number % 2 else -1]:
                seconds[name].append(step(number, rows, run, criteria[name], vectors, optimizer))
    kept = {name: found[WARM_UP:] for name, found in seconds.items()}
    ratios = sorted(base / adapted for adapted, base in zip(kept["adapted"], kept["base"], strict=True))
    quarter = len(ratios) // 4
    own, base = (statistics.median(found) for found in kept.values())
    share = once / len(rows) * batch / own
    print(f"{rounds} rounds of one step per side, batch {batch}, one thread, processor time")
    print(f"median of a step: {own:.3f} s with the adapted vectors as the teacher, {base:.3f} s with the base vectors")
    print(f"ratio: median {statistics.median(ratios):.3f} x, quartiles {ratios[quarter]:.3f} and {ratios[-1 - quarter]:.3f}")
    print(f"base vectors, computed once: {1000 * once / len(rows):.1f} ms per item; for a batch {share:.2f} x the time of a step")


def step(
    number: int, rows: np.ndarray, run: Run, criterion: AlignmentLoss, vectors: BaseVectors, optimizer: torch.optim.Optimizer
) -> float:
    """Processor seconds of one step of the training loop, its inputs included."""
    begin = time.process_time()
    chosen = batch_rows(rows, number, run.training)
    trained = trained_parameters(run.model, criterion)
    optimizer.zero_grad(set_to_none=True)
    base = vectors.pair(chosen, run.device) if criterion.needs_base else None
    stream = run.maker.stream((name, chosen) for name in MODALITIES)
    Step(number, run, criterion, stream, base).backward(trained, None)
    torch.nn.utils.clip_grad_norm_(trained.values(), run.training.max_grad_norm)
    optimizer.step()
    return time.process_time() - begin
