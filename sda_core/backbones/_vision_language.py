"""Base class of the vision-language families: one decoder over image tokens and text tokens.

* An item has two sequences, each one user turn of the checkpoint's chat template (with the template's default system
  line, without a generation prompt): ``image, image prompt`` and ``text prompt``.  A joint pass has one sequence:
  ``image, image prompt, text prompt``.
* Images are processed by transformers' PIL processors, because the default ones need torchvision; text, image tokens
  and positions are composed here.
* Only the item's text is truncated, to ``max_text_tokens`` (which counts the template, but no image tokens).
* Padding is on the left, and positions are computed per sequence without padding, so that a vector depends neither on
  its batch nor on state in the model.
* The decoder's output after the final norm is pooled in float32; the language-model head is never run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from sda_core.backbones._checkpoint import save_parts
from sda_core.backbones._layers import AdapterLayers, WithAdapterLayers, base_and_inputs
from sda_core.backbones._text import Words, chat_frame, padded, pool, text_positions
from sda_core.backbones.base import BackboneInfo
from sda_core.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class ImageInputs:
    """Images as model inputs.

    Attributes:
        tokens: the token ids of each image, which replace the template's single image token.
        tensors: further arguments of the model's ``forward``.
    """

    tokens: list[list[int]]
    tensors: dict[str, Tensor]


class VisionLanguageBackbone(WithAdapterLayers, ABC):
    """A vision-language model as an item encoder; see :class:`~sda_core.backbones.base.Backbone` for the contract.

    Args:
        model: a ``...ForConditionalGeneration`` of transformers; it is frozen and set to evaluation mode.
        tokenizer: its fast tokenizer, with a chat template.
        image_processor: its image processor, based on PIL.
        info: properties on which the vectors depend; its pooling is ``"mean"`` or ``"last"``.

    Raises:
        ConfigError: ``max_text_tokens`` leaves no room for text, or an image limit cannot be satisfied.
        ArtifactError: tokenizer, template, image processor and model do not belong together.
    """

    image_token: ClassVar[str]
    """The chat template's token for an image."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, info: BackboneInfo) -> None:
        self.model: nn.Module = model.eval().requires_grad_(requires_grad=False)
        self.info = info
        self.dim: int = model.config.text_config.hidden_size
        self._config = model.config
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._image_token_id: int = model.config.image_token_id
        self._layers = self._adapter_layers()
        self._set_up_image_processor()

        got = tokenizer.convert_tokens_to_ids(self.image_token)
        if got != self._image_token_id:
            raise ArtifactError(
                info.name,
                f"tokenizer and model disagree on {self.image_token} (got {got}, expected {self._image_token_id})",
                "fetch the checkpoint again, its tokenizer files are missing or of another model",
            )
        self._pad_token_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._words = Words(tokenizer, info.name)
        text, image = (chat_frame(tokenizer, info.name, with_image=with_image) for with_image in (False, True))
        image_at = [place for place, token in enumerate(image.before) if token == self._image_token_id]
        if len(image_at) != 1:
            raise ArtifactError(
                info.name, f"chat template should write {self.image_token} once before the text (got {len(image_at)} times)"
            )
        self._text_frame = (text.before, text.after)
        self._image_frame = (image.before[: image_at[0]], image.before[image_at[0] + 1 :], image.after)
        self._text_lead, self._image_lead = text.lead, image.lead

        longest = max(sum(map(len, self._text_frame)), sum(map(len, self._image_frame)))
        if info.max_text_tokens <= longest:
            raise ConfigError(
                "params.yaml: backbone.max_text_tokens",
                f"should be more than {longest}, the length of the chat template (got {info.max_text_tokens})",
            )

    # ------------------------------------------------------------------------------------------- of a family
    @abstractmethod
    def _adapter_layers(self) -> AdapterLayers:
        """The linear layers of the two parts."""

    @abstractmethod
    def _set_up_image_processor(self) -> None:
        """Set the limits of ``info`` on the image processor, and check that it fits the model."""

    @abstractmethod
    def _image_inputs_of(self, images: Sequence[Image.Image]) -> ImageInputs:
        """Token ids and tensors of some images."""

    def _image_positions(self, mask_BL: Tensor, prepared: ImageInputs, image_start: int) -> Tensor:
        """Positions of sequences whose image begins at ``image_start``; image tokens count like text tokens."""
        del prepared, image_start
        return text_positions(mask_BL)

    def _text_positions(self, mask_BL: Tensor) -> Tensor:
        """Positions of sequences without an image."""
        return text_positions(mask_BL)

    # ------------------------------------------------------------------------------------------- inputs
    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence per image: template, image tokens, prompt.

        Args:
            images: B images of any mode and size.
            prompt: the text after each image.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L), ``position_ids`` (B, L) or (3, B, L), and the family's image
            tensors, of which ``pixel_values`` is one; on the CPU.
        """
        return self._image_sequences(self._image_inputs_of(images), prompt)

    def joint_inputs(self, images: Sequence[Image.Image], texts: Sequence[str], prompt: str) -> dict[str, Tensor]:
        """One sequence per item: template, image tokens, then the prompt and the item's text, one line each.

        The two lines are truncated so that they and the template fit into ``max_text_tokens``.

        Args:
            images: B images of any mode and size.
            texts: B texts; an empty one gives the sequence of :meth:`image_inputs`.
            prompt: the text after each image.

        Returns:
            As :meth:`image_inputs`.
        """
        lines = [f"{prompt}\n{text}" if text else prompt for text in texts]
        return self._sequences_with_image(self._image_inputs_of(images), self._words_beside_image(lines))

    def token_modalities(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The modality of each token: ``(B, L)`` int64, 0 for image tokens, 1 for all others.

        Args:
            inputs: the result of one of the methods that make inputs.
        """
        return (inputs["input_ids"] != self._image_token_id).long()

    def _words_beside_image(self, lines: Sequence[str]) -> list[list[int]]:
        room = self.info.max_text_tokens - sum(map(len, self._image_frame))
        return self._words([self._image_lead + line for line in lines], room)

    def _image_sequences(self, prepared: ImageInputs, prompt: str) -> dict[str, Tensor]:
        return self._sequences_with_image(prepared, self._words_beside_image([prompt]) * len(prepared.tokens))

    def _sequences_with_image(self, prepared: ImageInputs, words: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        start, between, end = self._image_frame
        rows = [[*start, *run, *between, *row, *end] for run, row in zip(prepared.tokens, words, strict=True)]
        inputs = padded(rows, self._pad_token_id, side="left")
        inputs["position_ids"] = self._image_positions(inputs["attention_mask"], prepared, len(start))
        return inputs | prepared.tensors

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence per text: the template and the text, truncated so that both fit into ``max_text_tokens``.

        Args:
            texts: B texts; empty ones are allowed, and special tokens in them are treated as plain characters.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L), ``position_ids`` (B, L) or (3, B, L); on the CPU.
        """
        before, after = self._text_frame
        words = self._words([self._text_lead + text for text in texts], self.info.max_text_tokens - len(before) - len(after))
        inputs = padded([[*before, *row, *after] for row in words], self._pad_token_id, side="left")
        inputs["position_ids"] = self._text_positions(inputs["attention_mask"])
        return inputs

    def _arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of ``forward`` from inputs on its device."""
        return dict(inputs)

    # ------------------------------------------------------------------------------------------- vectors
    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled last hidden states.

        Args:
            model: :attr:`model`, or a PEFT model around it.
            inputs: the result of :meth:`image_inputs`, :meth:`text_inputs` or :meth:`joint_inputs`, on any device.

        Returns:
            ``(B, D)`` float32, not normalised; with a gradient if the adapter has one.
        """
        inner, moved = base_and_inputs(model, inputs)
        # The inner model has no language-model head: logits over 150,000 tokens are the largest tensor of a pass, and unused.
        hidden_BLD = inner.model(**self._arguments(moved), use_cache=False).last_hidden_state
        assert self.info.pooling != "tower"
        return pool(hidden_BLD, moved["attention_mask"], self.info.pooling)

    # ------------------------------------------------------------------------------------------- files
    def save(self, folder: Path) -> None:
        """Write model, tokenizer, image processor and chat template; see :func:`sda_core.backbones.save_backbone`."""
        save_parts(folder, self.model, self._tokenizer, self._image_processor)
