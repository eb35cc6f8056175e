"""Readers of the raw files: every quirk of the three editions, and files that are damaged or hostile."""

from __future__ import annotations

import ast
import gzip
import html
import json
import logging
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sda_core.data import amazon
from sda_core.data.amazon import (
    MAX_LINE_BYTES,
    METADATA_SCHEMA,
    REVIEW_SCHEMA,
    LineCount,
    read_metadata,
    read_reviews,
)
from sda_core.data.times import NOT_UNDERSTOOD, OUTSIDE
from sda_core.errors import ConfigError, DataError

REVIEW_2018 = {
    "overall": 5.0,
    "reviewerID": "A1",
    "asin": "B1",
    "unixReviewTime": 1529193600,
    "vote": "3",
    "style": {"Size:": " 50"},
}
REVIEW_2023 = {"rating": 4.0, "user_id": "AF", "asin": "B0", "parent_asin": "B1", "timestamp": 1616156351887, "images": []}


def line_of(base: dict[str, Any], **changes: object) -> bytes:
    return json.dumps({key: value for key, value in (base | changes).items() if value != "(absent)"}).encode()


def reviews_of(
    path: Path, lines: bytes | list[bytes], edition: int = 2018, share: float = 1.0, **options: Any
) -> tuple[pl.DataFrame, LineCount]:
    path.write_bytes(lines if isinstance(lines, bytes) else b"".join(line + b"\n" for line in lines))
    count = LineCount()
    frames = list(read_reviews(path, edition, max_bad_line_share=share, lines=count, **options))
    assert all(frame.schema == REVIEW_SCHEMA for frame in frames)
    return pl.concat([pl.DataFrame(schema=REVIEW_SCHEMA), *frames]), count


def metadata_of(path: Path, records: list[object], edition: int, **options: Any) -> pl.DataFrame:
    write: Callable[[object], str] = repr if edition == 2014 else json.dumps
    path.write_text("".join(write(record) + "\n" for record in records), encoding="utf-8")
    frame = read_metadata(path, edition, max_bad_line_share=0.0, **options)
    assert frame.schema == METADATA_SCHEMA
    return frame


# --------------------------------------------------------------------------------------------------- reviews
def test_reviews_of_each_edition(tmp_path: Path) -> None:
    frame, count = reviews_of(tmp_path / "r", [line_of(REVIEW_2018)], 2018)
    assert frame.rows() == [("A1", "B1", 5.0, 1529193600, 0)]
    assert reviews_of(tmp_path / "r", [line_of(REVIEW_2018)], 2014)[0].equals(frame)
    # 2023: milliseconds, and the parent's id, since variants share it with the metadata
    frame, _ = reviews_of(tmp_path / "r", [line_of(REVIEW_2023)], 2023)
    assert frame.rows() == [("AF", "B1", 4.0, 1616156351, 887)]
    assert (count.total, count.num_bad) == (1, 0)
    with pytest.raises(ConfigError, match=r"dataset.edition.*2014, 2018 or 2023 \(got 2020\)"):
        read_reviews(tmp_path / "r", 2020, max_bad_line_share=0.0)


