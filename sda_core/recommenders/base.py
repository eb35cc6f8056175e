"""Base class of all recommenders: fit, score, recommend, save, load.

A recommender never gets test rows, opens files only in explicit calls, and never recommends padding (item 0).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sda_core.artifacts import replace_file, write_json
from sda_core.errors import ArtifactError, DataError, TrainingError
from sda_core.params import RecommenderParams
from sda_core.recommenders.batches import TrainingData

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training, without wall-clock time, so that equal runs write equal files."""

    epoch: int  # from 1
    loss: float | None  # mean over the epoch's steps; None without a loss
    valid_ndcg_10: float | None  # None if the epoch was not evaluated
    is_best: bool  # whether its weights were the best so far on valid_ndcg_10


class Recommender(nn.Module, ABC):
    """Base class of all recommenders.

    Args:
        params: section of the recommender.
        num_users: U; user ids are 1..U, 0 is an unknown user.
        num_items: I; item ids are 1..I, 0 is padding.
        item_vectors: frozen content vectors ``(I + 1, D)``, row 0 zero, or None.  ``save`` stores only their hash, so they
            must be passed again to load a model.

    Raises:
        DataError: the vectors do not fit the items, or are not finite.
    """

    seed: int = 0  # seed of weights and training; set by `sda_core.recommenders.build`
    history_length: int = 0  # number of latest items that score() uses
    is_causal: bool = False  # whether a position's output is independent of later items

    def __init__(self, params: RecommenderParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> None:
        super().__init__()
        if item_vectors is not None:
            if item_vectors.ndim != 2 or len(item_vectors) != num_items + 1:
                raise DataError("item vectors", f"should be {num_items + 1} rows, padding first (got shape {item_vectors.shape})")
            if not np.isfinite(item_vectors).all():
                raise DataError("item vectors", "hold values that are not finite", "run export_embeddings again")
        self.params = params
        self.num_users = num_users
        self.num_items = num_items
        self.vector_width = None if item_vectors is None else int(item_vectors.shape[1])
        self.vectors_sha256 = None if item_vectors is None else hash_vectors(item_vectors)

    # ------------------------------------------------------------------------------------------- contract
    @abstractmethod
    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """Train; an interrupted call can be repeated with the same inputs and gives the same result.

        Args:
            data: training histories and validation targets.
            checkpoint: file of the unfinished run; the caller deletes it after saving the model.
            fingerprint: hash of all inputs; a checkpoint with another one is ignored.
            device: device for training; the model stays there.

        Raises:
            TrainingError: the loss is not finite, or there is no training data.
        """

    @abstractmethod
    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        """Scores ``(B, I + 1)``; column 0 is overwritten."""

    def score(self, user_ids: Tensor, history_BL: Tensor) -> Tensor:
        """Score all items for each user.

        Args:
            user_ids: ``(B,)`` int64; 0 for a user who was not in training.
            history_BL: ``(B, L)`` int64, oldest first, padded with 0 on the left; any L, including 0.

        Returns:
            ``(B, I + 1)`` floats, column ``i`` the score of item ``i``; column 0 is ``-inf``.
        """
        if self.training:
            self.eval()
        with torch.no_grad():
            score_BI = self._score(user_ids, history_BL)
            score_BI[:, 0] = -torch.inf
        return score_BI

    def _item_matrix(self) -> Tensor | None:
        """See :meth:`item_matrix`."""
        return None

    def _queries(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        """See :meth:`queries`."""
        raise NotImplementedError(f"the scores of {self.params.kind} are not inner products")

    def item_matrix(self) -> Tensor | None:
        """The item factors of scores that are inner products: ``score = queries @ item_matrix.T``.

        Returns:
            ``(I + 1, K)`` by item id, with biases as an additional column; row 0 is undefined.  None if scores are not inner
            products.
        """
        if self.training:
            self.eval()
        with torch.no_grad():
            return self._item_matrix()

    def queries(self, user_ids: Tensor, history_BL: Tensor) -> Tensor:
        """The user factors of the scores, ``(B, K)``; only if there is an :meth:`item_matrix`.

        Args:
            user_ids, history_BL: as in :meth:`score`.
        """
        if self.training:
            self.eval()
        with torch.no_grad():
            return self._queries(user_ids, history_BL)

    def recommend(self, user_ids: Tensor, history_BL: Tensor, num_recommendations: int) -> tuple[Tensor, Tensor]:
        """The best items that are not in the history.

        Args:
            user_ids, history_BL: as in :meth:`score`; pass the *whole* history, because its items are excluded.
            num_recommendations: number of recommendations, at most the number of items.

        Returns:
            Item ids ``(B, N)`` and their scores, best first, padded with 0 and ``-inf`` if no unseen item is left.
        """
        score_BI = self.score(user_ids, history_BL).scatter(1, history_BL, -torch.inf)
        best = score_BI.topk(min(num_recommendations, self.num_items), dim=1)
        return best.indices.masked_fill(best.values == -torch.inf, 0), best.values

    def check_data(self, data: TrainingData) -> None:
        """Reject training data of another size, and leaked test items.

        Raises:
            TrainingError: the sizes differ, or there are leaked test items.
        """
        if (data.num_users, data.num_items) != (self.num_users, self.num_items):
            raise TrainingError(
                "train_recommender",
                f"got data of {data.num_users} users and {data.num_items} items, expected {self.num_users} and {self.num_items}",
                "run `dvc repro` from filter on",
            )
        if data.leaked_test_items is not None:
            raise TrainingError(
                "train_recommender", f"{self.params.kind} was given test interactions", "only pop with counts 'all' takes them"
            )

    # --------------------------------------------------------------------------------------- save and load
    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``model.json``; equal models give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in self.state_dict().items()}
        with replace_file(folder / WEIGHTS) as temporary:
            save_file(state, temporary)
        description: dict[str, Any] = {
            "params": self.params.model_dump(mode="json"),
            "seed": self.seed,
            "num_users": self.num_users,
            "num_items": self.num_items,
            "vector_width": self.vector_width,
            "vectors_sha256": self.vectors_sha256,
        }
        write_json(folder / DESCRIPTION, description)

    def restore(self, folder: Path) -> None:
        """Load the weights written by :meth:`save`.

        Raises:
            ArtifactError: the weights are missing, damaged, or of another model.
        """
        path = folder / WEIGHTS
        state = load_weights(path)
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ArtifactError(
                str(path), f"does not fit its {DESCRIPTION} in {', '.join(wrong)}", "run `dvc repro` to train it again"
            )
        self.load_state_dict(state)
        self.eval()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(str(path), f"cannot be read ({error})", "run `dvc repro` to train it again") from None


def side_by_side(item_vectors: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenate the vectors of several modalities to one matrix; a single matrix is returned unchanged.

    Raises:
        DataError: the modalities have different numbers of items.
    """
    if isinstance(item_vectors, np.ndarray):
        return item_vectors
    matrices = list(item_vectors.values())
    if len({matrix.shape[:1] for matrix in matrices}) != 1 or any(matrix.ndim != 2 for matrix in matrices):
        shapes = ", ".join(f"{name} {matrix.shape}" for name, matrix in item_vectors.items())
        raise DataError("item vectors", f"should have one row per item in every modality (got {shapes or 'none'})")
    return np.concatenate(matrices, axis=1)


def hash_vectors(item_vectors: np.ndarray | Mapping[str, np.ndarray]) -> str:
    """Hex SHA-256 of shape and float32 bytes; modalities are concatenated."""
    item_vectors = side_by_side(item_vectors)
    digest = hashlib.sha256(json.dumps(item_vectors.shape).encode())
    digest.update(np.ascontiguousarray(item_vectors, dtype=np.float32).data)
    return digest.hexdigest()
