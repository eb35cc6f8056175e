"""Backbones for benchmarks: tiny, or with the shape of Qwen2.5-VL-7B; random weights cost the same as trained ones."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sda_core.backbones import Backbone, build
from sda_core.backbones.qwen2_5_vl import Qwen25VLBackbone
from sda_core.params import TinyQwen25VL

SHAPES = ("tiny", "7b")
TINY = {
    "kind": "tiny_qwen2_5_vl", "seed": 0, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "vision_hidden_size": 192,
    "vision_depth": 4, "min_pixels": 784, "max_text_tokens": 1024, "pooling": "mean",
}  # fmt: skip
# Qwen2.5-VL-7B-Instruct, from its published config
TEXT_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION_7B = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def backbone_of(shape: str, side: int, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A backbone object on the device; its tokenizer is byte-level, so a character of a text is a token.

    Args:
        shape: one of :data:`SHAPES`.
        side: images are reduced to this many pixels per side.
        device: device of the weights.
        dtype: dtype of the weights.
    """
    params = TinyQwen25VL.model_validate({**TINY, "max_pixels": max(side * side, TINY["min_pixels"])})
    small: Any = build(params, torch.device("cpu"))
    if shape == "tiny":
        small.model.to(device, dtype)
        return small
    model = _random_7b(small.model.config, device, dtype)
    name = str(dtype).removeprefix("torch.")
    info = dataclasses.replace(small.info, kind="qwen2_5_vl", name="the shape of 7B", dtype=name)
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "small")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "small", local_files_only=True)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(Path(folder) / "small")
    return Qwen25VLBackbone(model, tokenizer, image_processor, info)


def _random_7b(small: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, with the special tokens of the small one."""
    ids = {name: getattr(small.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    config: Any = Qwen2_5_VLConfig(text_config={**TEXT_7B, **ids}, vision_config=VISION_7B)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to_empty(device=device).requires_grad_(requires_grad=False)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(0.0, 0.02, generator=generator)
    for module in model.modules():  # the rotary tables are buffers, which are not initialised on the meta device
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq"):
                module.register_buffer(name, _frequencies(module, buffer, device), persistent=False)
    return model


def _frequencies(module: torch.nn.Module, buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    theta = 10_000.0 if "Vision" in type(module).__name__ else 1_000_000.0
    return theta ** -(torch.arange(len(buffer), device=device, dtype=torch.float32) / len(buffer))


class Noise:
    """A store of items' images: coloured noise, made on demand.

    Args:
        side: side length in pixels.
    """

    def __init__(self, side: int) -> None:
        self._side = side

    @lru_cache(maxsize=256)  # noqa: B019  one store a process
    def get(self, item_id: int) -> bytes:
        """An image as PNG."""
        buffer = io.BytesIO()
        pixels = np.random.default_rng(item_id).integers(0, 256, (self._side, self._side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def status(self, item_id: int) -> str:
        """Every item has one."""
        return "ok" if item_id else "missing_url"
