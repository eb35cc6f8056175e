"""The trained parameters, and the checkpoint of an unfinished run, which any number of processes can resume bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor, nn

from sda_core.alignment.check import Checked, Figures
from sda_core.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from sda_core.errors import TrainingError
from sda_core.losses import AlignmentLoss
from sda_core.modalities import MODALITIES
from sda_core.params import TrainingParams
from sda_core.processes import Processes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One point of the training curve.

    Attributes:
        step: number of the step, from 0.
        loss: loss of the step's batch, in nats.
        learning_rate: learning rate of the step.
        grad_norm: gradient norm over all trained parameters, before clipping.
        temperature: temperature of the loss in this step.
        teacher_entropy: for this and the following attributes see ``sda_core.losses.measures``.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    temperature: float
    teacher_entropy: float
    teacher_targets: float
    agreement: float
    alignment: float
    uniformity_image: float
    uniformity_text: float
    retrieval: float


class Curve(list[StepRecord]):
    """The training curve of a run.

    Attributes:
        first_step: the first step of this process: 0, or the one after the checkpoint from which it resumed.
        check: figures of a sample before and after training.
    """

    def __init__(self, records: Iterable[StepRecord], first_step: int, check: Checked) -> None:
        super().__init__(records)
        self.first_step = first_step
        self.check = check


def trained_parameters(model: nn.Module, criterion: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by names that are stable between runs.

    Raises:
        TrainingError: no parameter is trainable.
    """
    adapter = {f"adapter.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not adapter:
        raise TrainingError("train_adapter", "no parameter of the model is trainable", "build the adapter first, or unfreeze it")
    return adapter | {f"loss.{name}": parameter for name, parameter in criterion.named_parameters()}


def parameter_groups(trained: Mapping[str, nn.Parameter], training: TrainingParams) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on the low-rank matrices only: a gate or a temperature should not shrink to zero."""
    matrices = [parameter for name, parameter in trained.items() if ".moda_A." in name or ".moda_B." in name]
    others = [parameter for name, parameter in trained.items() if not (".moda_A." in name or ".moda_B." in name)]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def sum_gradients(trained: Mapping[str, nn.Parameter], team: Processes) -> None:
    """Replace the gradients by their sums over the processes; the result is bit-equal in all of them.

    Each process has run backward for its own rows, so its adapter gradients are summands.  The loss is the same in all
    processes, so its own parameters (a learned temperature) count once.  One buffer per dtype is summed, instead of using
    DistributedDataParallel, which sends its buckets during *one* backward pass; here there is one per chunk and modality.
    The adapter is small, and a test can check the plain sum.
    """
    if team.count == 1:
        return
    by_type: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        if name.startswith("loss.") and parameter.grad is not None:
            parameter.grad /= team.count
        by_type.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in by_type.values():
        grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        present = [
            grad.new_tensor([0.0 if parameter.grad is None else 1.0]) for grad, parameter in zip(grads, parameters, strict=True)
        ]
        flat = torch.cat([*(grad.flatten() for grad in grads), *present])
        team.sum(flat)
        # an optimizer skips a parameter without a gradient, but would decay one whose gradient is zero
        *summed, present_N = flat.split([*(grad.numel() for grad in grads), len(grads)])
        for parameter, grad, there in zip(parameters, summed, present_N.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter).clone() if there else None


def save_run(
    path: Path,
    fingerprint: str,
    trained: Mapping[str, nn.Parameter],
    criterion: AlignmentLoss,
    optimizer: torch.optim.Optimizer,
    curve: list[StepRecord],
    moved: Mapping[str, bool],
    before: Figures,
) -> None:
    """Write the checkpoint of an unfinished run atomically."""
    tensors = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
    means, num_batches = criterion.center.state()
    tensors |= {f"mean.{name}": mean_D for name, mean_D in means.items()}
    state = {
        "curve": [asdict(record) for record in curve],
        "moved": dict(moved),
        "num_batches": num_batches,
        "teacher_temperature": criterion.found_temperature,
        "before": asdict(before),
    }
    save_checkpoint(path, {**tensors, **optimizer_tensors(optimizer)}, state, fingerprint)


def resume_run(
    path: Path,
    fingerprint: str,
    trained: Mapping[str, nn.Parameter],
    criterion: AlignmentLoss,
    optimizer: torch.optim.Optimizer,
    team: Processes,
) -> tuple[list[StepRecord], dict[str, bool], Figures | None]:
    """Restore an unfinished run; without a checkpoint the curve is empty and there are no figures of the sample.

    Process 0 reads the file and sends it to the others, which need no access to its disk.
    """
    nothing: tuple[list[StepRecord], dict[str, bool], None] = ([], dict.fromkeys(MODALITIES, False), None)
    loaded = _broadcast_loaded(load_checkpoint(path, fingerprint) if team.is_main else None, team)
    if loaded is None:
        return nothing
    tensors, state = loaded
    shapes = {name.removeprefix("weight."): tensor.shape for name, tensor in tensors.items() if name.startswith("weight.")}
    names = {field.name for field in fields(StepRecord)}
    if (
        shapes != {name: parameter.shape for name, parameter in trained.items()}
        or set(state) != {"curve", "moved", "num_batches", "teacher_temperature", "before"}
        or any(set(record) != names for record in state["curve"])
    ):
        if team.is_main:
            _log.warning("%s: the checkpoint was written by another version and is ignored; training restarts", path)
        return nothing
    curve = [StepRecord(**record) for record in state["curve"]]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"weight.{name}"])
    restore_optimizer(optimizer, tensors)
    device = next(iter(trained.values())).device
    means = {name.removeprefix("mean."): mean.to(device) for name, mean in tensors.items() if name.startswith("mean.")}
    criterion.center.restore(means, state["num_batches"])
    criterion.found_temperature = state["teacher_temperature"]
    _log.info("resuming after step %d", curve[-1].step)
    return curve, {name: bool(state["moved"][name]) for name in MODALITIES}, Figures(**state["before"])


def _broadcast_loaded(
    loaded: tuple[dict[str, Tensor], dict[str, Any]] | None, team: Processes
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Broadcast the checkpoint that process 0 loaded."""
    if team.count == 1:
        return loaded
    state = team.broadcast_bytes(json.dumps(loaded[1]).encode() if loaded is not None else b"")
    tensors = team.broadcast_bytes(bytes_of_tensors(loaded[0]) if loaded is not None else b"")
    return (tensors_of_bytes(tensors), json.loads(state)) if state else None
