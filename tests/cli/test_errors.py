"""Every mistake of a user is one line on stderr and exit code 1, without a traceback."""

from __future__ import annotations

import gzip
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump

from sda_core.cli.app import app
from sda_core.cli.stage import run_arguments

REVIEW = b'{"overall": 5.0, "reviewerID": "A%d", "asin": "B%d", "unixReviewTime": 1500000000}\n'


class Shop:
    """A folder with params.yaml, and the console script in it."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.root = root
        self.repository = repository

    def params(self, *overrides: str) -> None:
        compose_and_dump(self.root / "params.yaml", str(self.repository / "conf"), None, "config", "", list(overrides))

    def sda(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sda_core.cli", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.repository), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def mistake(self, *arguments: str) -> str:
        """The one line that a failing command says."""
        done = self.sda(*arguments)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("sda ")]
        assert len(lines) == 1, done.stderr
        assert "error:" in lines[0]
        return lines[0]


@pytest.fixture
def shop(tmp_path: Path, repository: Path) -> Shop:
    shop = Shop(tmp_path, repository)
    shop.params()
    return shop


def local(folder: Path, reviews: bytes, metadata: bytes) -> tuple[str, ...]:
    """Overrides for a local 2018 dataset with these raw bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "Gift_Cards_5.json.gz").write_bytes(reviews)
    (folder / "meta_Gift_Cards.json.gz").write_bytes(metadata)
    return ("dataset=gift_cards", f"dataset.local_folder={folder}")


def good_files() -> tuple[bytes, bytes]:
    reviews = b"".join(REVIEW % (user, item) for user in range(8) for item in range(8))
    metadata = b"".join(b'{"asin": "B%d", "title": "Card %d"}\n' % (item, item) for item in range(8))
    return gzip.compress(reviews), gzip.compress(metadata)


def test_help_teaches(shop: Shop) -> None:
    done = shop.sda("--help")
    assert done.returncode == 0
    for name in ("download", "train-adapter", "evaluate", "neighbors", "dvc repro", "params.yaml"):
        assert name in done.stdout
    assert "--variant" in shop.sda("train-adapter", "--help").stdout


def test_wrong_params(shop: Shop) -> None:
    path = shop.root / "params.yaml"
    path.write_text(path.read_text().replace("min_user_interactions: 5", "min_user_interactions: five"))
    line = shop.mistake("filter")
    assert "params.yaml: filter.min_user_interactions: should be a valid integer (got 'five')" in line


def test_no_params_file(shop: Shop) -> None:
    (shop.root / "params.yaml").unlink()
    assert "params.yaml: no such file" in shop.mistake("download")


@pytest.mark.parametrize("command", [("export-embeddings",), ("train-adapter",)])
def test_unknown_variant(shop: Shop, command: tuple[str, ...]) -> None:
    shop.params("dataset.num_users=40", "dataset.num_items=20", "dataset.mean_history_length=8")
    for stage in ("download", "filter", "fetch-images"):
        assert shop.sda(stage).returncode == 0
    line = shop.mistake(*command, "--variant", "sdaa")
    assert "'sdaa'" in line
    assert "sda" in line


def test_unknown_recommender(shop: Shop) -> None:
    assert "unknown recommender 'sasrek'; known are pop, nearest, sasrec" in shop.mistake(
        "train-recommender", "--variant", "id", "--recommender", "sasrek"
    )


def test_a_stage_before_its_inputs(shop: Shop) -> None:
    assert "dvc repro" in shop.mistake("filter")
    assert "dvc repro" in shop.mistake("train-recommender", "--variant", "id", "--recommender", "pop")


def test_missing_local_file(shop: Shop, tmp_path: Path) -> None:
    """A folder that is not there is named itself; one that is there, but lacks the file, names the file."""
    folder = tmp_path / "nowhere"
    shop.params("dataset=gift_cards", f"dataset.local_folder={folder}")
    said = shop.mistake("download")
    assert "dataset.local_folder" in said
    assert str(folder) in said
    folder.mkdir()
    shop.params("dataset=gift_cards", f"dataset.local_folder={folder}")
    assert "Gift_Cards_5.json.gz" in shop.mistake("download")


