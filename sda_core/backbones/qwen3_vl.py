"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631), the dense models, as an item encoder.

Patches are 16 pixels wide, and features of three layers of the vision tower are added to the image tokens in the first
layers of the decoder (DeepStack).  The mixture-of-experts models have another checkpoint type and are rejected.  For
the sequences see ``_vision_language.py``, for images and positions ``_qwen_vl.py``.
"""

from __future__ import annotations

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from sda_core.backbones._qwen_vl import QwenVLBackbone
from sda_core.params import Qwen3VL


class Qwen3VLBackbone(QwenVLBackbone):
    """A Qwen3-VL checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    vision_linear = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")


def load(params: Qwen3VL, device: torch.device) -> Qwen3VLBackbone:
    """Load a published or local Qwen3-VL checkpoint; raises as :func:`sda_core.backbones.build`."""
    return Qwen3VLBackbone.from_checkpoint(params, device, "a Qwen3-VL", Qwen3VLConfig, Qwen3VLForConditionalGeneration)
