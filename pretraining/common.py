"""Parts that all steps share: settings, working folder, seeds, and the curve of a training."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
CHECKPOINT = HERE.parent / "sda_core" / "backbones" / "nano"

Work = Annotated[Path, typer.Option("--work", help="Folder of intermediate files.", show_default="pretraining/work")]


def settings() -> dict[str, Any]:
    """Read ``pretraining/params.yaml`` as plain dictionaries, by YAML 1.2 like DVC."""
    return YAML(typ="safe", pure=True).load((HERE / "params.yaml").read_text(encoding="utf-8"))


def tower_folder(params: dict[str, Any]) -> Path:
    """The checkpoint folder with the frozen vision tower of nano_lvlm, ``lvlm.tower`` of the settings."""
    return HERE.parent / str(params["lvlm"]["tower"])


def number(*parts: object) -> int:
    """A 63-bit number that depends only on the parts.

    It gives seeds and splits that do not depend on the order of work.
    """
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> np.random.Generator:
    """A random generator whose seed depends only on the parts, so that each use has its own."""
    return np.random.default_rng(number(*parts))


class Curve:
    """Writer of a training's curve, a tab-separated file; a resumed run appends to it.

    Args:
        path: path of the file; created with a header if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, list[float]] = {}
        self._began = time.perf_counter()
        if not path.is_file():
            path.write_text("\t".join(["step", "seconds", "rate", "loss", "parts"]) + "\n", encoding="utf-8")

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of a step; they must include ``loss``."""
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)

    def write(self, step: int, rate: float, measured: Mapping[str, float]) -> None:
        """Write and print a row.

        Args:
            step: number of completed steps.
            rate: learning rate as a share of the highest.
            measured: values measured after this step; the row also has the means of the steps since the last row.
        """
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        rounded = {name: round(value, 4) for name, value in (means | dict(measured)).items()}
        seconds = round(time.perf_counter() - self._began)
        fields = [step, seconds, f"{rate:.3f}", rounded.pop("loss"), json.dumps(rounded)]
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("\t".join(map(str, fields)) + "\n")
        print(*fields, flush=True)
        self._sums = {}
