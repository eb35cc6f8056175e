"""The inputs of a training step: the batch, its chunks, and their model inputs, prepared ahead in a thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor, nn

from sda_core.alignment.vision_cache import VisionCache
from sda_core.errors import ConfigError
from sda_core.items import ItemSource
from sda_core.modalities import MODALITIES, Modality
from sda_core.params import TrainingParams
from sda_core.processes import Processes
from sda_core.read_ahead import read_ahead
from sda_core.seed import generator

if TYPE_CHECKING:
    from PIL import Image


class Encoder(Protocol):
    """The part of a backbone that training uses; see ``sda_core.backbones.Backbone``."""

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence per image."""
        ...

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence per text."""
        ...

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled vectors ``(B, D)``, not normalised."""
        ...


def batch_rows(rows: np.ndarray, step: int, training: TrainingParams) -> np.ndarray:
    """The ``(B,)`` rows of a step, over all processes: slices of one seeded permutation per epoch."""
    per_epoch = len(rows) // training.batch_size
    epoch, place = divmod(step, per_epoch)
    permuted = rows[generator(training.seed, "batches", epoch).permutation(len(rows))]
    return permuted[place * training.batch_size : (place + 1) * training.batch_size]


@dataclass(frozen=True)
class Chunks:
    """The chunks of every batch that this process computes.

    The batch is split at multiples of ``micro_batch_size``, and all processes take equally many consecutive chunks.  So
    neither the split nor the draws of a chunk depend on the number of processes.  Without a ``micro_batch_size`` a process
    has one chunk, its whole part.

    Attributes:
        bounds: bounds (from, to) of this process's chunks in the batch.
        first: number of the first of them among all chunks.
    """

    bounds: tuple[tuple[int, int], ...]
    first: int

    @property
    def twice(self) -> bool:
        """Whether there are several chunks, so that each is embedded a second time, for its gradient."""
        return len(self.bounds) > 1


def chunks_of(training: TrainingParams, team: Processes) -> Chunks:
    """The chunks of this process.

    Raises:
        ConfigError: the chunks cannot be shared evenly.
    """
    B, m = training.batch_size, training.micro_batch_size
    cuts = [B * index // team.count for index in range(team.count + 1)] if m is None else [*range(0, B, m), B]
    bounds = list(itertools.pairwise(cuts))
    if len(bounds) % team.count or any(start == stop for start, stop in bounds):
        where = "params.yaml: train_adapter.training"
        if m is None:
            problem = f"batch_size should be at least {team.count}, one item for each process of this launch (got {B})"
            raise ConfigError(where, problem, f"raise batch_size, or start at most {B} processes")
        problem = (
            f"batch_size {B} in chunks of micro_batch_size {m} should give a multiple of {team.count} chunks, as many for each "
            f"process of this launch (got {len(bounds)})"
        )
        fitting = [size for size in range(min(m, B), 0, -1) if -(-B // size) % team.count == 0]
        advice = f"set micro_batch_size to {fitting[0]}" if fitting else f"raise batch_size to {team.count} or more"
        raise ConfigError(where, problem, f"{advice}, or start another number of processes")
    each = len(bounds) // team.count
    first = team.index * each
    return Chunks(tuple(bounds[first : first + each]), first)


@dataclass(frozen=True)
class Ready:
    """Inputs of a chunk, on the CPU.

    Attributes:
        inputs: the backbone's inputs.
        keys: for images, the ``content_keys`` of the rows; else empty.
    """

    inputs: dict[str, Tensor]
    keys: np.ndarray


class InputMaker:
    """Makes the inputs of chunks.

    Args:
        backbone: makes inputs from images and texts.
        source: the items.
        cache: cached outputs of the vision tower; None to run the tower on the images.
    """

    def __init__(self, backbone: Encoder, source: ItemSource, cache: VisionCache | None) -> None:
        self._backbone = backbone
        self._source = source
        self._cache = cache

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """The ``content_keys`` of some rows, without model inputs."""
        return self._source.content_keys(rows)

    def make(self, modality: Modality, rows: np.ndarray) -> Ready:
        """Inputs of one modality of some rows, all of which have an image."""
        source = self._source
        if modality == "text":
            return Ready(self._backbone.text_inputs(source.texts(rows)), np.empty(0, dtype=np.int64))
        keys = self.keys(rows)
        if self._cache is not None:
            return Ready(self._cache.inputs(rows, source.image_prompt), keys)
        images = [image for image in source.images(rows) if image is not None]
        assert len(images) == len(rows)
        return Ready(self._backbone.image_inputs(images, source.image_prompt), keys)

    def stream(self, jobs: Iterable[tuple[Modality, np.ndarray]]) -> Iterator[Ready]:
        """The inputs of all jobs in order; each is prepared while the previous one is in use."""
        return read_ahead(itertools.starmap(self.make, jobs))


def jobs(rows: np.ndarray, first: int, training: TrainingParams, chunks: Chunks) -> Iterator[tuple[Modality, np.ndarray]]:
    """The chunks to embed from step ``first`` on, in the order of use; see ``sda_core.losses.grad_cache``."""
    for step in range(first, training.num_steps):
        batch = batch_rows(rows, step, training)
        for _ in range(2 if chunks.twice else 1):
            for modality in MODALITIES:
                for start, stop in chunks.bounds:
                    yield modality, batch[start:stop]
