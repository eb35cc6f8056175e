"""Phase one: the adapter is trained on items alone, by aligning their pictures with their words.

Choices:

* AdamW (Loshchilov & Hutter 2019; betas 0.9 and 0.999), linear warm-up, then a constant rate: the paper (SDA, arXiv
  2512.06883) gives 2e-4, and its public code builds a schedule that it never steps.  Weight decay spares the gate, the
  modality embeddings and a learned temperature.
* A batch is a slice of a seeded permutation of the items, one permutation an epoch; what does not fill a batch waits
  for the next permutation.  Items that show no picture cannot be aligned and are left out.
* Image and text pass one after the other through the shared layers.  The loss is taken on detached vectors, and each
  pass is then run backward with its own gradient: the same sum as one backward call, but the picture's graph is freed
  before the words' is walked, and each modality's share of the gradient can be seen.
* Every draw is seeded by the step, so a resumed run is the run it resumes, bit for bit.
* Inputs are made one step ahead in a thread, because decoding and tokenising would keep a GPU waiting.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sda_core import losses
from sda_core.adapters import adapter_is_zero, modality
from sda_core.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from sda_core.errors import TrainingError
from sda_core.log import progress
from sda_core.params import LossParams, TrainingParams
from sda_core.seed import derive, generator

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from PIL import Image

    from sda_core.items import ItemBatch

_log = logging.getLogger(__name__)

MODALITIES = ("image", "text")


class Encoder(Protocol):
    """What training asks of a backbone; see ``sda_core.backbones.Backbone``."""

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence a picture."""
        ...

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence a text."""
        ...

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled vectors ``(B, D)``, not normalised."""
        ...


class Source(Protocol):
    """What training asks of the items; see ``sda_core.items.ItemSource``."""

    @property
    def shows_image(self) -> np.ndarray:
        """``(I,)`` bool: whether a batch holds a picture for the item."""
        ...

    @property
    def image_prompt(self) -> str:
        """The words beside every picture."""
        ...

    def batch(self, rows: np.ndarray) -> ItemBatch:
        """Prompts and pictures of some rows."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """One point of the training curve.

    Attributes:
        step: from 0.
        loss: of the step's batch, in nats.
        learning_rate: that the step used.
        grad_norm: over all trained parameters, before clipping.
        temperature: of the loss, as the step used it.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    temperature: float


def train_adapter(
    backbone: Encoder,
    model: nn.Module,
    source: Source,
    training: TrainingParams,
    loss: LossParams,
    checkpoint: Path,
    fingerprint: str,
    device: torch.device,
) -> list[StepRecord]:
    """Train the adapter of ``model`` in place.

    Args:
        backbone: makes inputs and pools hidden states.
        model: a model with MoDA layers (``sda_core.adapters.build``); its trainable parameters are what is trained.
        source: the items.
        training: optimisation.
        loss: which loss, and its temperature.
        checkpoint: file of the unfinished run, written every ``checkpoint_every`` steps and at the end.
        fingerprint: of every input of the run; a checkpoint of another run is not resumed.
        device: where the model and the loss are put.

    Returns:
        The training curve, one record every ``log_every`` steps and one for the last.

    Raises:
        TrainingError: too few items for one batch, nothing to train, a loss or gradient that is not finite, or gradient
            checkpointing asked of a model that has none.
    """
    rows = np.flatnonzero(source.shows_image)
    if len(rows) < training.batch_size:
        raise TrainingError(
            "params.yaml: train_adapter.training.batch_size",
            f"is {training.batch_size}, but only {len(rows)} items show a picture",
            "reduce it, or give items without a picture a placeholder (items.missing_image)",
        )
    model.to(device)
    criterion = losses.build(loss).to(device)
    trained = _trained_parameters(model, criterion)
    optimizer = torch.optim.AdamW(_groups(trained, training), lr=training.learning_rate)
    curve, moved = _resume(checkpoint, fingerprint, trained, optimizer)
    first = curve[-1].step + 1 if curve else 0  # a checkpoint is always written behind a record

    with (
        _train_mode(model, training),
        progress(training.num_steps, "train adapter", "steps", initial=first) as bar,
        closing(_batches(backbone, source, rows, first, training)) as batches,
    ):
        for step, batch in batches:
            last = step + 1 == training.num_steps
            due = (step + 1) % training.checkpoint_every == 0 or last
            rate = learning_rate(step, training)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(derive(training.seed, "step", step))
            temperature = criterion.temperature.item() if isinstance(criterion.temperature, Tensor) else criterion.temperature
            optimizer.zero_grad(set_to_none=True)
            logged = step % training.log_every == 0 or due
            value = _backward(backbone, model, criterion, batch, trained, moved if logged else None)
            norm = float(nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm))
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise TrainingError(
                    f"train_adapter, step {step}",
                    f"loss {value} with a gradient of norm {norm}, expected finite numbers (items {_some(batch.item_ids)})",
                    "lower train_adapter.training.learning_rate, raise the loss's temperature, or look at those items",
                )
            optimizer.step()
            if logged:
                curve.append(StepRecord(step, value, rate, norm, temperature))
            if due:
                _save(checkpoint, fingerprint, trained, optimizer, curve, moved)
            bar.set_postfix_str(f"loss {value:.4f}")
            bar.update()
    _warn(model, moved, num_steps=training.num_steps)
    return [record for record in curve if record.step % training.log_every == 0 or record.step + 1 == training.num_steps]


