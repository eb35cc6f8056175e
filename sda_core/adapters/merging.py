"""Merge MoDA into the base weights, for one modality at a time; a pass then costs as much as one of the base model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import nn

from sda_core.adapters.moda import MoDALinear, modality
from sda_core.adapters.moda.model import STANDS_IN, check_untied
from sda_core.errors import TrainingError


def moda_layers(model: nn.Module) -> Iterator[tuple[str, MoDALinear]]:
    """The adapted layers with their names.

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoDALinear)]
    if not found:
        raise TrainingError("adapter", f"{type(model).__name__} has no MoDA layer", "build or load the adapter first")
    yield from found


def depends_on_modality(model: nn.Module) -> bool:
    """Whether an active MoDA adapter depends on the modality, so that each modality has its own merged weight.

    False for a model without MoDA layers.
    """
    return any(
        module.moda_config[name].depends_on_modality
        for module in model.modules()
        if isinstance(module, MoDALinear)
        for name in module.active_adapters
        if name in module.moda_config
    )


def merge_modality(model: nn.Module, name: str, safe_merge: bool = False) -> None:
    """Merge the active adapters into the base weights, for one modality; a pass then costs as much as one of the base model.

    The model stays a PEFT model.  ``unmerge_modality`` restores the base weights bit for bit.  A pass inside
    ``with modality(model, other)`` is rejected.  Merging for another modality unmerges first.

    Args:
        model: a model with MoDA layers.
        name: name of the modality.
        safe_merge: reject weights that are not finite.

    Raises:
        TrainingError: no such modality, no MoDA layer, or a base weight that is quantised, sharded or tied to another module.
    """
    with modality(model, name):
        check_untied(model)
        unmerge_modality(model)
        try:
            for _, layer in moda_layers(model):
                layer.merge(safe_merge=safe_merge)
        except TrainingError:  # merge all layers or none
            unmerge_modality(model)
            raise


def unmerge_modality(model: nn.Module) -> None:
    """Undo :func:`merge_modality`; has no effect if nothing is merged.

    Raises:
        TrainingError: the model has no MoDA layer.
    """
    for _, layer in moda_layers(model):
        if layer.merged:
            layer.unmerge()


@contextmanager
def merged_modality(model: nn.Module, name: str) -> Generator[None]:
    """Context for passes of one modality with the adapter merged; restores the base weights bit for bit, also after errors.

    Inside the block the adapted layers are replaced by the linear layers that they wrap, so a pass runs the plain base model,
    also under ``torch.compile``.  Adapters cannot be switched, added, disabled or merged inside the block.  In exact
    arithmetic the results equal those of ``with modality(model, name)``.  In float32 they agree up to rounding.  With
    bfloat16 weights the sum of weight and adapter is rounded to bfloat16 once, whereas the unmerged pass rounds two products
    and their sum, so the two differ by a few units in the last place (2^-8).

    Raises:
        TrainingError: as :func:`merge_modality`; or a merged weight is not finite.
    """
    layers = dict(moda_layers(model))
    try:
        merge_modality(model, name, safe_merge=True)
        for path, layer in layers.items():
            linear = layer.get_base_layer()
            setattr(linear, STANDS_IN, True)
            _put(model, path, linear)
        yield
    finally:
        for path, layer in layers.items():
            vars(layer.get_base_layer()).pop(STANDS_IN, None)
            _put(model, path, layer)
        unmerge_modality(model)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
