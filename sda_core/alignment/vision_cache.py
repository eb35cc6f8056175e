"""What the frozen vision tower makes of each image, computed once and read from disk afterwards.

The tower does not learn, so every epoch would compute the same numbers.  They are kept in blocks of items, one safetensors
file each, beside the checkpoint of the run: a killed run goes on with the finished blocks, and several processes share
the work through the folder.  A read maps the file and takes the item's part, so memory does not grow with the shop.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sda_core.artifacts import replace_file
from sda_core.backbones import VisionTower
from sda_core.errors import ArtifactError, ConfigError
from sda_core.items import ItemSource
from sda_core.log import progress
from sda_core.params import TrainingParams
from sda_core.processes import Processes

_BLOCK_ITEMS = 256
_OPEN_FILES = 64


class VisionCache:
    """The tower's results of all items that show an image.

    Args:
        backbone: runs the tower.
        source: the items.
        rows: of the items, ascending.
        folder: of the blocks.
        fingerprint: of the run's inputs; blocks of other inputs are made anew.
    """

    def __init__(self, backbone: VisionTower, source: ItemSource, rows: np.ndarray, folder: Path, fingerprint: str) -> None:
        self._backbone = backbone
        self._source = source
        self._rows = rows
        self._folder = folder
        self._fingerprint = fingerprint
        self._open: OrderedDict[int, Any] = OrderedDict()

    def fill(self, batch_size: int, team: Processes) -> None:
        """Make the blocks that are missing, shared between the processes.

        Args:
            batch_size: images a pass.
            team: the processes; all must call this.

        Raises:
            ArtifactError: an image cannot be decoded, or a block of another process is not to be seen here.
        """
        num_blocks = -(-len(self._rows) // _BLOCK_ITEMS)
        own = range(team.index, num_blocks, team.count)
        with team.raise_on_all_ranks(), progress(len(own), "vision features", "blocks") as bar:
            for block in own:
                if not self._is_whole(block):
                    self._make(block, batch_size)
                bar.update()
        with team.raise_on_all_ranks():
            for block in range(num_blocks):
                if not self._is_whole(block):
                    raise ArtifactError(
                        str(self._path(block)),
                        "was made by another process, and is not to be seen here",
                        "give all machines one project folder, or set train_adapter.training.vision_cache to never",
                    )

    def inputs(self, rows: np.ndarray, prompt: str) -> dict[str, Tensor]:
        """Model inputs of some of the items."""
        places = np.searchsorted(self._rows, rows)
        return self._backbone.image_inputs_from([self._read(int(place)) for place in places], prompt)

    def _make(self, block: int, batch_size: int) -> None:
        rows = self._rows[block * _BLOCK_ITEMS : (block + 1) * _BLOCK_ITEMS]
        tensors: dict[str, Tensor] = {}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            features = self._backbone.vision_features([image for image in self._source.images(part) if image is not None])
            assert features is not None
            for row, one in zip(part, features, strict=True):
                tensors |= {f"{self._source.item_ids[row]}.{name}": tensor.contiguous() for name, tensor in one.items()}
        with replace_file(self._path(block)) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self._fingerprint})

    def _is_whole(self, block: int) -> bool:
        """Whether a block is there and of these inputs; a torn file is not, its header says how long it should be."""
        path = self._path(block)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
                return (handle.metadata() or {}).get("fingerprint") == self._fingerprint
        except (SafetensorError, OSError):
            return False

    def _read(self, place: int) -> dict[str, Tensor]:
        block = place // _BLOCK_ITEMS
        if block not in self._open:
            self._open[block] = safe_open(self._path(block), framework="pt")  # type: ignore[no-untyped-call]
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(block)
        handle, prefix = self._open[block], f"{self._source.item_ids[self._rows[place]]}."
        return {name.removeprefix(prefix): handle.get_tensor(name) for name in handle.keys() if name.startswith(prefix)}  # noqa: SIM118

    def _path(self, block: int) -> Path:
        return self._folder / f"vision-{block:05d}.safetensors"


def open_cache(
    backbone: object, source: ItemSource, rows: np.ndarray, training: TrainingParams, folder: Path, fingerprint: str
) -> VisionCache | None:
    """The cache, where the params ask for one; not filled yet.

    ``auto`` asks for it where the backbone can run its tower alone, nothing in the tower learns, the model is not sharded,
    and what is left of the run shows every item twice or more on average.

    Raises:
        ConfigError: ``vision_cache`` is ``always``, and there cannot be one.
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
    shown = training.num_steps * training.batch_size  # of the whole run, so that a resumed one decides alike
    if not can or sharded or (training.vision_cache == "auto" and shown < 2 * len(rows)):
        return None
    assert isinstance(backbone, VisionTower)
    return VisionCache(backbone, source, rows, folder, fingerprint)
