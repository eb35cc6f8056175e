"""The data section: counts that the real filter writes, sums that hold, a curve that can be checked by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, write_json
from sda_core.data.demo import file_names, write_shop
from sda_core.data.filtering import FilteredData, filter_dataset
from sda_core.errors import ArtifactError
from sda_core.image_store import STATUSES, coverage_path
from sda_core.params import DemoDataset, FilterParams, load_params
from sda_core.report.coverage import data_coverage, long_tail
from sda_core.report.model import DataCoverage

ROOT = Path(__file__).resolve().parents[2]
PARAMS = load_params(ROOT / "params.yaml")


def rules(**changes: Any) -> FilterParams:
    return FilterParams.model_validate({**PARAMS.filter.model_dump(), **changes})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Raw files of a small built-in shop with many defects."""
    assert isinstance(PARAMS.dataset, DemoDataset)
    small = {"num_users": 120, "num_items": 80, "mean_history_length": 8.0, "image_side": 16, "quirk_share": 0.3}
    gaps = {"missing_metadata_share": 0.1, "missing_image_share": 0.2}
    dataset = DemoDataset.model_validate({**PARAMS.dataset.model_dump(), **small, **gaps})
    folder = tmp_path_factory.mktemp("raw")
    write_shop(dataset, folder)
    reviews, metadata, _ = file_names(dataset)
    return folder / reviews, folder / metadata, dataset.edition


