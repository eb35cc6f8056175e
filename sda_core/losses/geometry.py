"""The origin of the vectors that a loss compares, and the temperature that gives its teacher a wanted number of targets.

The pooled states of a generative model share one large direction: the cosine of two random items is then near 1, every row of a
softmax over cosines is nearly uniform, and a loss with soft targets has nothing to teach.  Without their mean the same vectors
have cosines that mean something (Mu & Viswanath 2018, arXiv 1702.01417).
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
"""How much of the running mean a step keeps, once there were ten steps; before, it is the mean of all batches."""

_LOWEST, _HIGHEST = 1e-5, 1e3  # temperatures that the search looks at
_HALVINGS = 60


class Centering(nn.Module):
    """Subtracts a mean from the vectors of each modality, before they are scaled to unit length.

    ===========  ====================================================================================================
    ``none``     nothing is subtracted, as in the paper
    ``batch``    the mean of the batch; gradients pass through it
    ``running``  an average of the means of the batches so far; it carries no gradient.  With ``m`` the mean of batch
                 ``n = 1, 2, ...``, the average moves by ``(m - average) * max(1 / n, 1 - MOMENTUM)``
    ===========  ====================================================================================================

    ``batch`` is the one to begin with.  A running mean lags behind vectors that move fast, and since no gradient passes through
    it, a step may move all vectors one way: on images and texts that do not match, they become alike.

    The mean is that of the whole batch, so chunks and processes do not change it: they are put together before.

    Args:
        center: see above.

    Attributes:
        means: the running means by name, ``(D,)``; they belong to an unfinished run, see :meth:`state` and :meth:`restore`.
    """

    def __init__(self, center: Center) -> None:
        super().__init__()
        self.center: Center = center
        self.means: dict[str, Tensor] = {}
        self._num_batches: dict[str, int] = {}

    def forward(self, vectors: Mapping[str, Tensor], *, update: bool) -> dict[str, Tensor]:
        """The vectors without their means, in float32 at least.

        Args:
            vectors: ``(B, D)`` by name; each name has a running mean of its own.
            update: whether the running means learn from this batch.  They are applied as if they had, so a look at a batch
                before its step sees what the step sees.
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
        """The running means and how many batches each has seen."""
        return dict(self.means), dict(self._num_batches)

    def restore(self, means: Mapping[str, Tensor], num_batches: Mapping[str, int]) -> None:
        """Put back what :meth:`state` gave."""
        self.means, self._num_batches = dict(means), dict(num_batches)


def effective_targets(log_teacher_NB: Tensor) -> float:
    """The exponent of the mean entropy of rows of ``log P (N, B)``: the effective number of targets, 1 to B."""
    return float(torch.special.entr(log_teacher_NB.double().exp()).sum(dim=-1).mean().exp())


def temperature_for(targets: float, num_targets: Callable[[float], float], batch_size: int) -> float:
    """The temperature at which a teacher has a wanted number of effective targets, by bisection of its logarithm.

    The perplexity of t-SNE (van der Maaten & Hinton 2008), with one temperature for all rows: entropy grows with temperature.

    Args:
        targets: wanted, between 1 and the batch size.
        num_targets: the number of effective targets at a temperature.
        batch_size: rows of a batch.

    Returns:
        The temperature, to 1e-6 of itself or better.

    Raises:
        TrainingError: no temperature from 1e-5 to 1e3 gives that number, as where many rows are equal.
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
