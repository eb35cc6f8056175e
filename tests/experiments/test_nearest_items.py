"""Vectors in the recommender that is not trained: positions against NumPy, which vectors it takes, and what the tables say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from experiments import adaptation, nearest_items
from sda_core import ranking, recommenders
from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.fusion import seen_items
from sda_core.errors import ConfigError
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

NONE = Names(())
VECTORS = Names(
    (
        *("random", "oracle", "zero_shot", "text_only", "other_images", "sda", "mismatched", "zero_shot+even", "sda+even"),
        *("id", "id+random", "id+zero_shot", "id+sda", "id+mismatched", "id+oracle", "id+zero_shot+even"),
    )
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run of the study of adaptation on a tiny shop."""
    with new_project(tmp_path_factory, repository) as root:
        adaptation.main("small", Names(("sasrec",)), Names(("id", "sda", "mismatched")), SMALL, root, Numbers((1, 2)))
    return root


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "adaptation" / "small"


def compare(project: Path, *runs: str, vectors: Names = VECTORS, beside: Names = NONE) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        nearest_items.main("small", list(runs) or [f"small={folder(project)}"], vectors, beside, Numbers((1, 2)))
    return (project / "experiments" / "results" / "nearest_items-small" / "table.md").read_text(encoding="utf-8")


def by_hand(shop: Workspace, vectors_XD: np.ndarray) -> dict[int, int]:
    """Position of each user's target: pessimistic, among all items that are not in the history."""
    interactions = INTERACTIONS.read(shop.interactions)
    mean_D = vectors_XD[np.unique(seen_items(shop))].mean(0)
    unit = np.where(vectors_XD.any(1, keepdims=True), vectors_XD - mean_D, 0)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    found = {}
    for user, rows in interactions.group_by("user_id"):
        (target,) = rows.filter(pl.col("split") == "test")["item_id"]
        history = rows.filter(pl.col("split") != "test")["item_id"].to_numpy()
        score = unit @ unit[history].mean(0)
        others = np.setdiff1d(np.arange(1, len(unit)), [*history, target])
        found[int(user[0])] = 1 + int((score[others] >= score[target] - 1e-6).sum())
    return found


@pytest.mark.parametrize("vector", ["zero_shot", "random"])
def test_positions_are_those_of_numpy(project: Path, vector: str) -> None:
    shop = Workspace(folder(project) / "shop")
    vectors_XD = nearest_items.matrix(Workspace(folder(project) / "seed-1"), vector)
    found = nearest_items.ranked(nearest_items.Run.read(f"small={folder(project)}"), vector, vectors_XD)
    wanted = by_hand(shop, vectors_XD.astype(np.float64))
    differ = [abs(wanted[user] - place) for user, place in found.select("user_id", "position").iter_rows()]
    assert len(differ) == len(wanted)
    assert np.mean([one == 0 for one in differ]) > 0.95  # scores that are equal up to rounding may be counted as ties or not
    assert max(differ) <= 2


def test_ids_are_similarity_by_users_and_the_weight_is_chosen_on_validation(project: Path) -> None:
    run = nearest_items.Run.read(f"small={folder(project)}")
    vectors_XD = nearest_items.matrix(run.workspace("zero_shot", 1), "zero_shot")
    assert nearest_items.matrix(run.workspace("id", 1), "id") is None
    training = recommenders.training_data(INTERACTIONS.read(run.shop.interactions), num_items=len(vectors_XD) - 1)
    section = run.params.train_recommender.nearest.model_copy(update={"axis_scaling": "none"})
    for vector, representation, given in (
        ("id", "content", None),
        ("zero_shot", "content", vectors_XD),
        ("id+zero_shot", "id+content", vectors_XD),
    ):
        own = section.model_copy(update={"representation": representation})
        model = recommenders.build(own, training.num_users, training.num_items, given, seed=0)
        model.fit(training, checkpoint=project / "unused", fingerprint="", device=torch.device("cpu"))
        data = recommenders.evaluation_data(INTERACTIONS.read(run.shop.interactions), num_items=training.num_items)
        placed = ranking.place_targets(model, data, None, 256, torch.device("cpu"))
        found = nearest_items.ranked(run, vector, given)
        assert found["num_better"].to_list() == placed["num_better"].to_list()


def test_the_tables(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = compare(project, beside=Names(("sasrec/id", "sasrec/lora")))
    for vector in (*VECTORS, "sasrec/id"):
        assert f"| {vector} | " in text
    for pair in (
        "id+sda - id",
        "id+sda - id+mismatched",
        "id+zero_shot+even - id",
        "id - sasrec/id",
        "oracle - zero_shot",
        "sda - mismatched",
        "zero_shot+even - zero_shot",
        "zero_shot+even - sasrec/id",
    ):
        assert f"| {pair} | " in text
    assert "sasrec/lora" not in text
    assert "sasrec/lora has no positions of every seed and is left out" in caplog.text
    own = nearest_items.measure(nearest_items.Run.read(f"small={folder(project)}"), ["sda"], [], [1, 2])
    ndcg_SU, _ = next(iter(own.values()))["sda"]
    assert f"| sda | {ndcg_SU.mean():.4f} | " in text
    of_seeds = [nearest_items.matrix(Workspace(folder(project) / f"seed-{seed}"), "sda") for seed in (1, 2)]
    assert not np.array_equal(of_seeds[0], of_seeds[1])  # each seed has its own adapter


def test_two_runs_are_compared(project: Path) -> None:
    text = compare(project, f"one={folder(project)}", f"two={folder(project)}", vectors=Names(("zero_shot", "sda")))
    assert "### Gains in one and two, nearest items" in text
    row = next(line for line in text.splitlines() if line.startswith("| sda - zero_shot | ") and line.count("|") == 5)
    assert row.rsplit("| ", 1)[1].startswith("+0.0000 [")


def test_what_is_missing_is_said(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = compare(project, vectors=Names(("zero_shot", "lora")))
    assert "small: lora has no embeddings of every seed and is left out" in caplog.text
    assert "lora" not in text


@pytest.mark.parametrize(
    ("runs", "vectors", "expected"),
    [
        (["nowhere"], ["sda"], r"--runs: should be LABEL=FOLDER \(got 'nowhere'\)"),
        (["one=nowhere"], ["sda"], r"--runs: nowhere has no shop/params.yaml"),
        (["one=nowhere"], ["nosuch"], r"--vectors: expected some of .* \(got 'nosuch'\)"),
        (["one=nowhere"], ["id+nosuch"], r"--vectors: expected some of .* \(got 'id\+nosuch'\)"),
    ],
)
def test_mistakes_are_one_line(runs: list[str], vectors: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        nearest_items.main("small", runs, Names(tuple(vectors)), Names(()), Numbers((1,)))
    assert "\n" not in str(caught.value)
