"""Which modality a forward pass is in, and how a gate turns that into one factor per rank of the adapter.

The modality is not an argument of a linear layer, so it is put around the pass: ``with modality(model, "image"): ...``.
Gradient checkpointing runs layers a second time during ``backward``, when that block has long ended and when passes
of several modalities are under way in one graph.  Three measures keep this right:

* while a block is open, every tensor that autograd saves is packed together with the open blocks
  (``torch.autograd.graph.saved_tensors_hooks``).  A checkpointed region saves its inputs this way and unpacks them
  right before it recomputes, which tells the recomputation the modality of its first run.  This holds for both kinds
  of ``torch.utils.checkpoint`` and for every model that uses it.  Hooks that are in force already (a checkpoint around
  the block, ``save_on_cpu``) stay so, because ours pass every tensor on to them;
* a layer that runs during ``backward`` without such information raises;
* every gated product that might be recomputed remembers its modality twice, once with the graph node and once among the
  saved tensors, which a checkpoint recomputes.  If the two differ, ``backward`` raises instead of returning gradients of
  the wrong modality.

What the gates give is computed for all layers at once, by the first layer of a pass that asks: each is a handful of
numbers, and eight small operations a layer, forward and back, cost more than the layer's own matmuls wherever a pass is
bound by calls (measured: 2.1 x LoRA's step at the width of a 7B model on a GPU).
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sda_core.adapters.moda.factors import SharedFactors
from sda_core.errors import TrainingError

if TYPE_CHECKING:
    from sda_core.adapters.moda.layer import MoDALayer


# ------------------------------------------------------------------------------------- the open modality
@dataclass(frozen=True)
class Modality:
    """The modality of a pass: one name for the whole batch, or one id a row, or one id a token.

    Attributes:
        name: the modality of everything, or None.
        ids: ids into ``modalities``, int64 on the CPU, ``(B,)`` one a row or ``(B, L)`` one a token, or None.
        marker: a number that differs between different passes, as a tensor that autograd can save.
        span: the lowest and the highest id; None without ids.
    """

    name: str | None
    ids: Tensor | None
    marker: Tensor
    span: tuple[int, int] | None = None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(value: str | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Modality:
        """From what the user wrote.

        Ids are read once, here, so that ids on a GPU cost one wait a block and none a layer; they are copied, so that
        the marker stays true whatever happens to the user's tensor.

        Raises:
            TrainingError: neither a name nor a vector or matrix of integers.
        """
        with torch.inference_mode(False):  # a block may be made for inference and used again for training
            if isinstance(value, str):
                return Modality(value, None, _marker(value.encode()))
            try:
                ids = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            except (ValueError, TypeError) as error:  # rows of different lengths, or no numbers at all
                raise TrainingError("modality", f"should be a name, or ids in a vector or a matrix ({error})") from None
            if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TrainingError(
                    "modality",
                    "should be a name, or a vector or matrix of integer ids, one a row (B,) or one a token (B, L) "
                    f"(got shape {tuple(ids.shape)}, {ids.dtype})",
                )
            ids = ids.detach().to("cpu", torch.long, copy=True).contiguous()
            span = (int(ids.min()), int(ids.max())) if ids.numel() else None
            return Modality(None, ids, _marker(f"{tuple(ids.shape)}".encode(), ids.numpy().tobytes()), span)

    def ids_on(self, device: torch.device) -> Tensor:
        """The ids on a layer's device, moved there once a block: a layer that moved them would keep a GPU waiting."""
        assert self.ids is not None
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.ids.to(device)
        return self._copies[device]

    def name_among(self, modalities: Sequence[str]) -> str | None:
        """The one modality that everything has; None where ids differ."""
        if self.span is None or self.span[0] != self.span[1]:
            return self.name
        return modalities[self.span[0]]

    def __str__(self) -> str:
        if self.ids is None:
            return repr(self.name)
        return f"ids of {len(self.ids)} rows" + (f" of {self.ids.shape[1]} tokens" if self.ids.dim() == 2 else "")


