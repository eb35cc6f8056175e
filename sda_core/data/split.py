"""Split each user's history into training, validation and test rows.

=============  ================================================================================================
``train``      the rows for training
``valid``      a user's validation target, at most one; its history is the user's ``train`` rows
``test``       a user's test target, at most one; its history is every earlier row with any label
``valid_rest`` ``global_time`` only: further rows of the validation period; used only as history for the test
``test_rest``  ``global_time`` only: further rows of the test period; not used by any model or evaluation
=============  ================================================================================================
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.errors import DataError

_log = logging.getLogger(__name__)

MIN_SPLIT_LENGTH = 3
"""Shorter histories are used only for training, because nothing would remain if two rows were held out."""

_LABELS = ("train", "valid", "test", "valid_rest", "test_rest")
_TRAIN, _VALID, _TEST, _VALID_REST, _TEST_REST = range(len(_LABELS))

_CUTS = "params.yaml: filter.valid_from, filter.test_from"


def leave_one_out(interactions: pl.DataFrame) -> pl.DataFrame:
    """Leave-one-out split: each user's last interaction is the test target, the one before it the validation target.

    Histories are ordered by time; interactions with equal times keep the order of the given rows (the raw file's).  A user
    with fewer than three interactions has no targets; all rows are for training.  The split is by user, so one user's
    training rows may be later than another's test row, as always with leave-one-out.

    Args:
        interactions: columns ``user_id`` and ``timestamp``, and any others.

    Returns:
        The same rows, sorted by ``user_id`` and time, with a column ``split`` of ``train``, ``valid``, ``test``.
    """
    return label_last(interactions.sort(["user_id", "timestamp"], maintain_order=True))


def label_last(interactions: pl.DataFrame) -> pl.DataFrame:
    """Label rows that are already in history order (each user's rows oldest first) as :func:`leave_one_out` does."""
    lengths = np.bincount(_runs(interactions))
    ends = np.cumsum(lengths)[lengths >= MIN_SPLIT_LENGTH] - 1
    labels = np.full(len(interactions), _TRAIN, dtype=np.uint8)
    labels[ends] = _TEST
    labels[ends - 1] = _VALID
    return _labelled(interactions, labels)


def global_time(interactions: pl.DataFrame, valid_from: str | float, test_from: str | float) -> pl.DataFrame:
    """Split at two times that are the same for all users, so that no prediction uses later data.

    Rows before ``valid_from`` are ``train``.  From there to ``test_from`` a user's first row is ``valid`` and further
    ones are ``valid_rest``; from ``test_from`` on they are ``test`` and ``test_rest``.  A first row is a target only if
    the user has an earlier row for the prediction: a ``train`` row for ``valid``, any row before ``test_from`` for ``test``;
    otherwise it is ``*_rest``, too.  Every row of a target's history is older than the last cut before the target.

    Args:
        interactions: columns ``user_id`` and ``timestamp`` (seconds), and any others.
        valid_from: a day (``2014-01-31``, midnight UTC), or a share in (0, 1): the time before which that share of the
            rows lies.  Rows exactly at a cut belong to the later part, so the earlier part may be slightly smaller.
        test_from: the same; later than ``valid_from``.

    Returns:
        The same rows, sorted by ``user_id`` and time (equal times in the order given), with a column ``split``.

    Raises:
        DataError: there is no training row, no validation target or no test target.
    """
    return label_by_time(interactions.sort(["user_id", "timestamp"], maintain_order=True), valid_from, test_from)


def label_by_time(interactions: pl.DataFrame, valid_from: str | float, test_from: str | float) -> pl.DataFrame:
    """Label rows that are already in history order as :func:`global_time` does, with the same errors."""
    times = interactions["timestamp"].to_numpy()
    if len(times) == 0:
        raise DataError("interactions", "there are none to split", "loosen the thresholds of filter")
    begins = [_begin(times, cut) for cut in (valid_from, test_from)]
    period = (times >= begins[0]).astype(np.uint8)  # 0 train, 1 valid, 2 test; never falls within a history
    period += times >= begins[1]
    runs = _runs(interactions)
    is_target = np.zeros(len(times), dtype=np.bool_)
    is_target[1:] = (runs[1:] == runs[:-1]) & (period[1:] > period[:-1])
    labels = np.array([_TRAIN, _VALID_REST, _TEST_REST], dtype=np.uint8)[period]
    labels[is_target] = np.array([_TRAIN, _VALID, _TEST], dtype=np.uint8)[period[is_target]]
    _require_parts(labels, times, begins)
    begins_late = period[np.flatnonzero(np.diff(runs, prepend=-1))] > 0
    _log.info(
        "validation begins %s, the test %s; %d of %d users have no training row",
        *map(_shown, begins), begins_late.sum(), len(begins_late),
    )  # fmt: skip
    return _labelled(interactions, labels)


def _begin(times: npt.NDArray[np.int64], cut: str | float) -> int:
    """A cut in seconds since 1970."""
    if isinstance(cut, str):
        return int(datetime.fromisoformat(cut).replace(tzinfo=UTC).timestamp())
    place = min(round(cut * len(times)), len(times) - 1)
    return int(np.partition(times, place)[place])


def _require_parts(labels: npt.NDArray[np.uint8], times: npt.NDArray[np.int64], begins: list[int]) -> None:
    counts = np.bincount(labels, minlength=len(_LABELS))
    if counts[_TRAIN] and counts[_VALID] and counts[_TEST]:
        return
    valid_from, test_from = map(_shown, begins)
    if not counts[_TRAIN]:
        problem = f"no interaction is before {valid_from}, where validation begins"
    elif not counts[_VALID]:
        problem = f"no user has one interaction before {valid_from} and one between it and {test_from}: validation has no target"
    else:
        problem = f"no user has one interaction before {test_from} and one after it: the test has no target"
    span = f"{_shown(int(times.min()))} to {_shown(int(times.max()))}"
    raise DataError(_CUTS, f"{problem} (the {len(times)} interactions left are of {span})", "choose other cuts within that span")


def _shown(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ").removesuffix("+00:00").removesuffix(" 00:00:00")


def _runs(interactions: pl.DataFrame) -> npt.NDArray[np.int64]:
    """The index of each row's user, in the order of the rows."""
    return interactions["user_id"].rle_id().to_numpy().astype(np.int64)


def _labelled(interactions: pl.DataFrame, labels: npt.NDArray[np.uint8]) -> pl.DataFrame:
    names = pl.Series(_LABELS, dtype=pl.String)
    return interactions.with_columns(names.gather(pl.Series(labels).cast(pl.UInt32)).alias("split"))
