"""Vectors made elsewhere are a variant like any other: a stage of their own, then indexes and recommenders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import typer
from dvc.repo import Repo
from dvc.utils.hydra import compose_and_dump
from ruamel.yaml import YAML

from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace, read_json
from sda_core.item_vectors import read_vectors
from stages.build_index import build_index
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.import_embeddings import import_embeddings
from stages.train_recommender import train_recommender

NUM_USERS, NUM_ITEMS = 12, 8
RAW = [f"sku-{item}" for item in range(NUM_ITEMS)]


@pytest.fixture
def workspace(tmp_path: Path, repository: Path) -> Workspace:
    """Interactions and items of a run, and a params file with two imported variants."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["runtime"] |= {"device": "cpu", "num_threads": 1}
    params["evaluate"]["bootstrap_samples"] = 0
    params["build_index"]["num_queries"] = 4
    params["export_embeddings"]["fused_dim"] = 3
    params["train_recommender"]["sasrec"] |= {"max_epochs": 1, "eval_every": 1, "hidden_size": 8}
    params["import_embeddings"]["variants"] = {"minilm": {"path": "minilm.parquet"}, "mine": {"path": "mine"}}
    YAML(typ="safe", pure=True).dump(params, tmp_path / "params.yaml")
    workspace = Workspace(tmp_path)
    rows = [
        (user, (user + place) % NUM_ITEMS + 1, place, 5.0, {3: "valid", 4: "test"}.get(place, "train"))
        for user in range(1, NUM_USERS + 1)
        for place in range(5)
    ]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    items = [(item, raw, raw, "", "", [], [], "", [], True) for item, raw in enumerate(RAW, 1)]
    ITEMS.write(pl.DataFrame(items, schema=dict(ITEMS.columns), orient="row"), workspace.items)
    return workspace


def write_minilm(workspace: Workspace) -> np.ndarray:
    """One vector per item, backwards, with one of an item that the shop does not have."""
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    frame = pl.DataFrame({"raw_item_id": [*RAW[::-1], "gone"], "embedding": [*vectors[::-1].tolist(), [0.0] * 6]})
    frame.write_parquet(workspace.root / "minilm.parquet")
    return vectors


def test_an_imported_variant_is_a_variant(workspace: Workspace) -> None:
    vectors = write_minilm(workspace)
    import_embeddings("minilm", workspace.root)
    path = workspace.embeddings("minilm")
    found = read_vectors(path)
    assert found is not None
    np.testing.assert_allclose(found[1:], vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-5)
    assert EMBEDDINGS.read(path)["raw_item_id"].to_list() == RAW
    described = pq.read_schema(path).metadata
    assert described[b"imported_from"] == b"minilm.parquet"
    assert described[b"imported_other_rows"] == b"1"
    build_index("minilm", workspace.root)
    export_embeddings("id", workspace.root)
    train_recommender("id", "sasrec", workspace.root)
    train_recommender("minilm", "sasrec", workspace.root)
    evaluate("minilm", "sasrec", workspace.root)
    assert workspace.metrics("minilm", "sasrec").is_file()


@pytest.mark.parametrize("recommender", ["pop", "sasrec"])
def test_items_that_nobody_has_met_are_trained_with_and_are_candidates(workspace: Workspace, recommender: str) -> None:
    """The last item of the catalogue has no interaction, in any split."""
    items = ITEMS.read(workspace.items)
    new = items[-1:].with_columns(item_id=pl.lit(NUM_ITEMS + 1, pl.Int32), raw_item_id=pl.lit("new"))
    ITEMS.write(pl.concat([items, new]), workspace.items)
    export_embeddings("id", workspace.root)
    train_recommender("id", recommender, workspace.root)
    evaluate("id", recommender, workspace.root)
    assert SEED_POSITIONS.read(workspace.positions("id", recommender))["candidates"].unique().to_list() == [NUM_ITEMS + 1 - 4]
    metrics = read_json(workspace.metrics("id", recommender), "metrics")
    assert metrics["cold_num_items"] == 1
    assert metrics["tail_num_items"] >= 1


