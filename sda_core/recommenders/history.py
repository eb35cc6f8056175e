"""The validation curves of a recommender: one table per seed, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sda_core.artifacts import Workspace
from sda_core.errors import ArtifactError
from sda_core.recommenders.base import EpochRecord

HISTORY = "history.tsv"
VALID = "valid_ndcg@10"


@dataclass(frozen=True)
class EpochMean:
    """One epoch, averaged over seeds; a seed that has stopped counts with its last values."""

    epoch: int  # from 1
    loss: float | None
    valid_ndcg_10: float | None  # None if no seed was evaluated at this epoch
    num_training: int  # seeds that have not stopped


def read_history(folder: Path) -> list[EpochRecord]:
    """Read the epochs of one trained recommender; empty for one that is not trained in epochs.

    Args:
        folder: see ``Workspace.model``.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    path = folder / HISTORY
    again = "run `dvc repro` to train it again"
    schema = {"epoch": pl.Int64, "loss": pl.Float64, "valid_ndcg_10": pl.Float64, "is_best": pl.String}
    try:
        if not path.read_text(encoding="utf-8"):
            return []
        frame = pl.read_csv(path, separator="\t", schema=schema)
    except FileNotFoundError:
        raise ArtifactError(str(path), "validation curve is missing", again) from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise ArtifactError(str(path), f"is not a validation curve ({error})", again) from None
    return [EpochRecord(epoch, loss, ndcg, best == "True") for epoch, loss, ndcg, best in frame.iter_rows()]


def best_ndcg(records: Sequence[EpochRecord]) -> float | None:
    """NDCG@10 on the validation targets at the epoch of the saved weights; None without validation."""
    return max((record.valid_ndcg_10 for record in records if record.valid_ndcg_10 is not None), default=None)


def mean_over_seeds(histories: Sequence[Sequence[EpochRecord]]) -> list[EpochMean]:
    """The mean curve of several seeds, until the last epoch of the longest one.

    Args:
        histories: epochs of each seed, in order.
    """
    made: list[EpochMean] = []
    last: list[float | None] = [None] * len(histories)  # last validation NDCG of each seed
    for place in range(max(map(len, histories), default=0)):
        losses = [loss for records in histories if (loss := records[min(place, len(records) - 1)].loss) is not None]
        training = [records[place] for records in histories if place < len(records)]
        last = [
            records[place].valid_ndcg_10 if place < len(records) and records[place].valid_ndcg_10 is not None else before
            for records, before in zip(histories, last, strict=True)
        ]
        known = [value for value in last if value is not None]
        is_evaluated = any(record.valid_ndcg_10 is not None for record in training)
        ndcg = float(np.mean(known)) if is_evaluated else None
        made.append(EpochMean(place + 1, float(np.mean(losses)) if losses else None, ndcg, len(training)))
    return made


def validation_metrics(workspace: Workspace, variant: str, name: str, seeds: Sequence[int]) -> dict[str, float]:
    """NDCG@10 on the validation targets at the saved epoch, mean over seeds; it is used to choose variants.

    Args:
        workspace: paths of the run.
        variant, name, seeds: variant, name and seeds of the trained recommenders.

    Returns:
        Empty without validation (``pop``, or no user has a validation target).

    Raises:
        ArtifactError: a validation curve is missing or damaged.
    """
    found = [best_ndcg(read_history(workspace.model(variant, name, seed))) for seed in seeds]
    known = [value for value in found if value is not None]
    return {VALID: float(np.mean(known))} if len(known) == len(found) else {}
