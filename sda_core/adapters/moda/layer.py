"""The MoDA layer: a frozen linear map plus low-rank experts, mixed by a gate that depends on the modality only.

The class is split over three files: :class:`MoDALayer` (here: parameters, gates) inherits from :class:`MergingLayer`
(``base_weight.py``: merging), which inherits from :class:`GatedLayer` (``gates.py``: attributes that the gates need).
:class:`MoDALinear` (here) adds the forward pass.

This file holds the complete pass, in order:

1. ``with modality(model, "image")`` opens a block (``modality.py``: a name or ids, checked, for the layers of that model);
2. :meth:`MoDALinear.forward` adds the output of each active adapter to the base layer's output;
3. :meth:`MoDALinear._low_rank` computes one adapter: down-projection, multiplication by the factors, up-projection;
4. :meth:`MoDALinear._factors_of_pass` returns the factors, one value per rank, for the modality of the open block.

``gates.py`` computes the gate values of all layers at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_core.adapters.moda.base_weight import MergingLayer
from sda_core.adapters.moda.config import MoDAConfig
from sda_core.adapters.moda.gates import equal_share, factors, fixed_gate, learned_gate
from sda_core.adapters.moda.modality import Block, Owner, current_block, recomputing, same_modality
from sda_core.errors import TrainingError

_INIT_STD = 0.01


class MoDALayer(MergingLayer):
    """The adapter's parameters, for any number of named adapters.

    For a frozen map ``W0 (O, D)``, experts ``e`` of rank ``r_e`` and the modality ``m`` of the input,

    ``y = W0 x + (alpha / r) * sum_e g_e(m) B_e A_e x,    g(m) = softmax(W_g Emb_m)``

    (SDA, arXiv 2512.06883).  The gate does not depend on ``x``, so the experts of a modality are one LoRA of rank
    ``R = sum_e r_e`` with a diagonal in the middle: the ``A_e`` are stored stacked as ``(R, D)``, the ``B_e`` side by
    side as ``(O, R)``, and a forward pass is two matmuls for any number of experts.  ``m`` may differ between rows and
    between tokens.  With ``use_rslora`` the scale is ``alpha / sqrt(r)``.

    The pass only calls the base layer, so it may be one of bitsandbytes' linear layers.

    Parameters by adapter name: ``moda_A (R, D)`` drawn from normal(0, 0.01), ``moda_B (O, R)`` zero, and, for a learned
    gate, ``moda_embedding (M, W)`` from normal(0, 1) and ``moda_gate (E, W)`` uniform in ``+-W^-0.5``.
    """

    adapter_layer_names = ("moda_A", "moda_B", "moda_embedding", "moda_gate")
    other_param_names = ("moda_config", "moda_dropout")

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, owner: Owner) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moda_owner = owner
        self.moda_config: dict[str, MoDAConfig] = {}
        self.moda_A = nn.ParameterDict()
        self.moda_B = nn.ParameterDict()
        self.moda_embedding = nn.ParameterDict()
        self.moda_gate = nn.ParameterDict()
        self.moda_dropout = nn.ModuleDict()
        self._disable_adapters = False
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def update_layer(self, adapter_name: str, config: MoDAConfig) -> None:
        """Add the parameters of an adapter; an existing adapter of this name is replaced.

        Raises:
            TrainingError: the adapter is merged.
        """
        self._check_unmerged(adapter_name, "replaced")
        R = config.rank_per_expert * config.num_experts
        self.moda_config[adapter_name] = config
        for parameters in (self.moda_embedding, self.moda_gate):  # of a previous adapter of this name, perhaps of another gate
            if adapter_name in parameters:
                del parameters[adapter_name]
        self.moda_A[adapter_name] = nn.Parameter(torch.empty(R, self.in_features).normal_(std=_INIT_STD))
        self.moda_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, R))
        if shapes := config.gate_shapes:
            bound = config.modality_dim**-0.5
            self.moda_embedding[adapter_name] = nn.Parameter(torch.empty(shapes["moda_embedding"]).normal_())
            self.moda_gate[adapter_name] = nn.Parameter(torch.empty(shapes["moda_gate"]).uniform_(-bound, bound))
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

    def gates(self, adapter_name: str) -> Tensor:
        """The weight of each expert for each modality: ``(M, E)``."""
        config = self.moda_config[adapter_name]
        if adapter_name in self.moda_gate:
            return learned_gate(config, self.moda_embedding[adapter_name], self.moda_gate[adapter_name])
        return fixed_gate(config, self.moda_A[adapter_name])

    def get_delta_weight(self, adapter_name: str, modality_name: str | None = None) -> Tensor:
        """The adapter as one matrix: ``(O, D)``, in the adapter's dtype, at least float32.

        Args:
            adapter_name: name of the adapter.
            modality_name: the modality; not needed if the gate does not depend on it.

        Raises:
            TrainingError: the gate depends on the modality, and none or an unknown one was given.
        """
        config = self.moda_config[adapter_name]
        position = 0
        if config.depends_on_modality:
            position = config.modalities.index(self._check_modality(adapter_name, modality_name))
        factors_R = factors(self.gates(adapter_name), config)[position]
        b_OR, a_RD = self.moda_B[adapter_name], self.moda_A[adapter_name]
        dtype = torch.promote_types(a_RD.dtype, torch.float32)
        return (b_OR.to(dtype) * factors_R.to(dtype)) @ a_RD.to(dtype)


class MoDALinear(nn.Module, MoDALayer):
    """A linear layer with MoDA adapters; see :class:`MoDALayer` for the formula.

    The output has the dtype of the base layer's output, whatever the adapter's dtype: float32 beside a base in half precision
    (PEFT's default), or half precision on request; ``torch.autocast`` applies as usual.

    A pass never synchronises with the device.  FSDP shards the parameters like any others (``fully_shard``, also with
    checkpointing; merging is then rejected).  ``torch.compile`` works, with a graph break at each gate, and without graph
    breaks if the adapter is merged or the gate does not depend on the modality.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoDAConfig, owner: Owner) -> None:
        nn.Module.__init__(self)
        MoDALayer.__init__(self, base_layer, owner)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted map: ``(B, ..., D)`` to ``(B, ..., O)``, in the dtype of the base layer's output.

        Raises:
            TrainingError: the gate depends on the modality and none is set, or the layer is merged for another one.
        """
        if self.disable_adapters:
            self._restore_weight()
            return self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            self._merge_again()  # after a pass with disabled adapters
            self._check_merged()
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moda_A and name not in self.merged_adapters:
                result = result + self._low_rank(name, x)
        return result.to(dtype)

    def _low_rank(self, name: str, x: Tensor) -> Tensor:
        """The output of one adapter: ``(B, ..., O)``."""
        config, b_OR = self.moda_config[name], self.moda_B[name]
        hidden = self._hidden(name, x)
        share = equal_share(config)
        if share is not None:
            hidden = hidden * (config.scale * share)
        elif config.depends_on_modality:
            hidden = self._gated(name, hidden)  # pyright: ignore[reportCallIssue] (torch.compiler.disable loses the signature)
        else:
            hidden = hidden * factors(self.gates(name), config)[0]
        return F.linear(hidden.to(b_OR.dtype), b_OR)  # the gate of an adapter in half precision is float32

    def _hidden(self, name: str, x: Tensor) -> Tensor:
        """The down-projection of the input by all experts, before the gate: ``(B, ..., R)``."""
        config, dropout, a_RD = self.moda_config[name], self.moda_dropout[name], self.moda_A[name]
        x = self._cast_input_dtype(x, a_RD.dtype)
        if config.variant == "reference" and isinstance(dropout, nn.Dropout) and dropout.training:
            # a mask for each expert, drawn in the experts' order
            return torch.cat([F.linear(dropout(x), a_eD) for a_eD in a_RD.split(config.rank_per_expert)], dim=-1)
        return F.linear(dropout(x), a_RD)

    @torch.compiler.disable  # torch.compile would treat the open block as a constant
    def _gated(self, name: str, hidden: Tensor) -> Tensor:
        """The hidden values times their factors; backward checks that the modality is the same."""
        block = self._block(name)
        return same_modality(hidden * self._factors_of_pass(name, block, hidden.shape[:-1]), block.value)

    def _block(self, name: str) -> Block:
        block = current_block(self.moda_owner)
        if block is None:
            names = self.moda_config[name].modalities
            raise TrainingError(
                f"adapter {name!r}",
                f"mixes its experts by the modality ({', '.join(names)}), and none is set",
                "this is a region under gradient checkpointing: call gradient_checkpointing_enable() of the PEFT model, or pass "
                "use_reentrant=False, context_fn=sda_core.adapters.checkpoint_contexts to checkpoint"
                if recomputing()
                else f"put the pass into `with modality(model, {names[0]!r})`",
            )
        return block

    def _factors_of_pass(self, name: str, block: Block, shape: torch.Size) -> Tensor:
        """One factor per rank: ``(R,)``; ``(B, 1, ..., R)`` or ``(B, L, 1, ..., R)`` with ids per row or per token."""
        shared_R = block.factors.pop_or_compute(self, name)
        if shared_R is not None:
            return shared_R
        factors_MR = factors(self.gates(name), self.moda_config[name])
        ids = block.value.ids
        if ids is None:
            assert block.value.name is not None
            return factors_MR[self.moda_config[name].modalities.index(block.value.name)]
        _check_shape(ids, shape)
        # an embedding, because the backward of an index is slow on a GPU where many ids are the same
        factors_BLR = F.embedding(block.value.ids_on(factors_MR.device), factors_MR)
        return factors_BLR.view(*ids.shape, *(1,) * (len(shape) - ids.dim()), -1)

    def __repr__(self) -> str:
        return "moda." + super().__repr__()


def _check_shape(ids: Tensor, shape: torch.Size) -> None:
    """Check that the ids fit the layer's input; nothing is broadcast, because an accidental fit would be wrong."""
    if shape[: ids.dim()] == ids.shape:
        return
    if ids.dim() == 1:
        raise TrainingError(
            "modality",
            f"{len(ids)} ids for an input of {shape[0] if shape else 0} rows (shape {tuple(shape)})",
            "give one id for each row of the layer's input",
        )
    raise TrainingError(
        "modality",
        f"ids of shape {tuple(ids.shape)} for an input of shape {tuple(shape)}",
        "give one id for each token of the layer's input (B, L, D), padding included",
    )
