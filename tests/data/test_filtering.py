"""Filter, numbering and accounting: small written shops, and the real data sets' published sizes."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import struct
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS
from sda_core.data.amazon import read_reviews
from sda_core.data.demo import file_names, write_shop
from sda_core.data.filtering import FilteredData, filter_dataset
from sda_core.dropped_values import REASONS
from sda_core.errors import ConfigError, DataError
from sda_core.params import FilterParams, load_params
from sda_core.seed import derive

DROPS = [
    "rows_bad",
    "rows_dropped_rating",
    "rows_dropped_duplicate",
    "rows_dropped_core",
    "rows_dropped_no_metadata",
    "rows_dropped_no_image",
]
TIMES = [
    "times_in_seconds",
    "times_in_milliseconds",
    "times_in_microseconds",
    "times_in_nanoseconds",
    "times_as_text",
    "times_without_date",
]
VALUES = [
    name
    for field, reasons in REASONS.items()
    for name in (f"values_used_{field}", f"values_dropped_{field}", *(f"values_dropped_{field}_{reason}" for reason in reasons))
]
COUNTS = ["mean", "min", "p10", "p50", "p90", "p99", "max"]
STATISTICS = [
    "rows_read", *DROPS, "rows_repaired",
    "metadata_rows_read", "metadata_rows_bad", "metadata_rows_repaired", "metadata_rows_not_used",
    "times_converted", *TIMES, "ids_repaired", "metadata_ids_repaired", *VALUES,
    "num_users", "num_items", "num_interactions",
    "num_train", "num_valid", "num_test", "num_rest", "num_users_without_target", "density", "first_time", "last_time",
    *(f"history_length_{count}" for count in COUNTS),
    *(f"item_count_{count}" for count in COUNTS),
    "share_interactions_top_20_percent",
    "share_items_with_metadata", "share_items_with_title", "share_items_with_brand", "share_items_with_price",
    "share_items_with_categories", "share_items_with_features", "share_items_with_description",
    "share_items_with_image_reference", "mean_title_chars",
    "share_tied_pairs", "share_tied_valid_targets", "share_tied_test_targets",
]  # fmt: skip

Row = tuple[str, str, float, int]


def filter_params(**changes: object) -> FilterParams:
    values = {
        "method": "kcore",
        "min_user_interactions": 1,
        "min_item_interactions": 1,
        "duplicates": "first",
        "ties": "file",
        "ties_seed": 42,
        "time_resolution_seconds": 0,
        "items_without_metadata": "keep",
        "items_without_image": "keep",
        "min_rating": 0.0,
        "max_bad_line_share": 1.0,
        "split": "leave_one_out",
        "valid_from": None,
        "test_from": None,
    }
    return FilterParams.model_validate(values | changes)


def review_lines(rows: list[Row]) -> list[str]:
    return [
        json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time})
        for user, item, rating, time in rows
    ]


def metadata_lines(known: Iterable[str], with_image: Iterable[str] = ()) -> list[str]:
    return [
        json.dumps({"asin": item, "title": f"title {item}"} | ({"imageURL": ["http://x/y.jpg"]} if item in with_image else {}))
        for item in [*known, "other"]
    ]


def run(
    folder: Path, rows: list[Row], known: Iterable[str], params: FilterParams, bad_lines: int = 0, with_image: Iterable[str] = ()
) -> FilteredData:
    lines = review_lines(rows)
    (folder / "r").write_text("\n".join(lines[:1] + ["{broken"] * bad_lines + lines[1:]) + "\n")
    (folder / "m").write_text("\n".join(metadata_lines(known, with_image)))
    return filter_dataset(folder / "r", folder / "m", 2018, params)


def raw_rows(data: FilteredData) -> list[tuple[str, str, int, str]]:
    """Interactions with their raw ids."""
    named = data.interactions.join(data.users, on="user_id", maintain_order="left").join(
        data.items, on="item_id", maintain_order="left"
    )
    return named.select("raw_user_id", "raw_item_id", "timestamp", "split").rows()


def check_invariants(data: FilteredData) -> None:
    for table, frame in ((INTERACTIONS, data.interactions), (ITEMS, data.items), (USERS, data.users)):
        assert dict(frame.schema) == dict(table.columns)
        assert list(frame.columns) == list(table.columns)
    for name, frame in (("item_id", data.items), ("user_id", data.users)):
        assert frame[name].to_list() == list(range(1, len(frame) + 1))
        assert frame[f"raw_{name}"].to_list() == sorted(set(frame[f"raw_{name}"]))
        assert set(data.interactions[name]) == set(frame[name])
    assert data.interactions.select("user_id", "timestamp").equals(
        data.interactions.select("user_id", "timestamp").sort("user_id", "timestamp")
    )
    assert not any(
        frame[column].null_count() for frame in (data.interactions, data.items, data.users) for column in frame.columns
    )
    counts = data.statistics
    assert list(counts) == STATISTICS
    assert counts["rows_read"] == counts["num_interactions"] + sum(counts[drop] for drop in DROPS)
    assert counts["rows_read"] - counts["rows_bad"] == sum(counts[name] for name in TIMES)
    for field, reasons in REASONS.items():
        assert counts[f"values_dropped_{field}"] == sum(counts[f"values_dropped_{field}_{reason}"] for reason in reasons)
    parts = Counter(data.interactions["split"])
    assert [counts[f"num_{part}"] for part in ("train", "valid", "test")] == [parts[part] for part in ("train", "valid", "test")]
    assert counts["num_rest"] == parts["valid_rest"] + parts["test_rest"]
    assert (
        parts.total() == counts["num_interactions"] == sum(counts[f"num_{part}"] for part in ("train", "valid", "test", "rest"))
    )
    assert counts["num_users_without_target"] == counts["num_users"] - parts["test"]
    assert all(type(value) in (int, float) for value in counts.values())
    json.dumps(dict(counts), allow_nan=False)


ROWS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcd"), st.sampled_from([1.0, 3.0, 5.0]), st.integers(0, 5)),
    min_size=1,
    max_size=40,
)
CUTS = st.sampled_from(
    [
        {"split": "leave_one_out"},
        {"split": "global_time", "valid_from": 0.5, "test_from": 0.8},
        {"split": "global_time", "valid_from": 0.2, "test_from": 0.4},
    ]
)
PARAMS = st.builds(
    lambda cuts, **changes: filter_params(**changes, **cuts),
    CUTS,
    method=st.sampled_from(["kcore", "single_pass"]),
    min_user_interactions=st.integers(1, 3),
    min_item_interactions=st.integers(1, 3),
    duplicates=st.sampled_from(["first", "last", "keep"]),
    ties=st.sampled_from(["file", "random"]),
    time_resolution_seconds=st.sampled_from([0, 2]),
    items_without_metadata=st.sampled_from(["drop", "keep"]),
    items_without_image=st.sampled_from(["drop", "keep"]),
    min_rating=st.sampled_from([0.0, 2.0, 3.0]),
)


def random_key(seed: int, row: Row) -> int:
    """The documented hash of a row that decides among equal times, with Python's whole numbers."""

    def mixed(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            value = ((value ^ (value >> shift)) * factor) % 2**64
        return value

    key = derive(seed, "filter", "ties").to_bytes(8, "little")
    user, item = (int.from_bytes(hashlib.blake2b(raw.encode(), digest_size=8, key=key).digest(), "little") for raw in row[:2])
    return mixed(mixed(user ^ mixed(item)) ^ int.from_bytes(struct.pack("<f", row[2]), "little"))


def rounded_down(rows: list[Row], seconds: int) -> list[Row]:
    return [(user, item, rating, time - time % seconds if seconds else time) for user, item, rating, time in rows]


class PlainFilter:
    """The documented steps, over plain lists; ``dropped`` counts by reason."""

    def __init__(self, params: FilterParams, known: str, with_image: str) -> None:
        self.params, self.known, self.with_image = params, known, with_image
        self.dropped: Counter[str] = Counter()

    def keep(self, reason: str, before: list[Row], kept: list[Row]) -> list[Row]:
        self.dropped[reason] += len(before) - len(kept)
        return kept

    def rated(self, rows: list[Row]) -> list[Row]:
        return self.keep("rows_dropped_rating", rows, [row for row in rows if row[2] >= self.params.min_rating])

    def with_items(self, rows: list[Row]) -> list[Row]:
        if self.params.items_without_metadata == "drop":
            rows = self.keep("rows_dropped_no_metadata", rows, [row for row in rows if row[1] in self.known])
        if self.params.items_without_image == "drop":
            rows = self.keep("rows_dropped_no_image", rows, [row for row in rows if row[1] in self.with_image])
        return rows

    def without_duplicates(self, rows: list[Row]) -> list[Row]:
        key = (lambda row: 0) if self.params.ties == "file" else (lambda row: random_key(self.params.ties_seed, row))
        rows = sorted(rows, key=lambda row: (row[0], row[3], key(row)))
        if self.params.duplicates == "keep":
            return rows
        ordered = rows if self.params.duplicates == "first" else rows[::-1]
        seen: set[tuple[str, str]] = set()
        kept = [row for row in ordered if (row[0], row[1]) not in seen and not seen.add((row[0], row[1]))]
        return self.keep("rows_dropped_duplicate", rows, kept if self.params.duplicates == "first" else kept[::-1])

    def frequent(self, rows: list[Row], min_item: int) -> list[Row]:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= self.params.min_user_interactions and items[row[1]] >= min_item]
        return self.keep("rows_dropped_core", rows, kept)

    def core(self, rows: list[Row]) -> list[Row]:
        while len(smaller := self.frequent(rows, self.params.min_item_interactions)) < len(rows):
            rows = smaller
        return rows

    def steps(self, rows: list[Row]) -> list[Row]:
        rows = self.rated(rounded_down(rows, self.params.time_resolution_seconds))
        if self.params.method == "kcore":
            return self.core(self.with_items(self.core(self.without_duplicates(rows))))
        rows = self.without_duplicates(self.frequent(rows, self.params.min_item_interactions))
        return self.with_items(self.frequent(rows, 0))

    def items_first(self, rows: list[Row]) -> list[Row]:
        """The k-core when items are dropped before anything is counted."""
        return self.core(self.without_duplicates(self.with_items(self.rated(rows))))


