"""MoDA on a whole model: replaces the targeted linear layers, as PEFT's own methods do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sda_core.adapters.moda.config import MoDAConfig
from sda_core.adapters.moda.layer import MoDALayer, MoDALinear
from sda_core.adapters.moda.modality import Owner, checkpoint_contexts
from sda_core.adapters.moda.targets import linear_layers, listing
from sda_core.errors import ConfigError, TrainingError

_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer and the older name
STANDS_IN = "moda_stands_in"
"""Attribute of linear layers that replace adapted ones inside ``merged_modality``."""


def check_in_place(model: nn.Module, what: str) -> None:
    """Check that the adapted layers are in the model.

    Raises:
        TrainingError: they are replaced, inside ``merged_modality``, so that a change would not reach them.
    """
    if any(hasattr(module, STANDS_IN) for module in model.modules()):
        raise TrainingError(
            what, "does not work inside `with merged_modality(...)`, where the adapters are part of the weights", "leave it first"
        )


class MoDAModel(BaseTuner):
    """A model with MoDA adapters on its targeted linear layers; made by ``peft.get_peft_model``.

    Args:
        model: any module.
        peft_config: a :class:`MoDAConfig`, or several by adapter name.
        adapter_name: name of the first adapter.

    Raises:
        TrainingError: no module is targeted, or a targeted module cannot be adapted.
        ConfigError: no ``target_modules`` were given.
    """

    prefix = "moda_"
    tuner_layer_cls = MoDALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own attribute): no model has a default

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.moda_owner = Owner()

    def __getattr__(self, name: str) -> Any:
        """The base model's attributes, as in PEFT; the methods that enable gradient checkpointing keep the modality."""
        found = super().__getattr__(name)
        return self._keeping_modality(found, name) if name in _CHECKPOINTING else found

    def _keeping_modality(self, enable: Callable[..., None], name: str) -> Callable[..., None]:
        """Wrap a transformers method that enables checkpointing, so that regions are recomputed with their modality.

        The wrapped method raises:
            TrainingError: for re-entrant checkpointing, which has no ``context_fn`` to pass the modality.
        """

        @functools.wraps(enable)
        def switch(settings: dict[str, Any] | None = None, *args: Any, **options: Any) -> None:
            settings = {"use_reentrant": False, **(settings or options.pop(name.replace("_enable", "_kwargs"), None) or {})}
            if settings["use_reentrant"]:
                raise TrainingError(name, "MoDA does not support re-entrant checkpointing", "pass {'use_reentrant': False}")
            enable({"context_fn": checkpoint_contexts, **settings}, *args, **options)

        depends = any(isinstance(config, MoDAConfig) and config.depends_on_modality for config in self.peft_config.values())
        return switch if depends else enable

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:  # noqa: ARG002
        assert isinstance(peft_config, MoDAConfig)
        if not peft_config.target_modules:
            raise ConfigError(
                "MoDAConfig.target_modules", "is empty", "name the linear layers to adapt, e.g. ['q_proj', 'v_proj']"
            )
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's method; if no layer is targeted, the error lists the layers of the model."""
        check_in_place(model, "adding an adapter")
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

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; merged adapters are unmerged, with a warning.

        Raises:
            TrainingError: inside ``merged_modality``.
        """
        check_in_place(self.model, "set_adapter")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged.

        Raises:
            TrainingError: inside ``merged_modality``.
        """
        check_in_place(self.model, "delete_adapter")
        super().delete_adapter(adapter_name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        check_in_place(self.model, "disabling or enabling adapters")
        super()._enable_adapter_layers(enabled)

    def unmerge_adapter(self) -> None:
        """Restore all base weights bit for bit.

        Raises:
            TrainingError: inside ``merged_modality``.
        """
        check_in_place(self.model, "unmerge_adapter")
        super().unmerge_adapter()

    def _check_merge_allowed(self) -> None:
        check_in_place(self.model, "a merge")
        super()._check_merge_allowed()
        check_untied(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights, layer by layer (:meth:`MoDALayer.merge`); outputs do not change.

        Raises:
            TrainingError: no such adapter, or a layer cannot be merged.
        """
        self._check_names(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_names(self, adapter_names: list[str] | None) -> None:
        for name in adapter_names or []:
            if name not in self.peft_config:
                raise TrainingError("merge", f"there is no adapter {name!r} (there are {', '.join(self.peft_config)})")

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]; PEFT says None, and returns a model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model, with the adapters merged into its weights or with its original weights bit for bit."""
        layers = [module for module in self.model.modules() if isinstance(module, MoDALayer)]
        if merge and adapter_names is not None:
            check_in_place(self.model, "a merge")
            self._check_names(adapter_names)
            merged = {name for layer in layers for name in layer.merged_adapters}
            if left_out := [name for name in self.active_adapters if name not in adapter_names and name not in merged]:
                raise TrainingError(
                    "merge_and_unload",
                    f"{', '.join(left_out)} is active and would be lost, because only {', '.join(adapter_names)} is merged",
                    "leave adapter_names out to merge all active adapters, or choose with model.base_model.set_adapter first",
                )
        if not merge:
            check_in_place(self.model, "unload")
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[return-value]

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
                "is part of a torch.nn.MultiheadAttention, which uses its weights without calling it, so an adapter would "
                "change nothing",
                "name it in exclude_modules",
            )
        layer = MoDALinear(target, adapter_name, peft_config.for_module(current_key), self.moda_owner)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is active
        self._replace_module(parent, target_name, layer, target)


def check_untied(model: nn.Module) -> None:
    """Check that a merge would change nothing but the adapted layers.

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
