"""Gate values of an adapter by layer, modality and expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.adapters import gate_values
from sda_core.adapters.moda import MoDALayer
from sda_core.errors import TrainingError


@dataclass(frozen=True)
class GateMass:
    """The gate of one modality in one layer.

    Attributes:
        layer: name of the adapted module.
        modality: name of the modality.
        mass: weight of each expert, E values (sum 1; with ``onehot``, 1 for each expert of the modality).
        num_effective: effective number of experts, the exponential of the entropy: 1 = one expert, E = equal weights.
    """

    layer: str
    modality: str
    mass: tuple[float, ...]
    num_effective: float


def gate_mass(model: nn.Module, adapter_name: str = "default") -> list[GateMass]:
    """The gate of every adapted layer and modality, in the model's order.

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    names = modality_names(model, adapter_name)
    found = []
    for layer, gates_ME in gate_values(model, adapter_name).items():
        share_ME = gates_ME / gates_ME.sum(dim=-1, keepdim=True)
        effective_M = torch.special.entr(share_ME).sum(dim=-1).exp()
        for name, mass_E, effective in zip(names, gates_ME.tolist(), effective_M.tolist(), strict=True):
            found.append(GateMass(layer, name, tuple(mass_E), effective))
    return found


def gate_similarity(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Cosine between the gates of every two modalities, by layer: ``(M, M)``, 1 = same mixture, 0 = no expert in common.

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    units = {layer: F.normalize(gates_ME, dim=-1) for layer, gates_ME in gate_values(model, adapter_name).items()}
    return {layer: unit_ME @ unit_ME.T for layer, unit_ME in units.items()}


def modality_names(model: nn.Module, adapter_name: str = "default") -> tuple[str, ...]:
    """The modalities of an adapter, in the order of their ids.

    Raises:
        TrainingError: no layer has such an adapter.
    """
    for module in model.modules():
        if isinstance(module, MoDALayer) and adapter_name in module.moda_config:
            return tuple(module.moda_config[adapter_name].modalities)
    raise TrainingError(
        "adapter", f"{type(model).__name__} has no MoDA adapter {adapter_name!r}", "build or load the adapter first"
    )
