"""Positions of several seeds side by side: the same users and targets under every seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import DataError
from sda_core.evaluation.groups import Mask
from sda_core.evaluation.metrics import Floats, Metric, per_user

Ids = npt.NDArray[np.int32]

_AGAIN = "run `dvc repro` to evaluate again"


@dataclass(frozen=True)
class Stacked:
    """The positions of one recommender by seed and user; users are ascending, seeds in the order of the table."""

    seeds: tuple[int, ...]
    user_U: Ids
    target_U: Ids
    candidates_U: Ids
    position_SU: Floats

    def values(self, metric: Metric, cutoff: int, items: Mask | None = None) -> Floats:
        """The metric by seed and user, ``(S, U)``.

        Args:
            metric: ``hit`` or ``ndcg``.
            cutoff: cut-off of the metric.
            items: ``(I + 1,)`` mask; only users with a target in it are used.  None for all users.
        """
        position_SU = self.position_SU if items is None else self.position_SU[:, items[self.target_U]]
        return per_user(metric, position_SU.ravel(), cutoff).reshape(position_SU.shape)


def stack(positions: pl.DataFrame, name: str = "positions") -> Stacked:
    """Arrange the positions of a table by seed and user.

    Args:
        positions: table SEED_POSITIONS, in any order of users; or POSITIONS, which has one seed (0).
        name: name of the table, for messages.

    Raises:
        DataError: a user occurs twice under a seed, or the seeds differ in users, targets or candidates.
    """
    seeds = positions["seed"].unique(maintain_order=True).to_list() if "seed" in positions.columns else [0]
    frames = positions.partition_by("seed", maintain_order=True) if "seed" in positions.columns else [positions]
    columns: list[tuple[Ids, ...]] = []
    places: list[Floats] = []
    for frame in frames or [positions]:
        if frame["user_id"].is_duplicated().any():
            raise DataError(name, "a user occurs twice; there should be one target a user")
        ordered = frame.sort("user_id")
        columns.append(tuple(ordered[key].to_numpy() for key in ("user_id", "target_item_id", "candidates")))
        places.append(ordered["position"].to_numpy().astype(np.float64))
    for seed, found in zip(seeds, columns, strict=False):
        if not all(np.array_equal(one, other) for one, other in zip(found, columns[0], strict=True)):
            problem = f"seeds {seeds[0]} and {seed} do not have the same users, targets and numbers of candidates"
            raise DataError(name, problem, _AGAIN)
    user_U, target_U, candidates_U = columns[0]
    return Stacked(tuple(seeds), user_U, target_U, candidates_U, np.stack(places))


def seed_sd(value_SU: Floats) -> float | None:
    """Standard deviation of the seeds' means, with ``S - 1`` in the denominator; None for one seed."""
    return float(np.std(value_SU.mean(axis=1), ddof=1)) if len(value_SU) > 1 else None
