"""A finished run of a small shop, whose text prompts hold the title alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sda_core.explore.finished_run import FinishedRun
from stages import control_embeddings, export_embeddings, train_recommender
from tests.pipeline.conftest import SMALL
from tests.small_run import adapted_run

OVERRIDES = [
    *SMALL,
    "recommenders=[pop,vbpr,sasrec]",
    "items.fields=[title]",
    "dataset.missing_image_share=0.2",
    "items.missing_image=text_only",
    "variants=[id,zero_shot,sda,random]",
    "train_recommender.variants=[zero_shot,sda,random]",
    "control_embeddings.variants=[random]",
    "train_adapter.training.num_steps=2",
    "train_recommender.vbpr.max_epochs=1",
    "train_recommender.sasrec.max_epochs=1",
]


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    root = adapted_run(tmp_path_factory.mktemp("explored"), repository, OVERRIDES)
    for variant in ("id", "zero_shot", "sda"):
        export_embeddings.export_embeddings(variant, root=root)
    control_embeddings.control_embeddings("random", root=root)
    for variant in ("zero_shot", "sda"):
        for recommender in ("pop", "vbpr", "sasrec"):
            train_recommender.train_recommender(variant, recommender, root=root)
    return root


@pytest.fixture
def run(shop: Path) -> FinishedRun:
    return FinishedRun(shop)
