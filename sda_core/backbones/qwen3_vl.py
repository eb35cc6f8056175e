"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631), the dense models, as an item encoder.

Patches are 16 pixels wide, and features of three layers of the vision tower are added to the first layers of the decoder
at the picture's places (DeepStack).  The mixture-of-experts models are another type of checkpoint and are refused.  For
the sequences see ``_vision_language.py``, for pictures and positions ``_qwen_vl.py``.
"""

from __future__ import annotations

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._qwen_vl import QwenVLBackbone
from sda_core.params import Qwen3VL


class Qwen3VLBackbone(QwenVLBackbone):
    """A Qwen3-VL checkpoint as an item encoder; see :class:`sda_core.backbones.Backbone` for the contract."""

    vision_linear = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")


def load(params: Qwen3VL, device: torch.device) -> Qwen3VLBackbone:
    """Load a published or local Qwen3-VL checkpoint; raises as :func:`sda_core.backbones.build`."""
    classes = {Qwen3VLConfig: Classes(Qwen3VLForConditionalGeneration, Qwen2VLImageProcessorPil)}
    loaded = load_parts(params, device, "a Qwen3-VL", classes)
    info = describe(params, loaded, params.kind, params.pooling, min_pixels=params.min_pixels, max_pixels=params.max_pixels)
    return Qwen3VLBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info)
