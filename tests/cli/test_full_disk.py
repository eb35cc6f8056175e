"""A full disk ends every command in one line, and leaves nothing torn behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from dvc.utils.hydra import compose_and_dump

from sda_core.cli import export
from sda_core.exchange import Format
from stages import (
    build_index,
    control_embeddings,
    download,
    draw_negatives,
    evaluate,
    export_embeddings,
    fetch_images,
    import_embeddings,
    report,
    train_adapter,
    train_recommender,
)
from stages import filter as filter_stage
from tests.pipeline.conftest import SMALL

resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")

OVERRIDES = [
    *SMALL,
    "recommenders=[pop,vbpr]",
    "variants=[id,zero_shot,sda]",
    "dataset.num_users=60",
    "dataset.num_items=30",
    "evaluate.protocol=uni100",
    "train_adapter.training.num_steps=2",
    "train_adapter.training.vision_cache=always",
    "train_recommender.vbpr.max_epochs=2",
    "+import_embeddings.variants.own={path:own.parquet}",
    "import_embeddings.item_column=item_id",
    "import_embeddings.embedding_column=vector",
]

Command = Callable[[Path], object]
STAGES: dict[str, tuple[Command, str]] = {
    "download": (lambda root: download.download(root), "data/raw"),
    "filter": (lambda root: filter_stage.filter_(root), "data/filtered"),
    "fetch-images": (lambda root: fetch_images.fetch_images(root), "data/images"),
    "train-adapter": (lambda root: train_adapter.train_adapter("sda", root), "adapters/sda"),
    "export-embeddings id": (lambda root: export_embeddings.export_embeddings("id", root), "embeddings/id.parquet"),
    "export-embeddings": (lambda root: export_embeddings.export_embeddings("zero_shot", root), "embeddings/zero_shot.parquet"),
    "control-embeddings": (lambda root: control_embeddings.control_embeddings("shuffled", root), "embeddings/shuffled.parquet"),
    "import-embeddings": (lambda root: import_embeddings.import_embeddings("own", root), "embeddings/own.parquet"),
    "build-index": (lambda root: build_index.build_index("zero_shot", root), "indexes/zero_shot"),
    "draw-negatives": (lambda root: draw_negatives.draw_negatives(root), "data/negatives/uni100.parquet"),
    "train-recommender pop": (lambda root: train_recommender.train_recommender("id", "pop", root), "models/id/pop"),
    "train-recommender": (lambda root: train_recommender.train_recommender("zero_shot", "vbpr", root), "models/zero_shot/vbpr"),
    "evaluate": (lambda root: evaluate.evaluate("id", "pop", root), "evaluation/id/pop.parquet"),
    "report": (lambda root: report.report(root), "report"),
    "export mmrec": (lambda root: export.export(Format.MMREC, root / "mm", "zero_shot", root), "mm"),
    "export recbole": (lambda root: export.export(Format.RECBOLE, root / "rb", "zero_shot", root), "rb"),
    "export datasets": (lambda root: export.export(Format.DATASETS, root / "hf", "zero_shot", root), "hf"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run, with what another command wrote too."""
    root = tmp_path_factory.mktemp("run")
    compose_and_dump(root / "params.yaml", str(repository / "conf"), None, "config", "", OVERRIDES)
    for name in (
        "download",
        "filter",
        "fetch-images",
        "train-adapter",
        "draw-negatives",
        "export-embeddings id",
        "export-embeddings",
    ):
        STAGES[name][0](root)
    export_embeddings.export_embeddings("sda", root)
    frame = pl.read_parquet(root / "embeddings" / "zero_shot.parquet")
    frame.select(item_id="raw_item_id", vector="embedding").write_parquet(root / "own.parquet")
    for name in ("control-embeddings", "import-embeddings"):
        STAGES[name][0](root)
    for variant in ("id", "zero_shot", "sda"):
        for recommender in ("pop", "vbpr"):
            train_recommender.train_recommender(variant, recommender, root)
        evaluate.evaluate(variant, None, root)
    for variant in ("zero_shot", "sda"):
        build_index.build_index(variant, root)
    report.report(root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: writes beyond it fail with EFBIG, as those to a full disk with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(folder: Path) -> dict[str, bytes]:
    """What a folder holds, temporary files included, without costs."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "costs" not in path.parts
    }


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_one_line(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, output = STAGES[name]
    if name.split()[0] in (
        "download",
        "fetch-images",
        "train-recommender",
    ):  # what they keep, so that they have something to write
        shutil.rmtree(root / output)
    before = state(root)
    for num_bytes in (0, 300):  # nothing at all, and a part of a file
        capsys.readouterr()
        with full_disk(num_bytes), pytest.raises(typer.Exit) as ended:
            command(root)
        assert ended.value.exit_code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sda ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"sda {name.split()[0]}: error: {root}")
        assert "cannot be written (File too large); raise the limit" in lines[0]
        assert state(root) == before
    command(root)
    assert (root / output).exists()


def test_every_format_and_command_is_tried() -> None:
    from sda_core.cli.app import STAGES as COMMANDS

    tried = {name.split()[0] for name in STAGES}
    assert tried == {*COMMANDS, "export"}
    assert {name.split()[1] for name in STAGES if name.startswith("export ")} == {str(each) for each in Format}


def command_line(root: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "sda_core.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(repository), "NO_COLOR": "1"}
    return subprocess.run(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
        **options,
    )


def test_recommenders_in_processes_of_their_own_end_in_one_line(root: Path) -> None:
    shutil.rmtree(root / "models")
    with full_disk(300):  # processes that are started inherit it
        done = command_line(root, "train-recommender", "--variant", "zero_shot")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sda ")]
    assert line.startswith("sda train-recommender: error: variant zero_shot: the training of pop, vbpr failed")
    assert "cannot be written (File too large)" in line
    assert not list((root / "models").rglob("*.json"))


def test_the_page_with_costs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(300), pytest.raises(typer.Exit):
        report.report(root, costs=True)
    assert "report.html: cannot be written (File too large)" in capsys.readouterr().err


def test_a_cost_that_cannot_be_kept_does_not_fail_the_stage(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = root / "costs" / "stages.jsonl"
    with full_disk(kept.stat().st_size):
        export_embeddings.export_embeddings("id", root)
    assert "the cost of export_embeddings was not recorded" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize(
    "arguments", [("verify",), ("costs",), ("--help",), ("neighbors", "--help"), ("--version",)], ids=" ".join
)
def test_a_full_disk_behind_the_output(finished: Path, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = command_line(finished, *arguments, stdout=full)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        "error: standard output: cannot be written (No space left on device); free some space and run the same command again"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_cut_off_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    """Python itself drops the rest of a text that an output without a buffer took in part."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with (root / "listing").open("wb") as listing, full_disk(200):
        done = command_line(root, "costs", stdout=listing)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sda costs: error: standard output: cannot be written (File too large)")


def test_no_room_for_temporary_files(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    from sda_core.cli.diff import diff

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(root))
    with full_disk(0), pytest.raises(typer.Exit):
        diff("HEAD", root=root)
    assert (
        "sda diff: error: temporary folder: cannot be written; free some space, or name another folder in TMPDIR"
        in capsys.readouterr().err
    )
