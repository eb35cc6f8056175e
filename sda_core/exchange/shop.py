"""``Shop``: the tables of a finished run and one variant's item vectors, the source of every export format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, ITEMS, USERS, Workspace
from sda_core.errors import ArtifactError
from sda_core.item_vectors import read_vectors

SPLITS = ("train", "valid", "test", "valid_rest", "test_rest")
_VECTORS = ("image_embedding", "text_embedding", "embedding")


@dataclass(frozen=True)
class Shop:
    """Interactions with their split, items, users, and the item vectors of a variant."""

    variant: str
    interactions: pl.DataFrame  # table INTERACTIONS
    items: pl.DataFrame  # table ITEMS, by item id
    users: pl.DataFrame  # table USERS, by user id
    vectors: Mapping[str, np.ndarray]  # by column: (I, D) float32, row r for item id r + 1; empty for the variant with ids only
    has_vector: Mapping[str, np.ndarray]  # by column: (I,) bool; the other rows are the mean of these
    vectors_file: Path  # table EMBEDDINGS

    @staticmethod
    def read(workspace: Workspace, variant: str) -> Shop:
        """Read the tables of a finished run.

        Raises:
            ArtifactError: a file is missing or damaged, or the vectors are for other items than the table.
        """
        items = ITEMS.read(workspace.items).sort("item_id")
        path = workspace.embeddings(variant)
        known = EMBEDDINGS.read(path).sort("item_id")
        if not known["raw_item_id"].equals(items["raw_item_id"]):
            raise ArtifactError(str(path), "has other items than the items table", "run `dvc repro` to bring both up to date")
        vectors: dict[str, np.ndarray] = {}
        for column in _VECTORS:
            if column in known.columns and (matrix := read_vectors(path, column, fill="mean")) is not None:
                vectors[column] = matrix[1:]
        return Shop(
            variant,
            INTERACTIONS.read(workspace.interactions),
            items,
            USERS.read(workspace.users).sort("user_id"),
            vectors,
            {column: known[column].is_not_null().to_numpy() for column in vectors},
            path,
        )

    def split_counts(self) -> dict[str, int]:
        """Number of interactions by split, in the order of :data:`SPLITS`, without empty splits."""
        counts = dict(self.interactions.group_by("split").len().iter_rows())
        return {split: counts[split] for split in SPLITS if split in counts}

    def counts(self) -> dict[str, int]:
        """Counts for the closing line and the description of an export."""
        counts = {"users": len(self.users), "items": len(self.items), "interactions": len(self.interactions)}
        missing = {f"items_without_{name}": int((~has).sum()) for name, has in self.has_vector.items()}
        return counts | {name: number for name, number in missing.items() if number}
