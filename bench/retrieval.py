"""Compare evaluation through an index with all scores: seconds and recall.

It measures ``evaluate.retrieval`` as in the stage: :func:`sda_core.ranking.place` with a BPR model of random factors, by all
scores and for every given index.  Random vectors have no neighbourhoods, which is the hardest case for an index; with
``--clusters`` users and items are clustered around this many centres, like those of a trained model.  The time includes the
retrieval for all users, and the exact scores of ``--num-queries`` users for the recall.

    python -m bench retrieval
    python -m bench retrieval --clusters 500
    python -m bench retrieval --num-items 1000000 --index HNSW32:200
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer

from bench.common import Seconds, default_params, now, random_shop, since
from sda_core import ranking, recommenders
from sda_core.index import inner_product_search
from sda_core.params import BPRParams, EvaluateParams, RetrievalParams, RuntimeParams
from sda_core.runtime import prepare_torch

INDEXES = ("HNSW32:256", "IVF1024,Flat:32", "IVF1024,Flat:128")


def model_of(num_users: int, num_items: int, width: int, clusters: int) -> recommenders.Recommender:
    """BPR with random factors; an item vector including its bias has ``width`` entries."""
    params = BPRParams(
        seed=0, max_epochs=1, patience=1, eval_every=1, batch_size=1, learning_rate=1.0, weight_decay=0.0, dtype="float32",
        kind="bpr", factor_size=width - 1, embedding_regularization=0.0,
    )  # fmt: skip
    model = recommenders.build(params, num_users, num_items, None, seed=0)
    random = np.random.default_rng(0)
    state = model.state_dict()
    centres = random.normal(size=(max(1, clusters), width - 1))
    for name, number in (("user_factors.weight", num_users), ("item_factors.weight", num_items)):
        rows = random.normal(size=(number + 1, width - 1))
        if clusters:
            rows = centres[random.integers(0, clusters, number + 1)] + 0.5 * rows
        state[name] = torch.from_numpy(rows.astype(np.float32))
    state["item_bias"] = torch.from_numpy(random.normal(size=num_items + 1).astype(np.float32))  # popularity
    model.load_state_dict(state)
    return model.eval()


def settings(index: str | None, depth: int, num_queries: int) -> EvaluateParams:
    """Section ``evaluate`` with an index such as ``HNSW32:200`` (ef_search) or ``IVF1024,Flat:32`` (nprobe)."""
    section = default_params().evaluate
    if index is None:
        return section
    factory, _, effort = index.partition(":")
    value = int(effort) if effort else None
    is_ivf = "IVF" in factory
    retrieval = RetrievalParams(
        factory=factory,
        nprobe=value if is_ivf else None,
        ef_search=None if is_ivf else value,
        depth=depth,
        num_queries=num_queries,
    )
    return section.model_copy(update={"retrieval": retrieval})


def main(
    num_users: int = 2000,
    num_items: int = 200_000,
    width: int = 64,
    depth: int = 100,
    num_queries: int = 200,
    clusters: Annotated[int, typer.Option(help="Number of clusters of the vectors; 0: none.")] = 0,
    index: Annotated[
        list[str] | None,
        typer.Option(
            help="FAISS factory and search effort, e.g. HNSW32:200.  Repeat it for more.", show_default=", ".join(INDEXES)
        ),
    ] = None,
) -> None:
    """Run and print a table."""
    device = prepare_torch(RuntimeParams(device="cpu", num_threads=0, num_trainings=1))
    data = recommenders.evaluation_data(random_shop(num_users, num_items, 9), num_items=num_items)
    model = model_of(num_users, num_items, width, clusters)
    built: Seconds = (0.0, 0.0)

    def timed(vectors_IK: np.ndarray, params: RetrievalParams) -> Callable[[np.ndarray, int], np.ndarray]:
        nonlocal built
        begin = now()
        search = inner_product_search(vectors_IK, params)
        built = since(begin)
        return search

    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    kind = f"{clusters} clusters" if clusters else "no clusters"
    shape = f"{num_users:,} users x {num_items:,} items x {width}, {kind}, depth {depth}"
    print(f"{time.strftime('%Y-%m-%d')}: {shape}, {threads}")
    print("\n| index | building, CPU s | ranking, CPU s (wall-clock) | exact / ranking | recall@10 |\n|---|---|---|---|---|")
    exact = 0.0
    for factory in (None, *(index or INDEXES)):
        begin, built = now(), (0.0, 0.0)
        told = ranking.place(model, data, None, settings(factory, depth, num_queries), device, timed)[1]
        clock, cpu = (whole - part for whole, part in zip(since(begin), built, strict=True))
        exact = exact or cpu
        recall = told.get("retrieval_recall@10", 1.0)
        print(
            f"| {factory or 'all scores'} | {built[1]:.1f} | {cpu:.1f} ({clock:.1f}) | {exact / cpu:.1f} | {recall:.3f} |",
            flush=True,
        )
