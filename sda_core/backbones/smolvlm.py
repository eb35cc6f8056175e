"""SmolVLM (Marafioti et al. 2025, arXiv 2504.05299) and Idefics3 (Laurençon et al. 2024, arXiv 2408.12637) as item encoders.

An image becomes one square tile.  If ``max_tiles`` allows two rows of two, it is enlarged and split into tiles, each after
a token for its row and column, followed by the whole image.  For the sequences see ``_vision_language.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._images import as_rgb
from sda_core.backbones._layers import LLAMA_LINEAR, VIT_LINEAR, AdapterLayers
from sda_core.backbones._vision_language import ImageInputs, VisionLanguageBackbone
from sda_core.errors import ArtifactError
from sda_core.params import SmolVLM

_MAX_ASPECT_RATIO = 200.0
_AROUND = "<fake_token_around_image>"
_WHOLE = "<global-img>"


class SmolVLMBackbone(VisionLanguageBackbone):
    """A SmolVLM or Idefics3 checkpoint as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract."""

    image_token = "<image>"  # noqa: S105

    def _adapter_layers(self) -> AdapterLayers:
        return AdapterLayers(
            language=rf"model\.text_model\.layers\.\d+\.{LLAMA_LINEAR}",
            num_language=7 * self._config.text_config.num_hidden_layers,
            vision=rf"model\.vision_model\.encoder\.layers\.\d+\.{VIT_LINEAR}",
            num_vision=6 * self._config.vision_config.num_hidden_layers,
        )

    def _set_up_image_processor(self) -> None:
        vision, processor = self._config.vision_config, self._image_processor
        expected, got = vision.image_size, dict(processor.max_image_size).get("longest_edge")
        if got != expected:
            raise ArtifactError(
                self.info.name,
                f"image processor and model disagree on the size of a tile (got {got}, expected {expected})",
                "fetch the checkpoint again, its image processor is of another model",
            )
        # number of tiles along the longer side, such that a square image has at most the allowed number
        along = max(1, math.isqrt(self.info.max_tiles or 0))
        processor.do_resize, processor.do_pad = True, True
        processor.do_image_splitting = along > 1
        processor.size = {"longest_edge": along * expected}
        self._tokens_per_tile = (vision.image_size // vision.patch_size) ** 2 // self._config.scale_factor**2
        self._runs: dict[tuple[int, int], list[int]] = {}

    def _image_inputs_of(self, images: Sequence[Image.Image]) -> ImageInputs:
        """Tiles of all images, ``(T, 1, 3, H, W)``, in ``pixel_values``.

        The processor pads with black tiles, which the model would have to detect and remove.
        """
        samples = [[as_rgb(image, _MAX_ASPECT_RATIO)] for image in images]
        pixels = self._image_processor(samples, return_row_col_info=True, return_tensors="pt")
        layouts = [(rows[0], columns[0]) for rows, columns in zip(pixels["rows"], pixels["cols"], strict=True)]
        tiles = [values[: rows * columns + 1] for values, (rows, columns) in zip(pixels["pixel_values"], layouts, strict=True)]
        return ImageInputs([self._run(*layout) for layout in layouts], {"pixel_values": torch.cat(tiles).unsqueeze(1)})

    def _run(self, rows: int, columns: int) -> list[int]:
        """Token ids of an image split into this many rows and columns of tiles (0: the whole image only)."""
        if (rows, columns) not in self._runs:
            tile = self.image_token * self._tokens_per_tile
            text = ""
            for row in range(1, rows + 1):
                text += "".join(f"{_AROUND}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            text += ("\n" if rows else "") + f"{_AROUND}{_WHOLE}{tile}{_AROUND}"
            self._runs[rows, columns] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._runs[rows, columns]


def load(params: SmolVLM, device: torch.device) -> SmolVLMBackbone:
    """Load a published or local SmolVLM or Idefics3 checkpoint; raises as :func:`sda_core.backbones.build`."""
    classes = {
        SmolVLMConfig: Classes(SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
        Idefics3Config: Classes(Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    }
    loaded = load_parts(params, device, "a SmolVLM or Idefics3", classes)
    info = describe(params, loaded, params.kind, params.pooling, max_tiles=params.max_tiles)
    return SmolVLMBackbone(loaded.model, loaded.tokenizer, loaded.image_processor, info)
