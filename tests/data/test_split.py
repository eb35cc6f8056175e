"""Leave-one-out: nothing is lost, and nobody's held-out rows are older than what is trained on."""

from __future__ import annotations

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.split import leave_one_out


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=50))
def test_loses_nothing_and_never_looks_ahead(rows: list[tuple[int, int]]) -> None:
    frame = pl.DataFrame(rows, schema={"user_id": pl.Int32, "timestamp": pl.Int64}, orient="row").with_row_index("row")
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
