"""The gate values of each modality, and the factors of all layers of a pass, computed at once.

The factors of a layer are ``(alpha / r) g(m)``, each value repeated for the ranks of its expert.  Layer by layer that takes
eight small operations, forward and backward, which cost more than the layer's own matmuls if a pass is launch-bound
(measured: 2.1 x LoRA's step at the width of a 7B model on a GPU).  So the first layer of a pass computes the factors of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sda_core.adapters.moda.config import MoDAConfig
from sda_core.errors import ConfigError


def learned_gate(config: MoDAConfig, embedding_MW: Tensor, weight_EW: Tensor) -> Tensor:
    """Learned gates: ``(..., M, E)`` from ``(..., M, W)`` and ``(..., E, W)``, at least float32.

    ``modality`` is ``softmax(W_g Emb_m)``.

    A gate has few values and each scales a whole expert, so it is never computed in half precision, neither for an adapter
    in bfloat16 nor under ``torch.autocast``.

    Raises:
        ConfigError: unknown kind of learned gate.
    """
    dtype = torch.promote_types(embedding_MW.dtype, torch.float32)
    with _without_autocast(embedding_MW.device.type):
        match config.gate:
            case "modality":
                return torch.softmax(embedding_MW.to(dtype) @ weight_EW.to(dtype).mT, dim=-1)
            case _:
                raise _no_formula(config, "learned_gate")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    mixed = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if mixed else nullcontext()


def equal_share(config: MoDAConfig) -> float | None:
    """The gate value if it is the same for all experts and modalities, else None; a pass then needs no gate tensor.

    ``uniform`` is ``1 / E``.  With one expert every kind is 1.
    """
    return 1.0 / config.num_experts if config.gate == "uniform" or config.num_experts == 1 else None


def fixed_gate(config: MoDAConfig, like: Tensor) -> Tensor:
    """Gates that are not learned: ``(M, E)``, with the dtype and device of ``like``.

    :func:`equal_share` if it is not None; ``onehot`` gives the experts of a modality 1 and the others 0.

    Raises:
        ConfigError: unknown kind of fixed gate.
    """
    M, E = len(config.modalities), config.num_experts
    share = equal_share(config)
    if share is not None:
        return like.new_full((M, E), share)
    match config.gate:
        case "onehot":
            return torch.eye(M, dtype=like.dtype, device=like.device).repeat_interleave(E // M, dim=1)
        case _:
            raise _no_formula(config, "fixed_gate")


def _no_formula(config: MoDAConfig, function: str) -> ConfigError:
    return ConfigError(
        "MoDAConfig.gate", f"{config.gate!r} has no formula in {function}", "add one to sda_core/adapters/moda/gates.py"
    )


def factors(gates: Tensor, config: MoDAConfig) -> Tensor:
    """The factor of each rank, scale ``alpha / r`` included: ``(..., R)`` from gates ``(..., E)``."""
    return (gates * config.scale).unsqueeze(-1).expand(*gates.shape, config.rank_per_expert).flatten(-2)


class GatedLayer(BaseTunerLayer):
    """The attributes of an adapted layer that its gates need, by adapter name; :class:`MoDALayer` fills them."""

    moda_owner: Any
    moda_config: dict[str, MoDAConfig]
    moda_embedding: nn.ParameterDict
    moda_gate: nn.ParameterDict

    def gate_parameters(self, adapter_name: str) -> GateParameters | None:
        """The gate parameters of an adapter; None if the gate is not learned or a parameter is replaced by another tensor.

        ``functional_call`` and sharding replace parameters, and a parameter made in inference mode has no version.
        """
        if adapter_name not in self.moda_gate:
            return None
        embedding, gate = self.moda_embedding[adapter_name], self.moda_gate[adapter_name]
        if any(type(one) is not nn.Parameter or one.is_inference() for one in (embedding, gate)):
            return None
        return GateParameters(embedding, gate, embedding._version, gate._version)


class GateParameters(NamedTuple):
    """Parameters of a gate with their autograd version counters."""

    embedding: nn.Parameter
    gate: nn.Parameter
    embedding_version: int
    gate_version: int

    def is_same_as(self, other: GateParameters) -> bool:
        """Whether the other ones are the same parameters with the same values."""
        return self.embedding is other.embedding and self.gate is other.gate and self[2:] == other[2:]


class SharedFactors:
    """Factors by layer, for the passes of one modality.

    The first layer of a pass triggers the computation for all layers, and each layer pops its own factors.  If a layer finds
    none, it is in the next pass, and all are computed again; likewise after a parameter has changed.

    Args:
        layers: the adapted layers; empty if parameters are sharded or offloaded between the layers' passes.
        modality_name: the modality of the whole batch; None with ids, for which each layer computes its own factors.
    """

    def __init__(self, layers: Iterable[GatedLayer], modality_name: str | None) -> None:
        self._layers = dict.fromkeys(layers) if modality_name is not None else {}
        self._modality_name = modality_name
        self._waiting: dict[tuple[str, bool, bool], dict[GatedLayer, tuple[GateParameters, Tensor]]] = {}

    def pop_or_compute(self, layer: GatedLayer, name: str) -> Tensor | None:
        """Return and remove the factors ``(R,)`` of a layer's adapter; if missing, compute those of all layers first.

        None if the layer has to compute its own.
        """
        parameters = layer.gate_parameters(name) if layer in self._layers else None
        if parameters is None:
            return None
        mode = name, torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # tensors made in one mode do not fit another
        found = self._waiting.get(mode, {}).pop(layer, None)
        if found is None or not found[0].is_same_as(parameters):
            self._waiting[mode] = self._compute(name)
            found = self._waiting[mode].pop(layer, None)
        return None if found is None else found[1]

    def _compute(self, name: str) -> dict[GatedLayer, tuple[GateParameters, Tensor]]:
        """Compute the factors of all layers; layers with equal shapes are stacked."""
        alike: dict[tuple[Any, ...], list[tuple[GatedLayer, GateParameters]]] = {}
        for layer in self._layers:
            parameters = layer.gate_parameters(name)
            if parameters is None or self._modality_name not in layer.moda_config[name].modalities:
                continue
            config, (embedding, gate) = layer.moda_config[name], parameters[:2]
            kind = config.gate, config.modalities.index(self._modality_name), config.scale, config.rank_per_expert
            tensors = embedding.shape, embedding.dtype, gate.shape, gate.dtype, gate.device
            alike.setdefault((*kind, *tensors), []).append((layer, parameters))
        found = {}
        for (_, position, *_), members in alike.items():
            config = members[0][0].moda_config[name]
            embeddings, gates = zip(*(parameters[:2] for _, parameters in members), strict=True)
            computed = _FactorsOfLayers.apply(position, config, *embeddings, *gates)
            for (layer, parameters), factors_R in zip(members, computed, strict=True):
                found[layer] = parameters, factors_R
        return found


class _FactorsOfLayers(torch.autograd.Function):
    """Factors of one modality for ``N`` layers: ``N`` vectors ``(R,)`` from ``N`` embeddings ``(M, W)`` and gates ``(E, W)``.

    Backward may run several times, each time for some of the layers: parts of a model may have separate losses, and passes of
    one block may share factors.  Plain autograd functions would free their saved tensors after the first backward, and under
    checkpointing would save them in another region when recomputed.  So this function keeps its own copy of the few inputs
    and differentiates on demand.
    """

    @staticmethod
    def forward(ctx: Any, position: int, config: MoDAConfig, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The factors by layer."""
        ctx.set_materialize_grads(False)
        ctx.position, ctx.config, ctx.parameters = position, config, parameters
        ctx.stacks = _stacks(parameters, range(len(parameters) // 2))
        return _stacked_factors(ctx.stacks, position, config).unbind()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the layers that have one."""
        num_layers, second = len(grad_outputs), torch.is_grad_enabled()  # enabled in backward: second derivatives
        used = [number for number, grad in enumerate(grad_outputs) if grad is not None]
        grads: list[Tensor | None] = [None] * (2 * num_layers)
        if used:
            grad_NR = torch.stack([grad for grad in grad_outputs if grad is not None])
            with torch.enable_grad(), _without_autocast(grad_NR.device.type):
                if second:
                    stacks = _stacks(ctx.parameters, used)
                else:
                    stacks = [whole.detach() if len(used) == num_layers else whole[used] for whole in ctx.stacks]
                stacks = [stack.requires_grad_() for stack in stacks]
                factors_NR = _stacked_factors(stacks, ctx.position, ctx.config)
                by_stack = torch.autograd.grad(factors_NR, stacks, grad_NR, create_graph=second)
            for offset, whole in zip((0, num_layers), by_stack, strict=True):
                for number, grad in zip(used, whole.unbind(), strict=True):
                    grads[offset + number] = grad
        return (None, None, *grads)


def _stacks(parameters: tuple[Tensor, ...], numbers: Iterable[int]) -> list[Tensor]:
    """Embeddings ``(N, M, W)`` and gates ``(N, E, W)`` of some layers."""
    half = len(parameters) // 2
    return [torch.stack([parameters[offset + number] for number in numbers]) for offset in (0, half)]


def _stacked_factors(stacks: Sequence[Tensor], position: int, config: MoDAConfig) -> Tensor:
    embedding_NMW, weight_NEW = stacks
    return factors(learned_gate(config, embedding_NMW, weight_NEW)[:, position], config)
