"""Load checkpoints from disk or the hub: safetensors only, pinned revision; code in a checkpoint is never run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from sda_core.artifacts import replace_directory
from sda_core.backbones.base import BackboneInfo
from sda_core.errors import ArtifactError, ConfigError, DownloadError, storage_error
from sda_core.fingerprint import sha256_path
from sda_core.log import is_main_process
from sda_core.params import Checkpoint


@dataclass(frozen=True)
class Loaded:
    """The parts of a checkpoint; the model is on its device."""

    model: Any
    tokenizer: Any
    image_processor: Any
    revision: str
    attention: str


@dataclass(frozen=True)
class Classes:
    """The classes of transformers that read one type of checkpoint."""

    model: Any
    image_processor: Any  # based on PIL: the default ones need torchvision


def load_parts(params: Checkpoint, device: torch.device, family: str, classes: Mapping[type, Classes]) -> Loaded:
    """Read model, tokenizer and image processor.

    Args:
        params: section that names the checkpoint.
        device: device of the model.
        family: expected family for error messages, e.g. ``"a Qwen2.5-VL"``.
        classes: classes by the type of the checkpoint's configuration.

    Raises:
        ConfigError, ArtifactError, DownloadError: as :func:`sda_core.backbones.build`.
    """
    folder, revision = _checkpoint_folder(params)
    attention = _attention(params, device)
    damaged = ("is damaged or incomplete", "delete it and fetch it again, or name another checkpoint in backbone.name")
    try:
        with _quiet_transformers():
            # reject code in a checkpoint without asking the user
            config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if type(config) not in classes:
                raise ConfigError(
                    "params.yaml: backbone.name",
                    f"should be {family} checkpoint (got {params.name!r} of type {config.model_type!r})",
                    "set backbone.kind to the checkpoint's family",
                )
            found = classes[type(config)]
            model, report = found.model.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, params.dtype),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            image_processor = found.image_processor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ArtifactError(params.name, f"{damaged[0]} ({type(error).__name__}: {first_line})", damaged[1]) from None
    # transformers initialises missing tensors at random and only warns
    absent = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if absent:
        raise ArtifactError(
            params.name, f"{damaged[0]} ({len(absent)} weights missing or of another shape, e.g. {absent[0]})", damaged[1]
        )
    _take_legacy_template(tokenizer, folder)
    return Loaded(model.to(device), tokenizer, image_processor, revision, attention)


def describe(
    params: Checkpoint,
    loaded: Loaded,
    kind: str,
    pooling: Literal["mean", "last", "tower"],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
) -> BackboneInfo:
    """Properties of a loaded checkpoint on which its vectors depend."""
    return BackboneInfo(
        kind=kind,
        name=params.name,
        revision=loaded.revision,
        dtype=params.dtype,
        attention=loaded.attention,
        pooling=pooling,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_tiles=max_tiles,
        max_text_tokens=params.max_text_tokens,
    )


def save_parts(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> None:
    """Write model, tokenizer (with its template) and image processor atomically.

    Raises:
        ConfigError: an adapter is attached; PEFT has changed the model in place.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(str(folder), "a backbone with an adapter attached cannot be saved", "unload or merge the adapter first")
    with _quiet_transformers(), replace_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        image_processor.save_pretrained(temporary)


@contextmanager
def _quiet_transformers() -> Generator[None, None, None]:
    """Silence transformers: progress bars only on a terminal of process 0, no warnings (the relevant ones are checked here)."""
    remarks = transformers.utils.logging
    if not (sys.stderr.isatty() and is_main_process()):
        remarks.disable_progress_bar()
    before = remarks.get_verbosity()
    remarks.set_verbosity_error()
    try:
        yield
    finally:
        remarks.set_verbosity(before)


def _checkpoint_folder(params: Checkpoint) -> tuple[Path, str]:
    """The local folder of a checkpoint, downloaded first if it is a hub id, and its revision."""
    where = "params.yaml: backbone.name"
    try:
        folder = Path(params.name).expanduser()
    except RuntimeError as error:  # the home of an unknown user
        raise ArtifactError(params.name, f"cannot be resolved ({error})", f"correct {where}: give the full path") from None
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ArtifactError(params.name, "is not a checkpoint folder (it has no config.json)", f"correct {where}")
        return folder, f"sha256:{sha256_path(folder)}"
    if folder.is_file() or params.name.startswith((".", "/", "~")) or params.name.count("/") != 1:
        raise ArtifactError(params.name, "is neither a checkpoint folder nor a hub id such as owner/name", f"correct {where}")
    if params.revision is None or not re.fullmatch(r"[0-9a-f]{40}", params.revision):
        raise ConfigError(
            "params.yaml: backbone.revision",
            f"should pin a commit of {params.name}, 40 hexadecimal digits (got {params.revision!r})",
            "take it from the checkpoint's list of commits; only a local folder needs none",
        )
    try:
        # code files and pickled weights are never fetched
        snapshot = snapshot_download(
            params.name, revision=params.revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        )
    except HFValidationError as error:
        raise ConfigError(where, f"is not a hub id ({error})") from None
    except OSError as error:
        if (failure := storage_error(error, error.filename or f"{params.name}, the hub's cache")) is not None:
            raise failure from None
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise DownloadError(
            f"{params.name}@{params.revision}",
            f"is neither in the local cache nor can it be fetched ({reason})",
            "check name, revision and network, or set backbone.name to a folder that holds the checkpoint",
        ) from None
    return Path(snapshot), params.revision


def _attention(params: Checkpoint, device: torch.device) -> str:
    """The attention implementation: FlashAttention-2 if it can run, else PyTorch's SDPA."""
    installed = importlib.util.find_spec("flash_attn") is not None
    fits = device.type == "cuda" and params.dtype != "float32"
    match params.attention:
        case "auto":
            return "flash_attention_2" if installed and fits else "sdpa"
        case "flash_attention_2":
            if not (installed and fits):
                raise ConfigError(
                    "params.yaml: backbone.attention",
                    f"flash_attention_2 needs the package flash-attn, a GPU and a half-precision dtype"
                    f" (got {'installed' if installed else 'not installed'}, {device.type}, {params.dtype})",
                    "use 'auto'",
                )
            return "flash_attention_2"
        case "sdpa" | "eager":
            return params.attention


def _take_legacy_template(tokenizer: Any, folder: Path) -> None:
    """Use the processor's template if a checkpoint stores it apart from the tokenizer (``chat_template.json``)."""
    legacy = folder / "chat_template.json"
    if tokenizer.chat_template is None and legacy.is_file():
        try:
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8-sig"))["chat_template"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ArtifactError(str(legacy), "has no chat template", "fetch the checkpoint again") from None
