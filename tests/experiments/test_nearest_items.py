"""The recommender without training: its scores against NumPy, which vectors it takes, and what the tables say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from experiments import adaptation, nearest_items
from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.fusion import seen_items
from sda_core.errors import ConfigError
from sda_core.params import load_params
from tests.experiments.test_adaptation import SMALL

NONE = Names(())
VECTORS = Names(("random", "oracle", "zero_shot", "text_only", "other_images", "sda", "mismatched", "zero_shot+even", "sda+even"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run of the study of adaptation on a tiny shop."""
    root = tmp_path_factory.mktemp("project")
    (root / "conf").symlink_to(repository / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
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
    params = load_params(shop.root / "params.yaml")
    vectors_XD = nearest_items.matrix(Workspace(folder(project) / "seed-1"), vector)
    found = nearest_items.ranked(shop, params, vectors_XD)
    wanted = by_hand(shop, vectors_XD.astype(np.float64))
    differ = [abs(wanted[user] - place) for user, place in found.select("user_id", "position").iter_rows()]
    assert len(differ) == len(wanted)
    assert np.mean([one == 0 for one in differ]) > 0.95  # scores that are equal up to rounding may be counted as ties or not
    assert max(differ) <= 2


def test_items_without_a_vector_are_never_near(project: Path) -> None:
    shop = Workspace(folder(project) / "shop")
    params = load_params(shop.root / "params.yaml")
    vectors_XD = nearest_items.matrix(Workspace(folder(project) / "seed-1"), "zero_shot")
    interactions = INTERACTIONS.read(shop.interactions)
    lost = int(interactions.filter(pl.col("split") == "test")["item_id"][0])
    vectors_XD[lost] = 0
    model = nearest_items.NearestItems(params.train_recommender.of("pop"), 3, vectors_XD, seen_items(shop), 5)
    score_BI = model.score(torch.zeros(1, dtype=torch.int64), torch.tensor([[0, 1, 2]]))
    assert score_BI[0, lost] == 0
    assert float(score_BI[0, 1:].max()) > 0.2
    assert score_BI[0, 0] == -torch.inf
    empty_BI = model.score(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64))
    assert not empty_BI[0, 1:].any()  # nothing was bought: every item ties


def test_the_tables(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = compare(project, beside=Names(("sasrec/id", "sasrec/lora")))
    for vector in (*VECTORS, "sasrec/id"):
        assert f"| {vector} | " in text
    for pair in ("oracle - zero_shot", "sda - mismatched", "zero_shot+even - zero_shot", "zero_shot+even - sasrec/id"):
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
        (["one=nowhere"], ["id"], r"--vectors: id has ids that a recommender learns"),
        (["one=nowhere"], ["id+sda"], r"--vectors: id\+sda has ids that a recommender learns"),
    ],
)
def test_mistakes_are_one_line(runs: list[str], vectors: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        nearest_items.main("small", runs, Names(tuple(vectors)), Names(()), Numbers((1,)))
    assert "\n" not in str(caught.value)
