"""Positions of the test targets by the scores of all candidates: all unseen items, or sampled ones."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from torch import Tensor

from sda_core.recommenders.base import Recommender
from sda_core.recommenders.batches import EvaluationData
from sda_core.recommenders.position import count_positions


def _count_given(score_BI: Tensor, target_B: Tensor, candidates_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count better, tied and all candidates among the given ones and the target."""
    ordered_BC = candidates_BC.sort(dim=1).values
    is_first_BC = torch.ones_like(ordered_BC, dtype=torch.bool)
    is_first_BC[:, 1:] = ordered_BC[:, 1:] != ordered_BC[:, :-1]  # repeated candidates count once
    counts_BC = is_first_BC & (ordered_BC != 0) & (ordered_BC != target_B[:, None])
    score_BC = score_BI.gather(1, ordered_BC)
    target_score_B1 = score_BI.gather(1, target_B[:, None])
    better_B = ((score_BC > target_score_B1) & counts_BC).sum(dim=1, dtype=torch.int32)
    tied_B = ((score_BC == target_score_B1) & counts_BC).sum(dim=1, dtype=torch.int32)
    return better_B, tied_B, counts_BC.sum(dim=1, dtype=torch.int32) + 1


def place_targets(
    recommender: Recommender,
    data: EvaluationData,
    candidates: np.ndarray | None,
    batch_size: int,
    device: torch.device,
) -> pl.DataFrame:
    """Count the candidates with a higher score than each test user's target, and those with the same score.

    Args:
        recommender: a fitted recommender, on ``device``.
        data: test users, targets and the histories before them.
        candidates: None: all items except those of the user's history (a target in the history is kept); else
            ``(number of test users, C)`` int32, in the order of ``data.users``: the target is ranked among these; 0, the
            target itself and repeated items are ignored.
        batch_size: see :func:`sda_core.recommenders.position.users_at_once`.
        device: device for scoring.

    Returns:
        One row per test user, all Int32: ``user_id, target_item_id, num_better, num_tied`` (others with the same score),
        ``candidates`` (the target included).

    Raises:
        TrainingError: a score is NaN.
    """

    def among_given(score_BI: Tensor, target_B: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        assert candidates is not None
        return _count_given(score_BI, target_B, torch.from_numpy(candidates[rows].astype(np.int64)).to(device))

    count_among = None if candidates is None else among_given
    return placed_table(data, count_positions(recommender, data, count_among, batch_size, device))


def placed_table(data: EvaluationData, counts: np.ndarray) -> pl.DataFrame:
    """Convert counts ``(number of test users, 3)`` of better, tied and all candidates to the table of :func:`place_targets`."""
    return pl.DataFrame(
        {
            "user_id": data.users,
            "target_item_id": data.targets,
            "num_better": counts[:, 0],
            "num_tied": counts[:, 1],
            "candidates": counts[:, 2],
        },
        schema=dict.fromkeys(["user_id", "target_item_id", "num_better", "num_tied", "candidates"], pl.Int32),
    )
