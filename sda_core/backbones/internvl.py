"""InternVL (Zhu et al. 2025, arXiv 2504.10479), in transformers' own format, as an item encoder.

An image becomes one square tile.  With ``max_tiles`` of 2 or more it is split into up to that many tiles, in the layout whose
aspect ratio is nearest to the image's, followed by the whole image.  For the sequences see ``_vision_language.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._images import as_rgb
from sda_core.backbones._layers import LLAMA_LINEAR, AdapterLayers
from sda_core.backbones._vision_language import ImageInputs, VisionLanguageBackbone
from sda_core.errors import ArtifactError
from sda_core.params import InternVL

_MAX_ASPECT_RATIO = 200.0
_VISION_LINEAR = r"(?:attention\.(?:q_proj|k_proj|v_proj|projection_layer)|mlp\.(?:fc1|fc2))"


class InternVLBackbone(VisionLanguageBackbone):
    """An InternVL checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    image_token = "<IMG_CONTEXT>"  # noqa: S105

    def _adapter_layers(self) -> AdapterLayers:
        return AdapterLayers(
            language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEAR}",
            num_language=7 * self._config.text_config.num_hidden_layers,
            vision=rf"model\.vision_tower\.encoder\.layer\.\d+\.{_VISION_LINEAR}",
            num_vision=6 * self._config.vision_config.num_hidden_layers,
        )

    def _set_up_image_processor(self) -> None:
        vision, processor = self._config.vision_config, self._image_processor
        height, width = vision.image_size
        expected = {"height": height, "width": width}
        if dict(processor.size) != expected:
            raise ArtifactError(
                self.info.name,
                f"image processor and model disagree on the size of a tile (got {dict(processor.size)}, expected {expected})",
                "fetch the checkpoint again, its image processor is of another model",
            )
        max_tiles = max(1, self.info.max_tiles or 0)
        processor.crop_to_patches = max_tiles > 1
        processor.min_patches, processor.max_patches = 1, max_tiles
        cells = (height // vision.patch_size[0]) * (width // vision.patch_size[1])
        self._tokens_per_tile = round(cells * self._config.downsample_ratio**2)
        begin, end = (self._tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "</img>"))
        if begin is None or end is None:
            raise ArtifactError(
                self.info.name,
                "tokenizer does not know <img> and </img>, which stand around an image",
                "fetch the checkpoint again, its tokenizer files are missing or of another model",
            )
        self._begin_id, self._end_id = begin, end

    def _image_inputs_of(self, images: Sequence[Image.Image]) -> ImageInputs:
        """Tiles of all images, ``(T, 3, H, W)``, in ``pixel_values``."""
        pixels = self._image_processor([as_rgb(image, _MAX_ASPECT_RATIO) for image in images], return_tensors="pt")
        counts = [self._tokens_per_tile * int(num_tiles) for num_tiles in pixels["num_patches"]]
        tokens = [[self._begin_id, *[self._image_token_id] * count, self._end_id] for count in counts]
        return ImageInputs(tokens, {"pixel_values": pixels["pixel_values"]})


def load(params: InternVL, device: torch.device) -> InternVLBackbone:
    """Load a published or local InternVL checkpoint; raises as :func:`sda_core.backbones.build`."""
    classes = {InternVLConfig: Classes(InternVLForConditionalGeneration, GotOcr2ImageProcessorPil)}
    loaded = load_parts(params, device, "an InternVL", classes)
    info = describe(params, loaded, params.kind, params.pooling, max_tiles=params.max_tiles)
    return InternVLBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info)
