"""Adapted against frozen vectors over draws: what is trained, the intervals over draws, that it resumes, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import adaptation_draws, nearest_items
from experiments.nearest_items import Run
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.params import load_params
from tests.experiments.projects import new_project, stages_in_this_process
from tests.experiments.test_adaptation import SMALL

DRAWS = Numbers((7, 8))
TINY = [
    *(change for change in SMALL if not change.startswith("dataset")),
    *("dataset.num_users=120", "dataset.num_items=80", "dataset.image_side=16"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project folder with conf/ alone, in which two draws were compared."""
    with new_project(tmp_path_factory, repository) as root:
        adaptation_draws.main("small", DRAWS, composed=TINY, root=root)
    return root


def folder(project: Path, draw: int) -> Path:
    return project / "experiments" / "runs" / "adaptation_draws" / "small" / f"draw-{draw}"


def table(project: Path) -> str:
    return (project / "experiments" / "results" / "adaptation_draws-small" / "table.md").read_text(encoding="utf-8")


def rows(text: str, first: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {first} |")]


def test_each_draw_has_its_own_shop_and_adapters(project: Path) -> None:
    for draw in DRAWS:
        assert load_params(folder(project, draw) / "shop" / "params.yaml").dataset.seed == draw  # type: ignore[union-attr]
        own = load_params(folder(project, draw) / f"seed-{draw}" / "params.yaml")
        assert own.train_adapter.training.seed == draw
        assert (folder(project, draw) / "mismatched" / f"seed-{draw}" / "embeddings" / "sda.parquet").exists()
    one, other = ((folder(project, draw) / "shop" / "data" / "filtered" / "items.parquet").read_bytes() for draw in DRAWS)
    assert one != other


@pytest.mark.parametrize(
    ("first", "second"), [("id+sda", "id+zero_shot"), ("id+sda", "id+mismatched"), ("sda", "zero_shot"), ("id+zero_shot", "id")]
)
def test_intervals_are_over_the_draws(project: Path, first: str, second: str) -> None:
    gains = []
    for draw in DRAWS:
        run = Run("x", folder(project, draw), load_params(folder(project, draw) / "shop" / "params.yaml"))
        scaling = run.params.train_recommender.nearest.axis_scaling
        of_all = next(iter(nearest_items.measure(run, (first, second), (), [draw], scaling).values()))
        gains.append(float((of_all[first][0] - of_all[second][0]).mean()))
    mean, margin = np.mean(gains), stats.t.ppf(0.975, 1) * np.std(gains, ddof=1) / np.sqrt(2)
    (row,) = rows(table(project), f"{first} - {second}")
    assert row[3] == f"{mean:+.4f} [{mean - margin:+.4f}, {mean + margin:+.4f}]"
    assert [line[0] for draw in DRAWS for line in rows(table(project), str(draw))] == ["7", "8"]


def test_adapted_vectors_are_compared_with_each_other() -> None:
    found = adaptation_draws.pairs(("sda", "lora", "mismatched"))
    for ids in ("id+", ""):
        assert (f"{ids}sda", f"{ids}lora") in found
        assert (f"{ids}sda", f"{ids}mismatched") in found
        assert (f"{ids}lora", f"{ids}mismatched") in found
    assert len(found) == len(set(found))


def test_retrieval_is_shown_before_and_after(project: Path) -> None:
    learned = table(project).partition("###")[2].partition("###")[0]
    assert [row[0] for name in ("zero_shot", "sda", "mismatched") for row in rows(learned, name)] == [
        "zero_shot",
        "sda",
        "mismatched",
    ]
    assert (project / "experiments" / "results" / "adaptation_draws-small" / "plot.png").stat().st_size > 5000


def test_it_resumes(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    stages_in_this_process(monkeypatch)
    before, made = table(project), {path: path.stat().st_mtime_ns for path in folder(project, 7).rglob("*.parquet")}
    adaptation_draws.main("small", DRAWS, composed=TINY, root=project)
    assert table(project) == before
    assert {path: path.stat().st_mtime_ns for path in folder(project, 7).rglob("*.parquet")} == made


def test_mistakes_are_one_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "conf").symlink_to(repository / "conf")
    with pytest.raises(ConfigError, match=r"--vectors: expected some of .* \(got 'zero_shot'\)"):
        adaptation_draws.main("m", DRAWS, Names(("zero_shot",)), root=tmp_path)
    with pytest.raises(ConfigError, match="--shop-seeds: an interval over draws needs two different seeds"):
        adaptation_draws.main("m", Numbers((7, 7)), root=tmp_path)
    with pytest.raises(ConfigError, match="--compose: "):
        adaptation_draws.main("m", DRAWS, composed=["dataset=beauty"], root=tmp_path)