GOOD = line_of(REVIEW_2018)
ODD_LINES = {
    "no review text is fine": (line_of(REVIEW_2018, reviewText="(absent)"), None),
    "rating as integer": (line_of(REVIEW_2018, overall=5), None),
    "rating as string": (line_of(REVIEW_2018, overall="5.0"), None),
    "time as string": (line_of(REVIEW_2018, unixReviewTime="1529193600"), None),
    "time as float": (line_of(REVIEW_2018, unixReviewTime=1529193600.0), None),
    "carriage return": (GOOD + b"\r", None),
    "spaces around": (b"  " + GOOD + b"\t", None),
    "first of two keys": (GOOD[:-1] + b', "asin": "B9"}', None),
    "NUL bytes": (b"\0\0" + GOOD + b"\0", None),
    "raw tab in a string": (GOOD.replace(b" 50", b"\t50"), None),
    "no UTF-8 beside the ids": (GOOD.replace(b" 50", b"caf\xe9"), None),
    "lone surrogate beside the ids": (GOOD.replace(b" 50", b"\\ud800"), None),
    "byte order mark inside the file": (b"\xef\xbb\xbf" + GOOD, None),
    "minus nothing as rating": (GOOD.replace(b"5.0", b"-0"), None),
    "escaped id": (GOOD.replace(b'"B1"', b'"\\u0042\\u0031"'), None),
    "no user": (line_of(REVIEW_2018, reviewerID="(absent)"), "user id is missing"),
    "null user": (line_of(REVIEW_2018, reviewerID=None), "user id is missing"),
    "empty user": (line_of(REVIEW_2018, reviewerID=""), "user id is missing"),
    "boolean user": (line_of(REVIEW_2018, reviewerID=True), "user id is neither text nor a whole number"),
    "float user": (line_of(REVIEW_2018, reviewerID=1.5), "user id is neither text nor a whole number"),
    "huge float user": (line_of(REVIEW_2018, reviewerID=1e20), "user id is a number of more digits than a float holds"),
    "exponent as user": (GOOD.replace(b'"A1"', b"1e20"), "user id is a number of more digits than a float holds"),
    "list as item": (line_of(REVIEW_2018, asin=["B1"]), "item id is neither text nor a whole number"),
    "object as item": (line_of(REVIEW_2018, asin={"a": 1}), "item id is neither text nor a whole number"),
    "terminal escape in item": (line_of(REVIEW_2018, asin="\x1b[2JB1"), "item id holds a control character"),
    "boolean item": (line_of(REVIEW_2018, asin=False), "item id is neither text nor a whole number"),
    "NUL in item": (line_of(REVIEW_2018, asin="B1\0"), "item id holds a control character"),
    "line feed at the end of an item": (line_of(REVIEW_2018, asin="B1\n"), None),
    "spaces around a user": (line_of(REVIEW_2018, reviewerID="\u3000A1 "), None),
    "spaces only": (line_of(REVIEW_2018, reviewerID=" \t"), "user id is missing"),
    "line feed in item": (line_of(REVIEW_2018, asin="B1\nB2"), "item id holds a control character"),
    "surrogate in item": (line_of(REVIEW_2018, asin="\ud800"), "item id is not valid Unicode text"),
    "long item": (line_of(REVIEW_2018, asin="B" * 257), "item id is longer than 256 characters"),
    "very long item": (line_of(REVIEW_2018, asin="B" * 10_000), "item id is longer than 256 characters"),
    "long user": (line_of(REVIEW_2018, reviewerID="A" * 513), "user id is longer than 512 characters"),
    "rating of another scale": (line_of(REVIEW_2018, overall=1e7), "rating is beyond 1000000"),
    "word as time": (line_of(REVIEW_2018, unixReviewTime="yesterday"), NOT_UNDERSTOOD),
    "time in a list": (line_of(REVIEW_2018, unixReviewTime=[1529193600]), NOT_UNDERSTOOD),
    "time of 1975": (line_of(REVIEW_2018, unixReviewTime="1975-01-01"), OUTSIDE),
    "line of 2023": (line_of(REVIEW_2023), "fields that look like edition 2023"),
    "null rating": (line_of(REVIEW_2018, overall=None), "rating is missing"),
    "boolean rating": (line_of(REVIEW_2018, overall=True), "rating is not a number"),
    "word as rating": (line_of(REVIEW_2018, overall="good"), "rating is not a number"),
    "infinite rating": (GOOD.replace(b"5.0", b"1e999"), "rating is not a number"),
    "endless rating": (GOOD.replace(b"5.0", b"-Infinity"), "rating is not a number"),
    "rating that is no number": (GOOD.replace(b"5.0", b"NaN"), "rating is not a number"),
    "no time": (line_of(REVIEW_2018, unixReviewTime="(absent)"), "time is missing"),
    "broken time": (line_of(REVIEW_2018, unixReviewTime=1529193600.5), None),
    "negative time": (line_of(REVIEW_2018, unixReviewTime=-1), "time is negative"),
    "milliseconds for seconds": (line_of(REVIEW_2018, unixReviewTime=1529193600000), None),
    "time that is no number": (GOOD.replace(b"1529193600", b"NaN"), "time is missing"),
    "huge time": (line_of(REVIEW_2018, unixReviewTime=10**30), OUTSIDE),
    "cut": (GOOD[:-9], "no JSON"),
    "Python literal": (repr(REVIEW_2018).encode(), "no JSON"),
    "two objects": (GOOD + GOOD, "no JSON"),
    "page": (b"<!DOCTYPE html>", "no JSON"),
    "list": (b"[1]", "no object"),
    "string": (b'"x"', "no object"),
    "null": (b"null", "no object"),
    "deep": (b"[" * 100_000, "no JSON"),
    "NUL bytes only": (b"\0" * 10, "NUL bytes only"),
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_an_odd_line_is_used_or_counted(name: str, tmp_path: Path) -> None:
    line, reason = ODD_LINES[name]
    frame, count = reviews_of(tmp_path / "r", [GOOD, b"", line, b" \t\r", GOOD])
    assert count.total == 3
    assert dict(count.bad) == ({} if reason is None else {reason: 1})
    assert count.first_bad == (None if reason is None else 3)
    assert len(frame) == (3 if reason is None else 2)
    assert frame["raw_user_id"].unique().to_list() == ["A1"]
    assert frame["raw_item_id"].unique().to_list() == ["B1"]


def test_whole_numbers_and_other_alphabets_are_ids(tmp_path: Path) -> None:
    lines = [line_of(REVIEW_2018, asin=123), line_of(REVIEW_2018, asin="\u65e5\u672c a.b"), line_of(REVIEW_2018, asin="true")]
    frame, count = reviews_of(tmp_path / "r", lines)
    assert frame["raw_item_id"].to_list() == ["123", "\u65e5\u672c a.b", "true"]
    assert count.num_bad == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(list(ODD_LINES)) | st.just(""), max_size=12),
    st.integers(1, 400),
    st.sampled_from([1, 50, 1000, 1 << 20]),
    st.booleans(),
)
@example(["cut", "list"], 300, 1, True)
@example(["exponent as user"], 1, 1, False)
@example(["byte order mark inside the file"], 1, 1, False)
def test_the_block_size_does_not_change_the_rows(
    tmp_path_factory, names: list[str], num_good: int, block_bytes: int, final_feed: bool
) -> None:
    assume(names[:1] != ["page"])  # a file that begins with a page is rejected whole
    path = tmp_path_factory.mktemp("blocks") / "r"
    odd = [ODD_LINES[name][0] if name else GOOD for name in names]
    lines = [line_of(REVIEW_2018, unixReviewTime=number) for number in range(num_good)]
    for position, line in enumerate(odd):
        lines.insert(position * len(lines) // len(odd), line)
    content = b"\n".join(lines) + (b"\n" if final_feed else b"")
    expected, expected_count = reviews_of(path, content)
    frame, count = reviews_of(path, content, block_bytes=block_bytes)
    assert frame.equals(expected)
    assert count == expected_count
    # ... and neither does reading every line by itself, without polars' reader, of what the file's reader hands on: a mark at
    # the very beginning is the file's own and no repair
    by_line = LineCount()
    fields = amazon._review_fields(2018)
    handed_on = content.removeprefix(amazon._BYTE_ORDER_MARK)
    assert amazon._reviews_slowly(handed_on, 1, fields, by_line).equals(expected)
    assert by_line == expected_count


VALUES = st.sampled_from(
    [None, True, "A1", "", "x/y", 7, -1, 1.5, 1e30, [], ["A1"], {}, "1e5", "5", 10**25, "\u00e9", " A", "A.b", "\x7f", "null",
     "5ZyP/tLhT6+0uw==", "auth0|a/b", "a b", "A ", "[1]", "{}", 17.0, "17.0", "x" * 300, "x" * 600, "..", "C:\\x",
     1529193600, 1529193600123, 1529193600123456, 1529193600123456789, "1529193600", 1529193600.25, "2018-06-17", 0]
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(["reviewerID", "asin", "overall", "unixReviewTime", "style"], VALUES)),
        max_size=6,
    )
)
def test_both_readers_agree_on_any_values(changes: list[dict[str, object]]) -> None:
    content = b"".join(json.dumps(REVIEW_2018 | change).encode() + b"\n" for change in changes) + GOOD
    fields = amazon._review_fields(2018)
    fast = amazon._reviews_fast(content, fields)
    if fast is not None:
        frame, unit = fast
        count = LineCount()
        assert frame.equals(amazon._reviews_slowly(content, 1, fields, count))
        assert count.num_bad == 0
        assert count.units == {unit: len(frame)}


def test_bad_lines_are_quoted_in_the_log_and_too_many_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [GOOD] * 97 + [b"{'single': 'quotes'}", b"x" * 500, line_of(REVIEW_2018, asin=None)]
    with caplog.at_level(logging.WARNING):
        frame, count = reviews_of(tmp_path / "r", lines, share=0.03)
    assert len(frame) == 97
    assert "3 of 100 lines cannot be used: item id is missing 1, no JSON 2" in caplog.text
    assert "line 98 (no JSON): b\"{'single': 'quotes'}\"" in caplog.text
    assert "x" * 100 not in caplog.text
    with pytest.raises(DataError) as error:
        reviews_of(tmp_path / "r", lines, share=0.029)
    message = str(error.value)
    assert str(tmp_path / "r") in message
    assert "3 of 100 lines (3.00%)" in message
    assert "at most 2.90%" in message
    assert "line 98" in message
    assert "\n" not in message
    assert count.first_bad == 98


