"""The order of equal times: random, and the same whatever the order of the lines; the shares against plain counts."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.filtering import filter_dataset
from sda_core.data.ties import describe_ties, random_order, warn_of_ties
from sda_core.params import load_params

HISTORIES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([1.0, 5.0])), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
)


def columns(histories: list[list[tuple[int, int, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, times, items and ratings in history order."""
    rows = [(user, *row) for user, history in enumerate(histories) for row in sorted(history, key=lambda row: row[0])]
    users, times, items, ratings = zip(*rows, strict=True)
    return np.array(users), np.array(times), np.array(items), np.array(ratings, dtype=np.float32)


USER_IDS = pl.Series([f"user {number}" for number in range(5)])
ITEM_IDS = pl.Series([f"item {number}" for number in range(6)])


@settings(max_examples=200, deadline=None)
@given(HISTORIES, st.integers(0, 3))
def test_only_rows_of_one_user_and_one_time_change_places(histories: list[list[tuple[int, int, float]]], seed: int) -> None:
    users, times, items, ratings = columns(histories)
    order = random_order(users, times, items, ratings, USER_IDS, ITEM_IDS, seed)
    assert sorted(order.tolist()) == list(range(len(users)))
    assert np.array_equal(users[order], users)
    assert np.array_equal(times[order], times)


@settings(max_examples=200, deadline=None)
@given(HISTORIES, st.randoms(use_true_random=False))
def test_the_order_before_has_no_part_in_the_order_after(histories: list[list[tuple[int, int, float]]], draw) -> None:
    users, times, items, ratings = columns(histories)
    before = sorted(range(len(users)), key=lambda row: (users[row], times[row], draw.random()))
    outcomes = []
    for rows in (np.arange(len(users)), np.array(before)):
        order = rows[random_order(users[rows], times[rows], items[rows], ratings[rows], USER_IDS, ITEM_IDS, 1)]
        outcomes.append((items[order].tolist(), ratings[order].tolist()))
    assert outcomes[0] == outcomes[1]


def test_a_user_keeps_the_order_when_other_users_and_items_are_added() -> None:
    users, times = np.zeros(6, dtype=np.int64), np.zeros(6, dtype=np.int64)
    items, ratings = np.arange(6), np.ones(6, dtype=np.float32)
    alone = ITEM_IDS[random_order(users, times, items, ratings, USER_IDS, ITEM_IDS, 1)].to_list()
    more_users, more_items = pl.Series(["another", "user 0"]), pl.concat([pl.Series(["a new item"]), ITEM_IDS])
    among = random_order(
        np.repeat([0, 1], 6), np.zeros(12, dtype=np.int64), np.tile(items + 1, 2), np.ones(12, dtype=np.float32),
        more_users, more_items, 1,
    )  # fmt: skip
    assert more_items[(np.tile(items + 1, 2))[among[6:]]].to_list() == alone


def test_every_order_of_a_tie_is_equally_likely() -> None:
    """Three items of one day, many users: each of six orders has a sixth, within five standard deviations."""
    num = 6_000
    users, items = np.repeat(np.arange(num), 3), np.tile(np.arange(3), num)
    zeros, ones = np.zeros(3 * num, dtype=np.int64), np.ones(3 * num, dtype=np.float32)
    user_ids = pl.Series([f"u{number}" for number in range(num)])
    orders: dict[int, Counter[tuple[int, ...]]] = {}
    chosen: dict[int, np.ndarray] = {}
    for seed in (0, 1):
        chosen[seed] = items[random_order(users, zeros, items, ones, user_ids, ITEM_IDS, seed)].reshape(num, 3)
        orders[seed] = Counter(map(tuple, chosen[seed].tolist()))
        assert len(orders[seed]) == 6
        assert all(abs(count - num / 6) < 5 * (num * 5 / 36) ** 0.5 for count in orders[seed].values())
    same = (chosen[0] == chosen[1]).all(1).mean()
    assert abs(same - 1 / 6) < 5 * (5 / 36 / num) ** 0.5  # another seed gives an independent order


@settings(max_examples=200, deadline=None)
@given(HISTORIES)
def test_shares_are_those_of_a_plain_count(histories: list[list[tuple[int, int, float]]]) -> None:
    users, times, _, _ = columns(histories)
    rows = list(zip(users.tolist(), times.tolist(), strict=True))
    last = [place for place, row in enumerate(rows) if place + 1 == len(rows) or rows[place + 1][0] != row[0]]
    splits = ["test" if place in last else "valid" if place + 1 in last else "train" for place in range(len(rows))]
    found = describe_ties(users, times, pl.Series(splits))
    pairs = [(first[1], second[1]) for first, second in pairwise(rows) if first[0] == second[0]]
    assert found["share_tied_pairs"] == pytest.approx(sum(a == b for a, b in pairs) / max(len(pairs), 1))
    counts = Counter(rows)
    for name in ("valid", "test"):
        targets = [row for row, split in zip(rows, splits, strict=True) if split == name]
        assert found[f"share_tied_{name}_targets"] == pytest.approx(
            sum(counts[row] > 1 for row in targets) / max(len(targets), 1)
        )


@pytest.mark.parametrize(("tied", "warns"), [(0, False), (4, False), (5, True), (60, True)])
def test_a_warning_from_a_few_per_cent_on(caplog: pytest.LogCaptureFixture, tied: int, warns: bool) -> None:
    """101 interactions of one user, 100 pairs."""
    times = np.concatenate([np.zeros(tied + 1, dtype=np.int64), np.arange(1, 101 - tied)])
    users, items = np.zeros(101, dtype=np.int64), np.arange(101)
    shares = describe_ties(users, times, pl.Series(["train"] * 100 + ["test"]))
    assert shares["share_tied_pairs"] == tied / 100
    for policy, says in (
        ("random", "order is random (filter.ties: random, ties_seed: 3)"),
        ("file", "in 100.0% of these pairs the later item has the larger id"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_ties(shares, users, times, items, policy, 3)
        messages = [record.getMessage() for record in caplog.records]
        assert [says in message for message in messages] == [True] * warns


@pytest.mark.parametrize(("resolution", "share"), [(0, 0.0), (86_400, 1.0)])
def test_times_that_are_made_up_within_a_day_can_be_rounded_down(
    tmp_path: Path, repository: Path, resolution: int, share: float
) -> None:
    """As in copies of H&M: a day, plus a second per line of the file."""
    day = 1_600_000_000_000 // 86_400_000 * 86_400_000
    lines = [
        f'{{"user_id": "u{user}", "parent_asin": "i{item}", "rating": 5, "timestamp": {day + 1000 * (5 * user + item)}}}'
        for user in range(30)
        for item in range(5)
    ]
    metadata = [f'{{"parent_asin": "i{item}", "title": "Thing {item}"}}' for item in range(5)]
    (tmp_path / "r").write_text("\n".join(lines))
    (tmp_path / "m").write_text("\n".join(metadata))
    params = load_params(repository / "params.yaml").filter.model_copy(update={"time_resolution_seconds": resolution})
    data = filter_dataset(tmp_path / "r", tmp_path / "m", 2023, params)
    assert data.statistics["share_tied_pairs"] == data.statistics["share_tied_test_targets"] == share
    targets = data.interactions.filter(pl.col("split") == "test").join(data.items, on="item_id")["raw_item_id"]
    assert targets.n_unique() == (1 if resolution == 0 else 5)
    assert (data.interactions["timestamp"] % 86_400 == 0).all() == (resolution > 0)
