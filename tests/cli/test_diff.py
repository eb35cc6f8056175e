"""`sda diff`: what it reads from Git and the DVC cache, what it says, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from dvc.repo import Repo
from typer.testing import CliRunner, Result

from sda_core.artifacts import INTERACTIONS, POSITIONS, SEED_POSITIONS, Workspace
from sda_core.cli.app import app
from tests.sections import seeded

NUM_USERS = 200
PIPELINE = """
stages:
  evaluate:
    cmd: "true"
    outs: [evaluation, data/filtered/interactions.parquet]
"""


def positions(places: np.ndarray, candidates: int = 50) -> pl.DataFrame:
    columns = {
        "user_id": range(1, len(places) + 1),
        "target_item_id": [1 + n % 10 for n in range(len(places))],
        "position": places.astype(float),
        "candidates": candidates,
        "num_better": (places - 1).astype(int),
        "num_tied": 0,
    }
    return seeded(pl.DataFrame(columns, schema=dict(POSITIONS.columns)))


def write(workspace: Workspace, places: dict[tuple[str, str], pl.DataFrame]) -> None:
    shutil.rmtree(workspace.root / "evaluation", ignore_errors=True)
    for key, frame in places.items():
        SEED_POSITIONS.write(frame, workspace.positions(*key))


def commit(root: Path, message: str) -> None:
    with Repo(str(root)) as repo:
        repo.commit(force=True)
    for command in (["add", "-A"], ["commit", "-q", "--allow-empty", "-m", message]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=root, check=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Three commits: only the code; a first evaluation; a better `sda` and another recommender.  The workspace is the last."""
    root = tmp_path_factory.mktemp("project")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    Repo.init(str(root)).close()
    shutil.copy(repository / "params.yaml", root)
    (root / "dvc.yaml").write_text(PIPELINE)
    workspace = Workspace(root)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "code"], cwd=root, check=True)
    subprocess.run(["git", "tag", "code"], cwd=root, check=True)
    # items 1 to 5 have many training rows, 6 to 10 have one each: half of the targets are tail
    rows = [(user, item, user, 5.0, "train") for user in range(1, 11) for item in range(1, 6)]
    rows += [(1, item, 99, 5.0, "train") for item in range(6, 11)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    random = np.random.default_rng(0)
    old = random.integers(2, 40, NUM_USERS)
    better = np.where(np.arange(NUM_USERS) % 2 == 0, old - 1, old)
    write(workspace, {("id", "sasrec"): positions(old), ("sda", "sasrec"): positions(old), ("sda", "vbpr"): positions(old)})
    commit(root, "first")
    subprocess.run(["git", "tag", "first"], cwd=root, check=True)
    write(workspace, {("id", "sasrec"): positions(old), ("sda", "sasrec"): positions(better), ("sda", "bpr"): positions(old)})
    commit(root, "second")
    return root


def diff(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["diff", *arguments, "--root", str(root)])


def mistake(root: Path, *arguments: str) -> str:
    done = diff(root, *arguments)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("sda diff: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def rows(output: str) -> dict[tuple[str, str, str], list[str]]:
    cells = [line.split() for line in output.splitlines()]
    return {(line[0], line[1], line[2]): line[3:] for line in cells if len(line) == 10 and line[0] not in ("variant", "verdict:")}


def ndcg(places: pl.Series) -> float:
    return float(np.where(places <= 10, 1 / np.log2(1 + places), 0).mean())


def test_a_commit_against_the_workspace(project: Path) -> None:
    done = diff(project, "first")
    assert done.exit_code == 0, done.output
    found = rows(done.stdout)
    assert set(found) == {("sda", "sasrec", name) for name in ("hit@10", "ndcg@10", "tail_ndcg@10")}
    new = SEED_POSITIONS.read(Workspace(project).positions("sda", "sasrec"))["position"]
    old = SEED_POSITIONS.read(Workspace(project).positions("id", "sasrec"))["position"]
    before, after, change, low, _, high, clear = found["sda", "sasrec", "ndcg@10"]
    assert float(before) == pytest.approx(ndcg(old), abs=5e-5)
    assert float(after) == pytest.approx(ndcg(new), abs=5e-5)
    assert float(change) == pytest.approx(ndcg(new) - ndcg(old), abs=5e-5)
    assert 0 < float(low) < float(change) < float(high)
    assert clear == "yes"
    # places of the second half of the catalogue (items 6 to 10) are all that is tail
    tail = (np.arange(NUM_USERS) % 10) >= 5
    assert float(found["sda", "sasrec", "tail_ndcg@10"][0]) == pytest.approx(ndcg(old.filter(pl.Series(tail))), abs=5e-5)
    assert "every position equal: id/sasrec" in done.stdout
    assert "only in revision first: sda/vbpr" in done.stdout
    assert "only in the workspace: sda/bpr" in done.stdout


def test_two_revisions_turned_round_change_the_sign(project: Path) -> None:
    forth, back = (rows(diff(project, *order).stdout) for order in (("first", "HEAD"), ("HEAD", "first")))
    assert float(forth["sda", "sasrec", "ndcg@10"][2]) == -float(back["sda", "sasrec", "ndcg@10"][2]) != 0.0


def test_what_is_not_there(project: Path) -> None:
    assert "revision nosuch: there is no such revision in Git or DVC" in mistake(project, "nosuch")
    assert "revision: is empty; name a commit, branch, tag, or an experiment" in mistake(project, "")
    assert "revision code: has no evaluation" in mistake(project, "code")


@pytest.mark.parametrize("problem", ["disk I/O error", "database or disk is full", "attempt to write a readonly database"])
def test_a_database_of_dvc_that_cannot_be_used_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise sqlite3.OperationalError(problem)

    monkeypatch.setattr("dvc.repo.Repo.__init__", fails)
    result = diff(project, "HEAD")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"sda diff: error: DVC's database: cannot be used ({problem}); free some space, make the folder ")


def test_a_full_disk_is_no_missing_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look like a cache without positions, and the metrics alone would be compared."""

    def fails(*arguments: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dvc.api.DVCFileSystem.read_bytes", fails)
    result = diff(project, "HEAD")
    assert result.exit_code == 1
    assert result.stderr.startswith("sda diff: error: params.yaml: cannot be written (No space left on device); free some space")


def test_no_project(tmp_path: Path, repository: Path) -> None:
    shutil.copy(repository / "params.yaml", tmp_path)
    assert "cannot be opened" in mistake(tmp_path, "HEAD")


def test_a_repository_without_a_commit(tmp_path: Path, repository: Path) -> None:
    shutil.copy(repository / "params.yaml", tmp_path)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    assert "run inside a DVC project with Git and a commit" in mistake(tmp_path, "HEAD~1")


def test_a_cache_that_is_gone(project: Path) -> None:
    cache = project / ".dvc" / "cache"
    cache.rename(project / "elsewhere")
    try:
        line = mistake(project, "first")
    finally:
        (project / "elsewhere").rename(cache)
    assert "revision first: evaluation" in line
    assert "dvc pull" in line


@pytest.fixture
def changed(project: Path) -> Iterator[Workspace]:
    """The workspace of the project, put back afterwards."""
    workspace = Workspace(project)
    kept = {path: path.read_bytes() for path in (project / "params.yaml", workspace.positions("sda", "sasrec"))}
    yield workspace
    for path, content in kept.items():
        path.write_bytes(content)


def test_other_data_is_refused(changed: Workspace) -> None:
    path = changed.positions("sda", "sasrec")
    frame = SEED_POSITIONS.read(path)
    SEED_POSITIONS.write(frame.head(NUM_USERS - 1), path)
    assert "different users (199 and 200, 199 in common)" in mistake(changed.root, "first")
    SEED_POSITIONS.write(frame.with_columns(pl.col("target_item_id") + 1), path)
    assert "different targets for 200 of 200 users" in mistake(changed.root, "first")


def test_another_protocol_is_refused(changed: Workspace) -> None:
    params = changed.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("protocol: fullrank", "protocol: uni100"))
    line = mistake(changed.root, "first")
    assert "evaluate.protocol: fullrank in revision first, uni100 in the workspace" in line
    params.write_text(text.replace("ties: pessimistic", "ties: mean"))
    assert "evaluate.ties" in mistake(changed.root, "first")
    params.write_text(text.replace("negatives_seed: 7", "negatives_seed: 8"))  # full rank draws nothing
    assert diff(changed.root, "first").exit_code == 0


def test_other_negatives_and_another_retrieval_are_refused(changed: Workspace) -> None:
    path = changed.positions("sda", "sasrec")
    SEED_POSITIONS.write(SEED_POSITIONS.read(path), path, {"negatives_sha256": "1" * 64})
    assert diff(changed.root, "first").exit_code == 0  # the first run does not tell
    other = changed.positions("id", "sasrec")
    SEED_POSITIONS.write(SEED_POSITIONS.read(other), other, {"negatives_sha256": "2" * 64})
    assert "was ranked among other negatives" in mistake(changed.root, "first")
    SEED_POSITIONS.write(SEED_POSITIONS.read(other), other)
    params = changed.root / "params.yaml"
    text = params.read_text()
    retrieval = "retrieval: {factory: Flat, nprobe: null, ef_search: null, depth: 50, num_queries: 5}"
    params.write_text(text.replace("retrieval: null", retrieval))
    assert "evaluate.retrieval: None in revision first, {'factory': 'Flat'" in mistake(changed.root, "first")


def test_gains_read_well_in_dvc(project: Path) -> None:
    """What the report writes into comparisons.json becomes a metric with one number a name."""
    path = Workspace(project).comparisons
    path.write_text(json.dumps({"sasrec/sda_vs_id/ndcg@10_gain": 0.01, "sasrec/sda_vs_id/ndcg@10_clear": 1}))
    with Repo(str(project)) as repo:
        (project / "dvc.yaml").write_text(PIPELINE + "metrics: [comparisons.json]\n")
        try:
            shown = repo.metrics.diff("HEAD")["diff"]
        finally:
            (project / "dvc.yaml").write_text(PIPELINE)
            path.unlink()
    assert set(shown["comparisons.json"]) == {"sasrec/sda_vs_id/ndcg@10_gain", "sasrec/sda_vs_id/ndcg@10_clear"}
