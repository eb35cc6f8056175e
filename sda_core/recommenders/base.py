"""What every recommender can do: fit, score, recommend, save, load.

A recommender never sees a test row, never opens a file of its own accord, and gives padding (item 0) no place.
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
    """One epoch of training; holds no wall time, so that equal runs leave equal files."""

    epoch: int  # from 1
    loss: float  # mean over the epoch's steps
    valid_ndcg_10: float | None  # None where the epoch was not evaluated
    is_best: bool  # whether its weights were the best so far on valid_ndcg_10


class Recommender(nn.Module, ABC):
    """Base of all recommenders.

    Args:
        params: the recommender's own section.
        num_users: U; user ids are 1..U, 0 is a user that was never seen.
        num_items: I; item ids are 1..I, 0 is padding.
        item_vectors: frozen content vectors ``(I + 1, D)``, row 0 zero, or None.  They are handed over again by
            whoever loads a model: ``save`` keeps their hash, not them.

    Raises:
        DataError: the vectors do not fit the items, or are not finite.
    """

    seed: int = 0  # of its weights and its training; `sda_core.recommenders.build` sets it
    history_length: int = 0  # latest items that score() looks at
    is_causal: bool = False  # whether a position's output depends on no later item

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
        """Train; an interrupted call, made again with the same inputs, ends as if it had not been interrupted.

        Args:
            data: training histories and validation targets.
            checkpoint: file of the unfinished run; the caller deletes it once the model is saved.
            fingerprint: of all inputs; a checkpoint of other inputs is ignored.
            device: where to train; the model stays there.

        Raises:
            TrainingError: the loss is not finite, or there is nothing to train on.
        """

    @abstractmethod
    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:
        """Scores ``(B, I + 1)``; column 0 is overwritten."""

    def score(self, user_ids: Tensor, history_BL: Tensor) -> Tensor:
        """Score all items for each user.

        Args:
            user_ids: ``(B,)`` int64; 0 for a user that was not in training.
            history_BL: ``(B, L)`` int64, oldest first, padded with 0 on the left; L may be anything, 0 too.

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
        """The items' side of the scores, where these are inner products: ``score = queries @ item_matrix.T``.

        Returns:
            ``(I + 1, K)``, by item id, biases as one more column; row 0 means nothing.  None where scores are something else.
        """
        if self.training:
            self.eval()
        with torch.no_grad():
            return self._item_matrix()

    def queries(self, user_ids: Tensor, history_BL: Tensor) -> Tensor:
        """The users' side of the scores, ``(B, K)``; only where there is an :meth:`item_matrix`.

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
            user_ids, history_BL: as in :meth:`score`; the *whole* history should be given, since all of it is left out.
            num_recommendations: how many to give; capped at the number of items.

        Returns:
            item ids ``(B, N)`` and their scores, best first; 0 and ``-inf`` where no unseen item is left.
        """
        score_BI = self.score(user_ids, history_BL).scatter(1, history_BL, -torch.inf)
        best = score_BI.topk(min(num_recommendations, self.num_items), dim=1)
        return best.indices.masked_fill(best.values == -torch.inf, 0), best.values

    def check_data(self, data: TrainingData) -> None:
        """Refuse training data of another size, and leaked test items.

        Raises:
            TrainingError: either of them.
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
        """Put back the weights that :meth:`save` wrote.

        Raises:
            ArtifactError: they are missing, damaged, or of another model.
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
    """Tensors of a weights file by name.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(str(path), f"cannot be read ({error})", "run `dvc repro` to train it again") from None


def side_by_side(item_vectors: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray:
    """Vectors of one kind, or of several modalities, as one matrix.

    Raises:
        DataError: the modalities are not of equally many items.
    """
    if isinstance(item_vectors, np.ndarray):
        return item_vectors
    matrices = list(item_vectors.values())
    if len({matrix.shape[:1] for matrix in matrices}) != 1 or any(matrix.ndim != 2 for matrix in matrices):
        shapes = ", ".join(f"{name} {matrix.shape}" for name, matrix in item_vectors.items())
        raise DataError("item vectors", f"should have one row per item in every modality (got {shapes or 'none'})")
    return np.concatenate(matrices, axis=1)


def hash_vectors(item_vectors: np.ndarray | Mapping[str, np.ndarray]) -> str:
    """Hex SHA-256 of shape and float32 bytes; of modalities, as they stand side by side."""
    item_vectors = side_by_side(item_vectors)
    digest = hashlib.sha256(json.dumps(item_vectors.shape).encode())
    digest.update(np.ascontiguousarray(item_vectors, dtype=np.float32).data)
    return digest.hexdigest()
