"""Times in any unit: told by their size, never in January 1970 without a word."""

from __future__ import annotations

import json
import logging
import random
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.amazon import LineCount, read_reviews
from sda_core.data.filtering import filter_dataset
from sda_core.data.times import END_SECOND, FIRST_SECOND, MISSING, NEGATIVE, NOT_UNDERSTOOD, OUTSIDE, TICKS, UNDATED, read_time
from sda_core.errors import DataError
from sda_core.params import FilterParams, load_params

SECOND = 1_700_000_000  # 2023-11-14 22:13:20 UTC
MS = SECOND * 1000


@pytest.mark.parametrize(
    ("value", "milliseconds", "unit"),
    [
        (SECOND, MS, "seconds"),
        (SECOND + 0.25, MS + 250, "seconds"),
        (MS + 7, MS + 7, "milliseconds"),
        (MS + 0.25, MS, "milliseconds"),
        (MS * 1000 + 7999, MS + 7, "microseconds"),
        (MS * 10**6 + 7_999_999, MS + 7, "nanoseconds"),
        (float(MS * 1000), MS, "microseconds"),
        (str(SECOND), MS, "seconds"),
        (f" {MS}.75 ", MS, "milliseconds"),
        ("2023-11-14", MS - 80_000_000, "text"),
        ("2023-11-14T22:13:20Z", MS, "text"),
        ("2023-11-14t22:13:20z", MS, "text"),
        ("2023-11-14 22:13:20", MS, "text"),
        ("2023-11-14 22:13:20 UTC", MS, "text"),
        ("2023-11-15T00:13:20+02:00", MS, "text"),
        ("2023-11-14T17:13:20-0500", MS, "text"),
        ("2023-11-14T22:13:20.007Z", MS + 7, "text"),
        ("2023-11-14T22:13:20.007999999Z", MS + 7, "text"),
        ("20231114T221320Z", MS, "text"),
        ("2023-11-14 22:13:20 +0000", MS, "text"),
        ("2023-11-14 22:13:20.5 +0000", MS + 500, "text"),
        ("2023-11-15 00:13:20.007 +02:00", MS + 7, "text"),
        ("2023-11-14 17:13:20 -05", MS, "text"),
        ("2023-11-14T22:13:20.007 Z", MS + 7, "text"),
        ("2023/11/14", MS - 80_000_000, "text"),
        ("2023/11/14 22:13:20", MS, "text"),
        (0, 0, "small"),
        ("1999", 1_999_000, "small"),
        (20_231_114, 20_231_114_000, "small"),
        (FIRST_SECOND - 0.0001, 1000 * FIRST_SECOND - 1, "small"),  # rounded up it would be a date
        (END_SECOND - 0.0001, 1000 * END_SECOND - 1, "seconds"),
    ],
)
def test_a_time_in_any_form(value: Any, milliseconds: int, unit: str) -> None:
    assert read_time(value) == (milliseconds, unit)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, MISSING),
        ("", MISSING),
        ("  ", MISSING),
        (float("nan"), MISSING),
        (-1, NEGATIVE),
        ("-1700000000", NEGATIVE),
        (END_SECOND, OUTSIDE),
        (FIRST_SECOND * 1000 - 1, OUTSIDE),
        (10**30, OUTSIDE),
        (float("inf"), OUTSIDE),
        ("1970-01-01", OUTSIDE),
        ("2100-01-01T00:00:00Z", OUTSIDE),
        ("9999-12-31T23:59:59-23:00", NOT_UNDERSTOOD),  # beyond the calendar
        (True, NOT_UNDERSTOOD),
        ([SECOND], NOT_UNDERSTOOD),
        ({"$date": 1}, NOT_UNDERSTOOD),
        ("yesterday", NOT_UNDERSTOOD),
        ("14.11.2023", NOT_UNDERSTOOD),
        ("1e9", NOT_UNDERSTOOD),
        ("2023-13-45", NOT_UNDERSTOOD),
    ],
)
def test_what_is_no_time_has_its_reason(value: Any, reason: str) -> None:
    assert read_time(value) == reason


def test_the_ranges_of_the_units_do_not_overlap() -> None:
    ranges = [(FIRST_SECOND * ticks, END_SECOND * ticks) for ticks in TICKS.values()]
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert datetime.fromtimestamp(FIRST_SECOND, UTC) == datetime(1990, 1, 1, tzinfo=UTC)
    assert datetime.fromtimestamp(END_SECOND, UTC) == datetime(2100, 1, 1, tzinfo=UTC)


@settings(max_examples=200, deadline=None)
@given(st.integers(FIRST_SECOND * 1000, END_SECOND * 1000 - 1))
def test_every_unit_gives_the_same_time(milliseconds: int) -> None:
    seconds, rest = divmod(milliseconds, 1000)
    text = datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", f".{rest:03d}Z")
    forms: list[Any] = [milliseconds, str(milliseconds), milliseconds * 1000, milliseconds * 10**6, text]
    found = [read_time(form) for form in forms]
    assert [each[0] for each in found] == [milliseconds] * len(forms)
    assert read_time(seconds) == (seconds * 1000, "seconds")


