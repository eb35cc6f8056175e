"""Shared by all tests: where things are, and quiet numerics."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Many small models run faster on one thread, and pytest-xdist workers do not fight for cores then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


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