def filtered(raw: tuple[Path, Path, int], section: FilterParams, root: Path) -> tuple[Workspace, FilteredData]:
    """What the filter and the image stage leave; every tenth image of the latter has another status."""
    workspace, data = Workspace(root), filter_dataset(*raw, section)
    INTERACTIONS.write(data.interactions, workspace.interactions)
    ITEMS.write(data.items, workspace.items)
    write_json(workspace.statistics, data.statistics)
    num_items = len(data.items)
    counts = {f"num_{status}": num_items // 10 for status in STATUSES if status != "ok"}
    counts |= {"num_unsupported_heic": counts["num_unsupported"], "num_folder_no_item": 3, "num_folder_no_image": 1}
    num_ok = num_items - sum(counts[f"num_{status}"] for status in STATUSES if status != "ok")
    write_json(
        coverage_path(workspace.images), {"num_items": num_items, "num_ok": num_ok, "share_ok": num_ok / num_items, **counts}
    )
    return workspace, data


def covered(workspace: Workspace, section: FilterParams) -> DataCoverage:
    train = INTERACTIONS.read(workspace.interactions).filter(pl.col("split") == "train")
    return data_coverage(workspace, section, dict(train["item_id"].value_counts().iter_rows()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "single_pass", "duplicates": "last", "min_rating": 2.0},
        {"items_without_image": "drop", "min_user_interactions": 3, "min_item_interactions": 1},
        {"split": "global_time", "valid_from": 0.7, "test_from": 0.85},
    ],
    ids=["preset", "single_pass", "drop_no_image", "global_time"],
)
def test_what_the_filter_writes_adds_up(raw: tuple[Path, Path, int], tmp_path: Path, changes: dict[str, Any]) -> None:
    section = rules(**changes)
    workspace, data = filtered(raw, section, tmp_path)
    found = covered(workspace, section)
    table, written = data.interactions, data.statistics
    assert found.rows_read == sum(drop.value for drop in found.drops) + len(table)
    assert {drop.name: drop.value for drop in found.drops} == {
        name: value for name, value in written.items() if name == "rows_bad" or name.startswith("rows_dropped_")
    }
    assert (found.num_users, found.num_items) == (table["user_id"].n_unique(), len(data.items))
    assert (found.first_time, found.last_time) == (table["timestamp"].min(), table["timestamp"].max())
    assert [split.value for split in found.splits[:3]] == [(table["split"] == s).sum() for s in ("train", "valid", "test")]
    assert sum(split.value for split in found.splits) == len(table)
    assert found.num_users_without_target == found.num_users - (table["split"] == "test").sum()
    assert [share.value for share in found.ties] == [
        written[f"share_tied_{name}"] for name in ("pairs", "valid_targets", "test_targets")
    ]
    assert 0.05 < found.ties[0].value < 0.5  # the built-in shop has purchases of one day
    assert found.ties_policy == section.ties
    lengths = table["user_id"].value_counts()["count"]
    assert (found.history_lengths.minimum, found.history_lengths.maximum) == (lengths.min(), lengths.max())
    assert found.history_lengths.p50 == lengths.median()
    assert found.item_counts.mean == pytest.approx(len(table) / len(data.items))
    shares = {text.label: text.value for text in found.texts}
    assert shares["Title"] == pytest.approx((data.items["title"] != "").mean())
    assert shares["Address of an image"] == pytest.approx((data.items["image_references"].list.len() > 0).mean())
    assert len(shares) == 8
    assert sum(image.value for image in found.images) == len(data.items)
    assert found.num_images_to_retry == 2 * (len(data.items) // 10)
    assert [(number.label, number.value) for number in found.unsupported_formats] == [("heic", len(data.items) // 10)]
    assert [(number.name, number.value) for number in found.unused_files] == [
        ("num_folder_no_item", 3),
        ("num_folder_no_image", 1),
    ]


def test_reasons_come_in_the_order_of_the_steps(raw: tuple[Path, Path, int], tmp_path: Path) -> None:
    names: dict[str, list[str]] = {}
    for method in ("kcore", "single_pass"):
        section = rules(method=method, min_user_interactions=4, min_item_interactions=3, duplicates="keep")
        drops = covered(filtered(raw, section, tmp_path / method)[0], section).drops
        names[method] = [drop.name.removeprefix("rows_dropped_") for drop in drops]
        labels = {drop.name: drop.label for drop in drops}
        assert labels["rows_dropped_core"] == "User below 4 or item below 3 interactions"
        assert "all are kept" in labels["rows_dropped_duplicate"]
    assert names["kcore"] == ["rows_bad", "rating", "duplicate", "core", "no_metadata", "no_image"]
    assert names["single_pass"] == ["rows_bad", "rating", "core", "duplicate", "no_metadata", "no_image"]


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("statistics", "rows_bad", 999_999, "rows_read is .* but its parts add up to"),
        ("statistics", "num_rest", 7, "num_interactions is .* but its parts add up to"),
        ("statistics", "density", None, "should hold a number 'density' .got None"),
        ("statistics", "density", True, "should hold a number 'density' .got True"),
        ("statistics", "num_users", 1.5, "'num_users' should be a count .got 1.5"),
        ("statistics", "rows_repaired", -1, "'rows_repaired' should be a count .got -1"),
        ("statistics", "rows_dropped_weather", 0, "reasons unknown here: rows_dropped_weather"),
        ("statistics", "times_in_seconds", 3, "rows_read without rows_bad is .* but its parts add up to"),
        ("statistics", "values_dropped_price", 7, "values_dropped_price is 7, but its parts add up to"),
        ("statistics", "values_dropped_price_weather", 0, "reasons unknown here: values_dropped_price_weather"),
        ("statistics", "values_used_title", -1, "'values_used_title' should be a count"),
        ("images", "num_timeout", 0, "num_items is .* but its parts add up to"),
        ("images", "num_corrupt", "3", "should hold a number 'num_corrupt'"),
        ("images", "num_unsupported_heic", 99, "num_unsupported is .* but its parts add up to"),
    ],
)
def test_counts_that_are_wrong_are_one_line(
    raw: tuple[Path, Path, int], tmp_path: Path, where: str, name: str, value: object, message: str
) -> None:
    workspace, _ = filtered(raw, PARAMS.filter, tmp_path)
    path = workspace.statistics if where == "statistics" else workspace.image_coverage
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), name: value})
    with pytest.raises(ArtifactError, match=message) as caught:
        covered(workspace, PARAMS.filter)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    write_json(path, [1, 2])
    with pytest.raises(ArtifactError, match="should be names with numbers"):
        covered(workspace, PARAMS.filter)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        covered(workspace, PARAMS.filter)