def test_truncated_gzip(shop: Shop, tmp_path: Path) -> None:
    reviews, metadata = good_files()
    shop.params(*local(tmp_path / "files", reviews[: len(reviews) // 2], metadata))
    assert "truncated" in shop.mistake("download")
    assert not (shop.root / "data" / "raw" / "manifest.json").exists()


def test_html_instead_of_data(shop: Shop, tmp_path: Path) -> None:
    _, metadata = good_files()
    shop.params(*local(tmp_path / "files", b"<!DOCTYPE html><html><body>Not here</body></html>", metadata))
    assert "HTML" in shop.mistake("download")


@pytest.fixture
def html_server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html><title>Moved</title></html>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_html_from_a_server(shop: Shop, html_server: str) -> None:
    shop.params("dataset=gift_cards", f"dataset.reviews=[{html_server}/Gift_Cards_5.json.gz]", "download.num_retries=0")
    line = shop.mistake("download")
    assert "HTML" in line
    assert html_server in line


def test_nothing_left_after_the_filter(shop: Shop, tmp_path: Path) -> None:
    shop.params(*local(tmp_path / "files", *good_files()), "filter.min_user_interactions=50")
    assert shop.sda("download").returncode == 0
    assert "min_user_interactions" in shop.mistake("filter")


def test_a_damaged_table(shop: Shop, tmp_path: Path) -> None:
    shop.params(*local(tmp_path / "files", *good_files()))
    for stage in ("download", "filter"):
        assert shop.sda(stage).returncode == 0
    (shop.root / "data" / "filtered" / "items.parquet").write_bytes(b"PAR1 no more")
    assert "items.parquet" in shop.mistake("fetch-images")


def test_corrupt_images_are_counted_not_fatal(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    shop.params(*local(folder, *good_files()))
    (folder / "images").mkdir()
    (folder / "images" / "B0.jpg").write_bytes(b"this is no image")
    for stage in ("download", "filter", "fetch-images"):
        done = shop.sda(stage)
        assert done.returncode == 0, done.stderr
    import json

    coverage = json.loads((shop.root / "data" / "images" / "coverage.json").read_text())
    assert coverage["num_corrupt"] == 1
    assert coverage["num_items"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recomend B1", "sda: error: COMMAND: 'recomend' is not a command (similar are 'recommend', 'train-recommender'); see"),
        ("--foo", "sda: error: --foo: is not an option of this command; see"),
        ("recommend", "sda recommend: error: ITEM...: is missing, expected: the history, oldest first; see"),
        ("recommend B1 --top", "sda recommend: error: --top: has no value, expected: number of items to list; see"),
        ("recommend B1 --top 0", "sda recommend: error: --top: should be greater than or equal to 1 (got '0'); see"),
        ("recommend B1 --top three", "sda recommend: error: --top: should be a valid integer (got 'three'); see"),
        ("verify --rot x", "sda verify: error: --rot: is not an option of this command (similar are --root); see"),
        ("neighbors -5", "sda neighbors: error: -5: is not an option of this command; see"),
        ("neighbors B1 B2", "sda neighbors: error: 'B2' is not expected; this command takes ITEM; see"),
        ("verify B1", "sda verify: error: 'B1' is not expected; this command takes options only; see"),
        ("download --check=yes", "sda download: error: --check: takes no value; see"),
        ("export --to x", "sda export: error: --format: is missing, expected: one of mmrec, recbole, datasets; see"),
        ("export --to x --format csv", "sda export: error: --format: 'csv' is not one of 'mmrec', 'recbole', 'datasets'; see"),
        (
            "build-index",
            "sda build-index: error: --variant: is missing, expected: a variant of params.yaml that this stage makes or uses; "
            "see",
        ),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_arguments(app, arguments.split(), "sda")
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{message} `{message.partition(': error')[0]} --help`\n"


def test_an_option_with_line_feeds_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_arguments(app, ["verify", "--x\ny\x1b[31m"], "sda")
    assert (
        capsys.readouterr().err
        == "sda verify: error: --x y\\x1b[31m: is not an option of this command; see `sda verify --help`\n"
    )


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["verify", "--help"], 0), (["--version"], 0), ([], 2)])
def test_help_and_version_are_no_mistakes(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_arguments(app, arguments, "sda")
    assert ended.value.code == status
    captured = capsys.readouterr()
    assert (captured.err if status else captured.out).startswith("sda 0" if "--version" in arguments else "Usage: sda")
    assert "error" not in captured.err


def test_a_stage_without_dvc_names_its_own_help(tmp_path: Path, repository: Path) -> None:
    for words, message in (
        (["--foo"], "--foo: is not an option of this command (similar are --root)"),
        (["--variant"], "--variant: has no value, expected: a variant of params.yaml that this stage makes or uses"),
    ):
        command = [sys.executable, "-m", "stages.build_index", *words]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        program = "python -m stages.build_index"
        assert done.stderr == f"{program}: error: {message}; see `{program} --help`\n"


def test_one_process_of_a_launch_reports_a_wrong_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_arguments(app, ["verify", "--foo"], "sda")
    assert ended.value.code == 1
    assert capsys.readouterr().err == ""
