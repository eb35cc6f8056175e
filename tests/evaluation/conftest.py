"""Real interactions, where they are at hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest

BEAUTY = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "beauty_2014_sequences" / "reviews_Beauty_5.json.gz"


@pytest.fixture(scope="session")
def beauty() -> pl.DataFrame:
    """Amazon 2014 Beauty 5-core, split leave-one-out; its lines are in time order."""
    if not BEAUTY.is_file():
        pytest.skip("../shared/data/beauty_2014_sequences is absent")
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    histories: dict[int, list[int]] = {}
    with gzip.open(BEAUTY, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            user = users.setdefault(row["reviewerID"], len(users) + 1)
            histories.setdefault(user, []).append(items.setdefault(row["asin"], len(items) + 1))
    return pl.DataFrame(
        {
            "user_id": [user for user, history in histories.items() for _ in history],
            "item_id": [item for history in histories.values() for item in history],
            "split": [name for history in histories.values() for name in [*["train"] * (len(history) - 2), "valid", "test"]],
        },
        schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String},
    )
