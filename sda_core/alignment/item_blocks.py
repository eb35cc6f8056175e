"""Tensors of items that are computed once and then read from disk: blocks of items, one safetensors file each.

The files are next to the checkpoint of the run.  An interrupted run resumes with the finished blocks, and several processes
share the work through the folder.  The content of a block depends on its items only, not on the number of processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sda_core.artifacts import replace_file
from sda_core.errors import ArtifactError
from sda_core.log import progress
from sda_core.processes import Processes

BLOCK_ITEMS = 256
_OPEN_FILES = 64

Block = Callable[[np.ndarray], dict[str, Tensor]]
"""Computes the tensors of a block from its rows."""


class ItemBlocks:
    """The block files of some items.

    Args:
        name: prefix of the file names, also shown as the name of the progress.
        rows: rows of the items, ascending.
        folder: folder of the blocks.
        fingerprint: hash of the run's inputs; blocks with another one are computed again.
    """

    def __init__(self, name: str, rows: np.ndarray, folder: Path, fingerprint: str) -> None:
        self.rows = rows
        self._name = name
        self._folder = folder
        self._fingerprint = fingerprint
        self._open: OrderedDict[int, Any] = OrderedDict()

    def fill(self, compute: Block, team: Processes, *, in_step: bool = False, advice: str) -> None:
        """Compute the missing blocks, shared between the processes; all of them call this.

        Args:
            compute: computes the tensors of a block.
            team: the processes.
            in_step: whether every process computes equally many blocks, as a sharded model requires.
            advice: the remedy in the error message if a block of another process is not visible here.

        Raises:
            ArtifactError: a block of another process is not visible here.
        """
        num_blocks = -(-len(self.rows) // BLOCK_ITEMS)
        rounds = range(-(-num_blocks // team.count))
        missing = in_step and not all(self._is_whole(block) for block in range(num_blocks))
        with team.raise_on_all_ranks(), progress(len(rounds), self._name, "blocks") as bar:
            for turn in rounds:
                block = turn * team.count + team.index
                own = block < num_blocks and not self._is_whole(block)
                if own or missing:
                    block = min(block, num_blocks - 1)
                    tensors = compute(self.rows[block * BLOCK_ITEMS : (block + 1) * BLOCK_ITEMS])
                    if own:
                        with replace_file(self._path(block)) as temporary:
                            save_file(tensors, temporary, metadata={"fingerprint": self._fingerprint})
                bar.update()
        with team.raise_on_all_ranks():
            for block in range(num_blocks):
                if not self._is_whole(block):
                    raise ArtifactError(str(self._path(block)), "was made by another process and cannot be seen here", advice)

    def opened(self, row: int) -> tuple[Any, int]:
        """The open file that holds an item, and the item's index among all rows."""
        place = int(np.searchsorted(self.rows, row))
        block = place // BLOCK_ITEMS
        if block not in self._open:
            self._open[block] = safe_open(self._path(block), framework="pt")  # type: ignore[no-untyped-call]
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(block)
        return self._open[block], place

    def _is_whole(self, block: int) -> bool:
        """Whether a block exists, is complete (its header gives the file's length) and was made from these inputs."""
        path = self._path(block)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
                return (handle.metadata() or {}).get("fingerprint") == self._fingerprint
        except (SafetensorError, OSError):
            return False

    def _path(self, block: int) -> Path:
        return self._folder / f"{self._name}-{block:05d}.safetensors"
