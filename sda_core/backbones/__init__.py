"""Vision-language models that embed an item's image and text, and :func:`build`, which makes them from the params.

All share the interface :class:`~sda_core.backbones.base.Backbone`.

===================  =======================================  ====================================================
``kind``             family                                   vector
===================  =======================================  ====================================================
``qwen2_vl``         Qwen2-VL                                 mean (or last) of the decoder's last hidden states
``qwen2_5_vl``       Qwen2.5-VL                               the same
``qwen3_vl``         Qwen3-VL, dense                          the same
``llava_onevision``  LLaVA-OneVision                          the same
``internvl``         InternVL, transformers' format           the same
``smolvlm``          SmolVLM, SmolVLM2, Idefics3              the same
``clip``             CLIP                                     the towers' own pooling and projection
``siglip``           SigLIP 2 of fixed resolution, SigLIP     the towers' own pooling
===================  =======================================  ====================================================

A backbone makes model inputs from images and texts and pools the model's hidden states; it is independent of adapters and
losses.  :func:`build` chooses by the type of the params section.  Only this package imports transformers, and only in the
case that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from sda_core.backbones.base import Backbone, BackboneInfo, JointEncoder, VisionTower
from sda_core.params import (
    CLIP,
    BackboneParams,
    InternVL,
    LlavaOnevision,
    Nano,
    Qwen2VL,
    Qwen3VL,
    Qwen25VL,
    SigLIP,
    SmolVLM,
    TinyQwen25VL,
)

if TYPE_CHECKING:  # for the signature only: this module must not import torch
    import torch

__all__ = ["Backbone", "BackboneInfo", "JointEncoder", "VisionTower", "build", "save_backbone"]


def build(params: BackboneParams, device: torch.device) -> Backbone:
    """Load or create the backbone of the params on ``device``, frozen and in evaluation mode.

    Raises:
        ConfigError: the params cannot be satisfied (no revision pinned, another architecture, attention not available).
        ArtifactError: a local checkpoint is missing, incomplete or damaged.
        DownloadError: a hub checkpoint is neither in the cache nor reachable.
    """
    match params:
        case TinyQwen25VL():
            from sda_core.backbones.qwen2_5_vl import make_tiny

            return make_tiny(params, device)
        case Nano():
            from sda_core.backbones._nano import load_nano

            return load_nano(params, device)
        case Qwen2VL():
            from sda_core.backbones.qwen2_vl import load

            return load(params, device)
        case Qwen25VL():
            from sda_core.backbones.qwen2_5_vl import load

            return load(params, device)
        case Qwen3VL():
            from sda_core.backbones.qwen3_vl import load

            return load(params, device)
        case LlavaOnevision():
            from sda_core.backbones.llava_onevision import load

            return load(params, device)
        case InternVL():
            from sda_core.backbones.internvl import load

            return load(params, device)
        case SmolVLM():
            from sda_core.backbones.smolvlm import load

            return load(params, device)
        case CLIP():
            from sda_core.backbones.clip import load

            return load(params, device)
        case SigLIP():
            from sda_core.backbones.siglip import load

            return load(params, device)
        case _:
            assert_never(params)


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write a backbone atomically as a checkpoint folder (safetensors, tokenizer, image processor, chat template).

    The folder is a valid ``backbone.name``.  No adapter may be attached, because PEFT changes the model in place.

    Raises:
        ConfigError: an adapter is attached.
    """
    backbone.save(folder)