def write_reviews(path: Path, times: list[Any]) -> None:
    rows = [{"user_id": f"u{at % 7}", "parent_asin": f"i{at}", "rating": 5, "timestamp": time} for at, time in enumerate(times)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, **options: Any) -> tuple[pl.DataFrame, LineCount]:
    lines = LineCount()
    frames = list(read_reviews(path, 2023, max_bad_line_share=1.0, lines=lines, **options))
    return pl.concat(frames).sort("raw_item_id"), lines


TIMES = st.sampled_from(
    [SECOND, MS, MS + 1, MS * 1000, MS * 10**6, str(SECOND), SECOND + 0.5, "2023-11-14", 0, 5, None, -1, "x", 10**11, True]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(TIMES, min_size=1, max_size=150), st.randoms(use_true_random=False), st.sampled_from([1, 200, 1 << 20]))
def test_neither_the_order_of_lines_nor_the_blocks_change_a_time(
    tmp_path_factory: pytest.TempPathFactory, times: list[Any], chance: random.Random, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("times") / "r"
    write_reviews(path, [*times, MS])
    frame, lines = read(path)
    content = path.read_text().splitlines(keepends=True)
    chance.shuffle(content)
    path.write_text("".join(content))
    again, recount = read(path, block_bytes=block_bytes)
    assert again.equals(frame)
    assert (recount.units, recount.bad) == (lines.units, lines.bad)
    assert lines.units.total() == len(frame) == lines.total - lines.num_bad
    expected = [found for time in [*times, MS] if not isinstance(found := read_time(time), str)]
    assert sorted(frame["timestamp"] * 1000 + frame["millisecond"]) == sorted(milliseconds for milliseconds, _ in expected)


def rules(**changes: Any) -> FilterParams:
    section = load_params(Path(__file__).resolve().parents[2] / "params.yaml").filter
    least = {"min_user_interactions": 1, "min_item_interactions": 1, "items_without_metadata": "keep", "max_bad_line_share": 0.5}
    return section.model_copy(update={**least, **changes})


@pytest.mark.parametrize("edition", [2018, 2023])
@pytest.mark.parametrize("unit", TICKS)
def test_a_file_in_another_unit_is_converted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unit: str, edition: int
) -> None:
    ticks = TICKS[unit]  # type: ignore[index]
    names = {2018: ("reviewerID", "asin", "overall", "unixReviewTime"), 2023: ("user_id", "parent_asin", "rating", "timestamp")}
    user, item, rating, time = names[edition]
    rows = [{user: f"u{u}", item: f"i{i}", rating: 5, time: (SECOND + 86_400 * i) * ticks} for u in range(3) for i in range(5)]
    (tmp_path / "r").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m").write_text("".join(json.dumps({item: f"i{i}", "title": f"Thing {i}"}) + "\n" for i in range(5)))
    with caplog.at_level(logging.WARNING):
        data = filter_dataset(tmp_path / "r", tmp_path / "m", edition, rules())
    assert sorted(set(data.interactions["timestamp"])) == [SECOND + 86_400 * i for i in range(5)]
    own = unit == ("milliseconds" if edition == 2023 else "seconds")
    assert data.statistics["times_converted"] == (0 if own else 15)
    assert data.statistics[f"times_in_{unit}"] == 15
    assert ("were converted: 15 in " + unit in caplog.text) is not own


@pytest.mark.parametrize("front", [True, False])
def test_small_numbers_beside_dates_are_missing_times(tmp_path: Path, front: bool) -> None:
    zeros, dates = [0, 1, 0], [MS + 1000 * number for number in range(20)]
    write_reviews(tmp_path / "r", zeros + dates if front else dates + zeros)
    (tmp_path / "m").write_text(json.dumps({"parent_asin": "i0", "title": "Thing"}) + "\n")
    data = filter_dataset(tmp_path / "r", tmp_path / "m", 2023, rules())
    assert data.interactions["timestamp"].to_numpy().min() == SECOND
    assert (data.statistics["rows_read"], data.statistics["rows_bad"], data.statistics["times_without_date"]) == (23, 3, 0)
    with pytest.raises(DataError, match=f"3 of 23 lines .*{UNDATED}"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 2023, rules(max_bad_line_share=0.1))


def test_a_file_of_counters_keeps_its_order_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_reviews(tmp_path / "r", list(range(30, 0, -1)))
    (tmp_path / "m").write_text(json.dumps({"parent_asin": "i0", "title": "Thing"}) + "\n")
    with caplog.at_level(logging.WARNING):
        data = filter_dataset(tmp_path / "r", tmp_path / "m", 2023, rules())
    assert data.statistics["times_without_date"] == 30
    assert "30 of 30 times are numbers below 631152000, which cannot be dates since 1990" in caplog.text
    assert sorted(data.interactions["timestamp"]) == list(range(1, 31))
