"""The training loop of all recommenders: seeded epochs, early stopping on validation NDCG@10, resumable at every evaluation.

Batches, negatives, masks and dropout of an epoch are drawn from seeds derived from the number of the epoch, so a run that is
resumed from its checkpoint makes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sda_core.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from sda_core.errors import TrainingError
from sda_core.log import progress
from sda_core.params import FitParams
from sda_core.recommenders.adam import Adam
from sda_core.recommenders.base import EpochRecord, Recommender
from sda_core.recommenders.batches import TrainingData, validation_view
from sda_core.recommenders.position import USERS_PER_CHUNK, count_positions, ndcg_at_10
from sda_core.seed import derive, generator

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class TrainedRecommender(Recommender):
    """Base class of recommenders with weights: it defines batches and a loss, and is trained by :func:`train`."""

    fit_params: FitParams

    @abstractmethod
    def batches(self, data: TrainingData, random: np.random.Generator) -> Iterator[Batch]:
        """The batches of one epoch as CPU tensors; all randomness comes from ``random``.

        Raises:
            TrainingError: there is no training data.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """See :meth:`Recommender.fit`."""
        self.check_data(data)
        return train(self, data, self.fit_params, checkpoint, fingerprint, device)


def _copy_of_weights(model: TrainedRecommender) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_epoch(model: TrainedRecommender, data: TrainingData, optimizer: Adam, epoch: int, device: torch.device) -> float:
    """Train for one epoch; returns the mean loss of its steps."""
    seed = model.seed
    torch.manual_seed(derive(seed, "dropout", epoch))
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_steps = 0
    for batch in model.batches(data, generator(seed, "batches", epoch)):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=model.fit_params.dtype == "bfloat16"):
            loss = model.loss({name: tensor.to(device) for name, tensor in batch.items()})
        loss.backward()
        optimizer.step()
        total += loss.detach()
        num_steps += 1
    return float(total) / num_steps


def train(
    model: TrainedRecommender,
    data: TrainingData,
    params: FitParams,
    checkpoint: Path,
    fingerprint: str,
    device: torch.device,
) -> list[EpochRecord]:
    """Train with Adam until ``max_epochs``, or until ``patience`` evaluations did not improve NDCG@10.

    The best weights are restored at the end.  Without validation targets the last weights are the best.

    Returns:
        One record per epoch.

    Raises:
        TrainingError: the loss is not finite, or there is no training data.
    """
    model.to(device)
    optimizer = Adam(model.parameters(), params.learning_rate, params.weight_decay)
    validation = validation_view(data)
    has_validation = len(validation.users) > 0
    if not has_validation:
        _log.warning(
            "no user has a validation target: training runs for all %d epochs, and the last weights count", params.max_epochs
        )
    records: list[EpochRecord] = []
    best_weights = _copy_of_weights(model)
    best_ndcg = -math.inf
    num_without_gain = 0
    resumed = load_checkpoint(checkpoint, fingerprint)
    if resumed is not None:
        tensors, state = resumed
        model.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        )
        best_weights = {
            name.removeprefix("best."): tensor.to(device) for name, tensor in tensors.items() if name.startswith("best.")
        }
        restore_optimizer(optimizer, tensors)
        records = [EpochRecord(**record) for record in state["records"]]
        best_ndcg = -math.inf if state["best_ndcg"] is None else state["best_ndcg"]
        num_without_gain = state["num_without_gain"]
        _log.info("%s: resumed after epoch %d", model.params.kind, len(records))
    cuda_devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda_devices),
        progress(params.max_epochs, f"train {model.params.kind}", "epochs", initial=len(records)) as bar,
    ):
        while len(records) < params.max_epochs and num_without_gain < params.patience:
            epoch = len(records) + 1
            loss = train_epoch(model, data, optimizer, epoch, device)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"train_recommender.{model.params.kind}", f"the loss of epoch {epoch} is {loss}", "lower learning_rate"
                )
            ndcg: float | None = None
            is_best = not has_validation
            is_evaluated = epoch % params.eval_every == 0 or epoch == params.max_epochs
            if is_evaluated and has_validation:
                ndcg = ndcg_at_10(count_positions(model, validation, None, USERS_PER_CHUNK, device))
                is_best = ndcg > best_ndcg
                num_without_gain = 0 if is_best else num_without_gain + 1
                best_ndcg = max(best_ndcg, ndcg)
            if is_best:
                best_weights = _copy_of_weights(model)
            records.append(EpochRecord(epoch, loss, ndcg, is_best))
            if is_evaluated:
                tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
                tensors |= {f"best.{name}": tensor for name, tensor in best_weights.items()}
                tensors |= optimizer_tensors(optimizer)
                state = {
                    "records": [asdict(record) for record in records],
                    "best_ndcg": best_ndcg if has_validation else None,
                    "num_without_gain": num_without_gain,
                }
                save_checkpoint(checkpoint, tensors, state, fingerprint)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}" + ("" if ndcg is None else f", valid ndcg@10 {ndcg:.4f}"))
    model.load_state_dict(best_weights)
    model.eval()
    best_epoch = max((record.epoch for record in records if record.is_best), default=0)
    _log.info(
        "%s: %d epochs, best is %d%s",
        model.params.kind,
        len(records),
        best_epoch,
        f" with valid ndcg@10 {best_ndcg:.4f}" if has_validation else "",
    )
    return records
