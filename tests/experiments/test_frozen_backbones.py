"""Comparison of frozen backbones: what is compared with what, the intervals over draws, that it resumes, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import frozen_backbones
from experiments.study import positions_path, read_gains
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import read_table
from sda_core.errors import ConfigError
from tests.experiments.projects import new_project, stages_in_this_process
from tests.experiments.test_adaptation import SMALL

TINY = """\
kind: tiny_qwen2_5_vl
seed: 0
hidden_size: {width}
num_layers: 2
num_heads: 2
vision_hidden_size: 32
vision_depth: 1
min_pixels: 784
max_pixels: 784
max_text_tokens: 64
pooling: mean
"""
DRAWN = [
    *(change for change in SMALL if not change.startswith(("backbone", "dataset"))),
    *("dataset.num_users=120", "dataset.num_items=80", "dataset.image_side=16"),
]
NEAREST = Names(("nearest",))
VECTORS = Names(("zero_shot", "id+zero_shot"))


def given(root: Path) -> list[str]:
    """The options of two backbones of different widths."""
    texts = {"narrow": TINY.format(width=16), "wide": TINY.format(width=32)}
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    return [f"{name}={root / name}.yaml" for name in texts]


def run(root: Path, *, draws: Numbers | None = None, name: str = "small", recommenders: Names = NEAREST) -> str:
    frozen_backbones.main(name, given(root), recommenders, VECTORS, DRAWN, draws, root, Numbers((1, 2)))
    return (root / "experiments" / "results" / f"frozen_backbones-{name}" / "table.md").read_text(encoding="utf-8")


def cells(text: str, *first: str) -> list[list[str]]:
    """The rows that begin with these cells."""
    found = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|"))
    return [row for row in found if row[: len(first)] == list(first)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project folder with conf/ alone, in which two draws were compared."""
    with new_project(tmp_path_factory, repository) as root:
        run(root, draws=Numbers((7, 8)))
    return root


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "frozen_backbones" / "small"


def positions(project: Path, draw: int, backbone: str, vector: str) -> Path:
    return folder(project) / f"draw-{draw}" / "backbones" / backbone / "positions" / "nearest" / vector


def test_intervals_are_over_the_draws(project: Path) -> None:
    text = (project / "experiments" / "results" / "frozen_backbones-small" / "table.md").read_text(encoding="utf-8")
    means = [
        float((read_gains("ndcg", positions(project, draw, "wide", "id+zero_shot"), [0])
               - read_gains("ndcg", positions(project, draw, "narrow", "id+zero_shot"), [0])).mean())
        for draw in (7, 8)
    ]  # fmt: skip
    low, high = stats.t.interval(0.95, 1, loc=np.mean(means), scale=stats.sem(means))
    (row,) = cells(text, "id+zero_shot", "wide")
    assert row[3] == f"{np.mean(means):+.4f} [{low:+.4f}, {high:+.4f}]"
    assert cells(text, "id+zero_shot", "narrow")[0][3] == ""
    (ids,) = cells(text, "id")
    assert ids[1] == ids[3] == ids[4] == ""
    assert [row[0] for row in cells(text) if row[0] in ("7", "8")] == ["7", "8"], "a row for each draw"


def test_each_backbone_has_its_own_embeddings_of_the_same_shop(project: Path) -> None:
    tables = {
        (draw, backbone): read_table(
            Workspace(folder(project) / f"draw-{draw}" / "backbones" / backbone).embeddings("zero_shot")
        ).text_ID
        for draw in (7, 8)
        for backbone in ("narrow", "wide")
    }
    assert {key[1]: table.shape[1] for key, table in tables.items()} == {"narrow": 16, "wide": 32}
    assert len(tables[7, "narrow"]) == len(tables[7, "wide"])
    links = [folder(project) / "draw-7" / "backbones" / backbone / "data" for backbone in ("narrow", "wide")]
    assert len({link.resolve() for link in links}) == 1


def test_it_resumes(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    stages_in_this_process(monkeypatch)
    removed = positions_path(positions(project, 8, "wide", "zero_shot"), 0)
    removed.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")}
    run(project, draws=Numbers((7, 8)))
    after = {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")}
    assert {path for path, time in after.items() if before.get(path) != time} == {removed}


def test_one_shop_and_a_trained_recommender(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    stages_in_this_process(monkeypatch)
    text = run(project, name="one", recommenders=Names(("nearest", "sasrec")))
    assert text.count("full rank, one shop") == 2
    assert "by draw" not in text
    sasrec = project / "experiments" / "runs" / "frozen_backbones" / "one" / "shop"
    for vector in VECTORS:
        for backbone in ("narrow", "wide"):
            assert {
                path.stem for path in (sasrec / "backbones" / backbone / "positions" / "sasrec" / vector).glob("*.parquet")
            } == {
                "1",
                "2",
            }
    assert (project / "experiments" / "results" / "frozen_backbones-one" / "plot.png").stat().st_size > 5000


def test_another_backbone_of_the_same_name_is_rejected(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    stages_in_this_process(monkeypatch)
    options = given(project)
    (project / "wide.yaml").write_text(TINY.format(width=64), encoding="utf-8")
    with pytest.raises(ConfigError, match="were made with other backbone; use another name"):
        frozen_backbones.main("small", options, vectors=VECTORS, composed=DRAWN, shop_seeds=Numbers((7, 8)), root=project)


def test_mistakes_are_one_line(tmp_path: Path, repository: Path) -> None:
    options = given(tmp_path)
    (tmp_path / "conf").symlink_to(repository / "conf")
    with pytest.raises(ConfigError, match=r"--vectors: expected some of id, zero_shot, .* \(got 'sda'\)"):
        frozen_backbones.main("m", options, vectors=Names(("sda",)), root=tmp_path)
    with pytest.raises(ConfigError, match=r"--backbone: expected two different names or more \(got narrow\)"):
        frozen_backbones.main("m", options[:1] * 2, root=tmp_path)
    with pytest.raises(ConfigError, match="--backbone: expected NAME=FILE"):
        frozen_backbones.main("m", ["nano"], root=tmp_path)
    with pytest.raises(ConfigError, match="--shop-seeds: an interval over draws needs two different seeds"):
        frozen_backbones.main("m", options, shop_seeds=Numbers((7, 7)), root=tmp_path)
    with pytest.raises(ConfigError, match="--shop-seeds: only the built-in shop can be drawn again"):
        frozen_backbones.main("m", options, composed=["dataset=beauty"], shop_seeds=Numbers((7, 8)), root=tmp_path)
    assert not list((tmp_path / "experiments").rglob("*.parquet"))
