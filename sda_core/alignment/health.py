"""Warnings at the end of a training run, each with a remedy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.adapters import adapter_is_zero, gate_values
from sda_core.alignment.check import Batch
from sda_core.modalities import MODALITIES

_log = logging.getLogger(__name__)

_SWING = 0.1
_SAME = 1e-5
_MORE_TARGETS = 3.0


class GateWatch:
    """Detects gates that oscillate instead of settling.

    A swing is a gate value that moves by more than 0.1 between two records and by more than 0.1 back until the next one.
    """

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._moves: dict[str, Tensor] = {}
        self.swings: dict[str, int] = {}

    def record(self, model: nn.Module) -> None:
        """Record the current gate values."""
        now = gate_values(model)
        for name, gate_ME in now.items():
            if name in self._last:
                move_ME = gate_ME - self._last[name]
                if name in self._moves:
                    back_ME = (self._moves[name] * move_ME < 0) & (torch.minimum(self._moves[name].abs(), move_ME.abs()) > _SWING)
                    self.swings[name] = self.swings.get(name, 0) + int(back_ME.any())
                self._moves[name] = move_ME
        self._last = now


def warn(
    model: nn.Module,
    moved: Mapping[str, bool],
    gates: GateWatch,
    sample: Sequence[Batch],
    targets: tuple[float, float],
    batch_size: int,
) -> None:
    """Log warnings about a finished run.

    Args:
        model: the model with the adapter.
        moved: for each modality, whether its pass ever had a gradient.
        gates: the recorded gate values.
        sample: embeddings of some items with the adapter and without.
        targets: effective targets per row of the teacher, in the first and in the last step.
        batch_size: batch size of the training.
    """
    if adapter_is_zero(model):
        _log.warning(
            "the adapter is still zero: embeddings equal the base model's; raise the learning rate or the number of steps"
        )
    for name in MODALITIES:
        if not moved[name]:
            _log.warning("the %s pass never produced a gradient; check its inputs and the adapter's target layers", name)
    swinging = [name for name, count in gates.swings.items() if count > 1]
    if swinging:
        _log.warning(
            "the gates of %d layers oscillate (first: %s); lower the learning rate, or try another seed",
            len(swinging),
            swinging[0],
        )
    first, last = targets
    if last > _MORE_TARGETS * first and last > batch_size / 2:
        _log.warning(
            "the teacher is nearly uniform (%.3g of %d effective targets, %.2g in the first step): embeddings are collapsing, "
            "as they do where images and texts do not match; set the loss's teacher_source to base, or check the items",
            last,
            batch_size,
            first,
        )
    for place, name in enumerate(MODALITIES):
        before_BD = F.normalize(torch.cat([batch.base[place] for batch in sample]).float())
        after_BD = F.normalize(torch.cat([(batch.image_BD, batch.text_BD)[place] for batch in sample]).float())
        if not adapter_is_zero(model) and float((before_BD - after_BD).abs().max()) < _SAME and moved[name]:
            _log.warning("the %s embeddings equal the base model's; raise the learning rate or the number of steps", name)
        if len(before_BD) > 1 and _spread(before_BD) < _SAME:  # all images are placeholders
            _log.warning("the backbone gives all %s inputs of the sample the same embedding: there is nothing to align", name)


def _spread(x_BD: Tensor) -> float:
    """Mean of ``1 - cosine`` over the pairs of different unit rows."""
    B = len(x_BD)
    return float((B * B - (x_BD @ x_BD.T).sum()) / (B * B - B))
