"""Cache of the frozen vision tower's outputs, computed once per image (:mod:`~sda_core.alignment.item_blocks`).

The tower is not trained, so every epoch would compute the same outputs.  A read maps the file and takes one item's part, so
memory does not grow with the number of items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from sda_core.alignment.item_blocks import ItemBlocks
from sda_core.backbones import VisionTower
from sda_core.errors import ConfigError
from sda_core.items import ItemSource
from sda_core.params import TrainingParams
from sda_core.processes import Processes


class VisionCache:
    """The tower's outputs for all items with an image.

    Args:
        backbone: runs the tower.
        source: the items.
        rows: rows of the items, ascending.
        folder: folder of the blocks.
        fingerprint: hash of the run's inputs; blocks with another one are computed again.
    """

    def __init__(self, backbone: VisionTower, source: ItemSource, rows: np.ndarray, folder: Path, fingerprint: str) -> None:
        self._backbone = backbone
        self._source = source
        self._blocks = ItemBlocks("vision", rows, folder, fingerprint)

    def fill(self, batch_size: int, team: Processes) -> None:
        """Compute the missing blocks, shared between the processes.

        Args:
            batch_size: images per pass.
            team: the processes; all must call this.

        Raises:
            ArtifactError: an image cannot be decoded, or a block of another process is not visible here.
        """
        advice = "give all machines one project folder, or set train_adapter.training.vision_cache to never"
        self._blocks.fill(lambda rows: self._compute(rows, batch_size), team, advice=advice)

    def inputs(self, rows: np.ndarray, prompt: str) -> dict[str, Tensor]:
        """Model inputs of some of the items."""
        return self._backbone.image_inputs_from([self._read(int(row)) for row in rows], prompt)

    def _compute(self, rows: np.ndarray, batch_size: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            features = self._backbone.vision_features([image for image in self._source.images(part) if image is not None])
            assert features is not None
            for row, one in zip(part, features, strict=True):
                tensors |= {f"{self._source.item_ids[row]}.{name}": tensor.contiguous() for name, tensor in one.items()}
        return tensors

    def _read(self, row: int) -> dict[str, Tensor]:
        handle, _ = self._blocks.opened(row)
        prefix = f"{self._source.item_ids[row]}."
        return {name.removeprefix(prefix): handle.get_tensor(name) for name in handle.keys() if name.startswith(prefix)}  # noqa: SIM118


def open_cache(
    backbone: object, source: ItemSource, rows: np.ndarray, training: TrainingParams, folder: Path, fingerprint: str
) -> VisionCache | None:
    """Open the cache if the params enable it; it is not filled yet.

    ``auto`` enables it if the backbone can run its tower alone, no part of the tower is trained, the model is not sharded,
    and the run uses every item twice or more on average.

    Raises:
        ConfigError: ``vision_cache`` is ``always``, but a cache is not possible.
    """
    if training.vision_cache == "never":
        return None
    can = isinstance(backbone, VisionTower) and backbone.vision_features([]) is not None
    sharded = training.sharding != "none"
    if training.vision_cache == "always" and (sharded or not can):
        problem = "is 'always', and " + (
            "the model is sharded"
            if sharded
            else f"a {type(backbone).__name__} has no frozen vision tower that can be run by itself"
        )
        raise ConfigError("params.yaml: train_adapter.training.vision_cache", problem, "set it to auto")
    shown = training.num_steps * training.batch_size  # of the whole run, so that a resumed one decides the same
    if not can or sharded or (training.vision_cache == "auto" and shown < 2 * len(rows)):
        return None
    assert isinstance(backbone, VisionTower)
    return VisionCache(backbone, source, rows, folder, fingerprint)
