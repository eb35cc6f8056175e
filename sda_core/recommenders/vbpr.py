"""VBPR: matrix factorisation with a content factor (He & McAuley 2016, eq. 4), trained by BPR.

    x_ui = beta_i + gamma_u . gamma_i + theta_u . (E f_i) + beta' . f_i

The global offset and the user's bias of the equation are omitted, because they shift all scores of a user equally.  Without
content vectors the last two terms are omitted, which gives BPR-MF (Rendle et al. 2009).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.params import VBPRParams
from sda_core.recommenders.bpr import BPR
from sda_core.recommenders.features import standardise
from sda_core.recommenders.fit import Batch
from sda_core.recommenders.pairs import INITIAL_STD, factors


class VBPR(BPR):
    """VBPR, see the module's docstring.  User 0 (unknown) has zero factors, so its scores are the items' biases."""

    vectors_ID: Tensor

    def __init__(self, params: VBPRParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        self.content_item_regularization = params.content_item_regularization
        self.content_regularization = params.content_regularization
        self.content_bias_regularization = params.content_bias_regularization
        self.has_content = item_vectors is not None
        if item_vectors is not None:
            width = item_vectors.shape[1]
            self.register_buffer("vectors_ID", torch.from_numpy(standardise(item_vectors)), persistent=False)
            self.user_content_factors = factors(num_users, params.content_factor_size)
            self.content_projection = nn.Linear(width, params.content_factor_size, bias=False)  # E
            self.content_bias = nn.Linear(width, 1, bias=False)  # beta'
            # The vectors have mean squared length 1, so this gives projected items the scale of the item factors.
            nn.init.normal_(self.content_projection.weight, std=INITIAL_STD)
            nn.init.zeros_(self.content_bias.weight)

    def user_tables(self) -> tuple[nn.Embedding, ...]:
        """The tables gamma and, with content, theta."""
        return (self.user_factors, self.user_content_factors) if self.has_content else (self.user_factors,)

    def items(self, item_ids_n: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Factors ``(n, K)`` and biases ``(n,)`` of items; K spans both kinds of factors."""
        learned_nK, bias_n = super().items(item_ids_n)
        if not self.has_content:
            return learned_nK, bias_n
        weight = torch.cat([self.content_projection.weight, self.content_bias.weight])
        if isinstance(item_ids_n, Tensor) and len(item_ids_n) < len(self.vectors_ID):
            content_nK = F.linear(self.vectors_ID[item_ids_n], weight)
        else:  # a small catalogue: projecting all items is cheaper than those of a batch
            content_nK = F.linear(self.vectors_ID, weight)
            content_nK = F.embedding(item_ids_n, content_nK) if isinstance(item_ids_n, Tensor) else content_nK[item_ids_n]
        return torch.cat([learned_nK, content_nK[:, :-1]], dim=1), bias_n + content_nK[:, -1]

    def penalty(self, user_BK: Tensor, item_ids_n: Tensor, factors_nK: Tensor) -> Tensor:
        """As in BPR, plus the squared lengths of the items' content factors ``E f_i``."""
        penalty = super().penalty(user_BK, item_ids_n, factors_nK)
        if not self.has_content:
            return penalty
        return penalty + self.content_item_regularization * factors_nK[:, self.item_factors.embedding_dim :].square().sum()

    def loss(self, batch: Batch) -> Tensor:
        """As in BPR, plus the squared lengths of E and beta'.

        These two are part of every triple: their penalty counts in full in every step, but that of a factor only as often as
        its user or item occurs.  So they have separate weights, much smaller ones for E (with that of the factors E stays
        zero).  A penalty of E alone is not sufficient: it hardly affects an axis along which the vectors vary much, because a
        small weight moves the items far.  The penalty of ``E f_i`` is independent of the geometry of the content.
        """
        loss = super().loss(batch)
        if self.has_content:
            loss = loss + self.content_regularization * self.content_projection.weight.square().sum()
            loss = loss + self.content_bias_regularization * self.content_bias.weight.square().sum()
        return loss
