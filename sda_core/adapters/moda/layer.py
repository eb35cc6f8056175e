"""The MoDA layer: a frozen linear map plus low-rank experts, mixed by a gate that sees the modality alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sda_core.adapters.moda.config import MoDAConfig
from sda_core.adapters.moda.gate import GatedProduct, Modality, Owner, current_modality, fixed_gate, learned_gate
from sda_core.errors import TrainingError

_INIT_STD = 0.01


class MoDALayer(BaseTunerLayer):
    """The adapter's parameters, for any number of named adapters.

    For a frozen map ``W0 (O, D)``, experts ``e`` of rank ``r_e`` and the modality ``m`` of the input,

    ``y = W0 x + (alpha / r) * sum_e g_e(m) B_e A_e x,    g(m) = softmax(W_g Emb_m)``

    (SDA, arXiv 2512.06883).  The gate does not depend on ``x``, so the experts of a modality are one LoRA of rank
    ``R = sum_e r_e`` with a diagonal in the middle: the ``A_e`` are stored stacked as ``(R, D)``, the ``B_e`` side by
    side as ``(O, R)``, and a forward pass is two matmuls however many experts there are.

    Parameters by adapter name: ``moda_A (R, D)`` drawn from normal(0, 0.01), ``moda_B (O, R)`` zero, and, where the
    gate is learned, ``moda_embedding (M, K)`` from normal(0, 1) and ``moda_gate (E, K)`` uniform in ``+-K^-0.5``.
    """

    adapter_layer_names = ("moda_A", "moda_B", "moda_embedding", "moda_gate")
    other_param_names = ("moda_config", "moda_dropout")

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, owner: Owner) -> None:
        self.base_layer = base_layer
        self.moda_owner = owner
        self.moda_config: dict[str, MoDAConfig] = {}
        self.moda_A = nn.ParameterDict()
        self.moda_B = nn.ParameterDict()
        self.moda_embedding = nn.ParameterDict()
        self.moda_gate = nn.ParameterDict()
        self.moda_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.merged_modality: str | None = None
        self._disable_adapters = False
        self._unmerged_weight: Tensor | None = None
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def update_layer(self, adapter_name: str, config: MoDAConfig) -> None:
        """Add an adapter's parameters, or draw those of ``adapter_name`` anew."""
        R = config.rank_per_expert * config.num_experts
        self.moda_config[adapter_name] = config
        self.moda_A[adapter_name] = nn.Parameter(torch.empty(R, self.in_features).normal_(std=_INIT_STD))
        self.moda_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, R))
        if config.gate == "modality" and config.num_experts > 1:
            K = config.modality_dim
            self.moda_embedding[adapter_name] = nn.Parameter(torch.empty(len(config.modalities), K).normal_())
            self.moda_gate[adapter_name] = nn.Parameter(torch.empty(config.num_experts, K).uniform_(-(K**-0.5), K**-0.5))
        self.moda_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def gates(self, adapter_name: str) -> Tensor:
        """How much each expert counts for each modality: ``(M, E)``."""
        config = self.moda_config[adapter_name]
        if adapter_name in self.moda_gate:
            return learned_gate(self.moda_embedding[adapter_name], self.moda_gate[adapter_name])
        kind = config.gate if config.depends_on_modality else "uniform"
        return fixed_gate(kind, len(config.modalities), config.num_experts, self.moda_A[adapter_name])

    def _factors(self, adapter_name: str) -> Tensor:
        """What the diagonal holds for each modality, the scale ``alpha / r`` included: ``(M, R)``."""
        config = self.moda_config[adapter_name]
        scaled_ME = self.gates(adapter_name) * (config.lora_alpha / config.r)
        return scaled_ME.unsqueeze(-1).expand(-1, -1, config.rank_per_expert).flatten(1)

    def get_delta_weight(self, adapter_name: str, modality_name: str | None = None) -> Tensor:
        """The adapter as one matrix: ``(O, D)``, in the adapter's own type.

        Args:
            adapter_name: which adapter.
            modality_name: for which modality; not needed where the gate treats all alike.

        Raises:
            TrainingError: the gate depends on the modality, and none or an unknown one was given.
        """
        config = self.moda_config[adapter_name]
        position = 0
        if config.depends_on_modality:
            if modality_name not in config.modalities:
                raise TrainingError(
                    f"adapter {adapter_name!r}",
                    f"has a weight for each modality ({', '.join(config.modalities)}; got {modality_name!r})",
                    f"call sda_core.adapters.merge_modality(model, {config.modalities[0]!r}), "
                    f"or merge inside `with modality(model, {config.modalities[0]!r})`",
                )
            position = config.modalities.index(modality_name)
        return (self.moda_B[adapter_name] * self._factors(adapter_name)[position]) @ self.moda_A[adapter_name]


