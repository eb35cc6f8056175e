"""Base class of the Qwen-VL families: images of any size as patches, and rotary positions in three dimensions.

An image so long that one row of patches would exceed ``max_pixels`` is padded with grey.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sda_core.backbones._checkpoint import Classes, describe, load_parts
from sda_core.backbones._images import as_rgb
from sda_core.backbones._layers import LLAMA_LINEAR, AdapterLayers
from sda_core.backbones._vision_language import ImageInputs, VisionLanguageBackbone
from sda_core.errors import ArtifactError, ConfigError
from sda_core.params import Qwen2VL, Qwen3VL, Qwen25VL

LANGUAGE_PATTERN = rf"(?:model\.)?(?:language_model\.)?layers\.\d+\.{LLAMA_LINEAR}"
"""Linear layers of the decoder, by their names in memory (``model.language_model.layers...``) and in checkpoint files
(``model.layers...``).  The vision tower's MLPs may have the same suffixes, but are in ``visual.blocks``."""

QwenVLParams = Qwen2VL | Qwen25VL | Qwen3VL

_MAX_ASPECT_RATIO = 200.0  # limit of the image processor


class QwenVLBackbone(VisionLanguageBackbone):
    """A Qwen-VL checkpoint; an image has one token per ``spatial_merge_size`` squared patches."""

    image_token = "<|image_pad|>"  # noqa: S105
    vision_linear: tuple[str, ...] = ()
    """The linear layers of one block of the vision tower."""
    tower_ends_in_tokens: ClassVar[bool] = False
    """Whether the decoder uses nothing from the tower but the vectors of the image tokens."""

    @classmethod
    def from_checkpoint(cls, params: QwenVLParams, device: torch.device, family: str, config: type, model: Any) -> Self:
        """Load a published or local checkpoint; raises as :func:`sda_core.backbones.build`.

        Args:
            params: section that names the checkpoint.
            device: device of the model.
            family: expected family for error messages, e.g. ``"a Qwen2-VL"``.
            config: class of the checkpoint's configuration.
            model: transformers' model class.
        """
        loaded = load_parts(params, device, family, {config: Classes(model, Qwen2VLImageProcessorPil)})
        limits = {"min_pixels": params.min_pixels, "max_pixels": params.max_pixels}
        info = describe(params, loaded, params.kind, params.pooling, **limits)
        return cls(loaded.model, loaded.tokenizer, loaded.image_processor, info)

    def _adapter_layers(self) -> AdapterLayers:
        names = "|".join(name.replace(".", r"\.") for name in self.vision_linear)
        return AdapterLayers(
            language=LANGUAGE_PATTERN,
            num_language=7 * self._config.text_config.num_hidden_layers,
            vision=rf"(?:model\.)?visual\.blocks\.\d+\.(?:{names})",
            num_vision=len(self.vision_linear) * self._config.vision_config.depth,
        )

    def _set_up_image_processor(self) -> None:
        low, high = self.info.min_pixels, self.info.max_pixels
        assert low is not None
        assert high is not None
        if low > high:
            raise ConfigError("params.yaml: backbone.min_pixels", f"should be at most max_pixels (got {low} > {high})")
        vision, processor = self._config.vision_config, self._image_processor
        expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        got = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        if got != expected:
            raise ArtifactError(
                self.info.name,
                f"image processor and model disagree on patch size, merge size and temporal patch size"
                f" (got {got}, expected {expected})",
                "fetch the checkpoint again, its image processor is of another model",
            )
        self._merge_size: int = vision.spatial_merge_size
        processor.size = {"shortest_edge": low, "longest_edge": high}
        factor = processor.patch_size * processor.merge_size
        self._max_aspect_ratio = min(_MAX_ASPECT_RATIO, max(1.0, high / factor**2))

    def _image_inputs_of(self, images: Sequence[Image.Image]) -> ImageInputs:
        """All patches, flattened, in ``pixel_values``; numbers of rows and columns of patches in ``image_grid_thw`` (B, 3)."""
        prepared = [as_rgb(image, self._max_aspect_ratio) for image in images]
        pixels = self._image_processor(prepared, return_tensors="pt")
        grid_B3: Tensor = pixels["image_grid_thw"]
        counts = (grid_B3.prod(-1) // self._merge_size**2).tolist()
        tensors = {"pixel_values": pixels["pixel_values"], "image_grid_thw": grid_B3}
        return ImageInputs([[self._image_token_id] * count for count in counts], tensors)

    @torch.no_grad()
    def vision_features(self, images: Sequence[Image.Image]) -> list[dict[str, Tensor]] | None:
        """Outputs of the vision tower for each image: ``tokens (P, D)`` in the weights' dtype, ``grid (3,)``; on the CPU.

        None if the decoder uses further outputs of the tower, or if a part of the tower is trained.
        """
        inner: Any = self.model
        learns = any(parameter.requires_grad for parameter in inner.model.visual.parameters())
        takes_them = "mm_encoder_outputs" in inspect.signature(inner.model.forward).parameters  # not in older transformers
        if not self.tower_ends_in_tokens or learns or not takes_them:
            return None
        if not images:
            return []
        prepared = self._image_inputs_of(images).tensors
        pixels, grid_B3 = (prepared[name].to(inner.device) for name in ("pixel_values", "image_grid_thw"))
        tokens = inner.model.get_image_features(pixels, grid_B3, return_dict=True).pooler_output
        return [{"tokens": one.cpu(), "grid": grid.cpu()} for one, grid in zip(tokens, grid_B3, strict=True)]

    def image_inputs_from(self, features: Sequence[Mapping[str, Tensor]], prompt: str) -> dict[str, Tensor]:
        """As :meth:`image_inputs`, but with the outputs of :meth:`vision_features` instead of pixels."""
        tensors = {
            "image_tokens": torch.cat([one["tokens"] for one in features]),
            "image_grid_thw": torch.stack([one["grid"] for one in features]),
        }
        runs = [[self._image_token_id] * len(one["tokens"]) for one in features]
        return self._image_sequences(ImageInputs(runs, tensors), prompt)

    def _arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        if "image_tokens" not in inputs:
            return dict(inputs)
        counts = (inputs["image_grid_thw"].prod(-1) // self._merge_size**2).tolist()
        tokens = inputs["image_tokens"].split(counts)
        rest = {name: tensor for name, tensor in inputs.items() if name not in ("image_tokens", "image_grid_thw")}
        return rest | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}  # type: ignore[arg-type]

    def _text_positions(self, mask_BL: Tensor) -> Tensor:
        return super()._text_positions(mask_BL).expand(3, -1, -1).contiguous()

    def _image_positions(self, mask_BL: Tensor, prepared: ImageInputs, image_start: int) -> Tensor:
        """Multimodal rotary positions (temporal, height, width), ``(3, B, L)``; padding has position 0.

        Text tokens count up in all three.  An image of h x w merged patches that begins at position s has (s, s + row,
        s + column); the next text token is at s + max(h, w)  (Wang et al. 2024, arXiv 2409.12191, section 2.1).
        """
        positions_3BL = torch.zeros((3, *mask_BL.shape), dtype=torch.long)
        length = mask_BL.shape[1]
        grids = prepared.tensors["image_grid_thw"].tolist()
        for place, (run, grid) in enumerate(zip(prepared.tokens, grids, strict=True)):
            height, width = grid[1] // self._merge_size, grid[2] // self._merge_size
            row_length = int(mask_BL[place].sum())
            image_end = image_start + len(run)
            row_3L = torch.arange(row_length).expand(3, -1).clone()
            cells = torch.arange(len(run))
            row_3L[:, image_start:image_end] = image_start + torch.stack([torch.zeros_like(cells), cells // width, cells % width])
            row_3L[:, image_end:] += max(height, width) - len(run)
            positions_3BL[:, place, length - row_length :] = row_3L
        return positions_3BL
