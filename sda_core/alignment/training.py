"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sda_core import losses
from sda_core.adapters import base_model, modality
from sda_core.alignment import check, health
from sda_core.alignment.base_vectors import BaseVectors
from sda_core.alignment.inputs import (
    Chunks,
    Encoder,
    InputMaker,
    Ready,
    batch_rows,
    chunks_of,
    jobs,
)
from sda_core.alignment.sharding import shard
from sda_core.alignment.state import (
    Curve,
    StepRecord,
    parameter_groups,
    resume_run,
    save_run,
    sum_gradients,
    trained_parameters,
)
from sda_core.alignment.vision_cache import open_cache
from sda_core.errors import TrainingError
from sda_core.items import ItemSource
from sda_core.log import progress
from sda_core.losses.gather import gather
from sda_core.losses.grad_cache import Chunk, cached_backward
from sda_core.modalities import MODALITIES, Modality
from sda_core.params import LossParams, TrainingParams
from sda_core.processes import ALONE, Processes
from sda_core.seed import derive

_log = logging.getLogger(__name__)

WATCHED = 32
"""Number of items per process that are measured during training."""


def train_adapter(
    backbone: Encoder,
    model: nn.Module,
    source: ItemSource,
    training: TrainingParams,
    loss: LossParams,
    checkpoint: Path,
    fingerprint: str,
    device: torch.device,
    team: Processes = ALONE,
    section: str = "params.yaml: train_adapter.loss",
) -> Curve:
    """Train the adapter of ``model`` in place; the result is the same in every process.

    Args:
        backbone: makes inputs and pools hidden states.
        model: a model with MoDA layers (``sda_core.adapters.build``); all its trainable parameters are trained.
        source: the items.
        training: section of the optimisation.
        loss: section of the loss.
        checkpoint: file of the unfinished run, written by process 0 every ``checkpoint_every`` steps and at the end; cached
            outputs of the vision tower are written beside it.
        fingerprint: hash of every input of the run; a checkpoint with another one is not resumed.
        device: device for the model and the loss.
        team: the processes that share every batch; all call this.
        section: the loss section's path in the params, for messages.

    Returns:
        The training curve with one record every ``log_every`` steps and one for the last, the first step of this run, and the
        figures of a sample before and after training (:mod:`sda_core.alignment.check`).

    Raises:
        TrainingError: too few items for one batch, no trainable parameter, an uninformative teacher or a collapse during training
            (both if ``training.check`` is ``stop``), a loss or gradient that is not finite, or gradient checkpointing for a model
            that does not support it.
        ConfigError: a batch that cannot be shared evenly, or sharding or a vision cache that is not possible.
    """
    with team.raise_on_all_ranks():
        rows = np.flatnonzero(source.shows_image & source.shows_text)
        if len(rows) < training.batch_size:
            raise too_few_items(source, training.batch_size)
        chunks = chunks_of(training, team)
        cache = open_cache(backbone, source, rows, training, checkpoint.parent, fingerprint)
        if training.sharding == "fsdp":
            shard(model, device, team)
        else:
            model.to(device)
        criterion = losses.build(loss).to(device)
        trained = trained_parameters(model, criterion)
    optimizer = torch.optim.AdamW(parameter_groups(trained, training), lr=training.learning_rate)
    curve, moved, before = resume_run(checkpoint, fingerprint, trained, criterion, optimizer, team)
    first = curve[-1].step + 1 if curve else 0  # a checkpoint is always written right after a record
    if cache is not None and first < training.num_steps:
        cache.fill(max(stop - start for start, stop in chunks.bounds), team)
    maker, gates = InputMaker(backbone, source, cache), health.GateWatch()
    base_vectors = None
    if criterion.needs_base:
        shown = shown_rows(rows, training)
        base_vectors = BaseVectors(backbone, model, maker, shown, checkpoint.parent, fingerprint)
        base_vectors.fill(training.micro_batch_size or training.batch_size, team, sharded=training.sharding != "none")
    run = Run(training, chunks, team, backbone, model, maker, device)
    sample = Sample(rows, run)
    at_first = sample.batches(base_vectors)
    if criterion.found_temperature is None:
        criterion.calibrate([(*batch.base, batch.groups_B) for batch in at_first])
    before = before or check.measure(at_first, criterion)
    with team.raise_on_all_ranks():
        check.check(before, criterion, loss, training, section, say=team.is_main and not first)
    watch = Watch(sample.rows, at_first, run) if first < training.num_steps else None

    with (
        team.explain_connection_errors(),
        _train_mode(model, training),
        progress(training.num_steps, "train adapter", "steps", initial=first) as bar,
        closing(maker.stream(jobs(rows, first, training, chunks))) as stream,  # type: ignore[type-var]
    ):
        for step in range(first, training.num_steps):
            last = step + 1 == training.num_steps
            due = (step + 1) % training.checkpoint_every == 0 or last
            logged = step % training.log_every == 0 or due
            rate = learning_rate(step, training)
            for group in optimizer.param_groups:
                group["lr"] = rate
            temperature = criterion.temperature.item() if isinstance(criterion.temperature, Tensor) else criterion.temperature
            optimizer.zero_grad(set_to_none=True)
            base = None if base_vectors is None else base_vectors.pair(batch_rows(rows, step, training), device)
            batch = Step(step, run, criterion, stream, base)
            value = batch.backward(trained, moved if logged else None)
            sum_gradients(trained, team)
            norm = float(nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm))
            if not (math.isfinite(value) and math.isfinite(norm)):
                error = _not_finite(step, value, norm, source.item_ids[batch_rows(rows, step, training)], batch.broken)
                error.known_to_all = team.count > 1
                raise error
            optimizer.step()
            if logged:
                gates.record(model)
                curve.append(StepRecord(step, value, rate, norm, temperature, **batch.measured))
            if due and watch is not None:
                watch.look(step, loss, section)
            if due and team.is_main:
                save_run(checkpoint, fingerprint, trained, criterion, optimizer, curve, moved, before)
            bar.set_postfix_str(f"loss {value:.4f}")
            bar.update()
    at_last = sample.adapted(at_first) if curve else at_first
    after = check.measure(at_last, criterion) if curve else before
    if team.is_main and curve:
        targets = curve[0].teacher_targets, curve[-1].teacher_targets
        health.warn(model, moved, gates, at_last, targets, training.batch_size)
        check.report(before, after, loss, section)
    team.wait()
    kept = (record for record in curve if record.step % training.log_every == 0 or record.step + 1 == training.num_steps)
    return Curve(kept, first, check.Checked(before, after, criterion.found_temperature))


