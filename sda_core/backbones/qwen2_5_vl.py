"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) as an item encoder: published checkpoints, or a tiny random model.

The vision tower uses windowed attention, and full attention in a few layers; for the sequences see ``_vision_language.py``,
for images and positions ``_qwen_vl.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sda_core.backbones._qwen_vl import QwenVLBackbone
from sda_core.backbones.base import BackboneInfo
from sda_core.errors import ConfigError
from sda_core.params import Qwen25VL, TinyQwen25VL
from sda_core.seed import derive

IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML with Qwen's default system line and image markers, for models without a published template."""


class Qwen25VLBackbone(QwenVLBackbone):
    """A Qwen2.5-VL checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    image_token = IMAGE_TOKEN
    tower_ends_in_tokens = True
    vision_linear = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def load(params: Qwen25VL, device: torch.device) -> Qwen25VLBackbone:
    """Load a published or local Qwen2.5-VL checkpoint; raises as :func:`sda_core.backbones.build`."""
    return Qwen25VLBackbone.from_checkpoint(params, device, "a Qwen2.5-VL", Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)


# --------------------------------------------------------------------------------------------- tiny model
def make_tiny(params: TinyQwen25VL, device: torch.device) -> Qwen25VLBackbone:
    """Make a randomly initialised Qwen2.5-VL with a byte-level tokenizer; it needs no file and no network.

    The architecture is complete: windowed and full attention in the vision tower, patch merger, grouped-query attention,
    multimodal rotary positions.  Weights are normal with standard deviation ``1 / sqrt(hidden size)``, which preserves the
    scale of the hidden states.  Each tensor has its own seed, so the weights do not depend on the order in which
    transformers creates them, and torch's global generators are unchanged.

    Raises:
        ConfigError: the sizes do not fit (heads, rotary sections).
    """
    tokenizer = _byte_tokenizer()
    config = _tiny_config(params, tokenizer)
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            width = params.vision_hidden_size if ".visual." in name else params.hidden_size
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                generator = torch.Generator().manual_seed(derive(params.seed, "tiny_qwen2_5_vl", name))
                weight.normal_(0.0, width**-0.5, generator=generator)
    info = BackboneInfo(
        kind=params.kind,
        name="tiny_qwen2_5_vl",
        revision=f"seed:{params.seed}",
        dtype="float32",
        attention="sdpa",
        pooling=params.pooling,
        min_pixels=params.min_pixels,
        max_pixels=params.max_pixels,
        max_tiles=None,
        max_text_tokens=params.max_text_tokens,
    )
    on_device = cast(nn.Module, model).to(device)
    return Qwen25VLBackbone(cast(Qwen2_5_VLForConditionalGeneration, on_device), tokenizer, Qwen2VLImageProcessorPil(), info)


def _byte_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with an empty merge table: 256 bytes and the special tokens."""
    vocabulary = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=SPECIAL_TOKENS[2])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny_config(params: TinyQwen25VL, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    head_dim, remainder = divmod(params.hidden_size, params.num_heads)
    if remainder or head_dim % 2:
        raise ConfigError(
            "params.yaml: backbone.num_heads",
            f"should divide hidden_size into an even head width (got {params.num_heads} heads for {params.hidden_size})",
        )
    return configuration(
        tokenizer,
        {
            "hidden_size": params.hidden_size,
            "intermediate_size": 4 * params.hidden_size,
            "num_hidden_layers": params.num_layers,
            "num_attention_heads": params.num_heads,
            "num_key_value_heads": params.num_heads // 2 if params.num_heads % 2 == 0 else params.num_heads,
        },
        {
            "depth": params.vision_depth,
            "hidden_size": params.vision_hidden_size,
            "intermediate_size": 4 * params.vision_hidden_size,
            "num_heads": params.vision_hidden_size // 16,
            "fullatt_block_indexes": [params.vision_depth - 1],  # full attention in the last block, windowed in the others
        },
        rope_theta=1_000_000.0,
    )


def configuration(
    tokenizer: PreTrainedTokenizerBase, text: dict[str, Any], vision: dict[str, Any], *, rope_theta: float
) -> Qwen2_5_VLConfig:
    """The configuration of a small Qwen2.5-VL: the random one here, or nano (``pretraining/``).

    Args:
        tokenizer: its vocabulary and special tokens are used.
        text: sizes of the decoder, with transformers' names.
        vision: sizes of the vision tower.
        rope_theta: base of the rotary positions.
    """
    # Qwen's split 16 : 24 : 24 of half a head's width for time, height and width, rounded to whole numbers
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    temporal = half // 4
    height = (half - temporal) // 2
    rope = {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": [temporal, height, half - temporal - height]}
    token = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
    known = {
        "vocab_size": len(tokenizer),
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "rope_parameters": rope,
    }
    return Qwen2_5_VLConfig(
        text_config={**text, **known},  # type: ignore[arg-type]
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},  # type: ignore[arg-type]
        image_token_id=token[IMAGE_TOKEN],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
