"""Where each user's target comes among all items: exact counts, no sampling of ties.

Training needs this for its validation.  What only the evaluation needs (sampled candidates, tables of positions, an index)
is in :mod:`sda_core.ranking`, so that a change there re-trains nothing.

The target's score is read from the same matrix as all others: computing it apart (another batch, another kernel)
gives another rounding, and an item would tie or not with itself by luck.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.log import progress
from sda_core.recommenders.base import Recommender
from sda_core.recommenders.batches import EvaluationData

# 32 MB of float32.  The product of few users with a large catalogue reads the whole catalogue for them: with half of this it
# takes twice as long at a million items.  The allocator keeps no larger blocks (see runtime.py), and fresh pages cost time, too.
SCORES_PER_CHUNK = 8_000_000

CountAmong = Callable[[Tensor, Tensor, np.ndarray], tuple[Tensor, Tensor, Tensor]]
"""Scores ``(B, I + 1)``, targets ``(B,)`` and their rows in ``data.users`` to better, tied and all candidates, ``(B,)`` each."""


def _compare_matrix(score_BI: Tensor, target_score_B1: Tensor) -> tuple[Tensor, Tensor]:
    """How many items of each row score higher than, and the same as, its target, itself included; column 0 is no item."""
    better_B = (score_BI[:, 1:] > target_score_B1).sum(dim=1, dtype=torch.int32)  # int32 halves the time of the sum
    return better_B, (score_BI[:, 1:] == target_score_B1).sum(dim=1, dtype=torch.int32)


def _compare_rows(score_BI: Tensor, target_score_B1: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_compare_matrix`, on a CPU: NumPy goes through a row while it is in the cache, in a sixth of torch's time."""
    counts_B2 = np.empty((len(score_BI), 2), dtype=np.int32)
    for row, (score_I, target_score) in enumerate(zip(score_BI.numpy()[:, 1:], target_score_B1.numpy(), strict=True)):
        counts_B2[row] = np.count_nonzero(score_I > target_score), np.count_nonzero(score_I == target_score)
    return torch.from_numpy(counts_B2[:, 0]), torch.from_numpy(counts_B2[:, 1])


def _count_full(score_BI: Tensor, target_B: Tensor, seen_rows: Tensor, seen_items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Better, tied and all candidates where every item that was not seen is one."""
    B = len(score_BI)
    target_score_B1 = score_BI.gather(1, target_B[:, None])
    better_B, tied_B = (_compare_rows if score_BI.device.type == "cpu" else _compare_matrix)(score_BI, target_score_B1)
    tied_B -= 1  # the target ties with itself
    # Seen items were counted too: count them once more, few as they are, and take them off.  The target stays.
    is_other = seen_items != target_B[seen_rows]
    rows, items = seen_rows[is_other], seen_items[is_other]
    score_n, target_score_n = score_BI[rows, items], target_score_B1[rows, 0]
    zeros_B = torch.zeros(B, dtype=torch.int32, device=score_BI.device)
    better_B -= zeros_B.index_add(0, rows, (score_n > target_score_n).int())
    tied_B -= zeros_B.index_add(0, rows, (score_n == target_score_n).int())
    num_candidates_B = score_BI.shape[1] - 1 - zeros_B.index_add(0, rows, torch.ones_like(rows, dtype=torch.int32))
    return better_B, tied_B, num_candidates_B


def count_positions(
    recommender: Recommender,
    data: EvaluationData,
    count_among: CountAmong | None,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Count the candidates that score higher than, and the same as, each user's target.

    Args:
        recommender: a fitted one, on ``device``.
        data: users, targets and the histories before them.
        count_among: None places the target among all items but those of the user's history (a target that is in the
            history stays); else the function that counts.
        batch_size: users scored at once, or fewer where that would be more than ``SCORES_PER_CHUNK`` scores.
        device: where to score.

    Returns:
        ``(number of users, 3)`` int64: better, tied (others that score the same), candidates (the target included).

    Raises:
        TrainingError: a score is NaN.
    """
    recommender.eval()
    lengths = np.minimum(data.histories.lengths[data.users], recommender.history_length)
    chunk = max(1, min(batch_size, SCORES_PER_CHUNK // (data.num_items + 1)))
    order = np.argsort(lengths, kind="stable")  # users of similar history length together: little padding is scored
    counts = np.zeros((len(data.users), 3), dtype=np.int64)
    with progress(len(order), "place targets", "users") as bar:
        for start in range(0, len(order), chunk):
            rows = order[start : start + chunk]
            users = data.users[rows].astype(np.int64)
            history = data.histories.last(users, int(lengths[rows].max(initial=0)))
            score_BI = recommender.score(torch.from_numpy(users).to(device), torch.from_numpy(history).to(device, torch.int64))
            if torch.isnan(score_BI.amax(dim=1)).any():  # a maximum carries NaN through, in one pass
                raise TrainingError(
                    "evaluation",
                    f"{recommender.params.kind} gave scores that are NaN",
                    "train it again with a lower learning_rate",
                )
            target_B = torch.from_numpy(data.targets[rows].astype(np.int64)).to(device)
            if count_among is None:
                seen_rows, seen_items = data.histories.pairs(users)
                counted = _count_full(
                    score_BI, target_B, torch.from_numpy(seen_rows).to(device), torch.from_numpy(seen_items).to(device)
                )
            else:
                counted = count_among(score_BI, target_B, rows)
            counts[rows] = torch.stack(counted, dim=1).cpu().numpy()
            bar.update(len(rows))
    return counts


def ndcg_at_10(counts: np.ndarray) -> float:
    """Mean NDCG@10 of one target each, ties against it; the criterion of early stopping.

    Args:
        counts: as :func:`count_positions` gives them.
    """
    return float(ndcg_at_10_by_user(counts).mean())


def ndcg_at_10_by_user(counts: np.ndarray) -> np.ndarray:
    """NDCG@10 ``(U,)`` of one target each, ties against it; see :func:`ndcg_at_10`."""
    position = 1 + counts[:, 0] + counts[:, 1]
    return np.where(position <= 10, 1.0 / np.log2(1.0 + position), 0.0)
