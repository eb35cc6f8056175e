"""Control vectors, which the vectors of a variant must beat to show that they are meaningful.

===============  =======================================================================================================
``random``       uniformly distributed directions: the gain of a recommender by arbitrary frozen vectors
``shuffled``     the variant's vectors assigned to other items: the same distribution without the meaning
``image_only``   principal components of the image vectors
``text_only``    principal components of the text vectors
``oracle``       the true attributes of the built-in shop's items, and parts of them: :mod:`sda_core.embeddings.oracle`
===============  =======================================================================================================

All except the last are computed from one variant's table and have its width.  ``image_only`` and ``text_only`` are fused as in
``late_concat_pca``, so that they differ from that variant by the missing modality, and not by their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never, cast, get_args

import numpy as np

from sda_core.artifacts import EMBEDDINGS, TRUTH, Workspace
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.oracle import oracle_vectors
from sda_core.embeddings.table import read_metadata
from sda_core.errors import ConfigError
from sda_core.item_vectors import read_vectors
from sda_core.params import Control, ExportParams, Oracle
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

Derived = Literal["random", "shuffled", "image_only", "text_only"]
"""The controls that are computed from another variant's vectors."""


@dataclass(frozen=True)
class Vectors:
    """Item vectors; row r is that of item id r + 1.

    Attributes:
        image_ID: ``(I, D)`` float32.
        text_ID: ``(I, D)`` float32.
        fused_IF: ``(I, F)`` float32.
        has_image: ``(I,)`` bool, whether a row of ``image_ID`` is valid.
        has_text: ``(I,)`` bool, whether a row of ``text_ID`` is valid.
    """

    image_ID: np.ndarray
    text_ID: np.ndarray
    fused_IF: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray


def read_table(path: Path) -> Vectors:
    """All vectors of an embeddings file; an item without an image or a text gets the mean vector.

    Raises:
        ArtifactError: see :func:`sda_core.item_vectors.read_vectors`.
    """
    found = [read_vectors(path, column, fill="mean") for column in ("image_embedding", "text_embedding", "embedding")]
    image, text, fused = (matrix[1:] for matrix in found if matrix is not None)
    frame = EMBEDDINGS.read(path).sort("item_id")
    has = (frame[f"{modality}_embedding"].is_not_null().to_numpy() for modality in ("image", "text"))
    return Vectors(image, text, fused, *has)


def kind_of(variant: str) -> Control:
    """The control with the name of a variant.

    Raises:
        ConfigError: there is no such control.
    """
    kind = next((name for name in get_args(Control) if name == variant), None)
    if kind is None:
        raise ConfigError("--variant", f"unknown control {variant!r}; known are {', '.join(get_args(Control))}")
    return kind


def make(kind: Control, workspace: Workspace, params: ExportParams, seed: int) -> tuple[Vectors, dict[str, str]]:
    """Vectors of a control (row r is that of item id r + 1), and the metadata for their file.

    Args:
        kind: the control, see the module's docstring.
        workspace: paths of the vectors of ``zero_shot``, and of ``data/truth.parquet`` for the oracles.
        params: section of the export of ``zero_shot``.
        seed: seed of the draws.

    Raises:
        ArtifactError: an input is missing or damaged.
        DataError: an oracle for a dataset other than the built-in shop.
    """
    path = workspace.embeddings("zero_shot")
    described = {"control": kind, "control_seed": str(seed)}
    if kind not in get_args(Oracle):
        made = control(cast("Derived", kind), read_table(path), seen_items(workspace), params, seed)
        return made, read_metadata(path) | described
    raw_item_ids = EMBEDDINGS.read(path).sort("item_id")["raw_item_id"].to_list()
    made = oracle(cast("Oracle", kind), workspace, raw_item_ids, seed)
    width = str(made.fused_IF.shape[1])
    return made, described | {"modality_dim": width, "embedding_dim": width, "normalized": "true"}


def oracle(kind: Oracle, workspace: Workspace, raw_item_ids: Sequence[str], seed: int) -> Vectors:
    """:func:`~sda_core.embeddings.oracle.oracle_vectors` of a workspace's items, in the order of their ids."""
    image_IW, text_IW, fused_IW = oracle_vectors(kind, TRUTH.read(workspace.truth), raw_item_ids, seed)
    every = np.ones(len(raw_item_ids), dtype=np.bool_)
    return Vectors(image_IW, text_IW, fused_IW, every, every)


def control(kind: Derived, vectors: Vectors, fit_ids: np.ndarray, params: ExportParams, seed: int) -> Vectors:
    """Compute control vectors from given vectors.

    Args:
        kind: the control, see the module's docstring.
        vectors: vectors of the controlled variant.
        fit_ids: item ids seen in training; principal components are fitted on them.
        params: section of that variant's export; its ``normalize`` is used.
        seed: seed of the draws.

    Returns:
        All three matrices; for ``image_only`` and ``text_only`` the other modality's is zero.

    Raises:
        DataError: there is no item to fit on.
    """
    random = generator(seed, "control vectors", kind)
    match kind:
        case "random":
            image_ID, text_ID, fused_IF = (
                _directions(random, matrix) for matrix in (vectors.image_ID, vectors.text_ID, vectors.fused_IF)
            )
            return Vectors(image_ID, text_ID, fused_IF, vectors.has_image, vectors.has_text)
        case "shuffled":
            circle = random.permutation(len(vectors.fused_IF))
            source = np.empty_like(circle)
            source[circle] = np.roll(circle, 1)  # each item gets the vector of its predecessor on a random cycle, never its own
            whole = vectors.image_ID, vectors.text_ID, vectors.fused_IF, vectors.has_image, vectors.has_text
            return Vectors(*(each[source] for each in whole))
        case "image_only" | "text_only":
            kept = kind.removesuffix("_only")
            zero_ID = np.zeros_like(vectors.image_ID)
            image_ID, text_ID = (vectors.image_ID, zero_ID) if kept == "image" else (zero_ID, vectors.text_ID)
            every = np.ones_like(vectors.has_image)  # also the zeros of the other modality, which are written unchanged
            has_image, has_text = (vectors.has_image, every) if kept == "image" else (every, vectors.has_text)
            other = "text" if kept == "image" else "image"
            only = {"fusion": "late_concat_pca", "fused_dim": vectors.fused_IF.shape[1], f"{other}_weight": 0.0}
            section = params.model_copy(update=only)
            fused_IF = fuse(image_ID, text_ID, has_image, fit_ids, section, has_text=has_text)
            return Vectors(image_ID, text_ID, fused_IF, has_image, has_text)
        case _:
            assert_never(kind)


def _directions(random: np.random.Generator, like: np.ndarray) -> np.ndarray:
    drawn = random.normal(size=like.shape)
    return unit_rows(drawn).astype(np.float32)
