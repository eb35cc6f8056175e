"""Positions of the users' targets among all items: exact counts, without sampling of ties.

Training uses them for validation.  Code that only the evaluation uses (sampled candidates, tables of positions, an index) is
in :mod:`sda_core.ranking`, so that a change there does not repeat trainings.

The target's score is read from the same matrix as all others: a separate computation (another batch, another kernel) rounds
differently, so that an item might not tie with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.log import progress
from sda_core.recommenders.base import Recommender
from sda_core.recommenders.batches import EvaluationData

# 32 MB of float32.  The product of few users with a large catalogue reads the whole catalogue: with half of this size it takes
# twice as long at a million items.  The allocator does not keep larger blocks (see runtime.py), and fresh pages cost time, too.
SCORES_PER_CHUNK = 8_000_000

USERS_PER_CHUNK = 256  # users scored at once in validation; fewer for a large catalogue

CountAmong = Callable[[Tensor, Tensor, np.ndarray], tuple[Tensor, Tensor, Tensor]]
"""Maps scores ``(B, I + 1)``, targets ``(B,)`` and rows in ``data.users`` to better, tied and all candidates, ``(B,)`` each."""


def _compare_matrix(score_BI: Tensor, target_score_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of items per row with a higher score than the target, and with the same (itself included); without column 0."""
    better_B = (score_BI[:, 1:] > target_score_B1).sum(dim=1, dtype=torch.int32)  # int32 halves the time of the sum
    return better_B, (score_BI[:, 1:] == target_score_B1).sum(dim=1, dtype=torch.int32)


def _compare_rows(score_BI: Tensor, target_score_B1: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_compare_matrix`, for the CPU: NumPy processes rows in the cache, in a sixth of torch's time."""
    counts_B2 = np.empty((len(score_BI), 2), dtype=np.int32)
    for row, (score_I, target_score) in enumerate(zip(score_BI.numpy()[:, 1:], target_score_B1.numpy(), strict=True)):
        counts_B2[row] = np.count_nonzero(score_I > target_score), np.count_nonzero(score_I == target_score)
    return torch.from_numpy(counts_B2[:, 0]), torch.from_numpy(counts_B2[:, 1])


def _count_full(score_BI: Tensor, target_B: Tensor, seen_rows: Tensor, seen_items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count better, tied and all candidates, with all unseen items as candidates."""
    B = len(score_BI)
    target_score_B1 = score_BI.gather(1, target_B[:, None])
    better_B, tied_B = (_compare_rows if score_BI.device.type == "cpu" else _compare_matrix)(score_BI, target_score_B1)
    tied_B -= 1  # the target ties with itself
    # Seen items were counted, too: count these few again and subtract them, except the target.
    is_other = seen_items != target_B[seen_rows]
    rows, items = seen_rows[is_other], seen_items[is_other]
    score_n, target_score_n = score_BI[rows, items], target_score_B1[rows, 0]
    zeros_B = torch.zeros(B, dtype=torch.int32, device=score_BI.device)
    better_B -= zeros_B.index_add(0, rows, (score_n > target_score_n).int())
    tied_B -= zeros_B.index_add(0, rows, (score_n == target_score_n).int())
    num_candidates_B = score_BI.shape[1] - 1 - zeros_B.index_add(0, rows, torch.ones_like(rows, dtype=torch.int32))
    return better_B, tied_B, num_candidates_B


def users_at_once(most: int, num_scores: int) -> int:
    """Number of users to score together: ``most``, or fewer if their scores would be more than ``SCORES_PER_CHUNK``.

    Args:
        most: limit of the number of users.
        num_scores: scores for each user.
    """
    return max(1, min(most, SCORES_PER_CHUNK // num_scores))


def batches_by_length(recommender: Recommender, data: EvaluationData, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of ``data.users`` to score together, ``(B,)`` each; histories of about the same length need less padding.

    Args:
        recommender: determines the number of items that are used of a history.
        data: users and histories.
        batch_size: see :func:`users_at_once`.
    """
    lengths = np.minimum(data.histories.lengths[data.users], recommender.history_length)
    order = np.argsort(lengths, kind="stable")
    size = users_at_once(batch_size, data.num_items + 1)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def count_positions(
    recommender: Recommender,
    data: EvaluationData,
    count_among: CountAmong | None,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Count the candidates with a higher score than each user's target, and those with the same score.

    Args:
        recommender: a fitted recommender, on ``device``.
        data: users, targets and the histories before them.
        count_among: None: all items except those of the user's history (a target in the history is kept); else the function
            that counts.
        batch_size: see :func:`users_at_once`.
        device: device for scoring.

    Returns:
        ``(number of users, 3)`` int64: better, tied (others with the same score), candidates (the target included).

    Raises:
        TrainingError: a score is NaN.
    """
    recommender.eval()
    counts = np.zeros((len(data.users), 3), dtype=np.int64)
    with progress(len(data.users), "place targets", "users") as bar:
        for rows in batches_by_length(recommender, data, batch_size):
            users = data.users[rows].astype(np.int64)
            longest = int(data.histories.lengths[users].max(initial=0))
            history = data.histories.last(users, min(longest, recommender.history_length))
            score_BI = recommender.score(torch.from_numpy(users).to(device), torch.from_numpy(history).to(device, torch.int64))
            if torch.isnan(score_BI.amax(dim=1)).any():  # the maximum propagates NaN, in one pass
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
    """Mean NDCG@10 with one target per user and pessimistic ties; the criterion of early stopping.

    Args:
        counts: the result of :func:`count_positions`.
    """
    return float(ndcg_at_10_by_user(counts).mean())


def ndcg_at_10_by_user(counts: np.ndarray) -> np.ndarray:
    """NDCG@10 by user ``(U,)``, with pessimistic ties; see :func:`ndcg_at_10`."""
    position = 1 + counts[:, 0] + counts[:, 1]
    return np.where(position <= 10, 1.0 / np.log2(1.0 + position), 0.0)
