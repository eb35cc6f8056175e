"""The MoDA layer: a frozen linear map plus low-rank experts, mixed by a gate that sees the modality alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sda_core.adapters.moda import base_weight
from sda_core.adapters.moda.config import MoDAConfig
from sda_core.adapters.moda.factors import fixed_gate, learned_gate
from sda_core.adapters.moda.gate import Block, Modality, Owner, current_block, gated_product, outside_graphs
from sda_core.errors import TrainingError

_INIT_STD = 0.01


class MoDALayer(BaseTunerLayer):
    """The adapter's parameters, for any number of named adapters.

    For a frozen map ``W0 (O, D)``, experts ``e`` of rank ``r_e`` and the modality ``m`` of the input,

    ``y = W0 x + (alpha / r) * sum_e g_e(m) B_e A_e x,    g(m) = softmax(W_g Emb_m)``

    (SDA, arXiv 2512.06883).  The gate does not depend on ``x``, so the experts of a modality are one LoRA of rank
    ``R = sum_e r_e`` with a diagonal in the middle: the ``A_e`` are stored stacked as ``(R, D)``, the ``B_e`` side by
    side as ``(O, R)``, and a forward pass is two matmuls however many experts there are.  ``m`` may differ between rows,
    and between tokens.  With ``use_rslora`` the scale is ``alpha / sqrt(r)``.

    The base layer is only ever called, so it may be one of bitsandbytes' linear layers.

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
        self._merged_for: dict[str, str] = {}  # the modality, by name, of merged adapters whose gate depends on it
        self._unmerged: base_weight.Kept | None = None  # the base weight without them, while they are in it
        self._disable_adapters = False
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def update_layer(self, adapter_name: str, config: MoDAConfig) -> None:
        """Add an adapter's parameters, or draw those of ``adapter_name`` anew.

        Raises:
            TrainingError: the adapter is merged.
        """
        self._check_unmerged(adapter_name, "replaced")
        R = config.rank_per_expert * config.num_experts
        self.moda_config[adapter_name] = config
        for parameters in (self.moda_embedding, self.moda_gate):  # of a former adapter of this name, perhaps of another gate
            if adapter_name in parameters:
                del parameters[adapter_name]
        self.moda_A[adapter_name] = nn.Parameter(torch.empty(R, self.in_features).normal_(std=_INIT_STD))
        self.moda_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, R))
        if config.gate == "modality" and config.num_experts > 1:
            K = config.modality_dim
            self.moda_embedding[adapter_name] = nn.Parameter(torch.empty(len(config.modalities), K).normal_())
            self.moda_gate[adapter_name] = nn.Parameter(torch.empty(config.num_experts, K).uniform_(-(K**-0.5), K**-0.5))
        self.moda_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parameters.

        Raises:
            TrainingError: the adapter is merged.
        """
        self._check_unmerged(adapter_name, "deleted")
        super().delete_adapter(adapter_name)

    def _check_unmerged(self, adapter_name: str, what: str) -> None:
        if adapter_name in self.merged_adapters:
            raise TrainingError(
                f"adapter {adapter_name!r}", f"is merged and cannot be {what}", "call model.unmerge_adapter() first"
            )

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
        scaled_ME = self.gates(adapter_name) * config.scale
        return scaled_ME.unsqueeze(-1).expand(-1, -1, config.rank_per_expert).flatten(1)

    def get_delta_weight(self, adapter_name: str, modality_name: str | None = None) -> Tensor:
        """The adapter as one matrix: ``(O, D)``, in the adapter's own type, or float32 where that is narrower.

        Args:
            adapter_name: which adapter.
            modality_name: for which modality; not needed where the gate treats all alike.

        Raises:
            TrainingError: the gate depends on the modality, and none or an unknown one was given.
        """
        config = self.moda_config[adapter_name]
        position = 0
        if config.depends_on_modality:
            position = config.modalities.index(self._check_modality(adapter_name, modality_name))
        factors_R = self._factors(adapter_name)[position]
        b_OR, a_RD = self.moda_B[adapter_name], self.moda_A[adapter_name]
        dtype = torch.promote_types(a_RD.dtype, torch.float32)
        return (b_OR.to(dtype) * factors_R.to(dtype)) @ a_RD.to(dtype)

    def _check_modality(self, adapter_name: str, modality_name: str | None) -> str:
        names = self.moda_config[adapter_name].modalities
        if modality_name is None or modality_name not in names:
            raise TrainingError(
                f"adapter {adapter_name!r}",
                f"has a weight for each modality ({', '.join(names)}; got {modality_name!r})",
                f"call sda_core.adapters.merge_modality(model, {names[0]!r}), "
                f"or merge inside `with modality(model, {names[0]!r})`",
            )
        return modality_name


class MoDALinear(nn.Module, MoDALayer):
    """A linear layer with MoDA adapters; see :class:`MoDALayer` for the formula.

    The output has the base layer's type, whatever the adapter's: float32 beside a base in half precision (PEFT's default),
    half precision where that was asked for, and whatever ``torch.autocast`` makes of it.

    A pass waits for no device.  FSDP shards the parameters like any others (``fully_shard``, with checkpointing too; a
    merge then is refused).  ``torch.compile`` works, with a break in the graph at each gate; merged, or with a gate that
    treats all modalities alike, there is none.
    """

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
            if self._unmerged is not None:
                self._take_out()
            return self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            if self._unmerged is None:  # taken out for a pass with disabled adapters
                self._put_in(self.merged_adapters, self._merged_for)
            self._check_merged()
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moda_A and name not in self.merged_adapters:
                result = result + self._low_rank(name, x)
        return result.to(dtype)

    def _low_rank(self, name: str, x: Tensor) -> Tensor:
        config = self.moda_config[name]
        hidden = self._hidden(name, x)
        same_for_all = config.scale / config.num_experts
        hidden = self._gated(name, hidden) if config.depends_on_modality else hidden * same_for_all
        b_OR = self.moda_B[name]
        return F.linear(hidden.to(b_OR.dtype), b_OR)  # an adapter in half precision still has its gate in float32

    def _hidden(self, name: str, x: Tensor) -> Tensor:
        """What the experts make of the input, before the gate: ``(B, ..., R)``."""
        config, dropout = self.moda_config[name], self.moda_dropout[name]
        a_RD = self.moda_A[name]
        x = self._cast_input_dtype(x, a_RD.dtype)
        if config.variant == "reference" and isinstance(dropout, nn.Dropout) and dropout.training:
            # a mask for each expert, drawn in the experts' order
            return torch.cat([F.linear(dropout(x), a_eD) for a_eD in a_RD.split(config.rank_per_expert)], dim=-1)
        return F.linear(dropout(x), a_RD)

    @outside_graphs
    def _gated(self, name: str, hidden: Tensor) -> Tensor:
        block = self._known_block(name)
        return gated_product(hidden, self._factor(name, block, hidden), block.value.marker)

    def _factor(self, name: str, block: Block, hidden: Tensor) -> Tensor:
        """The diagonal for this pass: ``(R,)``; ``(B, 1, ..., R)`` or ``(B, L, 1, ..., R)`` with ids a row or a token."""
        shared_R = block.factors.take(self, name)
        if shared_R is not None:
            return shared_R
        value, factors_MR = block.value, self._factors(name)
        if value.ids is None:
            assert value.name is not None
            return factors_MR[self.moda_config[name].modalities.index(value.name)]
        shape, first = value.ids.shape, hidden.shape[:-1]
        if first[: len(shape)] != shape:
            if len(shape) == 1:
                raise TrainingError(
                    "modality",
                    f"{len(value.ids)} ids for an input of {first[0] if first else 0} rows (shape {tuple(first)})",
                    "give one id for each row of the layer's input",
                )
            raise TrainingError(
                "modality",
                f"ids of shape {tuple(shape)} for an input of shape {tuple(first)}",
                "give one id for each token of the layer's input (B, L, D), padding included",
            )
        # an embedding, because the backward of an index is slow on a GPU where many ids are the same
        factor = F.embedding(value.ids_on(factors_MR.device), factors_MR)
        return factor.view(*shape, *(1,) * (len(first) - len(shape)), -1)

    def _known_block(self, name: str) -> Block:
        block = current_block(self.moda_owner)
        if block is None:
            names = self.moda_config[name].modalities
            raise TrainingError(
                f"adapter {name!r}",
                f"mixes its experts by the modality ({', '.join(names)}), and none is set",
                f"put the pass into `with modality(model, {names[0]!r})`, gradient-checkpointed ones too",
            )
        return block

    def _current_modality(self) -> Modality | None:
        block = current_block(self.moda_owner)
        return None if block is None else block.value

    @property
    def merged_modality(self) -> str | None:
        """The modality that the layer is merged for; None where the merged adapters treat all alike."""
        return next(iter(self._merged_for.values()), None)

    def _check_merged(self) -> None:
        value = self._current_modality() if self._merged_for else None
        if value is None:
            return
        for name, merged_for in self._merged_for.items():
            if value.name_among(self.moda_config[name].modalities) != merged_for:
                raise TrainingError(
                    "modality",
                    f"the adapter is merged for {merged_for!r}, but the pass is for {value}",
                    "call unmerge_modality(model) first",
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, for the modality of the open ``with modality(...)``.

        Merging changes no output: active adapters that are not merged are still added in :meth:`forward`.  PEFT's own
        methods leave them out.

        The sum is rounded to the base weight's type once, however many merges it took.  The weight as it was is kept (on
        the CPU), so that :meth:`unmerge` restores it to the bit; subtracting would not, least of all in bfloat16.  A weight
        that bitsandbytes has quantised is quantised anew, as PEFT does it, with a warning: that rounding is not a small one.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which; None for the active ones.

        Raises:
            TrainingError: the gate depends on the modality and none is set, the layer is merged for another modality,
                the base weight takes no sum (quantised in another way, or sharded), or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moda_A]
        if not names:
            return
        self._check_merged()
        value = self._current_modality()
        merged_for = dict(self._merged_for)
        for name in names:
            config = self.moda_config[name]
            if config.depends_on_modality:
                modality_name = None if value is None else value.name_among(config.modalities)
                merged_for[name] = self._check_modality(name, modality_name)
        self._put_in(list(dict.fromkeys([*self.merged_adapters, *names])), merged_for, safe_merge)

    def _put_in(self, names: list[str], merged_for: dict[str, str], safe_merge: bool = False) -> None:
        """Make the base weight the one without adapters plus these; nothing changes where that fails."""
        base = self.get_base_layer()
        before = None if self._unmerged is None else base_weight.keep(base)
        self._take_out()
        try:
            with torch.no_grad():
                merged = base_weight.read(base)
                for name in names:
                    merged = merged + self.get_delta_weight(name, merged_for.get(name)).to(merged.device)
                merged = base_weight.rounded(base, merged)
                if safe_merge and not torch.isfinite(merged).all():
                    raise TrainingError(
                        "merge", f"adapter {', '.join(names)} gives weights that are not finite", "train it again"
                    )
        except TrainingError:
            if before is not None:
                self._unmerged = base_weight.keep(base)
                base_weight.put_back(base, before)
            raise
        self._unmerged = base_weight.keep(base)
        base_weight.replace(base, merged)
        self.merged_adapters, self._merged_for = list(names), dict(merged_for)

    def _take_out(self) -> None:
        """Put the base weight back, to the bit; the adapters count as merged."""
        if self._unmerged is not None:
            base_weight.put_back(self.get_base_layer(), self._unmerged)
            self._unmerged = None

    def unmerge(self) -> None:
        """Put the base weight back, to the bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._take_out()
        self.merged_adapters, self._merged_for = [], {}

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters on or off; what was merged is merged again when they are turned on."""
        super().enable_adapters(enabled)
        if enabled and self.merged_adapters and self._unmerged is None:
            self._put_in(self.merged_adapters, self._merged_for)

    def __repr__(self) -> str:
        return "moda." + super().__repr__()
