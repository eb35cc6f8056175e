"""Shared by all tests: where things are, and quiet numerics."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

# Many small models run faster on one thread, and pytest-xdist workers do not fight for cores then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


# What takes long: starts processes or DVC, trains until it stops early, builds whole shops, or asks other programs.
# The rest, `pytest -m "not slow" -n 2`, is for every commit (CONTRIBUTING.md).
SLOW_FOLDERS = {"cli", "experiments", "explore", "pipeline", "pretraining", "stages"}
SLOW_FILES = (
    "*browser*", "*crash*", "*demo*", "*families*", "*fit*", "*killed*", "*large_scale*", "*package*", "*peft_hook*",
    "*processes*", "*resumed*", "*site*", "*small_shops*", "*style*",
)  # fmt: skip
SLOW_MARKERS = ("end_to_end", "real_data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests by the place and the name of their file."""
    for item in items:
        path = item.path.relative_to(ROOT / "tests")
        by_name = any(path.match(pattern) for pattern in SLOW_FILES)
        if path.parts[0] in SLOW_FOLDERS or by_name or any(item.get_closest_marker(name) for name in SLOW_MARKERS):
            item.add_marker("slow")


def pytest_configure(config: pytest.Config) -> None:
    """Files in the order of their names: by default pytest-xdist keeps those of few tests for last, and they are the longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project folder."""
    return ROOT


@pytest.fixture(scope="session")
def real_data(repository: Path) -> Path:
    """Real data beside the checkout; a test that wants it is skipped where it is absent."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def start_processes() -> Callable[..., list[BaseProcess]]:
    """Start a Python file in several processes of one launch, told apart by an index.

    They are forked from one server that has imported torch already, so a process costs milliseconds instead of seconds.
    The file runs as ``__main__`` and finds ``INDEX``, ``COUNT``, ``ADDRESS``, ``PORT`` and its ``ARGUMENTS`` as globals.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "sda_core.alignment"])

    def start(file: Path, count: int, *arguments: Any, address: str = "127.0.0.1") -> list[BaseProcess]:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        found: list[BaseProcess] = []
        for index in range(count):
            names = {"ARGUMENTS": arguments, "INDEX": index, "COUNT": count, "ADDRESS": address, "PORT": port}
            found.append(context.Process(target=runpy.run_path, args=(str(file), names, "__main__"), daemon=True))
            found[-1].start()
        return found

    return start


@pytest.fixture(scope="session")
def run_processes(start_processes: Callable[..., list[BaseProcess]]) -> Callable[..., list[int | None]]:
    """As ``start_processes``, and wait for their ends: exit statuses by process index."""

    def run(file: Path, count: int, *arguments: Any, **options: Any) -> list[int | None]:
        found = start_processes(file, count, *arguments, **options)
        try:
            for process in found:
                process.join(120)
            return [process.exitcode for process in found]
        finally:
            for process in found:
                process.kill()
                process.join()

    return run
