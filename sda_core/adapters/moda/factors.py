"""What the gates give: their values by modality, and the factors of all layers of a pass, computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sda_core.adapters.moda.layer import MoDALayer


def learned_gate(embedding_MK: Tensor, weight_EK: Tensor) -> Tensor:
    """``softmax(W_g Emb_m)`` for every modality: ``(..., M, E)`` of ``(..., M, K)`` and ``(..., E, K)``, in float32 at least.

    It is a handful of numbers, and each scales a whole expert, so it is never worth half precision: neither that of an
    adapter in bfloat16 nor that of ``torch.autocast``.
    """
    dtype = torch.promote_types(embedding_MK.dtype, torch.float32)
    device_type = embedding_MK.device.type
    mixed = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if mixed else nullcontext():
        return torch.softmax(embedding_MK.to(dtype) @ weight_EK.to(dtype).mT, dim=-1)


def fixed_gate(kind: str, num_modalities: int, num_experts: int, like: Tensor) -> Tensor:
    """The gates that are not learned: ``(M, E)``, in the type and on the device of ``like``.

    ``uniform`` gives every expert ``1 / E``; ``onehot`` gives the experts of a modality 1 and the others 0.
    """
    if kind == "uniform":
        return like.new_full((num_modalities, num_experts), 1.0 / num_experts)
    owned = num_experts // num_modalities
    return torch.eye(num_modalities, dtype=like.dtype, device=like.device).repeat_interleave(owned, dim=1)


@dataclass(frozen=True)
class _Kind:
    """What layers must have in common to be computed together."""

    shapes: tuple[torch.Size, torch.Size]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    position: int
    rank_per_expert: int
    scale: float


@dataclass
class _Layer:
    """One layer's factor, and the parameters that it is of."""

    embedding: nn.Parameter
    gate: nn.Parameter
    versions: tuple[int, int]
    factor_R: Tensor
    taken: bool = False

    def is_of(self, embedding: Tensor, gate: Tensor) -> bool:
        """Whether those are the same parameters, with the same values."""
        return embedding is self.embedding and gate is self.gate and (embedding._version, gate._version) == self.versions


class SharedFactors:
    """Factors ``(alpha / r) g(m)`` by layer, for the passes of one modality.

    The first layer of a pass that asks has them computed for all.  A layer that asks a second time is in another pass, and
    they are computed anew; so they are where a parameter has changed since.

    Args:
        layers: of the adapters; none where parameters are not whole between the layers' passes.
        modality_name: the modality of everything, or None: with ids each layer computes its own.
    """

    def __init__(self, layers: Sequence[MoDALayer], modality_name: str | None) -> None:
        self._layers = layers if modality_name is not None else ()
        self._known = {id(layer) for layer in self._layers}
        self._modality_name = modality_name
        self._passes: dict[tuple[str, bool, bool], dict[int, _Layer]] = {}

    def take(self, layer: MoDALayer, name: str) -> Tensor | None:
        """The factor ``(R,)`` of a layer's adapter; None where the layer has to compute its own."""
        if id(layer) not in self._known or name not in layer.moda_gate:
            return None
        key = name, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        own = self._passes.get(key, {}).get(id(layer))
        if own is None or own.taken or not own.is_of(layer.moda_embedding[name], layer.moda_gate[name]):
            self._passes[key] = self._compute(name)
            own = self._passes[key].get(id(layer))
        if own is None:
            return None
        own.taken = True
        return own.factor_R

    def _compute(self, name: str) -> dict[int, _Layer]:
        """Of all layers; none where one has something else in a parameter's place, as ``functional_call`` puts it there."""
        groups: dict[_Kind, list[tuple[MoDALayer, Any, Any]]] = {}
        for layer in self._layers:
            if name not in layer.moda_gate:
                continue
            config, embedding, gate = layer.moda_config[name], layer.moda_embedding[name], layer.moda_gate[name]
            plain = all(type(one) is nn.Parameter and not one.is_inference() for one in (embedding, gate))
            if not plain or self._modality_name not in config.modalities:
                self._known = set()
                return {}
            kind = _Kind(
                (embedding.shape, gate.shape),
                (embedding.dtype, gate.dtype),
                gate.device,
                config.modalities.index(self._modality_name),
                config.rank_per_expert,
                config.scale,
            )
            groups.setdefault(kind, []).append((layer, embedding, gate))
        found = {}
        for kind, members in groups.items():
            embeddings, gates = [member[1] for member in members], [member[2] for member in members]
            factors = _Factors.apply(kind.position, kind.rank_per_expert, kind.scale, *embeddings, *gates)
            for (layer, embedding, gate), factor_R in zip(members, factors, strict=True):
                found[id(layer)] = _Layer(embedding, gate, (embedding._version, gate._version), factor_R)
        return found


