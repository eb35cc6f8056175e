"""A small export, as a function and as a program that tests start and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sda_core.embeddings.encoding import embed
from sda_core.embeddings.fusion import fuse
from sda_core.embeddings.table import embedding_metadata, write_embeddings
from sda_core.processes import processes
from tests.embeddings.noise_shop import (
    CPU,
    TINY,
    export_params,
    shop,
)


def export_to(resume: Path, out: Path, engine: Literal["local", "ray"] = "local") -> None:
    """What the export stage does, with real pieces."""
    torch.set_num_threads(1)
    params = export_params(engine=engine, batch_size=2, shard_rows=4)
    source = shop(160, "text_only")
    with processes() as team:
        result = embed(TINY, None, source, params, resume, "f", CPU, team)
    if result is None:
        return
    fused = fuse(result.image_ID, result.text_ID, result.has_image, np.arange(1, 150), params)
    metadata = embedding_metadata(result.info, params, "prompt", "", result.text_ID.shape[1], fused.shape[1])
    raw_ids = [f"B{place:05d}" for place in result.item_ids]
    write_embeddings(out, result.item_ids, raw_ids, result.image_ID, result.text_ID, fused, metadata, result.has_image)


def undisturbed(folder: Path) -> bytes:
    """The file that one process writes."""
    num_threads = torch.get_num_threads()
    try:
        export_to(folder / "fresh", folder / "undisturbed.parquet")
    finally:
        torch.set_num_threads(num_threads)
    return (folder / "undisturbed.parquet").read_bytes()


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"} | changes


def program(*arguments: object) -> list[str]:
    """The command of this file, with the arguments of :func:`export_to`."""
    return [sys.executable, __file__, *map(str, arguments)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "it should still be running"
        time.sleep(0.002)


if __name__ == "__main__":
    export_to(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])  # type: ignore[arg-type]