def plain_labels(rows: list[Row], params: FilterParams) -> list[str] | None:
    """The splits of rows in history order; None where a part is missing."""
    histories: dict[str, list[int]] = {}
    for user, _, _, time in rows:
        histories.setdefault(user, []).append(time)
    labels: list[str] = []
    if params.split == "leave_one_out":
        for history in histories.values():
            labels += ["train"] * len(history) if len(history) < 3 else ["train"] * (len(history) - 2) + ["valid", "test"]
        return labels
    assert isinstance(params.valid_from, float)
    assert isinstance(params.test_from, float)
    times = sorted(row[3] for row in rows)
    valid_from, test_from = (times[min(round(cut * len(times)), len(times) - 1)] for cut in (params.valid_from, params.test_from))
    for history in histories.values():
        parts = ["train" if time < valid_from else "valid" if time < test_from else "test" for time in history]
        for place, part in enumerate(parts):
            is_first = place > 0 and part not in parts[:place]
            labels.append(part if part == "train" or is_first else f"{part}_rest")
    return labels if {"train", "valid", "test"} <= set(labels) else None


@settings(max_examples=150, deadline=None)
@given(ROWS, PARAMS, st.integers(0, 3))
def test_equals_the_documented_steps_and_accounts_for_every_row(
    tmp_path_factory, rows: list[Row], params: FilterParams, bad_lines: int
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    plain = PlainFilter(params, known="abc", with_image="bc")
    expected = plain.steps(rows)
    labels = plain_labels(expected, params) if expected else None
    if labels is None:
        with pytest.raises(DataError, match=r"params\.yaml: filter"):
            run(folder, rows, "abc", params, bad_lines, with_image="bc")
        return
    data = run(folder, rows, "abc", params, bad_lines, with_image="bc")
    check_invariants(data)
    assert raw_rows(data) == [(user, item, time, label) for (user, item, _, time), label in zip(expected, labels, strict=True)]
    assert data.interactions["rating"].to_list() == [row[2] for row in expected]
    assert {drop: data.statistics[drop] for drop in DROPS} == {drop: plain.dropped[drop] for drop in DROPS} | {
        "rows_bad": bad_lines
    }
    assert data.statistics["rows_read"] == len(rows) + bad_lines


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["first", "last", "keep"]))
def test_a_core_before_the_metadata_keeps_the_rows_of_a_core_after_it(
    tmp_path_factory, rows: list[Row], min_user: int, min_item: int, duplicates: str
) -> None:
    params = filter_params(
        min_user_interactions=min_user,
        min_item_interactions=min_item,
        duplicates=duplicates,
        items_without_metadata="drop",
        items_without_image="drop",
    )
    expected = PlainFilter(params, known="abc", with_image="ab").items_first(rows)
    folder = tmp_path_factory.mktemp("shop")
    if not expected:
        with pytest.raises(DataError, match=r"params\.yaml: filter"):
            run(folder, rows, "abc", params, with_image="ab")
        return
    data = run(folder, rows, "abc", params, with_image="ab")
    assert [row[:3] for row in raw_rows(data)] == [(user, item, time) for user, item, _, time in expected]
    assert data.interactions["rating"].to_list() == [row[2] for row in expected]


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 3), st.data())
def test_blocks_of_any_size_give_the_same_tables(tmp_path_factory, rows: list[Row], bad_lines: int, data: st.DataObject) -> None:
    """A gzip file of many members is unpacked member by member, so that small blocks really are small."""
    folder = tmp_path_factory.mktemp("shop")
    whole = run(folder, rows, "abc", filter_params(), bad_lines, with_image="bc")
    for name in "rm":
        raw = (folder / name).read_bytes()
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12))), len(raw)]
        pieces = [gzip.compress(raw[begin:end], compresslevel=1) for begin, end in pairwise(cuts)]
        (folder / name).write_bytes(b"".join(pieces))
    small = filter_dataset(folder / "r", folder / "m", 2018, filter_params(), block_bytes=1)
    assert small.interactions.equals(whole.interactions)
    assert small.items.equals(whole.items)
    assert small.users.equals(whole.users)
    assert small.statistics == whole.statistics


