"""Item vectors of the backbone without its adapter, computed once per run.

They do not change during training, so a loss that uses them (``teacher_source: base``, ``keep_base``) needs no second pass per
step.  They are computed in table order, not in the order of the training batches.  So a vector differs from the one computed in
a training batch by rounding (padding), but never between runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sda_core.adapters import base_model, modality
from sda_core.alignment.inputs import Encoder, InputMaker
from sda_core.alignment.item_blocks import BLOCK_ITEMS, ItemBlocks
from sda_core.modalities import MODALITIES, Modality
from sda_core.processes import Processes


class BaseVectors:
    """Image and text vectors of some items by the backbone alone.

    Args:
        backbone: pools hidden states.
        model: the model with the adapter, which is disabled for these passes.
        maker: makes the model's inputs.
        rows: rows of the items, ascending; all items have an image.
        folder: folder of the blocks.
        fingerprint: hash of the run's inputs.
    """

    def __init__(
        self, backbone: Encoder, model: nn.Module, maker: InputMaker, rows: np.ndarray, folder: Path, fingerprint: str
    ) -> None:
        self._backbone = backbone
        self._model = model
        self._maker = maker
        self._blocks = ItemBlocks("base", rows, folder, fingerprint)

    def fill(self, batch_size: int, team: Processes, *, sharded: bool) -> None:
        """Compute the missing blocks, shared between the processes; all of them call this.

        Args:
            batch_size: items per pass; bit-equal results require equal values.
            team: the processes.
            sharded: whether the model's parameters are sharded over the processes, whose passes then wait for each other.

        Raises:
            ArtifactError: a block of another process is not visible here.
        """
        advice = "give all machines one project folder, or train with one machine"
        self._blocks.fill(lambda rows: self._compute(rows, batch_size), team, in_step=sharded, advice=advice)

    def of(self, name: Modality, rows: np.ndarray) -> Tensor:
        """``(B, D)`` vectors of some of the items, in the backbone's dtype, on the CPU."""
        found: list[Tensor] = []
        for row in rows:
            handle, place = self._blocks.opened(int(row))
            start = place % BLOCK_ITEMS
            found.append(handle.get_slice(name)[start : start + 1])
        return torch.cat(found)

    def pair(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Image and text vectors ``(B, D)`` of some of the items."""
        image_BD, text_BD = (self.of(name, rows).to(device) for name in MODALITIES)
        return image_BD, text_BD

    def _compute(self, rows: np.ndarray, batch_size: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in MODALITIES}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            for name in MODALITIES:
                ready = self._maker.make(name, part)
                with modality(self._model, name), base_model(self._model):
                    parts[name].append(self._backbone.encode(self._model, ready.inputs).cpu())
        return {name: torch.cat(found).contiguous() for name, found in parts.items()}
