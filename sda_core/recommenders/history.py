"""Recommendations for a history that belongs to no user of the training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sda_core.recommenders.base import Recommender


def recommend_for(model: Recommender, history: Sequence[int], num_recommendations: int) -> list[tuple[int, float]]:
    """The best items that are not in a history.

    Args:
        model: one whose section says ``scores_histories``.
        history: item ids, oldest first.
        num_recommendations: how many to give at most.

    Returns:
        Item ids and scores, best first; fewer where no unseen item is left.
    """
    device = next(iter(model.state_dict().values())).device
    history_BL = torch.tensor([list(history)], dtype=torch.int64, device=device)
    found, scores = model.recommend(torch.zeros(1, dtype=torch.int64, device=device), history_BL, num_recommendations)
    return [(item, score) for item, score in zip(found[0].tolist(), scores[0].tolist(), strict=True) if item]