def test_images_and_texts_are_fused_as_ours_are(workspace: Workspace) -> None:
    folder = workspace.root / "mine"
    folder.mkdir()
    random = np.random.default_rng(0)
    image, text = random.normal(size=(NUM_ITEMS, 4)), random.normal(size=(NUM_ITEMS, 6))
    image[2] = 0.0  # no image
    np.save(folder / "image_embedding.npy", image)
    np.save(folder / "text_embedding.npy", text)
    (folder / "ids.txt").write_text("\n".join(RAW))
    import_embeddings("mine", workspace.root)
    frame = EMBEDDINGS.read(workspace.embeddings("mine"))
    assert [dtype.shape for dtype in frame.schema.values() if isinstance(dtype, pl.Array)] == [(4,), (6,), (3,)]
    assert frame["image_embedding"].is_null().to_list() == [item == 2 for item in range(NUM_ITEMS)]
    assert frame["text_embedding"].null_count() == 0
    np.testing.assert_allclose(np.linalg.norm(frame["embedding"].to_numpy(), axis=1), 1.0, rtol=1e-5)


def test_items_with_neither_vector_are_zero(workspace: Workspace) -> None:
    """Not the mean of the others, with which such items would be each other's nearest items."""
    folder = workspace.root / "mine"
    folder.mkdir()
    random = np.random.default_rng(0)
    image, text = random.normal(size=(NUM_ITEMS, 4)), random.normal(size=(NUM_ITEMS, 6))
    image[[2, 3, 5]], text[[3, 5, 7]] = 0.0, 0.0
    np.save(folder / "image_embedding.npy", image)
    np.save(folder / "text_embedding.npy", text)
    (folder / "ids.txt").write_text("\n".join(RAW))
    params = YAML(typ="safe", pure=True).load(workspace.root / "params.yaml")
    params["import_embeddings"]["max_missing_share"] = 0.5
    YAML(typ="safe", pure=True).dump(params, workspace.root / "params.yaml")
    import_embeddings("mine", workspace.root)
    found = EMBEDDINGS.read(workspace.embeddings("mine"))["embedding"].to_numpy()
    assert np.flatnonzero(~found.any(axis=1)).tolist() == [3, 5]


def test_equal_files_give_equal_bytes(workspace: Workspace) -> None:
    write_minilm(workspace)
    import_embeddings("minilm", workspace.root)
    before = workspace.embeddings("minilm").read_bytes()
    import_embeddings("minilm", workspace.root)
    assert workspace.embeddings("minilm").read_bytes() == before


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("minilm", "minilm.parquet: no such file or folder"),
        ("bert", "unknown imported variant 'bert'; params.import_embeddings.variants has mine, minilm"),
    ],
)
def test_a_mistake_is_one_line(workspace: Workspace, capsys: pytest.CaptureFixture[str], variant: str, expected: str) -> None:
    with pytest.raises(typer.Exit):
        import_embeddings(variant, workspace.root)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_dvc_makes_stages_of_the_params(tmp_path: Path, repository: Path) -> None:
    """As docs/exchange.md says it is done: one -S for the file, two for the lists of variants."""
    shutil.copy(repository / "dvc.yaml", tmp_path)
    overrides = [
        "+import_embeddings.variants.minilm={path: minilm.parquet}",
        "variants=[id,zero_shot,minilm]",
        "train_recommender.variants=[zero_shot,minilm]",
    ]
    compose_and_dump(tmp_path / "params.yaml", str(repository / "conf"), None, "config", "", overrides)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        names = {getattr(stage, "name", "") for stage in repo.index.stages}
    assert {"import_embeddings@minilm", "build_index_imported@minilm", "train_recommender@minilm"} <= names
    assert not any(name.startswith("import_embeddings") and not name.endswith("@minilm") for name in names)
