"""Small worlds with known answers, and one set of params for every kind of recommender."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from ruamel.yaml import YAML

from sda_core.params import (
    BERT4RecParams,
    BPRParams,
    EvaluateParams,
    NearestParams,
    PopParams,
    RecommenderParams,
    SASRecParams,
    SLMRecParams,
    VBPRParams,
)
from sda_core.recommenders import EpochRecord, Recommender, TrainingData, build, training_data

CPU = torch.device("cpu")

_FIT = {
    "max_epochs": 40,
    "patience": 6,
    "eval_every": 2,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "dtype": "float32",
}
_SEQUENCE = {
    "hidden_size": 16,
    "num_blocks": 1,
    "num_heads": 2,
    "max_length": 12,
    "dropout": 0.1,
    "id_dropout": 0.0,
    "new_item_cost": None,
    "num_negatives": 8,
    "gbce_t": 0.75,
    "align_weight": 0.0,
    "align_temperature": 2.0,
}
_PAIRS = {**_FIT, "batch_size": 64, "learning_rate": 0.02}

RECOMMENDERS: dict[str, tuple[RecommenderParams, bool]] = {}
"""Name of a case to its params and whether it gets content vectors; every contract test runs on each."""


def _case(name: str, params: RecommenderParams, *, has_vectors: bool) -> None:
    RECOMMENDERS[name] = (params, has_vectors)


_vbpr = VBPRParams(
    kind="vbpr",
    factor_size=8,
    content_factor_size=8,
    embedding_regularization=1e-4,
    content_item_regularization=0.0,
    content_regularization=0.0,
    content_bias_regularization=0.0,
    **_PAIRS,
)
_bpr = BPRParams(kind="bpr", factor_size=8, embedding_regularization=1e-4, **_PAIRS)
_slmrec = SLMRecParams(
    kind="slmrec",
    hidden_size=8,
    num_layers=2,
    embedding_regularization=1e-4,
    task="fac",
    task_weight=0.1,
    temperature=0.2,
    dropout=0.1,
    **{**_PAIRS, "max_epochs": 16, "learning_rate": 0.05},
)
_sasrec = SASRecParams(kind="sasrec", representation="content", causal=True, loss="sampled_softmax", **_FIT, **_SEQUENCE)
_bert4rec = BERT4RecParams(
    kind="bert4rec", representation="content", mask_probability=0.3, last_item_mask_share=0.5, loss="softmax", **_FIT, **_SEQUENCE
)

_nearest = NearestParams(
    kind="nearest",
    representation="content",
    content_weight=None,
    axis_scaling="none",
    num_neighbors=10,
    shrinkage=1.0,
    max_length=12,
    new_item_cost=None,
)

_case("pop", PopParams(kind="pop", counts="train"), has_vectors=False)
_case("nearest-id", _nearest, has_vectors=False)
_case("nearest-content", _nearest, has_vectors=True)
_case("nearest-content-even", _nearest.model_copy(update={"axis_scaling": "even"}), has_vectors=True)
_case("nearest-id+content", _nearest.model_copy(update={"representation": "id+content"}), has_vectors=True)
_case("bpr", _bpr, has_vectors=True)
_case("vbpr-id", _vbpr, has_vectors=False)
_case("vbpr", _vbpr, has_vectors=True)
_case("slmrec", _slmrec, has_vectors=True)
_case("slmrec-fd+fm", _slmrec.model_copy(update={"task": "fd+fm"}), has_vectors=True)
_case("sasrec-id", _sasrec, has_vectors=False)
_case("sasrec-content", _sasrec, has_vectors=True)
_case("sasrec-id+content", _sasrec.model_copy(update={"representation": "id+content", "loss": "softmax"}), has_vectors=True)
_case("sasrec-bce", _sasrec.model_copy(update={"loss": "bce", "num_negatives": 1}), has_vectors=False)
_case("sasrec-gbce", _sasrec.model_copy(update={"loss": "gbce"}), has_vectors=True)
_case("sasrec-bidirectional", _sasrec.model_copy(update={"causal": False, "num_blocks": 2}), has_vectors=True)
_case("bert4rec-id", _bert4rec, has_vectors=False)
_case("bert4rec-content", _bert4rec, has_vectors=True)
_case("bert4rec-bce", _bert4rec.model_copy(update={"loss": "bce", "num_negatives": 4}), has_vectors=True)


@pytest.fixture(scope="session")
def recommender_cases() -> dict[str, tuple[RecommenderParams, bool]]:
    """All cases by name."""
    return RECOMMENDERS


@pytest.fixture(params=RECOMMENDERS, scope="session")
def case(request: pytest.FixtureRequest) -> str:
    """Each case's name in turn."""
    return request.param


