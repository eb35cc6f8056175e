"""A text gets the vector that an item with this title has; vectors of another model are rejected."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest

from sda_core.artifacts import EMBEDDINGS
from sda_core.embeddings.table import read_metadata, write_embeddings
from sda_core.errors import ArtifactError, ConfigError
from sda_core.explore.finished_run import FinishedRun
from sda_core.item_vectors import read_vectors


@pytest.mark.parametrize("variant", ["zero_shot", "sda"])
def test_a_title_has_the_vector_of_its_item(run: FinishedRun, variant: str) -> None:
    """The shop's prompts hold the title alone, so the stored vectors are an oracle."""
    stored = read_vectors(run.workspace.embeddings(variant), "text_embedding")
    assert stored is not None
    for number in (1, 7):
        vector = run.encoder(variant).encode(run.items[number].title)
        np.testing.assert_allclose(vector, stored[number], atol=1e-4)
        best, cosine = run.near_text(run.items[number].title, variant, "text", 1)[0]
        assert run.items[best].title == run.items[number].title
        assert cosine == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("which", ["text", "image"])
def test_a_text_is_compared_without_the_mean_of_each_modality(run: FinishedRun, which: Literal["text", "image"]) -> None:
    path = run.workspace.embeddings("sda")
    items = EMBEDDINGS.read(path).sort("item_id")
    query_D = run.encoder("sda").encode("blue mug").astype(np.float64)
    query_D -= items["text_embedding"].to_numpy().astype(np.float64).mean(axis=0)
    has_vector = items[f"{which}_embedding"].is_not_null().to_numpy()
    rows = items[f"{which}_embedding"].drop_nulls().to_numpy().astype(np.float64)
    rows -= rows.mean(axis=0)
    cosines = rows @ query_D / np.linalg.norm(rows, axis=1) / np.linalg.norm(query_D)
    expected = sorted(zip((-cosines).tolist(), (np.flatnonzero(has_vector) + 1).tolist(), strict=True))[:5]
    found = run.near_text("blue mug", "sda", which, 5)
    assert [item for item, _ in found] == [item for _, item in expected]
    np.testing.assert_allclose([cosine for _, cosine in found], [-cosine for cosine, _ in expected], atol=1e-4)


def test_variants_have_models_of_their_own(run: FinishedRun) -> None:
    """The second adapter does not change the first model."""
    before = run.encoder("zero_shot").encode("mug")
    assert np.abs(run.encoder("sda").encode("mug") - before).max() > 1e-6
    np.testing.assert_array_equal(run.encoder("zero_shot").encode("mug"), before)


def test_an_empty_text(run: FinishedRun) -> None:
    with pytest.raises(ConfigError, match="TEXT: is empty"):
        run.encoder("sda").encode(" ")


def test_a_control_has_no_model(run: FinishedRun) -> None:
    with pytest.raises(ConfigError, match="no model of this project made the vectors of 'random'"):
        run.encoder("random")


@pytest.mark.parametrize(
    ("key", "problem"),
    [("adapter_hash", "with another adapter"), ("prompt_hash", "with other prompts"), ("backbone_revision", "another backbone")],
)
def test_vectors_of_another_model_are_rejected(shop: Path, tmp_path: Path, key: str, problem: str) -> None:
    run = FinishedRun(Path(shutil.copytree(shop, tmp_path / "run")))
    path = run.workspace.embeddings("sda")
    rows, vectors = pl.read_parquet(path), read_vectors(path, "text_embedding")
    assert vectors is not None
    described = read_metadata(path) | {key: "other"}
    raw = rows["raw_item_id"].to_list()
    has_image = np.ones(len(rows), dtype=bool)
    write_embeddings(path, rows["item_id"].to_numpy(), raw, vectors[1:], vectors[1:], vectors[1:], described, has_image)
    with pytest.raises(ArtifactError, match=f"{problem} than the project has now; run `dvc repro`"):
        run.encoder("sda")


def test_an_adapter_that_is_gone(shop: Path, tmp_path: Path) -> None:
    run = FinishedRun(Path(shutil.copytree(shop, tmp_path / "run")))
    shutil.rmtree(run.workspace.adapter("sda"))
    with pytest.raises(ArtifactError, match="adapter is missing; run `dvc repro` to train it"):
        run.encoder("sda")
