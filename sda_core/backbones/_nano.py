"""Load nano, the small pre-trained Qwen2.5-VL that is part of the package (``nano/MODEL_CARD.md``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sda_core.backbones.qwen2_5_vl import Qwen25VLBackbone, load
from sda_core.params import Nano, Qwen25VL

FOLDER = Path(__file__).parent / "nano"


def load_nano(params: Nano, device: torch.device) -> Qwen25VLBackbone:
    """Load the checkpoint in the package, in float32.

    Raises:
        ConfigError: the params cannot be satisfied.
        ArtifactError: the package is incomplete or damaged.
    """
    section = Qwen25VL(
        kind="qwen2_5_vl",
        name=str(FOLDER),
        revision=None,
        dtype="float32",
        attention="sdpa",
        min_pixels=params.min_pixels,
        max_pixels=params.max_pixels,
        max_text_tokens=params.max_text_tokens,
        pooling=params.pooling,
    )
    backbone = load(section, device)
    backbone.info = replace(backbone.info, kind=params.kind, name="nano")  # the result must not depend on the package's path
    return backbone
