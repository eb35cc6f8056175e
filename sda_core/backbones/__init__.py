"""Vision-language models that turn an item's picture and words into vectors: the one interface, and its builder.

===================  =======================================  ====================================================
``kind``             family                                   vector
===================  =======================================  ====================================================
``qwen2_vl``         Qwen2-VL                                 mean (or last) of the decoder's last hidden states
``qwen2_5_vl``       Qwen2.5-VL                               the same
``qwen3_vl``         Qwen3-VL, dense                          the same
``llava_onevision``  LLaVA-OneVision                          the same
``internvl``         InternVL, transformers' format           the same
``smolvlm``          SmolVLM, SmolVLM2, Idefics3              the same
``clip``             CLIP                                     the towers' own pooling and projection
``siglip``           SigLIP 2 of fixed resolution, SigLIP     the towers' own pooling
===================  =======================================  ====================================================

A backbone knows how to make model inputs from pictures and from texts and how to pool the model's hidden states; it
does not know what an adapter or a loss is.  :func:`build` chooses by the type of the params section.  This package is
the only importer of transformers, and imports it only inside the case that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, assert_never, runtime_checkable

from sda_core.params import (
    CLIP,
    BackboneParams,
    InternVL,
    LlavaOnevision,
    Nano,
    Qwen2VL,
    Qwen3VL,
    Qwen25VL,
    SigLIP,
    SmolVLM,
    Targets,
    TinyQwen25VL,
)

if TYPE_CHECKING:  # for the signatures only: choosing a backbone needs neither library
    import torch
    from PIL import Image
    from torch import Tensor, nn

__all__ = ["Backbone", "BackboneInfo", "VisionTower", "build", "save_backbone"]


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
        min_pixels: pictures are enlarged to this many pixels; None where the model has its own size.
        max_pixels: pictures are reduced to this many pixels; None where the model has its own size.
        max_tiles: pictures are cut into at most this many tiles; None where the model cuts none.
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
        """One sequence a picture: the picture, then the prompt (which a dual encoder does not read)."""
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
        """What the tower makes of each picture, to be kept for :meth:`image_inputs_from`: named tensors on the CPU.

        None where the model does not offer it, or where something in the tower learns; an empty list of pictures asks.
        """
        ...

    def image_inputs_from(self, features: Sequence[Mapping[str, Tensor]], prompt: str) -> dict[str, Tensor]:
        """As :meth:`Backbone.image_inputs`, from results of :meth:`vision_features` in the pictures' place.

        :meth:`Backbone.encode` then gives the same vectors without running the tower.
        """
        ...


def build(params: BackboneParams, device: torch.device) -> Backbone:
    """Load or make the backbone that the params ask for, on ``device``, frozen, in evaluation mode.

    Raises:
        ConfigError: the params cannot be met (no revision pinned, another architecture, attention not available).
        ArtifactError: a local checkpoint is missing, incomplete or damaged.
        DownloadError: a hub checkpoint is neither in the cache nor reachable.
    """
    match params:
        case TinyQwen25VL():
            from sda_core.backbones.qwen2_5_vl import make_tiny

            return make_tiny(params, device)
        case Nano():
            from sda_core.backbones._nano import load_nano

            return load_nano(params, device)
        case Qwen2VL():
            from sda_core.backbones.qwen2_vl import load

            return load(params, device)
        case Qwen25VL():
            from sda_core.backbones.qwen2_5_vl import load

            return load(params, device)
        case Qwen3VL():
            from sda_core.backbones.qwen3_vl import load

            return load(params, device)
        case LlavaOnevision():
            from sda_core.backbones.llava_onevision import load

            return load(params, device)
        case InternVL():
            from sda_core.backbones.internvl import load

            return load(params, device)
        case SmolVLM():
            from sda_core.backbones.smolvlm import load

            return load(params, device)
        case CLIP():
            from sda_core.backbones.clip import load

            return load(params, device)
        case SigLIP():
            from sda_core.backbones.siglip import load

            return load(params, device)
        case _:
            assert_never(params)


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write a backbone as a checkpoint folder (safetensors, tokenizer, picture processor, chat template), whole.

    The folder is then a valid ``backbone.name``.  No adapter may be attached: PEFT changes the model in place.

    Raises:
        ConfigError: an adapter is attached.
    """
    backbone.save(folder)
