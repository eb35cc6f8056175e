"""Blocks of items: how a shop is cut, how a block is encoded, and the folder of finished blocks."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.backbones import Backbone, BackboneInfo
from sda_core.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sda_core.errors import ArtifactError, ConfigError, DataError
from sda_core.fingerprint import fingerprint as fingerprint_of
from sda_core.items import ItemSource
from sda_core.modalities import MODALITIES, Modality
from sda_core.params import ExportParams
from sda_core.read_ahead import read_ahead

_log = logging.getLogger(__name__)

ModalityContext = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class EmbeddedItems:
    """One vector a modality for every item; not normalised.

    Attributes:
        item_ids: ``(I,)`` int32, in the source's order.
        image_ID: ``(I, D)`` float32; zero where ``has_image`` is false.
        text_ID: ``(I, D)`` float32.
        has_image: ``(I,)`` bool, whether an image (real or placeholder) was encoded.
        info: of the backbone that made them.
    """

    item_ids: np.ndarray
    image_ID: np.ndarray
    text_ID: np.ndarray
    has_image: np.ndarray
    info: BackboneInfo


@dataclass(frozen=True)
class Block:
    """Consecutive items in one modality.

    Attributes:
        modality: which.
        number: counted from the first item, in each modality on its own.
        rows: those of the items that have something to encode.
    """

    modality: Modality
    number: int
    rows: np.ndarray


@dataclass(frozen=True)
class EncodedBlock:
    """What became of a block.

    Attributes:
        vectors_BD: ``(B, D)`` float32 on the CPU, in the order of the block's rows.
        num_full: how many of its texts fill ``max_text_tokens``.
        info: of the backbone that made them.
    """

    vectors_BD: Tensor
    num_full: int
    info: BackboneInfo


def blocks_of(source: ItemSource, shard_rows: int) -> list[Block]:
    """All blocks that are not empty: the images', then the texts'."""
    found: list[Block] = []
    for modality in MODALITIES:
        for number, start in enumerate(range(0, len(source), shard_rows)):
            rows = np.arange(start, min(start + shard_rows, len(source)))
            rows = rows if modality == "text" else rows[source.shows_image[rows]]
            if len(rows):
                found.append(Block(modality, number, rows))
    return found


# ---------------------------------------------------------------------------------------------- on disk
class BlockFolder:
    """Finished blocks on disk, each a file of its own that is replaced whole and tied to the inputs.

    Args:
        folder: is made where absent, and left to the caller to delete.
        fingerprint: of everything that the vectors depend on besides ``source`` and ``params``.
        source: the items.
        params: batch and block sizes.
    """

    def __init__(self, folder: Path, fingerprint: str, source: ItemSource, params: ExportParams) -> None:
        self._folder = folder
        items = _hash_of(source)
        self._keys = {
            modality: fingerprint_of(
                fingerprint, modality, items, params.batch_size, params.shard_rows, params.merge, params.compile
            )
            for modality in MODALITIES
        }

    def _path(self, block: Block) -> Path:
        return self._folder / f"{block.modality}-{block.number:05d}.safetensors"

    def save(self, block: Block, encoded: EncodedBlock) -> None:
        """Keep a finished block."""
        state = {"num_full": encoded.num_full, "backbone": asdict(encoded.info)}
        save_checkpoint(self._path(block), {"vectors": encoded.vectors_BD}, state, self._keys[block.modality])

    def read(self, block: Block) -> EncodedBlock | None:
        """What :meth:`save` kept, or None where the block is not finished (for these inputs)."""
        stored = load_checkpoint(self._path(block), self._keys[block.modality])
        if stored is None:
            return None
        tensors, state = stored
        return EncodedBlock(tensors["vectors"], state["num_full"], BackboneInfo(**state["backbone"]))

    def unfinished(self, blocks: list[Block]) -> np.ndarray:
        """Which blocks are still to be encoded: ``(number of blocks,)`` bool."""
        return np.array([not has_checkpoint(self._path(block), self._keys[block.modality]) for block in blocks], dtype=bool)

    def assemble(self, source: ItemSource, blocks: list[Block], num_resumed: int) -> EmbeddedItems:
        """All vectors of a finished export.

        Args:
            source: the items.
            blocks: all of :func:`blocks_of`.
            num_resumed: how many were there before; for the log only.

        Raises:
            ArtifactError: a block is missing, or damaged.
            DataError: there is no item.
        """
        if not blocks:
            raise DataError("item vectors", "there is no item", "look at the filter's statistics")
        vectors: dict[Modality, np.ndarray] = {}
        infos: set[BackboneInfo] = set()
        num_full = 0
        for block in blocks:
            encoded = self.read(block)
            if encoded is None:
                raise ArtifactError(
                    str(self._path(block)), "was just there, and cannot be read", "delete it and run the same command again"
                )
            shape = len(source), encoded.vectors_BD.shape[1]
            for modality in MODALITIES:
                vectors.setdefault(modality, np.zeros(shape, dtype=np.float32))
            vectors[block.modality][block.rows] = encoded.vectors_BD.numpy()
            infos.add(encoded.info)
            num_full += encoded.num_full
        if len(infos) > 1:
            problem = f"come from {len(infos)} different backbones or settings"
            raise ArtifactError(str(self._folder), problem, "delete the folder, and see that all machines are set up alike")
        _log.info("%d items in %d blocks, %d of them taken from an earlier run", len(source), len(blocks), num_resumed)
        if num_full:
            _log.info("%d of %d texts fill backbone.max_text_tokens and were cut there", num_full, len(source))
        return EmbeddedItems(source.item_ids.copy(), vectors["image"], vectors["text"], source.shows_image.copy(), infos.pop())


def _hash_of(source: ItemSource) -> str:
    """Of the ids, of which items show an image, and of the words."""
    digest = hashlib.sha256(source.item_ids.tobytes() + source.shows_image.tobytes() + source.has_image.tobytes())
    for text in [source.image_prompt, source.prompt_hash, *source.texts(np.arange(len(source)))]:
        digest.update(f"{len(text)}\x1f{text}".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- encoding
@dataclass(frozen=True)
class BlockEncoder:
    """A model, ready to encode blocks.

    Attributes:
        backbone: makes inputs and pools.
        model: ``backbone.model``, or the PEFT model around it.
        params: the batch size.
        device: where the model is.
    """

    backbone: Backbone
    model: nn.Module
    params: ExportParams
    device: torch.device

    def prepare(self) -> None:
        """Put the model into evaluation mode, and compile the layers of its language model where the params ask for it.

        Raises:
            ConfigError: there is no compiler, the CPU has no vector instructions, or there is no layer to compile.
        """
        self.model.eval()
        if self.params.compile:
            if self.device.type == "cpu":
                _require_cpu_compiler()
            # what prepare_torch chose, told to the compiler as well
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
            _compile_layers(self.model, self.backbone.adapter_pattern("language"))

    def encode(self, source: ItemSource, modality: Modality, rows: np.ndarray) -> EncodedBlock:
        """Vectors of some rows, in their order.

        Batches hold sequences of alike length.  Reading, decoding and tokenising the next two runs in a thread
        while the model is busy with this one.

        Raises:
            ArtifactError: an image cannot be decoded.
            DataError: a vector is not finite.
            ConfigError: a batch does not fit into the device's memory.
        """
        backbone, batch_size = self.backbone, self.params.batch_size

        def inputs_of(places: np.ndarray) -> dict[str, Tensor]:
            if modality == "text":
                return backbone.text_inputs(source.texts(rows[places]))
            images = [image for image in source.images(rows[places]) if image is not None]
            assert len(images) == len(places), "rows without an image are left out before"
            return backbone.image_inputs(images, source.image_prompt)

        order = _by_length(modality, source, rows)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        encoded: list[Tensor] = []
        num_full = 0
        with torch.inference_mode():
            for inputs in read_ahead(map(inputs_of, batches), depth=2):
                if modality == "text":
                    num_full += int((inputs["attention_mask"].sum(1) >= backbone.info.max_text_tokens).sum())
                moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
                try:
                    encoded.append(backbone.encode(self.model, moved))
                except torch.OutOfMemoryError:
                    problem = f"{batch_size} items do not fit into the memory of {self.device}"
                    raise ConfigError("params.yaml: export_embeddings.batch_size", problem, "lower it") from None
            sorted_BD = torch.cat(encoded).to("cpu", torch.float32)
        vectors_BD = torch.empty_like(sorted_BD)
        vectors_BD[torch.from_numpy(order)] = sorted_BD
        bad = rows[~torch.isfinite(vectors_BD).all(1).numpy()]
        if len(bad):
            ids = ", ".join(str(item_id) for item_id in source.item_ids[bad[:5]])
            raise DataError(
                f"{modality} vectors",
                f"should be finite (got NaN or infinity for {len(bad)} items, e.g. item_id {ids})",
                "use backbone.dtype bfloat16 or float32, and look at the adapter's loss curve",
            )
        return EncodedBlock(vectors_BD, num_full, backbone.info)


def _by_length(modality: Modality, source: ItemSource, rows: np.ndarray) -> np.ndarray:
    """Order of the rows in which neighbours need about the same number of tokens; ties by place.

    Bytes stand for a text's tokens.  Images are brought to about one number of pixels by the backbone and keep their place.
    """
    if modality == "image":
        return np.arange(len(rows))
    return np.argsort([len(text.encode()) for text in source.texts(rows)], kind="stable")


def _require_cpu_compiler() -> None:
    """Raise where torch's compiler cannot work on the CPU, before it fails with pages of C++."""
    where = "params.yaml: export_embeddings.compile"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(where, "needs a C++ compiler on the CPU", "use false")
    # Without AVX2, torch writes C++ for this architecture that does not compile.
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise ConfigError(where, "needs a CPU with AVX2 or newer vector instructions", "use false")


def _compile_layers(model: nn.Module, adapter_pattern: str) -> None:
    """Compile the layers of the language model where they stand, for any batch and length.

    One layer at a time: they share their code, so the compiler works once, in seconds, whatever the depth.  The vision
    tower stays as it is, since the number of its windows decides what it runs.
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
