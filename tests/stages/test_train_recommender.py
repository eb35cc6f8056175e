"""What the stage hands to a recommender: modalities, and the item table trained on ids."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import typer
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, SEED_POSITIONS, Workspace, read_json
from sda_core.embeddings.table import write_embeddings, write_ids_only
from sda_core.item_vectors import read_vectors
from sda_core.recommenders import load, read_item_vectors, saved_params
from sda_core.recommenders.history import best_ndcg, read_history
from stages.evaluate import evaluate
from stages.train_recommender import train_recommender

NUM_USERS, NUM_ITEMS = 12, 8


@pytest.fixture
def workspace(tmp_path: Path, repository: Path) -> Workspace:
    """Interactions, and vectors of the variants id and zero_shot; two items have no image."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 2}
    params["evaluate"]["bootstrap_samples"] = 0
    for name in ("sasrec", "slmrec", "bpr"):
        params["train_recommender"][name] |= {"max_epochs": 2, "eval_every": 1}
    params["train_recommender"]["sasrec"] |= {"align_weight": 0.5, "hidden_size": 8}
    YAML(typ="safe", pure=True).dump(params, tmp_path / "params.yaml")
    workspace = Workspace(tmp_path)
    rows = [
        (user, (user + place) % NUM_ITEMS + 1, place, 5.0, {3: "valid", 4: "test"}.get(place, "train"))
        for user in range(1, NUM_USERS + 1)
        for place in range(5)
    ]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    ids, raw_ids = np.arange(1, NUM_ITEMS + 1), [f"i{item}" for item in range(NUM_ITEMS)]
    image, text = (np.random.default_rng(seed).normal(size=(NUM_ITEMS, width)) for seed, width in ((0, 3), (1, 4)))
    workspace.embeddings("id").parent.mkdir()
    write_ids_only(workspace.embeddings("id"), ids, raw_ids, {})
    write_embeddings(workspace.embeddings("zero_shot"), ids, raw_ids, image, text, text, {}, ids > 2)
    return workspace