def test_small_blocks_are_many(tmp_path: Path) -> None:
    """The test above would prove nothing if the reader gave everything at once."""
    rows: list[Row] = [(f"u{number}", "a", 5.0, number) for number in range(10)]
    (tmp_path / "r").write_bytes(b"".join(gzip.compress(line.encode() + b"\n") for line in review_lines(rows)))
    blocks = list(read_reviews(tmp_path / "r", 2018, max_bad_line_share=0.0, block_bytes=1))
    assert [len(block) for block in blocks] == [1] * 10


HISTORY: list[Row] = [
    ("u", "a", 5.0, 30),
    ("u", "b", 5.0, 10),
    ("u", "a", 1.0, 20),
    ("v", "a", 5.0, 1),
    ("v", "c", 5.0, 2),
    ("v", "d", 5.0, 3),
]


def test_duplicates_are_settled_by_time(tmp_path: Path) -> None:
    first = run(tmp_path, HISTORY, [], filter_params())
    assert raw_rows(first)[:2] == [("u", "b", 10, "train"), ("u", "a", 20, "train")]
    last = run(tmp_path, HISTORY, [], filter_params(duplicates="last"))
    assert raw_rows(last)[:2] == [("u", "b", 10, "train"), ("u", "a", 30, "train")]
    both = run(tmp_path, HISTORY, [], filter_params(duplicates="keep"))
    assert raw_rows(both)[:3] == [("u", "b", 10, "train"), ("u", "a", 20, "valid"), ("u", "a", 30, "test")]
    assert [data.statistics["rows_dropped_duplicate"] for data in (first, last, both)] == [1, 1, 0]
    assert first.statistics["num_users_without_target"] == 1


