"""Load nano or nano 2, the small pre-trained Qwen2.5-VLs of the package (``nano/MODEL_CARD.md``, ``nano2/MODEL_CARD.md``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sda_core.backbones.qwen2_5_vl import Qwen25VLBackbone, load
from sda_core.params import Nano, Qwen25VL

_FOLDER = Path(__file__).parent  # has a folder for each kind


def load_nano(params: Nano, device: torch.device) -> Qwen25VLBackbone:
    """Load a checkpoint of the package, in float32.

    Raises:
        ConfigError: the params cannot be satisfied.
        ArtifactError: the package is incomplete or damaged.
    """
    section = Qwen25VL(
        kind="qwen2_5_vl",
        name=str(_FOLDER / params.kind),
        revision=None,
        dtype="float32",
        attention="sdpa",
        min_pixels=params.min_pixels,
        max_pixels=params.max_pixels,
        max_text_tokens=params.max_text_tokens,
        pooling=params.pooling,
    )
    backbone = load(section, device)
    backbone.info = replace(backbone.info, kind=params.kind, name=params.kind)  # the result must not depend on the package's path
    return backbone