def test_alignment_takes_the_item_table_of_the_variant_id(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        train_recommender("zero_shot", "sasrec", workspace.root)
    assert "error:" in capsys.readouterr().err  # there is no such table yet
    train_recommender("id", "sasrec", workspace.root)
    train_recommender("zero_shot", "sasrec", workspace.root)
    table = workspace.model("id", "sasrec", 2) / "model.safetensors"
    train_recommender("id", "bpr", workspace.root)  # has no item table of that name
    table.write_bytes((workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes())
    with pytest.raises(typer.Exit):
        train_recommender("zero_shot", "sasrec", workspace.root)
    assert "no learned item table" in capsys.readouterr().err


def test_all_recommenders_are_trained_once_and_only_what_changed_again(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    path, yaml = workspace.root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)

    def trained(**changes: Any) -> set[str]:
        params["train_recommender"]["bpr"] |= changes
        yaml.dump(params, path)
        before = {folder: folder.stat().st_mtime_ns for folder in workspace.root.glob("models/id/*/history.tsv")}
        train_recommender("id", root=workspace.root)
        after = {folder: folder.stat().st_mtime_ns for folder in workspace.root.glob("models/id/*/history.tsv")}
        return {folder.parent.name for folder in after if before.get(folder) != after[folder]}

    params["recommenders"] = ["pop", "bpr"]
    assert trained() == {"pop", "bpr"}
    weights = (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes()
    assert trained() == set()
    assert trained(learning_rate=0.5) == {"bpr"}
    assert (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes() != weights
    INTERACTIONS.write(
        INTERACTIONS.read(workspace.interactions).with_columns(rating=pl.lit(4.0, pl.Float32)), workspace.interactions
    )
    assert trained() == {"pop", "bpr"}
    params["recommenders"] = ["pop"]
    assert trained() == set()
    assert not workspace.recommender("id", "bpr").exists()
    params["recommenders"] = ["pop", "bpr"]
    with pytest.raises(typer.Exit):
        trained(learning_rate=1e30)
    error = capfd.readouterr().err
    assert "variant id: the training of bpr failed" in error
    assert "lower learning_rate" in error


def test_each_seed_has_a_model_and_only_missing_seeds_are_trained(workspace: Workspace) -> None:
    path, yaml = workspace.root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)

    def trained(*seeds: int) -> set[str]:
        params["train_recommender"]["seeds"] = list(seeds)
        yaml.dump(params, path)
        folder = workspace.recommender("id", "bpr")
        before = {model.parent.name: model.stat().st_mtime_ns for model in folder.glob("*/model.safetensors")}
        train_recommender("id", "bpr", workspace.root)
        assert {model.name for model in folder.iterdir() if model.is_dir()} == set(map(str, seeds))
        after = {model.parent.name: model.stat().st_mtime_ns for model in folder.glob("*/model.safetensors")}
        return {name for name in after if before.get(name) != after[name]}

    assert trained(1, 2) == {"1", "2"}
    weights = [(workspace.model("id", "bpr", seed) / "model.safetensors").read_bytes() for seed in (1, 2)]
    assert weights[0] != weights[1]
    curve = (workspace.recommender("id", "bpr") / "history.tsv").read_text()
    assert trained(1, 2) == set()
    assert trained(2, 3) == {"3"}  # and 1 is gone
    assert (workspace.model("id", "bpr", 2) / "model.safetensors").read_bytes() == weights[1]
    assert (workspace.recommender("id", "bpr") / "history.tsv").read_text() != curve
    # a run that was killed between its two seeds: the first is kept, and the mean curve is that of the whole run
    shutil.rmtree(workspace.model("id", "bpr", 3))
    (workspace.recommender("id", "bpr") / "made_of.json").unlink()
    (workspace.recommender("id", "bpr") / "model.safetensors").touch()  # of the layout before there were seeds
    assert trained(1, 2) == {"1"}
    assert (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes() == weights[0]
    assert (workspace.recommender("id", "bpr") / "history.tsv").read_text() == curve
    assert sorted(one.name for one in workspace.recommender("id", "bpr").iterdir()) == ["1", "2", "history.tsv", "made_of.json"]


def test_a_summary_stays_until_a_seed_is_trained(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, yaml = workspace.root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)
    folder = workspace.recommender("id", "bpr")
    summary = folder / "made_of.json", folder / "history.tsv"

    def train(*seeds: int, **changes: Any) -> None:
        params["train_recommender"]["seeds"] = list(seeds)
        params["train_recommender"]["bpr"] |= changes
        yaml.dump(params, path)
        train_recommender("id", "bpr", workspace.root)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(1, 2, 3)
    before = [file.stat().st_mtime_ns for file in summary]
    (folder / "model.safetensors").touch()  # of the layout before there were seeds
    with monkeypatch.context() as patch:
        for name in ("write_tsv", "write_json"):
            patch.setattr(f"sda_core.steps.train_recommender.{name}", full)
        train(1, 2, 3)  # nothing changed, so nothing is written
        assert [file.stat().st_mtime_ns for file in summary] == before
        assert sorted(one.name for one in folder.iterdir()) == ["1", "2", "3", "history.tsv", "made_of.json"]
        with pytest.raises(typer.Exit):
            train(1, 2)
        assert "No space left on device" in capsys.readouterr().err
        assert [file.stat().st_mtime_ns for file in summary] == before  # that of three seeds
    train(1, 2)
    assert list(read_json(summary[0], "inputs")) == ["1", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("sda_core.steps.train_recommender.write_tsv", full)
        with pytest.raises(typer.Exit):
            train(1, 2, max_epochs=1)
    assert not any(file.exists() for file in summary)  # the old ones would not say what is beside them


def test_new_models_beside_an_old_summary_are_not_up_to_date(workspace: Workspace) -> None:
    """As a stop between a seed and the summary leaves them, where the params are then put back."""
    path, yaml = workspace.root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)
    params["recommenders"] = ["bpr"]
    yaml.dump(params, path)
    train_recommender("id", root=workspace.root)
    made_of = workspace.recommender("id", "bpr") / "made_of.json"
    text, weights = made_of.read_text(), (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes()
    usual = params["train_recommender"]["bpr"]["learning_rate"]
    params["train_recommender"]["bpr"]["learning_rate"] = 0.5
    yaml.dump(params, path)
    train_recommender("id", root=workspace.root)
    assert (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes() != weights
    made_of.write_text(text)
    params["train_recommender"]["bpr"]["learning_rate"] = usual
    yaml.dump(params, path)
    train_recommender("id", root=workspace.root)
    assert (workspace.model("id", "bpr", 1) / "model.safetensors").read_bytes() == weights


def test_several_recommenders_in_one_process_and_one_that_fails_stops_no_other(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    path, yaml = workspace.root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)
    params["train_recommender"]["bpr"]["learning_rate"] = 1e30
    yaml.dump(params, path)
    with pytest.raises(typer.Exit):
        train_recommender("id", "bpr,pop", workspace.root)
    assert capsys.readouterr().err.count("error: ") == 1
    assert (workspace.model("id", "pop", 0) / "model.safetensors").is_file()


def test_validation_and_seeds_are_in_the_metrics(workspace: Workspace) -> None:
    train_recommender("id", "bpr", workspace.root)
    evaluate("id", "bpr", workspace.root)
    found = read_json(workspace.metrics("id", "bpr"), "metrics")
    assert found["num_seeds"] == 3
    curves = [read_history(workspace.model("id", "bpr", seed)) for seed in (1, 2, 3)]
    assert found["valid_ndcg@10"] == pytest.approx(np.mean([best_ndcg(curve) for curve in curves]))
    table = SEED_POSITIONS.read(workspace.positions("id", "bpr"))
    assert table["seed"].unique(maintain_order=True).to_list() == [1, 2, 3]
    assert found["hit@10"] == pytest.approx((table["position"] <= 10).mean())


def test_slmrec_takes_images_and_texts_apart(workspace: Workspace) -> None:
    for variant in ("id", "zero_shot"):
        train_recommender(variant, "slmrec", workspace.root)
        evaluate(variant, "slmrec", workspace.root)
    path, folder = workspace.embeddings("zero_shot"), workspace.model("zero_shot", "slmrec", 1)
    vectors = read_item_vectors(path, saved_params(folder))
    assert isinstance(vectors, dict)
    assert {name: matrix.shape for name, matrix in vectors.items()} == {"image": (9, 3), "text": (9, 4)}
    np.testing.assert_allclose(vectors["image"][1:3], np.tile(vectors["image"][3:].mean(axis=0), (2, 1)), rtol=1e-5)
    fused = read_vectors(path)
    assert fused is not None
    np.testing.assert_array_equal(fused, vectors["text"])
    assert sorted(name for name, _ in load(folder, vectors, torch.device("cpu")).projections.named_children()) == [
        "image",
        "text",
    ]
