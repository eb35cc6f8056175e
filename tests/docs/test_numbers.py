"""README's numbers of the default run are those of the committed metrics."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script(repository: Path) -> dict[str, Any]:
    return runpy.run_path(str(repository / "docs" / "write_numbers.py"))


def test_they_are_those_of_the_last_commit(script: dict[str, Any], repository: Path, tmp_path: Path) -> None:
    """Of the commit: a run on another machine, before the tests, writes other metrics into the checkout."""
    command = ["git", "archive", "HEAD", "metrics", "comparisons.json", "README.md", "docs/results.md"]
    done = subprocess.run(command, cwd=repository, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no Git checkout here: the committed metrics are not known")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tmp_path, filter="data")
    outdated = [path.name for path, text in script["pages"](tmp_path).items() if path.read_text(encoding="utf-8") != text]
    assert not outdated, f"run `python docs/write_numbers.py`, and commit {outdated} with the metrics"


@pytest.mark.parametrize(
    ("interval", "is_clear", "verdict"),
    [
        ((0.001, 0.02), 1, "higher, +.0095 [+.0010, +.0200]"),
        ((-0.02, -0.001), 1, "lower, -.0095 [-.0200, -.0010]"),
        ((-0.01, 0.01), 0, "no clear difference, +.0010 [-.0100, +.0100]"),
        ((0.001, 0.02), 0, "not clear after Holm's correction, +.0095 [+.0010, +.0200]"),
    ],
)
def test_the_answer_follows_from_interval_and_correction(
    script: dict[str, Any], tmp_path: Path, interval: tuple[float, float], is_clear: int, verdict: str
) -> None:
    for number, variant in enumerate(script["VARIANTS"]):
        folder = tmp_path / "metrics" / variant
        folder.mkdir(parents=True)
        values = {"ndcg@10": 0.1 + number / 100, "tail_ndcg@10": 0.01, "num_users": 1234, "tail_num_users": 56}
        (folder / "sasrec.json").write_text(json.dumps(values), encoding="utf-8")
    pair = "sasrec/sda_vs_zero_shot/ndcg@10"
    low, high = interval
    gain = float(verdict.split(", ")[1].split()[0])
    gains = {f"{pair}_gain": gain, f"{pair}_low": low, f"{pair}_high": high, f"{pair}_clear": is_clear}
    (tmp_path / "comparisons.json").write_text(json.dumps(gains), encoding="utf-8")
    row = script["readme_row"](tmp_path)
    assert f"| NDCG@10 of `sda` against `zero_shot`: SASRec {verdict} |" in row
    assert "nearest items" not in row  # a run without them
    table = script["results_block"](tmp_path)
    found, difference = verdict.split(", ", 1)
    assert f"| `sasrec`: `sda` - `zero_shot` | {difference} | {found} |" in table
    assert script["control_row"](tmp_path) == ""  # a run without the positive control
    assert "| `sasrec` | .1000 (.0100) | .1100 (.0100) | .1200 (.0100) | .1300 (.0100) | .1400 (.0100) |" in table
    (tmp_path / "metrics" / "id" / "sasrec.json").write_text(
        json.dumps({"ndcg@10": 0.1, "num_users": 5, "tail_num_users": 0}), "utf-8"
    )
    assert "| `sasrec` | .1000 (no tail) | .1100 (.0100) |" in script["results_block"](tmp_path)
    assert "1,234 test users, of whom 56 have a tail target." in table


def test_markers_are_needed(script: dict[str, Any]) -> None:
    assert script["block"]("a", "x\n<!-- a -->\nold\n<!-- /a -->\ny", "new\n") == "x\n<!-- a -->\nnew\n<!-- /a -->\ny"
    with pytest.raises(ValueError, match="one pair of markers 'b'"):
        script["block"]("b", "x", "new")
