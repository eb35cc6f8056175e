"""k-core: a fix-point, the largest one, whatever the order of the rows and the type of the ids."""

from __future__ import annotations

import datetime
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data import k_core
from sda_core.data.kcore import core_mask, single_pass_mask
from sda_core.errors import DataError

PAIRS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60)
MINIMUM = st.integers(0, 4)


def plain_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[int]:
    """The definition, one row at a time: take away any row that breaks a threshold until none does."""
    rows = list(range(len(pairs)))
    while True:
        users = Counter(pairs[row][0] for row in rows)
        items = Counter(pairs[row][1] for row in rows)
        broken = next((row for row in rows if users[pairs[row][0]] < min_user or items[pairs[row][1]] < min_item), None)
        if broken is None:
            return rows
        rows.remove(broken)


def frame_of(pairs: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema={"user_id": pl.Int64, "item_id": pl.Int64}, orient="row").with_row_index("row")


@settings(max_examples=50, deadline=None)
@given(PAIRS, MINIMUM, MINIMUM)
def test_equals_the_definition(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> None:
    core = k_core(frame_of(pairs), min_user, min_item)
    assert core["row"].to_list() == plain_core(pairs, min_user, min_item)


@settings(max_examples=50, deadline=None)
@given(PAIRS, MINIMUM, MINIMUM, st.randoms(use_true_random=False))
def test_is_a_fix_point_and_blind_to_row_order(pairs: list[tuple[int, int]], min_user: int, min_item: int, random) -> None:
    frame = frame_of(pairs)
    core = k_core(frame, min_user, min_item)
    assert k_core(core, min_user, min_item).equals(core)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = k_core(frame[order], min_user, min_item)
    assert shuffled["row"].to_list() == [row for row in order if row in set(core["row"])]


@pytest.mark.parametrize("num_links", [40, 3000])
def test_a_long_cascade_unravels_to_its_end(num_links: int) -> None:
    """A path of users and items, two rows each, with one loose end: taking it away eats the whole path, link by link."""
    users = np.repeat(np.arange(num_links), 2)
    items = np.concatenate([[0], np.repeat(np.arange(1, num_links), 2), [num_links]])
    assert not core_mask(users, items, 2, 2).any()
    # A closed ring beside it is a 2-core and stays.
    ring = np.arange(50 * num_links)
    ring_users = np.concatenate([users, num_links + ring, num_links + ring])
    ring_items = np.concatenate([items, num_links + 1 + ring, num_links + 1 + (ring + 1) % len(ring)])
    mask = core_mask(ring_users, ring_items, 2, 2)
    assert not mask[: len(users)].any()
    assert mask[len(users) :].all()


@pytest.mark.parametrize(
    "ids",
    [
        ["u", "v", "w"],
        [1.5, 2.5, float("nan")],
        [datetime.date(2020, 1, day) for day in (1, 2, 3)],
        [b"u", b"v", b"w"],
        [2**62, -(2**62), 0],
    ],
    ids=["string", "float", "date", "binary", "large integers"],
)
def test_takes_ids_of_any_type(ids: list[object]) -> None:
    frame = pl.DataFrame(
        {"user_id": [ids[0], ids[0], ids[1], ids[1], ids[2]], "item_id": [ids[2], ids[1], ids[2], ids[1], ids[0]]}
    )
    assert k_core(frame, 2, 2).equals(frame[:4])
    as_category = frame.with_columns(pl.col("user_id").rank("dense").cast(pl.String).cast(pl.Categorical))
    assert len(k_core(as_category, 2, 2)) == 4


def test_counts_repeated_pairs_and_keeps_columns_and_empty_tables() -> None:
    frame = pl.DataFrame({"item_id": ["a"] * 5, "other": range(5), "user_id": ["u"] * 5})
    assert k_core(frame).equals(frame)
    assert k_core(frame[:4]).is_empty()
    assert k_core(frame[:0]).columns == frame.columns


def test_a_single_pass_leaves_what_a_core_does_not() -> None:
    # Item 1 has two rows at first; once user 1 (one row) is gone it has one.
    users, items = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 2])
    assert single_pass_mask(users, items, 2, 2).tolist() == [True, True, False, True, False]
    assert not core_mask(users, items, 2, 2).any()


def test_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="no column 'item_id'"):
        k_core(pl.DataFrame({"user_id": [1]}))
    with pytest.raises(DataError, match="'user_id' holds 1 null"):
        k_core(pl.DataFrame({"user_id": [1, None], "item_id": [1, 1]}))
