"""Control vectors: what a variant's vectors have to beat before they can be said to mean something.

===============  =======================================================================================================
``random``       directions drawn uniformly: what a recommender gains by frozen vectors of any kind
``shuffled``     the right vectors on the wrong items: their distribution, but not their meaning
``image_only``   principal components of the image vectors alone
``text_only``    principal components of the text vectors alone
===============  =======================================================================================================

All are made of one variant's table, and have its width.  The last two are fused as ``late_concat_pca`` does it, so that
they differ from that variant by the modality that is missing, and not by their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import assert_never, get_args

import numpy as np

from sda_core.artifacts import EMBEDDINGS
from sda_core.embeddings.fusion import fuse
from sda_core.errors import ConfigError
from sda_core.item_vectors import read_vectors
from sda_core.params import Control, ExportParams
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows


@dataclass(frozen=True)
class Vectors:
    """Item vectors, row r belongs to item id r + 1.

    Attributes:
        image_ID: ``(I, D)`` float32.
        text_ID: ``(I, D)`` float32.
        fused_IF: ``(I, F)`` float32.
        has_image: ``(I,)`` bool, where a row of ``image_ID`` counts.
    """

    image_ID: np.ndarray
    text_ID: np.ndarray
    fused_IF: np.ndarray
    has_image: np.ndarray


def read_table(path: Path) -> Vectors:
    """All vectors of an embeddings file; an item without an image has the mean of the others.

    Raises:
        ArtifactError: see :func:`sda_core.item_vectors.read_vectors`.
    """
    found = [read_vectors(path, column, fill="mean") for column in ("image_embedding", "text_embedding", "embedding")]
    image, text, fused = (matrix[1:] for matrix in found if matrix is not None)
    has_image = EMBEDDINGS.read(path).sort("item_id")["image_embedding"].is_not_null().to_numpy()
    return Vectors(image, text, fused, has_image)


def kind_of(variant: str) -> Control:
    """The control that a variant is named after.

    Raises:
        ConfigError: there is no such control.
    """
    kind = next((name for name in get_args(Control) if name == variant), None)
    if kind is None:
        raise ConfigError("--variant", f"unknown control {variant!r}; known are {', '.join(get_args(Control))}")
    return kind


def control(kind: Control, vectors: Vectors, fit_ids: np.ndarray, params: ExportParams, seed: int) -> Vectors:
    """Control vectors of the given ones.

    Args:
        kind: which, see the module's docstring.
        vectors: of the variant that is controlled.
        fit_ids: item ids seen in training; principal components are fitted on them.
        params: of that variant's export; its ``normalize`` is kept.
        seed: of the draws.

    Returns:
        All three matrices: of ``image_only`` and ``text_only`` the other modality's is zero.

    Raises:
        DataError: there is nothing to fit on.
    """
    random = generator(seed, "control vectors", kind)
    match kind:
        case "random":
            image_ID, text_ID, fused_IF = (
                _directions(random, matrix) for matrix in (vectors.image_ID, vectors.text_ID, vectors.fused_IF)
            )
            return Vectors(image_ID, text_ID, fused_IF, vectors.has_image)
        case "shuffled":
            circle = random.permutation(len(vectors.fused_IF))
            source = np.empty_like(circle)
            source[circle] = np.roll(circle, 1)  # each item takes from the one before it on a random circle: never from itself
            return Vectors(vectors.image_ID[source], vectors.text_ID[source], vectors.fused_IF[source], vectors.has_image[source])
        case "image_only" | "text_only":
            kept = kind.removesuffix("_only")
            zero_ID = np.zeros_like(vectors.image_ID)
            image_ID, text_ID = (vectors.image_ID, zero_ID) if kept == "image" else (zero_ID, vectors.text_ID)
            has_image = vectors.has_image if kept == "image" else np.ones_like(vectors.has_image)
            section = params.model_copy(update={"fusion": "late_concat_pca", "fused_dim": vectors.fused_IF.shape[1]})
            return Vectors(image_ID, text_ID, fuse(image_ID, text_ID, has_image, fit_ids, section), has_image)
        case _:
            assert_never(kind)


def _directions(random: np.random.Generator, like: np.ndarray) -> np.ndarray:
    drawn = random.normal(size=like.shape)
    return unit_rows(drawn).astype(np.float32)
