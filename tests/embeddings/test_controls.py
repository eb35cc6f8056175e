"""Control vectors: what each of them keeps, and what it takes away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from ruamel.yaml import YAML

from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, Workspace
from sda_core.embeddings.controls import Vectors, control
from sda_core.embeddings.table import write_embeddings
from sda_core.item_vectors import read_vectors
from sda_core.params import ExportParams, load_params
from stages.control_embeddings import control_embeddings
from tests.sections import short_ladder

NUM_ITEMS, FIT = 40, np.arange(1, 31)
FLAGS = np.arange(NUM_ITEMS) > 3, np.arange(NUM_ITEMS) < 38  # of images, of texts


@pytest.fixture
def export(repository: Path) -> ExportParams:
    return load_params(repository / "params.yaml").export_embeddings


@pytest.fixture
def vectors() -> Vectors:
    random = np.random.default_rng(0)
    image, text, fused = (random.normal(size=(NUM_ITEMS, width)).astype(np.float32) for width in (6, 6, 5))
    return Vectors(
        image, text, fused / np.linalg.norm(fused, axis=1, keepdims=True), np.arange(NUM_ITEMS) > 3, np.arange(NUM_ITEMS) < 38
    )


def test_random_vectors_have_the_shape_and_nothing_else(vectors: Vectors, export: ExportParams) -> None:
    made = control("random", vectors, FIT, export, 1)
    assert made.fused_IF.shape == vectors.fused_IF.shape
    np.testing.assert_allclose(np.linalg.norm(made.fused_IF, axis=1), 1.0, rtol=1e-6)
    assert abs(float((made.fused_IF * vectors.fused_IF).sum(axis=1).mean())) < 0.3
    np.testing.assert_array_equal(made.fused_IF, control("random", vectors, FIT, export, 1).fused_IF)
    assert not np.array_equal(made.fused_IF, control("random", vectors, FIT, export, 2).fused_IF)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_vectors_are_the_same_rows_and_none_stays(vectors: Vectors, export: ExportParams, seed: int) -> None:
    made = control("shuffled", vectors, FIT, export, seed)
    source = [int(np.flatnonzero((vectors.fused_IF == row).all(axis=1))[0]) for row in made.fused_IF]
    assert sorted(source) == list(range(NUM_ITEMS))
    assert all(place != here for here, place in enumerate(source))
    np.testing.assert_array_equal(made.image_ID, vectors.image_ID[source])
    np.testing.assert_array_equal(made.text_ID, vectors.text_ID[source])
    np.testing.assert_array_equal(made.has_image, vectors.has_image[source])
    np.testing.assert_array_equal(made.has_text, vectors.has_text[source])


def test_one_modality_alone_does_not_depend_on_the_other(vectors: Vectors, export: ExportParams) -> None:
    other = np.random.default_rng(1).normal(size=vectors.image_ID.shape).astype(np.float32)
    for kind, changed in (
        ("image_only", replace(vectors, text_ID=other)),
        ("text_only", replace(vectors, image_ID=other)),
    ):
        made = control(kind, vectors, FIT, export, 1)  # type: ignore[arg-type]
        assert made.fused_IF.shape == vectors.fused_IF.shape
        np.testing.assert_array_equal(made.fused_IF, control(kind, changed, FIT, export, 1).fused_IF)  # type: ignore[arg-type]
    image, text = (control(kind, vectors, FIT, export, 1) for kind in ("image_only", "text_only"))
    assert not np.allclose(image.fused_IF, text.fused_IF)
    np.testing.assert_array_equal(image.fused_IF.any(axis=1), vectors.has_image)  # an item without an image is zero
    np.testing.assert_array_equal(text.fused_IF.any(axis=1), vectors.has_text)
    # cosines within the modality survive: the components are all of its six but one
    with_text = vectors.text_ID[vectors.has_text]
    unit, fused = with_text / np.linalg.norm(with_text, axis=1, keepdims=True), text.fused_IF[vectors.has_text]
    upper = np.triu_indices(len(unit), 1)
    assert np.corrcoef((unit @ unit.T)[upper], (fused @ fused.T)[upper])[0, 1] > 0.8


def test_the_stage_writes_a_table_of_its_own(
    tmp_path: Path, repository: Path, vectors: Vectors, capsys: pytest.CaptureFixture[str]
) -> None:
    params = short_ladder(YAML(typ="safe", pure=True).load(repository / "params.yaml"))
    params["control_embeddings"]["variants"] = ["shuffled", "text_only"]
    YAML(typ="safe", pure=True).dump(params, tmp_path / "params.yaml")
    workspace = Workspace(tmp_path)
    rows = [(1, item, item, 5.0, "train") for item in range(1, NUM_ITEMS + 1)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    ids, raw = np.arange(1, NUM_ITEMS + 1), [f"i{item}" for item in range(NUM_ITEMS)]
    source = workspace.embeddings("zero_shot")
    source.parent.mkdir()
    write_embeddings(
        source, ids, raw, vectors.image_ID, vectors.text_ID, vectors.fused_IF, {}, vectors.has_image, vectors.has_text
    )
    for variant in ("shuffled", "text_only"):
        control_embeddings(variant, workspace.root)
        frame = EMBEDDINGS.read(workspace.embeddings(variant))
        assert frame["raw_item_id"].to_list() == raw
        assert frame["image_embedding"].null_count() == (4 if variant == "shuffled" else 0)
        assert frame["text_embedding"].null_count() == 2
        fused = read_vectors(workspace.embeddings(variant))
        assert fused is not None
        assert fused.shape == (NUM_ITEMS + 1, 5)
    with pytest.raises(typer.Exit):
        control_embeddings("zero_shot", workspace.root)
    assert "unknown control 'zero_shot'; known are random, shuffled, image_only, text_only, oracle" in capsys.readouterr().err