def test_items_without_metadata_stay_with_empty_fields_or_go(tmp_path: Path) -> None:
    kept = run(tmp_path, HISTORY, ["a", "c"], filter_params())
    assert kept.items.select("raw_item_id", "title", "has_metadata").rows() == [
        ("a", "title a", True),
        ("b", "", False),
        ("c", "title c", True),
        ("d", "", False),
    ]
    assert kept.items["categories"].to_list() == [[]] * 4
    assert kept.statistics["share_items_with_title"] == 0.5
    gone = run(tmp_path, HISTORY, ["a", "c"], filter_params(items_without_metadata="drop"))
    assert gone.items["raw_item_id"].to_list() == ["a", "c"]
    assert gone.statistics["rows_dropped_no_metadata"] == 2


def test_items_without_a_image_go_and_the_core_is_taken_again(tmp_path: Path) -> None:
    # d has no metadata, c no image; u and v have two items each, w has c and d besides a.
    rows: list[Row] = [
        (user, item, 5.0, time) for time, (user, item) in enumerate([*product("uv", "ab"), ("w", "a"), ("w", "c"), ("w", "d")])
    ]
    core = {"min_user_interactions": 2, "min_item_interactions": 1, "items_without_image": "drop"}
    both = run(tmp_path, rows, "abc", filter_params(**core, items_without_metadata="drop"), with_image="ab")
    assert [row[:2] for row in raw_rows(both)] == [("u", "a"), ("u", "b"), ("v", "a"), ("v", "b")]
    assert [both.statistics[drop] for drop in DROPS] == [0, 0, 0, 1, 1, 1]  # w's a goes with the second core
    image = run(tmp_path, rows, "abc", filter_params(**core), with_image="ab")
    assert image.interactions.equals(both.interactions)
    assert [image.statistics[drop] for drop in DROPS] == [0, 0, 0, 1, 0, 2]  # no metadata names no image either
    with pytest.raises(DataError, match=r"filter\.items_without_image: is 'drop', but no remaining item has an image"):
        run(tmp_path, rows, "abc", filter_params(**core))


