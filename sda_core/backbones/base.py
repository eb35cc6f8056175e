"""What every backbone offers: its vectors' description, the item encoder, and the vision tower run by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from sda_core.params import Targets

if TYPE_CHECKING:  # for the signatures only: choosing a backbone needs neither library
    from PIL import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneInfo:
    """What vectors depend on besides the items: goes into the metadata of the embeddings file.

    Attributes:
        kind: the params section's kind.
        name: hub id, folder as it stands in the params, or the name of a built-in model.
        revision: pinned commit of a hub id, ``sha256:...`` of a local folder's files, or the seed of a random model.
        dtype: of the weights, e.g. ``"bfloat16"``.
        attention: the attention implementation that was chosen.
        pooling: ``"mean"`` over the attention mask, ``"last"`` token, or the ``"tower"``'s own.
        min_pixels: images are enlarged to this many pixels; None where the model has its own size.
        max_pixels: images are reduced to this many pixels; None where the model has its own size.
        max_tiles: images are cut into at most this many tiles; None where the model cuts none.
        max_text_tokens: length at which a text sequence is cut, template included.
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
        """The fields that this kind of model has, as text, ready for an Arrow schema's metadata."""
        return {f"backbone_{key}": str(value) for key, value in asdict(self).items() if value is not None}


class Backbone(Protocol):
    """A vision-language model seen as an item encoder.

    Inputs are plain dictionaries of CPU tensors, so that they can be made ahead in another thread; :meth:`encode` moves
    them to the model's device.  A vector does not depend on what else is in its batch (float32: to 1e-4).
    """

    @property
    def model(self) -> nn.Module:
        """The whole model, frozen and in evaluation mode; what PEFT wraps."""
        ...

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        ...

    @property
    def info(self) -> BackboneInfo:
        """What the vectors depend on."""
        ...

    def adapter_pattern(self, targets: Targets) -> str:
        """Regular expression for PEFT's ``target_modules``: matches, in full, linear layers of the transformer blocks.

        Args:
            targets: ``"language"`` for those of the language model (or text tower) only, ``"language_and_vision"``
                for those of the vision tower as well.
        """
        ...

    def num_adapter_layers(self, targets: Targets) -> int:
        """How many modules :meth:`adapter_pattern` matches; for a language model 7 a layer (q, k, v, o, gate, up, down)."""
        ...

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence an image: the image, then the prompt (which a dual encoder does not read)."""
        ...

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence a text."""
        ...

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled last hidden states, or a dual encoder's projections: ``(B, D)`` float32, **not** normalised.

        Args:
            model: :attr:`model` itself, or the PEFT model around it.
            inputs: of :meth:`image_inputs` or :meth:`text_inputs`.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint that can be loaded by its path."""
        ...


@runtime_checkable
class VisionTower(Protocol):
    """What a backbone may offer besides: its vision tower run by itself, so that a frozen one need run only once an item."""

    def vision_features(self, images: Sequence[Image.Image]) -> list[dict[str, Tensor]] | None:
        """What the tower makes of each image, to be kept for :meth:`image_inputs_from`: named tensors on the CPU.

        None where the model does not offer it, or where something in the tower learns; an empty list of images asks.
        """
        ...

    def image_inputs_from(self, features: Sequence[Mapping[str, Tensor]], prompt: str) -> dict[str, Tensor]:
        """As :meth:`Backbone.image_inputs`, from results of :meth:`vision_features` in the images' place.

        :meth:`Backbone.encode` then gives the same vectors without running the tower.
        """
        ...


@runtime_checkable
class JointEncoder(Protocol):
    """What a backbone with one decoder offers besides: an item's image and text in one sequence."""

    def joint_inputs(self, images: Sequence[Image.Image], texts: Sequence[str], prompt: str) -> dict[str, Tensor]:
        """One sequence an item: the image, the prompt, the text."""
        ...

    def token_modalities(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of each token its place in ``sda_core.modalities.MODALITIES``: ``(B, L)`` int64; image tokens are the image's."""
        ...
