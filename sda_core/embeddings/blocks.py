"""Blocks of items: splitting a shop into blocks, encoding a block, and the folder of finished blocks."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.adapters import depends_on_modality, modality
from sda_core.adapters.merging import moda_layers
from sda_core.backbones import Backbone, BackboneInfo, JointEncoder
from sda_core.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sda_core.errors import ArtifactError, ConfigError, DataError
from sda_core.fingerprint import fingerprint as fingerprint_of
from sda_core.items import ItemSource
from sda_core.modalities import Pass
from sda_core.params import ExportParams
from sda_core.read_ahead import read_ahead

_log = logging.getLogger(__name__)

ModalityContext = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class EmbeddedItems:
    """Vectors of every item, one for each kind of pass; not normalised.

    Attributes:
        item_ids: ``(I,)`` int32, in the source's order.
        vectors: ``(I, D)`` float32 by pass; image vectors are zero where ``has_image`` is false, text vectors likewise.
        has_image: ``(I,)`` bool, whether an image (real or placeholder) was encoded.
        has_text: ``(I,)`` bool, whether a text (its own or a placeholder) was encoded.
        info: description of the backbone.
    """

    item_ids: np.ndarray
    vectors: dict[Pass, np.ndarray]
    has_image: np.ndarray
    has_text: np.ndarray
    info: BackboneInfo

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return next(iter(self.vectors.values())).shape[1]

    @property
    def image_ID(self) -> np.ndarray:
        """``(I, D)`` vectors of the image passes."""
        return self.vectors["image"]

    @property
    def text_ID(self) -> np.ndarray:
        """``(I, D)`` vectors of the text passes."""
        return self.vectors["text"]

    @property
    def joint_ID(self) -> np.ndarray:
        """``(I, D)`` vectors of the joint passes."""
        return self.vectors["joint"]


@dataclass(frozen=True)
class Block:
    """Consecutive items in one kind of pass.

    Attributes:
        name: name of the pass.
        number: number of the block, counted separately for each kind of pass.
        rows: rows of the items that have an input for this pass.
    """

    name: Pass
    number: int
    rows: np.ndarray


@dataclass(frozen=True)
class EncodedBlock:
    """The result of encoding a block.

    Attributes:
        vectors_BD: ``(B, D)`` float32 on the CPU, in the order of the block's rows.
        num_full: number of texts that fill ``max_text_tokens``.
        info: description of the backbone.
    """

    vectors_BD: Tensor
    num_full: int
    info: BackboneInfo


def blocks_of(source: ItemSource, shard_rows: int, passes: Sequence[Pass]) -> list[Block]:
    """All non-empty blocks, one kind of pass after the other."""
    found: list[Block] = []
    for name in passes:
        for number, start in enumerate(range(0, len(source), shard_rows)):
            rows = np.arange(start, min(start + shard_rows, len(source)))
            match name:
                case "image":
                    rows = rows[source.shows_image[rows]]
                case "text":
                    rows = rows[source.shows_text[rows]]
                case "joint":
                    pass
                case _:
                    assert_never(name)
            if len(rows):
                found.append(Block(name, number, rows))
    return found


# ---------------------------------------------------------------------------------------------- on disk
class BlockFolder:
    """Finished blocks on disk, one file each, written atomically with a fingerprint of the inputs.

    Args:
        folder: created if missing; the caller deletes it.
        fingerprint: hash of everything on which the vectors depend besides ``source`` and ``params``.
        source: the items.
        params: batch and block sizes.
        passes: the kinds of pass.
    """

    def __init__(self, folder: Path, fingerprint: str, source: ItemSource, params: ExportParams, passes: Sequence[Pass]) -> None:
        self._folder = folder
        self._passes = passes
        items = _hash_of(source)
        self._keys = {
            name: fingerprint_of(fingerprint, name, items, params.batch_size, params.shard_rows, params.merge, params.compile)
            for name in passes
        }

    def _path(self, block: Block) -> Path:
        return self._folder / f"{block.name}-{block.number:05d}.safetensors"

    def save(self, block: Block, encoded: EncodedBlock) -> None:
        """Write a finished block."""
        state = {"num_full": encoded.num_full, "backbone": asdict(encoded.info)}
        save_checkpoint(self._path(block), {"vectors": encoded.vectors_BD}, state, self._keys[block.name])

    def read(self, block: Block) -> EncodedBlock | None:
        """Read a block written by :meth:`save`; None if it is not finished for these inputs."""
        stored = load_checkpoint(self._path(block), self._keys[block.name])
        if stored is None:
            return None
        tensors, state = stored
        return EncodedBlock(tensors["vectors"], state["num_full"], BackboneInfo(**state["backbone"]))

    def unfinished(self, blocks: list[Block]) -> np.ndarray:
        """Mask of the blocks that are not encoded yet: ``(number of blocks,)`` bool."""
        return np.array([not has_checkpoint(self._path(block), self._keys[block.name]) for block in blocks], dtype=bool)

    def assemble(self, source: ItemSource, blocks: list[Block], num_resumed: int) -> EmbeddedItems:
        """All vectors of a finished export.

        Args:
            source: the items.
            blocks: all of :func:`blocks_of`.
            num_resumed: number of blocks that existed before; for the log only.

        Raises:
            ArtifactError: a block is missing, or damaged.
            DataError: there is no item.
        """
        if not blocks:
            raise DataError("item vectors", "there is no item", "check the filter's statistics")
        vectors: dict[Pass, np.ndarray] = {}
        infos: set[BackboneInfo] = set()
        num_full = 0
        for block in blocks:
            encoded = self.read(block)
            if encoded is None:
                raise ArtifactError(
                    str(self._path(block)), "was just there, and cannot be read", "delete it and run the same command again"
                )
            shape = len(source), encoded.vectors_BD.shape[1]
            for name in self._passes:
                vectors.setdefault(name, np.zeros(shape, dtype=np.float32))
            vectors[block.name][block.rows] = encoded.vectors_BD.numpy()
            infos.add(encoded.info)
            num_full += encoded.num_full
        if len(infos) > 1:
            problem = f"come from {len(infos)} different backbones or settings"
            raise ArtifactError(
                str(self._folder),
                problem,
                "delete the folder, and check that all machines have the same software and settings",
            )
        _log.info("%d items in %d blocks, %d of them taken from an earlier run", len(source), len(blocks), num_resumed)
        if num_full:
            _log.info("%d of %d texts reach backbone.max_text_tokens and were truncated there", num_full, len(source))
        return EmbeddedItems(source.item_ids.copy(), vectors, source.shows_image.copy(), source.shows_text.copy(), infos.pop())


def _hash_of(source: ItemSource) -> str:
    """Hash of the ids, of the items with an image or a text, and of the texts."""
    flags = source.shows_image, source.has_image, source.shows_text
    digest = hashlib.sha256(source.item_ids.tobytes() + b"".join(flag.tobytes() for flag in flags))
    for text in [source.image_prompt, source.prompt_hash, *source.texts(np.arange(len(source)))]:
        digest.update(f"{len(text)}\x1f{text}".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- encoding
@dataclass(frozen=True)
class BlockEncoder:
    """A model, ready to encode blocks.

    Attributes:
        backbone: makes inputs and pools hidden states.
        model: ``backbone.model``, or the PEFT model around it.
        params: section with the batch size.
        device: device of the model.
    """

    backbone: Backbone
    model: nn.Module
    params: ExportParams
    device: torch.device

    def prepare(self) -> None:
        """Set the model to evaluation mode, and compile the layers of its language model if the params enable it.

        Raises:
            ConfigError: there is no compiler, the CPU has no vector instructions, or there is no layer to compile.
        """
        self.model.eval()
        if self.params.compile:
            if self.device.type == "cpu":
                _require_cpu_compiler()
            # pass the choice of prepare_torch to the compiler as well
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
            _compile_layers(self.model, self.backbone.adapter_pattern("language"))

    def check(self, passes: Sequence[Pass]) -> None:
        """Check that the model supports these passes.

        Raises:
            ConfigError: a joint pass with a backbone that has a tower for each modality, or with an adapter that changes the
                vision tower by the modality (the tower's layers do not see the tokens of the sequence).
        """
        if "joint" not in passes:
            return
        where = "params.yaml: joint_embeddings.variants"
        if not isinstance(self.backbone, JointEncoder):
            problem = f"a joint pass needs one decoder for image and text, and {self.backbone.info.kind} has a tower for each"
            raise ConfigError(where, problem, "leave joint variants out, or use a backbone such as nano or qwen2_5_vl_7b")
        if not depends_on_modality(self.model):
            return
        language = re.compile(rf"(?:.*\.)?{self.backbone.adapter_pattern('language')}")
        outside = [name for name, _ in moda_layers(self.model) if not language.fullmatch(name)]
        if outside:
            problem = f"the adapter changes {len(outside)} layers of the vision tower by the modality, which a joint pass mixes"
            raise ConfigError(where, problem, "use an adapter with targets: language, or with gate: uniform")

    def around(self, name: Pass, modality_context: ModalityContext) -> AbstractContextManager[object]:
        """The context for all passes of one kind.

        In a joint pass an adapter whose gate does not depend on the modality has one weight and can be merged as usual.  An
        adapter whose gate depends on the modality has a weight for each, and a sequence needs both: it stays unmerged, and
        :meth:`encode` sets the modality of each token.
        """
        if name != "joint":
            return modality_context(name)
        return nullcontext() if depends_on_modality(self.model) else modality_context("text")

    def encode(self, source: ItemSource, name: Pass, rows: np.ndarray) -> EncodedBlock:
        """Vectors of some rows, in their order.

        A joint pass uses an item's own image and text; an item without an image has a sequence with text only, regardless of
        ``items.missing_image``.  An item without a text keeps the prompt that says so, regardless of ``items.missing_text``.

        Batches contain sequences of similar length.  A thread reads, decodes and tokenises the next two batches while the
        model runs.

        Raises:
            ArtifactError: an image cannot be decoded.
            DataError: a vector is not finite.
            ConfigError: a batch does not fit into the device's memory.
        """
        backbone, batch_size = self.backbone, self.params.batch_size
        batches = _batches(name, source, rows, batch_size)
        encoded: list[Tensor] = []
        num_full = 0
        with torch.inference_mode():
            for inputs in read_ahead((self._inputs(name, source, rows[places]) for places in batches), depth=2):
                num_full += self._num_full(name, inputs)
                moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
                try:
                    with self._around_batch(name, inputs):
                        encoded.append(backbone.encode(self.model, moved))
                except torch.OutOfMemoryError:
                    problem = f"{batch_size} items do not fit into the memory of {self.device}"
                    raise ConfigError("params.yaml: export_embeddings.batch_size", problem, "lower it") from None
            sorted_BD = torch.cat(encoded).to("cpu", torch.float32)
        vectors_BD = torch.empty_like(sorted_BD)
        vectors_BD[torch.from_numpy(np.concatenate(batches))] = sorted_BD
        bad = rows[~torch.isfinite(vectors_BD).all(1).numpy()]
        if len(bad):
            ids = ", ".join(str(item_id) for item_id in source.item_ids[bad[:5]])
            raise DataError(
                f"{name} vectors",
                f"should be finite (got NaN or infinity for {len(bad)} items, e.g. item_id {ids})",
                "use backbone.dtype bfloat16 or float32, and check the adapter's loss curve",
            )
        return EncodedBlock(vectors_BD, num_full, backbone.info)

    def _inputs(self, name: Pass, source: ItemSource, rows: np.ndarray) -> dict[str, Tensor]:
        """Inputs of a batch."""
        if name == "text" or (name == "joint" and not source.has_image[rows].any()):
            return self.backbone.text_inputs(source.texts(rows))
        images = [image for image in source.images(rows) if image is not None]
        assert len(images) == len(rows), "rows without an image are not in this batch"
        if name == "image":
            return self.backbone.image_inputs(images, source.image_prompt)
        assert isinstance(self.backbone, JointEncoder)
        return self.backbone.joint_inputs(images, source.texts(rows), source.image_prompt)

    def _around_batch(self, name: Pass, inputs: dict[str, Tensor]) -> AbstractContextManager[object]:
        """The context that sets the modality of each token, if the adapter needs it."""
        if name != "joint" or not depends_on_modality(self.model):
            return nullcontext()
        assert isinstance(self.backbone, JointEncoder)
        return modality(self.model, self.backbone.token_modalities(inputs))

    def _num_full(self, name: Pass, inputs: dict[str, Tensor]) -> int:
        """Number of texts of a batch that fill ``max_text_tokens``, which does not count image tokens."""
        if name == "image":
            return 0
        counted_BL = inputs["attention_mask"]
        if name == "joint":
            assert isinstance(self.backbone, JointEncoder)
            counted_BL = counted_BL * self.backbone.token_modalities(inputs)
        return int((counted_BL.sum(1) >= self.backbone.info.max_text_tokens).sum())


def _batches(name: Pass, source: ItemSource, rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Indices of the rows, in batches whose sequences have similar numbers of tokens; ties by index.

    The number of bytes approximates a text's tokens.  The backbone resizes images to about the same number of pixels, so
    they keep their order if there is no text.  In a joint pass no batch mixes items with and without an image.
    """
    if name == "image":
        groups = [np.arange(len(rows))]
    else:
        order = np.argsort([len(text.encode()) for text in source.texts(rows)], kind="stable")
        has_image = source.has_image[rows[order]]
        groups = [order[has_image], order[~has_image]] if name == "joint" else [order]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def _require_cpu_compiler() -> None:
    """Raise if torch's compiler cannot work on the CPU, before it fails with pages of C++ errors."""
    where = "params.yaml: export_embeddings.compile"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(where, "needs a C++ compiler on the CPU", "use false")
    # Without AVX2, torch generates C++ that does not compile.
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise ConfigError(where, "needs a CPU with AVX2 or newer vector instructions", "use false")


def _compile_layers(model: nn.Module, adapter_pattern: str) -> None:
    """Compile the layers of the language model in place, for any batch size and length.

    Layers are compiled one by one: they share their code, so the compiler runs once, in seconds, for any depth.  The vision
    tower is not compiled, because its computation depends on the number of windows.
    """
    adapted = re.compile(rf"(?:.*\.)?{adapter_pattern}")
    num_compiled = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(adapted.fullmatch(f"{name}.{inner}") for inner, _ in module.named_modules()):
            for layer in module:
                layer.compile(dynamic=True)
            num_compiled += len(module)
    if not num_compiled:
        raise ConfigError("params.yaml: export_embeddings.compile", "finds no layers to compile in this backbone", "use false")
    _log.info("%d layers will be compiled at their first pass", num_compiled)
