"""What every step shares: the settings, the working folder, seeds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
CHECKPOINT = HERE.parent / "sda_core" / "backbones" / "nano"


def settings() -> dict[str, Any]:
    """``pretraining/params.yaml`` as plain dictionaries (YAML 1.2, as DVC reads it)."""
    return YAML(typ="safe", pure=True).load((HERE / "params.yaml").read_text(encoding="utf-8"))


def number(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone: seeds and splits that no order of work can change."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> np.random.Generator:
    """A generator of its own for each use."""
    return np.random.default_rng(number(*parts))