def too_few_items(source: ItemSource, batch_size: int) -> TrainingError:
    """The error if the items with image and text do not fill one batch, with a remedy."""
    num_items, num_shown = len(source), int((source.shows_image & source.shows_text).sum())
    wanted = "an image" if source.shows_text.all() else "image and text"
    if num_shown < 2:
        problem = f"{num_shown} of {num_items} items have {wanted}; an adapter needs at least 2 items with image and text"
        return TrainingError(
            "train_adapter", problem, "give the items images (docs/data.md), or train no adapter: dvc exp run -S ladder=zero_shot"
        )
    problem = f"should be at most {num_shown}, the number of items with {wanted} (got {batch_size})"
    advice = f"set it to {num_shown} or less"
    if not source.shows_image.all():
        advice += ", or set items.missing_image to placeholder, which gives every item an image"
    if not source.shows_text.all():
        advice += ", or set items.missing_text to placeholder, which gives every item a text"
    return TrainingError("params.yaml: train_adapter.training.batch_size", problem, advice)


def learning_rate(step: int, training: TrainingParams) -> float:
    """Linear warm-up from ``1 / warmup_steps`` of the rate to the full rate, then constant."""
    if training.warmup_steps == 0:
        return training.learning_rate
    return training.learning_rate * min(1.0, (step + 1) / training.warmup_steps)


