"""Gradient caching: a contrastive loss of a large batch in the memory of a small one (Gao et al. 2021, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Chunk = Callable[[], Tensor]
"""A function that embeds some rows, ``(b, D)``; calls with the same random numbers return the same vectors."""


def cached_backward(
    chunks: Sequence[Sequence[Chunk]], loss: Callable[..., Tensor], after: Callable[[int], None] | None = None
) -> Tensor:
    """The backward pass of ``loss(x, y, ...)``, with the graph of one chunk at a time.

    1. Every chunk is embedded without a graph; the state of the random generators is saved before each.
    2. The loss of all vectors is computed, and its gradient with respect to them is stored.
    3. Every chunk is embedded again with the same random numbers (so dropout is the same), and run backward with its rows of
       that gradient.

    The sum is exactly the gradient of the loss of the whole batch, because a vector depends on its own chunk only.  A modality
    with a single chunk keeps its graph and is embedded once.  With :func:`~sda_core.losses.gather` inside ``loss``, and
    parameters' gradients summed over the processes, the batch is that of all processes.

    Args:
        chunks: for each modality the functions that embed its rows, in order.
        loss: function of one matrix ``(B, D)`` per modality that returns a scalar.
        after: called with the index of a modality after the backward pass of its chunks.

    Returns:
        The loss, detached.  Gradients are added to the parameters, including those of the loss itself; no gradients are added
        if the loss is not finite.
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
    value = value.detach()  # frees the loss's graph, quadratic in the batch, before those of the chunks are built
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
    """The GPUs whose generators a chunk may use."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices())]


def _restore(state: Sequence[Tensor]) -> None:
    cpu, *others = state
    torch.set_rng_state(cpu)
    for device, own in zip(_devices(), others, strict=True):
        torch.cuda.set_rng_state(own, device)
