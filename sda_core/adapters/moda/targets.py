"""List the modules that a pattern would adapt, without changing the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from sda_core.adapters.moda.config import MoDAConfig


@dataclass(frozen=True)
class TargetSummary:
    """The modules that a pattern matches.

    Attributes:
        names: full names of the linear layers, in the model's order.
        others: full names of matching modules that are not linear layers, with the names of their classes.
    """

    names: tuple[str, ...]
    others: dict[str, str]

    @property
    def by_kind(self) -> dict[str, int]:
        """The number of linear layers of each kind; a kind is a name with ``*`` for every number."""
        return by_kind(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """One line, e.g. ``2 linear layers: layers.*.up_proj x2``."""
        text = f"{len(self)} linear layer{'' if len(self) == 1 else 's'}"
        if self.names:
            text += f": {listing(self.names)}"
        if self.others:
            text += f"; not linear: {', '.join(f'{name} ({kind})' for name, kind in self.others.items())}"
        return text


def targets(model: nn.Module, pattern: Sequence[str] | str, exclude: Sequence[str] | str | None = None) -> TargetSummary:
    """The modules that ``target_modules`` would match, by PEFT's own matching; nothing is changed.

    A list of suffixes matches in every part of a model: ``["gate_proj", "up_proj", "down_proj"]`` also matches 96 layers of
    the vision tower of Qwen2.5-VL-7B.  ``print(targets(model, pattern))`` shows it.

    Args:
        model: any module, adapted or not.
        pattern: a list of name suffixes, or one regular expression that must match a module's full name.
        exclude: modules to exclude, in the same form.

    Returns:
        The matching modules.

    Raises:
        ConfigError: a pattern is not a valid regular expression.
    """
    config = MoDAConfig(target_modules=pattern, exclude_modules=exclude)  # type: ignore[arg-type]
    linear, others = [], {}
    for name, module in _modules(model):
        if name and check_target_module_exists(config, name):
            if isinstance(_base(module), nn.Linear):
                linear.append(name)
            else:
                others[name] = type(_base(module)).__name__
    return TargetSummary(tuple(linear), others)


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of the linear layers that an adapter could take."""
    return [name for name, module in _modules(model) if name and isinstance(_base(module), nn.Linear)]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules, except those inside adapted layers."""
    found = list(model.named_modules())
    inside = tuple(f"{name}." for name, module in found if isinstance(module, BaseTunerLayer))
    return [(name, module) for name, module in found if not name.startswith(inside)]


def by_kind(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers replaced by ``*``, with the count of each; sorted."""
    return dict(sorted(Counter(re.sub(r"\d+", "*", name) for name in names).items()))


def listing(names: Iterable[str]) -> str:
    """The kinds in one line, e.g. ``layers.*.mlp.up_proj x28``."""
    return ", ".join(f"{name} x{count}" for name, count in by_kind(names).items())
