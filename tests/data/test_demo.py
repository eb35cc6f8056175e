from __future__ import annotations

import ast
import gzip
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS, Workspace
from sda_core.data.demo import ATTRIBUTES, World, file_names, world, write_shop
from sda_core.data.demo.images import HUE_SATURATION_VALUE, MOTIFS, PRODUCTS, draw_item, encoded_images
from sda_core.data.demo.latent import BLOCKS, NAMING_EXPONENTS, NUM_CIRCLES, NUM_CONSIDERED, VALUES, Attribute
from sda_core.data.demo.words import (
    CATEGORY_WORDS,
    COLOUR_WORDS,
    FILLER_LINES,
    FILLERS,
    GENERIC_NOUNS,
    OTHER_DEPARTMENT,
    SALES_PHRASES,
    SENTENCES,
    STYLE_WORDS,
    TITLES,
    USES,
    ItemWords,
    describe,
)
from sda_core.data.demo.writing import MAX_MALFORMED_SHARE, metadata_lines, review_lines
from sda_core.data.kcore import k_core
from sda_core.errors import ConfigError
from sda_core.image_store import read_images
from sda_core.params import DemoDataset
from stages.download import download
from stages.fetch_images import fetch_images
from stages.filter import filter_

ROOT = Path(__file__).resolve().parents[2]
PRESET: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "conf" / "dataset" / "demo.yaml").read_text())["dataset"]
EDITIONS = (2014, 2018, 2023)
SMALL: dict[str, Any] = {"num_users": 80, "num_items": 60, "mean_history_length": 8.0, "image_side": 24}


def preset(**changes: Any) -> DemoDataset:
    return DemoDataset.model_validate({**PRESET, **changes})


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def parsed(lines: Iterable[str], literal: bool = False) -> list[dict[str, Any]]:
    """The lines that hold a row with an item, by plain Python."""
    rows = []
    for line in lines:
        try:
            row = ast.literal_eval(line) if literal else json.loads(line)
        except (ValueError, SyntaxError):
            continue
        if isinstance(row, dict) and ("asin" in row or "parent_asin" in row):
            rows.append(row)
    return rows


