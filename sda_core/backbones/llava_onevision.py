"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326) as an item encoder.

The whole image is resized to the vision tower's square.  With ``max_tiles`` of 1 or more it is also split into tiles of that
size, in the layout of the checkpoint's list that wastes least; the padding of the tiles is removed after the tower.  With
``max_tiles: 0`` the image is padded to a square and used whole only, as the model treats one of several images.
For the sequences see ``_vision_language.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._images import as_rgb
from sda_core.backbones._layers import LLAMA_LINEAR, VIT_LINEAR, AdapterLayers
from sda_core.backbones._vision_language import ImageInputs, VisionLanguageBackbone
from sda_core.errors import ArtifactError
from sda_core.params import LlavaOnevision

_MAX_ASPECT_RATIO = 200.0


class LlavaOnevisionBackbone(VisionLanguageBackbone):
    """A LLaVA-OneVision checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    image_token = "<image>"  # noqa: S105

    def _adapter_layers(self) -> AdapterLayers:
        return AdapterLayers(
            language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEAR}",
            num_language=7 * self._config.text_config.num_hidden_layers,
            vision=rf"model\.vision_tower\.encoder\.layers\.\d+\.{VIT_LINEAR}",
            num_vision=6 * self._config.vision_config.num_hidden_layers,
        )

    def _set_up_image_processor(self) -> None:
        vision, processor = self._config.vision_config, self._image_processor
        expected = {"height": vision.image_size, "width": vision.image_size}
        if dict(processor.size) != expected:
            raise ArtifactError(
                self.info.name,
                f"image processor and model disagree on the size of a tile (got {dict(processor.size)}, expected {expected})",
                "fetch the checkpoint again, its image processor is of another model",
            )
        self._tile: int = vision.image_size
        self._cells: int = vision.image_size // vision.patch_size  # patches along one side of a tile
        self._all_layouts = [list(layout) for layout in self._config.image_grid_pinpoints]
        self._use_layouts([layout for layout in self._all_layouts if self._num_tiles(layout) <= max(1, self.info.max_tiles or 0)])

    def _num_tiles(self, layout: Sequence[int]) -> int:
        return math.prod(layout) // self._tile**2

    def _use_layouts(self, layouts: list[list[int]]) -> None:
        """Set the layouts on the model, which chooses one by itself and must choose among the processor's."""
        self._layouts = layouts
        self._config.image_grid_pinpoints = layouts
        self._image_processor.image_grid_pinpoints = layouts

    def _image_inputs_of(self, images: Sequence[Image.Image]) -> ImageInputs:
        prepared = [as_rgb(image, _MAX_ASPECT_RATIO) for image in images]
        if self.info.max_tiles == 0:
            # The processor uses images whole if a sample has several, so a single one is passed twice.
            sample = prepared if len(prepared) > 1 else prepared * 2
            pixels = self._image_processor([sample], return_tensors="pt")
            tensors = {
                "pixel_values": pixels["pixel_values"][: len(prepared)],
                "image_sizes": pixels["image_sizes"][: len(prepared)],
                "batch_num_images": torch.tensor([len(sample)]),
            }
            counts = [self._cells**2 + 1] * len(prepared)
        else:
            pixels = self._image_processor(prepared, return_tensors="pt")
            tensors = {name: pixels[name] for name in ("pixel_values", "image_sizes")}
            counts = [self._num_tokens(image.height, image.width) for image in prepared]
        return ImageInputs([[self._image_token_id] * count for count in counts], tensors)

    def _num_tokens(self, height: int, width: int) -> int:
        """Number of tokens of the whole image and of its tiles without padding, plus one at the end of each row."""
        rows, columns = (side // self._tile * self._cells for side in select_best_resolution((height, width), self._layouts))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        most = int(self._config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self._cells**2))
        if ratio > 1.1:  # the model shrinks an image with more tokens than that many tiles have
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self._cells**2 + rows * (columns + 1)

    def save(self, folder: Path) -> None:
        """Write the checkpoint with all of its layouts; see :func:`sda_core.backbones.save_backbone`."""
        used = self._layouts
        self._use_layouts(self._all_layouts)
        try:
            super().save(folder)
        finally:
            self._use_layouts(used)


def load(params: LlavaOnevision, device: torch.device) -> LlavaOnevisionBackbone:
    """Load a published or local LLaVA-OneVision checkpoint; raises as :func:`sda_core.backbones.build`."""
    classes = {LlavaOnevisionConfig: Classes(LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil)}
    loaded = load_parts(params, device, "a LLaVA-OneVision", classes)
    info = describe(params, loaded, params.kind, params.pooling, max_tiles=params.max_tiles)
    return LlavaOnevisionBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info)