class MoDALinear(nn.Module, MoDALayer):
    """A linear layer with MoDA adapters; see :class:`MoDALayer` for the formula."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoDAConfig, owner: Owner) -> None:
        super().__init__()
        MoDALayer.__init__(self, base_layer, owner)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted map: ``(B, ..., D)`` to ``(B, ..., O)``, in the type of the base layer's output.

        Raises:
            TrainingError: the gate depends on the modality and none is known, or the layer is merged for another one.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            self._check_merged()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moda_A:
                result = result + self._low_rank(name, x)
        return result.to(dtype)

    def _low_rank(self, name: str, x: Tensor) -> Tensor:
        config = self.moda_config[name]
        a_RD = self.moda_A[name]
        hidden = F.linear(self.moda_dropout[name](self._cast_input_dtype(x, a_RD.dtype)), a_RD)
        if config.depends_on_modality:
            value = self._known_modality(name)
            hidden = GatedProduct.apply(hidden, self._factor(name, value, hidden), value.marker)
        else:
            hidden = hidden * (config.lora_alpha / config.r / config.num_experts)
        return F.linear(hidden, self.moda_B[name])

    def _factor(self, name: str, value: Modality, hidden: Tensor) -> Tensor:
        """The diagonal for this pass: ``(R,)``, or ``(B, 1, ..., R)`` where each row has its own modality."""
        factors_MR = self._factors(name)
        if value.ids_B is None:
            assert value.name is not None
            return factors_MR[self.moda_config[name].modalities.index(value.name)]
        if len(value.ids_B) != hidden.shape[0]:
            raise TrainingError(
                "modality",
                f"{len(value.ids_B)} ids for an input of {hidden.shape[0]} rows (shape {tuple(hidden.shape[:-1])})",
                "give one id for each row of the layer's input",
            )
        factor_BR = factors_MR[value.ids_B.to(factors_MR.device)]
        return factor_BR.view(hidden.shape[0], *(1,) * (hidden.dim() - 2), -1)

    def _known_modality(self, name: str) -> Modality:
        value = current_modality(self.moda_owner)
        if value is None:
            names = self.moda_config[name].modalities
            raise TrainingError(
                f"adapter {name!r}",
                f"mixes its experts by the modality ({', '.join(names)}), and none is set",
                f"put the pass into `with modality(model, {names[0]!r})`, gradient-checkpointed ones too",
            )
        return value

    def _check_merged(self) -> None:
        value = current_modality(self.moda_owner)
        if value is not None and self.merged_modality is not None and value.name != self.merged_modality:
            raise TrainingError(
                "modality",
                f"the adapter is merged for {self.merged_modality!r}, but the pass is for {value}",
                "call unmerge_modality(model) first",
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, for the modality of the open ``with modality(...)``.

        The sum is rounded to the base weight's type once.  The weight as it was is kept (on the CPU), so that
        :meth:`unmerge` restores it to the bit; subtracting would not, least of all in bfloat16.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which; None for the active ones.

        Raises:
            TrainingError: the gate depends on the modality and none is set, the layer is merged for another modality,
                the base weight is quantised, or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moda_A]
        if not names:
            return
        base = self.get_base_layer()
        weight = base.weight
        assert isinstance(weight, Tensor)
        if not weight.dtype.is_floating_point:
            raise TrainingError(
                "merge", f"a base weight of type {weight.dtype} takes no sum", "load the base model without quantisation"
            )
        value = current_modality(self.moda_owner)
        modality_name = value.name if value is not None else None
        self._check_merged()
        with torch.no_grad():
            merged = weight.to(self.moda_A[names[0]].dtype)
            for name in names:
                merged = merged + self.get_delta_weight(name, modality_name).to(merged.device)
            merged = merged.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise TrainingError("merge", f"adapter {', '.join(names)} gives weights that are not finite", "train it again")
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.data.to("cpu")
        weight.data = merged
        self.merged_adapters.extend(names)
        if any(self.moda_config[name].depends_on_modality for name in names):
            self.merged_modality = modality_name

    def unmerge(self) -> None:
        """Put the base weight back, to the bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        weight.data = self._unmerged_weight.to(weight.device, weight.dtype)
        self._unmerged_weight = None
        self.merged_adapters.clear()
        self.merged_modality = None

    def __repr__(self) -> str:
        return "moda." + super().__repr__()
