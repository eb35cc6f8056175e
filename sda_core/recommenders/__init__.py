"""Recommenders on interactions and frozen item vectors: popularity, nearest items, BPR, VBPR, SLMRec, SASRec, BERT4Rec.

:func:`build` makes a recommender from its params section, :func:`load` loads a saved one.  A new recommender needs a params
class, a file and a case in :func:`build`.  Trainings depend on this whole package, so code that only ranks or recommends is
in :mod:`sda_core.ranking`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, assert_never

import numpy as np
import torch
from pydantic import Field, ValidationError

from sda_core.artifacts import read_json
from sda_core.errors import ArtifactError
from sda_core.item_vectors import read_vectors
from sda_core.params import (
    BERT4RecParams,
    BPRParams,
    NearestParams,
    PopParams,
    RecommenderParams,
    SASRecParams,
    Section,
    SLMRecParams,
    VBPRParams,
)
from sda_core.recommenders.base import (
    DESCRIPTION,
    WEIGHTS,
    EpochRecord,
    Recommender,
    hash_vectors,
    load_weights,
    side_by_side,
)
from sda_core.recommenders.batches import EvaluationData, Histories, TrainingData, evaluation_data, training_data
from sda_core.seed import derive
from sda_core.traits import takes_modalities

__all__ = [
    "EpochRecord",
    "EvaluationData",
    "Histories",
    "Recommender",
    "TrainingData",
    "build",
    "evaluation_data",
    "hash_vectors",
    "load",
    "read_item_table",
    "read_item_vectors",
    "saved_params",
    "saved_seed",
    "training_data",
]

ITEM_TABLE = "items.ids.weight"  # name in a sequential recommender's weights
ItemVectors = np.ndarray | Mapping[str, np.ndarray]
"""One matrix ``(I + 1, D)``, row 0 zero; or several, by the name of the modality."""


def read_item_vectors(path: Path, params: RecommenderParams) -> ItemVectors | None:
    """Read the vectors of an embeddings file that a recommender uses.

    Args:
        path: path of a table ``EMBEDDINGS``.
        params: section of the recommender.

    Returns:
        The fused vectors; for a recommender with separate modalities, those of images and texts (an item without one of
        them has the mean of the others); None for a table with ids only.

    Raises:
        ArtifactError: see :func:`sda_core.item_vectors.read_vectors`.
    """
    if not takes_modalities(params):
        return read_vectors(path)
    image_ID = read_vectors(path, "image_embedding", fill="mean")
    text_ID = read_vectors(path, "text_embedding", fill="mean")
    return None if image_ID is None or text_ID is None else {"image": image_ID, "text": text_ID}


def read_item_table(folder: Path) -> np.ndarray:
    """Read the learned item table of a saved sequential recommender that was trained on ids alone.

    Args:
        folder: folder written by ``Recommender.save`` for the variant id.

    Returns:
        ``(I + 1, hidden)`` float32, by item id; row 0 is padding.

    Raises:
        ArtifactError: the file is missing or damaged, or has no such table.
    """
    path = folder / WEIGHTS
    weights = load_weights(path)
    if ITEM_TABLE not in weights:
        raise ArtifactError(str(path), "has no learned item table to align to", "train the variant id first")
    return weights[ITEM_TABLE].numpy()


def build(
    params: RecommenderParams, num_users: int, num_items: int, item_vectors: ItemVectors | None, *, seed: int
) -> Recommender:
    """An unfitted recommender, with weights drawn from ``seed``.

    Args:
        params: section of the recommender.
        num_users: U, ids 1..U.
        num_items: I, ids 1..I.
        item_vectors: ``(I + 1, D)`` content vectors, row 0 zero, or None for ids alone.  Modalities are concatenated for a
            recommender that does not separate them.
        seed: seed of the weights and of all randomness in training.

    Raises:
        ConfigError: contradictory settings.
        DataError: the vectors do not fit the items, or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights", params.kind))
        made = _build(params, num_users, num_items, item_vectors)
    made.seed = seed
    return made


def _build(params: RecommenderParams, num_users: int, num_items: int, item_vectors: ItemVectors | None) -> Recommender:
    vectors = None if item_vectors is None else side_by_side(item_vectors)
    match params:
        case PopParams():
            from sda_core.recommenders.pop import Pop

            return Pop(params, num_users, num_items, vectors)
        case NearestParams():
            from sda_core.recommenders.nearest import Nearest

            return Nearest(params, num_users, num_items, vectors)
        case BPRParams():
            from sda_core.recommenders.bpr import BPR

            return BPR(params, num_users, num_items, vectors)
        case VBPRParams():
            from sda_core.recommenders.vbpr import VBPR

            return VBPR(params, num_users, num_items, vectors)
        case SLMRecParams():
            from sda_core.recommenders.slmrec import SLMRec

            return SLMRec(params, num_users, num_items, item_vectors)
        case SASRecParams():
            from sda_core.recommenders.sasrec import SASRec

            return SASRec(params, num_users, num_items, vectors)
        case BERT4RecParams():
            from sda_core.recommenders.bert4rec import BERT4Rec

            return BERT4Rec(params, num_users, num_items, vectors)
        case _:
            assert_never(params)


class _Description(Section):
    """Schema of ``model.json``."""

    params: Annotated[RecommenderParams, Field(discriminator="kind")]
    seed: int
    num_users: int
    num_items: int
    vector_width: int | None
    vectors_sha256: str | None


def _describe(folder: Path) -> _Description:
    path = folder / DESCRIPTION
    found = read_json(path, "recommender")
    try:
        return _Description.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(str(path), f"{place}: {first['msg']}", "run `dvc repro` to train it again") from None


def saved_params(folder: Path) -> RecommenderParams:
    """The section that a saved recommender was trained with.

    Raises:
        ArtifactError: ``model.json`` is missing or damaged.
    """
    return _describe(folder).params


def saved_seed(folder: Path) -> int:
    """The seed that a saved recommender was trained with; raises as :func:`saved_params`."""
    return _describe(folder).seed


def load(folder: Path, item_vectors: ItemVectors | None, device: torch.device) -> Recommender:
    """Load a saved recommender, ready to score; its scores are bit-equal to those of the saved one.

    Args:
        folder: folder written by ``Recommender.save``.
        item_vectors: the same content vectors as in training, or None if it had none.
        device: device of the recommender.

    Raises:
        ArtifactError: a file is missing or damaged, or the vectors are not those of the training.
    """
    description = _describe(folder)
    given = None if item_vectors is None else hash_vectors(item_vectors)
    if given != description.vectors_sha256:
        raise ArtifactError(
            str(folder / DESCRIPTION),
            "was trained with other item vectors than those given",
            "run `dvc repro` to bring both up to date",
        )
    sizes = description.num_users, description.num_items
    recommender = build(description.params, *sizes, item_vectors, seed=description.seed)
    recommender.restore(folder)
    return recommender.to(device)