def _marker(*content: bytes) -> Tensor:
    digest = hashlib.sha256(b"".join(content)).digest()
    # on the CPU even where torch.set_default_device says otherwise: each layer reads it
    return torch.tensor(int.from_bytes(digest[:8], "little") >> 1, device="cpu")


class Owner:
    """Identity shared by the MoDA layers of one adapted model; a copy of the model gets one of its own.

    Attributes:
        sharded: parameters of the model were seen in pieces once, so they may be whole for some layers at a time only.
    """

    def __init__(self) -> None:
        self.sharded = False


@dataclass(frozen=True, eq=False)
class Block:
    """An open ``with modality(...)``.

    Attributes:
        owners: of the adapters that it is about.
        value: the modality.
        graph_task: the backward call that it was opened in (-1: none).
        factors: of those adapters' layers, computed for all of them at once.
    """

    owners: frozenset[Owner]
    value: Modality
    graph_task: int
    factors: SharedFactors


class _State(threading.local):
    """The open blocks of this thread, and those handed over by the tensors that this thread unpacked last.

    A GPU's part of ``backward`` runs in a thread of its own; there only the second one is ever filled.
    """

    def __init__(self) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.replayed: tuple[Block, ...] = ()
        self.replayed_task = -1


_state = _State()


def _graph_task() -> int:
    """Number of the ``backward`` call that runs in this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


_Hook = Callable[[Any], Any]


def _hooks_in_force() -> tuple[_Hook, _Hook] | None:
    return cast("tuple[_Hook, _Hook] | None", torch._C._autograd._top_saved_tensors_default_hooks(True))  # pyright: ignore[reportAttributeAccessIssue]


def _hooks() -> saved_tensors_hooks:
    """Hooks that pack a tensor together with the open blocks, and otherwise do what the hooks in force do."""
    outer = _hooks_in_force()
    if outer is None:
        return saved_tensors_hooks(_pack, _unpack)
    pack_tensor, unpack_tensor = outer

    def pack(tensor: Tensor) -> tuple[Any, tuple[Block, ...]]:
        return pack_tensor(tensor), _state.blocks

    def unpack(packed: tuple[Any, tuple[Block, ...]]) -> Tensor:
        tensor = unpack_tensor(packed[0])
        _state.replayed, _state.replayed_task = packed[1], _graph_task()  # last: unpacking may recompute by itself
        return tensor

    return saved_tensors_hooks(pack, unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int, tuple[Block, ...]]:
    """Of the hooks that are the only ones: called for every tensor that is saved, so it does nothing else."""
    return tensor, tensor._version, _state.blocks


def _unpack(packed: tuple[Tensor, int, tuple[Block, ...]]) -> Tensor:
    tensor, version, _state.replayed = packed
    _state.replayed_task = _graph_task()
    if tensor._version != version:  # autograd leaves this check to the hooks where there are any
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation "
            f"(a {tensor.dtype} tensor of shape {tuple(tensor.shape)} is at version {tensor._version}, expected {version})"
        )
    return tensor


def current_block(owner: Owner) -> Block | None:
    """The block that an adapter's forward pass is in, or None.

    Args:
        owner: what the layers of one adapted model share.
    """
    task = _graph_task()
    blocks = _state.blocks
    if task != -1:  # a recomputation: blocks that were opened before this backward say nothing about it
        opened_here = tuple(block for block in blocks if block.graph_task == task)
        blocks = (*(_state.replayed if _state.replayed_task == task else ()), *opened_here)
    for block in reversed(blocks):
        if owner in block.owners:
            return block
    return None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_graphs(function: _Function) -> _Function:
    """Keep ``torch.compile`` out: which block is open is no constant of a graph, as it would take it to be."""
    return cast("_Function", torch.compiler.disable(function))


class modality:  # noqa: N801 (reads as a statement: ``with modality(model, "image")``)
    """Context in which the MoDA layers of a model know what their input is.

    ::

        with modality(model, "image"):
            image_BD = model(**image_inputs)

    Args:
        model: a PEFT model with a MoDA adapter, or any module that contains one.
        value: a name in the adapter's ``modalities``; or integer ids into them, a vector ``(B,)`` for one a row, or a matrix
            ``(B, L)`` for one a token, where a sequence holds pictures and words.  The adapted layers' inputs must have
            these first dimensions.

    Blocks can be nested; the innermost counts.  Gradient checkpointing, of either kind, sees the block in which the
    forward pass ran, whatever is open when ``backward`` is called.

    Raises:
        TrainingError: the model has no MoDA layer, or the name or an id is not among the adapter's modalities.
    """

    def __init__(self, model: nn.Module, value: str | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        from sda_core.adapters.moda.layer import MoDALayer

        modules = list(model.modules())
        layers = [module for module in modules if isinstance(module, MoDALayer)]
        if not layers:
            raise TrainingError(
                "modality", f"{type(model).__name__} has no MoDA layer", "build the adapter first, with get_peft_model"
            )
        self._value = Modality.of(value)
        _check_known(self._value, layers)
        self._owners = frozenset(layer.moda_owner for layer in layers)
        if _any_sharded(modules, layers):
            for owner in self._owners:
                owner.sharded = True
        self._layers = [] if any(owner.sharded for owner in self._owners) else layers
        self._entered: list[tuple[tuple[Block, ...], saved_tensors_hooks]] = []

    def __enter__(self) -> None:
        hooks = _hooks()
        hooks.__enter__()
        self._entered.append((_state.blocks, hooks))
        block = Block(self._owners, self._value, _graph_task(), SharedFactors(self._layers, self._value.name))
        _state.blocks = (*_state.blocks, block)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _state.blocks, hooks = self._entered.pop()
        hooks.__exit__(kind, error, trace)


def _any_sharded(modules: Sequence[nn.Module], layers: Sequence[MoDALayer]) -> bool:
    """Whether parameters may be in pieces or elsewhere between their layers' passes (FSDP, DeepSpeed, an offload).

    Those made in inference mode count too: they have no version by which a change would be noticed.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # loaded by whoever uses it
    if fsdp is not None and any(isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in modules):
        return True
    return not all(
        type(weight) is nn.Parameter and weight.dim() == 2 and weight.device.type != "meta" and not weight.is_inference()
        for layer in layers
        for name, weight in layer.moda_gate.items()
        if name in layer.active_adapters
    )


