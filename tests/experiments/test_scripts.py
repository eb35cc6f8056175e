"""The scripts over a tiny shop: which trainings they ask for, and what their tables say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments import compare_vectors, protocol, published, text_matters, ties, workspaces
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, read_json
from sda_core.cli.scripts import Names, Numbers
from sda_core.evaluation.groups import training_counts
from sda_core.item_vectors import read_vectors
from sda_core.params import load_params


def cells(table: str, start: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_protocol(shop: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    protocol.main(shop.root, seeds=Numbers((1,)))
    table = capsys.readouterr().out
    fixed, sampled = cells(table, "| SASRec | fixed"), cells(table, "| SASRec | 100 sampled")
    assert float(sampled[4]) > float(fixed[4])
    assert fixed[5] == ""
    assert float(sampled[5].split()[0]) == pytest.approx(float(sampled[4]) - float(fixed[4]), abs=2e-4)
    assert "other users" in cells(table, "| SASRec | single pass")[5]
    assert cells(table, "| SASRec | tail of all")[6:] == ["0", "none"]  # a 5-core has no item of fewer than 4
    assert float(cells(table, "| popularity | counts of all")[3]) >= float(cells(table, "| popularity | fixed")[3])
    assert len(table.strip().splitlines()) == 2 + sum(map(len, protocol.ROWS.values()))
    panels = protocol.intervals(load_params(shop.root / "params.yaml"), shop.root / "experiments" / "positions" / "protocol", [1])
    assert {name: list(rows) for name, rows in panels.items()} == {
        name: [row.label for row in rows] for name, rows in protocol.ROWS.items()
    }
    assert f"{panels['SASRec']['100 sampled negatives'][0]:.4f}" == sampled[4]
    assert (shop.root / "experiments" / "results" / "protocol" / "plot.png").stat().st_size > 5000


def test_ties(shop: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    orders = Names(("file", "random", "shuffled"))
    asked = shop.root, "small", Names(("pop", "bpr")), orders, Numbers((1, 2)), 1
    ties.main(*asked)
    out = capsys.readouterr().out
    kept = shop.root / "experiments" / "positions" / "small"
    targets = {
        (order, seed): INTERACTIONS.read(Workspace(kept / order / "data" / seed).interactions)
        .filter(pl.col("split") == "test")
        .sort("user_id")["item_id"]
        .to_list()
        for order, seed in (("file", "0"), ("random", "1"), ("random", "2"), ("shuffled", "1"))
    }
    assert len({tuple(items) for items in targets.values()}) == 4  # every order has targets of its own
    assert sum(targets["file", "0"]) > sum(targets["random", "1"])  # the file's are those with the larger ids
    shares = read_json(Workspace(kept / "file" / "data" / "0").statistics, "statistics")
    assert out.startswith(f"{shares['share_tied_pairs']:.1%} of the neighbouring interactions")
    for name in ("pop", "bpr"):
        ndcg = {order: cells(out, f"| {name} | {order} |") for order in ("file", "random", "shuffled")}
        assert ndcg["random"][5] == ""
        for order in ("file", "shuffled"):
            assert float(ndcg[order][5].split()[0]) == pytest.approx(float(ndcg[order][3]) - float(ndcg["random"][3]), abs=2e-4)
        by_seed = [float(value) for value in ndcg["file"][4].split()]
        assert np.mean(by_seed) == pytest.approx(float(ndcg["file"][3]), abs=2e-4)
    assert cells(out, "| pop | file |")[7] != ""
    assert (shop.root / "experiments" / "results" / "ties-small" / "plot.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.parquet")}
    ties.main(*asked)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.parquet")} == before


def test_published_shares_and_missing_models(shop: Workspace, tmp_path: Path, keep: Callable[..., None]) -> None:
    interactions, params = INTERACTIONS.read(shop.interactions), load_params(shop.root / "params.yaml")
    num_users = interactions["user_id"].n_unique()
    for seed, place in ((1, 1.0), (2, 3.0)):
        keep(tmp_path / "sasrec_bce" / f"{seed}.parquet", interactions, [place] * num_users)
    table = published.table(tmp_path, list(published.MODELS), [1, 2, 3], params.evaluate)
    assert len(table.splitlines()) == 3
    row = cells(table, "| sasrec_bce | fullrank | 2 |")
    assert row[3] == "1.0000 (0.0000) [1.0000, 1.0000]"
    assert row[4].startswith("0.7500 (0.3536) [-")  # two seeds that differ for all users: Student's t with one degree of freedom
    assert row[6] == f"{1 / 0.0605:.3f} / {0.75 / 0.0318:.3f}"
    panels = published.intervals(tmp_path, list(published.MODELS), [1, 2, 3], params.evaluate)
    mean, low, high = panels["fullrank"].pop("sasrec_bce")
    assert low < 0 < mean == 0.75 < high
    assert panels == {"fullrank": {"sasrec_bce, published": (0.0318, 0.0318, 0.0318)}}


def test_published_trains_what_makes_a_row(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, str, int]] = []

    def note(workspace: object, params: object, section: Any, seed: int, folder: Path, **others: object) -> None:
        asked.append((folder.name, seed, getattr(section, "loss", section.kind), getattr(section, "num_negatives", 0)))

    monkeypatch.setattr(published, "keep_positions", note)
    published.main(shop.root, Names(("pop", "sasrec_bce", "sasrec_softmax")), Numbers((1, 2)))
    softmax, bce = ("sampled_softmax", 4), ("bce", 1)
    assert asked[0] == ("pop", 1, "pop", 0)
    assert asked[1:] == [
        (name, seed, *loss) for seed in (1, 2) for name, loss in (("sasrec_bce", bce), ("sasrec_softmax", softmax))
    ]


def test_title_vectors_stand_beside_ids(shop: Workspace, monkeypatch: pytest.MonkeyPatch, keep: Callable[..., None]) -> None:
    items, interactions = ITEMS.read(shop.items), INTERACTIONS.read(shop.interactions)
    params = load_params(shop.root / "params.yaml")
    told: list[list[str]] = []

    def vectors(titles: list[str]) -> np.ndarray:
        told.append(titles)
        return np.random.default_rng(0).normal(size=(len(titles), 5)).astype(np.float32)

    monkeypatch.setattr(text_matters, "title_vectors", vectors)
    text_matters.write_title_vectors(shop, params.export_embeddings)
    assert told == [items.sort("item_id")["title"].to_list()]
    found = read_vectors(shop.embeddings("minilm"))
    assert found is not None
    assert found.shape == (len(items) + 1, 10)  # two halves, all of it kept
    asked: list[dict[str, Any]] = []

    def note(workspace: object, params: object, section: Any, seed: int, folder: Path, *, vectors: np.ndarray | None) -> None:
        asked.append(section.model_dump() | {"vectors": vectors})
        keep(folder / f"{seed}.parquet", interactions, np.arange(interactions["user_id"].n_unique()) + seed)

    monkeypatch.setattr(workspaces, "keep_positions", note)
    folder = shop.root / "kept"
    changes = {"representation": "id+content", "max_epochs": 7}
    for _ in range(2):
        workspaces.train_on(shop, params, "minilm", "sasrec", 1, folder / "minilm", changes)
    workspaces.train_on(shop, params, "minilm", "vbpr", 1, folder / "vbpr", changes)
    assert [(params["kind"], params.get("representation"), params["max_epochs"]) for params in asked] == [
        ("sasrec", "id+content", 7),
        ("vbpr", None, 7),
    ]
    np.testing.assert_array_equal(asked[0]["vectors"], found)


def test_table_of_vectors_has_the_groups_that_there_are(shop: Workspace, tmp_path: Path, keep: Callable[..., None]) -> None:
    params, interactions = load_params(shop.root / "params.yaml"), INTERACTIONS.read(shop.interactions)
    test = interactions.filter(pl.col("split") == "test").sort("user_id")["item_id"].to_numpy()
    seen = training_counts(interactions, interactions["item_id"].n_unique())[test]
    for name, place in (("a", 1.0), ("b", 3.0)):
        keep(tmp_path / name / "1.parquet", interactions, np.where(seen < 4, place, 20.0))
    table = compare_vectors.table(shop, params, tmp_path, ["a"], ["b"], [1])
    assert cells(table, f"| tail ({(seen < 4).sum()}) | a |")[2:] == [
        "1.0000",
        "1.0000",
        "b",
        *["+0.5000 [+0.5000, +0.5000]", "+0.5000 .. +0.5000"],
    ]
    panels = compare_vectors.intervals(shop, params, tmp_path, ["a"], ["b"], [1])
    assert panels[f"{tmp_path.name}, tail ({(seen < 4).sum()})"] == {"a - b": pytest.approx((0.5, 0.5, 0.5))}
    assert ("| cold (" in table) == bool((seen == 0).any()) == any(", cold (" in title for title in panels)
    assert cells(table, f"| all ({len(test)}) | b |")[2] == f"{(seen < 4).mean():.4f}"


def test_fewer_users_of_the_same_shop(shop: Workspace, tmp_path: Path) -> None:
    whole = INTERACTIONS.read(shop.interactions)
    made = text_matters.with_fewer_users(shop, 0.25, tmp_path)
    fewer, users = INTERACTIONS.read(made.interactions), whole["user_id"].n_unique()
    assert fewer["user_id"].unique().sort().to_list() == list(range(1, round(0.25 * users) + 1))
    histories = {tuple(user["item_id"]) for _, user in whole.group_by("user_id", maintain_order=True)}
    assert all(tuple(user["item_id"]) in histories for _, user in fewer.group_by("user_id", maintain_order=True))
    assert len(ITEMS.read(made.items)) == len(ITEMS.read(shop.items))
