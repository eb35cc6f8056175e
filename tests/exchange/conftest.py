"""A small finished run: tables and vectors, with an item and ids that are hard to write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS, Workspace
from sda_core.embeddings.table import write_embeddings, write_ids_only

NUM_USERS, NUM_ITEMS = 6, 7
RAW_ITEMS = ["B01", "a b", 'say "so"', "NA", "100%", "tab\there", "Ünïcode"]
WITHOUT_IMAGE = 3  # item id


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Every user has five items: three of training, one of validation, one of test; one has a row that is left over."""
    workspace = Workspace(tmp_path / "run")
    rows = [
        (user, (user + place) % NUM_ITEMS + 1, 1_500_000_000 + place // 2, 5.0, {3: "valid", 4: "test"}.get(place, "train"))
        for user in range(1, NUM_USERS + 1)
        for place in range(5)
    ]
    rows.append((NUM_USERS, 1, 1_500_001_000, 1.0, "test_rest"))
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    items = [
        (item, raw, f"Title\t{item}", "", "", ["Home", "Red Mugs"], [], "", [], True) for item, raw in enumerate(RAW_ITEMS, 1)
    ]
    ITEMS.write(pl.DataFrame(items, schema=dict(ITEMS.columns), orient="row"), workspace.items)
    users = [(user, f"u {user}") for user in range(1, NUM_USERS + 1)]
    USERS.write(pl.DataFrame(users, schema=dict(USERS.columns), orient="row"), workspace.users)
    random = np.random.default_rng(0)
    ids = np.arange(1, NUM_ITEMS + 1)
    image, text, fused = (random.normal(size=(NUM_ITEMS, width)).astype(np.float32) for width in (3, 4, 5))
    workspace.embeddings("sda").parent.mkdir()
    write_embeddings(workspace.embeddings("sda"), ids, RAW_ITEMS, image, text, fused, {"fusion": "concat"}, ids != WITHOUT_IMAGE)
    write_ids_only(workspace.embeddings("id"), ids, RAW_ITEMS, {"content": "none"})
    return workspace
