"""Save an adapter, and load it around its base model; or load the base model alone through the same interface."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from sda_core.adapters.card import model_card
from sda_core.adapters.merging import merged_modality
from sda_core.adapters.moda import modality
from sda_core.errors import ArtifactError, ConfigError, TrainingError

ModalityContext = Callable[[str], AbstractContextManager[object]]


def save(model: PeftModel, folder: Path, base_model: str | None = None, revision: str | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does, and a model card, ``README.md``.

    The files do not depend on the time, place or run: PEFT would store the folder that the base model was read from, of
    which only the last part is kept here.

    Args:
        model: a model with one adapter or several; adapters that are not named ``default`` go into sub-folders.
        folder: created if it does not exist; a ``README.md`` in it is replaced.
        base_model: hub id or name of the base model; None: read it from the model's configuration.
        revision: revision of the base model: the hub's commit, which is also written to ``adapter_config.json``, or another
            identifier.
    """
    name = base_model or getattr(model.get_base_model(), "name_or_path", None) or None
    if name is not None and (Path(name).is_absolute() or Path(name).is_dir()):
        name = Path(name).name
    commit = revision if revision is not None and re.fullmatch("[0-9a-f]{40}", revision) else None
    with _configs(model, name, commit):
        # False: do not query the hub for a resized vocabulary
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(model_card(model, name, revision), encoding="utf-8")


@contextmanager
def _configs(model: PeftModel, base_model: str | None, revision: str | None) -> Generator[None]:
    """Context in which the adapters' configurations name another base model, for saving."""
    before = {name: (config.base_model_name_or_path, config.revision) for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = base_model, revision
        yield
    finally:
        for name, config in model.peft_config.items():
            config.base_model_name_or_path, config.revision = before[name]


def load(model: nn.Module, folder: Path | None, *, merge: bool = False) -> tuple[nn.Module, ModalityContext]:
    """Load a saved adapter into a base model, frozen.

    Args:
        model: the base model; its layers are replaced in place.
        folder: folder written by :func:`save` or PEFT; None for the base model alone.
        merge: merge the adapter into the base weights during the passes of a modality (:func:`merged_modality`).

    Returns:
        The model in evaluation mode, and the context to enter around a pass of a modality (a null context without adapter).

    Raises:
        ArtifactError: a file is missing or damaged, or the adapter does not fit the model.
    """
    if folder is None:
        return model.eval(), lambda name: nullcontext(name)
    advice = "run `dvc repro` to train it again"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would treat the folder as a hub id
            raise ArtifactError(str(folder / name), "adapter is missing", advice)
    try:
        with without_rename_warning():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder))
    except ConfigError:
        raise
    except (TrainingError, OSError, RuntimeError, KeyError, ValueError, TypeError, SafetensorError, UserWarning) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        problem = f"adapter cannot be loaded onto this {type(model).__name__} ({type(error).__name__}: {first_line})"
        raise ArtifactError(str(folder), problem, f"{advice}, or use the backbone it was trained with") from None
    around = merged_modality if merge else modality
    return adapted.eval(), lambda name: around(adapted, name)


@contextmanager
def without_rename_warning() -> Generator[None]:
    """Silence a deprecation warning: PEFT 0.21 reads a property of transformers 5.23 under its former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
