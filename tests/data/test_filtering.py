"""Filter, numbering and accounting: small written shops, and the real data sets' published sizes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS
from sda_core.data.filtering import FilteredData, filter_dataset
from sda_core.errors import ConfigError, DataError
from sda_core.params import FilterParams

DROPS = ["rows_bad", "rows_dropped_duplicate", "rows_dropped_rating", "rows_dropped_no_metadata", "rows_dropped_core"]

Row = tuple[str, str, float, int]


def filter_params(**changes: object) -> FilterParams:
    values = {
        "method": "kcore",
        "min_user_interactions": 1,
        "min_item_interactions": 1,
        "duplicates": "first",
        "items_without_metadata": "keep",
        "min_rating": 0.0,
        "max_bad_line_share": 1.0,
        "split": "leave_one_out",
    }
    return FilterParams.model_validate(values | changes)


def run(folder: Path, rows: list[Row], known: list[str], params: FilterParams, bad_lines: int = 0) -> FilteredData:
    lines = [
        json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time})
        for user, item, rating, time in rows
    ]
    (folder / "r").write_text("\n".join(lines[:1] + ["{broken"] * bad_lines + lines[1:]) + "\n")
    (folder / "m").write_text("".join(json.dumps({"asin": item, "title": f"title {item}"}) + "\n" for item in [*known, "other"]))
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
    assert counts["rows_read"] == counts["num_interactions"] + sum(counts[drop] for drop in DROPS)
    assert counts["num_train"] + counts["num_valid"] + counts["num_test"] == counts["num_interactions"]
    assert all(type(value) in (int, float) for value in counts.values())
    json.dumps(dict(counts), allow_nan=False)


ROWS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcd"), st.sampled_from([1.0, 3.0, 5.0]), st.integers(0, 5)),
    min_size=1,
    max_size=40,
)
PARAMS = st.builds(
    filter_params,
    method=st.sampled_from(["kcore", "single_pass"]),
    min_user_interactions=st.integers(1, 3),
    min_item_interactions=st.integers(1, 3),
    duplicates=st.sampled_from(["first", "last", "keep"]),
    items_without_metadata=st.sampled_from(["drop", "keep"]),
    min_rating=st.sampled_from([0.0, 2.0, 3.0]),
)


def plain_filter(rows: list[Row], known: str, params: FilterParams) -> tuple[list[Row], Counter[str]]:
    """The documented steps, over plain lists."""
    dropped: Counter[str] = Counter()

    def keep(name: str, kept: list[Row], before: list[Row]) -> list[Row]:
        dropped[name] += len(before) - len(kept)
        return kept

    def with_metadata(rows: list[Row]) -> list[Row]:
        wanted = params.items_without_metadata == "keep"
        return keep("rows_dropped_no_metadata", [row for row in rows if wanted or row[1] in known], rows)

    def without_duplicates(rows: list[Row]) -> list[Row]:
        rows = sorted(rows, key=lambda row: (row[0], row[3]))
        if params.duplicates == "keep":
            return rows
        ordered = rows if params.duplicates == "first" else rows[::-1]
        seen: set[tuple[str, str]] = set()
        kept = [row for row in ordered if (row[0], row[1]) not in seen and not seen.add((row[0], row[1]))]
        return keep("rows_dropped_duplicate", kept if params.duplicates == "first" else kept[::-1], rows)

    def frequent(rows: list[Row], min_item: int) -> list[Row]:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        return [row for row in rows if users[row[0]] >= params.min_user_interactions and items[row[1]] >= min_item]

    rows = keep("rows_dropped_rating", [row for row in rows if row[2] >= params.min_rating], rows)
    if params.method == "kcore":
        rows = core = without_duplicates(with_metadata(rows))
        while len(frequent(core, params.min_item_interactions)) < len(core):
            core = frequent(core, params.min_item_interactions)
        return keep("rows_dropped_core", core, rows), dropped
    rows = keep("rows_dropped_core", frequent(rows, params.min_item_interactions), rows)
    rows = without_duplicates(rows)
    rows = keep("rows_dropped_core", frequent(rows, 0), rows)
    return with_metadata(rows), dropped


@settings(max_examples=50, deadline=None)
@given(ROWS, PARAMS, st.integers(0, 3))
def test_equals_the_documented_steps_and_accounts_for_every_row(
    tmp_path_factory, rows: list[Row], params: FilterParams, bad_lines: int
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    expected, dropped = plain_filter(rows, "abc", params)
    if not expected:
        with pytest.raises(DataError, match=r"params\.yaml: filter"):
            run(folder, rows, list("abc"), params, bad_lines)
        return
    data = run(folder, rows, list("abc"), params, bad_lines)
    check_invariants(data)
    expected = sorted(expected, key=lambda row: (row[0], row[3]))
    assert [row[:3] for row in raw_rows(data)] == [(user, item, time) for user, item, _, time in expected]
    assert data.interactions["rating"].to_list() == [row[2] for row in expected]
    assert {drop: data.statistics[drop] for drop in DROPS} == {drop: dropped[drop] for drop in DROPS} | {"rows_bad": bad_lines}
    assert data.statistics["rows_read"] == len(rows) + bad_lines


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
    assert first.statistics["num_users_too_short_to_test"] == 1


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
            {"min_user_interactions": 4},
            "at least 4 a user and 1 an item .method kcore.; of 5 before, the longest history had 3, the most frequent item 2",
        ),
        (
            {"min_item_interactions": 9, "method": "single_pass"},
            "at least 1 a user and 9 an item .method single_pass.; of 6 before",
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
    with pytest.raises(DataError, match="holds no usable review"):
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
