"""The download stage as a process, against a real server with faults, killed at any moment, and its --check."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from tests.sections import short_ladder

_SPEC = importlib.util.spec_from_file_location("faulty_server", Path(__file__).parents[1] / "fetch" / "conftest.py")
assert _SPEC is not None
assert _SPEC.loader is not None
faulty = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = faulty  # dataclasses look their module up
_SPEC.loader.exec_module(faulty)

# Fixtures of the other tests of the downloader.
server = faulty.server
wait_until = faulty.wait_until
authority = faulty.authority
bare_environment = faulty.bare_environment
tls_server = faulty.tls_server


def packed(num_bytes: int, seed: int) -> bytes:
    return gzip.compress(np.random.default_rng(seed).bytes(num_bytes), mtime=0)


REVIEWS, METADATA, NEWER = packed(200_000, 0), packed(100_000, 1), packed(150_000, 2)


@dataclass
class Stage:
    """A project folder whose dataset is on the faulty server, and the stage as a process."""

    root: Path
    repository: Path

    @property
    def raw(self) -> Path:
        return self.root / "data" / "raw"

    def params(self, reviews: str, metadata: str, timeout_seconds: float = 60.0, num_retries: int = 2, **changes: Any) -> None:
        data = short_ladder(YAML(typ="safe").load((self.repository / "params.yaml").read_text(encoding="utf-8")))
        preset = YAML(typ="safe").load((self.repository / "conf" / "dataset" / "gift_cards.yaml").read_text(encoding="utf-8"))
        data["dataset"] = preset["dataset"] | {"reviews": [reviews], "metadata": [metadata]} | changes
        data["download"] = {"backoff_seconds": 0.01, "max_file_bytes": 2_000_000}
        data["download"] |= {"timeout_seconds": timeout_seconds, "num_retries": num_retries}
        (self.root / "params.yaml").write_text(json.dumps(data))  # JSON is YAML

    def arguments(self, *more: str) -> list[str]:
        return ["--root", str(self.root), "--params", str(self.root / "params.yaml"), *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.download", *self.arguments(*more)],
            cwd=self.repository,
            env=os.environ | {"NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str) -> tuple[int, str, list[str]]:
        """Exit code, stdout, and the lines on stderr that are no log."""
        process = self.start(*more)
        stdout, stderr = process.communicate(timeout=900)
        assert "Traceback" not in stderr, stderr
        return process.returncode, stdout, [line for line in stderr.splitlines() if line.startswith("sda ")]

    def is_right(self, reviews: bytes, metadata: bytes) -> None:
        """The two files, a manifest that says so, and nothing else."""
        assert {path.name: path.read_bytes() for path in self.raw.iterdir() if path.name != "manifest.json"} == {
            "r.json.gz": reviews,
            "m.json.gz": metadata,
        }
        files = json.loads((self.raw / "manifest.json").read_text())["files"]
        assert [(file["role"], file["name"], file["bytes"], file["sha256"]) for file in files] == [
            ("reviews", "r.json.gz", len(reviews), hashlib.sha256(reviews).hexdigest()),
            ("metadata", "m.json.gz", len(metadata), hashlib.sha256(metadata).hexdigest()),
        ]
        assert sorted(path.name for path in (self.root / "data").iterdir()) == ["raw", "truth.parquet"], "no lock is left"

    def refuses(self) -> str:
        """The one line of a run that fails; nothing is in place."""
        code, _, lines = self.run()
        assert code == 1
        assert len(lines) == 1, lines
        assert lines[0].startswith("sda download: error: ")
        assert not (self.raw / "r.json.gz").exists()
        assert not (self.raw / "manifest.json").exists()
        assert not list((self.root / "data").glob(".raw*")), "no lock is left"
        return lines[0]


@pytest.fixture
def stage(tmp_path: Path, repository: Path) -> Stage:
    return Stage(tmp_path, repository)


def restless(num_bytes: int) -> Callable[[Any], None]:
    """Another etag at every request, and never more than the first bytes."""
    drop = faulty.FaultyServer.drop(num_bytes)

    def fault(handler: Any) -> None:
        handler.page.etag = f'"{len(handler.shop.requests)}"'
        drop(handler)

    return fault


def without_length(num_bytes: int) -> Callable[[Any], None]:
    """An answer of unknown length that ends too early."""
    return lambda handler: handler.answer(200, handler.page.body[:num_bytes], handler.headers_of(handler.page), None)


# -------------------------------------------------------------------------------------------- faults that pass
PASSING: dict[str, Callable[[Any], tuple[list[Any], list[Any]]]] = {
    "drops; 429 and errors": lambda server: (
        [server.drop(num_bytes) for num_bytes in (0, 1)],
        [server.status(429, Retry_After="0"), server.status(500)],
    ),
    "late drops; longer than sent": lambda server: (
        [server.drop(65_536), server.drop(len(REVIEWS) - 65_536 - 1)],
        [server.announce(len(METADATA) + 5000)],
    ),
    "slow bytes; no answer": lambda server: ([server.drip()], [server.silence()]),
    "slow headers; too short a body": lambda server: ([server.drip_headers()], [without_length(5000)] * 2),
    "redirect without end": lambda server: ([server.endless_redirect("/r.json.gz")] * 3, [server.status(503)]),
}


@pytest.mark.parametrize("case", PASSING)
def test_faults_that_pass(stage: Stage, server: Any, case: str) -> None:
    reviews_faults, metadata_faults = PASSING[case](server)
    reviews = server.put("/r.json.gz", REVIEWS, faults=reviews_faults)
    metadata = server.put("/m.json.gz", METADATA, faults=metadata_faults)
    if "slow" in case:  # many retries, since on a busy machine a good answer may come too late, too
        stage.params(reviews, metadata, timeout_seconds=0.4, num_retries=100)
    else:
        stage.params(reviews, metadata)
    code, _, lines = stage.run()
    assert (code, lines) == (0, [])
    stage.is_right(REVIEWS, METADATA)
    assert not server.pages["/r.json.gz"].faults, "every fault was met"
    assert not server.pages["/m.json.gz"].faults, "every fault was met"


def test_mixed_faults_and_a_file_that_changes(stage: Stage, server: Any) -> None:
    faults = [server.drop(50_000), server.status(500), server.replace(NEWER, '"v2"')]
    other = [server.drop(50_000), server.replace(NEWER, '"v2"')]
    stage.params(server.put("/r.json.gz", REVIEWS, faults=faults), server.put("/m.json.gz", METADATA, faults=other))
    assert stage.run()[0] == 0
    stage.is_right(NEWER, NEWER)
    assert {file["etag"] for file in json.loads((stage.raw / "manifest.json").read_text())["files"]} == {'"v2"'}


# -------------------------------------------------------------------------------------------- faults that stay
STAYING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "drops": (lambda server: server.drop(0), "retries without progress: 2"),
    "slow bytes": (lambda server: server.drip(0.1), "retries without progress: 2"),
    "429": (lambda server: server.status(429, Retry_After="0"), "HTTP 429"),
    "500": (lambda server: server.status(500), "HTTP 500"),
    "longer than sent": (lambda server: server.announce(len(REVIEWS) + 5000), "retries without progress: 2"),
    "shorter than sent": (lambda server: server.announce(len(REVIEWS) - 5000), "gzip is truncated"),
    "html": (lambda server: server.html(), "an HTML page instead of the file"),
    "restless": (lambda server: restless(1000), "retries without progress: 2"),
    "endless": (lambda server: server.endless(b"\x1f\x8b\x08"), "longer than allowed"),
    "truncated": (lambda server: without_length(5000), "gzip is truncated"),
    "redirects": (lambda server: server.status(302, Location="/r.json.gz"), "TooManyRedirects"),
}


@pytest.mark.parametrize("case", STAYING)
def test_faults_that_stay(stage: Stage, server: Any, case: str) -> None:
    fault, text = STAYING[case]
    url = server.put("/r.json.gz", REVIEWS, always=fault(server))
    stage.params(url, server.put("/m.json.gz", METADATA), timeout_seconds=0.4 if case == "slow bytes" else 60.0)
    line = stage.refuses()
    assert "params.yaml: dataset.reviews" in line
    assert url in line
    assert text in line


def test_wrong_sha256(stage: Stage, server: Any) -> None:
    stage.params(server.put("/r.json.gz", REVIEWS), server.put("/m.json.gz", METADATA), reviews_sha256="0" * 64)
    assert f"(expected {'0' * 64})" in stage.refuses()
    assert server.count() == {"/r.json.gz": 1}


def test_nobody_listens(stage: Stage, server: Any) -> None:
    stage.params("http://127.0.0.1:9/r.json.gz", server.put("/m.json.gz", METADATA))
    assert "ConnectError" in stage.refuses()


def test_an_unknown_authority(stage: Stage, tls_server: Any) -> None:
    stage.params(tls_server.put("/r.json.gz", REVIEWS), tls_server.put("/m.json.gz", METADATA))
    line = stage.refuses()
    assert "certificate is not accepted" in line
    assert "name its PEM file in SSL_CERT_FILE" in line


def test_the_authority_of_the_environment(stage: Stage, tls_server: Any, authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    stage.params(tls_server.put("/r.json.gz", REVIEWS), tls_server.put("/m.json.gz", METADATA))
    assert stage.run()[0] == 0
    stage.is_right(REVIEWS, METADATA)


# --------------------------------------------------------------------------------------------------- kill -9
def asked(server: Any) -> list[tuple[str, int]]:
    """Path and first byte of every request."""
    found = []
    for path, headers in server.requests:
        wanted = {name.lower(): value for name, value in headers.items()}.get("range", "bytes=0-")
        found.append((path, int(wanted.removeprefix("bytes=").rstrip("-"))))
    return found


def test_killed_while_bytes_come(stage: Stage, server: Any, wait_until: Any) -> None:
    """Again and again, in both files; no byte that came is asked for a second time."""
    blocks = {"/r.json.gz": [1, 70_000, 100_000], "/m.json.gz": [50_000]}
    bodies = {"/r.json.gz": REVIEWS, "/m.json.gz": METADATA}
    for path, body in bodies.items():
        server.put(path, body, faults=[server.block(num_bytes) for num_bytes in blocks[path]])
    stage.params(server.url("/r.json.gz"), server.url("/m.json.gz"), timeout_seconds=3600.0)
    expected = []
    for path, sizes in blocks.items():
        part = stage.raw / f"{path[1:]}.part"
        there = 0
        for size in sizes:
            process = stage.start()
            expected.append((path, there))
            there += size
            wait_until(lambda: part.exists() and part.stat().st_size == there)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert not (stage.raw / "manifest.json").exists()
        expected.append((path, there))  # the next run, of the other file or undisturbed, finishes this one
    assert stage.run()[0] == 0
    stage.is_right(REVIEWS, METADATA)
    assert asked(server) == expected


KILLER = """
    # Forks a process a round, in which the real stage runs and dies at its k-th change of the folder; then lets it live.
    import itertools, os, signal, sys

    import anyio, httpcore, sda_core.fetch.download  # once, not in every round
    import stages.download
    from sda_core.cli.stage import run_as_script

    count, last = 0, 0

    def dying(function):
        def call(*arguments, **keywords):
            global count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call

    def round_of(number):
        global last
        child = os.fork()
        if child == 0:
            last = number
            for name in ("replace", "unlink", "fsync", "mkdir"):
                setattr(os, name, dying(getattr(os, name)))
            try:
                run_as_script(stages.download.download)
            except SystemExit as end:
                os._exit(end.code or 0)  # without the time that taking everything down needs
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for number in itertools.count(1):
        print(number, flush=True)
        sys.stdin.readline()  # the folder is made ready
        killed = round_of(number)
        assert killed in (0, -signal.SIGKILL), killed
        print(killed, flush=True)
        sys.stdin.readline()  # the folder is looked at
        assert round_of(0) == 0
        print("whole", flush=True)
        sys.stdin.readline()  # the folder is compared
        if killed == 0:
            break
