"""Measure DVC on a local folder of images: the cost of the first hashing, and of a status without changes.

A project with one stage that depends on a folder of many images is compared with the same project without the folder.

    python -m bench local_files
    python -m bench local_files --num-images 10000 --kilobytes 20
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer


def seconds(project: Path, *arguments: str) -> tuple[float, float]:
    """Run DVC in the project; returns wall-clock and processor seconds."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, processor


def shown(name: str, watching: tuple[float, float], bare: tuple[float, float]) -> None:
    """Print one comparison."""
    print(
        f"{name}: {watching[0]:.2f} s (CPU {watching[1]:.2f} s), without the folder {bare[0]:.2f} s (CPU {bare[1]:.2f} s)",
        flush=True,
    )


def new_project(place: Path, dependency: Path) -> Path:
    """Create a project with one stage that depends on a path."""
    place.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    seconds(place, "init", "-q")
    (place / "dvc.yaml").write_text(
        f"stages:\n  fetch:\n    cmd: echo done > out\n    deps: ['{dependency}']\n    outs: [out]\n", encoding="utf-8"
    )
    seconds(place, "config", "core.analytics", "false")
    return place


def main(
    num_images: int = 100_000,
    kilobytes: Annotated[int, typer.Option(help="Size of one image.")] = 10,
    rounds: int = 3,
) -> None:
    """Measure, print."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        images = root / "shop" / "images"
        images.mkdir(parents=True)
        for number in range(num_images):
            (images / f"{number}.jpg").write_bytes(number.to_bytes(8) + os.urandom(64) * (kilobytes * 16))
        (root / "one.txt").write_text("nothing to watch\n", encoding="utf-8")
        watching, bare = new_project(root / "watching", root / "shop"), new_project(root / "bare", root / "one.txt")
        print(f"{num_images} images of {kilobytes} KiB, load {os.getloadavg()[0]:.1f}", flush=True)
        shown("first run", seconds(watching, "repro"), seconds(bare, "repro"))
        turns = [(seconds(watching, "status"), seconds(bare, "status")) for _ in range(rounds)]
        shown(f"unchanged status, best of {rounds} in turns", *(min(values) for values in zip(*turns, strict=True)))
        shown("unchanged repro", seconds(watching, "repro"), seconds(bare, "repro"))
        (images / "0.jpg").write_bytes(b"another image")
        (root / "one.txt").write_text("another text\n", encoding="utf-8")
        shown("status after one image changed", seconds(watching, "status"), seconds(bare, "status"))