def learning_rate(step: int, training: TrainingParams) -> float:
    """Linear from ``1 / warmup_steps`` of the rate up to all of it, then constant."""
    if training.warmup_steps == 0:
        return training.learning_rate
    return training.learning_rate * min(1.0, (step + 1) / training.warmup_steps)


def batch_rows(rows: np.ndarray, step: int, training: TrainingParams) -> np.ndarray:
    """The ``(B,)`` rows of a step: slices of one seeded permutation an epoch."""
    per_epoch = len(rows) // training.batch_size
    epoch, place = divmod(step, per_epoch)
    permuted = rows[generator(training.seed, "batches", epoch).permutation(len(rows))]
    return permuted[place * training.batch_size : (place + 1) * training.batch_size]


@dataclass(frozen=True)
class _Batch:
    """Model inputs of a step's items, on the CPU."""

    item_ids: np.ndarray
    image_inputs: dict[str, Tensor]
    text_inputs: dict[str, Tensor]


def _batches(
    backbone: Encoder, source: Source, rows: np.ndarray, first: int, training: TrainingParams
) -> Generator[tuple[int, _Batch], None, None]:
    """The steps from ``first`` on with their inputs, each made while the step before it is computed."""

    def make(step: int) -> _Batch:
        items = source.batch(batch_rows(rows, step, training))
        images = [image for image in items.images if image is not None]
        assert len(images) == len(items.images)
        return _Batch(items.item_ids, backbone.image_inputs(images, source.image_prompt), backbone.text_inputs(items.texts))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
        waiting = [worker.submit(make, step) for step in range(first, min(first + 1, training.num_steps))]
        for step in range(first, training.num_steps):
            batch = waiting.pop().result()
            if step + 1 < training.num_steps:
                waiting.append(worker.submit(make, step + 1))
            yield step, batch


def _backward(
    backbone: Encoder,
    model: nn.Module,
    criterion: nn.Module,
    batch: _Batch,
    trained: Mapping[str, nn.Parameter],
    moved: dict[str, bool] | None,
) -> float:
    """One batch forward and backward; gradients are left in the parameters, the loss is returned.

    ``moved`` notes which modality's pass gave a gradient; None where nobody looks.
    """
    with modality(model, "image"):
        image_BD = backbone.encode(model, batch.image_inputs)
    with modality(model, "text"):
        text_BD = backbone.encode(model, batch.text_inputs)
    image_leaf_BD, text_leaf_BD = image_BD.detach().requires_grad_(), text_BD.detach().requires_grad_()
    value = criterion(image_leaf_BD, text_leaf_BD)
    result = float(value.detach())
    if not math.isfinite(result):
        return result
    value.backward()
    before = _norms(trained) if moved is not None else None
    for name, vectors_BD, leaf_BD in (("image", image_BD, image_leaf_BD), ("text", text_BD, text_leaf_BD)):
        if vectors_BD.requires_grad:
            vectors_BD.backward(leaf_BD.grad)
        if moved is not None:
            after = _norms(trained)
            moved[name] = moved[name] or after != before
            before = after
    return result


