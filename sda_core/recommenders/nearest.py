"""Nearest items: rank items by their mean similarity to the items of the history.  No weight is trained.

Two similarities, either of which can be used alone:

    by users:    s(i, j) = c_ij / (sqrt(n_i n_j) + shrinkage)
    by content:  s(i, j) = cos(f_i - m, f_j - m)

``c_ij`` is the number of users who have both items in training and ``n_i`` the number of those who have item i: the cosine
of two columns of the matrix of users and items (Sarwar et al. 2001), with the shrinkage of Ferrari Dacrema et al. (2019),
which lowers the similarity of rare items.  ``f_i`` is the content vector of item i and ``m`` the mean of the training items.
``axis_scaling: even`` first brings the principal axes of f closer to equal variance
(:func:`sda_core.principal_axes.principal_axes`).

With ``id+content`` both are added after division by their standard deviation over the items (mean over users), content with
the weight w and users with 1 - w.  ``content_weight: null`` takes the value of :data:`WEIGHTS_OF_CONTENT` with the highest
NDCG@10 on the validation targets.

It is a baseline that needs no training and follows the geometry of the vectors, which trained recommenders can learn to
ignore.  With ``content`` it ranks items without a purchase like all others.  With ``id+content`` their similarity by users is 0,
so ``new_item_cost`` may be needed to recommend them (:mod:`sda_core.recommenders.new_items`).

Cost: the time of the similarity by users grows with the sum over users of the squared number of their training items, and a
model stores ``num_neighbors`` ids and similarities per item.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.params import NearestParams
from sda_core.principal_axes import principal_axes, project
from sda_core.recommenders.base import EpochRecord, Recommender
from sda_core.recommenders.batches import EvaluationData, Histories, TrainingData, validation_view
from sda_core.recommenders.new_items import raise_new_items
from sda_core.recommenders.position import USERS_PER_CHUNK, batches_by_length, count_positions, ndcg_at_10, users_at_once

_log = logging.getLogger(__name__)

WEIGHTS_OF_CONTENT = tuple(step / 10 for step in range(11))
"""The candidates of w, from users alone to content alone."""

_ITEMS_PER_CHUNK = 256  # items whose similarity to all others is computed at once
_USERS_OF_SPREAD = 1000  # users whose scores give the two standard deviations


class Nearest(Recommender):
    """Nearest items, see the module's docstring.  An empty history gives every item the same score.

    Args:
        params, num_users, num_items, item_vectors: see the base class.  Without vectors the similarity is that by users,
            whatever ``params.representation``.
    """

    neighbor_ids_IK: Tensor
    neighbor_similarities_IK: Tensor
    mean_D: Tensor
    axes_DK: Tensor
    spreads: Tensor
    content_weight: Tensor
    new_item_offset_I: Tensor | None

    def __init__(self, params: NearestParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        self.history_length = params.max_length
        self.settings = params
        self.item_vectors = item_vectors
        self.uses_users = item_vectors is None or params.representation != "content"
        self.uses_content = item_vectors is not None and params.representation != "id"
        if self.uses_users:
            shape = num_items + 1, min(params.num_neighbors, num_items)
            self.register_buffer("neighbor_ids_IK", torch.zeros(shape, dtype=torch.int32))
            self.register_buffer("neighbor_similarities_IK", torch.zeros(shape))
        if self.uses_content:
            assert item_vectors is not None
            width = item_vectors.shape[1]
            self.register_buffer("mean_D", torch.zeros(width))
            self.register_buffer("axes_DK", torch.eye(width) if params.axis_scaling == "even" else torch.zeros(0, 0))
        if self.uses_users and self.uses_content:
            self.register_buffer("spreads", torch.ones(2))  # of the scores by users, and by content
            self.register_buffer("content_weight", torch.tensor(0.5 if params.content_weight is None else params.content_weight))
        raises = params.new_item_cost is not None and self.uses_content
        self.register_buffer("new_item_offset_I", torch.zeros(num_items + 1) if raises else None)
        self._unit_ID: Tensor | None = None
        self._keeps_scores = False
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # histories, and their scores by users and by content

    # ------------------------------------------------------------------------------------------- fit
    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """Compute the similarities, and choose the weight of content.

        There is no checkpoint: 10,000 items and 20,000 users take about a minute, most of it for the choice of the weight.

        With ``new_item_cost`` the scores of new items are raised at the end, see :mod:`sda_core.recommenders.new_items`.

        Returns:
            One record without a loss, which has NDCG@10 on the validation targets.
        """
        del checkpoint, fingerprint
        self.check_data(data)
        if self.uses_users:
            self._find_neighbors(data.train)
        if self.uses_content:
            self._find_axes(data.train)
        self.to(device)
        self.eval()
        validation = validation_view(data)
        if self.new_item_offset_I is not None:
            self.new_item_offset_I.zero_()
        ndcg = None
        if self.uses_users and self.uses_content:
            self._measure_spreads(data.train, device)
            if self.settings.content_weight is None:
                ndcg = self._choose_weight(validation, device)
        if self.new_item_offset_I is not None:
            raise_new_items(self, self.new_item_offset_I, data, self.settings.new_item_cost or 0.0, device)
            ndcg = None  # it is that of other scores
        if ndcg is None and len(validation.users):
            ndcg = self._validate(validation, device)
        return [EpochRecord(1, None, ndcg, is_best=True)]

    def _find_neighbors(self, train: Histories) -> None:
        """Keep the most similar items of each item; among equally similar ones those with the lowest ids."""
        users = np.arange(len(train.offsets) - 1)
        rows, items = train.pairs(users)
        matrix_UI = scipy.sparse.csr_matrix(
            (np.ones(len(rows)), (rows, items)), shape=(len(users), self.num_items + 1), dtype=np.float64
        )
        by_item_IU = matrix_UI.T.tocsr()
        length_I = np.sqrt(np.bincount(items, minlength=self.num_items + 1))
        ids_IK = np.zeros(tuple(self.neighbor_ids_IK.shape), dtype=np.int32)
        similarities_IK = np.zeros(ids_IK.shape, dtype=np.float32)
        for start in range(0, self.num_items + 1, _ITEMS_PER_CHUNK):
            together = (by_item_IU[start : start + _ITEMS_PER_CHUNK] @ matrix_UI).tocoo()
            here, others = together.row + start, together.col
            similarity = together.data / (length_I[here] * length_I[others] + self.settings.shrinkage)
            is_other = here != others
            here, others, similarity = here[is_other], others[is_other], similarity[is_other]
            order = np.lexsort((others, -similarity, here))
            here, others, similarity = here[order], others[order], similarity[order]
            place = np.arange(len(here)) - np.searchsorted(here, here)
            is_kept = place < ids_IK.shape[1]
            ids_IK[here[is_kept], place[is_kept]] = others[is_kept]
            similarities_IK[here[is_kept], place[is_kept]] = similarity[is_kept]
        self.neighbor_ids_IK.copy_(torch.from_numpy(ids_IK))
        self.neighbor_similarities_IK.copy_(torch.from_numpy(similarities_IK))

    def _find_axes(self, train: Histories) -> None:
        """The mean and the axes of the training items that have a vector; without any, the vectors stay unchanged."""
        assert self.item_vectors is not None
        self._unit_ID = None
        fit_rows = np.unique(train.item_ids)
        fit_rows = fit_rows[self.item_vectors[fit_rows].any(axis=1)]
        if not len(fit_rows):
            return
        if self.settings.axis_scaling == "none":
            self.mean_D.copy_(torch.from_numpy(self.item_vectors[fit_rows].mean(axis=0, dtype=np.float64)))
            return
        mean_D, axes_DK = principal_axes(self.item_vectors, fit_rows, self.item_vectors.shape[1], even=True)
        self.mean_D.copy_(torch.from_numpy(mean_D))
        self.axes_DK.zero_()  # fewer training items than columns give fewer axes
        self.axes_DK[:, : axes_DK.shape[1]] = torch.from_numpy(axes_DK)

    def _measure_spreads(self, train: Histories, device: torch.device) -> None:
        """The mean standard deviation over the items of each kind of score, for training histories of some users."""
        users = np.flatnonzero(train.lengths)
        users = users[np.unique(np.linspace(0, len(users) - 1, min(len(users), _USERS_OF_SPREAD)).astype(np.int64))]
        size = users_at_once(USERS_PER_CHUNK, self.num_items + 1)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(users), size):
            history_BL = train.last(users[start : start + size], self.history_length)
            history_BL = torch.from_numpy(history_BL).to(device, torch.int64)
            for index, score in enumerate((self._score_by_users, self._score_by_content)):
                sums[index] += score(history_BL)[:, 1:].double().std(dim=1, correction=0).sum().cpu()
        spreads = sums / len(users)
        self.spreads.copy_(torch.where(spreads > 0, spreads, 1.0))

    def _choose_weight(self, validation: EvaluationData, device: torch.device) -> float | None:
        """Set the weight with the highest NDCG@10, the lowest of equally good ones.

        Returns:
            That NDCG@10; None if no user has a validation target.
        """
        if not len(validation.users):
            self.content_weight.fill_(0.5)
            _log.warning("nearest: no user has a validation target, so content_weight is %.1f", float(self.content_weight))
            return None
        found = self._validate_weights(validation, device)
        self.content_weight.fill_(WEIGHTS_OF_CONTENT[int(np.argmax(found))])
        _log.info(
            "nearest: content_weight %.1f has the highest valid ndcg@10, %.4f (by users alone %.4f, by content alone %.4f)",
            float(self.content_weight),
            max(found),
            found[0],
            found[-1],
        )
        return max(found)

    def _validate_weights(self, validation: EvaluationData, device: torch.device) -> list[float]:
        """NDCG@10 on the validation targets with each of :data:`WEIGHTS_OF_CONTENT`.

        Both similarities are computed once for each batch of users, because only their sum depends on the weight.
        """
        counts_WU3 = np.zeros((len(WEIGHTS_OF_CONTENT), len(validation.users), 3), dtype=np.int64)
        self._keeps_scores = True
        try:
            for rows in batches_by_length(self, validation, USERS_PER_CHUNK):  # each part is a batch of count_positions
                part = replace(validation, users=validation.users[rows], targets=validation.targets[rows])
                for index, weight in enumerate(WEIGHTS_OF_CONTENT):
                    self.content_weight.fill_(weight)
                    counts_WU3[index, rows] = count_positions(self, part, None, USERS_PER_CHUNK, device)
        finally:
            self._keeps_scores, self._kept = False, None
        return [ndcg_at_10(counts_U3) for counts_U3 in counts_WU3]

    def _validate(self, validation: EvaluationData, device: torch.device) -> float:
        return ndcg_at_10(count_positions(self, validation, None, USERS_PER_CHUNK, device))

    # ------------------------------------------------------------------------------------------- scores
    def _units(self) -> Tensor:
        """Content vectors of unit length, ``(I + 1, K)``; zero for padding and for items whose vector is zero."""
        if self._unit_ID is None or self._unit_ID.device != self.mean_D.device:
            assert self.item_vectors is not None
            mean_D, axes_DK = self.mean_D.cpu().numpy(), self.axes_DK.cpu().numpy()
            has_vector = self.item_vectors.any(axis=1)
            moved = project(self.item_vectors, mean_D, axes_DK) if len(axes_DK) else self.item_vectors - mean_D
            moved[~has_vector] = 0.0
            self._unit_ID = F.normalize(torch.from_numpy(moved), dim=1, eps=1e-30).to(self.mean_D.device)
        return self._unit_ID

    def _used_history(self, history_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The latest ``max_length`` items of each history ``(B, L)``, and their number ``(B, 1)``, at least 1."""
        used_BL = history_BL[:, -self.history_length :]
        return used_BL, (used_BL > 0).sum(dim=1, keepdim=True).clamp_min(1)

    def _queries_of(self, history_BL: Tensor) -> Tensor:
        used_BL, length_B1 = self._used_history(history_BL)
        return self._units()[used_BL].sum(dim=1) / length_B1

    def _score_by_content(self, history_BL: Tensor) -> Tensor:
        return self._queries_of(history_BL) @ self._units().T

    def _score_by_users(self, history_BL: Tensor) -> Tensor:
        used_BL, length_B1 = self._used_history(history_BL)
        B = len(used_BL)
        ids_Bn = self.neighbor_ids_IK[used_BL].reshape(B, -1).long()
        similarity_Bn = self.neighbor_similarities_IK[used_BL].reshape(B, -1)
        return similarity_Bn.new_zeros(B, self.num_items + 1).scatter_add_(1, ids_Bn, similarity_Bn) / length_B1

    def _both_scores(self, history_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The scores by users and by content; while the weight is chosen, those of the last histories are kept."""
        if self._kept is not None and torch.equal(self._kept[0], history_BL):
            return self._kept[1:]
        found = self._score_by_users(history_BL), self._score_by_content(history_BL)
        if self._keeps_scores:
            self._kept = (history_BL, *found)
        return found

    def _item_matrix(self) -> Tensor | None:
        if self.uses_users:
            return None
        if self.new_item_offset_I is None:
            return self._units()
        return torch.cat([self._units(), self.new_item_offset_I[:, None]], dim=1)

    def _queries(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        if self.uses_users:
            return super()._queries(user_ids_B, history_BL)
        query_BK = self._queries_of(history_BL)
        return query_BK if self.new_item_offset_I is None else torch.cat([query_BK, _has_history(history_BL)], dim=1)

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        if not self.uses_users:
            score_BI = self._score_by_content(history_BL)
        elif not self.uses_content:
            score_BI = self._score_by_users(history_BL)
        else:
            of_users, of_content = (1.0 - self.content_weight) / self.spreads[0], self.content_weight / self.spreads[1]
            by_users_BI, by_content_BI = self._both_scores(history_BL)
            score_BI = of_users * by_users_BI + of_content * by_content_BI
        return score_BI if self.new_item_offset_I is None else score_BI + _has_history(history_BL) * self.new_item_offset_I


def _has_history(history_BL: Tensor) -> Tensor:
    """``(B, 1)``: 1.0 for each history with an item, else 0.0."""
    return (history_BL > 0).any(dim=1, keepdim=True).float()