def plain_reviews(rows: list[dict[str, Any]], edition: int) -> list[tuple[str, str, int, float]]:
    if edition == 2023:
        return [(row["user_id"], row["parent_asin"], row["timestamp"] // 1000, row["rating"]) for row in rows]
    return [(row["reviewerID"], row["asin"], row["unixReviewTime"], row["overall"]) for row in rows]


def references(row: dict[str, Any], edition: int) -> list[str]:
    match edition:
        case 2014:
            return [row["imUrl"]] if "imUrl" in row else []
        case 2018:
            return row.get("imageURLHighRes", row.get("image", []))
        case _:
            return [image["large"] for image in row["images"] if image["variant"] == "MAIN"]


# ------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("edition", EDITIONS)
def test_bytes_are_equal_between_runs_and_processes(edition: int, tmp_path: Path) -> None:
    dataset = preset(edition=edition, quirk_share=0.3, **SMALL)
    write_shop(dataset, tmp_path / "first")
    program = (
        "import sys, pathlib; from sda_core.params import DemoDataset, FilterParams; from sda_core.data.demo import write_shop; "
        "write_shop(DemoDataset.model_validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "17",
        "TZ": "Asia/Tokyo",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run(
        [sys.executable, "-c", program, dataset.model_dump_json(), str(tmp_path / "second")], check=True, env=environment
    )
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(file_names(dataset)) == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    write_shop(preset(edition=edition, **{**SMALL, "seed": 7}), tmp_path / "third")
    assert all((tmp_path / "first" / name).read_bytes() != (tmp_path / "third" / name).read_bytes() for name in names)


def test_names_are_those_of_the_editions() -> None:
    assert file_names(preset(edition=2014, category="Toys")) == ("reviews_Toys_5.json.gz", "meta_Toys.json.gz", "images.zip")
    assert file_names(preset(edition=2018, category="Toys")) == ("Toys_5.json.gz", "meta_Toys.json.gz", "images.zip")
    assert file_names(preset(edition=2023, category="Toys")) == ("Toys.jsonl.gz", "meta_Toys.jsonl.gz", "images.zip")


@pytest.mark.parametrize("edition", EDITIONS)
def test_gzip_carries_neither_time_nor_name(edition: int, tmp_path: Path) -> None:
    dataset = preset(edition=edition, **SMALL)
    write_shop(dataset, tmp_path)
    for name in file_names(dataset)[:2]:
        header = (tmp_path / name).read_bytes()[:10]
        assert header[3] == 0
        assert header[4:8] == b"\0\0\0\0"


def test_2014_metadata_is_literals_and_no_json(tmp_path: Path) -> None:
    dataset = preset(edition=2014, quirk_share=0.0, **SMALL)
    write_shop(dataset, tmp_path)
    reviews, metadata, _ = file_names(dataset)
    lines = lines_of(tmp_path / metadata)
    assert len(lines) == round(60 * (1 - dataset.missing_metadata_share))
    for line in lines:
        with pytest.raises(json.JSONDecodeError):
            json.loads(line)
        row = ast.literal_eval(line)
        assert {"asin", "title", "categories", "price", "description", "salesRank"} <= set(row)
        assert isinstance(row["price"], float)
        assert isinstance(row["description"], str)
        assert all(isinstance(path, list) for path in row["categories"])
    for line in lines_of(tmp_path / reviews):
        row = json.loads(line)
        assert set(row) == {
            "reviewerID", "asin", "reviewerName", "helpful", "reviewText", "overall", "summary", "unixReviewTime", "reviewTime",
        }  # fmt: skip
        assert row["unixReviewTime"] % 86_400 == 0
        assert len(row["helpful"]) == 2


def test_2018_and_2023_fields_are_those_of_the_editions(tmp_path: Path) -> None:
    for edition in (2018, 2023):
        dataset = preset(edition=edition, quirk_share=0.0, **SMALL)
        write_shop(dataset, tmp_path)
        reviews, metadata, _ = file_names(dataset)
        rows = [json.loads(line) for line in lines_of(tmp_path / metadata)]
        opinions = [json.loads(line) for line in lines_of(tmp_path / reviews)]
        if edition == 2018:
            assert all(isinstance(row["description"], list) and re.fullmatch(r"\$\d+\.\d\d", row["price"]) for row in rows)
            assert all({"also_buy", "rank", "main_cat", "feature", "category", "imageURL"} <= set(row) for row in rows)
            assert all({"verified", "reviewTime", "unixReviewTime", "overall"} <= set(row) for row in opinions)
        else:
            assert all("asin" not in row and {"store", "main_category", "details", "features"} <= set(row) for row in rows)
            assert all(10**12 < row["timestamp"] < 2 * 10**12 for row in opinions)
            assert any(row["timestamp"] % 1000 for row in opinions)
            known = {row["parent_asin"] for row in opinions}
            others = {row["asin"] for row in opinions} - known
            assert 0.1 < len(others) / len(known) < 0.5


@pytest.mark.parametrize("quirk_share", [0.0, 0.5])
def test_three_editions_tell_the_same_shop(quirk_share: float, tmp_path: Path) -> None:
    shops = {}
    for edition in EDITIONS:
        dataset = preset(edition=edition, quirk_share=quirk_share, missing_image_share=0.1, missing_metadata_share=0.1, **SMALL)
        write_shop(dataset, tmp_path / str(edition))
        reviews, metadata, images = (tmp_path / str(edition) / name for name in file_names(dataset))
        rows = parsed(lines_of(metadata), literal=edition == 2014)
        item = "parent_asin" if edition == 2023 else "asin"
        shops[edition] = (
            plain_reviews(parsed(lines_of(reviews)), edition),
            {row[item]: row.get("title") for row in rows} if quirk_share == 0.0 else sorted({row[item] for row in rows}),
            {row[item]: references(row, edition) for row in rows},
            images.read_bytes(),
        )
    assert shops[2014] == shops[2018] == shops[2023]
    truth = world(dataset)
    made, _, images, archive = shops[2018]
    told = {(user, item, seconds) for user, item, seconds, _ in made}
    assert told == {
        (truth.user_names[u], truth.asins[i], int(d) * 86_400) for u, i, d in zip(truth.user, truth.item, truth.day, strict=True)
    }
    assert (len(made) > len(told)) == (quirk_share > 0.0)
    named = {name for names in images.values() for name in names}
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert named == set(opened.namelist())
        assert len(named) == int((truth.has_image & truth.has_metadata).sum())
        for name in opened.namelist():
            image = Image.open(io.BytesIO(opened.read(name)))
            image.load()
            assert (image.mode, image.size) == ("RGB", (24, 24))


def test_every_defect_of_an_edition_appears_and_malformed_lines_stay_few() -> None:
    looks = {
        2014: (r"^(?!.*'title')", r"^(?!.*'price')", r"'brand': ''", r"&amp;", r"\\n\\n"),
        2018: (
            r'"title": "<span class=', r'"price": "\.a-section', r"&amp;", r'"rank": "', r'"image": \[',
            r'"feature": \[.*<span class=', r'"category": \[("[^"]*", ){3}',
        ),
        2023: (
            r'"price": null', r'"description": \[\]', r'"images": \[\{[^}]*"PT01"', r'"hi_res": null', r'"store": null', r"&amp;",
        ),
    }  # fmt: skip
    opinions = {
        2014: (r"^(?!.*reviewerName)", r'"reviewText": ""'),
        2018: (r'"vote": "\d', r"^(?!.*reviewText)", r"^(?!.*summary)", r'"style": \{', r'"image": \['),
        2023: (r'"text": ""', r"small_image_url", r'"verified_purchase": false'),
    }
    asins: dict[int, Counter[str]] = {}
    for edition in EDITIONS:
        whole: dict[str, Any] = {"text_completeness": 1.0, "missing_description_share": 0.0, "num_users": 300, "num_items": 400}
        clean, dirty = (preset(edition=edition, quirk_share=share, **whole) for share in (0.0, 1.0))
        shop = world(clean)
        for lines, patterns in ((metadata_lines, looks[edition]), (review_lines, opinions[edition])):
            before, after = list(lines(clean, shop)), list(lines(dirty, shop))
            for pattern in patterns:
                assert sum(bool(re.search(pattern, line)) for line in after) >= 3, (edition, pattern)
                if "store" not in pattern:  # a seller may leave the brand's field empty
                    assert not any(re.search(pattern, line) for line in before), (edition, pattern)
            rows = parsed(after, literal=edition == 2014 and lines is metadata_lines)
            assert 0 < len(after) - len(rows) <= 3 * MAX_MALFORMED_SHARE * len(after)
            if lines is metadata_lines:
                asins[edition] = Counter(row["parent_asin" if edition == 2023 else "asin"] for row in rows)
    assert set(asins[2014].values()) == set(asins[2023].values()) == {1}
    assert set(asins[2018].values()) == {1, 2}


def test_quirk_share_is_the_share_of_lines() -> None:
    clean, dirty = (preset(quirk_share=share, text_completeness=1.0, num_users=600, num_items=2000) for share in (0.0, 0.25))
    truth = world(clean)
    again = world(dirty)
    assert all(np.array_equal(getattr(truth, name), getattr(again, name)) for name in ("user", "item", "day", "rating"))
    before, after = (parsed(metadata_lines(dataset, truth)) for dataset in (clean, dirty))
    plain = {row["asin"]: row for row in before}
    changed = {row["asin"] for row in after if row != plain[row["asin"]]}
    twice = {asin for asin, times in Counter(row["asin"] for row in after).items() if times > 1}
    # Entities show only where there is something to escape, junk features only where there are more than two.
    assert 0.25 * 7 / 9 - 0.04 < len(changed | twice) / len(before) < 0.25 + 0.04
    extra = len(parsed(review_lines(dirty, truth))) - len(parsed(review_lines(clean, truth)))
    assert extra / len(truth.item) == pytest.approx(0.2 * 0.25, abs=0.015)


# What a defect of the edition takes away; everything else has to arrive as it was made.
LOST = {2014: {"title", "price", "brand"}, 2018: {"title", "price"}, 2023: {"price", "brand", "description"}}


def as_read(words: ItemWords, edition: int) -> dict[str, str | list[str]]:
    """The texts of an item as the ordinary reader should give them.  2014 has no field for features, and no currency."""
    features = list(words.features)
    return {
        "title": words.title,
        "brand": words.brand,
        "categories": list(words.path),
        "price": f"{'$' if edition == 2018 else ''}{words.price_cents / 100:.2f}",
        "features": [] if edition == 2014 else features,
        "description": f"{'. '.join(features)}. {words.description}".rstrip() if edition == 2014 else words.description,
    }


def pixels(encoded: Iterable[bytes]) -> np.ndarray:
    """Images as rows of numbers."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int64).reshape(-1) for data in encoded])


def ordinary_stages(dataset: DemoDataset, root: Path) -> Workspace:
    """Download, filter and images, as the pipeline runs them."""
    whole: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    whole["dataset"] = dataset.model_dump()
    whole["filter"] |= {"min_user_interactions": 1, "min_item_interactions": 1}
    root.mkdir()
    (root / "params.yaml").write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML
    for command in (download, filter_, fetch_images):
        command(root)
    return Workspace(root)


@pytest.mark.parametrize("quirk_share", [0.0, 0.3])
def test_the_ordinary_stages_find_the_same_shop_in_three_editions(quirk_share: float, tmp_path: Path) -> None:
    small = {**SMALL, "num_items": 150, "image_side": 16, "missing_image_share": 0.1, "missing_metadata_share": 0.1}
    shops = {
        edition: ordinary_stages(preset(edition=edition, quirk_share=quirk_share, **small), tmp_path / str(edition))
        for edition in EDITIONS
    }
    made = world(preset(**small))
    words = dict(zip(made.asins, describe(made, PRESET["seed"], "Demo Shop", PRESET["text_noise"]), strict=True))
    with_image = {asin for asin, has in zip(made.asins, made.has_image, strict=True) if has}
    bought = {made.asins[i] for i in made.item.tolist() if made.has_metadata[i]}
    purchases = {
        (made.user_names[u], made.asins[i], int(d) * 86_400, float(r))
        for u, i, d, r in zip(made.user, made.item, made.day, made.rating, strict=True)
        if made.has_metadata[i]
    }
    first_interactions, first_users = INTERACTIONS.read(shops[2014].interactions), USERS.read(shops[2014].users)
    first_images = pl.concat(read_images(shops[2014].images))
    for edition, workspace in shops.items():
        interactions, users, items = (
            INTERACTIONS.read(workspace.interactions),
            USERS.read(workspace.users),
            ITEMS.read(workspace.items),
        )
        # 2023 alone knows the order of a day's purchases; in the others it is random, the same in both.
        assert interactions.equals(first_interactions) or edition == 2023, edition
        assert users.equals(first_users), edition
        told = interactions.join(users, on="user_id").join(items, on="item_id")
        rows = told.select("raw_user_id", "raw_item_id", "timestamp", "rating").rows()
        assert {row[:3] for row in rows} == {row[:3] for row in purchases}
        assert len(rows) == len(purchases)
        # Of a review and its repetition, which have one time, either may stay.
        assert len(set(rows) - purchases) <= (0.0 if quirk_share == 0.0 else 0.1) * len(rows)
        if edition == 2023:
            bought_in_order = [(made.user_names[u], made.asins[i]) for u, i in zip(made.user, made.item, strict=True)]
            place = {pair: position for position, pair in enumerate(bought_in_order)}
            for _, history in told.group_by("user_id", maintain_order=True):
                places = [place[pair] for pair in history.select("raw_user_id", "raw_item_id").rows()]
                assert places == sorted(places)
        statistics = json.loads(workspace.statistics.read_text(encoding="utf-8"))
        for name in ("rows_bad", "rows_dropped_duplicate"):
            assert (statistics[name] > 0) == (quirk_share > 0.0), (edition, name)

        assert items["raw_item_id"].to_list() == sorted(bought)
        lost: Counter[str] = Counter()
        long_categories = 0
        for item in items.to_dicts():
            asin = item["raw_item_id"]
            for field, expected in as_read(words[asin], edition).items():
                got = item[field]
                if got == expected:
                    continue
                assert quirk_share > 0.0, (edition, asin, field, got)
                if edition == 2018 and field == "categories":  # feature lines behind the path, as the edition has them
                    assert got == [*words[asin].path, *words[asin].features[2:]]
                    long_categories += 1
                else:
                    assert field in LOST[edition], (edition, asin, field, got)
                    assert got == "", (edition, asin, field, got)
                    lost[field] += 1
            # Of 2023 an archive has the first image only; what else the metadata names comes after it.
            assert item["image_references"][:1] == ([f"images/{asin}.jpg"] if asin in with_image else []), (edition, asin)
        if quirk_share > 0.0 and edition == 2018:  # where a junk line comes first, the title is that of the whole line
            lines = parsed(lines_of(workspace.raw / "meta_Demo_Shop.json.gz"))
            names = {True: set[str](), False: set[str]()}
            for line in lines:
                names[line["title"].startswith("<span")].add(line["asin"])
            both = names[True] & names[False] & bought
            assert both
            assert all(items.filter(pl.col("raw_item_id").is_in(both))["title"] != "")
        if quirk_share > 0.0:
            assert set(lost) == LOST[edition]
            assert max(lost.values()) < 0.15 * len(items)
            assert (long_categories > 0) == (edition == 2018)

        images = pl.concat(read_images(workspace.images))
        assert images.equals(first_images), edition
        assert dict(images.select("raw_item_id", "status").iter_rows()) == {
            asin: "ok" if asin in with_image else "missing_url" for asin in bought
        }
        shown = images.filter(pl.col("status") == "ok")
        with zipfile.ZipFile(workspace.raw / "images.zip") as archive:
            drawn = pixels(archive.read(f"images/{asin}.jpg") for asin in shown["raw_item_id"])
        nearest = [int(np.abs(drawn - kept).mean(axis=1).argmin()) for kept in pixels(shown["image"])]
        assert nearest == list(range(len(shown)))  # each item has its own image, encoded once more


# -------------------------------------------------------------------------------------------- the world
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_users=st.integers(20, 200),
    num_items=st.integers(20, 300),
    length=st.floats(5.0, 10.0),
    exponent=st.floats(0.0, 3.0),
    content=st.floats(0.0, 20.0),
    sequence=st.floats(0.0, 20.0),
    shares=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    new=st.floats(0.0, 0.5),
)
def test_world_is_sound(
    seed: int,
    num_users: int,
    num_items: int,
    length: float,
    exponent: float,
    content: float,
    sequence: float,
    shares: tuple[float, float],
    new: float,
) -> None:
    image = shares[0]
    dataset = preset(
        seed=seed,
        num_users=num_users,
        num_items=num_items,
        mean_history_length=length,
        popularity_exponent=exponent,
        content_strength=content,
        sequence_strength=sequence,
        image_share=image,
        text_share=shares[1] * (1.0 - image),
        new_item_share=new,
    )
    shop = world(dataset)
    assert len(set(shop.asins)) == shop.num_items == num_items
    assert len(set(shop.user_names)) == shop.num_users == num_users
    assert all(re.fullmatch(r"B0[0-9A-Z]{8}", asin) for asin in shop.asins)
    assert all(re.fullmatch(r"A[0-9A-Z]{13}", name) for name in shop.user_names)
    assert np.array_equal(np.unique(shop.user), np.arange(num_users))
    assert shop.item.min() >= 0
    assert shop.item.max() < num_items
    pairs = shop.user.astype(np.int64) * num_items + shop.item
    assert len(np.unique(pairs)) == len(pairs)
    within = shop.user[1:] == shop.user[:-1]
    assert (np.diff(shop.day)[within] >= 0).all()
    assert shop.day.min() * 86_400 >= 1_230_768_000  # 2009-01-01
    assert shop.day.max() * 86_400 < 1_406_073_600  # 2014-07-23, where the oldest edition ends
    assert (shop.day >= shop.arrival[shop.item]).all()  # nobody buys what is not there yet
    assert (shop.arrival > shop.arrival.min()).sum() <= round(new * num_items)
    assert set(shop.rating.tolist()) <= {1, 2, 3, 4, 5}
    assert np.bincount(shop.user).min() >= 3
    for name in ATTRIBUTES:
        assert shop.attributes[name].max() < len(VALUES[name])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_same_day_share_is_the_share_of_purchases_on_the_day_of_the_one_before(share: float) -> None:
    shop = world(preset(same_day_share=share, num_users=600, num_items=300, new_item_share=0.0))
    within = shop.user[1:] == shop.user[:-1]
    same = (np.diff(shop.day) == 0)[within]
    assert same.mean() == pytest.approx(share, abs=0.0 if share in (0.0, 1.0) else 0.03)
    never = world(preset(same_day_share=0.0, num_users=600, num_items=300, new_item_share=0.0))
    assert np.array_equal(shop.item, never.item)  # only days change, and with them which new items are there already


def test_the_published_order_of_the_lines_gives_away_the_item_ids() -> None:
    """As in the real files of 2014 and 2018: within a day a stable sort by time gives ascending ids."""
    dataset = preset(edition=2018, quirk_share=0.0, **SMALL)
    rows = parsed(review_lines(dataset, world(dataset)))
    assert [row["asin"] for row in rows] == sorted(row["asin"] for row in rows)
    histories: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["unixReviewTime"]):
        histories.setdefault(row["reviewerID"], []).append(row)
    pairs = [pair for history in histories.values() for pair in pairwise(history)]
    tied = [(first, second) for first, second in pairs if first["unixReviewTime"] == second["unixReviewTime"]]
    assert len(tied) > 0.1 * len(pairs)
    assert all(first["asin"] < second["asin"] for first, second in tied)


def test_one_seed_one_world_and_edition_has_no_part_in_it() -> None:
    one, two = world(preset(edition=2014)), world(preset(edition=2023))
    assert one.asins == two.asins
    assert np.array_equal(one.item, two.item)
    assert np.array_equal(one.rating, two.rating)
    assert not np.array_equal(one.item[:500], world(preset(seed=1)).item[:500])


def test_preset_has_a_long_tail_and_targets_to_say_something_about_it() -> None:
    """After the preset's own filter: users of five purchases or more, items of one or more."""
    shop = world(preset())
    section = YAML(typ="safe", pure=True).load((ROOT / "conf" / "dataset" / "demo.yaml").read_text())["filter"]
    known = shop.has_metadata[shop.item]
    table = pl.DataFrame({"user_id": shop.user[known], "item_id": shop.item[known]})
    core = k_core(table, min_user=section["min_user_interactions"], min_item=section["min_item_interactions"])
    assert core["user_id"].n_unique() >= 0.9 * shop.num_users
    assert core["item_id"].n_unique() >= 0.8 * shop.num_items
    counts = np.sort(core["item_id"].value_counts()["count"].to_numpy())
    assert counts[: int(0.8 * len(counts))].sum() < 0.45 * counts.sum()  # the Beauty 5-core of 2014, without its tail, has 0.49
    assert counts[-1] > 10 * np.median(counts)
    assert np.bincount(shop.user).mean() == pytest.approx(PRESET["mean_history_length"], rel=0.03)
    assert (np.bincount(shop.user) < 5).mean() == pytest.approx(0.03, abs=0.015)
    place = pl.int_range(pl.len()).over("user_id")  # the generator's order is that of time
    core = core.with_columns(left=pl.len().over("user_id") - place)
    trained = core.filter(pl.col("left") > 2).group_by("item_id").len("trained")
    targets = core.filter(pl.col("left") == 1).join(trained, on="item_id", how="left")["trained"].fill_null(0)
    assert (targets < 4).sum() >= 300  # tail
    assert (targets == 0).sum() >= 50  # cold


@pytest.mark.parametrize("num_items", [300, NUM_CONSIDERED + 500])
def test_first_choices_follow_the_zipf_law(num_items: int) -> None:
    """Oracle: with neither content nor sequence a first choice is a draw from the popularity, however large the shop."""
    shop = world(
        preset(
            num_users=10_000,
            num_items=num_items,
            mean_history_length=5.0,
            popularity_exponent=1.0,
            content_strength=0.0,
            new_item_share=0.0,
        )
    )
    first = shop.item[np.r_[True, shop.user[1:] != shop.user[:-1]]]
    law = 1.0 / np.arange(1, num_items + 1)
    law /= law.sum()
    order = np.argsort(-shop.log_popularity)
    seen = np.bincount(first, minlength=num_items)[order] / len(first)
    error = np.sqrt(law * (1.0 - law) / len(first))
    assert (np.abs(seen - law)[:30] < 4.5 * error[:30]).all()
    assert abs(seen[num_items // 2 :].sum() - law[num_items // 2 :].sum()) < 0.01


def test_popularity_exponent_makes_the_tail() -> None:
    shares = []
    for exponent in (0.0, 0.5, 1.0, 1.5):
        shop = world(preset(num_items=1000, popularity_exponent=exponent, content_strength=0.0, new_item_share=0.0))
        counts = np.sort(np.bincount(shop.item, minlength=600))[::-1]
        shares.append(counts[:60].sum() / counts.sum())
    assert shares == sorted(shares)
    assert shares[0] < 0.17
    assert shares[-1] > 0.6


# ------------------------------------------------------------------------- what the knobs turn: true attributes
def match_lift(shop: World, attribute: str) -> float:
    """How much more often a user's last item has the value of one of their earlier items than a stranger's last item has.

    The stranger's item is one that the user has not bought: equally popular on average, so 1 means no taste.
    """
    values = shop.attributes[attribute]
    ends = np.flatnonzero(np.r_[shop.user[1:] != shop.user[:-1], True])
    earlier = np.ones(len(shop.item), dtype=bool)
    earlier[ends] = False
    counts = np.zeros((shop.num_users, len(VALUES[attribute])))  # of the values among each user's earlier items
    np.add.at(counts, (shop.user[earlier], values[shop.item[earlier]]), 1.0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    user = np.arange(shop.num_users)
    bought = shop.user.astype(np.int64) * shop.num_items + shop.item
    draw = np.random.default_rng(0)
    others: list[np.ndarray] = []
    for _ in range(20):
        stranger = shop.item[ends][draw.permutation(shop.num_users)]
        new = ~np.isin(user * shop.num_items + stranger, bought)
        others.append(shares[user[new], values[stranger[new]]])
    return float(shares[user, values[shop.item[ends]]].mean() / np.concatenate(others).mean())


# Many items and a flat tail: in a small shop a few popular items tie unrelated attributes together.
# The strengths are those at which the bounds below were set; what the preset has is chosen for other reasons.
LARGE: dict[str, Any] = {
    "num_users": 2500, "num_items": 800, "mean_history_length": 12.0, "popularity_exponent": 0.4, "new_item_share": 0.0,
    "content_strength": 2.0, "sequence_strength": 1.0, "image_share": 0.3, "text_share": 0.3,
}  # fmt: skip


def lifts(**changes: Any) -> dict[str, float]:
    shop = world(preset(**{**LARGE, **changes}))
    return {name: match_lift(shop, name) for name in ATTRIBUTES}


def test_content_strength_and_shares_turn_taste() -> None:
    both = lifts()
    assert all(lift > 1.15 for lift in both.values()), both
    none = lifts(content_strength=0.0)
    assert all(abs(lift - 1.0) < 0.05 for lift in none.values()), none
    weak = lifts(content_strength=0.7)
    assert all(1.0 < weak[name] < both[name] for name in ATTRIBUTES), (weak, both)


@pytest.mark.parametrize(
    ("image_share", "text_share", "silent"),
    [
        (0.0, 0.5, ("image",)),
        (0.5, 0.0, ("words",)),
        (0.5, 0.5, ("both",)),
        (1.0, 0.0, ("words", "both")),
        (0.0, 0.0, ("image", "words")),
    ],
)
def test_shares_silence_blocks(image_share: float, text_share: float, silent: tuple[str, ...]) -> None:
    found = lifts(image_share=image_share, text_share=text_share)
    for block, names in BLOCKS.items():
        for name in names:
            if block in silent:
                assert abs(found[name] - 1.0) < 0.08, (name, found)
            else:
                assert found[name] > 1.15, (name, found)


def follow_lift(shop: World, kind: np.ndarray, wanted: np.ndarray) -> float:
    """How much more often than by chance an item's successor is of the kind that the item calls for."""
    within = shop.user[1:] == shop.user[:-1]
    before, after = shop.item[:-1][within], shop.item[1:][within]
    chance = sum((wanted[before] == value).mean() * (kind[after] == value).mean() for value in np.unique(kind))
    return float((kind[after] == wanted[before]).mean() / chance)


def test_sequence_strength_turns_what_follows_what() -> None:
    def steps(**changes: Any) -> dict[str, float]:
        shop = world(preset(**{**LARGE, **changes}))
        category = shop.attributes["category"]
        return {
            "circle": follow_lift(shop, shop.circle, (shop.circle + 1) % NUM_CIRCLES),
            "category": follow_lift(shop, category, shop.companion[category]),
        }

    on = steps()
    assert on["circle"] > 2.0
    assert on["category"] > 2.0
    off = steps(sequence_strength=0.0)
    assert off["circle"] == pytest.approx(1.0, abs=0.05)
    assert off["category"] == pytest.approx(1.0, abs=0.1)
    control = steps(content_strength=0.0)  # ids still have something to learn, content has not
    assert control["circle"] > 2.0
    assert control["category"] == pytest.approx(1.0, abs=0.05)


FIRST_TAIL = {"popularity_exponent": 0.8}  # with it the bounds of the next test were set


def test_neighbours_by_true_attributes_find_the_next_item_only_if_content_drives_it() -> None:
    """Leave-one-out Hit@10 of content neighbours against popularity and chance, over all items not bought yet."""

    def hits(**changes: Any) -> tuple[float, float, float]:
        shop = world(
            preset(**{**LARGE, "num_users": 2000, "num_items": 1000, "mean_history_length": 9.0, **FIRST_TAIL, **changes})
        )
        ends = np.flatnonzero(np.r_[shop.user[1:] != shop.user[:-1], True])
        starts = np.r_[0, ends[:-1] + 1]
        one_hot = np.concatenate([np.eye(len(VALUES[name]))[shop.attributes[name]] for name in ATTRIBUTES], axis=1)
        train = np.ones(len(shop.item), dtype=bool)
        train[ends] = False
        popularity = np.bincount(shop.item[train], minlength=shop.num_items).astype(float)
        jitter = 1e-6 * np.random.default_rng(0).random(shop.num_items)
        content_hits = popular_hits = chance = 0.0
        for start, end in zip(starts, ends, strict=True):
            seen = shop.item[start:end]
            target = shop.item[end]
            content = one_hot @ one_hot[seen].mean(axis=0) + jitter
            for score, kind in ((content, "content"), (popularity + jitter, "popular")):
                score[seen] = -np.inf
                better = np.count_nonzero(score > score[target])
                content_hits += kind == "content" and better < 10
                popular_hits += kind == "popular" and better < 10
            chance += 10 / (shop.num_items - len(seen))
        return content_hits / len(ends), popular_hits / len(ends), chance / len(ends)

    content, popular, chance = hits()
    assert content > 2.5 * chance, (content, popular, chance)
    flat_content, flat_popular, _ = hits(popularity_exponent=0.0)
    assert flat_content > 2.0 * flat_popular, (flat_content, flat_popular)
    content, popular, chance = hits(content_strength=0.0)
    assert content < 1.35 * chance, (content, popular, chance)
    assert popular > 3.0 * chance


def test_popularity_tells_nothing_about_attributes() -> None:
    shop = world(preset(num_items=6000, num_users=20))
    for name in ATTRIBUTES:
        values = shop.attributes[name]
        means = np.array([shop.log_popularity[values == value].mean() for value in range(len(VALUES[name]))])
        errors = shop.log_popularity.std() / np.sqrt(np.bincount(values))
        assert (np.abs(means - shop.log_popularity.mean()) < 4.0 * errors).all(), name


# ------------------------------------------------------------------------- what shows where: images and words
def permuted(shop: World, names: tuple[str, ...]) -> World:
    draw = np.random.default_rng(3)
    return replace(shop, attributes={k: draw.permutation(v) if k in names else v for k, v in shop.attributes.items()})


def test_images_depend_on_what_they_show_and_on_nothing_else() -> None:
    shop = world(preset(**SMALL))
    images = dict(encoded_images(shop, 5, 24, 0.5))
    unseen = replace(
        permuted(shop, BLOCKS["words"]), circle=shop.circle[::-1].copy(), log_popularity=shop.log_popularity[::-1].copy()
    )
    assert dict(encoded_images(unseen, 5, 24, 0.5)) == images
    for name in (*BLOCKS["image"], *BLOCKS["both"]):
        other = permuted(shop, (name,))
        moved = other.attributes[name] != shop.attributes[name]
        again = dict(encoded_images(other, 5, 24, 0.5))
        for item, asin in enumerate(shop.asins):
            if asin in images:
                assert (again[asin] != images[asin]) == moved[item], (name, asin)


def test_words_depend_on_what_they_name_and_on_nothing_else() -> None:
    shop = world(preset(**SMALL))
    words = list(describe(shop, 5, "Shop", 0.1))
    unseen = replace(
        permuted(shop, BLOCKS["image"]), circle=shop.circle[::-1].copy(), log_popularity=shop.log_popularity[::-1].copy()
    )
    assert list(describe(unseen, 5, "Shop", 0.1)) == words
    for name in (*BLOCKS["words"], *BLOCKS["both"]):
        other = permuted(shop, (name,))
        moved = (other.attributes[name] != shop.attributes[name]) & shop.is_named[name]
        assert moved.any()
        changed = np.array([one != two for one, two in zip(words, describe(other, 5, "Shop", 0.1), strict=True)])
        assert np.array_equal(changed, moved), name  # what is not named stands nowhere


SYNONYMS: dict[Attribute, dict[str, tuple[str, ...]]] = {
    "category": CATEGORY_WORDS,
    "colour": COLOUR_WORDS,
    "brand": {brand: (brand,) for brand in VALUES["brand"]},
    "style": STYLE_WORDS,
}


def everything(words: ItemWords) -> str:
    """All that a listing says, in lower case."""
    return " ".join((words.title, words.brand, *words.path[1:], *words.features, words.description)).lower()


@pytest.mark.parametrize("text_noise", [0.0, 0.1, 1.0])
def test_a_reader_finds_what_a_listing_names_and_nothing_else(text_noise: float) -> None:
    """Oracle: whole words looked up in the lists of synonyms."""
    shop = world(preset(num_users=20, num_items=800))
    texts = [everything(words) for words in describe(shop, 5, "Shop", text_noise)]
    for name, values in SYNONYMS.items():
        for item, text in enumerate(texts):
            own = shop.value(name, item)
            spoken = [*values[own], *([own] if name == "category" else [])]
            found = any(re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text) for word in spoken)
            if shop.is_named[name][item]:
                assert found, (name, own, text)
            else:
                assert not found, (name, own, text)


def test_each_attribute_is_named_with_a_chance_of_its_own() -> None:
    before = None
    for completeness in (0.0, 0.3, 0.6, 1.0):
        shop = world(preset(num_users=20, num_items=6000, text_completeness=completeness))
        for name, exponent in NAMING_EXPONENTS.items():
            chance = completeness**exponent
            assert shop.is_named[name].mean() == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 6000) + 1e-9)
            if before is not None:
                assert not (before.is_named[name] & ~shop.is_named[name]).any()  # a more complete shop only adds
                assert np.array_equal(before.item, shop.item)
        assert not any(shop.is_named[name].any() for name in BLOCKS["image"])
        before = shop


def test_nothing_but_listings_depends_on_how_they_are_written() -> None:
    one = world(preset(**SMALL))
    two = world(preset(**SMALL, text_completeness=0.1, text_noise=0.9, image_clutter=1.0, missing_description_share=0.9))
    for name in ("user", "item", "day", "rating", "circle", "arrival", "has_image", "has_metadata"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert all(np.array_equal(one.attributes[name], two.attributes[name]) for name in ATTRIBUTES)


def test_the_shop_shares_nothing_with_the_pre_training() -> None:
    """Neither code nor phrases: what nano was trained on must not be what the shop is written in."""
    files = sorted((ROOT / "pretraining").glob("*"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in {".py", ".yaml", ".md"}}
    assert sources
    assert not [name for name, source in sources.items() if "sda_core.data.demo" in source]
    assert not [path for path in (ROOT / "sda_core" / "data" / "demo").glob("*.py") if "pretraining" in path.read_text()]
    sentences = [sentence for templates in SENTENCES.values() for sentence in templates]
    phrases = [*FILLER_LINES, *sentences, *(" ".join(parts) for parts in TITLES), *VALUES["brand"]]
    text = " ".join(" ".join(sources.values()).lower().split())
    assert not [phrase for phrase in phrases if phrase.lower() in text]


def test_no_word_of_the_shop_names_a_pattern_or_a_shape() -> None:
    sentences = [sentence for templates in SENTENCES.values() for sentence in templates]
    parts = [part for title in TITLES for part in title]
    texts = [*FILLERS, *FILLER_LINES, *SALES_PHRASES, *GENERIC_NOUNS, *USES, OTHER_DEPARTMENT, *sentences, *parts]
    texts += [*VALUES["brand"], *CATEGORY_WORDS]
    for table in (CATEGORY_WORDS, COLOUR_WORDS, STYLE_WORDS):
        texts += [word for synonyms in table.values() for word in synonyms]
        every = [word for synonyms in table.values() for word in synonyms]
        assert len(every) == len(set(every))
    spoken = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    hidden = {
        *VALUES["pattern"],
        *VALUES["shape"],
        "round",
        "circle",
        "striped",
        "stripe",
        "dotted",
        "dot",
        "spotted",
        "check",
        "checked",
    }
    assert not spoken & hidden


def test_vocabularies_cover_all_values() -> None:
    assert set(PRODUCTS) == set(VALUES["category"]) == set(CATEGORY_WORDS)
    assert set(MOTIFS) == set(VALUES["shape"])
    assert set(HUE_SATURATION_VALUE) == set(VALUES["colour"]) == set(COLOUR_WORDS)
    assert set(STYLE_WORDS) == set(VALUES["style"])


def test_images_are_all_different_even_of_equal_items() -> None:
    shop = world(preset(**SMALL))
    twins = replace(shop, attributes={name: np.zeros_like(values) for name, values in shop.attributes.items()})
    images = np.stack([np.asarray(draw_item(twins, item, 5, 32, 0.0), dtype=np.int16) for item in range(40)])
    apart = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
    assert (apart + 100 * np.eye(40)).min() > 3.0  # of 255, on average over the pixels


def pixel_features(image: Image.Image) -> np.ndarray:
    """Colourfulness by hue, and histograms of edge directions on an 8 x 8 grid."""
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), dtype=np.float64) / 255.0, -1, 0)
    inner = slice(len(hue) // 5, -len(hue) // 5)
    weight = np.where(saturation > 0.3, 1.0, 0.0)[inner, inner]
    hues = np.histogram(hue[inner, inner], bins=24, range=(0, 1), weights=weight)[0] / weight.size
    tones = np.histogram(value[inner, inner], bins=8, range=(0, 1), weights=weight)[0] / weight.size
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = ((np.arctan2(down, right) % np.pi) / np.pi * 6).astype(int) % 6
    side = len(grey) // 8
    cells = np.stack([np.where(direction == d, strength, 0.0) for d in range(6)], axis=-1)
    cells = cells[: 8 * side, : 8 * side].reshape(8, side, 8, side, 6).sum(axis=(1, 3))
    return np.concatenate([hues, tones, np.sqrt(cells).ravel() / 60.0])


def accuracy(features: Any, values: np.ndarray, scale: bool) -> float:
    num_train = int(0.75 * len(values))
    reader = LogisticRegression(C=0.01 if scale else 1.0, max_iter=2000)
    model = make_pipeline(StandardScaler(), reader) if scale else reader
    model.fit(features[:num_train], values[:num_train])
    return float(model.score(features[num_train:], values[num_train:]))


@pytest.mark.parametrize("clutter", [0.0, PRESET["image_clutter"]])
def test_pixels_tell_their_attributes_and_not_those_of_the_words(clutter: float) -> None:
    shop = world(preset(num_users=20, num_items=1200))
    features = np.stack([pixel_features(draw_item(shop, item, 5, 48, clutter)) for item in range(shop.num_items)])
    num_test = shop.num_items - int(0.75 * shop.num_items)
    found = {name: accuracy(features, shop.attributes[name], scale=True) * len(VALUES[name]) for name in ATTRIBUTES}
    for name in (*BLOCKS["image"], *BLOCKS["both"]):
        assert found[name] > 2.0, found  # times chance, by a plain linear reader of 48 x 48 pixels
    for name in BLOCKS["words"]:
        share = 1.0 / len(VALUES[name])
        assert found[name] < 1.0 + 4.0 * np.sqrt(share * (1.0 - share) / num_test) / share, found


@pytest.mark.parametrize("text_noise", [0.0, 0.1, 1.0])
def test_words_tell_their_attributes_and_not_those_of_the_image(text_noise: float) -> None:
    shop = world(preset(num_users=20, num_items=1600, text_completeness=1.0, missing_description_share=0.0))
    texts = list(describe(shop, 5, "Shop", text_noise))
    num_test = shop.num_items - int(0.75 * shop.num_items)
    features = CountVectorizer(ngram_range=(1, 1)).fit_transform([everything(words) for words in texts])
    found = {name: accuracy(features, shop.attributes[name], scale=False) for name in ATTRIBUTES}
    for name in (*BLOCKS["words"], *BLOCKS["both"]):
        assert found[name] > 0.95, found  # one mention of each is never touched
    for name in BLOCKS["image"]:
        share = 1.0 / len(VALUES[name])
        assert found[name] < share + 4.0 * np.sqrt(share * (1.0 - share) / num_test), found


def test_text_noise_takes_words_away_from_titles_and_descriptions_alone() -> None:
    shop = world(preset(num_users=20, num_items=800))
    clean = list(describe(shop, 5, "Shop", 0.0))
    lengths = []
    for noise in (0.0, 0.1, 0.5, 1.0):
        noisy = list(describe(shop, 5, "Shop", noise))
        assert all(words.title for words in noisy)
        lengths.append(sum(len(words.title.split()) for words in noisy))
        assert [bool(words.description) for words in noisy] == shop.has_description.tolist()
        for name in ("brand", "path", "features"):
            assert [getattr(words, name) for words in noisy] == [getattr(words, name) for words in clean], (noise, name)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[1] == pytest.approx(lengths[0] * (1.0 - 0.1 / 3.0), rel=0.03)  # of the words that noise may touch a third goes


def test_missing_shares_are_exact() -> None:
    shop = world(preset(num_items=600, missing_image_share=0.25, missing_metadata_share=0.1, missing_description_share=0.2))
    assert (~shop.has_image).sum() == 150
    assert (~shop.has_metadata).sum() == 60
    assert (~shop.has_description).sum() == 120
    assert sum(not words.description for words in describe(shop, 5, "Shop", 0.1)) == 120
    full = world(preset(num_items=600, missing_image_share=0.0, missing_metadata_share=0.0))
    assert full.has_image.all()
    assert full.has_metadata.all()
    assert np.array_equal(full.item, shop.item)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 20, "mean_history_length": 11.0}, "dataset.mean_history_length: should be at most half of num_items"),
        ({"content_strength": 1e30}, "dataset.content_strength: should be at most 1000"),
        ({"sequence_strength": float("inf")}, "dataset.sequence_strength: should be at most 1000"),
        ({"popularity_exponent": float("nan")}, "dataset.popularity_exponent"),
    ],
)
def test_impossible_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    dataset = preset().model_copy(update=changes)  # not validated: NaN would not pass
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        world(dataset)
    assert "\n" not in str(caught.value)
