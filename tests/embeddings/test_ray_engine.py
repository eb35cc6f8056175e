"""Export over Ray workers."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sda_core.errors import ConfigError
from tests.embeddings.export_program import environment, export_to, program, undisturbed, wait_for
from tests.tolerances import up_to_rounding


def test_ray_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"export_embeddings\.engine: is 'ray', and the module ray .*use 'local'"):
        export_to(tmp_path / "resume", tmp_path / "out.parquet", "ray")


def workers_of(mark: str) -> list[int]:
    """Ids of the Ray actors that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if title.startswith(b"ray::") and b"_Worker" in title and mark.encode() in variables:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="worker processes are found through /proc")
def test_ray_workers_one_killed(tmp_path):
    """Two worker processes; one is killed in the middle, and the rows are those of one process."""
    resume, out = tmp_path / "resume", tmp_path / "ray.parquet"
    variables = environment(SDA_TEST_MARK=str(tmp_path))
    variables.pop("RAY_ADDRESS", None)
    with (tmp_path / "log.txt").open("w") as log:
        driver = subprocess.Popen(program(resume, out, "ray"), env=variables, stdout=log, stderr=log)
        try:
            wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 5, driver)
            workers = workers_of(str(tmp_path))
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            assert driver.wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()
        finally:
            driver.kill()
            driver.wait()
    undisturbed(tmp_path)
    shared, alone = pl.read_parquet(out), pl.read_parquet(tmp_path / "undisturbed.parquet")
    assert shared.select("item_id", "raw_item_id").equals(alone.select("item_id", "raw_item_id"))
    for column in ("image_embedding", "text_embedding", "embedding"):
        assert shared[column].is_null().equals(alone[column].is_null())
        expected = alone[column].drop_nulls().to_numpy()
        np.testing.assert_allclose(shared[column].drop_nulls().to_numpy(), expected, **up_to_rounding(expected))