def test_metadata_is_read_for_what_the_core_leaves(tmp_path: Path) -> None:
    """The broken line of an item that is not wanted is not even parsed."""
    rows: list[Row] = [("u", "a", 5.0, 1), ("v", "a", 5.0, 2), ("v", "rare", 5.0, 3)]
    (tmp_path / "r").write_text("\n".join(review_lines(rows)))
    (tmp_path / "m").write_text('{"asin": "a", "title": "A"}\n{"asin": "rare", broken\n{"asin": "other", broken\n')
    params = filter_params(min_item_interactions=2, max_bad_line_share=0.0)
    counts = filter_dataset(tmp_path / "r", tmp_path / "m", 2018, params).statistics
    assert (counts["metadata_rows_read"], counts["metadata_rows_bad"]) == (3, 0)
    with pytest.raises(DataError, match="1 of 3 lines"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 2018, params.model_copy(update={"min_item_interactions": 1}))


def test_statistics_by_hand(tmp_path: Path) -> None:
    rows: list[Row] = [("u", "a", 5.0, 10), ("u", "b", 5.0, 20), ("u", "c", 5.0, 40), ("v", "a", 4.0, 15), ("w", "a", 3.0, 7)]
    (tmp_path / "r").write_bytes(
        "\n".join(review_lines(rows)).encode() + b"\n\x00" + review_lines([("w", "e", 1, 8)])[0].encode()
    )
    metadata = [
        {"asin": "a", "title": "four", "brand": "x", "price": "$2.50", "category": ["k", "l"], "imageURL": ["http://x/a.jpg"]},
        {"asin": "b", "title": "sixsix", "feature": ["soft"], "description": ["long"]},
        {"asin": "c"},
        {"asin": "b", "title": "six"},
    ]
    (tmp_path / "m").write_bytes(b"\xe9" + "\n".join(["", *map(json.dumps, metadata)]).encode())
    data = filter_dataset(tmp_path / "r", tmp_path / "m", 2018, filter_params())
    check_invariants(data)
    assert data.statistics == {
        "rows_read": 6, "rows_bad": 0, "rows_dropped_rating": 0, "rows_dropped_duplicate": 0, "rows_dropped_core": 0,
        "rows_dropped_no_metadata": 0, "rows_dropped_no_image": 0, "rows_repaired": 1,
        "metadata_rows_read": 5, "metadata_rows_bad": 1, "metadata_rows_repaired": 1, "metadata_rows_not_used": 1,
        "times_converted": 0, **dict.fromkeys(TIMES, 0), "times_without_date": 6, "ids_repaired": 0, "metadata_ids_repaired": 0,
        **dict.fromkeys(VALUES, 0),
        "values_used_title": 3, "values_used_brand": 1,  # of all lines that can be read
        "values_used_price": 1, "values_used_categories": 2,
        "values_used_features": 1, "values_used_description": 1, "values_used_image_references": 1,
        "num_users": 3, "num_items": 4, "num_interactions": 6,
        "num_train": 4, "num_valid": 1, "num_test": 1, "num_rest": 0, "num_users_without_target": 2,
        "density": 0.5, "first_time": 7, "last_time": 40,
        "history_length_mean": 2.0, "history_length_min": 1, "history_length_p10": pytest.approx(1.2), "history_length_p50": 2.0,
        "history_length_p90": pytest.approx(2.8), "history_length_p99": pytest.approx(2.98), "history_length_max": 3,
        "item_count_mean": 1.5, "item_count_min": 1, "item_count_p10": 1.0, "item_count_p50": 1.0,
        "item_count_p90": pytest.approx(2.4), "item_count_p99": pytest.approx(2.94), "item_count_max": 3,
        "share_interactions_top_20_percent": 0.5,  # one item of four, rounded up from 0.8
        "share_items_with_metadata": 0.75, "share_items_with_title": 0.5, "share_items_with_brand": 0.25,
        "share_items_with_price": 0.25, "share_items_with_categories": 0.25, "share_items_with_features": 0.25,
        "share_items_with_description": 0.25, "share_items_with_image_reference": 0.25, "mean_title_chars": 5.0,
        "share_tied_pairs": 0.0, "share_tied_valid_targets": 0.0, "share_tied_test_targets": 0.0,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ROWS, PARAMS.filter(lambda params: params.ties == "random"), st.randoms(use_true_random=False))
