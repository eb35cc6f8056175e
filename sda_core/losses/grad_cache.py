"""Gradient caching: a contrastive loss of a large batch in the memory of a small one (Gao et al. 2021, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Chunk = Callable[[], Tensor]
"""Embeds some rows: ``(b, D)``, the same rows and the same vectors at every call with the same random numbers."""


def cached_backward(
    chunks: Sequence[Sequence[Chunk]], loss: Callable[..., Tensor], after: Callable[[int], None] | None = None
) -> Tensor:
    """The backward pass of ``loss(x, y, ...)``, with the graph of one chunk at a time.

    1. Every chunk is embedded without a graph; the state of the random generators is noted before each.
    2. The loss is taken on all vectors, and its gradient with respect to them is kept.
    3. Every chunk is embedded again, with the random numbers of its first time (so dropout draws the same), and run
       backward with its rows of that gradient.

    The sum is the gradient of the loss of the whole batch, exactly, because a vector depends on its own chunk only.  A
    modality of one chunk keeps its graph and is embedded once.  With :func:`~sda_core.losses.gather` inside ``loss``, and
    parameters' gradients summed over the processes, the batch is that of all processes.

    Args:
        chunks: for each modality the functions that embed its rows, in order.
        loss: of one matrix ``(B, D)`` a modality; a scalar.
        after: called with the number of a modality when its chunks have been run backward.

    Returns:
        The loss, detached.  Gradients are added to the parameters, those of the loss's own included; where the loss is not
        finite, none is.
    """
    vectors: list[list[Tensor]] = []
    states: list[list[list[Tensor]]] = []
    for parts in chunks:
        kept = len(parts) == 1
        vectors.append([])
        states.append([])
        for part in parts:
            states[-1].append([] if kept else _random_state())
            with torch.set_grad_enabled(kept):
                vectors[-1].append(part())
    leaves = [torch.cat([one.detach() for one in parts]).requires_grad_() for parts in vectors]
    with torch.enable_grad():
        value = loss(*leaves)
    if not bool(torch.isfinite(value.detach())):
        return value.detach()
    value.backward()
    value = value.detach()  # the loss's graph, quadratic in the batch, is not needed while the chunks' is built
    for modality, (parts, leaf_BD) in enumerate(zip(chunks, leaves, strict=True)):
        start = 0
        for place, part in enumerate(parts):
            own_BD = vectors[modality][place]
            grad_BD = None if leaf_BD.grad is None else leaf_BD.grad[start : start + len(own_BD)]
            start += len(own_BD)
            if len(parts) > 1:
                with torch.random.fork_rng(_devices()), torch.enable_grad():
                    _restore(states[modality][place])
                    own_BD = part()
            if own_BD.requires_grad and grad_BD is not None:
                own_BD.backward(grad_BD)
        vectors[modality] = []
        if after is not None:
            after(modality)
    return value


def _devices() -> list[int]:
    """The GPU whose generator a chunk may draw from."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices())]


def _restore(state: Sequence[Tensor]) -> None:
    cpu, *others = state
    torch.set_rng_state(cpu)
    for device, own in zip(_devices(), others, strict=True):
        torch.cuda.set_rng_state(own, device)
