"""Measure a catalogue of a million items: the memory of a full-rank evaluation, and of one training step under sampled losses.

SASRec with a learned item table runs the functions of the stages: ``place_targets`` for users with random histories, and one
epoch of one step.  Each runs in a separate process; the table has its peak memory, its memory after the model was built, and
for comparison the size of a matrix of the scores of all items, for a batch of users or for every target of a step.

    python -m bench large_catalogue
    python -m bench large_catalogue --num-items 100000
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.common import in_own_process, peak_mebibytes, random_shop

PARTS = ("evaluation", "sampled_softmax", "gbce", "bce")
BATCH, HIDDEN, NUM_NEGATIVES, LENGTH = 128, 64, 256, 9
USERS_PER_CHUNK = 256


def resident() -> float:
    """Current resident memory of the process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def run_part(part: str, num_users: int, num_items: int) -> dict[str, Any]:
    """Evaluate, or train a step, in this process."""
    import numpy as np
    import torch

    from sda_core import ranking, recommenders
    from sda_core.params import RuntimeParams, SASRecParams
    from sda_core.recommenders.fit import TrainedRecommender, train_epoch
    from sda_core.runtime import prepare_torch

    device = prepare_torch(RuntimeParams(device="cpu", num_threads=0, num_trainings=1))
    params = SASRecParams(
        seed=0, max_epochs=1, patience=1, eval_every=1, batch_size=BATCH, learning_rate=1e-3, weight_decay=0.0, dtype="float32",
        representation="id", hidden_size=HIDDEN, num_blocks=1, num_heads=1, max_length=50, dropout=0.2, id_dropout=0.0,
        new_item_cost=None,
        loss="sampled_softmax" if part == "evaluation" else part, num_negatives=1 if part == "bce" else NUM_NEGATIVES,
        gbce_t=0.75, align_weight=0.0, align_temperature=2.0, kind="sasrec", causal=True,
    )  # type: ignore[arg-type]  # fmt: skip
    interactions = random_shop(num_users if part == "evaluation" else BATCH, num_items, LENGTH)
    model = recommenders.build(params, int(interactions["user_id"].n_unique()), num_items, None, seed=0)
    assert isinstance(model, TrainedRecommender)
    before = resident()
    begin = time.process_time()
    if part == "evaluation":
        data = recommenders.evaluation_data(interactions)
        placed = ranking.place_targets(model, data, None, USERS_PER_CHUNK, device)
        assert placed.height == num_users
        whole_matrix = min(USERS_PER_CHUNK, num_users) * (num_items + 1) * 4
    else:
        data = recommenders.training_data(interactions)
        optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate, fused=True)
        train_epoch(model, data, optimizer, 1, device)
        whole_matrix = int(np.maximum(data.train.lengths - 1, 0).sum()) * (num_items + 1) * 4
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    peak = peak_mebibytes()
    return {
        "seconds": time.process_time() - begin,
        "weights": weights / 2**20,
        "peak": peak,
        "added": peak - before,
        "whole": whole_matrix / 2**20,
    }


def main(
    num_items: int = 1_000_000, num_users: Annotated[int, typer.Option(help="Number of users of the evaluation.")] = 1000
) -> None:
    """Run all parts and print a table."""
    print(f"SASRec, {num_items:,} items x {HIDDEN}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("\n| part | CPU s | weights, MiB | peak, MiB | added, MiB | full score matrix, MiB |\n|---|---|---|---|---|---|")
    for part in PARTS:  # keep this process small: the system reports at least its memory as peak of a child
        found = in_own_process(run_part, part, num_users, num_items)
        what = f"evaluation of {num_users:,} users" if part == "evaluation" else f"a step of {BATCH} users, {part}"
        values = " | ".join(f"{found[name]:.0f}" for name in ("weights", "peak", "added", "whole"))
        print(f"| {what} | {found['seconds']:.1f} | {values} |")