def test_the_order_of_the_lines_changes_nothing(
    tmp_path_factory, rows: list[Row], params: FilterParams, draw: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    reviews, metadata = (
        review_lines(rows),
        [*metadata_lines("abc", "bc"), *metadata_lines("ab", "a"), '{"asin": "a", "brand": "x"}'],
    )

    def filtered() -> FilteredData | str:
        (folder / "r").write_text("\n".join(draw.sample(reviews, len(reviews))))
        (folder / "m").write_text("\n".join(draw.sample(metadata, len(metadata))))
        try:
            return filter_dataset(folder / "r", folder / "m", 2018, params)
        except DataError as error:
            return str(error)

    first, second = filtered(), filtered()
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
        return
    assert first.interactions.equals(second.interactions)
    assert first.items.equals(second.items)
    assert first.users.equals(second.users)
    assert first.statistics == second.statistics


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
@pytest.mark.parametrize("duplicates", ["first", "last", "keep"])
def test_shuffled_lines_of_each_format_give_the_same_tables(
    tmp_path: Path, repository: Path, edition: int, duplicates: str
) -> None:
    """Raw files with the edition's defects: lines twice, malformed lines, reviews repeated with another rating."""
    changes = {"edition": edition, "num_users": 120, "num_items": 60, "quirk_share": 0.4, "same_day_share": 0.6, "image_side": 16}
    dataset = load_params(repository / "params.yaml").dataset.model_copy(update=changes)
    write_shop(dataset, tmp_path)
    params = filter_params(ties="random", duplicates=duplicates, min_user_interactions=4, min_item_interactions=3)
    reviews, metadata, _ = (tmp_path / name for name in file_names(dataset))
    whole = filter_dataset(reviews, metadata, edition, params)
    for seed in range(3):
        draw = random.Random(seed)
        for path in (reviews, metadata):
            lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
            path.write_bytes(gzip.compress(b"".join(draw.sample(lines, len(lines))), compresslevel=1))
        again = filter_dataset(reviews, metadata, edition, params)
        assert again.interactions.equals(whole.interactions)
        assert again.items.equals(whole.items)
        assert again.users.equals(whole.users)
        assert again.statistics == whole.statistics


def test_ids_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [row for row in HISTORY if row[3] != 20]
    data, turned = (run(tmp_path, order, ["a"], filter_params()) for order in (rows, rows[::-1]))
    assert data.interactions.equals(turned.interactions)
    assert data.items.equals(turned.items)
    assert data.users.equals(turned.users)
    assert data.statistics == turned.statistics


def test_times_within_a_second_order_a_history_of_2023(tmp_path: Path) -> None:
    rows = [("b", 1616156351887), ("c", 1616156351001), ("a", 1616156351400)]
    lines = [json.dumps({"user_id": "u", "parent_asin": item, "rating": 5, "timestamp": time}) for item, time in rows]
    (tmp_path / "r").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "m").write_text('{"parent_asin": "a", "title": "A"}')
    data = filter_dataset(tmp_path / "r", tmp_path / "m", 2023, filter_params())
    assert [row[1] for row in raw_rows(data)] == ["c", "a", "b"]
    assert data.interactions["timestamp"].to_list() == [1616156351] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_rating": 6.0}, "filter.min_rating: every rating is below 6; lower it"),
        ({"items_without_metadata": "drop"}, "filter.items_without_metadata: is 'drop', and none"),
        (
            {"split": "global_time", "valid_from": "1970-01-01", "test_from": "1970-01-02"},
            "filter.valid_from, filter.test_from: no interaction is before 1970-01-01",
        ),
        (
            {"min_user_interactions": 4},
            "at least 4 per user and 1 per item .method kcore.; of 5, the longest history had 3, the most frequent item 2",
        ),
        (
            {"min_item_interactions": 9, "method": "single_pass"},
            "at least 1 per user and 9 per item .method single_pass.; of 6",
        ),
    ],
)
def test_an_empty_result_names_its_threshold(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path, HISTORY, [], filter_params(**changes))
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    run(tmp_path, HISTORY, [], filter_params())
    with pytest.raises(ConfigError, match=r"dataset\.edition"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 1999, filter_params())
    with pytest.raises(DataError, match="6 of 6 lines"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 2023, filter_params(max_bad_line_share=0.5))
    with pytest.raises(DataError, match="contains no usable review"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 2023, filter_params())
    (tmp_path / "m").unlink()
    with pytest.raises(DataError, match="m: cannot be read"):
        filter_dataset(tmp_path / "r", tmp_path / "m", 2018, filter_params())


