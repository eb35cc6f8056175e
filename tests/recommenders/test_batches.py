"""Histories, data views and batches against plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.errors import DataError
from sda_core.recommenders import Histories, evaluation_data, training_data
from sda_core.recommenders.batches import batches_by_length, validation_view

_histories = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6)


def _compressed(histories: list[list[int]]) -> Histories:
    """User 0 is empty; users 1.. as given."""
    offsets = np.cumsum([0, 0, *(len(history) for history in histories)])
    return Histories(offsets.astype(np.int64), np.array([item for history in histories for item in history], dtype=np.int32))


@settings(deadline=None, max_examples=50)
@given(_histories, st.integers(0, 9))
def test_last_and_pairs_equal_plain_python(plain, length):
    histories = _compressed(plain)
    users = np.arange(len(plain), -1, -1)  # any order, and user 0
    rows = [([], *plain)[user] for user in users]
    assert histories.lengths.tolist() == [0, *(len(history) for history in plain)]
    expected = [(([0] * length) + row)[-length:] if length else [] for row in rows]
    assert histories.last(users, length).tolist() == expected
    found_rows, found_items = histories.pairs(users)
    expected_pairs = [(number, item) for number, row in enumerate(rows) for item in sorted(set(row))]
    assert list(zip(found_rows.tolist(), found_items.tolist(), strict=True)) == expected_pairs


def test_views_of_a_table(make_table):
    interactions = make_table([[5, 3, 4, 9], [1, 2, 8]])
    shuffled = interactions.sample(fraction=1.0, shuffle=True, seed=3)
    data = training_data(shuffled)
    assert (data.num_users, data.num_items) == (2, 9)
    assert [data.train.of(user).tolist() for user in (0, 1, 2)] == [[], [5, 3], [1]]
    assert data.valid_target.tolist() == [0, 4, 2]
    assert data.leaked_test_items is None
    view = validation_view(data)
    assert (view.users.tolist(), view.targets.tolist()) == ([1, 2], [4, 2])
    evaluation = evaluation_data(shuffled)
    assert [evaluation.histories.of(user).tolist() for user in (0, 1, 2)] == [[], [5, 3, 4], [1, 2]]
    assert (evaluation.users.tolist(), evaluation.targets.tolist()) == ([1, 2], [9, 8])
    assert evaluation.users.dtype == evaluation.targets.dtype == np.int32


def test_only_users_with_a_test_item_are_evaluated(make_table):
    interactions = make_table([[1, 2, 3], [2, 3, 1], [3, 1, 2]]).filter((pl.col("user_id") != 2) | (pl.col("split") != "test"))
    assert evaluation_data(interactions).users.tolist() == [1, 3]


def test_a_split_by_time_hands_out_what_each_part_may_know():
    rows = [
        (1, [(1, "train"), (2, "train"), (3, "valid"), (4, "valid_rest"), (5, "test"), (6, "test_rest")]),
        (2, [(2, "train"), (7, "test")]),  # no validation target
        (3, [(1, "train"), (3, "valid"), (8, "valid_rest")]),  # no test target
        (4, [(4, "valid_rest"), (9, "test"), (1, "test_rest")]),  # no training row
        (5, [(9, "test_rest")]),
    ]
    interactions = pl.DataFrame(
        [(user, item, time, 5.0, split) for user, history in rows for time, (item, split) in enumerate(history)],
        schema={"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32, "split": pl.String},
        orient="row",
    )
    data = training_data(interactions)
    assert [data.train.of(user).tolist() for user in range(1, 6)] == [[1, 2], [2], [1], [], []]
    assert data.valid_target.tolist() == [0, 3, 0, 3, 0, 0]
    handed_over = training_data(interactions.filter(pl.col("split").is_in(["train", "valid"])), num_users=5, num_items=9)
    assert (handed_over.num_users, handed_over.num_items) == (data.num_users, data.num_items) == (5, 9)
    assert handed_over.train.item_ids.tolist() == data.train.item_ids.tolist()
    assert handed_over.valid_target.tolist() == data.valid_target.tolist()
    view = validation_view(data)
    assert (view.users.tolist(), view.targets.tolist()) == ([1, 3], [3, 3])
    assert [view.histories.of(user).tolist() for user in (1, 3)] == [[1, 2], [1]]
    evaluation = evaluation_data(interactions)
    assert (evaluation.users.tolist(), evaluation.targets.tolist()) == ([1, 2, 4], [5, 7, 9])
    assert [evaluation.histories.of(user).tolist() for user in (1, 2, 4)] == [[1, 2, 3, 4], [2], [4]]


def test_rows_of_one_time_keep_their_order(make_table):
    interactions = make_table([[5, 3, 4, 9, 1]]).with_columns(timestamp=pl.lit(7, pl.Int64))
    assert training_data(interactions).train.of(1).tolist() == [5, 3, 4]


def test_sizes_are_taken_or_given(make_table):
    interactions = make_table([[5, 3, 4, 9]])
    without_test = interactions.filter(pl.col("split") != "test")
    assert training_data(without_test).num_items == 5
    assert training_data(without_test, num_users=3, num_items=9).num_items == 9
    assert training_data(without_test, num_users=3, num_items=9).valid_target.tolist() == [0, 4, 0, 0]
    with pytest.raises(DataError, match="goes up to 9"):
        training_data(interactions, num_items=8)


def test_unusable_tables_are_refused(make_table):
    interactions = make_table([[5, 3, 4, 9]])
    with pytest.raises(DataError, match="no row of split 'train'"):
        training_data(interactions.filter(pl.col("split") == "test"))
    with pytest.raises(DataError, match="no row of split 'test'"):
        evaluation_data(interactions.filter(pl.col("split") != "test"))
    twice = pl.concat([interactions, interactions.filter(pl.col("split") == "test")])
    with pytest.raises(DataError, match="more than one test row"):
        evaluation_data(twice)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 99))
def test_batches_hold_every_row_once_and_even_shares_of_the_targets(num_targets, rows_per_batch, seed):
    sizes = np.array(num_targets)
    batches = batches_by_length(sizes, rows_per_batch, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    share = sizes.sum() / -(-len(sizes) // rows_per_batch)
    for rows in batches:
        assert len(rows) > 0
        assert sizes[rows].sum() <= share + sizes[rows].max()
    lengths_in_batches = sorted((sizes[rows].min(), sizes[rows].max()) for rows in batches)
    assert all(earlier[1] <= later[0] or earlier == later for earlier, later in pairwise(lengths_in_batches))


def test_batches_differ_between_epochs():
    sizes = np.repeat([3, 4], 50)
    one, two = (batches_by_length(sizes, 10, np.random.default_rng(seed)) for seed in (1, 2))
    assert [rows.tolist() for rows in one] != [rows.tolist() for rows in two]
