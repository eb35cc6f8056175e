"""Base class of CLIP and SigLIP: an image tower and a text tower with a shared output space, each with its own pooling.

* There is no common decoder: the image prompt is not used, and an adapter on ``language`` changes text vectors only.
* The image vector is the vision tower's pooled projection, the text vector that of the text tower.
* Texts are truncated to ``max_text_tokens``, at most the number of positions of the text tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from sda_core.backbones._checkpoint import save_parts
from sda_core.backbones._images import as_rgb
from sda_core.backbones._layers import VIT_LINEAR, AdapterLayers, WithAdapterLayers, base_and_inputs
from sda_core.backbones._text import Words, padded, special_frame
from sda_core.backbones.base import BackboneInfo
from sda_core.errors import ArtifactError, ConfigError

_MAX_ASPECT_RATIO = 50.0  # the shorter side is enlarged to the tower's size, the longer one in proportion


class DualEncoderBackbone(WithAdapterLayers):
    """Two towers as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract.

    Args:
        model: a ``CLIPModel`` or similar; it is frozen and set to evaluation mode.
        tokenizer: its fast tokenizer.
        image_processor: its image processor, based on PIL.
        info: properties on which the vectors depend.
        image_dim: width of the image vectors.
        text_dim: width of the text vectors.

    Raises:
        ConfigError: ``max_text_tokens`` leaves no room for text, or exceeds the text tower's positions.
        ArtifactError: the parts do not belong together.
    """

    lower_case: ClassVar[bool] = False
    """Whether to convert texts to lower case, because the model was trained on it and its tokenizer may not do it."""
    pads_to_full_length: ClassVar[bool] = False
    """Whether the text tower was trained on sequences padded to one length, attending to the padding."""

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, info: BackboneInfo, *, image_dim: int, text_dim: int
    ) -> None:
        self.model: nn.Module = model.eval().requires_grad_(requires_grad=False)
        self.info = info
        self.dim = image_dim
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        text, vision = model.config.text_config, model.config.vision_config
        self._layers = AdapterLayers(
            language=rf"text_model\.encoder\.layers\.\d+\.{VIT_LINEAR}",
            num_language=6 * text.num_hidden_layers,
            vision=rf"vision_model\.encoder\.layers\.\d+\.{VIT_LINEAR}",
            num_vision=6 * vision.num_hidden_layers,
        )
        if image_dim != text_dim:
            raise ArtifactError(info.name, f"both towers should end in vectors of one width (got {image_dim} and {text_dim})")
        made = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
        expected = {"height": vision.image_size, "width": vision.image_size}
        if made != expected:
            raise ArtifactError(
                info.name,
                f"image processor and model disagree on the size of an image (got {made}, expected {expected})",
                "fetch the checkpoint again, its image processor is of another model",
            )
        self._num_patches = (vision.image_size // vision.patch_size) ** 2
        self._words = Words(tokenizer, info.name)
        self._frame = special_frame(tokenizer, info.name)
        self._pad_token_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._max_length: int = text.max_position_embeddings
        longest = len(self._frame.before) + len(self._frame.after)
        if not longest < info.max_text_tokens <= self._max_length:
            raise ConfigError(
                "params.yaml: backbone.max_text_tokens",
                f"should be more than {longest} and at most {self._max_length}, the text tower's length"
                f" (got {info.max_text_tokens})",
            )

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """The images, resized to the tower's size.

        Args:
            images: B images of any mode and size.
            prompt: not used; the vision tower reads no text.

        Returns:
            ``pixel_values`` (B, 3, H, W), and ``attention_mask`` (B, patches), all ones; on the CPU.
        """
        del prompt
        prepared = [as_rgb(image, _MAX_ASPECT_RATIO) for image in images]
        pixel_values = self._image_processor(prepared, return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": pixel_values,
            "attention_mask": torch.ones((len(images), self._num_patches), dtype=torch.long),
        }

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence per text, between the tokenizer's special tokens.

        Args:
            texts: B texts; empty ones are allowed, and special tokens in them are treated as plain characters.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L); on the CPU.
        """
        before, after = self._frame.before, self._frame.after
        taken = [text.lower() for text in texts] if self.lower_case else texts
        words = self._words(taken, self.info.max_text_tokens - len(before) - len(after))
        side: Literal["left", "right"] = "right"
        if self.pads_to_full_length and self._tokenizer.padding_side == "left":
            side = "left"
        length = self._max_length if self.pads_to_full_length else None
        return padded([[*before, *row, *after] for row in words], self._pad_token_id, side=side, length=length)

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The towers' pooled projections.

        Args:
            model: :attr:`model`, or a PEFT model around it.
            inputs: the result of :meth:`image_inputs` or :meth:`text_inputs`, on any device.

        Returns:
            ``(B, D)`` float32, not normalised; with a gradient if the adapter has one.
        """
        inner, moved = base_and_inputs(model, inputs)
        if "pixel_values" in moved:
            found = inner.get_image_features(pixel_values=moved["pixel_values"])
        elif self.pads_to_full_length:
            found = inner.get_text_features(input_ids=moved["input_ids"])
        else:
            found = inner.get_text_features(input_ids=moved["input_ids"], attention_mask=moved["attention_mask"])
        return found.pooler_output.float()

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and image processor; see :func:`sda_core.backbones.save_backbone`."""
        save_parts(folder, self.model, self._tokenizer, self._image_processor)