def test_the_share_of_bad_lines_may_be_just_the_limit(tmp_path: Path) -> None:
    # 0.29 * 100 is a little less than 29
    for num_bad in (7, 29, 57):
        lines = [GOOD] * (100 - num_bad) + [b"{"] * num_bad
        assert len(reviews_of(tmp_path / "r", lines, share=num_bad / 100)[0]) == 100 - num_bad
        with pytest.raises(DataError, match=f"{num_bad} of 100 lines"):
            reviews_of(tmp_path / "r", lines, share=num_bad / 100 - 1e-9)


def test_what_is_quoted_of_a_line_cannot_reach_the_terminal_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [b"\x1b]0;title\x07\x1b[2J" + b"y" * 10_000, "\u202eabc\x9b".encode(), b"\x00\x08\r\xff", b"%s {0}"] + [b"[5]"] * 9
    with pytest.raises(DataError) as error, caplog.at_level(logging.WARNING):
        reviews_of(tmp_path / "r", odd, share=0.5)
    assert caplog.text.count("(no JSON)") == 4  # then one list: five in all
    assert caplog.text.count("(no object)") == 1
    for text in (str(error.value), *caplog.messages):
        assert text.isascii()
        assert text.isprintable()
        assert "y" * 80 not in text


def test_a_file_of_another_format_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "_HOPELESS_LINES", 100)
    stream = read_reviews(tmp_path / "r", 2023, max_bad_line_share=1.0, block_bytes=10_000)
    (tmp_path / "r").write_bytes((GOOD + b"\n") * 100_000)
    with pytest.raises(DataError, match=r"none of the first \d{2,5} lines can be used .*set dataset.edition to 2014 or 2018"):
        list(stream)


def test_repaired_lines_are_counted_and_read_as_windows_1252(tmp_path: Path) -> None:
    text = line_of({"asin": "B1", "title": "Cafe"}).replace(b"Cafe", b"Caf\xe9 \x93x\x94")
    (tmp_path / "m").write_bytes(text + b"\n" + text.replace(b"B1", b"B2").replace(b"Caf", b"C\0af"))
    count = LineCount()
    frame = read_metadata(tmp_path / "m", 2018, max_bad_line_share=0.0, lines=count)
    assert frame["title"].to_list() == ["Caf\u00e9 \u201cx\u201d"] * 2
    assert dict(count.repaired) == {"not UTF-8": 2, "NUL bytes": 1}


# ----------------------------------------------------------------------------------------------------- files
def test_gzip_plain_several_members_padding_and_byte_order_mark(tmp_path: Path) -> None:
    lines = [line_of(REVIEW_2018, unixReviewTime=number) for number in range(50_000)]
    content = b"\n".join(lines)
    expected, _ = reviews_of(tmp_path / "r", content)
    assert expected["timestamp"].to_list() == list(range(50_000))
    half = len(content) // 2
    packed = gzip.compress(content[:half]) + gzip.compress(b"") + gzip.compress(content[half:])
    for variant in (
        gzip.compress(content),
        packed,
        packed + b"\0" * 1000,
        b"\xef\xbb\xbf" + content,
        gzip.compress(b"\xef\xbb\xbf" + content),
    ):
        assert reviews_of(tmp_path / "r", variant)[0].equals(expected)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda packed: packed[:-1], "ends too early"),
        (lambda packed: packed[: len(packed) // 2], "ends too early"),
        (lambda packed: packed[:5], "ends too early"),
        (lambda packed: packed[:-6] + b"\0\0\0\0\0\0", "damaged gzip"),
        (lambda packed: packed[:200] + b"\xff" * 50 + packed[250:], "damaged gzip"),
        (lambda packed: packed + b"trailing", "damaged gzip"),
        (lambda packed: b"", "is empty"),
        (lambda packed: b"\n \n", "has no lines"),
        (lambda packed: gzip.compress(b""), "has no lines"),
    ],
)
def test_damaged_files_are_told_in_one_line(damage: Callable[[bytes], bytes], problem: str, tmp_path: Path) -> None:
    packed = gzip.compress(b"\n".join(line_of(REVIEW_2018, unixReviewTime=number) for number in range(5_000)))
    for read in (
        lambda path: list(read_reviews(path, 2018, max_bad_line_share=1.0)),
        lambda path: read_metadata(path, 2018, max_bad_line_share=1.0),
    ):
        (tmp_path / "r").write_bytes(damage(packed))
        with pytest.raises(DataError, match=problem) as error:
            read(tmp_path / "r")
        assert str(error.value).startswith(str(tmp_path / "r"))
        assert "\n" not in str(error.value)
        again = "; if it is a copy of your own file, correct that file; else delete it and download it again"
        assert str(error.value).endswith(again)


@pytest.mark.parametrize(
    ("edition", "line", "told"),
    [
        (2018, {"sku": "B1", "title": "x"}, "'asin', and the first such line has 'sku', 'title'; rename the field, or check"),
        (2014, {"sku": "B1", "title": "x"}, "'asin', and the first such line has 'sku', 'title'; rename the field, or check"),
        (2023, {"id": 1}, "'parent_asin', and the first such line has 'id'; rename the field, or check"),
        (2018, {f"f{n:02}": n for n in range(13)}, "'f10', 'f11', ...; rename the field, or check"),
        (2018, {"asin": ""}, None),  # the field is there
        (2018, {"asin": True, "sku": "B1"}, None),
        (2018, {"parent_asin": "B1"}, None),  # of another edition, which the advice names
    ],
)
def test_metadata_without_the_field_of_the_id_names_it(
    edition: int, line: dict[str, object], told: str | None, tmp_path: Path
) -> None:
    for wanted in (None, {"B1"}):
        with pytest.raises(DataError) as error:
            metadata_of(tmp_path / "m", [line, line], edition, keep=wanted)
        text = str(error.value)
        assert text.startswith(f"{tmp_path}/m: 2 of 2 lines (100.00%) cannot be used")
        assert ("the id is expected in the field" in text) == (told is not None)
        assert (told or "") in text
        assert "\n" not in text


def test_reviews_without_the_field_of_an_id_name_it(tmp_path: Path) -> None:
    for lacking, name in (("reviewerID", "customer"), ("asin", "sku")):
        line = json.dumps({name if key == lacking else key: value for key, value in REVIEW_2018.items()}).encode()
        with pytest.raises(
            DataError, match=f"expected in the field '{lacking}', and the first such line has .*'{name}'"
        ) as error:
            reviews_of(tmp_path / "r", [line], share=0.0)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError) as error:  # the commonest problem is another one
        reviews_of(tmp_path / "r", [b"{", b"[", line], share=0.0)
    assert "the id is expected" not in str(error.value)


