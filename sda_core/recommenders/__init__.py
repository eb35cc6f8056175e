"""Recommenders over interactions and frozen item vectors: popularity, VBPR, SASRec, BERT4Rec.

:func:`build` makes one from its params section, :func:`load` brings back a saved one, :func:`place_targets` counts
where test targets come.  A new recommender is a params class, a file and a case in :func:`build`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, assert_never

import numpy as np
import torch
from pydantic import Field, ValidationError

from sda_core.artifacts import read_json
from sda_core.errors import ArtifactError
from sda_core.params import BERT4RecParams, PopParams, RecommenderParams, SASRecParams, Section, VBPRParams
from sda_core.recommenders.base import DESCRIPTION, EpochRecord, Recommender, hash_vectors
from sda_core.recommenders.batches import EvaluationData, Histories, TrainingData, evaluation_data, training_data
from sda_core.recommenders.position import place_targets
from sda_core.seed import derive

__all__ = [
    "EpochRecord",
    "EvaluationData",
    "Histories",
    "Recommender",
    "TrainingData",
    "build",
    "evaluation_data",
    "load",
    "place_targets",
    "training_data",
]


def build(params: RecommenderParams, num_users: int, num_items: int, item_vectors: np.ndarray | None) -> Recommender:
    """An unfitted recommender, with weights drawn from ``params.seed``.

    Args:
        params: the recommender's section.
        num_users: U, ids 1..U.
        num_items: I, ids 1..I.
        item_vectors: ``(I + 1, D)`` content vectors, row 0 zero, or None for ids alone.

    Raises:
        ConfigError: settings that do not fit together.
        DataError: the vectors do not fit the items, or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        if not isinstance(params, PopParams):
            torch.manual_seed(derive(params.seed, "weights", params.kind))
        match params:
            case PopParams():
                from sda_core.recommenders.pop import Pop

                return Pop(params, num_users, num_items, item_vectors)
            case VBPRParams():
                from sda_core.recommenders.vbpr import VBPR

                return VBPR(params, num_users, num_items, item_vectors)
            case SASRecParams():
                from sda_core.recommenders.sasrec import SASRec

                return SASRec(params, num_users, num_items, item_vectors)
            case BERT4RecParams():
                from sda_core.recommenders.bert4rec import BERT4Rec

                return BERT4Rec(params, num_users, num_items, item_vectors)
            case _:
                assert_never(params)


class _Description(Section):
    """``model.json``."""

    params: Annotated[RecommenderParams, Field(discriminator="kind")]
    num_users: int
    num_items: int
    vector_width: int | None
    vectors_sha256: str | None


def load(folder: Path, item_vectors: np.ndarray | None, device: torch.device) -> Recommender:
    """A saved recommender, ready to score; its scores are those of the saved one, bit for bit.

    Args:
        folder: where ``Recommender.save`` wrote.
        item_vectors: the very content vectors it was trained with, or None if it had none.
        device: where to put it.

    Raises:
        ArtifactError: a file is missing or damaged, or the vectors are not those of the training.
    """
    path = folder / DESCRIPTION
    found = read_json(path, "recommender")
    try:
        description = _Description.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(str(path), f"{place}: {first['msg']}", "run `dvc repro` to train it anew") from None
    given = None if item_vectors is None else hash_vectors(item_vectors)
    if given != description.vectors_sha256:
        raise ArtifactError(
            str(path), "was trained with other item vectors than those given", "run `dvc repro` to bring both up to date"
        )
    recommender = build(description.params, description.num_users, description.num_items, item_vectors)
    recommender.restore(folder)
    return recommender.to(device)
