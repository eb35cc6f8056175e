"""What trained recommenders rank: where test targets come, and what somebody with a history is shown.

:func:`place_targets` places targets by all scores, :func:`place` does so by all scores or through an index, as the params say.
No training depends on this package: a change here evaluates again, and trains nothing.
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
    """What a saved recommender gives to somebody unknown with a history, on the CPU.

    Args:
        folder, item_vectors: see :func:`sda_core.recommenders.load`; of a recommender that scores histories alone.
        history: item ids, oldest first; none of them is recommended.
        num_recommendations: how many at most.

    Returns:
        Item ids and scores, best first.

    Raises:
        ArtifactError: see :func:`sda_core.recommenders.load`.
    """
    model = recommenders.load(folder, item_vectors, torch.device("cpu"))
    nobody = torch.zeros(1, dtype=torch.int64)
    found_BN, score_BN = model.recommend(nobody, torch.tensor([list(history)]), num_recommendations)
    return [(item, score) for item, score in zip(found_BN[0].tolist(), score_BN[0].tolist(), strict=True) if item]
