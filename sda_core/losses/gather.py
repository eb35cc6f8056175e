"""Gather the rows of all processes of a launch into one batch, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x_BD: Tensor) -> Tensor:
    """Differentiable all-gather over the default group of ``torch.distributed``; all its processes must call it.

    The gradient is that of the *mean* of the processes' losses of the gathered rows.  If all compute the same loss, as with a
    contrastive loss of the global batch, this is the gradient of that loss: a process gets its own rows of the gradient of
    the global batch, and the parameters' gradients must be **summed** over the processes afterwards.

    Args:
        x_BD: ``(B, ...)``; B may differ between processes, other sizes and the dtype must be equal.

    Returns:
        ``(sum of all B, ...)``, rows in the order of the process index; the tensor itself without a process group.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x_BD
    gathered: Tensor = _Gather.apply(x_BD)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Forward: all-gather.  Backward: the own rows of the mean of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        """All-gather blocks padded to equal length, which every backend supports."""
        count, index = dist.get_world_size(), dist.get_rank()
        lengths = [torch.zeros(1, dtype=torch.long, device=x_BD.device) for _ in range(count)]
        dist.all_gather(lengths, torch.tensor([len(x_BD)], device=x_BD.device))
        rows = [int(length) for length in lengths]
        padded = x_BD.new_zeros((max(rows), *x_BD.shape[1:]))
        padded[: len(x_BD)] = x_BD
        blocks = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(blocks, padded)
        ctx.start, ctx.length, ctx.count = sum(rows[:index]), len(x_BD), count
        return torch.cat([block[:length] for block, length in zip(blocks, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # type: ignore[override]
        """The own rows of the mean gradient."""
        grad = grad_outputs[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.length] / ctx.count
