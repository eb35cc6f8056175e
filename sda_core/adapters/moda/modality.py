"""The modality of a pass: the context ``with modality(...)``, and its support for gradient checkpointing.

A linear layer has no argument for the modality, so a context around the pass sets it, and layers read :func:`current_block`.
Gradient checkpointing runs layers a second time during ``backward``, when that block is closed and another one may be open.
So only blocks that were opened in the same ``backward`` call count there, and a layer without one raises;
:func:`checkpoint_contexts` opens the blocks of the first run again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sda_core.adapters.moda.gates import GatedLayer, SharedFactors
from sda_core.errors import TrainingError


# ------------------------------------------------------------------------------------------------- its value
@dataclass(frozen=True, eq=False)
class Modality:
    """The modality of a pass: one name for the whole batch, or one id per row, or one id per token.

    Attributes:
        name: the modality of the whole batch, or None.
        ids: ids into ``modalities``, int64 on the CPU, ``(B,)`` one per row or ``(B, L)`` one per token, or None.
        marker: a number that differs between modalities, as a tensor that autograd can save.
        span: the lowest and the highest id; None without ids.
    """

    name: str | None
    ids: Tensor | None
    marker: Tensor
    span: tuple[int, int] | None = None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(value: str | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Modality:
        """Build the modality from the argument of ``with modality(...)``.

        Ids are read once, here, so that ids on a GPU cost one synchronisation per block and none per layer.  They are
        copied, so that later changes of the user's tensor have no effect.

        Raises:
            TrainingError: the value is neither a name nor a vector or matrix of integers.
        """
        with torch.inference_mode(False):  # a block may be made for inference and used again for training
            if isinstance(value, str):
                return Modality(value, None, _marker(value))
            try:
                ids = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            except (ValueError, TypeError) as error:  # rows of different lengths, or no numbers at all
                raise TrainingError("modality", f"should be a name, or ids in a vector or a matrix ({error})") from None
            if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TrainingError(
                    "modality",
                    "should be a name, or a vector or matrix of integer ids, one per row (B,) or one per token (B, L) "
                    f"(got shape {tuple(ids.shape)}, {ids.dtype})",
                )
            ids = ids.detach().to("cpu", torch.long, copy=True).contiguous()
            span = (int(ids.min()), int(ids.max())) if ids.numel() else None
            return Modality(None, ids, _marker((tuple(ids.shape), ids.numpy().tobytes())), span)

    def ids_on(self, device: torch.device) -> Tensor:
        """The ids on a layer's device, moved once per block, because a copy in each layer would stall a GPU."""
        assert self.ids is not None
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.ids.to(device)
        return self._copies[device]

    def name_among(self, modalities: Sequence[str]) -> str | None:
        """The one modality of the batch; None if ids differ."""
        if self.span is None or self.span[0] != self.span[1]:
            return self.name
        return modalities[self.span[0]]

    def __str__(self) -> str:
        if self.ids is None:
            return repr(self.name)
        return f"ids of {len(self.ids)} rows" + (f" of {self.ids.shape[1]} tokens" if self.ids.dim() == 2 else "")


def _marker(content: object) -> Tensor:
    # on the CPU even if torch.set_default_device is set: each layer reads it
    return torch.tensor(hash(content), device="cpu")


# ------------------------------------------------------------------------------------------------- open blocks
class Owner:
    """Identity shared by the MoDA layers of one adapted model; a copy of the model gets its own.

    It does not list the layers: they refer to it, and a reference cycle would keep a deleted model in GPU memory.

    Attributes:
        sharded: whether parameters of the model were found sharded; then only some layers are whole at a time.
    """

    def __init__(self) -> None:
        self.sharded = False


@dataclass(frozen=True, eq=False)
class Block:
    """An open ``with modality(...)``: its adapters, the modality, and the factors of their layers."""

    owners: frozenset[Owner]
    value: Modality
    factors: SharedFactors


class _State(threading.local):
    """The open blocks of this thread, each with the ``backward`` call in which it was opened (-1: none)."""

    blocks: tuple[tuple[Block, int], ...] = ()


_state = _State()


def _backward_call() -> int:
    """Number of the ``backward`` call running in this thread, -1 outside of ``backward`` (torch has no public API for it)."""
    return torch._C._current_graph_task_id()


def recomputing() -> bool:
    """Whether gradient checkpointing is recomputing a region during ``backward``."""
    return _backward_call() != -1


def current_block(owner: Owner) -> Block | None:
    """The innermost open block for the layers of an adapted model, or None.

    Args:
        owner: identity shared by the layers of the model.
    """
    call = _backward_call()
    for block, opened_in in reversed(_state.blocks):
        if opened_in == call and owner in block.owners:
            return block
    return None


