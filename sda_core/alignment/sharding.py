"""Shard a base model that does not fit one GPU over the processes (fully sharded data parallel).

torch's ``fully_shard`` (FSDP2; Zhao et al. 2023, arXiv 2304.11277) keeps one N-th of every frozen weight in each process and
gathers the weights of a block while the block runs.  The adapter is not sharded: it is small, stays whole in every process,
and its gradients are summed as without sharding, so the optimizer, checkpoints and the saved adapter are the same.  Frozen
weights have no gradient, so the only additional communication is that of the weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sda_core.errors import ConfigError
from sda_core.params import TrainingParams
from sda_core.processes import Processes


def home(training: TrainingParams, device: torch.device) -> torch.device:
    """The device on which to load the model: the CPU for a sharded one, so that no GPU ever holds all of it."""
    return device if training.sharding == "none" else torch.device("cpu")


def shard(model: nn.Module, device: torch.device, team: Processes) -> None:
    """Shard the base of a PEFT model over the processes, in place, and move this process's part to ``device``.

    The units are the blocks that transformers does not split (``_no_split_modules``), and the rest of the model inside a
    ``...ForConditionalGeneration``, whose ``forward`` is the one that runs.

    Args:
        model: the model, on the device given by :func:`home`.
        device: the device on which it will run.
        team: the processes; more than one.

    Raises:
        ConfigError: there is only one process, or the model does not define its blocks.
    """
    where = "params.yaml: train_adapter.training.sharding"
    if team.count == 1:
        raise ConfigError(
            where,
            "is 'fsdp', which shards the model over several processes, but there is only one",
            "start with torchrun --nproc-per-node N -m stages.train_adapter, or set it to none",
        )
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = set(getattr(base, "_no_split_modules", None) or ())
    inner = getattr(base, "base_model", base)
    blocks = [module for module in inner.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            where, f"is 'fsdp', but a {type(base).__name__} does not define its blocks (_no_split_modules)", "set it to none"
        )
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(device.type, (team.count,))
    units = [*blocks, *([inner] if inner is not base else [])]
    for unit in units:
        fully_shard(cast("nn.Module", unit), mesh=mesh, ignored_params=whole)
    for tensor in (*inner.parameters(), *inner.buffers()):  # tensors outside of all units; the head around ``inner`` is never run
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