@dataclass(frozen=True)
class Run:
    """Objects shared by all steps and measurements of a training run.

    Attributes:
        training: section of the optimisation.
        chunks: the chunks of this process.
        team: the processes; each collective call is made by all of them.
        backbone: pools hidden states.
        model: the model with the adapter.
        maker: makes the model's inputs.
        device: device of the vectors.
    """

    training: TrainingParams
    chunks: Chunks
    team: Processes
    backbone: Encoder
    model: nn.Module
    maker: InputMaker
    device: torch.device

    def encode(self, name: Modality, ready: Ready) -> Tensor:
        """Vectors ``(B, D)`` of one modality's inputs."""
        with modality(self.model, name):
            return self.backbone.encode(self.model, ready.inputs)


class Step:
    """One batch forward and backward.

    Args:
        number: number of the step.
        run: objects of the training run.
        criterion: the loss.
        stream: the inputs of all chunks, in the order of use.
        base: the vectors of the global batch by the backbone alone, if the loss needs them.

    Attributes:
        measured: diagnostics of the batch by the loss, if requested.
        broken: positions in the global batch whose vectors are not finite.
    """

    def __init__(
        self,
        number: int,
        run: Run,
        criterion: losses.AlignmentLoss,
        stream: Iterator[Ready],
        base: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._number = number
        self._run = run
        self._seed = run.training.seed
        self._one_draw = run.training.micro_batch_size is None and run.team.count == 1
        self._criterion = criterion
        self._stream = stream
        self._keys: dict[int, np.ndarray] = {}
        self._base = base
        self.measured: dict[str, float] = {}
        self.broken: np.ndarray = np.empty(0, dtype=np.int64)

    def backward(self, trained: Mapping[str, nn.Parameter], moved: dict[str, bool] | None) -> float:
        """Add this process's part of the gradients to the parameters, and return the loss of the global batch.

        Args:
            trained: the parameters.
            moved: records which modality's pass had a gradient; None: neither this nor the diagnostics are computed.
        """
        if self._one_draw:  # one random stream for both passes
            torch.manual_seed(derive(self._seed, "step", self._number))
        before: list[float] | None = None

        def loss(image_BD: Tensor, text_BD: Tensor) -> Tensor:
            nonlocal before
            image_BD, text_BD = gather(image_BD), gather(text_BD)
            groups_B = groups_of(np.concatenate([self._keys[place] for place in sorted(self._keys)]), image_BD.device)
            if moved is not None:  # before the loss, so that these B x B matrices are not held beside its graph
                self.measured = self._criterion.diagnostics(image_BD.detach(), text_BD.detach(), groups_B, self._base)
                before = _norms(trained)
            value = self._criterion(image_BD, text_BD, groups_B, self._base)
            if not bool(torch.isfinite(value.detach())):
                finite_B = torch.isfinite(image_BD.detach()).all(-1) & torch.isfinite(text_BD.detach()).all(-1)
                self.broken = (~finite_B).nonzero().flatten().cpu().numpy()
            return value

        def look(position: int) -> None:
            nonlocal before
            if moved is not None:
                after = _norms(trained)
                moved[MODALITIES[position]] |= after != before
                before = after

        parts = [[self._chunk(name, place) for place in range(len(self._run.chunks.bounds))] for name in MODALITIES]
        return float(cached_backward(parts, loss, look))

    def _chunk(self, name: Modality, place: int) -> Chunk:
        """A function that embeds one chunk of one modality; its draws depend on the chunk, not on the process or the call."""

        def embed() -> Tensor:
            with self._run.team.raise_on_all_ranks():
                ready = next(self._stream)
            if name == "image":
                self._keys[place] = ready.keys
            if not self._one_draw:
                torch.manual_seed(derive(self._seed, "step", self._number, name, self._run.chunks.first + place))
            return self._run.encode(name, ready)

        return embed


def _norms(trained: Mapping[str, nn.Parameter]) -> list[float]:
    """Norm of each adapter parameter's gradient; 0 without a gradient."""
    adapter = [parameter for name, parameter in trained.items() if not name.startswith("loss.")]
    with_grad = [parameter.grad for parameter in adapter if parameter.grad is not None]
    norms = iter(torch.stack([grad.norm() for grad in with_grad]).tolist()) if with_grad else iter(())
    return [next(norms) if parameter.grad is not None else 0.0 for parameter in adapter]


def _not_finite(step: int, value: float, norm: float, item_ids: np.ndarray, broken: np.ndarray) -> TrainingError:
    """The error of a step; it lists the items whose vectors are not finite, or else all items of the batch."""
    named = item_ids[broken] if len(broken) else item_ids
    return TrainingError(
        f"train_adapter, step {step}",
        f"loss {value} with a gradient of norm {norm}, expected finite numbers (items {_some(named)})",
        "lower train_adapter.training.learning_rate, raise the loss's temperature, or check those items",
    )


def _some(item_ids: np.ndarray) -> str:
    shown = ", ".join(str(item_id) for item_id in item_ids[:8])
    return shown if len(item_ids) <= 8 else f"{shown}, ... {len(item_ids)} in all"


class Sample:
    """The items that are measured before and after training: those of its first batches.

    Args:
        rows: rows of the items with image and text.
        run: objects of the training run.

    Attributes:
        rows: rows of each batch.
    """

    def __init__(self, rows: np.ndarray, run: Run) -> None:
        self.rows = [batch_rows(rows, step, run.training) for step in range(num_sampled(rows, run.training))]
        self._run = run

    def batches(self, base_vectors: BaseVectors | None) -> list[check.Batch]:
        """The sample's vectors by the backbone alone; read from disk if they were computed before."""
        found: list[check.Batch] = []
        for rows in self.rows:
            base = self._encode(rows, adapter=False) if base_vectors is None else base_vectors.pair(rows, self._run.device)
            found.append(check.Batch(*base, self._groups(rows), base))
        return found

    def adapted(self, at_first: Sequence[check.Batch]) -> list[check.Batch]:
        """The sample's vectors with the current adapter."""
        encoded = (self._encode(rows, adapter=True) for rows in self.rows)
        return [
            replace(batch, image_BD=image_BD, text_BD=text_BD)
            for batch, (image_BD, text_BD) in zip(at_first, encoded, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, rows: np.ndarray, *, adapter: bool) -> tuple[Tensor, Tensor]:
        """Image and text vectors of a batch of all processes."""
        parts: dict[Modality, list[Tensor]] = {name: [] for name in MODALITIES}
        run = self._run
        run.model.eval()
        for start, stop in run.chunks.bounds:
            for name in MODALITIES:
                with run.team.raise_on_all_ranks():
                    ready = run.maker.make(name, rows[start:stop])
                with nullcontext() if adapter else base_model(run.model):
                    parts[name].append(run.encode(name, ready))
        image_BD, text_BD = (gather(torch.cat(parts[name])) for name in MODALITIES)
        return image_BD, text_BD

    def _groups(self, rows: np.ndarray) -> Tensor:
        """Groups of a batch of all processes, from content keys alone."""
        with self._run.team.raise_on_all_ranks():
            keys = [self._run.maker.keys(rows[start:stop]) for start, stop in self._run.chunks.bounds]
        return groups_of(np.concatenate(keys), self._run.device)


class Watch:
    """Some items whose vectors are measured again during training, without dropout, to notice a collapse.

    Their inputs are made once, because another thread prepares the inputs of the next steps.

    Args:
        rows: rows of each batch of the sample.  Each process takes about :data:`WATCHED` items from its chunks of the first ones.
        at_first: the vectors of these batches by the backbone alone.
        run: objects of the training run.
    """

    def __init__(self, rows: Sequence[np.ndarray], at_first: Sequence[check.Batch], run: Run) -> None:
        self._run = run
        self._inputs: dict[Modality, list[Ready]] = {name: [] for name in MODALITIES}
        places = [(batch, start, stop) for batch in range(len(rows)) for start, stop in run.chunks.bounds]
        size = run.training.micro_batch_size or run.training.batch_size // run.team.count
        places = places[: -(-WATCHED // size)]  # as many in every process, because all take part in each pass of a sharded model
        positions: list[int] = []
        with run.team.raise_on_all_ranks():
            for batch, start, stop in places:
                stop = min(stop, start + WATCHED)
                positions += range(batch * run.training.batch_size + start, batch * run.training.batch_size + stop)
                for name in MODALITIES:
                    self._inputs[name].append(run.maker.make(name, rows[batch][start:stop]))
        of_all = gather(torch.tensor(positions, device=run.device))
        base = (torch.cat([batch.base[place] for batch in at_first]) for place in range(len(MODALITIES)))
        self._before = check.spreads(*(base_ND[of_all] for base_ND in base))
        self._warned = False

    def look(self, step: int, loss: LossParams, section: str) -> None:
        """Measure the items after a step; all processes call this.

        Raises:
            TrainingError: the vectors have collapsed, and ``training.check`` is ``stop``.
        """
        run = self._run
        training = run.model.training
        run.model.eval()
        with torch.no_grad():
            image_BD, text_BD = (
                gather(torch.cat([run.encode(name, ready) for ready in self._inputs[name]])) for name in MODALITIES
            )
        run.model.train(training)
        now = check.spreads(image_BD, text_BD)
        with run.team.raise_on_all_ranks():  # rounding may differ between processes
            warning = check.watch(self._before, now, step, loss, run.training, section)
        if warning and run.team.is_main and not self._warned:
            _log.warning("%s", warning)
            self._warned = True


def groups_of(keys: np.ndarray, device: torch.device) -> Tensor:
    """``(B,)`` numbers of the global batch, equal for items with equal content, from this process's content keys."""
    return torch.unique(gather(torch.from_numpy(keys).to(device)), return_inverse=True)[1]


def num_sampled(rows: np.ndarray, training: TrainingParams) -> int:
    """Number of batches in the sample: about 256 items, at least one batch, at most an epoch."""
    return min(len(rows) // training.batch_size, max(1, check.SAMPLE_ITEMS // training.batch_size))


def shown_rows(rows: np.ndarray, training: TrainingParams) -> np.ndarray:
    """The rows that the run and its sample use, ascending; all rows if the run has more than one epoch."""
    if training.num_steps > len(rows) // training.batch_size:
        return rows
    steps = range(max(training.num_steps, num_sampled(rows, training)))
    return np.unique(np.concatenate([batch_rows(rows, step, training) for step in steps]))


@contextmanager
def _train_mode(model: nn.Module, training: TrainingParams) -> Generator[None]:
    """Context with dropout and, if set, gradient checkpointing; both are switched off afterwards."""
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
    """Switch gradient checkpointing of a transformers model, under the newer or the older name of the method.

    Non-reentrant checkpointing is used: it needs no gradient on the inputs, which a frozen base does not have.
    """
    suffix = "enable" if on else "disable"
    for name in (f"activation_checkpointing_{suffix}", f"gradient_checkpointing_{suffix}"):
        switch = getattr(model, name, None)
        if switch is not None:
            switch(*([{"use_reentrant": False}] if on else []))
            return
    raise TrainingError(
        "params.yaml: train_adapter.training.gradient_checkpointing",
        f"is true, but a {type(model).__name__} does not support gradient checkpointing",
        "set it to false for this backbone",
    )
