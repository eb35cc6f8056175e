"""Adapters: MoDA, registered as a PEFT method on import.

::

    import peft
    from sda_core.adapters import MoDAConfig, modality

    model = peft.get_peft_model(base, MoDAConfig(target_modules=["q_proj", "v_proj"]))
    with modality(model, "image"):
        image_BD = model(**image_inputs)

Instead of a name, ``modality`` accepts ids: one per row, or one per token if a sequence holds images and text.
``print(targets(base, pattern))`` lists the modules that a pattern matches.

Adapters work on any ``nn.Module``; nothing here depends on the model that is adapted.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

from sda_core.adapters.merging import depends_on_modality, merge_modality, merged_modality, moda_layers, unmerge_modality
from sda_core.adapters.moda import PEFT_TYPE, MoDAConfig, MoDALayer, MoDALinear, MoDAModel, checkpoint_contexts, modality
from sda_core.adapters.moda.model import check_in_place
from sda_core.adapters.moda.targets import TargetSummary, linear_layers, listing, targets
from sda_core.adapters.saving import load, save, without_rename_warning
from sda_core.errors import TrainingError
from sda_core.params import AdapterParams
from sda_core.seed import derive

__all__ = [
    "MoDAConfig",
    "MoDALayer",
    "MoDALinear",
    "MoDAModel",
    "TargetSummary",
    "adapter_is_zero",
    "base_model",
    "build",
    "checkpoint_contexts",
    "config_of",
    "depends_on_modality",
    "gate_values",
    "load",
    "merge_modality",
    "merged_modality",
    "modality",
    "save",
    "targets",
    "unmerge_modality",
]

# PEFT's register_peft_method takes names of PEFT's own enumeration only; these are the mappings that it fills.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoDAConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoDAModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MoDAModel.prefix  # type: ignore[index]


def build(
    model: nn.Module,
    params: AdapterParams,
    modalities: Sequence[str],
    target_modules: str,
    num_expected: int,
    *,
    seed: int,
) -> PeftModel:
    """Adapt the linear layers that a pattern matches, after checking their number.

    A pattern that also matches the vision tower, or that matches nothing because a library renamed its modules, would
    silently train the wrong layers.  So the count is checked before the model is changed.

    Args:
        model: the base model; its layers are replaced in place and its own weights frozen.
        params: the adapter's section of the params.
        modalities: names, in the order of their ids.
        target_modules: a regular expression that must match a module's full name.
        num_expected: how many modules it should match.
        seed: seed of the initial weights, which do not depend on the state of torch's generator.

    Returns:
        The PEFT model; the adapter is named ``default``.

    Raises:
        TrainingError: the pattern matches another number of modules, or one that is not a linear layer.
    """
    hit = targets(model, target_modules)
    for name, kind in hit.others.items():
        raise TrainingError(f"module {name}", f"is a {kind}, and MoDA adapts torch.nn.Linear only", "narrow the pattern")
    if len(hit) != num_expected:
        there = listing(hit.names) or f"no module; linear layers here are {listing(linear_layers(model)) or 'none'}"
        raise TrainingError(
            "adapter",
            f"{target_modules!r} matches {len(hit)} modules, expected {num_expected} ({there})",
            "correct the pattern, or the expected number, for this model",
        )
    config = config_of(params, modalities, target_modules)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU, whatever the model is on
        torch.manual_seed(derive(seed, "adapter", "init"))
        with without_rename_warning():
            peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def config_of(params: AdapterParams, modalities: Sequence[str], target_modules: str) -> MoDAConfig:
    """The adapter configuration for a params section; arguments as in :func:`build`."""
    return MoDAConfig(
        r=params.r,
        lora_alpha=params.lora_alpha,
        use_rslora=params.use_rslora,
        lora_dropout=params.lora_dropout,
        variant=params.variant,
        num_experts=params.num_experts,
        expert_rank=params.expert_rank,
        gate=params.gate,
        modalities=list(modalities),
        modality_dim=params.modality_dim,
        target_modules=target_modules,
    )


@contextmanager
def base_model(model: nn.Module) -> Generator[None]:
    """Context in which a model computes its base model's output: adapters off, evaluation mode, no gradients.

    It can be used in the middle of a training step.  PEFT's ``disable_adapter`` also toggles ``requires_grad`` of the
    adapter's parameters, which breaks sharded parameters; this context changes nothing but the computation.

    Raises:
        TrainingError: inside ``merged_modality``.
    """
    check_in_place(model, "base_model")
    off = [module for module in model.modules() if getattr(module, "_disable_adapters", True) is False]
    training = [module for module in model.modules() if module.training]
    try:
        for module in off:
            module._disable_adapters = True  # type: ignore[assignment]
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in off:
            module._disable_adapters = False  # type: ignore[assignment]
        for module in training:
            module.training = True


def gate_values(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The gate values (weights of the experts) of each layer: ``(M, E)``, float32 on the CPU.

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    return {
        name: layer.gates(adapter_name).detach().float().cpu()
        for name, layer in moda_layers(model)
        if adapter_name in layer.moda_config
    }


def adapter_is_zero(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether the adapter changes no layer's output (it was never trained, or training had no effect).

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    return not any(bool(layer.moda_B[adapter_name].any()) for _, layer in moda_layers(model) if adapter_name in layer.moda_B)
