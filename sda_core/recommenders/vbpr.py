"""VBPR: matrix factorisation with a content factor (He & McAuley 2016, eq. 4), trained by BPR.

    x_ui = beta_i + gamma_u . gamma_i + theta_u . (E f_i) + beta' . f_i

The global offset and the user's bias of the equation are left out: they move all of a user's scores alike.  Without
content vectors the last two terms go, which leaves BPR-MF (Rendle et al. 2009).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.errors import TrainingError
from sda_core.params import VBPRParams
from sda_core.recommenders import losses
from sda_core.recommenders.base import EpochRecord
from sda_core.recommenders.batches import TrainingData
from sda_core.recommenders.features import standardise
from sda_core.recommenders.fit import Batch, TrainedRecommender

INITIAL_STD = 0.1  # of user and item factors


class VBPR(TrainedRecommender):
    """See the module's docstring.  User 0 (unknown) has zero factors: it gets the items' biases."""

    vectors_ID: Tensor

    def __init__(self, params: VBPRParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        self.fit_params = params
        self.regularization = params.embedding_regularization
        self.content_regularization = params.content_regularization
        self.has_content = item_vectors is not None
        self.user_factors = _factors(num_users, params.factor_size)
        self.item_factors = _factors(num_items, params.factor_size)
        self.item_bias = nn.Parameter(torch.zeros(num_items + 1))
        if item_vectors is not None:
            width = item_vectors.shape[1]
            self.register_buffer("vectors_ID", torch.from_numpy(standardise(item_vectors)), persistent=False)
            self.user_content_factors = _factors(num_users, params.content_factor_size)
            self.content_projection = nn.Linear(width, params.content_factor_size, bias=False)  # E
            self.content_bias = nn.Linear(width, 1, bias=False)  # beta'
            # The vectors have length 1, so this gives projected items the scale of the item factors.
            nn.init.normal_(self.content_projection.weight, std=INITIAL_STD)
            nn.init.zeros_(self.content_bias.weight)
        self._table: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> VBPR:
        """Switch between training and scoring; forgets the item table, which is computed once a scoring phase."""
        self._table = None
        super().train(mode)
        return self

    def _items(self, item_ids_n: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Factors ``(n, K)`` and biases ``(n,)`` of items; K spans both kinds of factors."""
        factors, bias = self.item_factors.weight[item_ids_n], self.item_bias[item_ids_n]
        if not self.has_content:
            return factors, bias
        vectors = self.vectors_ID[item_ids_n]
        return torch.cat([factors, self.content_projection(vectors)], dim=1), bias + self.content_bias(vectors)[:, 0]

    def _users(self, user_ids_B: Tensor) -> Tensor:
        factors = self.user_factors(user_ids_B)
        return torch.cat([factors, self.user_content_factors(user_ids_B)], dim=1) if self.has_content else factors

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """As the base does; users without a training interaction get factors of zero, so biases alone rank their items."""
        unknown = torch.from_numpy(np.flatnonzero(data.train.lengths == 0))
        with torch.no_grad():
            self.user_factors.weight[unknown] = 0.0
            if self.has_content:
                self.user_content_factors.weight[unknown] = 0.0
        return super().fit(data, checkpoint=checkpoint, fingerprint=fingerprint, device=device)

    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """Every training interaction once an epoch, each with an item that the user has not in training."""
        users = np.repeat(np.arange(data.num_users + 1), data.train.lengths)
        items = data.train.item_ids.astype(np.int64)
        negatives, is_drawn = draw_unseen(users, items, self.num_items, random)
        order = random.permutation(len(users))
        order = order[is_drawn[order]]
        if len(order) == 0:
            raise TrainingError("train_recommender.vbpr", "every user has every item in training", "nothing is left to recommend")
        for start in range(0, len(order), self.fit_params.batch_size):
            rows = order[start : start + self.fit_params.batch_size]
            columns = {"user_B": users, "positive_B": items, "negative_B": negatives}
            yield {name: torch.from_numpy(column[rows]) for name, column in columns.items()}

    def loss(self, batch: Batch) -> Tensor:
        """BPR, the squared lengths of the factors and biases in use as means over the batch, and those of E and beta'."""
        user_BK = self._users(batch["user_B"])
        positive_BK, positive_bias_B = self._items(batch["positive_B"])
        negative_BK, negative_bias_B = self._items(batch["negative_B"])
        positive_B = (user_BK * positive_BK).sum(dim=1) + positive_bias_B
        negative_B = (user_BK * negative_BK).sum(dim=1) + negative_bias_B
        ids = torch.cat([batch["positive_B"], batch["negative_B"]])
        penalty = user_BK.square().sum() + self.item_factors(ids).square().sum() + self.item_bias[ids].square().sum()
        loss = losses.bpr(positive_B, negative_B) + self.regularization * penalty / len(user_BK)
        if self.has_content:
            shared = self.content_projection.weight.square().sum() + self.content_bias.weight.square().sum()
            loss = loss + self.content_regularization * shared
        return loss

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        if self._table is None or self._table[0].device != self.item_bias.device:
            factors, bias = self._items(slice(None))
            self._table = (factors.detach(), bias.detach())
        factor_IK, bias_I = self._table
        return torch.addmm(bias_I, self._users(user_ids_B), factor_IK.T)


def _factors(num_rows: int, size: int) -> nn.Embedding:
    factors = nn.Embedding(num_rows + 1, size, padding_idx=0)
    nn.init.normal_(factors.weight, std=INITIAL_STD)
    with torch.no_grad():
        factors.weight[0] = 0.0
    return factors


def draw_unseen(
    users: np.ndarray, items: np.ndarray, num_items: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """For each interaction a uniform item that its user has no interaction with.

    Args:
        users, items: ``(n,)`` int64, the interactions.
        num_items: I.
        random: source of the draws.

    Returns:
        item ids ``(n,)``, and a mask ``(n,)`` of those that could be drawn: a user with nearly all items may get none
        in the number of tries.
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
