"""Positions from an index of the items instead of the scores of all items, for catalogues of millions.

A user's best ``depth`` candidates are retrieved from an index of the item matrix; the target's position is that among them.
The retrieved items are scored again, so that the result does not depend on compression or on the order of sums, and equal
items tie.

* A target whose exact position is within the depth gets it, provided that the index finds it and all better items, which
  ``Flat`` always does.
* A target that is not found has the last position of all candidates.  The depth does not affect Hit and NDCG, because it is
  at least the largest cut-off; MRR, which has no cut-off, is a lower bound.
* ``retrieval_recall@10``, the share of the exact top 10 among the retrieved items, shows the loss by approximate search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import polars as pl
import torch

from sda_core.errors import TrainingError
from sda_core.log import progress
from sda_core.params import EvaluateParams
from sda_core.ranking.places import place_targets, placed_table
from sda_core.recommenders.base import Recommender
from sda_core.recommenders.batches import EvaluationData
from sda_core.recommenders.position import users_at_once

_log = logging.getLogger(__name__)

RECALL = "retrieval_recall@10"

Search = Callable[[np.ndarray, int], np.ndarray]
"""Maps queries ``(Q, K)`` and a number k to rows ``(Q, k)`` with the largest inner products, best first, padded with -1."""


def place(
    recommender: Recommender,
    data: EvaluationData,
    candidates: np.ndarray | None,
    params: EvaluateParams,
    device: torch.device,
) -> tuple[pl.DataFrame, dict[str, float]]:
    """Rank each test user's target by all scores or by retrieval, depending on the params.

    Args:
        recommender, data, candidates, device: see :func:`sda_core.ranking.place_targets`.
        params: if ``retrieval`` is null, or the recommender's scores are not inner products, all scores are computed.

    Returns:
        The columns of ``place_targets``; and ``retrieval_recall@10`` with retrieval, else an empty mapping.

    Raises:
        TrainingError: a score is NaN.
        ConfigError: there is no such index.
    """
    matrix_IK = None if params.retrieval is None else recommender.item_matrix()
    if params.retrieval is None or matrix_IK is None:
        return place_targets(recommender, data, candidates, params.batch_size, device), {}
    from sda_core.index import inner_product_search  # loads FAISS, which is not needed for all scores

    items_IK = matrix_IK.float().cpu().numpy()
    if not np.isfinite(items_IK[1:]).all():
        raise _not_finite(recommender)
    retrieval = _Retrieval(recommender, data, items_IK, inner_product_search(items_IK[1:], params.retrieval), params, device)
    counts, num_found = retrieval.count()
    recall, num_asked = retrieval.recall_at_10(params.retrieval.num_queries)
    _log.info(
        "%s: %s found %.2f %% of the targets and %.4f of the exact top 10 (%d users)",
        recommender.params.kind, params.retrieval.factory, 100 * num_found / len(data.users), recall, num_asked,
    )  # fmt: skip
    return placed_table(data, counts), {RECALL: recall}


def _not_finite(recommender: Recommender) -> TrainingError:
    return TrainingError(
        "evaluation", f"{recommender.params.kind} gave scores that are not finite", "train it again with a lower learning_rate"
    )


class _Retrieval:
    """A recommender with an index of its items."""

    def __init__(
        self,
        recommender: Recommender,
        data: EvaluationData,
        items_IK: np.ndarray,
        search: Search,
        params: EvaluateParams,
        device: torch.device,
    ) -> None:
        assert params.retrieval is not None
        self.recommender, self.data, self.items_IK, self.search, self.device = recommender, data, items_IK, search, device
        self.depth = params.retrieval.depth
        self.chunk = users_at_once(params.batch_size, len(items_IK))  # users per exact scoring of all items
        self.batch = params.batch_size

    def count(self) -> tuple[np.ndarray, int]:
        """Better, tied and all candidates ``(number of test users, 3)`` int64, and the number of targets found."""
        data = self.data
        counts = np.zeros((len(data.users), 3), dtype=np.int64)
        num_found = 0
        # sorted, because the longest history of a batch determines the number of retrieved items
        order = np.argsort(data.histories.lengths[data.users], kind="stable")
        with progress(len(order), "retrieve targets", "users") as bar:
            for start in range(0, len(order), self.batch):
                rows = order[start : start + self.batch]
                query_BK, found_BN = self._candidates(rows)
                num_candidates = self._num_candidates(rows)
                for row, query_K, found_N, candidates in zip(rows, query_BK, found_BN, num_candidates, strict=True):
                    found = found_N[found_N > 0]
                    is_target = found == data.targets[row]
                    if is_target.any():
                        # No matrix product: it may round equal items differently, depending on their row.
                        scores = (self.items_IK[found] * query_K).sum(axis=1)
                        target_score = scores[is_target][0]
                        counts[row] = (scores > target_score).sum(), (scores == target_score).sum() - 1, candidates
                        num_found += 1
                    else:
                        counts[row] = candidates - 1, 0, candidates
                bar.update(len(rows))
        return counts, num_found

    def recall_at_10(self, num_queries: int) -> tuple[float, int]:
        """The share of the exact top 10 among the retrieved items, over evenly spaced users, and the number of these users.

        Any item as good as the tenth counts as correct, so ties do not matter; with fewer than 10 candidates, all of them.
        """
        num_users = len(self.data.users)
        sample = np.unique(np.linspace(0, num_users - 1, min(num_queries, num_users)).round().astype(np.int64))
        shares: list[float] = []
        for start in range(0, len(sample), self.chunk):
            rows = sample[start : start + self.chunk]
            found_BN = self._candidates(rows)[1]
            score_BI = self.recommender.score(*self._inputs(rows)).cpu().numpy()
            score_BI[self._seen_others(rows)] = -np.inf
            for score_I, found_N in zip(score_BI, found_BN, strict=True):
                k = min(10, int((score_I > -np.inf).sum()))
                if k:
                    bar = np.partition(score_I, -k)[-k]
                    shares.append(min(k, int((score_I[found_N[found_N > 0]] >= bar).sum())) / k)
        return float(np.mean(shares)) if shares else 1.0, len(sample)

    def _inputs(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The arguments of ``score`` and ``queries``."""
        users = self.data.users[rows].astype(np.int64)
        length = min(int(self.data.histories.lengths[users].max(initial=0)), self.recommender.history_length)
        history = self.data.histories.last(users, length)
        return torch.from_numpy(users).to(self.device), torch.from_numpy(history).to(self.device, torch.int64)

    def _candidates(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries ``(B, K)``, and the best ``depth`` unseen items found ``(B, N)``, in order, padded with 0.

        A target in the history is a candidate, as in the other protocols.
        """
        query_BK = self.recommender.queries(*self._inputs(rows)).float().cpu().numpy()
        if not np.isfinite(query_BK).all():
            raise _not_finite(self.recommender)
        num_items = self.data.num_items
        seen_rows, seen_items = self.data.histories.pairs(self.data.users[rows])
        most_seen = int(np.bincount(seen_rows, minlength=1).max())
        found_BN = self.search(query_BK, min(num_items, self.depth + most_seen)) + 1
        keys_BN = np.arange(len(rows))[:, None] * (num_items + 1) + found_BN
        is_kept_BN = ~np.isin(keys_BN, seen_rows * (num_items + 1) + seen_items) | (found_BN == self.data.targets[rows][:, None])
        is_kept_BN &= found_BN > 0
        is_kept_BN &= np.cumsum(is_kept_BN, axis=1) <= self.depth
        return query_BK, np.where(is_kept_BN, found_BN, 0)

    def _num_candidates(self, rows: np.ndarray) -> np.ndarray:
        """The number of unseen items, the target included: ``(B,)``."""
        return self.data.num_items - np.bincount(self._seen_others(rows)[0], minlength=len(rows))

    def _seen_others(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The excluded items as (row, item): the history without the target."""
        seen_rows, seen_items = self.data.histories.pairs(self.data.users[rows])
        is_other = seen_items != self.data.targets[rows][seen_rows]
        return seen_rows[is_other], seen_items[is_other]
