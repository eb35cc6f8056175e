"""CLIP (Radford et al. 2021, arXiv 2103.00020) as an item encoder: the classic dual encoder; see ``_dual_encoder.py``."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._dual_encoder import DualEncoderBackbone
from sda_core.params import CLIP


class CLIPBackbone(DualEncoderBackbone):
    """A CLIP checkpoint: class token and end-of-text token, each with its projection."""


def load(params: CLIP, device: torch.device) -> CLIPBackbone:
    """Load a published or local CLIP checkpoint; raises as :func:`sda_core.backbones.build`."""
    loaded = load_parts(params, device, "a CLIP", {CLIPConfig: Classes(CLIPModel, CLIPImageProcessorPil)})
    info = describe(params, loaded, params.kind, "tower")
    width = loaded.model.config.projection_dim
    return CLIPBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info, image_dim=width, text_dim=width)
