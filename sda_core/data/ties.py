"""The order of a user's interactions that have equal times.

The editions of 2014 and 2018 have times in days, and the published files are nearly sorted by item id.  A stable sort by
time then orders the interactions of one day by id: the "last" interaction of a user is the one with the largest id.  A
sequence model learns that order, although it is an artefact of the file.  On Gift Cards (2018) 69 % of the neighbouring
interactions of a user have equal times, and in 90 % of these pairs the later item has the larger id.

``filter.ties: random`` puts such interactions in a random order that depends only on the seed, and on the user, the item and
the rating of each row: neither on the order of the lines nor on other users.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.seed import derive

_log = logging.getLogger(__name__)

WARN_SHARE = 0.05
"""The filter stage logs a warning if the share of tied pairs or tied test targets is at least this."""

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_TARGETS = ("valid", "test")


def follows_tied(users: Codes, times: npt.NDArray[np.int64]) -> Mask:
    """Mask of the rows that have the user and the time of the previous row.

    Args:
        users: ``(N,)`` codes, in history order: rows sorted by user and time.
        times: ``(N,)`` times in any unit.

    Returns:
        ``(N,)`` flags; the first one is False.
    """
    found = np.zeros(len(users), dtype=np.bool_)
    found[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    return found


def is_tied(follows: Mask) -> Mask:
    """Mask of the rows that share their time with another row of their user, from :func:`follows_tied`."""
    found = follows.copy()
    found[:-1] |= follows[1:]
    return found


def random_order(
    users: Codes, times: npt.NDArray[np.int64], items: Codes, ratings: npt.NDArray[np.float32],
    user_ids: pl.Series, item_ids: pl.Series, seed: int,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """An order of rows in which rows with equal user and time are shuffled, and all others keep their place.

    Rows with equal user and time are sorted by a 64-bit hash of (seed, raw user id, raw item id, rating): BLAKE2b of the ids,
    combined with the finaliser of SplitMix64 (Steele, Lea & Flood 2014).

    Args:
        users: ``(N,)`` codes into ``user_ids``; rows are sorted by user and time.
        times: ``(N,)`` times in any unit.
        items: ``(N,)`` codes into ``item_ids``.
        ratings: ``(N,)`` float32.
        user_ids: raw ids by code.
        item_ids: raw ids by code.
        seed: ``filter.ties_seed``.

    Returns:
        ``(N,)`` row numbers: row k of the new order is row ``result[k]`` of the old one.  Equal rows keep their order.
    """
    order = np.arange(len(users))
    follows = follows_tied(users, times)
    rows = np.flatnonzero(is_tied(follows))
    if len(rows) == 0:
        return order
    key = derive(seed, "filter", "ties").to_bytes(8, "little")
    hashed = _mixed(_hashes(users[rows], user_ids, key) ^ _mixed(_hashes(items[rows], item_ids, key)))
    hashed = _mixed(hashed ^ ratings[rows].view(np.uint32).astype(np.uint64))
    group = np.cumsum(~follows)[rows]
    # Item and rating break ties between equal hashes, so that the order of the file never matters.
    order[rows] = rows[np.lexsort((ratings[rows], items[rows], hashed, group))]
    return order


def _hashes(codes: Codes, raw_ids: pl.Series, key: bytes) -> npt.NDArray[np.uint64]:
    """A hash of each code's raw id; only ids that occur are hashed."""
    distinct, places = np.unique(codes, return_inverse=True)
    hashes = [hashlib.blake2b(raw.encode(), digest_size=8, key=key).digest() for raw in raw_ids.gather(distinct)]
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)[places]


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of 64 bits in which every input bit changes every output bit half the time."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def describe_ties(users: Codes, times: npt.NDArray[np.int64], splits: pl.Series) -> dict[str, float]:
    """Shares of the kept interactions with equal times.

    Args:
        users: ``(N,)`` codes; rows are in history order.
        times: ``(N,)`` times by which the rows are ordered.
        splits: ``(N,)`` labels of the split.

    Returns:
        ``share_tied_pairs``: share of neighbouring pairs of a user with equal times.  ``share_tied_valid_targets`` and
        ``share_tied_test_targets``: share of targets that have the time of another interaction of their user, so that
        another order of equal times could give another target.  0 without pairs or targets.
    """
    follows = follows_tied(users, times)
    tied = is_tied(follows)
    num_pairs = len(users) - len(np.unique(users))
    shares = {"share_tied_pairs": float(follows.sum() / max(num_pairs, 1))}
    for name in _TARGETS:
        is_target = (splits == name).to_numpy()
        shares[f"share_tied_{name}_targets"] = float(tied[is_target].sum() / max(int(is_target.sum()), 1))
    return shares


def warn_of_ties(
    shares: dict[str, float], users: Codes, times: npt.NDArray[np.int64], items: Codes, policy: str, seed: int
) -> None:
    """Log a warning if a share of :func:`describe_ties` is at least :data:`WARN_SHARE`.

    Args:
        shares: the result of :func:`describe_ties`.
        users: ``(N,)`` as there.
        times: ``(N,)`` as there.
        items: ``(N,)`` codes in the order of the raw item ids.
        policy: ``filter.ties``.
        seed: ``filter.ties_seed``.
    """
    pairs, targets = shares["share_tied_pairs"], shares["share_tied_test_targets"]
    if max(pairs, targets) < WARN_SHARE:
        return
    found = (
        f"{pairs:.1%} of the neighbouring interactions of a user have equal times, and {targets:.1%} of the test targets"
        " share their time with another interaction of the user"
    )
    if policy == "random":
        _log.warning("%s; their order is random (filter.ties: random, ties_seed: %d)", found, seed)
        return
    later = np.flatnonzero(follows_tied(users, times))
    rising = float((items[later] > items[later - 1]).mean()) if len(later) else 0.0
    _log.warning(
        "%s; their order is the order of the lines in the raw file (filter.ties: file), which can leak item ids: in %.1f%% of"
        " these pairs the later item has the larger id (50%% by chance); use filter.ties: random for results that you compare",
        found, 100 * rising,
    )  # fmt: skip
