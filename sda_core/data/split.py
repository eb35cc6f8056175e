"""Training, validation and test rows of each user's history."""

from __future__ import annotations

import polars as pl

MIN_SPLIT_LENGTH = 3
"""A shorter history has nothing to train on once two rows are held out; it stays whole in the training part."""


def leave_one_out(interactions: pl.DataFrame) -> pl.DataFrame:
    """Leave-one-out split: each user's last interaction is for the test, the one before it for validation.

    Histories are ordered by time; interactions of one time keep the order of the rows given (the raw file's).  A user
    with fewer than three interactions is neither validated nor tested: all of them are for training.  The split is by
    user, so one user's training rows may be later than another's test row (that is what leave-one-out is).

    Args:
        interactions: columns ``user_id`` and ``timestamp``, and any others.

    Returns:
        The same rows, sorted by ``user_id`` and time, with a column ``split`` of ``train``, ``valid``, ``test``.
    """
    return label_last(interactions.sort(["user_id", "timestamp"], maintain_order=True))


def label_last(interactions: pl.DataFrame) -> pl.DataFrame:
    """Label rows that are already in history order (each user's rows oldest first) as :func:`leave_one_out` does."""
    length = pl.len().over("user_id")
    from_end = pl.int_range(pl.len()).reverse().over("user_id")
    return interactions.with_columns(
        pl.when(length < MIN_SPLIT_LENGTH)
        .then(pl.lit("train"))
        .when(from_end == 0)
        .then(pl.lit("test"))
        .when(from_end == 1)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("train"))
        .alias("split")
    )