def given_values(value: object) -> int:
    """How many values a field of a record gives: counted without the reader."""
    if isinstance(value, list | tuple):
        return sum(given_values(entry) for entry in value)
    return int(value is not None and (not isinstance(value, str) or value.strip() != ""))


def test_every_value_of_the_metadata_is_used_or_dropped_for_a_reason(tmp_path: Path) -> None:
    odd: list[Any] = ["<span class=", "n/a", True, "Red mug", 12, None, "", " ", "var x = 1; getTime()"]
    prices: list[Any] = ["12,50 kr", "soon", 0, "-3 €", True, None, 9.5, "<b>", "--"]
    links: list[Any] = [
        "https://h/a.jpg",
        "data:x",
        "ftp://h/a",
        "/etc/passwd",
        5,
        None,
        "https://h",
        "a\x00b",
        "http://h/no-img-1.gif",
    ]
    items = [
        {
            "parent_asin": f"i{place}", "title": odd[place], "store": odd[place - 1], "price": prices[place],
            "categories": [odd[place - 2], "Mugs"], "features": odd[: place + 1], "description": odd[place:],
            "images": [links[place], *links[:place]],
        }
        for place in range(len(odd))
    ]  # fmt: skip
    rows = [
        {"user_id": f"u{user}", "parent_asin": f"i{item}", "rating": 5, "timestamp": 1_700_000_000_000 + item}
        for user in range(3)
        for item in range(len(items))
    ]
    for name, records in (("r", rows), ("m", items)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    section = rules(items_without_metadata="keep", min_user_interactions=1, min_item_interactions=1)
    workspace, data = filtered((tmp_path / "r", tmp_path / "m", 2023), section, tmp_path)
    found = {field.name: field for field in covered(workspace, section).values}
    names = {"brand": "store", "image_references": "images"}
    for name, field in found.items():
        given_by_items = sum(given_values(item[names.get(name, name)]) for item in items)
        assert field.num_used + field.num_dropped == given_by_items, name
        assert field.num_dropped == sum(reason.value for reason in field.reasons) > 0, name
        assert data.statistics[f"values_dropped_{name}"] == field.num_dropped
    reasons = {reason.name for field in found.values() for reason in field.reasons if reason.value}
    assert {
        "values_dropped_title_markup",
        "values_dropped_price_not_positive",
        "values_dropped_image_references_scheme",
    } <= reasons
    # the items' table holds what counts as used
    assert (data.items["price"] != "").sum() == found["price"].num_used
    assert (data.items["title"] != "").sum() == found["title"].num_used
    assert data.items["categories"].list.len().sum() == found["categories"].num_used


def test_long_tail_by_hand() -> None:
    points = dict(long_tail({7: 1, 3: 6, 9: 2, 4: 1}, 10))  # six of the ten items were never bought
    assert points == {0.0: 0.0, **{n / 10: held for n, held in enumerate((0.6, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 1)}}
    assert long_tail({}, 5) == ()
    even = long_tail(dict.fromkeys(range(1, 1001), 3), 1000)
    assert all(y == pytest.approx(x) for x, y in even)
    assert 30 <= len(even) <= 60
    assert {0.01, 0.1, 0.2, 0.5} <= {x for x, _ in even}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=300), st.integers(0, 300))
def test_long_tail_rises_ever_less_from_nothing_to_all(counts: list[int], num_unsold: int) -> None:
    points = long_tail(dict(enumerate(counts, start=1)), len(counts) + num_unsold)
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    steps = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(points)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(steps))
    assert steps[-1] >= 0.0
