"""Read-only access to a finished run: items, images, vectors and recommenders."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from sda_core.artifacts import EMBEDDINGS, ITEMS, Workspace
from sda_core.errors import ArtifactError, ConfigError
from sda_core.explore.nearest import nearest
from sda_core.image_store import ImageStore
from sda_core.item_vectors import read_vectors
from sda_core.params import Params, load_params

if TYPE_CHECKING:  # imports torch, which listing items does not need
    from sda_core.explore.text_encoder import TextEncoder

Vectors = Literal["fused", "text", "image"]
"""The kind of an item's vector: fused, as for recommenders, or of one modality."""

VECTORS: tuple[Vectors, ...] = get_args(Vectors)
_COLUMNS = {"fused": "embedding", "text": "text_embedding", "image": "image_embedding"}

Found = list[tuple[int, float]]
"""Item ids, best first, with cosines or scores."""


@dataclass(frozen=True)
class ShownItem:
    """The displayed fields of an item."""

    item_id: int
    raw_item_id: str
    title: str
    brand: str
    price: str

    @property
    def label(self) -> str:
        """Title and id on one line."""
        return f"{self.title or '(no title)'} · {self.raw_item_id}"


class FinishedRun:
    """The items, images, vectors and recommenders of a project folder, each read on first use.

    Args:
        root: the project folder.

    Raises:
        ConfigError: ``params.yaml`` is missing or wrong.
        ArtifactError: there are no items.
    """

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        self.params: Params = load_params(root / "params.yaml")
        columns = ("item_id", "raw_item_id", "title", "brand", "price")
        rows = ITEMS.query(self.workspace.items, lambda items: items.select(columns))
        self.items = {row[0]: ShownItem(*row) for row in rows.iter_rows()}
        self._vectors: dict[tuple[str, Vectors], tuple[np.ndarray, np.ndarray]] = {}  # with the mean that was subtracted
        self._encoders: dict[str, TextEncoder] = {}
        self._one_pass = threading.Lock()  # a merged adapter changes the weights during a pass; several users share them

    @cached_property
    def _images(self) -> ImageStore:
        return ImageStore(self.workspace.images)

    def image(self, item_id: int) -> bytes | None:
        """An item's encoded image; None if it has none."""
        return self._images.get(item_id)

    def variants(self) -> list[str]:
        """The variants of ``params.yaml`` that have vectors on disk, in the order of the params.

        Raises:
            ArtifactError: there is none.
        """
        found = [name for name in self.params.variants if name != "id" and self.workspace.embeddings(name).is_file()]
        if not found:
            folder = self.workspace.embeddings("id").parent
            raise ArtifactError(str(folder), "has no item vectors", "run `dvc repro` to make them")
        return found

    def vectors(self, variant: str, which: Vectors) -> np.ndarray:
        """``(I + 1, D)``, row r for item r; zero for an item without such a vector.

        Image and text vectors are without the mean of their modality, as in a loss with ``center: batch``.  Such a loss does
        not determine where the mean of images lies relative to that of texts, and a common direction hides the differences
        between items.

        Raises:
            ArtifactError: the file is missing or damaged, or has no such vectors.
        """
        return self._vectors_and_mean(variant, which)[0]

    def _vectors_and_mean(self, variant: str, which: Vectors) -> tuple[np.ndarray, np.ndarray]:
        """The result of :meth:`vectors`, and the mean ``(D,)`` that was subtracted."""
        if (variant, which) not in self._vectors:
            self._vectors[variant, which] = self._read(variant, which)
        return self._vectors[variant, which]

    def _read(self, variant: str, which: Vectors) -> tuple[np.ndarray, np.ndarray]:
        path, column = self.workspace.embeddings(variant), _COLUMNS[which]
        vectors = read_vectors(path, column, fill="mean")
        if vectors is None:
            raise ArtifactError(str(path), "has no item vectors", "name another variant")
        absent = EMBEDDINGS.query(path, lambda rows: rows.filter(pl.col(column).is_null()).select("item_id"))
        mean_D = np.zeros(vectors.shape[1], dtype=np.float32)
        if which != "fused" and len(vectors) > 2:  # a single item keeps its vector
            mean_D = vectors[1:].mean(axis=0, dtype=np.float64).astype(np.float32)  # missing vectors are filled with it
            vectors[1:] -= mean_D
        vectors[absent["item_id"].to_numpy()] = 0  # zero and not the mean: an item without an image is not near any item
        return vectors, mean_D

    def near_item(self, item_id: int, variant: str, which: Vectors, k: int) -> Found:
        """The items nearest to an item, without the item itself; empty if the item has no such vector."""
        vectors = self.vectors(variant, which)
        return nearest(vectors, vectors[item_id], k, item_id) if vectors[item_id].any() else []

    def near_text(self, text: str, variant: str, which: Vectors, k: int) -> Found:
        """The items nearest to a text.

        The text is embedded like a title.  It is compared with the items' text or image vectors, because the fused vectors are
        components of both modalities.  The mean of the items' texts is subtracted from its vector, and the mean of a
        modality from the vectors of that modality.

        Raises:
            ConfigError: the text is empty; ``which`` is ``fused``; or the variant was not made by a model of this project.
            ArtifactError: the vectors are missing or outdated.
        """
        if which == "fused":
            raise ConfigError("--against", "is 'fused', and a text cannot be compared with fused vectors", "use text or image")
        vectors = self.vectors(variant, which)
        _, mean_D = self._vectors_and_mean(variant, "text")
        with self._one_pass:
            query_D = self.encoder(variant).encode(text) - mean_D
        return nearest(vectors, query_D, k)

    def encoder(self, variant: str) -> TextEncoder:
        """The model of a variant, loaded on first use; raises as :class:`~.text_encoder.TextEncoder`."""
        if variant not in self._encoders:
            from sda_core.explore.text_encoder import TextEncoder

            self._encoders[variant] = TextEncoder(self.workspace, self.params, variant)
        return self._encoders[variant]

    def recommenders(self, variant: str) -> list[str]:
        """The trained recommenders of a variant that score a history without a user, in the order of ``params.yaml``."""
        from sda_core.traits import scores_histories

        named = [name for name in self.params.recommenders if scores_histories(self.params.train_recommender.of(name))]
        return [name for name in named if (_first_model(self.workspace, self.params, variant, name) / "model.json").is_file()]

    def recommend(self, history: Sequence[int], variant: str, recommender: str, k: int) -> Found:
        """As :func:`recommend`, for the project folder."""
        return recommend(self.workspace, history, variant, recommender, k)


def recommend(workspace: Workspace, history: Sequence[int], variant: str, recommender: str, k: int) -> Found:
    """Recommendations for a history (oldest item first), without items of the history.

    The recommender of the first seed is used.

    Raises:
        ConfigError: the recommender cannot score a history without a user.
        ArtifactError: the recommender is missing, or was trained on other vectors.
    """
    from sda_core import ranking, recommenders
    from sda_core.traits import scores_histories

    folder = _first_model(workspace, load_params(workspace.root / "params.yaml"), variant, recommender)
    section = recommenders.saved_params(folder)
    if not scores_histories(section):
        problem = f"{recommender} learns a vector for each user of the training and has none for a typed history"
        raise ConfigError("--recommender", problem, "use sasrec, bert4rec or nearest, which read histories, or pop")
    vectors = recommenders.read_item_vectors(workspace.embeddings(variant), section)
    return ranking.recommend_after(folder, vectors, history, k)


def _first_model(workspace: Workspace, params: Params, variant: str, recommender: str) -> Path:
    """The folder of a recommender's first seed."""
    from sda_core.traits import seeds_of

    section = params.train_recommender
    return workspace.model(variant, recommender, seeds_of(section.of(recommender), section.seeds)[0])
