"""Vision attention in one call for all windows of a length, instead of one call a window.

A packed vision tower (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) lays the patches of all pictures into one row and attends inside
windows only.  Without FlashAttention transformers cuts the row and calls SDPA once a window: a batch of 32 pictures is
some hundred small calls a layer.  Here the windows are sorted by length, and each length is one batched SDPA call.

transformers hands the windows' borders to an attention function only where the function's name holds the word "flash"
(``transformers.utils.generic.is_flash_attention_requested``), and cuts the row itself everywhere else; hence the name
under which ours is registered.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "sda_window_batches_not_flash"
"""The registered name; see the module's first lines for the word in it."""


@dataclass(frozen=True)
class _Plan:
    """How a packed row is cut.

    Attributes:
        groups: (number of windows, length of each), in the order of the sorted row.
        order_L: where each place of the sorted row comes from; None where all windows have one length.
        back_L: the inverse of ``order_L``.
    """

    groups: tuple[tuple[int, int], ...]
    order_L: Tensor | None
    back_L: Tensor | None


@lru_cache(maxsize=8)  # every layer of a pass asks for the same one or two
def _plan(borders: tuple[int, ...], device: torch.device) -> _Plan:
    """The cut for windows ``borders[i] .. borders[i + 1]``."""
    windows = [(stop - start, start) for start, stop in itertools.pairwise(borders) if stop > start]
    lengths = sorted({length for length, _ in windows})
    groups = tuple((sum(length == each for each, _ in windows), length) for length in lengths)
    if len(groups) < 2:
        return _Plan(groups, None, None)
    # a tensor made in inference mode could not be saved for a backward pass later
    with torch.inference_mode(mode=False):
        order_L = torch.cat([torch.arange(start, start + length) for length, start in sorted(windows)])
        back_L = torch.empty_like(order_L)
        back_L[order_L] = torch.arange(len(order_L))
        return _Plan(groups, order_L.to(device), back_L.to(device))


def batched_window_attention(
    module: nn.Module,  # noqa: ARG001 (the interface)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside the windows of a packed row, without a mask; an attention function in transformers' sense.

    Args:
        module: the attention module; not looked at.
        query: ``(1, H, L, D)``.
        key: as ``query``.
        value: as ``query``.
        attention_mask: must be None.
        scaling: of the products; None for ``D ** -0.5``.
        dropout: of the attention weights.
        cu_seq_lens_q: ``(number of windows + 1,)`` borders, from 0 to L.

    Returns:
        ``(1, L, H, D)``, and None for the attention weights.

    Raises:
        ValueError: a mask was given, or no borders.
    """
    if attention_mask is not None or cu_seq_lens_q is None:
        raise ValueError("batched_window_attention is for packed vision attention: no mask, and cu_seq_lens_q")
    plan = _plan(tuple(cu_seq_lens_q.tolist()), query.device)
    parts_HLD = [tensor[0] for tensor in (query, key, value)]
    if plan.order_L is not None:
        parts_HLD = [tensor.index_select(1, plan.order_L) for tensor in parts_HLD]
    attended: list[Tensor] = []
    start = 0
    for num_windows, length in plan.groups:
        stop = start + num_windows * length
        # (H, W * L, D) as (W, H, L, D), windows in the place of the batch: a view
        windows = [tensor[:, start:stop].unflatten(1, (num_windows, length)).transpose(0, 1) for tensor in parts_HLD]
        out_WHLD = F.scaled_dot_product_attention(*windows, dropout_p=dropout, scale=scaling)
        attended.append(out_WHLD.transpose(1, 2).flatten(0, 1))
        start = stop
    out_LHD = torch.cat(attended) if len(attended) > 1 else attended[0]
    if plan.back_L is not None:
        out_LHD = out_LHD.index_select(0, plan.back_L)
    return out_LHD.unsqueeze(0), None


def use_batched_vision_attention(model: Any) -> None:
    """Make a model's vision tower use :func:`batched_window_attention`, in the place of SDPA.

    The language model keeps its own attention.  Nothing happens where the tower is not a packed one (SigLIP, CLIP: they
    batch pictures anyway), or uses another implementation than SDPA (FlashAttention takes the borders itself).  The
    choice is not stored with a checkpoint.

    Args:
        model: a transformers model with a ``vision_config``.
    """
    config = getattr(model.config, "vision_config", None)
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return
    if not any(_is_packed(module) and getattr(module, "config", None) is config for module in model.modules()):
        return
    AttentionInterface.register(IMPLEMENTATION, batched_window_attention)
    model.set_attn_implementation({"vision_config": IMPLEMENTATION})


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is an attention over a packed row."""
    return "Attention" in type(module).__name__ and "cu_seqlens" in inspect.signature(module.forward).parameters