class _Factors(torch.autograd.Function):
    """``scale * softmax(W_g Emb_m)`` of many layers, each number repeated for the ranks of its expert.

    Inputs are ``L`` embeddings ``(M, K)`` and then ``L`` gates ``(E, K)``, outputs ``L`` vectors ``(R,)``.  Computed in
    float32 at least, under autocast too (see :func:`learned_gate`).

    Backward may run any number of times, each for some of the layers: parts of a model have losses of their own, and a
    re-entrant checkpoint runs backward part by part.  So what it needs is kept beside autograd, which would free it after the
    first; it is a copy, so it stays what it was.
    """

    @staticmethod
    def forward(ctx: Any, position: int, repeats: int, scale: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The factors by layer."""
        num_layers = len(parameters) // 2
        embedding_LMK, weight_LEK = torch.stack(parameters[:num_layers]), torch.stack(parameters[num_layers:])
        gates_LE = learned_gate(embedding_LMK, weight_LEK)[:, position]
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.parameters = (position, repeats, scale), parameters
        ctx.kept = embedding_LMK, weight_LEK, gates_LE
        return (gates_LE * scale).repeat_interleave(repeats, dim=-1).unbind()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the layers that have one."""
        (position, repeats, scale), num_layers = ctx.settings, len(grad_outputs)
        used = [number for number, grad in enumerate(grad_outputs) if grad is not None]
        grads: list[Tensor | None] = [None] * (2 * num_layers)
        if not used:
            return (None, None, None, *grads)
        if torch.is_grad_enabled():  # somebody wants second derivatives: autograd's own way
            for number in used:
                embedding, weight = ctx.parameters[number], ctx.parameters[num_layers + number]
                factor_R = (learned_gate(embedding, weight)[position] * scale).repeat_interleave(repeats)
                wanted = [place for place in (number, num_layers + number) if ctx.needs_input_grad[3 + place]]
                inputs = [ctx.parameters[place] for place in wanted]
                found = torch.autograd.grad(factor_R, inputs, grad_outputs[number], create_graph=True) if inputs else ()
                for place, grad in zip(wanted, found, strict=True):
                    grads[place] = grad
            return (None, None, None, *grads)
        embedding_LMK, weight_LEK, gates_LE = (whole if len(used) == num_layers else whole[used] for whole in ctx.kept)
        grad_LE = torch.stack([grad for grad in grad_outputs if grad is not None]).to(gates_LE.dtype)
        grad_LE = grad_LE.unflatten(-1, (-1, repeats)).sum(-1) * scale
        logits_LE = torch.ops.aten._softmax_backward_data(grad_LE, gates_LE, -1, gates_LE.dtype)
        grad_weight_LEK = logits_LE.unsqueeze(-1) * embedding_LMK[:, None, position]
        grad_embedding_LMK = torch.zeros_like(embedding_LMK, dtype=gates_LE.dtype)
        grad_embedding_LMK[:, position] = (logits_LE.unsqueeze(-2) @ weight_LEK.to(gates_LE.dtype)).squeeze(-2)
        for offset, whole in ((0, grad_embedding_LMK), (num_layers, grad_weight_LEK)):
            rounded = whole.to(ctx.parameters[offset].dtype)
            for number, grad in zip(used, rounded.unbind(), strict=True):
                if ctx.needs_input_grad[3 + offset + number]:
                    grads[offset + number] = grad
        return (None, None, None, *grads)
