"""BERT4Rec: prediction of masked items with bidirectional attention (Sun et al. 2019).

There are two kinds of training rows, as in the public code of LLMEmb: items masked at random, or only the last item masked,
as in scoring.  The output layer is the paper's eq. 7 without item biases, so that a model with content vectors only has no
item-specific weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.params import BERT4RecParams
from sda_core.recommenders.batches import TrainingData, batches_by_length
from sda_core.recommenders.features import INITIAL_STD
from sda_core.recommenders.fit import Batch
from sda_core.recommenders.sequential import SequentialRecommender


class BERT4Rec(SequentialRecommender):
    """BERT4Rec, see the module's docstring.  The mask's id is ``I + 1``; it has no row in the item table and no score."""

    def __init__(self, params: BERT4RecParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(
            params,
            num_users,
            num_items,
            item_vectors,
            feed_forward_size=4 * params.hidden_size,
            activation="gelu",
            causal=False,
        )
        self.history_length = max(1, params.max_length - 1)  # the mask takes the last place
        self.masked_sequences = params
        self.mask_id = num_items + 1
        self.mask_D = nn.Parameter(torch.randn(params.hidden_size) * INITIAL_STD)
        self.output = nn.Linear(params.hidden_size, params.hidden_size)
        self.output_norm = nn.LayerNorm(params.hidden_size)
        nn.init.xavier_normal_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """Every user once per epoch, masked in one of the two ways."""
        params = self.masked_sequences
        users = np.flatnonzero(data.train.lengths)
        lengths = np.minimum(data.train.lengths[users], params.max_length)
        masks_last = random.random(len(users)) < params.last_item_mask_share
        for rows in batches_by_length(lengths, self.fit_params.batch_size, random):
            sequence = data.train.last(users[rows], int(lengths[rows].max())).astype(np.int64)
            is_masked = random.random(sequence.shape) < params.mask_probability
            is_masked &= (sequence != 0) & ~masks_last[rows, None]
            is_masked[:, -1] |= ~is_masked.any(axis=1)  # the other kind of rows, and rows without a random mask
            target_P = sequence[is_masked]
            yield {
                "history_BL": torch.from_numpy(np.where(is_masked, self.mask_id, sequence)),
                "is_target_BL": torch.from_numpy(is_masked),
                "target_P": torch.from_numpy(target_P),
                "negative": torch.from_numpy(self.draw_negatives(target_P, random)),
            }

    def states(self, item_BLD: Tensor, history_BL: Tensor, at_BL: Tensor | None = None) -> Tensor:
        """As in the base class, with the mask's embedding, and followed by the output layer."""
        item_BLD = torch.where((history_BL == self.mask_id)[..., None], self.mask_D, item_BLD)
        return self.output_norm(F.gelu(self.output(super().states(item_BLD, history_BL, at_BL))))

    def _last_states_of(self, history_BL: Tensor) -> Tensor:
        history_BL = F.pad(history_BL, (0, 1), value=self.mask_id)[:, -self.masked_sequences.max_length :]
        return self.last_states(F.embedding(history_BL.clamp(max=self.num_items), self.item_table()), history_BL)
