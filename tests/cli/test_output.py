"""Where a command runs and where its output goes: another folder, an encoding without the title's letters, a closed pipe."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from dvc.utils.hydra import compose_and_dump

from sda_core.artifacts import EMBEDDINGS, ITEMS, Workspace
from sda_core.index import build_index
from sda_core.params import load_params

TITLES = ["赤いマグカップ 🏮", "Ελληνικό φλιτζάνι", "Kubek zażółć", "\u202e\u0000 mug"]
COMMANDS = [
    ("download",), ("download", "--check"), ("filter",), ("fetch-images",), ("train-adapter", "--variant", "sda"),
    ("export-embeddings", "--variant", "id"), ("control-embeddings", "--variant", "random"),
    ("import-embeddings", "--variant", "own"), ("build-index", "--variant", "sda"),
    ("train-recommender", "--variant", "id"), ("draw-negatives",), ("evaluate", "--variant", "id"), ("report",),
    ("neighbors", "3"), ("recommend", "3"), ("diff", "HEAD"), ("verify",), ("costs",), ("upgrade",),
    ("check-adapter", "--variant", "sda"), ("search", "mug"), ("explore",),
    ("export", "--format", "mmrec", "--to", "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Items with titles of several scripts, vectors and an index."""
    workspace = Workspace(tmp_path_factory.mktemp("shop"))
    items = [(n + 1, f"i{n}", title, "", "", [], [], "", [], True) for n, title in enumerate(TITLES)]
    ITEMS.write(pl.DataFrame(items, schema=dict(ITEMS.columns), orient="row"), workspace.items)
    vectors = np.eye(len(TITLES), dtype=np.float32) + 0.1
    embeddings = pl.DataFrame({"item_id": range(1, len(TITLES) + 1), "raw_item_id": [f"i{n}" for n in range(len(TITLES))]})
    schema = {"item_id": pl.Int32, "embedding": pl.Array(pl.Float32, len(TITLES))}
    EMBEDDINGS.write(
        embeddings.with_columns(embedding=pl.Series(vectors.tolist())).cast(schema), workspace.embeddings("zero_shot")
    )
    build_index(vectors, None, load_params(repository / "params.yaml").build_index, workspace.index("zero_shot"))
    return workspace.root


def sda(repository: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "sda_core.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(repository), "NO_COLOR": "1"} | environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1:strict", "ascii", "utf-8"])
def test_any_title_in_any_encoding(shop: Path, repository: Path, encoding: str) -> None:
    done = sda(repository, "neighbors", "i0", "--variant", "zero_shot", cwd=shop, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    is_utf8 = encoding in ("utf-8", "ascii")  # click takes ASCII for a locale that nobody has set, and writes UTF-8
    text = done.stdout.decode("utf-8" if is_utf8 else encoding.split(":")[0])
    assert len(text.splitlines()) == len(TITLES)
    assert (TITLES[0] if is_utf8 else TITLES[0].encode("ascii", "backslashreplace").decode()) in text


def test_any_text_in_an_error(shop: Path, repository: Path) -> None:
    done = sda(repository, "neighbors", "赤い", "--variant", "zero_shot", cwd=shop, PYTHONIOENCODING="cp1252:strict")
    assert done.returncode == 1
    assert done.stderr.startswith(b"sda neighbors: error: ITEM: '\\u8d64\\u3044' is not among the 4 items")


@pytest.mark.parametrize("arguments", [("neighbors", "i0", "--variant", "zero_shot"), ("verify",), ("--help",)], ids=" ".join)
def test_a_closed_pipe_ends_silently(shop: Path, repository: Path, arguments: tuple[str, ...]) -> None:
    (shop / "params.yaml").write_bytes((repository / "params.yaml").read_bytes())
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "sda_core.cli", *arguments],
        cwd=shop,
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_from_another_folder(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from sda_core.cli.app import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"sda {command[0]}: error: {tmp_path}/params.yaml: no such file, so there is no SDA project in {tmp_path}; "
        "cd to the project folder, or pass it with --root"
    ]
    done = CliRunner().invoke(app, [*command, "--root", "nowhere"])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"sda {command[0]}: error: nowhere: no such folder; cd to the project folder, or pass it with --root"
    ]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, [*command, "--root", "file"])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"sda {command[0]}: error: file: is a file, not a folder; cd to the project folder, ")


def test_every_command_was_tried() -> None:
    from sda_core.cli.app import app

    needs_no_project = {"init", "import-hm"}
    assert {command.name for command in app.registered_commands} == {command[0] for command in COMMANDS} | needs_no_project


def test_params_that_are_a_folder(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "params.yaml").mkdir()
    for command in ("filter", "verify"):
        done = sda(repository, command, cwd=tmp_path)
        assert done.returncode == 1
        assert (
            done.stderr.decode() == f"sda {command}: error: params.yaml: is a folder, not a file; "
            "name a file, or move the folder away\n"
        )


def test_no_module_needs_what_only_unix_has(repository: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "import sda_core, sda_core.cli.app, sda_core.data, sda_core.fetch.download, sda_core.fetch.images\n"
        "import sda_core.fetch.folders, sda_core.costs, sda_core.evaluation\n"
        "import sda_core.embeddings.table, sda_core.verification\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_held_without_a_lock_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sda_core.fetch import folders

    def acquire(self: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.FileLock, "acquire", acquire)
    with folders.locked_folder(tmp_path / "raw"):
        assert (tmp_path / "raw").is_dir()
    assert "cannot be locked" in caplog.text


def test_what_no_run_makes_is_named(shop: Path, repository: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(shop, tmp_path / "shop"))
    compose_and_dump(root / "params.yaml", str(repository / "conf"), None, "config", "", ["ladder=zero_shot"])
    for command, problem in (
        (
            ("neighbors", "i0", "--variant", "id"),
            "--variant: id has no embeddings; its recommenders learn from",
        ),
        (
            ("recommend", "i0", "--variant", "zero_shot", "--recommender", "slmrec"),
            "--recommender: 'slmrec' is not among the recommenders of params.yaml (pop, ",
        ),
    ):
        done = sda(repository, *command, cwd=root)
        assert done.returncode == 1
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith(f"sda {command[0]}: error: {problem}")
    compose_and_dump(root / "params.yaml", str(repository / "conf"), None, "config", "", [])
    done = sda(repository, "neighbors", "i0", "--variant", "text_only", cwd=root)
    assert done.returncode == 1
    assert "--variant: text_only is in control_embeddings, whose variants have no index" in done.stderr.decode()


@pytest.mark.parametrize(
    "command",
    [("recommend", "i0"), ("neighbors", "i0", "--variant", "sdaa"), ("export", "--format", "mmrec", "--to", "made")],
    ids=lambda command: command[0],
)
def test_a_variant_that_no_run_makes_is_named(shop: Path, repository: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    """For instance the default, `sda`, after `-S ladder=zero_shot`: the advice to run `dvc repro` would not help."""
    root = Path(shutil.copytree(shop, tmp_path / "shop"))
    compose_and_dump(root / "params.yaml", str(repository / "conf"), None, "config", "", ["ladder=zero_shot"])
    done = sda(repository, *command, cwd=root)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    variant = "sdaa" if "sdaa" in command else "sda"
    problem = f"'{variant}' is not among the variants of params.yaml (id, zero_shot); name one of them"
    assert line == f"sda {command[0]}: error: --variant: {problem}"
