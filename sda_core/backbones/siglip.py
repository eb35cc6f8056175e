"""SigLIP 2 of fixed resolution (Tschannen et al. 2025, arXiv 2502.14786), and SigLIP (Zhai et al. 2023, arXiv 2303.15343).

Both have the same checkpoint type.  The text tower was trained on lower-case texts padded to its full length and pools the
last position, so texts are prepared in the same way.  SigLIP's first checkpoints have only a SentencePiece tokenizer and are
rejected.  See ``_dual_encoder.py``.
"""

from __future__ import annotations

import torch
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._dual_encoder import DualEncoderBackbone
from sda_core.params import SigLIP


class SigLIPBackbone(DualEncoderBackbone):
    """A SigLIP checkpoint: attention pooling of the image, last position of the text."""

    lower_case = True
    pads_to_full_length = True


def load(params: SigLIP, device: torch.device) -> SigLIPBackbone:
    """Load a published or local SigLIP checkpoint; raises as :func:`sda_core.backbones.build`."""
    loaded = load_parts(params, device, "a SigLIP", {SiglipConfig: Classes(SiglipModel, SiglipImageProcessorPil)})
    info = describe(params, loaded, params.kind, "tower")
    config = loaded.model.config
    image_dim, text_dim = config.vision_config.hidden_size, config.text_config.projection_size
    return SigLIPBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info, image_dim=image_dim, text_dim=text_dim)
