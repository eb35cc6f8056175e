"""Base class of SASRec and BERT4Rec: tied item embeddings, a transformer, and losses of its states."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.errors import ConfigError, TrainingError
from sda_core.params import BERT4RecParams, SASRecParams
from sda_core.recommenders import losses
from sda_core.recommenders.base import EpochRecord
from sda_core.recommenders.batches import TrainingData
from sda_core.recommenders.features import ItemEncoder
from sda_core.recommenders.fit import Batch, TrainedRecommender
from sda_core.recommenders.new_items import raise_new_items
from sda_core.recommenders.transformer import Transformer
from sda_core.traits import aligns_to_ids


class SequentialRecommender(TrainedRecommender):
    """Base class of sequential recommenders; scores are dot products of a history's state with the tied item embeddings.

    Negatives: ``bce`` draws separate ones for every target, as SASRec does; ``gbce`` and ``sampled_softmax`` draw
    ``num_negatives`` per step and share them among all its targets, which replaces N gathers per target by one matrix
    product.  A drawn item that equals the target is ignored.

    With ``align_weight``, :func:`losses.soft_target_contrast` aligns the projected vectors of a batch's targets with their
    rows in the item table of the same recommender trained on ids alone, a constant input of ``fit``.
    """

    new_item_offset_I: Tensor | None

    def __init__(
        self,
        params: SASRecParams | BERT4RecParams,
        num_users: int,
        num_items: int,
        item_vectors: np.ndarray | None,
        *,
        feed_forward_size: int,
        activation: str,
        causal: bool,
    ) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        if params.hidden_size % params.num_heads:
            where = f"params.yaml: train_recommender.{params.kind}.hidden_size"
            raise ConfigError(where, f"should be a multiple of num_heads (got {params.hidden_size} and {params.num_heads})")
        self.fit_params = params
        self.sequence_params = params
        self.is_causal = causal
        self.items = ItemEncoder(
            num_items, params.hidden_size, item_vectors, params.representation, params.dropout, params.id_dropout
        )
        self.transformer = Transformer(
            max_length=params.max_length,
            hidden_size=params.hidden_size,
            num_blocks=params.num_blocks,
            num_heads=params.num_heads,
            feed_forward_size=feed_forward_size,
            dropout=params.dropout,
            activation=activation,
            causal=causal,
        )
        self._table_ID: Tensor | None = None
        self._reference_ID: Tensor | None = None
        raises = params.new_item_cost is not None and self.items.projector is not None
        self.register_buffer("new_item_offset_I", torch.zeros(num_items + 1) if raises else None)  # saved with the model

    @property
    def is_aligned(self) -> bool:
        """Whether training aligns projected vectors to an item table."""
        return aligns_to_ids(self.sequence_params) and self.items.projector is not None

    def check_data(self, data: TrainingData) -> None:
        """As in the base class, and check that there is an item table for the alignment if one is needed."""
        super().check_data(data)
        if not self.is_aligned:
            return
        expected = (self.num_items + 1, self.sequence_params.hidden_size)
        if data.item_table is None or data.item_table.shape != expected:
            found = "none" if data.item_table is None else f"one of shape {data.item_table.shape}"
            raise TrainingError(
                f"train_recommender.{self.params.kind}",
                f"align_weight needs an item table of shape {expected} to align to (got {found})",
                "train the variant id first, with the same params",
            )

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """As in the base class, with the item table of the alignment; an item that is not in ``data.train`` has no learned id.

        With ``new_item_cost`` the scores of such items are raised at the end, see :mod:`sda_core.recommenders.new_items`.
        """
        self.check_data(data)
        seen_items = np.unique(data.train.item_ids).astype(np.int64)
        self.items.keep_ids_of(torch.from_numpy(seen_items))
        if self.is_aligned and data.item_table is not None:
            self._reference_ID = torch.from_numpy(data.item_table).to(device)
        records = super().fit(data, checkpoint=checkpoint, fingerprint=fingerprint, device=device)
        self._reference_ID = None
        if self.new_item_offset_I is not None:
            raise_new_items(self, self.new_item_offset_I, data, self.sequence_params.new_item_cost or 0.0, device)
        return records

    def train(self, mode: bool = True) -> SequentialRecommender:
        """Switch between training and scoring; clears the item table, which is computed once per scoring phase."""
        self._table_ID = None
        super().train(mode)
        return self

    def item_table(self) -> Tensor:
        """The item table ``(I + 1, hidden)`` for scoring."""
        if self._table_ID is None or self._table_ID.device != self.transformer.positions.weight.device:
            self._table_ID = self.items.table().detach()
        return self._table_ID

    def _item_matrix(self) -> Tensor:
        if self.new_item_offset_I is None:
            return self.item_table()
        return torch.cat([self.item_table(), self.new_item_offset_I[:, None]], dim=1)

    def _queries(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        state_BD = self._last_states_of(history_BL)
        return state_BD if self.new_item_offset_I is None else F.pad(state_BD, (0, 1), value=1.0)

    @abstractmethod
    def _last_states_of(self, history_BL: Tensor) -> Tensor:
        """The states ``(B, D)`` after a history, which are multiplied with the item table."""

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        return self._queries(user_ids_B, history_BL) @ self._item_matrix().T

    # ------------------------------------------------------------------------------------------- training
    def draw_negatives(self, target_P: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Uniform item ids: ``(P, N)`` for bce, else ``(N,)``; empty for softmax, which does not use them."""
        size = self.sequence_params.num_negatives
        match self.sequence_params.loss:
            case "bce":
                drawn = random.integers(1, max(2, self.num_items), size=(len(target_P), size))
                return drawn + ((drawn >= target_P[:, None]) & (self.num_items > 1))  # uniform over all items except the target
            case "gbce" | "sampled_softmax":
                return random.integers(1, self.num_items + 1, size=size)
            case "softmax":
                return np.zeros(0, dtype=np.int64)
            case _:
                assert_never(self.sequence_params.loss)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over the targets of the batch, plus the alignment over the same targets."""
        loss = self.loss_over(batch)
        if self._reference_ID is None:
            return loss
        item_n, count_n = torch.unique(batch["target_P"], return_counts=True)
        alignment = losses.soft_target_contrast(
            self._reference_ID[item_n], self.items.projected(item_n), count_n, self.sequence_params.align_temperature
        )
        return loss + self.sequence_params.align_weight * alignment

    def loss_over(self, batch: Batch) -> Tensor:
        """The loss of a batch with ``history_BL``, ``is_target_BL``, ``target_P`` and ``negative`` ids.

        Embeddings are computed once per distinct item of the batch, because projections are expensive.
        """
        history_BL, target_P, negative = batch["history_BL"], batch["target_P"], batch["negative"]
        if self.sequence_params.loss == "softmax":
            table = self.items.table()
            item_BLD = F.embedding(history_BL.clamp(max=self.num_items), table)
            state_PD = self.states(item_BLD, history_BL, batch["is_target_BL"])
            return losses.softmax(state_PD @ table.T, target_P)
        ids = torch.cat([history_BL.clamp(max=self.num_items).flatten(), target_P, negative.flatten()])
        distinct, inverse = torch.unique(ids, return_inverse=True)
        table = self.items(distinct)
        history_index, target_index, negative_index = inverse.split([history_BL.numel(), target_P.numel(), negative.numel()])
        state_PD = self.states(F.embedding(history_index.view_as(history_BL), table), history_BL, batch["is_target_BL"])
        positive_P = (state_PD * F.embedding(target_index, table)).sum(dim=1)
        negative_nD = F.embedding(negative_index, table)
        if negative.ndim == 2:
            negative_PN = torch.einsum("pd,pnd->pn", state_PD, negative_nD.view(*negative.shape, -1))
            is_target_PN = negative == target_P[:, None]
        else:
            negative_PN = state_PD @ negative_nD.T
            is_target_PN = negative[None, :] == target_P[:, None]
        negative_PN = negative_PN.masked_fill(is_target_PN, -torch.inf)
        match self.sequence_params.loss:
            case "bce":
                return losses.bce(positive_P, negative_PN)
            case "gbce":
                return losses.gbce(positive_P, negative_PN, self.num_items, self.sequence_params.gbce_t)
            case "sampled_softmax":
                return losses.sampled_softmax(positive_P, negative_PN)
            case _:
                assert_never(self.sequence_params.loss)

    # ------------------------------------------------------------------------------------------ the network
    def states(self, item_BLD: Tensor, history_BL: Tensor, at_BL: Tensor | None = None) -> Tensor:
        """States ``(B, L, D)`` of a history whose items are already embedded, or ``(P, D)`` of the positions ``at_BL``.

        Padding is zeroed here.  As inputs, embeddings are multiplied by the root of their width, as in SASRec: their initial
        values are small, because they are also output weights, and would be negligible beside the outputs of the blocks.
        """
        is_item_BL = history_BL != 0
        return self.transformer(item_BLD * (is_item_BL[..., None] * self.sequence_params.hidden_size**0.5), is_item_BL, at_BL)

    def last_states(self, item_BLD: Tensor, history_BL: Tensor) -> Tensor:
        """:meth:`states` of the last positions, ``(B, D)``."""
        at_BL = torch.zeros_like(history_BL, dtype=torch.bool)
        at_BL[:, -1] = True
        return self.states(item_BLD, history_BL, at_BL)
