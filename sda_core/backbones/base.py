"""Interfaces of a backbone: the description of its vectors, the item encoder, and the vision tower alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from sda_core.params import Targets

if TYPE_CHECKING:  # for the signatures only: this module must import neither library
    from PIL import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneInfo:
    """Properties of a backbone on which vectors depend; written to the metadata of the embeddings file.

    Attributes:
        kind: the params section's kind.
        name: hub id, folder as written in the params, or the name of a built-in model.
        revision: pinned commit of a hub id, ``sha256:...`` of a local folder's files, or the seed of a random model.
        dtype: dtype of the weights, e.g. ``"bfloat16"``.
        attention: the chosen attention implementation.
        pooling: ``"mean"`` over the attention mask, ``"last"`` token, or the ``"tower"``'s own.
        min_pixels: images are enlarged to this many pixels; None if the model has a fixed size.
        max_pixels: images are reduced to this many pixels; None if the model has a fixed size.
        max_tiles: images are split into at most this many tiles; None if the model uses no tiles.
        max_text_tokens: length to which a text sequence is truncated, template included.
    """

    kind: str
    name: str
    revision: str
    dtype: str
    attention: str
    pooling: Literal["mean", "last", "tower"]
    min_pixels: int | None
    max_pixels: int | None
    max_tiles: int | None
    max_text_tokens: int

    def metadata(self) -> dict[str, str]:
        """The fields of this kind of model as text, for the metadata of an Arrow schema."""
        return {f"backbone_{key}": str(value) for key, value in asdict(self).items() if value is not None}


class Backbone(Protocol):
    """Interface of a vision-language model as an item encoder.

    Inputs are plain dictionaries of CPU tensors, so that they can be prepared ahead in another thread; :meth:`encode` moves
    them to the model's device.  A vector does not depend on the rest of its batch (float32: within 1e-4).
    """

    @property
    def model(self) -> nn.Module:
        """The whole model, frozen and in evaluation mode, which PEFT wraps."""
        ...

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        ...

    @property
    def info(self) -> BackboneInfo:
        """Properties on which the vectors depend."""
        ...

    def adapter_pattern(self, targets: Targets) -> str:
        """Regular expression for PEFT's ``target_modules``: matches full names of linear layers in the transformer blocks.

        Args:
            targets: ``"language"`` for the language model (or text tower) only, ``"language_and_vision"`` for the vision
                tower as well.
        """
        ...

    def num_adapter_layers(self, targets: Targets) -> int:
        """Number of modules that :meth:`adapter_pattern` matches; 7 per decoder layer (q, k, v, o, gate, up, down)."""
        ...

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence per image: the image, then the prompt (which a dual encoder does not use)."""
        ...

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence per text."""
        ...

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled last hidden states, or a dual encoder's projections: ``(B, D)`` float32, **not** normalised.

        Args:
            model: :attr:`model` itself, or the PEFT model around it.
            inputs: the result of :meth:`image_inputs` or :meth:`text_inputs`.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint that can be loaded by its path."""
        ...


@runtime_checkable
class VisionTower(Protocol):
    """Optional interface of a backbone: run the vision tower alone, so that a frozen one runs only once per item."""

    def vision_features(self, images: Sequence[Image.Image]) -> list[dict[str, Tensor]] | None:
        """Outputs of the tower for each image, for :meth:`image_inputs_from`: named tensors on the CPU.

        None if the model does not support it, or if a part of the tower is trained; call it with an empty list to check.
        """
        ...

    def image_inputs_from(self, features: Sequence[Mapping[str, Tensor]], prompt: str) -> dict[str, Tensor]:
        """As :meth:`Backbone.image_inputs`, but with the outputs of :meth:`vision_features` instead of images.

        :meth:`Backbone.encode` then returns the same vectors without running the tower.
        """
        ...


@runtime_checkable
class JointEncoder(Protocol):
    """Additional interface of a backbone with one decoder: an item's image and text in one sequence."""

    def joint_inputs(self, images: Sequence[Image.Image], texts: Sequence[str], prompt: str) -> dict[str, Tensor]:
        """One sequence per item: the image, the prompt, the text."""
        ...

    def token_modalities(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The index in ``sda_core.modalities.MODALITIES`` of each token: ``(B, L)`` int64; image tokens have the image's."""
        ...
