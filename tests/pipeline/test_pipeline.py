"""End to end, with DVC: what runs, what is left alone, and that nothing depends on when or how often."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

if TYPE_CHECKING:
    from conftest import Project

pytestmark = pytest.mark.end_to_end


def test_every_variant_and_recommender_has_metrics_and_there_is_a_page(finished: Project) -> None:
    for variant in ("id", "zero_shot", "sda"):
        for recommender in ("pop", "sasrec", "vbpr"):
            metrics = json.loads((finished.root / "metrics" / variant / f"{recommender}.json").read_text())
            assert {"hit@10", "ndcg@10", "num_users"} <= set(metrics)
            assert all(isinstance(value, int | float) for value in metrics.values())
            positions = pl.read_parquet(finished.root / "evaluation" / variant / f"{recommender}.parquet")
            assert metrics["hit@10"] == pytest.approx(float((positions["position"] <= 10).mean()))
    page = (finished.root / "report" / "index.html").read_text()
    assert "<table" in page
    assert "sda" in page
    assert not (finished.root / ".resume").exists() or not any(p.is_file() for p in (finished.root / ".resume").rglob("*"))


def test_second_repro_does_nothing(finished: Project) -> None:
    before = (finished.root / "dvc.lock").read_bytes()
    assert finished.stages_run("repro") == set()
    assert (finished.root / "dvc.lock").read_bytes() == before
    assert finished.run("git", "status", "--porcelain").stdout == ""


def test_forced_repro_leaves_the_lock_byte_identical(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "forced")
    before = (project.root / "dvc.lock").read_bytes()
    shutil.rmtree(project.root / "models")  # trained recommenders whose inputs are the same would be kept
    assert len(project.stages_run("repro", "--force")) > 15
    assert (project.root / "dvc.lock").read_bytes() == before
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_metrics_read_well_in_dvc(finished: Project) -> None:
    shown = json.loads(finished.dvc("metrics", "show", "--json").stdout)[""]["data"]
    assert shown[str(Path("metrics", "sda", "sasrec.json"))]["data"]["ndcg@10"] >= 0.0
    table = finished.dvc("metrics", "show", "--md", "metrics/sda/sasrec.json").stdout
    assert "ndcg@10" in table
    keep = "Experiment|metrics/(sda|zero_shot)/sasrec.json:ndcg@10$|.*loss.temperature"  # as in the README
    shown = finished.dvc("exp", "show", "--drop", ".*", "--keep", keep, "--md", "--no-pager").stdout
    assert all(name in shown for name in ("metrics/sda/sasrec.json:ndcg@10", "zero_shot", "train_adapter.loss.temperature"))


def test_the_full_ladder_has_a_stage_for_every_rung(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "ladder")
    project.set_params("ladder=full")
    names = set(project.dvc("stage", "list", "--name-only").stdout.split())
    assert {f"control_embeddings@{name}" for name in ("random", "shuffled", "image_only", "text_only")} <= names
    assert {f"evaluate@{name}" for name in ("id", "random", "lora_cmsa", "infonce", "sda")} <= names


@pytest.fixture(scope="module")
def changed(
    finished: Project, small_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[set[str], set[str]]]:
    """Run one experiment in a copy of the finished project: the stages that ran, the recommenders that were trained."""

    def run(name: str, override: str) -> tuple[set[str], set[str]]:
        project = finished.copy(tmp_path_factory.mktemp(name) / "project")
        written = {path: path.stat().st_mtime_ns for path in project.root.glob("models/*/*/history.tsv")}
        ran = project.stages_run("exp", "run", *(part for each in (*small_settings, override) for part in ("-S", each)))
        trained = {path.parent for path, time in written.items() if path.stat().st_mtime_ns != time}
        return ran, {path.relative_to(project.root / "models").as_posix() for path in trained}

    return run


def test_an_evaluation_param_re_runs_no_training(changed: Callable[[str, str], tuple[set[str], set[str]]]) -> None:
    ran, trained = changed("evaluation", "evaluate.protocol=uni100")
    assert ran == {"draw_negatives", "evaluate@id", "evaluate@zero_shot", "evaluate@sda", "report"}
    assert trained == set()


def test_a_vbpr_param_trains_vbpr_only(changed: Callable[[str, str], tuple[set[str], set[str]]]) -> None:
    ran, trained = changed("vbpr", "train_recommender.vbpr.factor_size=8")
    assert trained == {"id/vbpr", "zero_shot/vbpr", "sda/vbpr"}
    assert ran == {
        "train_recommender_id", "train_recommender@zero_shot", "train_recommender@sda",
        "evaluate@id", "evaluate@zero_shot", "evaluate@sda", "report",
    }  # fmt: skip


def test_the_temperature_re_runs_what_depends_on_it(changed: Callable[[str, str], tuple[set[str], set[str]]]) -> None:
    ran, trained = changed("temperature", "train_adapter.loss.temperature=0.1")
    stages = ("train_adapter", "export_embeddings", "build_index", "train_recommender", "evaluate")
    assert ran == {f"{stage}@sda" for stage in stages} | {"report"}
    assert trained == {"sda/pop", "sda/sasrec", "sda/vbpr"}
