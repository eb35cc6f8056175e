"""Vision-language models that turn an item's image and text into vectors, and their builder.

The one interface is :class:`~sda_core.backbones.base.Backbone`.

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

A backbone knows how to make model inputs from images and from texts and how to pool the model's hidden states; it
does not know what an adapter or a loss is.  :func:`build` chooses by the type of the params section.  This package is
the only importer of transformers, and imports it only inside the case that needs it.
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

if TYPE_CHECKING:  # for the signature only: choosing a backbone needs no torch
    import torch

__all__ = ["Backbone", "BackboneInfo", "JointEncoder", "VisionTower", "build", "save_backbone"]


def build(params: BackboneParams, device: torch.device) -> Backbone:
    """Load or make the backbone that the params ask for, on ``device``, frozen, in evaluation mode.

    Raises:
        ConfigError: the params cannot be met (no revision pinned, another architecture, attention not available).
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
    """Write a backbone as a checkpoint folder (safetensors, tokenizer, image processor, chat template), whole.

    The folder is then a valid ``backbone.name``.  No adapter may be attached: PEFT changes the model in place.

    Raises:
        ConfigError: an adapter is attached.
    """
    backbone.save(folder)
