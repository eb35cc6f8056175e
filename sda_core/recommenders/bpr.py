"""BPR: matrix factorisation on ids, trained by pairs (Rendle et al. 2009).

    x_ui = beta_i + gamma_u . gamma_i

The global offset and the user's bias are omitted, because they shift all scores of a user equally.  Item vectors are not
used: every variant gives the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.params import BPRParams, VBPRParams
from sda_core.recommenders import losses
from sda_core.recommenders.base import EpochRecord
from sda_core.recommenders.batches import TrainingData
from sda_core.recommenders.fit import Batch, TrainedRecommender
from sda_core.recommenders.pairs import factors, forget_unknown_users, pair_batches


class BPR(TrainedRecommender):
    """BPR, see the module's docstring.  User 0 (unknown) has zero factors, so its scores are the items' biases."""

    def __init__(self, params: BPRParams | VBPRParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        self.fit_params = params
        self.regularization = params.embedding_regularization
        self.user_factors = factors(num_users, params.factor_size)
        self.item_factors = factors(num_items, params.factor_size)
        self.item_bias = nn.Parameter(torch.zeros(num_items + 1))
        self._table: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> BPR:
        """Switch between training and scoring; clears the item table, which is computed once per scoring phase."""
        self._table = None
        super().train(mode)
        return self

    def user_tables(self) -> tuple[nn.Embedding, ...]:
        """The tables of user factors, to be concatenated."""
        return (self.user_factors,)

    def items(self, item_ids_n: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Factors ``(n, K)`` and biases ``(n,)`` of items; K is the total width of the user factors."""
        return self.item_factors.weight[item_ids_n], self.item_bias[item_ids_n]

    def users(self, user_ids_B: Tensor) -> Tensor:
        """Factors ``(B, K)``."""
        return torch.cat([table(user_ids_B) for table in self.user_tables()], dim=1)

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """As in the base class; users without a training interaction get zero factors, so their ranking is by biases."""
        forget_unknown_users(data, *self.user_tables())
        return super().fit(data, checkpoint=checkpoint, fingerprint=fingerprint, device=device)

    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """Every training interaction once per epoch, each with an item that the user does not have in training."""
        return pair_batches(data, self.fit_params.batch_size, random, self.params.kind)

    def loss(self, batch: Batch) -> Tensor:
        """BPR, plus the squared lengths of the used factors and biases, averaged over the batch."""
        user_BK = self.users(batch["user_B"])
        ids = torch.cat([batch["positive_B"], batch["negative_B"]])
        factors_nK, bias_n = self.items(ids)
        (positive_BK, negative_BK), (bias_B, negative_bias_B) = factors_nK.chunk(2), bias_n.chunk(2)
        positive_B = (user_BK * positive_BK).sum(dim=1) + bias_B
        negative_B = (user_BK * negative_BK).sum(dim=1) + negative_bias_B
        return losses.bpr(positive_B, negative_B) + self.penalty(user_BK, ids, factors_nK) / len(user_BK)

    def penalty(self, user_BK: Tensor, item_ids_n: Tensor, factors_nK: Tensor) -> Tensor:  # noqa: ARG002 (VBPR's)
        """Weighted squared lengths, summed over users, items and all of their factors."""
        lengths = user_BK.square().sum() + self.item_factors(item_ids_n).square().sum()
        return self.regularization * (lengths + self.item_bias[item_ids_n].square().sum())

    def _items(self) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table[0].device != self.item_bias.device:
            factors_IK, bias_I = self.items(slice(None))
            self._table = (factors_IK.detach(), bias_I.detach())
        return self._table

    def _item_matrix(self) -> Tensor:
        factors_IK, bias_I = self._items()
        return torch.cat([factors_IK, bias_I[:, None]], dim=1)

    def _queries(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        user_BK = self.users(user_ids_B)
        return torch.cat([user_BK, user_BK.new_ones(len(user_BK), 1)], dim=1)  # the last one multiplies the item's bias

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        factors_IK, bias_I = self._items()
        return torch.addmm(bias_I, self.users(user_ids_B), factors_IK.T)