def _norms(trained: Mapping[str, nn.Parameter]) -> list[float]:
    """Norm of each parameter's gradient; 0 where there is none."""
    with_grad = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    norms = iter(torch.stack([grad.norm() for grad in with_grad]).tolist()) if with_grad else iter(())
    return [next(norms) if parameter.grad is not None else 0.0 for parameter in trained.values()]


def _trained_parameters(model: nn.Module, criterion: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by names that are stable between runs."""
    adapter = {f"adapter.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not adapter:
        raise TrainingError("train_adapter", "no parameter of the model is trainable", "build the adapter first, or unfreeze it")
    return adapter | {f"loss.{name}": parameter for name, parameter in criterion.named_parameters()}


def _groups(trained: Mapping[str, nn.Parameter], training: TrainingParams) -> list[dict[str, Any]]:
    """Weight decay on the low-rank matrices only: a gate or a temperature has no reason to shrink to zero."""
    matrices = [parameter for name, parameter in trained.items() if ".moda_A." in name or ".moda_B." in name]
    others = [parameter for name, parameter in trained.items() if not (".moda_A." in name or ".moda_B." in name)]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextmanager
def _train_mode(model: nn.Module, training: TrainingParams) -> Iterator[None]:
    """Dropout on, and gradient checkpointing where it is asked for; both off again afterwards."""
    model.train()
    try:
        if training.gradient_checkpointing:
            _checkpointing(model, on=True)
        yield
    finally:
        if training.gradient_checkpointing:
            _checkpointing(model, on=False)
        model.eval()


def _checkpointing(model: nn.Module, on: bool) -> None:
    """Switch a transformers-style model's checkpointing, under its newer name or its older one.

    The kind that is not re-entrant: it needs no gradient on the inputs, which a frozen base does not have.
    """
    suffix = "enable" if on else "disable"
    for name in (f"activation_checkpointing_{suffix}", f"gradient_checkpointing_{suffix}"):
        switch = getattr(model, name, None)
        if switch is not None:
            switch(*([{"use_reentrant": False}] if on else []))
            return
    raise TrainingError(
        "params.yaml: train_adapter.training.gradient_checkpointing",
        f"is true, but a {type(model).__name__} has no such switch",
        "set it to false for this backbone",
    )


def _save(
    path: Path,
    fingerprint: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    curve: list[StepRecord],
    moved: Mapping[str, bool],
) -> None:
    tensors = {f"weight.{name}": parameter.data for name, parameter in trained.items()}
    state = {"curve": [asdict(record) for record in curve], "moved": dict(moved)}
    save_checkpoint(path, {**tensors, **optimizer_tensors(optimizer)}, state, fingerprint)


def _resume(
    path: Path, fingerprint: str, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[list[StepRecord], dict[str, bool]]:
    """Put back an unfinished run; an empty curve where there is none."""
    nothing: tuple[list[StepRecord], dict[str, bool]] = ([], dict.fromkeys(MODALITIES, False))
    loaded = load_checkpoint(path, fingerprint)
    if loaded is None:
        return nothing
    tensors, state = loaded
    shapes = {name.removeprefix("weight."): tensor.shape for name, tensor in tensors.items() if name.startswith("weight.")}
    if shapes != {name: parameter.shape for name, parameter in trained.items()} or set(state) != {"curve", "moved"}:
        _log.warning("%s was written by another version of this program; beginning anew", path)
        return nothing
    names = {field.name for field in fields(StepRecord)}
    curve = [StepRecord(**record) for record in state["curve"] if set(record) == names]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"weight.{name}"])
    restore_optimizer(optimizer, tensors)
    _log.info("resuming behind step %d", curve[-1].step)
    return curve, {name: bool(state["moved"][name]) for name in MODALITIES}


def _warn(model: nn.Module, moved: Mapping[str, bool], num_steps: int) -> None:
    """Say what looks wrong about a finished run, and what to try."""
    if num_steps == 0:
        return
    if adapter_is_zero(model):
        _log.warning(
            "the adapter is still zero, so vectors equal the base model's; raise the learning rate or the number of steps"
        )
    for name in MODALITIES:
        if not moved[name]:
            _log.warning("no gradient ever came from the %s pass; look at its inputs and at what the adapter hits", name)


def _some(item_ids: np.ndarray) -> str:
    shown = ", ".join(str(item_id) for item_id in item_ids[:8])
    return shown if len(item_ids) <= 8 else f"{shown}, ... {len(item_ids)} in all"
