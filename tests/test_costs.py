"""What stages cost: measured, kept by several at once, read back, added up."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sda_core import costs
from sda_core.artifacts import Workspace

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


def run(stage: str = "filter", begin: float = 0.0, seconds: float = 1.0, **changes: Any) -> costs.Run:
    """The cost of a stage that began some seconds after noon."""
    measured = costs.measure(costs.beginning_now(), stage, {})
    return measured.model_copy(update={"started": NOON + timedelta(seconds=begin), "seconds": seconds, **changes})


def test_a_stage_is_measured_with_the_processes_it_starts() -> None:
    begin = costs.beginning_now()
    subprocess.run([sys.executable, "-S", "-c", "x = bytearray(64 << 20); sum(range(2_000_000))"], check=True)
    used = costs.measure(begin, "train-adapter", {"variant": "sda", "steps": 20})
    assert (used.stage, used.variant, used.recommender) == ("train_adapter", "sda", None)
    assert 0 < used.cpu_seconds <= used.seconds * used.cores + 0.1
    assert used.child_peak_mib is None or used.child_peak_mib >= 64
    assert used.peak_mib is None or used.peak_mib > 10
    assert used.speed == (pytest.approx(20 / used.seconds), "steps")
    assert (used.processes, used.gpu, used.gpu_peak_mib) == (1, None, None)
    again = costs.measure(costs.beginning_now(), "filter", {})  # another stage of the same process: from its own beginning
    assert again.cpu_seconds < used.cpu_seconds
    assert again.speed is None


def test_the_start_of_a_process_counts_where_it_is_asked_for() -> None:
    clock = costs.beginning_now().clock - 5.0  # as if it had been read five seconds ago
    used = costs.measure(costs.beginning_at(clock), "filter", {})
    assert used.seconds >= 5.0
    assert used.started <= datetime.now(UTC) - timedelta(seconds=4.9)


def test_counts_of_any_kind_can_be_kept(tmp_path: Path) -> None:
    counts = {
        "page": Path("report/index.html"), "items": np.int64(7), "recall": np.float32(0.5), "bad": float("nan"),
        "\udcff": "\udcff", "long": "x" * 10_000, **{f"n{place}": place for place in range(100)},
    }  # fmt: skip
    used = costs.measure(costs.beginning_now(), "build-index", counts)
    costs.keep(used, tmp_path / "costs" / "stages.jsonl")
    assert costs.read(tmp_path / "costs" / "stages.jsonl") == [used]
    assert (used.counts["items"], used.counts["recall"], used.counts["bad"], used.counts["?"]) == (7, 0.5, "nan", "?")
    assert len(used.model_dump_json()) < 4000


def test_the_gpu_is_named_where_torch_used_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: True, get_device_name=lambda: "H100", max_memory_allocated=lambda: 3 << 30)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, get_num_threads=lambda: 4))
    used = costs.measure(costs.beginning_now(), "train_adapter", {})
    assert (used.gpu, used.gpu_peak_mib, used.threads) == ("H100", 3072.0, 4)
    assert used.machine.endswith(", H100")


def test_no_line_is_lost_where_many_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, one = tmp_path / "stages.jsonl", run()
    monkeypatch.setattr(costs, "_MAX_BYTES", 100 * len(one.model_dump_json()))  # so that it is filled once
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda begin: costs.keep(run(begin=begin), path), range(150)))
    assert sorted(found.started for found in costs.read(path)) == [NOON + timedelta(seconds=s) for s in range(150)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stages.jsonl", "stages.old.jsonl"]


def test_the_file_stays_small_and_has_the_last_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stages.jsonl"
    monkeypatch.setattr(costs, "_MAX_BYTES", 4000)
    for begin in range(60):
        costs.keep(run(begin=begin), path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3 * 4000
    found = costs.read(path)
    assert found[-1].started == NOON + timedelta(seconds=59)
    assert len(found) >= 8


def test_damaged_lines_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stages.jsonl"
    costs.keep(run(), path)
    text = path.read_text()
    strange = [text.replace('"seconds":1.0', '"seconds":"long"'), text.replace("Z", "", 1), "[1, 2]\n", "\xff\n", "\n"]
    path.write_text(text + "".join(strange) + text[:70], encoding="latin-1")  # the last one was cut short
    costs.keep(run("report"), path)
    with caplog.at_level(logging.WARNING):
        found = costs.read(path)
    assert [one.stage for one in found] == ["filter", "report"]
    assert [record.getMessage().split(": ")[0].rpartition(" ")[2] for record in caplog.records] == ["2", "3", "4", "5", "7"]


def test_what_cannot_be_written_is_told_and_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "costs").write_text("a file where the folder should be")
    full = [Path("/dev/full")] if Path("/dev/full").exists() else []
    for place in (tmp_path / "costs" / "stages.jsonl", tmp_path / "no" / "folder" / "stages.jsonl", *full):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            costs.keep(run(), place)
        assert "the cost of filter was not recorded" in caplog.text
    assert costs.read(tmp_path / "nothing.jsonl") == []


def test_the_last_run_of_each_in_the_order_of_the_pipeline() -> None:
    whole = run("train_recommender", 10, 8, variant="sda")
    runs = [
        run("evaluate", 0, variant="sda"),
        run("evaluate", 30, 2, variant="sda"),
        run("evaluate", 20, 99, variant="sda"),  # a clock that was set back: the last one by the calendar counts
        run("evaluate", 1, 4, variant="gone"),
        run("filter", 40, 3, peak_mib=900.0),
        run("train_recommender", 11, 5, variant="sda", recommender="sasrec", child_peak_mib=None, peak_mib=5000.0),
        run("train_recommender", 12, 2, variant="sda", recommender="bpr"),
        whole,
        run("train_recommender", 50, 6, variant="sda", recommender="vbpr"),  # trained alone
        run("no_stage_of_ours", 60),
    ]
    rows = costs.latest(runs, ("zero_shot", "sda"), ("vbpr", "sasrec"))
    shown = [(row.run.stage, row.run.whose, row.run.seconds, row.is_part) for row in rows]
    assert shown == [
        ("filter", "", 3, False),
        ("train_recommender", "sda", 8, False),
        ("train_recommender", "sda/vbpr", 6, False),
        ("train_recommender", "sda/sasrec", 5, True),
        ("evaluate", "sda", 2, False),
    ]
    found = costs.total(rows)
    assert found.seconds == 3 + 8 + 6 + 2
    assert found.cpu_seconds == pytest.approx(sum(row.run.cpu_seconds for row in rows if not row.is_part))
    assert found.machines == (whole.machine,)
    lines = list(costs.table(rows))
    assert lines[1].split()[:4] == ["filter", "2026-11-26", "12:00", "3.0"]
    assert lines[4].startswith("  sasrec ")
    assert lines[-2].split()[:2] == ["total", "19.0"]
    told = json.loads(costs.as_json(rows))
    assert [one["is_part"] for one in told["runs"]] == [row.is_part for row in rows]
    assert told["total"]["seconds"] == 19.0


def test_it_lies_where_git_and_dvc_do_not_look(repository: Path) -> None:
    name = Workspace(Path()).costs.parts[0]
    for file in (".gitignore", ".dvcignore"):
        assert f"/{name}" in (repository / file).read_text(encoding="utf-8").splitlines()


def test_the_stages_are_those_of_the_command_line() -> None:
    from sda_core.cli.app import STAGES

    assert [name.replace("-", "_") for name in STAGES] == list(costs.STAGES)
