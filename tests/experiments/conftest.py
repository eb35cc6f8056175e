"""A tiny shop: the built-in one's raw files, filtered, with params that train for one epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import POSITIONS, Workspace
from stages.download import download
from stages.fetch_images import fetch_images
from stages.filter import filter_


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Workspace:
    root = tmp_path_factory.mktemp("shop")
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["dataset"] |= {"num_users": 260, "num_items": 200, "image_side": 16, "quirk_share": 0.0}
    params["filter"] |= {"min_item_interactions": 5}  # a 5-core, whatever the preset keeps
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 2}
    params["evaluate"] |= {"bootstrap_samples": 50, "batch_size": 64}
    params["train_recommender"]["sasrec"] |= {"max_epochs": 1, "eval_every": 1, "hidden_size": 8, "num_negatives": 4}
    YAML(typ="safe", pure=True).dump(params, root / "params.yaml")
    download(root)
    filter_(root)
    return Workspace(root)


@pytest.fixture(scope="module")
def with_images(shop: Workspace) -> Workspace:
    """The shop with its images."""
    fetch_images(shop.root)
    return shop


@pytest.fixture(scope="module")
def on_tiny(with_images: Workspace, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder of the shop with the tiny random backbone, two steps of adapter training, and no results."""
    yaml = YAML(typ="safe", pure=True)
    params: dict[str, Any] = yaml.load(with_images.root / "params.yaml")
    params["backbone"] = yaml.load(repository / "conf" / "backbone" / "tiny.yaml")
    params["backbone"] |= {"hidden_size": 16, "num_heads": 2, "vision_depth": 1}
    params["train_adapter"]["training"] |= {"num_steps": 2, "batch_size": 8, "warmup_steps": 0}
    params["export_embeddings"] |= {"fused_dim": 8}
    root = tmp_path_factory.mktemp("tiny")
    yaml.dump(params, root / "params.yaml")
    (root / "data").symlink_to(with_images.root / "data")
    return root


@pytest.fixture
def keep() -> Callable[..., None]:
    """Write positions of the test targets, as given, or one for all."""

    def keep(path: Path, interactions: pl.DataFrame, positions: Any) -> None:
        test = interactions.filter(pl.col("split") == "test").sort("user_id")
        counts = {name: pl.lit(0, pl.Int32) for name in ("candidates", "num_better", "num_tied")}
        places = pl.Series("position", np.broadcast_to(np.asarray(positions, dtype=np.float64), len(test)))
        frame = test.select("user_id", target_item_id="item_id").with_columns(places, **counts)
        POSITIONS.write(frame.select(list(POSITIONS.columns)), path)

    return keep
