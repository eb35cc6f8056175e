"""Checkpoints of unfinished training: one safetensors file, replaced atomically, with a fingerprint of its inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sda_core.artifacts import replace_file

_log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Interface of torch's optimizers, and of others with the same state."""

    def state_dict(self) -> dict[str, Any]:
        """The state; key ``state`` holds the tensors of each parameter by its number."""
        ...

    def load_state_dict(self, given: dict[str, Any], /) -> None:
        """Restore a state returned by :meth:`state_dict`."""
        ...


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], fingerprint: str) -> None:
    """Write a checkpoint atomically.

    Args:
        path: path of the file; its folder is created.
        tensors: named tensors (weights, optimizer moments); stored on the CPU, contiguous.
        state: plain JSON values (step, epoch, best score, curve so far).
        fingerprint: hash of every input of the run (``sda_core.fingerprint.fingerprint``).
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with replace_file(path) as temporary:
        save_file(plain, temporary, metadata={"fingerprint": fingerprint, "state": json.dumps(state)})


def load_checkpoint(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint, or return None if there is none with this fingerprint.

    A damaged checkpoint, or one with another fingerprint, is ignored with a log line; training restarts.
    """
    return _read(path, fingerprint, with_tensors=True)


def has_checkpoint(path: Path, fingerprint: str) -> bool:
    """Whether :func:`load_checkpoint` would return one, judged by the file's header and size, without reading tensors."""
    return _read(path, fingerprint, with_tensors=False) is not None


def _read(path: Path, fingerprint: str, *, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
            metadata = handle.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                _log.info("%s: the checkpoint was made from other inputs and is ignored; training restarts", path)
                return None
            names = handle.keys() if with_tensors else []
            tensors = {name: handle.get_tensor(name) for name in names}
        return tensors, json.loads(metadata["state"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        _log.warning("%s: the checkpoint cannot be read and is ignored (%s); training restarts", path, error)
        return None


def optimizer_tensors(optimizer: Stateful, prefix: str = "optimizer.") -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors (AdamW: step, exp_avg, exp_avg_sq)."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: Stateful, tensors: Mapping[str, Tensor], prefix: str = "optimizer.") -> None:
    """Restore the state that :func:`optimizer_tensors` returned; the hyper-parameters of ``optimizer`` stay."""
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            entries.setdefault(int(index), {})[key] = tensor.clone()
    state = optimizer.state_dict()
    state["state"] = entries
    optimizer.load_state_dict(state)