"""


@pytest.fixture
def killer(stage: Stage, authority: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLER), *stage.arguments()],
        cwd=stage.repository,
        # a single authority is read in no time
        env=os.environ | {"PYTHONPATH": str(stage.repository), "SSL_CERT_FILE": str(authority.certificate)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_killed_at_every_change_of_the_folder(stage: Stage, server: Any, killer: subprocess.Popen[str]) -> None:
    """Before every rename, removal and flush to the disk; nothing that was whole is fetched again."""
    assert killer.stdout is not None
    assert killer.stdin is not None

    def go_on() -> None:
        assert killer.stdin is not None
        killer.stdin.write("\n")
        killer.stdin.flush()

    reviews, metadata = REVIEWS, METADATA
    stage.params(server.put("/r.json.gz", reviews), server.put("/m.json.gz", metadata))
    undisturbed: dict[str, bytes] = {}
    num_kills = 0
    while killer.poll() is None:
        if not killer.stdout.readline():
            break
        for path in sorted(stage.raw.glob("*")):
            path.unlink()
        server.requests.clear()
        go_on()
        code = int(killer.stdout.readline())
        num_kills += code != 0
        present = {path.name: path.read_bytes() for path in stage.raw.glob("*")}
        for name, body in (("r.json.gz", reviews), ("m.json.gz", metadata)):
            assert present.get(name, body) == body, "never a wrong file in place"
        first = len(server.requests)
        go_on()
        assert killer.stdout.readline() == "whole\n"
        stage.is_right(reviews, metadata)
        again = {path.name: path.read_bytes() for path in stage.raw.iterdir()}
        undisturbed = undisturbed or again
        assert again == undisturbed
        for path, offset in asked(server)[first:]:
            name = path[1:]
            whole = name in present or len(present.get(f"{name}.part", b"")) > 0
            # what had come is asked for no more: either nothing at all, or from where it ended
            assert offset == len(present.get(f"{name}.part", b"")) or not whole
            assert name not in present
        go_on()
    assert killer.wait() == 0
    assert num_kills > 20, "the changes of two files were all met"


# --------------------------------------------------------------------------------------------------- --check
def test_check(stage: Stage, server: Any) -> None:
    stage.params(server.put("/r.json.gz", REVIEWS), server.put("/m.json.gz", METADATA))
    code, _, lines = stage.run("--check")
    assert code == 1
    assert len(lines) == 1
    assert "manifest of raw files is missing" in lines[0]
    assert not (stage.root / "data").exists(), "changes nothing"

    assert stage.run()[0] == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in stage.root.rglob("*") if path.is_file()}
    (stage.root / "params.yaml").rename(stage.root / "params.away")  # it is not needed
    server.requests.clear()
    code, stdout, lines = stage.run("--check")
    assert (code, lines, server.requests) == (0, [], [])
    digests = {name: hashlib.sha256(body).hexdigest()[:16] for name, body in (("r", REVIEWS), ("m", METADATA))}
    assert stdout.splitlines() == [
        f"reviews r.json.gz {len(REVIEWS)} bytes sha256 {digests['r']} ok",
        f"metadata m.json.gz {len(METADATA)} bytes sha256 {digests['m']} ok",
    ]
    (stage.root / "params.away").rename(stage.root / "params.yaml")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before

    (stage.raw / "r.json.gz").write_bytes(REVIEWS[:-1])
    (stage.raw / "m.json.gz").write_bytes(METADATA[:-1] + b"?")
    code, stdout, lines = stage.run("--check")
    assert (code, stdout) == (1, "")
    assert [line.startswith("sda download: error: ") for line in lines] == [True, True]
    assert f"has {len(REVIEWS) - 1} bytes (the manifest says {len(REVIEWS)})" in lines[0]
    assert "sha256 is" in lines[1]
    assert (stage.raw / "r.json.gz").read_bytes() == REVIEWS[:-1], "changes nothing"


def test_check_from_the_console_script(stage: Stage, server: Any) -> None:
    """Two runs at a time are not in each other's way, since nothing is written."""
    stage.params(server.put("/r.json.gz", REVIEWS), server.put("/m.json.gz", METADATA))
    assert stage.run()[0] == 0
    script = [sys.executable, "-m", "sda_core.cli", "download", "--check", "--root", str(stage.root)]
    runs = [subprocess.Popen(script, cwd=stage.repository, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs: list[str] = []
    threads = [threading.Thread(target=lambda run=run: outputs.append(run.communicate()[0])) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].count(" ok\n") == 2
