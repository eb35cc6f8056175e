"""Pairwise training: an item of a user against an item that the user does not have (BPR, VBPR, SLMRec)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.errors import TrainingError
from sda_core.recommenders.batches import TrainingData

INITIAL_STD = 0.1  # standard deviation of user and item factors


def factors(num_rows: int, size: int) -> nn.Embedding:
    """A table ``(num_rows + 1, size)`` of random factors; row 0, the unknown, is zero."""
    table = nn.Embedding(num_rows + 1, size, padding_idx=0)
    nn.init.normal_(table.weight, std=INITIAL_STD)
    with torch.no_grad():
        table.weight[0] = 0.0
    return table


def forget_unknown_users(data: TrainingData, *tables: nn.Embedding) -> None:
    """Zero the factors of users without a training interaction, so that random initial values do not rank their items."""
    unknown = torch.from_numpy(np.flatnonzero(data.train.lengths == 0))
    with torch.no_grad():
        for table in tables:
            table.weight[unknown.to(table.weight.device)] = 0.0


def pair_batches(data: TrainingData, batch_size: int, random: np.random.Generator, kind: str) -> Iterator[dict[str, Tensor]]:
    """Every training interaction once, each with an item that the user does not have in training.

    Args:
        data: training histories.
        batch_size: B; the last batch may be smaller.
        random: random generator of negatives and order.
        kind: name of the recommender, for the message.

    Yields:
        ``user_B``, ``positive_B`` and ``negative_B``, int64.

    Raises:
        TrainingError: no user has such an item.
    """
    users = np.repeat(np.arange(data.num_users + 1), data.train.lengths)
    items = data.train.item_ids.astype(np.int64)
    negatives, is_drawn = draw_unseen(users, items, data.num_items, random)
    order = random.permutation(len(users))
    order = order[is_drawn[order]]
    if len(order) == 0:
        raise TrainingError(f"train_recommender.{kind}", "every user has every item in training", "nothing is left to recommend")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        columns = {"user_B": users, "positive_B": items, "negative_B": negatives}
        yield {name: torch.from_numpy(column[rows]) for name, column in columns.items()}


def draw_unseen(
    users: np.ndarray, items: np.ndarray, num_items: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """For each interaction draw a uniform item with which its user has no interaction.

    Args:
        users, items: ``(n,)`` int64, the interactions.
        num_items: I.
        random: random generator.

    Returns:
        Item ids ``(n,)``, and a mask ``(n,)`` of the successful draws, because a user with nearly all items may get none
        within the number of tries.
    """
    known = np.unique(users * (num_items + 1) + items)
    drawn = np.zeros(len(users), dtype=np.int64)
    open_rows = np.arange(len(users))
    for _ in range(64):
        candidates = random.integers(1, num_items + 1, size=len(open_rows))
        keys = users[open_rows] * (num_items + 1) + candidates
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        is_seen = known[places] == keys
        drawn[open_rows[~is_seen]] = candidates[~is_seen]
        open_rows = open_rows[is_seen]
        if len(open_rows) == 0:
            break
    return drawn, drawn > 0
