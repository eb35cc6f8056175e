"""The shop as an instrument, on a small one: perfect knowledge pays, and without content nothing does.

The settings are those of params.yaml.  Where `oracle` does not beat ids, a recommender cannot use item vectors, and none of its
results says anything about them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from sda_core.artifacts import INTERACTIONS
from sda_core.data.demo import truth_of, world
from sda_core.embeddings.oracle import oracle_vectors
from sda_core.evaluation.metrics import per_user
from sda_core.evaluation.significance import interval
from sda_core.params import DemoDataset
from sda_core.ranking import place_targets
from sda_core.recommenders import ItemVectors, build, evaluation_data, training_data
from sda_core.traits import takes_modalities
from tests.sections import SHIPPED, changed

CPU = torch.device("cpu")
SEEDS = (1,)
SMALL = {"num_users": 500, "num_items": 300, "mean_history_length": 9.0, "new_item_share": 0.0, "popularity_exponent": 0.8}


def interactions_of(dataset: DemoDataset) -> pl.DataFrame:
    """The histories of a shop, leave one out."""
    shop = world(dataset)
    table = pl.DataFrame({"user_id": shop.user + 1, "item_id": shop.item + 1, "timestamp": shop.day, "rating": shop.rating})
    left = pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id")  # 1: the last one
    split = pl.when(left == 1).then(pl.lit("test")).when(left == 2).then(pl.lit("valid")).otherwise(pl.lit("train"))
    return table.with_columns(split=split).cast(dict(INTERACTIONS.columns))  # type: ignore[arg-type]


def oracle(dataset: DemoDataset, *, apart: bool) -> ItemVectors:
    made = oracle_vectors("oracle", truth_of(dataset), list(world(dataset).asins), 1)
    image, text, fused = (np.concatenate([np.zeros((1, matrix.shape[1]), dtype=np.float32), matrix]) for matrix in made)
    return {"image": image, "text": text} if apart else fused


def ndcg(recommender: str, content_strength: float, *, has_vectors: bool, folder: Path) -> np.ndarray:
    """NDCG@10 by seed and user."""
    dataset = changed(SHIPPED.dataset, **SMALL, content_strength=content_strength, sequence_strength=0.5)
    section = SHIPPED.train_recommender.of(recommender)
    table = interactions_of(dataset)
    known = table.filter(pl.col("split") != "test")
    vectors = oracle(dataset, apart=takes_modalities(section)) if has_vectors else None
    rows = []
    for seed in SEEDS:
        data = training_data(known, num_users=dataset.num_users, num_items=dataset.num_items)
        model = build(section, data.num_users, data.num_items, vectors, seed=seed)
        model.fit(
            data, checkpoint=folder / "checkpoint.safetensors", fingerprint=f"{recommender} {seed} {has_vectors}", device=CPU
        )
        placed = place_targets(model, evaluation_data(table, num_items=dataset.num_items), None, 256, CPU).sort("user_id")
        position = 1 + placed["num_better"] + placed["num_tied"]
        rows.append(per_user("ndcg", position.cast(pl.Float64).to_numpy(), 10))
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("recommender", ["sasrec", "bert4rec", "vbpr", "slmrec"])
def test_perfect_knowledge_beats_ids(recommender: str, tmp_path: Path) -> None:
    ids, perfect = (ndcg(recommender, 5.0, has_vectors=has_vectors, folder=tmp_path) for has_vectors in (False, True))
    low, _ = interval(perfect - ids, 2000, np.random.default_rng(0))
    assert low > 0.0, (ids.mean(), perfect.mean())


@pytest.mark.slow
@pytest.mark.parametrize("recommender", ["sasrec", "bert4rec", "vbpr", "slmrec"])
def test_without_content_perfect_knowledge_gains_nothing(recommender: str, tmp_path: Path) -> None:
    ids, perfect = (ndcg(recommender, 0.0, has_vectors=has_vectors, folder=tmp_path) for has_vectors in (False, True))
    low, _ = interval(perfect - ids, 2000, np.random.default_rng(0))
    assert low < 0.0, (ids.mean(), perfect.mean())
