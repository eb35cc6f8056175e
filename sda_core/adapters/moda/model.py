"""MoDA on a whole model: replaces the targeted linear layers, the way PEFT's own methods do."""

from __future__ import annotations

from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sda_core.adapters.moda.config import MoDAConfig
from sda_core.adapters.moda.gate import Owner
from sda_core.adapters.moda.layer import MoDALayer, MoDALinear
from sda_core.adapters.moda.targets import linear_layers, listing
from sda_core.errors import ConfigError, TrainingError


class MoDAModel(BaseTuner):
    """A model whose targeted linear layers carry MoDA adapters; made by ``peft.get_peft_model``.

    Args:
        model: any module.
        peft_config: a :class:`MoDAConfig`, or several by adapter name.
        adapter_name: name of the first adapter.

    Raises:
        TrainingError: no module is targeted, or one that cannot be adapted.
        ConfigError: no ``target_modules`` were given.
    """

    prefix = "moda_"
    tuner_layer_cls = MoDALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own attribute): no model has a default

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.moda_owner = Owner()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:  # noqa: ARG002
        assert isinstance(peft_config, MoDAConfig)
        if not peft_config.target_modules:
            raise ConfigError(
                "MoDAConfig.target_modules", "is empty", "name the linear layers to adapt, e.g. ['q_proj', 'v_proj']"
            )
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, with an error that says which layers there are where none is targeted."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError:
            config = self.peft_config.pop(adapter_name)
            assert isinstance(config, MoDAConfig)
            left_out = f" outside of {config.exclude_modules!r}" if config.exclude_modules else ""
            raise TrainingError(
                "MoDAConfig.target_modules",
                f"{config.target_modules!r} matches no module of this {type(model).__name__}{left_out}",
                f"linear layers here are {listing(linear_layers(model)) or 'none'}",
            ) from None

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_untied(self.model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002 (for methods that adapt bare parameters)
    ) -> None:
        assert isinstance(peft_config, MoDAConfig)
        if isinstance(target, MoDALinear):
            target.update_layer(adapter_name, peft_config.for_module(current_key))
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, torch.nn.Linear):
            raise TrainingError(
                f"module {current_key}",
                f"is a {type(base).__name__}, and MoDA adapts torch.nn.Linear only",
                "narrow target_modules, or name it in exclude_modules",
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise TrainingError(
                f"module {current_key}",
                "belongs to a torch.nn.MultiheadAttention, which uses its weights without calling it, so an adapter would "
                "change nothing",
                "name it in exclude_modules",
            )
        layer = MoDALinear(target, adapter_name, peft_config.for_module(current_key), self.moda_owner)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained before it is chosen
        self._replace_module(parent, target_name, layer, target)


def check_untied(model: nn.Module) -> None:
    """Make sure that a merge would change adapted layers and nothing else.

    Raises:
        TrainingError: an adapted layer shares its weight with another module, e.g. a head with the input embedding.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, layer in model.named_modules():
        if isinstance(layer, MoDALayer):
            own = f"{path}.base_layer.weight".lstrip(".")
            others = [name for name in names[id(layer.get_base_layer().weight)] if name != own]
            if others:
                raise TrainingError(
                    f"module {path}",
                    f"shares its weight with {others[0]}, which a merge would change as well",
                    "give it a copy of the weight (tie_word_embeddings=False), or leave it out of target_modules",
                )