def _check_known(value: Modality, layers: Sequence[MoDALayer]) -> None:
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


# ------------------------------------------------------------------------------------------- the product
def gated_product(hidden: Tensor, factor: Tensor, marker: Tensor) -> Tensor:
    """``hidden * factor``; by :class:`GatedProduct` where the pass might be recomputed."""
    top = _hooks_in_force()
    if not torch.is_grad_enabled() or (top is not None and top[0] is _pack):  # a recomputation would have its hooks on top
        return hidden * factor
    return cast("Tensor", GatedProduct.apply(hidden, factor, marker))


class GatedProduct(torch.autograd.Function):
    """``hidden * factor``, which makes sure that its backward belongs to the modality of its forward.

    ``hidden (..., R)``; ``factor`` ``(R,)``, ``(B, 1, ..., R)`` for one modality a row, or ``(B, L, 1, ..., R)`` for one a
    token; ``marker`` of the modality.  The product is of the wider of the two types.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, factor: Tensor, marker: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(hidden, factor, marker)
        ctx.marker = int(marker)
        return hidden * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        """Gradients of both factors.

        Raises:
            TrainingError: a checkpointed region was recomputed with another modality than it first ran with.
        """
        (grad,) = grad_outputs
        hidden, factor, marker = ctx.saved_tensors
        if int(marker) != ctx.marker:
            raise TrainingError(
                "gradient checkpointing",
                "a region was recomputed with another modality than it first ran with, so its gradients would be wrong",
                "open `with modality(...)` inside the checkpointed function, or checkpoint the blocks without nesting them",
            )
        grad_factor = None
        if ctx.needs_input_grad[1]:
            grad_factor = (grad * hidden).sum_to_size(factor.shape)
        return (grad * factor if ctx.needs_input_grad[0] else None), grad_factor, None
