"""From raw files to metrics with either split: what happens in the test period reaches no model."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace, write_json
from sda_core.recommenders import load
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.filter import filter_
from stages.train_recommender import train_recommender

NUM_USERS, NUM_ITEMS = 16, 12
VALID_FROM, TEST_FROM = "2014-02-01", "2014-03-01"
GLOBAL_TIME = {"split": "global_time", "valid_from": VALID_FROM, "test_from": TEST_FROM}
SPLITS = {"leave_one_out": {"split": "leave_one_out", "valid_from": None, "test_from": None}, "global_time": GLOBAL_TIME}


def at(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())


def histories() -> list[tuple[str, str, int]]:
    """Users with rows before both cuts, between them, after them; each item is bought in January by somebody."""
    rows = []
    for user in range(NUM_USERS):
        # Every fourth user begins in February, every fifth buys nothing then, every seventh nothing in March.
        january = range(0 if user % 4 == 3 else 5)
        february = range(0 if user % 5 == 4 else 2)
        march = range(0 if user % 7 == 6 else 2)
        for begin, places, offset in (("2014-01-01", january, 0), (VALID_FROM, february, 5), (TEST_FROM, march, 7)):
            rows += [(f"u{user:02d}", f"i{(user + place + offset) % NUM_ITEMS:02d}", at(begin) + place) for place in places]
    return rows


@pytest.fixture
def workspace(tmp_path: Path, repository: Path, request: pytest.FixtureRequest) -> Workspace:
    """A project folder after the stage filter, with the split of the test's parameter."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["filter"] |= SPLITS[request.param] | {
        "min_user_interactions": 1, "min_item_interactions": 1, "duplicates": "keep", "ties": "random", "ties_seed": 1,
        "time_resolution_seconds": 0, "items_without_metadata": "keep",
    }  # fmt: skip
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 2}
    params["evaluate"]["bootstrap_samples"] = 0
    for name in ("sasrec", "vbpr"):
        params["train_recommender"][name] |= {"max_epochs": 2, "eval_every": 1}
    YAML(typ="safe", pure=True).dump(params, tmp_path / "params.yaml")

    # One more row for every second user, the very last: an item that nobody has before.
    rows = histories() + [(f"u{user:02d}", "planted", at(TEST_FROM) + 50) for user in range(0, NUM_USERS, 2)]
    raw = Workspace(tmp_path).raw
    raw.mkdir(parents=True)
    lines = [json.dumps({"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": time}) for u, i, time in rows]
    (raw / "r.json").write_text("\n".join(lines))
    (raw / "m.json").write_text('{"asin": "i00", "title": "thing"}')
    entries = [
        {"role": role, "name": name, "source": name, "bytes": (raw / name).stat().st_size, "sha256": "0" * 64, "etag": None}
        for role, name in (("reviews", "r.json"), ("metadata", "m.json"))
    ]
    write_json(raw / "manifest.json", {"files": entries})
    filter_(tmp_path)
    export_embeddings("id", tmp_path)
    return Workspace(tmp_path)


BOTH_SPLITS = pytest.mark.parametrize("workspace", SPLITS, indirect=True)


@BOTH_SPLITS
def test_a_planted_test_item_is_never_counted(workspace: Workspace) -> None:
    interactions = INTERACTIONS.read(workspace.interactions)
    ids = dict(ITEMS.read(workspace.items).select("raw_item_id", "item_id").iter_rows())
    parts = set(interactions.filter(pl.col("item_id") == ids["planted"])["split"])
    assert parts <= {"test", "test_rest"}
    train_recommender("id", "pop", workspace.root)
    counts = load(workspace.model("id", "pop", 0), None, "cpu").counts_I.tolist()
    train = interactions.filter(pl.col("split") == "train")
    assert counts == [0, *((train["item_id"] == item).sum() for item in range(1, len(ids) + 1))]
    assert counts[ids["planted"]] == 0
    evaluate("id", "pop", workspace.root)
    positions = SEED_POSITIONS.read(workspace.positions("id", "pop"))
    test = interactions.filter(pl.col("split") == "test").sort("user_id")
    assert positions["target_item_id"].to_list() == test["item_id"].to_list()
    # Candidates are all items but what the user had before: the validation period is known by then, the test is not.
    known = interactions.filter(pl.col("split").is_in(["train", "valid", "valid_rest"]))
    for user, target, candidates in positions.select("user_id", "target_item_id", "candidates").iter_rows():
        seen = set(known.filter(pl.col("user_id") == user)["item_id"]) - {target}
        assert candidates == len(ids) - len(seen)


@BOTH_SPLITS
@pytest.mark.parametrize("recommender", ["sasrec", "vbpr"])
def test_other_test_rows_give_the_same_model(workspace: Workspace, recommender: str) -> None:
    def trained() -> tuple[bytes, str]:
        train_recommender("id", recommender, workspace.root)
        folder = workspace.model("id", recommender, 1)
        return (folder / "model.safetensors").read_bytes(), (folder / "history.tsv").read_text()

    once = trained()
    evaluate("id", recommender, workspace.root)  # also of users that have no training row
    interactions = INTERACTIONS.read(workspace.interactions)
    # Everything that training must not see gets another item; the planted one stays, so that the catalogue does.
    is_hidden = ~pl.col("split").is_in(["train", "valid"]) & (pl.col("item_id") <= NUM_ITEMS)
    changed = interactions.with_columns(
        item_id=pl.when(is_hidden).then(pl.col("item_id") % NUM_ITEMS + 1).otherwise(pl.col("item_id"))
    )
    assert changed["item_id"].n_unique() == interactions["item_id"].n_unique()
    assert not changed.equals(interactions)
    INTERACTIONS.write(changed, workspace.interactions)
    assert trained() == once
    # The test can fail: a changed training row changes the model.
    is_train = pl.col("split") == "train"
    INTERACTIONS.write(
        interactions.with_columns(item_id=pl.when(is_train).then(pl.col("item_id") % NUM_ITEMS + 1).otherwise(pl.col("item_id"))),
        workspace.interactions,
    )
    assert trained() != once