def test_a_field_name_with_a_line_feed_stays_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the first such line has 'a\\nb'; rename the field") as error:
        metadata_of(tmp_path / "m", [{"a\nb": 1}], 2018)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_reviews(path, 2018, max_bad_line_share=1.0))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_huge_line_is_skipped_and_not_held(place: str, tmp_path: Path) -> None:
    just_fits = GOOD[:-1] + b', "x": "' + b"y" * (MAX_LINE_BYTES - len(GOOD) - 10) + b'"}'
    assert len(just_fits) <= MAX_LINE_BYTES
    huge = b"z" * (MAX_LINE_BYTES + 1)
    lines = {"first": [huge, GOOD, just_fits], "middle": [GOOD, huge, just_fits], "last": [GOOD, just_fits, huge]}[place]
    frame, count = reviews_of(tmp_path / "r", lines)
    assert len(frame) == 2
    assert dict(count.bad) == {"too long": 1}
    assert count.first_bad == lines.index(huge) + 1
    assert len(count.quotes[0]) < 200


def test_memory_is_bounded_by_the_block_for_a_file_that_unpacks_to_a_huge_one(tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(gzip.compress(b" " * (200 << 20), compresslevel=1))
    pieces = [len(piece) for piece in amazon._chunks(tmp_path / "bomb")]
    assert max(pieces) <= 1 << 20
    assert sum(pieces) == 200 << 20
    with pytest.raises(DataError, match="1 of 1 lines"):
        list(read_reviews(tmp_path / "bomb", 2018, max_bad_line_share=0.0))


MEASURE = """
import sys
from pathlib import Path
from sda_core.data.amazon import read_metadata, read_reviews
from sda_core.errors import DataError

def peak_mebibytes():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM:"))

path, before = Path(sys.argv[1]), peak_mebibytes()
for read in (
    lambda: list(read_reviews(path, 2018, max_bad_line_share=0.5)),
    lambda: read_metadata(path, 2014, max_bad_line_share=0.5),
):
    try:
        read()
        print("read")
    except DataError as error:
        print(error)
print(peak_mebibytes() - before)
"""


@pytest.mark.parametrize(("byte", "problem"), [(b"[", "1 of 1 lines"), (b"\r\n", "has no lines")])
def test_a_gzip_bomb_costs_neither_memory_nor_hours(byte: bytes, problem: str, tmp_path: Path) -> None:
    member = gzip.compress(byte * ((32 << 20) // len(byte)), compresslevel=6)
    bomb = tmp_path / "bomb"
    bomb.write_bytes(member * 5)
    assert bomb.stat().st_size < 1 << 20
    command = [sys.executable, "-c", MEASURE, str(bomb)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert len(output) == 3
    assert all(problem in line for line in output[:2])
    assert int(output[2]) < 150


def test_a_line_of_a_hundred_megabytes_is_passed_over(tmp_path: Path) -> None:
    metadata = b"{'asin': 'B%d', 'title': 'some title'}\n"
    piece = b"'related'," * 1_000_000
    with gzip.open(tmp_path / "m", "wb", compresslevel=1) as handle:
        handle.write(metadata % 1 + b"{'asin': 'B2', 'x': [")
        for _ in range(10):
            handle.write(piece)
        handle.write(b"]}\n" + metadata % 3)
    count = LineCount()
    frame = read_metadata(tmp_path / "m", 2014, max_bad_line_share=0.5, lines=count)
    assert frame["raw_item_id"].to_list() == ["B1", "B3"]
    assert (count.total, count.first_bad, dict(count.bad)) == (3, 2, {"too long": 1})


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_file_in_another_unicode_encoding_is_told_in_one_line(encoding: str, mark: str, tmp_path: Path) -> None:
    text = (mark + GOOD.decode() + "\n") * 3
    for content in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        with pytest.raises(DataError, match=rf"is {encoding[:6].upper()} text, expected UTF-8; convert it: iconv -f UTF-"):
            reviews_of(tmp_path / "r", content)
        with pytest.raises(DataError, match="expected UTF-8"):
            read_metadata(tmp_path / "r", 2023, max_bad_line_share=1.0)


def test_mixed_encodings_and_line_ends_in_one_file(tmp_path: Path) -> None:
    good = [line_of(REVIEW_2018, unixReviewTime=number) for number in range(200)]
    utf8, windows = (good[0].replace(b" 50", text) for text in ("\u65e5\u672c".encode(), "\u20ac".encode("cp1252")))
    lines = [*good[:100], utf8, b"\xef\xbb\xbf" + utf8, windows, good[0].decode().encode("utf-16-le"), *good[100:]]
    frame, count = reviews_of(tmp_path / "r", b"\r\n".join(lines))
    assert len(frame) == 204
    assert dict(count.repaired) == {"byte order mark": 1, "NUL bytes": 1, "not UTF-8": 1}
    assert frame["raw_item_id"].unique().to_list() == ["B1"]
    assert (count.total, count.num_bad) == (204, 0)
    # a carriage return alone ends no line, and polars' reader alone takes a file with both
    content = b"\r\n".join(good) + b"\r\n"
    assert amazon._reviews_fast(content, amazon._review_fields(2018)) is not None
    assert reviews_of(tmp_path / "r", content)[0]["timestamp"].to_list() == list(range(200))
    assert reviews_of(tmp_path / "r", b"\r".join(good))[1].bad == {"no JSON": 1}


# -------------------------------------------------------------------------------------------------- metadata
ODD_IDS: dict[str, list[object]] = {
    "item id is missing": [None, "", " ", "\u00a0\n"],
    "item id is neither text nor a whole number": [True, False, 1.5, [], ["B1"], {}],
    "item id is a number of more digits than a float holds": [-1e300, 1e20, 2.0**53],
    "item id holds a control character": ["a\x00b", "a\nb", "\x1b[2J", "a\x7fb", "\u202eB1", "a\u2028b", "a\u200fb"],
    "item id is not valid Unicode text": ["\ud800", "\ufffd", "a\uffffb"],
    "item id is longer than 256 characters": ["B" * 257, "B" * 10_000, 10**256],
}
GOOD_IDS: dict[object, str] = {
    "mugs/17": "mugs/17",
    "a\\b": "a\\b",
    "C:\\x": "C:\\x",
    "../../etc/passwd": "../../etc/passwd",
    "/etc/passwd": "/etc/passwd",
    ".": ".",
    "..": "..",
    ".hidden": ".hidden",
    "CON": "CON",
    "NUL.txt": "NUL.txt",
    "a:b*c?d": "a:b*c?d",
    "two words": "two words",
    "x" * 256: "x" * 256,
    "\u65e5\u672c": "\u65e5\u672c",
    "\U0001f469\u200d\U0001f467": "\U0001f469\u200d\U0001f467",  # two people, joined by an invisible character
    "a\u00a0b": "a\u00a0b",
    "[17]": "[17]",
    "{a}": "{a}",
    "true": "true",
    "17.0": "17.0",
    "1e5": "1e5",
    17: "17",
    18.0: "18",
    -0.0: "0",
    10**70: str(10**70),
    " sku-17": "sku-17",
    "sku-18 ": "sku-18",
    "\u3000sku-19\t\n": "sku-19",
}


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
def test_an_odd_id_of_an_item_is_rejected_with_its_true_reason(edition: int, tmp_path: Path) -> None:
    key = "parent_asin" if edition == 2023 else "asin"
    write: Callable[[object], str] = repr if edition == 2014 else json.dumps
    odd = [value for values in ODD_IDS.values() for value in values]
    records = [{key: "B1", "title": "good"}, *({key: value, "title": "odd"} for value in odd)]
    (tmp_path / "m").write_text("\n".join(map(write, records)), encoding="utf-8")
    count = LineCount()
    assert read_metadata(tmp_path / "m", edition, max_bad_line_share=1.0, lines=count)["raw_item_id"].to_list() == ["B1"]
    assert dict(count.bad) == {reason: len(values) for reason, values in ODD_IDS.items()}
    assert count.total == len(records)


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
def test_reviews_and_metadata_read_any_id_alike(edition: int, tmp_path: Path) -> None:
    """Otherwise the join would lose items without a word; a user may have any id that an item may have."""
    fields = amazon._review_fields(edition)
    write: Callable[[object], str] = repr if edition == 2014 else json.dumps
    reviews = [
        {fields.user: value, fields.item: value, fields.rating: 5, fields.time: 1529193600 + place}
        for place, value in enumerate(GOOD_IDS)
    ]
    frame, count = reviews_of(tmp_path / "r", [json.dumps(review).encode() for review in reviews], edition, share=0.0)
    assert frame["raw_item_id"].to_list() == frame["raw_user_id"].to_list() == list(GOOD_IDS.values())
    assert count.stripped_ids == {"user": 3, "item": 3}
    (tmp_path / "m").write_text(
        "\n".join(write({fields.item: value, "title": "some title"}) for value in GOOD_IDS), encoding="utf-8"
    )
    items = LineCount()
    metadata = read_metadata(tmp_path / "m", edition, max_bad_line_share=0.0, keep=frame["raw_item_id"].to_list(), lines=items)
    assert metadata["raw_item_id"].to_list() == sorted(GOOD_IDS.values())
    assert items.stripped_ids == {"item": 3}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none() | st.booleans())
def test_an_id_is_the_same_in_both_files_or_rejected_in_both(tmp_path_factory, value: object) -> None:
    path = tmp_path_factory.mktemp("ids") / "f"
    frame, reviews = reviews_of(path, [line_of(REVIEW_2023, parent_asin=value), line_of(REVIEW_2023, parent_asin="B2")], 2023)
    path.write_bytes(b"\n".join(json.dumps({"parent_asin": each}).encode() for each in (value, "B2")))
    items = LineCount()
    metadata = read_metadata(path, 2023, max_bad_line_share=1.0, lines=items)
    assert sorted(set(frame["raw_item_id"])) == metadata["raw_item_id"].to_list()
    assert reviews.bad == items.bad


def test_white_space_around_ids_joins_them_and_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        frame, count = reviews_of(
            tmp_path / "r", [line_of(REVIEW_2018, asin=" B1 "), GOOD, line_of(REVIEW_2018, reviewerID="A1\t")]
        )
    assert frame.select("raw_user_id", "raw_item_id").unique().rows() == [("A1", "B1")]
    assert dict(count.stripped_ids) == {"item": 1, "user": 1}
    assert "white space at the ends of ids was removed: item 1, user 1" in caplog.text


@pytest.mark.parametrize(
    ("value", "digits"),
    [(b"123", "123"), (b"-0", "0"), (b"18446744073709551616", "18446744073709551616"), (b"9" * 64, "9" * 64)],
)
def test_whole_numbers_of_any_size_are_ids_of_items(value: bytes, digits: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'{"asin": ' + value + b', "title": "some title"}')
    for edition in (2014, 2018):
        assert read_metadata(tmp_path / "m", edition, max_bad_line_share=0.0)["raw_item_id"].to_list() == [digits]


@pytest.mark.parametrize(
    "title",
    [
        "<script>alert(1)</script>",
        "a good <script src='x'>alert(1)</script> title",
        "a good <SCRIPT>alert(1)",
        "a <scr<script>ipt>alert(1)</scr</script>ipt> title",
        "a <img src=x onerror=alert(1)> title",
        "a <img src=x onerror=alert(1)",
        "<svg/onload=alert(1)>",
        "a &lt;script&gt;alert(1)&lt;/script&gt; title",
        "a &amp;lt;script&amp;gt;alert(1)&amp;lt;/script&amp;gt; title",
        'a <b onclick="alert(1)">bold</b> title',
        "a \x00<script>\ud800alert(1)</script>\x1b title",
    ],
)
def test_no_script_gets_through(title: str, tmp_path: Path) -> None:
    for edition, key in ((2014, "asin"), (2018, "asin"), (2023, "parent_asin")):
        record = {key: "B1", "title": title, "brand": title, "store": title, "description": [title], "features": [title]}
        texts = str(metadata_of(tmp_path / "m", [record | {"feature": [title], "categories": [title]}], edition).row(0))
        assert not re.search(r"<\s*/?\s*(script|svg|img|b)|onerror|onload|onclick|\\x|\\u", texts, re.IGNORECASE)


def test_odd_numbers_are_no_prices(tmp_path: Path) -> None:
    values = [
        b"1e999",
        b"-1e999",
        b"-0",
        b"-0.0",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"true",
        b"1e10",
        b"9" * 400,
        b'"1e5"',
        b"12.5",
    ]
    lines = [b'{"parent_asin": "B%02d", "price": %s, "price": %s}' % (at, b"1", value) for at, value in enumerate(values)]
    (tmp_path / "m").write_bytes(b"\n".join(lines))
    frame = read_metadata(tmp_path / "m", 2023, max_bad_line_share=0.0)
    assert frame["price"].to_list() == [""] * (len(values) - 1) + ["12.50"]  # of equal keys the last one counts


def test_deep_nesting_is_refused_or_passed_over(tmp_path: Path) -> None:
    inside = {"asin": "B2", "title": "[" * 20_000 + "{(" * 10_000}  # in a string it is only text
    for edition, write in ((2014, repr), (2018, json.dumps)):
        deep = [
            "[" * 10_000 + "]" * 10_000,
            "[{'a':(" * 10_000 + ")}]" * 10_000,
            '[{"a":' * 10_000 + "1" + "}]" * 10_000,
            "{" * 100_000,
        ]
        lines = [
            write({"asin": "B1", "title": "some title"}),
            *deep,
            *(f"{{'asin': 'B3', 'x': {text}}}" for text in deep),
            write(inside),
        ]
        (tmp_path / "m").write_text("\n".join(lines))
        count = LineCount()
        frame = read_metadata(tmp_path / "m", edition, max_bad_line_share=1.0, lines=count)
        assert frame["raw_item_id"].to_list() == ["B1", "B2"]
        assert (count.total, count.num_bad) == (10, 8)


FRAGMENTS = [
    *(
        b'{"asin":',
        b'"B1"',
        b'"B2"',
        b'"t"',
        b',"title":',
        b',"price":',
        b',"x":',
        b"}",
        b"[",
        b"]",
        b"{}",
        b"null",
        b"true",
        b"-0",
        b"5",
    ),
    *(
        b"1e999",
        b"NaN",
        b"18446744073709551616",
        b'"\\ud800"',
        b'"\\u0000"',
        b'"caf\xe9"',
        b'"\xed\xa0\x80"',
        b'"\t"',
        b'"\x00"',
        b"\x00",
    ),
    *(b',"asin":', b" ", b"\r", b"\xef\xbb\xbf", b'"<b>&amp;</b>"', b'"unfinished', b"//", b"\x0b", b"\xa0"),
]
RECORD = (b'{"asin":"B%d","title":', b',"x":', b"}")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(b"".join)
        | st.tuples(st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS)).map(
            lambda two: RECORD[0] % 3 + two[0] + RECORD[1] + two[1] + b"}"
        ),
        max_size=5,
    )
)
@example([b'{"asin":"B3","title":18446744073709551616,"x":"B1"}', b'{"asin":"B4","title":-0,"x":1e400}'])
@example([b'{"asin":18446744073709551616}', b'{"asin":"B1","asin":"B2"}', b'\x00{"asin":"B1"}', b'{"asin":"B1","x":"\xe9"}'])
def test_the_fast_reader_of_json_changes_nothing(tmp_path_factory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("json") / "m"
    path.write_bytes(b"\n".join([b'{"asin":"B1","title":"one good line"}', *lines]))
    fast, slow = LineCount(), LineCount()
    table = read_metadata(path, 2018, max_bad_line_share=1.0, lines=fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amazon, "_ordinary_record", lambda line, key: None)
        assert read_metadata(path, 2018, max_bad_line_share=1.0, lines=slow).equals(table)
    assert fast == slow


def test_metadata_2014(tmp_path: Path) -> None:
    record = {
        "asin": "0041913574",
        "title": "Aida: Opera in Quattro Atti (New &amp; Revised)",
        "description": "444 pages. \nReprint of Verdi's 'Aida'.",
        "price": 49.99,
        "brand": "",
        "imUrl": "http://ecx.images-amazon.com/images/I/513kRMv%2Bl-L._SY300_.jpg",
        "related": {"also_viewed": ["B0058DK7RA"]},
        "salesRank": {"Musical Instruments": 94593},
        "categories": [["Musical Instruments", "Sheet Music"], ["Books", "Opera"]],
    }
    (row,) = metadata_of(tmp_path / "m", [record], 2014).rows(named=True)
    assert row == {
        "raw_item_id": "0041913574",
        "title": "Aida: Opera in Quattro Atti (New & Revised)",
        "brand": "",
        "price": "49.99",
        "categories": ["Musical Instruments", "Sheet Music"],
        "features": [],
        "description": "444 pages. Reprint of Verdi's 'Aida'.",
        "image_references": ["http://ecx.images-amazon.com/images/I/513kRMv%2Bl-L._SY300_.jpg"],
    }
    no_image = {"asin": "1", "imUrl": "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif"}
    assert metadata_of(tmp_path / "m", [no_image], 2014)["image_references"].to_list() == [[]]
    # mirrors that were converted to JSON are read too
    (tmp_path / "m").write_text(json.dumps(record | {"gift": True, "brand": None}))
    assert read_metadata(tmp_path / "m", 2014, max_bad_line_share=0.0).rows(named=True) == [row]


def test_metadata_2018_in_both_releases(tmp_path: Path) -> None:
    record = {
        "asin": "B1",
        "category": ["Gift Cards", "Gift Cards", "</span></span></span>", "A bullet point"],
        "title": " Maggiano&#39;s Gift Card",
        "brand": "by\n    \n    Apple",
        "feature": ['<span class="a-size-base">\n No expiration. \n</span>'],
        "description": ["One.", "Two."],
        "price": "$25.00",
        "rank": ["123"],
        "imageURL": ["https://h.example/a._SX38_.jpg", "https://h.example/b._SX38_.jpg"],
        "imageURLHighRes": ["https://h.example/a.jpg", "https://h.example/b.jpg"],
    }
    newer = metadata_of(tmp_path / "m", [record], 2018)
    assert newer.row(0) == (
        "B1",
        "Maggiano's Gift Card",
        "Apple",
        "$25.00",
        ["Gift Cards", "Gift Cards"],
        ["No expiration."],
        "One. Two.",
        [
            "https://h.example/a.jpg",
            "https://h.example/b.jpg",
            "https://h.example/a._SX38_.jpg",
            "https://h.example/b._SX38_.jpg",
        ],
    )
    older = {key: value for key, value in record.items() if not key.startswith("image")} | {
        "image": record["imageURL"],
        "rank": "1 in X",
    }
    older_frame = metadata_of(tmp_path / "m", [older], 2018)
    assert older_frame["image_references"].to_list() == [record["imageURL"]]
    assert older_frame.drop("image_references").equals(newer.drop("image_references"))
    # bullet points after the path: after a piece of markup, or from the first sentence on; features where there are none
    path = ["Gift Cards", "Dr. Seuss Inc."]
    for mark in ([], ["</span></span></span>"]):
        bullets = [*mark, "No expiration, no fees.", "Imported"]
        frame = metadata_of(tmp_path / "m", [{"asin": "B1", "category": path + bullets, "feature": []}], 2018)
        assert frame["categories"].to_list() == [path]
        assert frame["features"].to_list() == [["No expiration, no fees.", "Imported"]]
    frame = metadata_of(tmp_path / "m", [{"asin": "B1", "category": path + bullets, "feature": ["own"], "main_cat": "x"}], 2018)
    assert frame.select("categories", "features").row(0) == (path, ["own"])
    assert metadata_of(tmp_path / "m", [{"asin": "B1", "category": ["One whole sentence, no path."]}], 2018).row(0)[4] == [
        "One whole sentence, no path."
    ]
    # fields of other types, junk, nothing at all
    odd = {
        "asin": "B2",
        "category": [],
        "main_cat": "Software",
        "feature": "one",
        "description": "text",
        "price": ".a-box-inner{color:#fff}",
        "title": "<span class=",
    }
    assert metadata_of(tmp_path / "m", [odd], 2018).row(0) == ("B2", "", "", "", ["Software"], ["one"], "text", [])
    assert metadata_of(tmp_path / "m", [{"asin": "B3"}], 2018).row(0) == ("B3", "", "", "", [], [], "", [])


def test_metadata_2023(tmp_path: Path) -> None:
    def image(variant: str, **sizes: str | None) -> dict[str, str | None]:
        return {"variant": variant, "hi_res": None, "large": None, "thumb": None} | sizes

    record = {
        "parent_asin": "B1",
        "main_category": "Handmade",
        "title": "Wristlet",
        "store": "Generic",
        "price": None,
        "description": [],
        "features": ["One", "Two"],
        "categories": [],
        "details": {"Brand": "Other"},
        "images": [
            image("PT01", large="https://h/p.jpg"),
            image("MAIN", thumb="https://h/t.jpg", large="https://h/l.jpg", hi_res="https://h/h.jpg"),
        ],
    }
    row = metadata_of(tmp_path / "m", [record], 2023).row(0)
    expected = ["https://h/h.jpg", "https://h/l.jpg", "https://h/t.jpg", "https://h/p.jpg"]
    assert row == ("B1", "Wristlet", "Generic", "", ["Handmade"], ["One", "Two"], "", expected)
    no_store = record | {"store": None, "price": 69.0, "images": None, "details": None}
    assert metadata_of(tmp_path / "m", [no_store], 2023).row(0)[2:4] == ("", "69.00")
    assert metadata_of(tmp_path / "m", [record | {"store": None}], 2023).row(0)[2] == "Other"
    by_column = {key: [entry.get(key) for entry in record["images"]] for key in ("variant", "hi_res", "large", "thumb")}
    assert metadata_of(tmp_path / "m", [record | {"images": by_column}], 2023).row(0) == row


def test_of_several_lines_of_an_item_the_fullest_with_a_title_counts_in_any_order(tmp_path: Path) -> None:
    records = [
        {"asin": "B2", "title": "<span class=", "price": "$1.00"},
        {"asin": "B1", "title": "first", "price": ""},
        {"asin": "B2", "title": "second of B2", "price": "$2.00"},
        {"asin": "B1", "title": "second", "price": "$3.00"},
        {"asin": "B2", "title": "third of B2", "price": "$3.00"},
        {"asin": "B3", "title": "", "price": "$1.00"},
        {"asin": "B3", "title": None, "price": "$2.00"},
        {"asin": "B4", "title": "fields beat length, which is long"},
        {"asin": "B4", "title": "short", "feature": ["soft"]},
        {"asin": "B5", "title": "equally filled"},
        {"asin": "B5", "title": "equally filled, but longer"},
        {"asin": "B6", "title": "<span class=", "price": "$1.00", "feature": ["a title beats fields"]},
        {"asin": "B6", "title": "named"},
    ]
    expected = [
        ("B1", "second", "$3.00"), ("B2", "second of B2", "$2.00"), ("B3", "", "$1.00"),
        ("B4", "short", ""), ("B5", "equally filled, but longer", ""), ("B6", "named", ""),
    ]  # fmt: skip
    draw = random.Random(0)
    for block_bytes in (1, 100, 1 << 20):
        for order in (records, records[::-1], draw.sample(records, len(records))):
            frame = metadata_of(tmp_path / "m", order, 2018, block_bytes=block_bytes)
            assert frame.select("raw_item_id", "title", "price").rows() == expected


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
def test_only_wanted_items_are_kept(edition: int, tmp_path: Path) -> None:
    key = "parent_asin" if edition == 2023 else "asin"
    records: list[object] = [
        {key: f"B{number}", "title": f"t {number}", "related": {key: "B3"} if number == 4 else {}} for number in range(9)
    ]
    records.append({"details": {key: "B1"}, key: "C1", "title": "after another id"})
    count = LineCount()
    frame = metadata_of(tmp_path / "m", records, edition, keep={"B5", "B4", "B77", "C1"}, lines=count)
    assert frame.select("raw_item_id", "title").rows() == [("B4", "t 4"), ("B5", "t 5"), ("C1", "after another id")]
    assert (count.total, count.num_bad) == (10, 0)
    assert len(metadata_of(tmp_path / "m", records, edition)) == 10


def test_bad_metadata_lines_are_counted(tmp_path: Path) -> None:
    lines = ["{'asin': 'B1'}", "['asin']", "{'asin': None}", "{'asin': '../x'}", "{'asin': 'B2'", "", "{'asin': f()}"]
    (tmp_path / "m").write_text("\n".join(lines))
    count = LineCount()
    frame = read_metadata(tmp_path / "m", 2014, max_bad_line_share=1.0, lines=count)
    assert frame["raw_item_id"].to_list() == ["../x", "B1"]  # an id, if an odd one: nothing is looked up by it as a path
    assert dict(count.bad) == {"no dict": 1, "item id is missing": 1, "no Python literal": 2}
    assert (count.total, count.first_bad) == (6, 2)
    with pytest.raises(DataError, match=r"4 of 6 lines \(66.67%\)"):
        read_metadata(tmp_path / "m", 2014, max_bad_line_share=0.5)


# ------------------------------------------------------------------------------------------------- real data
@pytest.mark.real_data
def test_raw_samples_of_2014(real_data: Path) -> None:
    folder = real_data / "amazon_2014_raw_samples"
    path = folder / "musical_instruments_metadata_top100.json"
    count = LineCount()
    frame = read_metadata(path, 2014, max_bad_line_share=0.0, lines=count)
    assert (count.total, len(frame)) == (100, 100)
    records = {record["asin"]: record for record in map(ast.literal_eval, path.read_text(encoding="utf-8").splitlines())}
    for row in frame.iter_rows(named=True):
        record = records[row["raw_item_id"]]
        assert bool(row["title"]) == bool(record.get("title"))
        assert row["price"] == (f"{record['price']:.2f}" if "price" in record else "")
        assert len(row["categories"]) == len(record["categories"][0])
        assert bool(row["image_references"]) == ("imUrl" in record and "/no-img" not in record["imUrl"])
        assert row["brand"] == record.get("brand", "").replace("&amp;", "&")
        assert row["title"] == html.unescape(record.get("title", "")).strip()
        assert row["categories"] == [name.replace("&amp;", "&") for name in record["categories"][0]]
        assert row["description"].split()[:3] == html.unescape(record.get("description", "")).split()[:3]
    raw = [json.loads(line) for line in (folder / "musical_instruments_top100.json").read_text(encoding="utf-8").splitlines()]
    reviews = pl.concat(list(read_reviews(folder / "musical_instruments_top100.json", 2014, max_bad_line_share=0.0)))
    expected = [(record["reviewerID"], record["asin"], record["overall"], record["unixReviewTime"], 0) for record in raw]
    assert reviews.rows() == expected
    assert (len(reviews), reviews["raw_item_id"].n_unique(), reviews["raw_user_id"].n_unique()) == (100, 8, 96)


@pytest.mark.real_data
def test_raw_samples_of_2023(real_data: Path) -> None:
    folder = real_data / "amazon_2023_raw_samples"
    frame = read_metadata(folder / "meta_sample.jsonl", 2023, max_bad_line_share=0.0)
    assert len(frame) == 5
    row = frame.filter(pl.col("raw_item_id") == "B08W5BSH6V").row(0, named=True)
    assert row["categories"] == ["SUBSCRIPTION BOXES"]
    assert row["brand"] == "Loved Again Media"
    assert row["image_references"][0] == "https://m.media-amazon.com/images/I/91Qthwjgl+L._AC_SL1500_.jpg"
    assert frame.filter(pl.col("raw_item_id") == "B0751M85FV")["price"].item() == "69.00"
    for line in (folder / "meta_sample.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        row = frame.filter(pl.col("raw_item_id") == record["parent_asin"]).row(0, named=True)
        assert row["title"] == record["title"]
        assert row["features"] == [" ".join(text.split()) for text in record["features"]]
        assert row["categories"] == (record["categories"] or [record["main_category"]])
        assert len(row["image_references"]) == sum(
            bool(image[size]) for image in record["images"] for size in ("hi_res", "large", "thumb")
        )
    reviews = pl.concat(list(read_reviews(folder / "reviews_sample.jsonl", 2023, max_bad_line_share=0.0)))
    assert reviews["raw_item_id"].to_list() == ["B07KM6T8GV", "B08N5QKX1Y"]  # the second one's asin is another
    assert reviews.select("timestamp", "millisecond").rows() == [(1616156351, 887), (1563230263, 551)]


@pytest.mark.real_data
def test_junk_of_the_2018_release_is_gone(real_data: Path) -> None:
    frame = read_metadata(real_data / "amazon_2018_gift_cards" / "meta_Gift_Cards.json.gz", 2018, max_bad_line_share=0.0)
    assert len(frame) == 1547
    texts = pl.concat(
        [frame["title"], frame["brand"], frame["price"], frame["categories"].explode(), frame["features"].explode()]
    ).drop_nulls()
    assert texts.str.contains(r"<[a-z/]|&[a-z#0-9]+;|a-box|\n").sum() == 0
    assert (frame["title"] != "").all()
    assert sorted(frame.filter(pl.col("price") != "")["price"].str.slice(0, 1).unique()) == ["$"]


@pytest.mark.real_data
def test_both_releases_of_2018_tell_the_same_of_the_same_items(real_data: Path) -> None:
    folder = real_data / "amazon_2018_gift_cards"
    newer = read_metadata(folder / "meta_Gift_Cards.json.gz", 2018, max_bad_line_share=0.0)
    older = read_metadata(folder / "older_scrape" / "meta_Gift_Cards.json.gz", 2018, max_bad_line_share=0.0)
    assert newer["raw_item_id"].to_list() == older["raw_item_id"].to_list()
    for column in ("title", "brand"):
        pairs = [pair for pair in zip(newer[column], older[column], strict=True) if all(pair)]
        assert len(pairs) > (1500 if column == "title" else 100)
        assert all(one == other for one, other in pairs)
    # the path holds categories only: no bullet points, no markup
    assert set(newer["categories"].explode().drop_nulls()) == {"Gift Cards", "Gift Card Accessories"}
    # each item of the file, against the file itself
    lines = gzip.decompress((folder / "meta_Gift_Cards.json.gz").read_bytes()).splitlines()
    raw = {record["asin"]: record for record in map(json.loads, lines)}
    for row in newer.iter_rows(named=True):
        record = raw[row["raw_item_id"]]
        assert row["title"] == " ".join(html.unescape(record["title"]).split())
        assert row["image_references"] == list(dict.fromkeys(record["imageURLHighRes"] + record["imageURL"]))


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
@pytest.mark.parametrize("value", [17, 17.0, "a/b", "a b", "\u00e9", "sku.17"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_id_inside_another_object_hides_no_item(edition: int, value: object, is_first: bool, tmp_path: Path) -> None:
    """Lines of items that are not wanted are told by their bytes; here another id of that form stands in a wanted line."""
    key = "parent_asin" if edition == 2023 else "asin"
    inner = {"variants": [{key: "OTHER"}]} if edition == 2023 else {"parent_asin": "OTHER", "variants": {"asin": "OTHER"}}
    own = {key: value, "title": "Red mug"}
    record = own | inner if is_first else inner | own
    wanted = "17" if isinstance(value, int | float) else str(value)
    for options in ({}, {"keep": {wanted}}):
        frame = metadata_of(tmp_path / "m", [record, {key: "B1", "title": "Blue mug"}], edition, **options)
        assert frame.filter(raw_item_id=wanted)["title"].to_list() == ["Red mug"]


def test_metadata_of_2014_as_json_is_read_as_json(tmp_path: Path) -> None:
    """Python reads the same strings, but keeps the backslash of ``\\/`` and makes two surrogates of a pair."""
    lines = [
        r'{"asin": "\ud83d\ude00", "title": "Smile \ud83d\ude00 mug", "imUrl": "http:\/\/h.example\/a.jpg", "price": null}',
        r'{ "asin": "B2", "title": "It\u0027s a mug", "imUrl": "http:\/\/h.example\/b.jpg", "price": 5}',
        r"""{'asin': 'B3', 'title': "It's a mug", 'imUrl': 'http://h.example/c.jpg', 'price': None}""",
    ]
    (tmp_path / "m").write_text("\n".join(lines), encoding="utf-8")
    frame = read_metadata(tmp_path / "m", 2014, max_bad_line_share=0.0)
    assert frame.select("raw_item_id", "title", "image_references").rows() == [
        ("B2", "It's a mug", ["http://h.example/b.jpg"]),
        ("B3", "It's a mug", ["http://h.example/c.jpg"]),
        ("\U0001f600", "Smile \U0001f600 mug", ["http://h.example/a.jpg"]),
    ]


def test_an_empty_first_path_hides_no_category(tmp_path: Path) -> None:
    records = [
        {"parent_asin": "B1", "categories": [[], ["Kitchen", "Mugs"], ["Gifts"]]},
        {"parent_asin": "B2", "categories": [[], "Kitchen"]},
        {"parent_asin": "B3", "categories": [[], []]},
    ]
    assert metadata_of(tmp_path / "m", records, 2023)["categories"].to_list() == [["Kitchen", "Mugs"], ["Kitchen"], []]
