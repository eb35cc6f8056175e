"""Which commit the page with costs names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sda_core.steps.report import commit_of


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "params.yaml").write_text("a: 1\n", encoding="utf-8")
    git(tmp_path, "add", "params.yaml")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_and_whether_something_was_changed_since(project: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    assert commit_of(project) == commit
    (project / "notes.txt").write_text("not tracked", encoding="utf-8")
    assert commit_of(project) == commit
    (project / "params.yaml").write_text("a: 2\n", encoding="utf-8")
    assert commit_of(project) == f"{commit} with uncommitted changes"
    git(project, "commit", "-qam", "second")
    assert commit_of(project) == git(project, "rev-parse", "HEAD") != commit


def test_no_commit_is_made_up(project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = project / "elsewhere"
    inside.mkdir()
    (inside / "params.yaml").write_text("a: 1\n", encoding="utf-8")
    assert commit_of(inside) is None  # the checkout is of another project
    outside = tmp_path_factory.mktemp("outside")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(outside.parent))
    assert commit_of(outside) is None
    git(inside, "init", "-q")
    git(inside, "add", "params.yaml")
    assert commit_of(inside) is None  # nothing is committed yet
    monkeypatch.setenv("PATH", "")
    assert commit_of(project) is None
