"""Protocols of evaluation: the items among which a user's target is ranked.

============  ==================================================================================================
fullrank      every item except those of the user's history (the default; it orders models correctly,
              Krichene & Rendle 2020)
uni100        100 distinct items that the user never interacted with, uniform over the catalogue
pop100        the same, drawn one after another in proportion to training popularity
============  ==================================================================================================

Sampled candidates are drawn once per dataset and depend only on the interactions, the catalogue and ``negatives_seed``: not on
the model, the order of rows, or the draws for other users.  They are stored (:mod:`sda_core.evaluation.negatives`), so all
variants use the same ones (compare :func:`candidates_hash`).  Items of *all* of the user's rows in any split are excluded, so
that neither a validation item nor a later item of the user is a negative.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.evaluation.groups import catalogue_size
from sda_core.seed import generator

_log = logging.getLogger(__name__)

Protocol = Literal["fullrank", "uni100", "pop100"]
Ids = npt.NDArray[np.int32]
NUM_NEGATIVES = 100


def evaluated_users(interactions: pl.DataFrame) -> Ids:
    """Ids of the users with a test target, ascending: the order of the rows of :func:`candidates`."""
    return interactions.filter(pl.col("split") == "test")["user_id"].unique().sort().to_numpy().astype(np.int32)


def _draw(urn: Ids, own: Ids, num: int, random: np.random.Generator) -> Ids:
    """Draw up to ``num`` distinct items of ``urn`` that are not in ``own``; ascending.

    Drawing from the urn with replacement and keeping the first occurrence of each item is successive sampling without
    replacement in proportion to the item's multiplicity.  If that takes too long, the draw continues with exponential keys
    (Efraimidis & Spirakis 2006), which have the same distribution.
    """
    taken: list[int] = []
    barred = {int(item) for item in own}
    for _ in range(4):
        for item in urn[random.integers(0, len(urn), size=2 * num)].tolist():
            if item not in barred:
                barred.add(item)
                taken.append(item)
                if len(taken) == num:
                    return np.sort(np.asarray(taken, dtype=np.int32))
    items, weights = np.unique(urn, return_counts=True)
    left = ~np.isin(items, np.fromiter(barred, dtype=np.int32, count=len(barred)))
    items, weights = items[left], weights[left]
    order = np.argsort(random.exponential(size=len(items)) / weights, kind="stable")
    rest = items[order[: num - len(taken)]]
    return np.sort(np.concatenate([np.asarray(taken, dtype=np.int32), rest.astype(np.int32)]))


def candidates(protocol: Protocol, interactions: pl.DataFrame, seed: int, num_items: int | None = None) -> Ids | None:
    """The negatives among which each test user's target is ranked.

    Args:
        protocol: see the module.
        interactions: the whole table, all splits.
        seed: ``evaluate.negatives_seed``.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.

    Returns:
        None for ``fullrank`` (all items).  Else (U, 100) int32: row i holds distinct item ids for user
        ``evaluated_users(interactions)[i]``, ascending, without the target.  If a user has fewer than 100 items to draw
        from, the row has all of them and is padded with zeros; this is logged.

    Raises:
        DataError: there are no interactions, or one has an item beyond the catalogue.
    """
    num_items = catalogue_size(interactions, num_items)
    match protocol:
        case "fullrank":
            return None
        case "uni100":
            urn = np.arange(1, num_items + 1, dtype=np.int32)
        case "pop100":
            train = interactions.filter(pl.col("split") == "train")
            urn = np.sort(train["item_id"].to_numpy()).astype(np.int32)  # one ball per interaction; sorted: any order of rows
        case _:
            assert_never(protocol)
    users = evaluated_users(interactions)
    histories = interactions.filter(pl.col("user_id").is_in(users.tolist())).sort("user_id", "item_id")
    owner, item = histories["user_id"].to_numpy(), histories["item_id"].to_numpy().astype(np.int32)
    begin, end = np.searchsorted(owner, users, side="left"), np.searchsorted(owner, users, side="right")
    table = np.zeros((len(users), NUM_NEGATIVES), dtype=np.int32)
    for row, user in enumerate(users.tolist()):
        if len(urn):
            drawn = _draw(
                urn,
                item[begin[row] : end[row]],
                NUM_NEGATIVES,
                generator(seed, "candidates", protocol, user),
            )
            table[row, : len(drawn)] = drawn
    short = int((table[:, -1] == 0).sum()) if len(table) else 0
    if short:
        fewest = int((table > 0).sum(axis=1).min())
        _log.warning(
            "%s: the catalogue is too small to give %d of %d users %d negatives each; the fewest are %d",
            protocol, short, len(users), NUM_NEGATIVES, fewest,
        )  # fmt: skip
    _log.info("%s: negatives of %d users, sha256 %s", protocol, len(users), candidates_hash(table))
    return table


def candidates_hash(table: npt.NDArray[np.int32]) -> str:
    """Hex SHA-256 of a table of candidates: equal exactly when two evaluations used the same negatives."""
    digest = hashlib.sha256(repr(table.shape).encode())
    digest.update(np.ascontiguousarray(table, dtype="<i4").tobytes())
    return digest.hexdigest()
