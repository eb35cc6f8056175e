"""Popularity: the number of interactions of each item, the same for every user."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.params import PopParams
from sda_core.recommenders.base import EpochRecord, Recommender
from sda_core.recommenders.batches import TrainingData


class Pop(Recommender):
    """Popularity.  Scores are counts, so there are true ties; they are float64, which is exact up to 2^53.

    In validation and test only targets are counted (with a split by time a period may have further interactions).
    """

    counts_I: Tensor

    def __init__(self, params: PopParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__(params, num_users, num_items, item_vectors)
        self.counts: Literal["train", "train_valid", "all"] = params.counts
        self.register_buffer("counts_I", torch.zeros(num_items + 1, dtype=torch.int64))

    def check_data(self, data: TrainingData) -> None:
        """As in the base class, but ``counts: all`` requires the leaked test items, which other recommenders reject."""
        if self.counts != "all":
            super().check_data(data)
        elif data.leaked_test_items is None:
            raise TrainingError(
                "params.yaml: train_recommender.pop.counts", "is 'all', but no test items were given", "use 'train'"
            )

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:  # noqa: ARG002 (contract)
        """Count; there are no epochs."""
        self.check_data(data)
        counts = np.bincount(data.train.item_ids, minlength=self.num_items + 1)
        match self.counts:
            case "train":
                pass
            case "train_valid":
                counts += np.bincount(data.valid_target, minlength=self.num_items + 1)
            case "all":
                assert data.leaked_test_items is not None
                counts += np.bincount(data.valid_target, minlength=self.num_items + 1)
                counts += np.bincount(data.leaked_test_items, minlength=self.num_items + 1)
            case _:
                assert_never(self.counts)
        counts[0] = 0  # the zeros of users without a validation target
        self.counts_I.copy_(torch.from_numpy(counts))
        self.to(device)
        self.eval()
        return []

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        return self.counts_I.double().repeat(len(user_ids_B), 1)
