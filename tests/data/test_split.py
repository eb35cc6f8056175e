"""Splits: nothing is lost, and what a target is predicted from is older than the target."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.split import global_time, leave_one_out
from sda_core.errors import DataError

ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=50)
TIMED_ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=50)
SHARES = st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted).filter(lambda cuts: cuts[0] < cuts[1])


def table_of(rows: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "timestamp": pl.Int64}, orient="row").with_row_index("row")


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_loses_nothing_and_never_looks_ahead(rows: list[tuple[int, int]]) -> None:
    frame = table_of(rows)
    split = leave_one_out(frame)
    assert split.drop("split").equals(frame.sort(["user_id", "timestamp", "row"]))
    for (_,), history in split.group_by("user_id"):
        history = history.sort("timestamp", "row")
        parts = history["split"].to_list()
        num_train = len(parts) if len(parts) < 3 else len(parts) - 2
        assert parts == ["train"] * num_train + (["valid", "test"] if len(parts) >= 3 else [])


def test_equal_times_keep_the_order_of_the_file() -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1, 1], "item_id": [40, 10, 30, 20], "timestamp": [5, 5, 1, 5]})
    split = leave_one_out(frame)
    assert split["item_id"].to_list() == [30, 40, 10, 20]
    assert split["split"].to_list() == ["train", "train", "valid", "test"]


def test_short_histories_stay_whole_in_training() -> None:
    frame = pl.DataFrame({"user_id": [1, 2, 2, 3, 3, 3], "timestamp": [1, 1, 2, 1, 2, 3]})
    assert leave_one_out(frame)["split"].to_list() == ["train", "train", "train", "train", "valid", "test"]


def test_an_empty_table_stays_one() -> None:
    split = leave_one_out(pl.DataFrame(schema={"user_id": pl.Int32, "timestamp": pl.Int64}))
    assert split.is_empty()
    assert split.schema["split"] == pl.String


# ------------------------------------------------------------------------------------------------ global time
def at(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())


def check_no_look_ahead(split: pl.DataFrame, valid_from: int, test_from: int) -> None:
    """The documented labels, user by user, from the definition of each."""
    for (_,), history in split.group_by("user_id"):
        history = history.sort("timestamp", "row")
        times, labels = history["timestamp"].to_list(), history["split"].to_list()
        for time, label in zip(times, labels, strict=True):
            part = "train" if time < valid_from else "valid" if time < test_from else "test"
            assert label in {part, f"{part}_rest"} - {"train_rest"}
        for target, knows in (("valid", {"train"}), ("test", {"train", "valid", "valid_rest"})):
            cut = valid_from if target == "valid" else test_from
            known = [time for time, label in zip(times, labels, strict=True) if label in knows]
            own = [label for label in labels if label.startswith(target)]
            # The first row of the part is the target exactly where there is something to predict it from.
            assert own == ([target] if known else [f"{target}_rest"])[: len(own)] + [f"{target}_rest"] * (len(own) - 1)
            if target in labels:
                assert max(known) < cut <= times[labels.index(target)]


@settings(max_examples=150, deadline=None)
@given(TIMED_ROWS, SHARES)
def test_shares_lose_nothing_and_never_look_ahead(rows: list[tuple[int, int]], cuts: list[float]) -> None:
    frame = table_of(rows)
    ordered = sorted(time for _, time in rows)
    valid_from, test_from = (ordered[min(round(cut * len(rows)), len(rows) - 1)] for cut in cuts)
    first = {user: min(time for other, time in rows if other == user) for user, _ in rows}
    has_valid = any(first[user] < valid_from <= time < test_from for user, time in rows)
    has_test = any(first[user] < test_from <= time for user, time in rows)
    if not (ordered[0] < valid_from and has_valid and has_test):
        with pytest.raises(DataError, match=r"filter\.valid_from, filter\.test_from"):
            global_time(frame, *cuts)
        return
    split = global_time(frame, *cuts)
    assert split.drop("split").equals(frame.sort(["user_id", "timestamp", "row"]))
    assert set(split["split"]) >= {"train", "valid", "test"}
    assert (split["timestamp"] < valid_from).sum() <= round(cuts[0] * len(rows))
    check_no_look_ahead(split, valid_from, test_from)


def test_days_begin_at_midnight_utc() -> None:
    valid, test = at("2014-03-01"), at("2014-04-01")
    rows = [
        (1, valid - 1), (1, valid), (1, test - 1), (1, test), (1, test + 1),
        (2, valid - 1), (2, test),
        (3, valid), (3, valid + 5), (3, test),
        (4, test), (4, test + 5),
        (5, valid - 2), (5, valid - 1),
    ]  # fmt: skip
    split = global_time(table_of(rows), "2014-03-01", "2014-04-01")
    assert split["split"].to_list() == [
        "train", "valid", "valid_rest", "test", "test_rest",
        "train", "test",  # no validation target, yet a test target
        "valid_rest", "valid_rest", "test",  # nothing to predict the first row from; its history at the test has two
        "test_rest", "test_rest",  # begins in the test: no target at all
        "train", "train",
    ]  # fmt: skip


def test_rows_of_the_time_of_a_cut_belong_to_the_later_part() -> None:
    rows = [(user, time) for user in (1, 2) for time in (1, 2, 2, 3)]
    split = global_time(table_of(rows), 0.5, 0.8)  # of 1 1 2 2 2 2 3 3, the fifth (2) and the seventh (3)
    assert split["split"].to_list() == ["train", "valid", "valid_rest", "test"] * 2


@pytest.mark.parametrize(
    ("cuts", "problem"),
    [
        (("2013-01-01", "2013-02-01"), "no interaction is before 2013-01-01, where validation begins"),
        (("2014-01-03", "2014-02-01"), "no user has one interaction before 2014-01-03 and one between it and 2014-02-01"),
        (("2014-01-02", "2014-01-03"), "no user has one interaction before 2014-01-03 and one after it"),
    ],
    ids=["train", "valid", "test"],
)
def test_an_empty_part_is_told_with_the_span_of_the_data(cuts: tuple[str, str], problem: str) -> None:
    frame = table_of([(1, at("2014-01-01")), (1, at("2014-01-02") + 60)])
    with pytest.raises(DataError) as error:
        global_time(frame, *cuts)
    span = "(the 2 interactions left are of 2014-01-01 to 2014-01-02 00:01:00)"
    assert str(error.value).startswith(f"params.yaml: filter.valid_from, filter.test_from: {problem}")
    assert f"{span}; choose other cuts within that span" in str(error.value)
    with pytest.raises(DataError, match="none to split"):
        global_time(frame[:0], 0.5, 0.6)
