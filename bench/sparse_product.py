"""Measure SLMRec's product with its graph on a GPU: bit-reproducibility and cost.

It runs two products and their backward pass ten times, on a random graph with some nodes of very high degree.

    python -m bench sparse_product
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sda_core.params import RuntimeParams
from sda_core.recommenders.slmrec import graph_product
from sda_core.runtime import prepare_torch

NODES, EDGES, WIDTH, ROUNDS = 20_000, 400_000, 256, 10


def main() -> None:
    """Measure and print."""
    device = prepare_torch(RuntimeParams(device="auto", num_threads=0, num_trainings=1))
    random = torch.Generator().manual_seed(0)
    indices = torch.randint(0, NODES, (2, EDGES), generator=random)
    indices[0, :50_000], indices[1, 50_000:90_000] = 7, 3
    values = torch.rand(EDGES, generator=random)
    graph_NN = torch.sparse_coo_tensor(indices, values, (NODES, NODES), check_invariants=True).coalesce().to(device)
    x_NK, weight_NK = (torch.randn(NODES, WIDTH, generator=random).to(device) for _ in range(2))

    def both_ways(product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf_NK = x_NK.clone().requires_grad_()
        found_NK = product(graph_NN, product(graph_NN, leaf_NK))
        (found_NK * weight_NK).sum().backward()
        assert leaf_NK.grad is not None
        return found_NK.detach(), leaf_NK.grad

    print(f"{device}: {NODES} nodes, {EDGES} edges, {WIDTH} columns\n")
    print("| product | forward equal | backward equal | ms |\n|---|---|---|---|")
    for name, product in (("torch.sparse.mm", torch.sparse.mm), ("SLMRec's", graph_product)):
        first, same = both_ways(product), [True, True]
        start = time.perf_counter()
        for _ in range(ROUNDS):
            same = [
                was and torch.equal(*pair) for was, pair in zip(same, zip(first, both_ways(product), strict=True), strict=True)
            ]
        print(f"| {name} | {same[0]} | {same[1]} | {1000 * (time.perf_counter() - start) / ROUNDS:.1f} |")