@pytest.fixture(scope="session")
def retrieval_params(repository: Path) -> Callable[..., EvaluateParams]:
    """The section `evaluate` with retrieval by an index, exact unless another is named."""
    section = YAML(typ="safe").load((repository / "params.yaml").read_text(encoding="utf-8"))["evaluate"]

    def make(depth: int, factory: str = "Flat", batch_size: int = 7, **search: int) -> EvaluateParams:
        retrieval = {"factory": factory, "nprobe": None, "ef_search": None, "depth": depth, "num_queries": 1000, **search}
        return EvaluateParams.model_validate(section | {"cutoffs": (1,), "batch_size": batch_size, "retrieval": retrieval})

    return make


def table(histories: list[list[int]]) -> pl.DataFrame:
    """An interactions table, leave-one-out: the last item of a history is test, the one before valid."""
    rows = [
        (user, item, 10 * place, 5.0, {len(history) - 1: "test", len(history) - 2: "valid"}.get(place, "train"))
        for user, history in enumerate(histories, start=1)
        for place, item in enumerate(history)
    ]
    schema = {"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32, "split": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


@pytest.fixture(scope="session")
def make_table() -> Callable[[list[list[int]]], pl.DataFrame]:
    """Histories to an interactions table."""
    return table


@pytest.fixture(scope="session")
def checkerboard() -> tuple[pl.DataFrame, np.ndarray]:
    """Even users like even items, odd users odd items; item u is withheld from user u as its test target.

    48 users, 24 items: 12 of a kind.  A user has 9 of them in training, one for validation, one for the test, and
    never meets the twelfth, so that the candidates at the end are the target, one item as good, and 12 bad ones.
    Content vectors show the kind, under noise and far from the origin.
    """
    random = np.random.default_rng(1)
    histories = []
    for user in range(1, 49):
        withheld = (user - 1) % 24 + 1
        kind = [item for item in range(1, 25) if item % 2 == user % 2 and item != withheld]
        histories.append([int(item) for item in random.permutation(kind)[:10]] + [withheld])
    vectors = np.zeros((25, 7), dtype=np.float32)
    vectors[1:] = random.normal(scale=0.3, size=(24, 7)) + 4.0
    vectors[1:, 0] += np.where(np.arange(1, 25) % 2 == 0, 1.0, -1.0)
    return table(histories), vectors


Fitted = tuple[Recommender, list[EpochRecord], TrainingData]


@pytest.fixture(scope="session")
def fitted(checkerboard: tuple[pl.DataFrame, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Fitted]:
    """A case's recommender, fitted once on the checkerboard."""
    interactions, vectors = checkerboard
    done: dict[str, Fitted] = {}

    def of(name: str) -> Fitted:
        if name not in done:
            params, has_vectors = RECOMMENDERS[name]
            data = training_data(interactions)
            recommender = build(params, data.num_users, data.num_items, vectors if has_vectors else None, seed=5)
            checkpoint: Path = tmp_path_factory.mktemp("fit") / "checkpoint.safetensors"
            done[name] = (recommender, recommender.fit(data, checkpoint=checkpoint, fingerprint=name, device=CPU), data)
        return done[name]

    return of
