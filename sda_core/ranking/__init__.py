"""Ranking with trained recommenders: positions of test targets, and recommendations for a history.

:func:`place_targets` ranks targets by all scores; :func:`place` uses all scores or an index, depending on the params.
No training depends on this package: a change here repeats the evaluation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sda_core import recommenders
from sda_core.ranking.places import place_targets
from sda_core.ranking.retrieval import place

__all__ = ["place", "place_targets", "recommend_after"]


def recommend_after(
    folder: Path, item_vectors: recommenders.ItemVectors | None, history: Sequence[int], num_recommendations: int
) -> list[tuple[int, float]]:
    """Recommendations of a saved recommender for an unknown user with a history, on the CPU.

    Args:
        folder, item_vectors: see :func:`sda_core.recommenders.load`; the recommender must score histories without a user.
        history: item ids, oldest first; they are not recommended.
        num_recommendations: maximum number of recommendations.

    Returns:
        Item ids and scores, best first.

    Raises:
        ArtifactError: see :func:`sda_core.recommenders.load`.
    """
    model = recommenders.load(folder, item_vectors, torch.device("cpu"))
    nobody = torch.zeros(1, dtype=torch.int64)
    found_BN, score_BN = model.recommend(nobody, torch.tensor([list(history)]), num_recommendations)
    return [(item, score) for item, score in zip(found_BN[0].tolist(), score_BN[0].tolist(), strict=True) if item]