class _Opened:
    """Context in which blocks are open; reusable and re-entrant."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._blocks = blocks
        self._before: list[tuple[tuple[Block, int], ...]] = []

    def __enter__(self) -> None:
        self._before.append(_state.blocks)
        _state.blocks = (*_state.blocks, *((block, _backward_call()) for block in self._blocks))

    def __exit__(self, *error: object) -> None:
        _state.blocks = self._before.pop()


class modality(_Opened):  # noqa: N801 (reads as a statement: ``with modality(model, "image")``)
    """Context that sets the modality of the input for the MoDA layers of a model.

    ::

        with modality(model, "image"):
            image_BD = model(**image_inputs)

    Args:
        model: a PEFT model with a MoDA adapter, or any module that contains one.
        value: a name in the adapter's ``modalities``; or integer ids into them, a vector ``(B,)`` with one per row, or a matrix
            ``(B, L)`` with one per token for sequences that hold images and text.  The adapted layers' inputs must have
            these leading dimensions.

    Blocks can be nested; the innermost counts.  Gradient checkpointing needs :func:`checkpoint_contexts`.

    Raises:
        TrainingError: the model has no MoDA layer, or the name or an id is not among the adapter's modalities.
    """

    def __init__(self, model: nn.Module, value: str | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        super().__init__(())
        modules = list(model.modules())
        layers = [module for module in modules if isinstance(module, GatedLayer)]
        if not layers:
            raise TrainingError(
                "modality", f"{type(model).__name__} has no MoDA layer", "build the adapter first, with get_peft_model"
            )
        self._value = Modality.of(value)
        _check_known(self._value, layers)
        self._owners: frozenset[Owner] = frozenset(layer.moda_owner for layer in layers)
        if _any_sharded(modules, layers):
            for owner in self._owners:
                owner.sharded = True
        self._layers = [] if any(owner.sharded for owner in self._owners) else layers

    def __enter__(self) -> None:
        self._blocks = (Block(self._owners, self._value, SharedFactors(self._layers, self._value.name)),)
        super().__enter__()


def _any_sharded(modules: Sequence[nn.Module], layers: Sequence[GatedLayer]) -> bool:
    """Whether parameters may be sharded or offloaded between their layers' passes (FSDP, DeepSpeed, CPU offload)."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # loaded only if FSDP is in use
    if fsdp is not None and any(isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in modules):
        return True
    return not all(
        type(weight) is nn.Parameter and weight.dim() == 2 and weight.device.type != "meta"
        for layer in layers
        for name, weight in layer.moda_gate.items()
        if name in layer.active_adapters
    )


def _check_known(value: Modality, layers: Sequence[GatedLayer]) -> None:
    known = {
        tuple(layer.moda_config[name].modalities)
        for layer in layers
        for name in layer.active_adapters
        if name in layer.moda_config
    }
    for names in known:
        if value.name is not None and value.name not in names:
            raise TrainingError("modality", f"should be one of {', '.join(names)} (got {value.name!r})")
        if value.span is not None:
            low, high = value.span
            if low < 0 or high >= len(names):
                raise TrainingError(
                    "modality", f"ids should be from 0 to {len(names) - 1} ({', '.join(names)}; got {low} to {high})"
                )


# ------------------------------------------------------------------------------------------------- checkpointing
def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Keep the modality under gradient checkpointing: a region is recomputed in the blocks in which it first ran.

    ``model.gradient_checkpointing_enable()`` of a PEFT model uses it.  In your own code:
    ``torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False, context_fn=checkpoint_contexts)``.
    """
    call = _backward_call()
    return nullcontext(), _Opened(tuple(block for block, opened_in in _state.blocks if opened_in == call))


class _SameModality(torch.autograd.Function):
    """The identity; its backward raises if a checkpoint was recomputed with another modality.

    The marker is stored twice: on the graph node, and among the saved tensors, which a checkpoint recomputes.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, marker: Tensor) -> Tensor:
        """The tensor itself."""
        ctx.save_for_backward(marker)
        ctx.marker = int(marker)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The gradient itself.

        Raises:
            TrainingError: the checkpoint was recomputed with another modality.
        """
        (marker,) = ctx.saved_tensors
        if int(marker) != ctx.marker:
            raise TrainingError(
                "gradient checkpointing",
                "a region was recomputed with another modality than it first ran with, so its gradients would be wrong",
                "pass context_fn=sda_core.adapters.checkpoint_contexts to checkpoint, or open the block inside the function",
            )
        return grad_outputs[0], None


def same_modality(tensor: Tensor, value: Modality) -> Tensor:
    """Return the tensor; its backward raises if a checkpoint was recomputed with another modality.

    This only checks; it changes no value and no gradient.  Outside of checkpoints (detected by their saved-tensor hooks) it
    does nothing, because nothing is recomputed there and an autograd function is expensive.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:  # pyright: ignore[reportAttributeAccessIssue]
        return tensor
    return cast("Tensor", _SameModality.apply(tensor, value.marker))
