"""SASRec: self-attentive sequential recommendation (Kang & McAuley 2018).

Each position of a history predicts the next item.  With ``causal: false`` a position attends to later ones, including its
own target, as in the public code of LLMEmb and derived works.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.params import SASRecParams
from sda_core.recommenders.batches import TrainingData, batches_by_length
from sda_core.recommenders.fit import Batch
from sda_core.recommenders.sequential import SequentialRecommender


class SASRec(SequentialRecommender):
    """SASRec, see the module's docstring; trained on the last ``max_length`` transitions of each user."""

    def __init__(self, params: SASRecParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(
            params,
            num_users,
            num_items,
            item_vectors,
            feed_forward_size=params.hidden_size,
            activation="relu",
            causal=params.causal,
        )
        self.history_length = params.max_length

    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """Batches whose inputs are all items except the last, and whose targets are all except the first."""
        max_length = self.sequence_params.max_length
        users = np.flatnonzero(data.train.lengths >= 2)
        if len(users) == 0:
            problem = "no user has two training interactions, an item and the one after it"
            advice = "take a shop with longer histories (filter.min_user_interactions), or leave sasrec out of recommenders"
            raise TrainingError("train_recommender.sasrec", problem, advice)
        num_targets = np.minimum(data.train.lengths[users] - 1, max_length)
        for rows in batches_by_length(num_targets, self.fit_params.batch_size, random):
            sequence = data.train.last(users[rows], int(num_targets[rows].max()) + 1).astype(np.int64)
            history, target = sequence[:, :-1], sequence[:, 1:]
            is_target = history != 0
            target_P = target[is_target]
            yield {
                "history_BL": torch.from_numpy(np.ascontiguousarray(history)),
                "is_target_BL": torch.from_numpy(is_target),
                "target_P": torch.from_numpy(target_P),
                "negative": torch.from_numpy(self.draw_negatives(target_P, random)),
            }

    def _last_states_of(self, history_BL: Tensor) -> Tensor:
        if history_BL.shape[1] == 0:
            history_BL = F.pad(history_BL, (1, 0))
        history_BL = history_BL[:, -self.sequence_params.max_length :]
        return self.last_states(F.embedding(history_BL, self.item_table()), history_BL)
