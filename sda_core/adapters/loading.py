"""A saved adapter around its base model, or the base model alone, with one way to pass a modality."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from sda_core.adapters.moda import modality
from sda_core.errors import ArtifactError

ModalityContext = Callable[[str], AbstractContextManager[object]]


def load(model: nn.Module, folder: Path | None) -> tuple[nn.Module, ModalityContext]:
    """Put a saved adapter into a base model.

    Args:
        model: the base model; its layers are replaced in place.
        folder: what ``PeftModel.save_pretrained`` wrote; None for the base model as it is.

    Returns:
        The model in evaluation mode, and what to enter around a pass of a modality (nothing, without an adapter).

    Raises:
        ArtifactError: the folder is missing, damaged, or does not fit the model.
    """
    if folder is None:
        return model.eval(), lambda name: nullcontext(name)
    advice = "run `dvc repro` to train it anew"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ArtifactError(str(folder / name), "adapter is missing", advice)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(str(folder), f"is no adapter for this backbone ({error})", advice) from None
    adapted.eval()
    return adapted, lambda name: modality(adapted, name)