# ------------------------------------------------------------------------------------------------- real data
def preset(repository: Path, name: str, **changes: object) -> FilterParams:
    section = YAML(typ="safe", pure=True).load(repository / "conf" / "dataset" / f"{name}.yaml")["filter"]
    return FilterParams.model_validate(section | changes)


@pytest.mark.real_data
def test_gift_cards_from_both_releases(repository: Path, real_data: Path) -> None:
    folder = real_data / "amazon_2018_gift_cards"
    params = preset(repository, "gift_cards")
    releases = [folder / "meta_Gift_Cards.json.gz", folder / "older_scrape" / "meta_Gift_Cards.json.gz"]
    data, older = (filter_dataset(folder / "Gift_Cards_5.json.gz", release, 2018, params) for release in releases)
    check_invariants(data)
    counts = data.statistics
    assert (counts["rows_read"], counts["rows_bad"], counts["rows_dropped_duplicate"]) == (2972, 0, 7)  # 2,965 pairs
    # The published "5-core" is none once repeated pairs are collapsed.
    assert counts["rows_dropped_core"] > 0
    assert min(Counter(data.interactions["item_id"]).values()) >= 5
    assert min(Counter(data.interactions["user_id"]).values()) >= 5
    assert data.interactions.equals(older.interactions)
    assert data.users.equals(older.users)
    assert data.items.drop("image_references").equals(older.items.drop("image_references"))
    assert not data.items.equals(older.items)
    assert {name: value for name, value in counts.items() if "image" not in name} == {
        name: value for name, value in older.statistics.items() if "image" not in name
    }
    # Unfiltered, the file has its published size; even with repeated pairs counted it is no 5-core.
    whole = preset(repository, "gift_cards", duplicates="keep", min_user_interactions=1, min_item_interactions=1)
    counts = filter_dataset(folder / "Gift_Cards_5.json.gz", releases[0], 2018, whole).statistics
    assert (counts["num_users"], counts["num_items"], counts["num_interactions"]) == (458, 148, 2972)
    single_pass = preset(repository, "gift_cards", duplicates="keep", method="single_pass")
    counts = filter_dataset(folder / "Gift_Cards_5.json.gz", releases[0], 2018, single_pass).statistics
    assert (counts["num_users"], counts["num_items"], counts["num_interactions"]) == (456, 147, 2960)


