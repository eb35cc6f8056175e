"""Compare full-rank evaluation with its matrix product alone: total time, and the share of the matrix product.

Every test user's target is ranked among all items except those of the user's history, with exact counts of better and tied
ones; then positions, metrics and 95 % intervals are computed from the counts.  The lower bound, measured in the same run, is
the product of user and item factors in the same chunks: no evaluation by scores can be faster.  Torch is set up as in a stage.
On a busy machine compare the CPU seconds; divided by the number of cores they are the wall-clock time of an idle machine.

    python -m bench fullrank
    python -m bench fullrank --num-users 5000 --num-items 5000
"""

from __future__ import annotations

import os

import torch

from bench.common import Seconds, now, random_shop, since
from sda_core import evaluation, ranking, recommenders
from sda_core.params import EvaluateParams, RuntimeParams, VBPRParams
from sda_core.recommenders.position import SCORES_PER_CHUNK
from sda_core.runtime import prepare_torch


def product_alone(num_users: int, num_items: int, width: int) -> Seconds:
    """Seconds of the matrix product of factors, in chunks as large as the evaluation's."""
    users, items = torch.randn(num_users, width), torch.randn(num_items, width)
    chunk = max(1, SCORES_PER_CHUNK // num_items)
    out = torch.empty(chunk, num_items)
    begin = now()
    for start in range(0, num_users - num_users % chunk, chunk):
        torch.mm(users[start : start + chunk], items.T, out=out)
    return since(begin)


def main(num_users: int = 52_204, num_items: int = 57_019, width: int = 128, history_length: int = 9) -> None:
    """Run and print a table."""
    interactions = random_shop(num_users, num_items, history_length)
    params = VBPRParams(
        seed=0, max_epochs=1, patience=1, eval_every=1, batch_size=1, learning_rate=1.0, weight_decay=0.0, dtype="float32",
        kind="vbpr",
        factor_size=width, content_factor_size=1, embedding_regularization=0.0, content_regularization=0.0,
        content_bias_regularization=0.0,
    )  # fmt: skip
    device = prepare_torch(RuntimeParams(device="cpu", num_threads=0, num_trainings=1))
    torch.manual_seed(0)
    model = recommenders.build(params, num_users, num_items, None, seed=0)
    settings = EvaluateParams.model_validate(
        {
            "protocol": "fullrank", "cutoffs": (5, 10, 20), "ties": "pessimistic",
            "tail": {"definition": "train_lt_k", "max_count": 4, "share": 0.8},
            "negatives_seed": 0, "bootstrap_samples": 1000, "bootstrap_seed": 0, "batch_size": 256, "retrieval": None,
        }
    )  # fmt: skip
    seconds: dict[str, Seconds] = {}
    seconds["matrix product alone"] = product_alone(num_users, num_items, width)
    begin = now()
    data = recommenders.evaluation_data(interactions)
    seconds["histories"] = since(begin)
    begin = now()
    placed = ranking.place_targets(model, data, None, settings.batch_size, device)
    seconds["rank targets (includes the product)"] = since(begin)
    begin = now()
    metrics = evaluation.summarise(evaluation.score_positions(placed, settings.ties), interactions, settings)
    seconds["positions, metrics, 1,000 resamples"] = since(begin)
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    print(f"{num_users:,} users x {num_items:,} items x {width}, {threads}")
    product = seconds["matrix product alone"]
    whole = (sum(clock for clock, _ in seconds.values()) - product[0], sum(cpu for _, cpu in seconds.values()) - product[1])
    for name, (clock, cpu) in {**seconds, "whole evaluation": whole}.items():
        print(f"| {name:<36} | {clock:7.2f} s | {cpu:7.2f} CPU s |")
    print(
        f"evaluation / matrix product: {whole[0] / product[0]:.2f} x wall-clock time, {whole[1] / product[1]:.2f} x CPU seconds"
    )
    print(f"hit@10 {metrics['hit@10']:.4f} (chance {10 / num_items:.4f})")
