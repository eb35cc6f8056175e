"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) as an item encoder.

For the sequences see ``_vision_language.py``, for images and positions ``_qwen_vl.py``.
"""

from __future__ import annotations

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from sda_core.backbones._qwen_vl import QwenVLBackbone
from sda_core.params import Qwen2VL


class Qwen2VLBackbone(QwenVLBackbone):
    """A Qwen2-VL checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    vision_linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def load(params: Qwen2VL, device: torch.device) -> Qwen2VLBackbone:
    """Load a published or local Qwen2-VL checkpoint; raises as :func:`sda_core.backbones.build`."""
    return Qwen2VLBackbone.from_checkpoint(params, device, "a Qwen2-VL", Qwen2VLConfig, Qwen2VLForConditionalGeneration)
