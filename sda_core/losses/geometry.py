"""Centering of the vectors in a loss, and calibration of the teacher's temperature for a given number of targets.

The pooled states of a generative model share one large direction: the cosine of two random items is near 1, every row of a
softmax over cosines is nearly uniform, and soft targets are not informative.  Without their mean, the same vectors have
informative cosines (Mu & Viswanath 2018, arXiv 1702.01417).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from sda_core.errors import TrainingError

Center = Literal["none", "batch", "running"]

MOMENTUM = 0.9
"""Momentum of the running mean after ten steps; before, it is the mean of all batches."""

_LOWEST, _HIGHEST = 1e-5, 1e3  # range of the search for a temperature
_HALVINGS = 60


class Centering(nn.Module):
    """Subtract a mean from the vectors of each modality, before they are scaled to unit length.

    ===========  ====================================================================================================
    ``none``     nothing is subtracted, as in the paper
    ``batch``    the mean of the batch; gradients pass through it
    ``running``  a moving average of the means of the batches, without gradient.  With ``m`` the mean of batch
                 ``n = 1, 2, ...``, the average moves by ``(m - average) * max(1 / n, 1 - MOMENTUM)``
    ===========  ====================================================================================================

    Start with ``batch``.  A running mean lags behind vectors that move fast, and because it has no gradient, a step may move
    all vectors in one direction: if images and texts do not match, they collapse.

    The mean is that of the whole batch: chunks and the parts of all processes are concatenated before.

    Args:
        center: see above.

    Attributes:
        means: the running means by name, ``(D,)``; part of the state of an unfinished run, see :meth:`state` and
            :meth:`restore`.
    """

    def __init__(self, center: Center) -> None:
        super().__init__()
        self.center: Center = center
        self.means: dict[str, Tensor] = {}
        self._num_batches: dict[str, int] = {}

    def forward(self, vectors: Mapping[str, Tensor], *, update: bool) -> dict[str, Tensor]:
        """The vectors without their means, at least float32.

        Args:
            vectors: ``(B, D)`` by name; each name has a separate running mean.
            update: whether to update the running means with this batch.  In both cases the updated means are applied, so
                that diagnostics before a step use the same vectors as the step.
        """
        wide = {name: x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)) for name, x_BD in vectors.items()}
        match self.center:
            case "none":
                return wide
            case "batch":
                return {name: x_BD - x_BD.mean(dim=0) for name, x_BD in wide.items()}
            case "running":
                return {name: x_BD - self._running(name, x_BD.detach(), update) for name, x_BD in wide.items()}
            case _:
                assert_never(self.center)

    def _running(self, name: str, x_BD: Tensor, update: bool) -> Tensor:
        number = self._num_batches.get(name, 0) + 1
        before_D = self.means.get(name)
        mean_D = x_BD.mean(dim=0)
        if before_D is not None:
            mean_D = before_D + (mean_D - before_D) * max(1 / number, 1 - MOMENTUM)
        if update:
            self.means[name], self._num_batches[name] = mean_D, number
        return mean_D

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The running means and their numbers of batches."""
        return dict(self.means), dict(self._num_batches)

    def restore(self, means: Mapping[str, Tensor], num_batches: Mapping[str, int]) -> None:
        """Restore a state returned by :meth:`state`."""
        self.means, self._num_batches = dict(means), dict(num_batches)


def effective_targets(log_teacher_NB: Tensor) -> float:
    """The exponential of the mean entropy of rows of ``log P (N, B)``: the effective number of targets, 1 to B."""
    return float(torch.special.entr(log_teacher_NB.double().exp()).sum(dim=-1).mean().exp())


def temperature_for(targets: float, num_targets: Callable[[float], float], batch_size: int) -> float:
    """The temperature at which a teacher has a given number of effective targets, by bisection of its logarithm.

    It is like the perplexity of t-SNE (van der Maaten & Hinton 2008), with one temperature for all rows; the entropy
    increases with the temperature.

    Args:
        targets: requested number, between 1 and the batch size.
        num_targets: returns the number of effective targets at a temperature.
        batch_size: number of rows of a batch.

    Returns:
        The temperature, with a relative error of at most 1e-6.

    Raises:
        TrainingError: no temperature from 1e-5 to 1e3 gives that number, for example if many rows are equal.
    """
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    fewest, most = num_targets(_LOWEST), num_targets(_HIGHEST)
    if not fewest < targets < most:
        raise TrainingError(
            "params.yaml: train_adapter loss section: teacher_targets",
            f"should be between {fewest:.3g} and {most:.3g}, which the teacher has on these items in batches of {batch_size}"
            f" (got {targets:g})",
            "choose a number between them, or set teacher_targets to null and a teacher_temperature",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if num_targets(math.exp(middle)) < targets:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
