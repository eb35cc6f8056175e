"""A finished run answers what the stages computed, and each mistake is one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sda_core.artifacts import EMBEDDINGS
from sda_core.errors import ArtifactError, ConfigError, SDAError
from sda_core.explore.finished_run import FinishedRun
from sda_core.item_vectors import read_vectors


def test_what_is_there(run: FinishedRun) -> None:
    assert run.variants() == ["zero_shot", "sda", "random"]
    assert run.recommenders("sda") == ["pop", "sasrec"]  # vbpr has a vector a user, so it cannot score a history
    assert run.recommenders("random") == []
    images = [run.image(item) for item in run.items]
    assert None in images
    assert any(image is not None and image[:2] == b"\xff\xd8" for image in images)
    item = run.items[1]
    assert item.title in item.label
    assert item.raw_item_id in item.label


@pytest.mark.parametrize("variant", ["zero_shot", "sda"])
def test_near_item_by_the_stored_vectors(run: FinishedRun, variant: str) -> None:
    vectors = read_vectors(run.workspace.embeddings(variant))
    assert vectors is not None
    unit = vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True)
    cosines = unit @ unit[2]
    cosines[2] = -np.inf
    found = run.near_item(3, variant, "fused", 4)
    assert [item for item, _ in found] == (np.argsort(-cosines, kind="stable")[:4] + 1).tolist()


def test_an_item_without_an_image_is_near_none(run: FinishedRun) -> None:
    rows = EMBEDDINGS.read(run.workspace.embeddings("sda"))
    without = rows.filter(rows["image_embedding"].is_null())["item_id"].to_list()
    assert without
    assert run.near_item(without[0], "sda", "image", 3) == []
    other = next(item for item in run.items if item not in without)
    assert not set(without) & {item for item, _ in run.near_item(other, "sda", "image", len(run.items))}


def test_a_text_is_not_compared_with_fused_vectors(run: FinishedRun) -> None:
    with pytest.raises(ConfigError, match="a text cannot be compared with fused vectors; use text or image"):
        run.near_text("mug", "sda", "fused", 3)


def test_recommendations_leave_the_history_out(run: FinishedRun) -> None:
    found = run.recommend([3, 5], "sda", "sasrec", 100)
    assert {item for item, _ in found} == set(run.items) - {3, 5}
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ConfigError, match="vbpr learns a vector for each user"):
        run.recommend([3], "sda", "vbpr", 3)


def test_what_is_missing_is_one_line(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        FinishedRun(tmp_path)
    shutil.copy(shop / "params.yaml", tmp_path)
    with pytest.raises(ArtifactError, match="items table is missing; run `dvc repro`"):
        FinishedRun(tmp_path)
    shutil.copytree(shop / "data", tmp_path / "data")
    run = FinishedRun(tmp_path)
    for question in (
        run.variants,
        lambda: run.vectors("sda", "fused"),
        lambda: run.near_text("mug", "sda", "text", 3),
        lambda: run.recommend([1], "sda", "sasrec", 3),
    ):
        with pytest.raises(SDAError, match="run `dvc repro`"):
            question()
