"""Every stage that ends well keeps what it cost, and nothing about that can make it fail."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sda_core import costs
from sda_core.artifacts import Workspace
from sda_core.cli import stage as shared
from sda_core.cli.app import app
from sda_core.errors import DataError


@pytest.fixture
def root(tmp_path: Path, repository: Path) -> Path:
    shutil.copy(repository / "params.yaml", tmp_path)
    return tmp_path


def test_one_line_a_run(root: Path) -> None:
    with shared.stage("build-index", root, None) as run:
        run.counts = {"variant": "sda", "items": 12}
    with shared.stage("report", root, None, keeps_cost=False):
        pass
    (kept,) = costs.read(Workspace(root).costs)
    assert (kept.stage, kept.variant, kept.counts) == ("build_index", "sda", {"variant": "sda", "items": 12})


def test_only_the_first_stage_of_a_process_has_its_start(root: Path) -> None:
    shared.one_stage_a_process()
    now = datetime.now(UTC)
    for _ in range(2):
        with shared.stage("filter", root, None):
            pass
    first, second = costs.read(Workspace(root).costs)
    assert first.started < now <= second.started
    assert first.ended >= now
    assert first.cpu_seconds > second.cpu_seconds  # of all that this process has done


def test_what_fails_and_what_another_process_writes_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(typer.Exit), shared.stage("filter", root, None):
        raise DataError("here", "is wrong")
    monkeypatch.setenv("RANK", "1")
    with shared.stage("filter", root, None):
        pass
    assert not Workspace(root).costs.parent.exists()


def test_a_stage_ends_well_where_its_cost_cannot_be_written(root: Path) -> None:
    (root / "costs").write_text("no folder")
    with shared.stage("filter", root, None) as run:
        run.counts = {"rows_read": 1}
    assert (root / "costs").read_text() == "no folder"


def test_the_command_shows_the_last_run_of_each(root: Path) -> None:
    nothing = CliRunner().invoke(app, ["costs", "--root", str(root)])
    assert nothing.exit_code == 1
    assert "has no record of a stage" in nothing.output
    for stage, variant in (("download", None), ("evaluate", "sda"), ("evaluate", "sda"), ("evaluate", "unknown")):
        with shared.stage(stage, root, None) as run:
            run.counts = {"num_users": 5} | ({} if variant is None else {"variant": variant})
    shown = CliRunner().invoke(app, ["costs", "--root", str(root)])
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.output.splitlines()] == ["stage", "download", "evaluate", "total", "On"]
    told = json.loads(CliRunner().invoke(app, ["costs", "--root", str(root), "--json"]).stdout)
    assert [run["stage"] for run in told["runs"]] == ["download", "evaluate"]
    assert told["runs"][1]["counts"] == {"num_users": 5, "variant": "sda"}