@pytest.mark.real_data
def test_beauty_has_its_published_size(repository: Path, real_data: Path) -> None:
    folder = real_data / "beauty_2014_sequences"
    data = filter_dataset(folder / "reviews_Beauty_5.json.gz", folder / "meta_Beauty.json.gz", 2014, preset(repository, "beauty"))
    check_invariants(data)
    counts = data.statistics
    assert (counts["num_users"], counts["num_items"], counts["num_interactions"]) == (22_363, 12_101, 198_502)
    assert counts["num_valid"] == counts["num_test"] == 22_363
    assert sum(counts[drop] for drop in DROPS) == 0
    assert counts["share_items_with_title"] == 1.0


@pytest.mark.real_data
def test_movies_keep_everything(repository: Path, real_data: Path) -> None:
    folder = real_data / "movies_2023_format"
    data = filter_dataset(folder / "Movies.jsonl.gz", folder / "meta_Movies.jsonl.gz", 2023, preset(repository, "movies"))
    check_invariants(data)
    counts = data.statistics
    assert (counts["num_users"], counts["num_items"], counts["num_interactions"]) == (610, 3_548, 89_590)
    assert counts["share_items_with_image_reference"] == 1.0
    assert data.items.filter(pl.col("raw_item_id") == "ML00000001")["image_references"].to_list() == [["images/ML00000001.jpg"]]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "folder", "users", "items", "interactions"),
    [("hm", "hm_week", 9_925, 4_006, 74_364), ("hm_two_years", "hm_two_years", 901, 2_423, 14_692)],
)
def test_garments_have_the_counted_size(
    repository: Path, real_data: Path, name: str, folder: str, users: int, items: int, interactions: int
) -> None:
    files = real_data / folder / "interactions.jsonl.gz", real_data / folder / "items.jsonl.gz"
    data = filter_dataset(*files, 2023, preset(repository, name))
    check_invariants(data)
    counts = data.statistics
    assert (counts["num_users"], counts["num_items"], counts["num_interactions"]) == (users, items, interactions)
    assert counts["share_tied_test_targets"] > 0.6  # the shop records days: most targets are of a basket


@pytest.mark.real_data
def test_garments_can_be_split_between_days(repository: Path, real_data: Path) -> None:
    folder = real_data / "hm_week"
    cuts = preset(repository, "hm", split="global_time", valid_from="2020-09-20", test_from="2020-09-21")
    data = filter_dataset(folder / "interactions.jsonl.gz", folder / "items.jsonl.gz", 2023, cuts)
    assert (data.statistics["num_valid"], data.statistics["num_test"]) == (397, 1_077)
    last = data.interactions.filter(pl.col("split") == "train")["timestamp"].max()
    first = data.interactions.filter(pl.col("split") == "test")["timestamp"].min()
    assert (last, first) == (1_600_473_600, 1_600_646_400)  # 19 and 21 September 2020
