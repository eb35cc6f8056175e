"""Merging adapters into the base weight for one modality, and unmerging them bit for bit."""

from __future__ import annotations

import warnings
from abc import abstractmethod

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from sda_core.adapters.moda.gates import GatedLayer
from sda_core.adapters.moda.modality import Modality, current_block
from sda_core.errors import TrainingError


class MergingLayer(GatedLayer):
    """The part of a MoDA layer that merges.

    The sum is rounded to the base weight's type once, for any number of merges.  The original weight is kept on the CPU, so
    :meth:`unmerge` restores it bit for bit; subtraction, as in PEFT, would not, least of all in bfloat16.

    Quantised weights are rejected: their rounding error can be as large as the adapter, and each kind has its own packing.
    Unmerged passes call the base layer, so they work with any kind.
    """

    def __init__(self) -> None:
        self.merged_adapters: list[str] = []
        self._merged_for: dict[str, str] = {}  # adapter name: modality, for merged adapters whose gate depends on it
        self._unmerged: Tensor | None = None  # the original base weight, while adapters are merged

    @abstractmethod
    def get_delta_weight(self, adapter_name: str, modality_name: str | None = None) -> Tensor:
        """The adapter as one matrix."""

    @property
    def merged_modality(self) -> str | None:
        """The modality that the layer is merged for; None if the merged adapters do not depend on it."""
        return next(iter(self._merged_for.values()), None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, for the modality of the current ``with modality(...)``.

        Merging changes no output: active adapters that are not merged are still added in each pass, unlike in PEFT's own
        methods.

        Args:
            safe_merge: reject a result that is not finite.
            adapter_names: names of the adapters; None for the active ones.

        Raises:
            TrainingError: the gate depends on the modality and none is set, the layer is merged for another modality,
                the base weight is quantised or sharded, or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moda_config]
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
        self._merge_into_weight(list(dict.fromkeys([*self.merged_adapters, *names])), merged_for, safe_merge)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore_weight()
        self.merged_adapters, self._merged_for = [], {}

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters; merged adapters are merged again when they are enabled."""
        super().enable_adapters(enabled)
        if enabled:
            self._merge_again()

    def _merge_into_weight(self, names: list[str], merged_for: dict[str, str], safe_merge: bool = False) -> None:
        """Set the base weight to the original weight plus these adapters; changes nothing on failure."""
        weight = _plain_weight(self.get_base_layer())
        unmerged = weight.data.to("cpu") if self._unmerged is None else self._unmerged
        with torch.no_grad():
            merged = unmerged.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            for name in names:
                merged = merged + self.get_delta_weight(name, merged_for.get(name)).to(merged.device)
            merged = merged.to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise TrainingError("merge", f"adapter {', '.join(names)} gives weights that are not finite", "train it again")
        self._unmerged, weight.data = unmerged, merged
        self.merged_adapters, self._merged_for = list(names), dict(merged_for)

    def _restore_weight(self) -> None:
        """Restore the base weight bit for bit; the adapters still count as merged."""
        if self._unmerged is not None:
            weight = _plain_weight(self.get_base_layer())
            weight.data = self._unmerged.to(weight.device, weight.dtype)
            self._unmerged = None

    def _merge_again(self) -> None:
        """Undo :meth:`_restore_weight`."""
        if self.merged_adapters and self._unmerged is None:
            self._merge_into_weight(self.merged_adapters, self._merged_for)

    def _current_modality(self) -> Modality | None:
        block = current_block(self.moda_owner)
        return None if block is None else block.value

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

    def _check_unmerged(self, adapter_name: str, what: str) -> None:
        if adapter_name in self.merged_adapters:
            raise TrainingError(
                f"adapter {adapter_name!r}", f"is merged and cannot be {what}", "call model.unmerge_adapter() first"
            )


def _plain_weight(layer: nn.Module) -> Tensor:
    """The weight ``(O, D)``, a floating-point tensor.

    Raises:
        TrainingError: the weight is quantised or sharded.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind = type(weight.data)
    if not weight.is_floating_point() or kind is not Tensor:
        raise TrainingError(
            "merge",
            f"cannot merge into a base weight of type {weight.dtype if kind is Tensor else kind.__name__}",
            "load the base model whole and without quantisation, or leave the adapter unmerged",
        )
    return weight
