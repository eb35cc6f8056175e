"""Items made rare, on a tiny shop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import long_tail
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.data.demo import ATTRIBUTES, world
from sda_core.embeddings.table import write_embeddings
from sda_core.params import DemoDataset, load_params


@pytest.fixture
def with_vectors(shop: Workspace) -> Workspace:
    """Vectors that are the shop's true attributes, one-hot."""
    params = load_params(shop.root / "params.yaml")
    assert isinstance(params.dataset, DemoDataset)
    truth, items = world(params.dataset), ITEMS.read(shop.items).sort("item_id")
    rows = [truth.asins.index(raw_id) for raw_id in items["raw_item_id"]]
    vectors = np.concatenate([np.eye(16)[truth.attributes[name][rows]] for name in ATTRIBUTES], axis=1).astype(np.float32)
    everywhere = np.ones(len(items), dtype=bool)
    shop.embeddings("zero_shot").parent.mkdir(exist_ok=True)
    ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
    write_embeddings(shop.embeddings("zero_shot"), ids, raw_ids, vectors, vectors, vectors, {}, everywhere)
    return shop


def test_only_training_rows_of_the_chosen_items_are_dropped(shop: Workspace, tmp_path: Path) -> None:
    rare, made = long_tail.make_rare(shop, tmp_path, share=0.5, kept=1, min_count=3)
    before, after = INTERACTIONS.read(shop.interactions), INTERACTIONS.read(made.interactions)
    assert len(rare) > 5
    of_rare = after.filter((pl.col("split") == "train") & pl.col("item_id").is_in(rare.tolist()))
    assert of_rare["item_id"].value_counts()["count"].unique().to_list() == [1]
    untouched = (pl.col("split") != "train") | ~pl.col("item_id").is_in(rare.tolist())
    assert before.filter(untouched).equals(after.filter(untouched))
    assert np.array_equal(rare, long_tail.make_rare(shop, tmp_path, share=0.5, kept=1, min_count=3)[0])


def test_neighbours_in_the_true_attributes_are_purer_than_random_ones(with_vectors: Workspace) -> None:
    params = load_params(with_vectors.root / "params.yaml")
    true = long_tail.purity(with_vectors, params)[1:].mean()
    path = with_vectors.embeddings("zero_shot")
    frame = pl.read_parquet(path)
    random = np.random.default_rng(0).normal(size=(len(frame), 8)).astype(np.float32)
    write_embeddings(
        path, frame["item_id"].to_numpy(), frame["raw_item_id"].to_list(), random, random, random, {}, np.ones(len(frame), bool)
    )
    assert true > long_tail.purity(with_vectors, params)[1:].mean() + 0.1


def test_the_table_has_the_groups(
    with_vectors: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_vectors.embeddings("same").unlink(missing_ok=True)
    with_vectors.embeddings("same").symlink_to(with_vectors.embeddings("zero_shot"))
    long_tail.main("t", str(with_vectors.root), Names(("zero_shot", "same")), seeds=Numbers((1,)), min_count=3)
    lines = capsys.readouterr().out.splitlines()
    assert "made rare, purer half" in lines[2]
    (same,) = (line for line in lines if line.startswith("| same"))
    assert "(+0.0000 [+0.0000, +0.0000])" in same  # the same vectors, the same seed: no gain anywhere
    left = tmp_path / "experiments" / "results" / "long_tail-t"
    assert (left / "plot.png").stat().st_size > 5000
