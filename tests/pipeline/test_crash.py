"""kill -9 in the middle of a stage: the next `dvc repro` ends with the hashes of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Project

pytestmark = pytest.mark.end_to_end


def kill_when(project: Project, target: str, begun: Callable[[Path], bool], seconds: float = 120.0) -> None:
    """Start `dvc repro TARGET`, and kill DVC and the stage, all at once, as soon as ``begun`` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", target],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + seconds
    while not begun(project.root):
        assert process.poll() is None, f"{target} ended before it could be killed"
        assert time.monotonic() < deadline, f"{target} never came to the point"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rewind(project: Project, *paths: str) -> None:
    """Forget the results of some stages, in the workspace, the lock and the run cache."""
    import shutil

    from ruamel.yaml import YAML

    shutil.rmtree(project.root / ".dvc" / "cache" / "runs", ignore_errors=True)
    yaml = YAML()
    lock_path = project.root / "dvc.lock"
    lock = yaml.load(lock_path.read_text(encoding="utf-8"))
    for name in list(lock["stages"]):
        if any(out["path"].startswith(paths) for out in lock["stages"][name]["outs"]):
            del lock["stages"][name]
    with lock_path.open("w", encoding="utf-8") as handle:
        yaml.dump(lock, handle)
    for path in paths:
        target = project.root / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()


def files_in(*parts: str, at_least: int = 1) -> Callable[[Path], bool]:
    """Whether that many files, not temporary ones, lie below a folder."""

    def begun(root: Path) -> bool:
        folder = root.joinpath(*parts)
        return sum(1 for p in folder.rglob("*") if not p.name.endswith(".tmp") and not p.name.startswith(".")) >= at_least

    return begun


RESUME = ".resume"
CASES = {
    "download": ("download", "data/raw", files_in("data", "raw")),
    "train_adapter": ("train_adapter@sda", "adapters/sda", files_in(RESUME, "train_adapter")),
    "export_embeddings": ("export_embeddings@sda", "embeddings/sda.parquet", files_in(RESUME, "export_embeddings", at_least=3)),
    "train_recommender": ("train_recommender@sda", "models/sda", files_in(RESUME, "train_recommender")),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_killed_stage_is_finished_by_the_next_repro(finished: Project, tmp_path: Path, case: str) -> None:
    target, output, begun = CASES[case]
    project = finished.copy(tmp_path / "project")
    undisturbed = project.outputs()
    rewind(project, output)
    kill_when(project, target, begun)
    assert output not in project.outputs()
    assert project.stages_run("repro", target) >= {target}
    project.dvc("repro")
    assert project.outputs() == undisturbed
