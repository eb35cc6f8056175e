"""VBPR: its equation, its negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core import recommenders
from sda_core.params import load_params
from sda_core.recommenders.features import standardise
from sda_core.recommenders.pairs import draw_unseen

ROOT = Path(__file__).resolve().parents[2]


def test_scores_are_the_equation(fitted, checkerboard):
    model, _, _ = fitted("vbpr")
    f = torch.from_numpy(standardise(checkerboard[1]))
    user = 5
    gamma_u, theta_u = model.user_factors.weight[user], model.user_content_factors.weight[user]
    E, beta_content = model.content_projection.weight, model.content_bias.weight[0]
    with torch.no_grad():
        expected = [
            model.item_bias[item] + gamma_u @ model.item_factors.weight[item] + theta_u @ (E @ f[item]) + beta_content @ f[item]
            for item in range(1, 25)
        ]
    found = model.score(torch.tensor([user]), torch.zeros((1, 0), dtype=torch.int64))[0, 1:]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_each_kind_of_parameter_has_its_own_penalty(checkerboard, recommender_cases):
    """Those of a triple as a mean over the batch, those that all items share in full."""
    params = recommender_cases["vbpr"][0]
    none = {name: 0.0 for name in type(params).model_fields if name.endswith("regularization")}
    batch = {name: torch.tensor(ids) for name, ids in (("user_B", [1, 2]), ("positive_B", [3, 3]), ("negative_B", [4, 5]))}

    def loss(**changes: float) -> float:
        model = recommenders.build(params.model_copy(update=none | changes), 48, 24, checkerboard[1], seed=5)
        torch.nn.init.constant_(model.content_bias.weight, 0.5)
        torch.nn.init.constant_(model.item_bias, 0.25)
        return model.loss(batch).item()

    model = recommenders.build(params, 48, 24, checkerboard[1], seed=5)
    used = [model.user_factors.weight[[1, 2]], model.user_content_factors.weight[[1, 2]], model.item_factors.weight[[3, 3, 4, 5]]]
    in_use = (sum(table.square().sum().item() for table in used) + 4 * 0.25**2) / 2
    assert loss(embedding_regularization=0.1) - loss() == pytest.approx(0.1 * in_use, rel=1e-3)
    content = model.vectors_ID[[3, 3, 4, 5]] @ model.content_projection.weight.T
    expected = 0.1 * content.square().sum().item() / 2
    assert loss(content_item_regularization=0.1) - loss() == pytest.approx(expected, rel=1e-3)
    shared = model.content_projection.weight.square().sum().item()
    assert loss(content_regularization=0.1) - loss() == pytest.approx(0.1 * shared, rel=1e-3)
    assert loss(content_bias_regularization=0.1) - loss() == pytest.approx(0.1 * 7 * 0.5**2, rel=1e-3)


def test_without_vectors_it_is_matrix_factorisation(fitted):
    model, _, _ = fitted("vbpr-id")
    assert sorted(model.state_dict()) == ["item_bias", "item_factors.weight", "user_factors.weight"]


def test_a_user_without_a_training_row_gets_the_items_biases(checkerboard, tmp_path):
    """A split by time has such users; what they were initialised with must not rank their items."""
    interactions, vectors = checkerboard
    newcomer = 3
    known = interactions.filter((pl.col("user_id") != newcomer) & pl.col("split").is_in(["train", "valid"]))
    sizes = interactions["user_id"].n_unique(), interactions["item_id"].n_unique()
    section = load_params(ROOT / "params.yaml").train_recommender.vbpr.model_copy(update={"max_epochs": 2})
    model = recommenders.build(section, *sizes, vectors, seed=5)
    data = recommenders.training_data(known, *sizes)
    model.fit(data, checkpoint=tmp_path / "c.safetensors", fingerprint="f", device=torch.device("cpu"))
    scores = model.score(torch.tensor([newcomer, 0, 1]), torch.zeros((3, 0), dtype=torch.int64))
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.allclose(scores[0, 1:], scores[2, 1:])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=40), st.integers(0, 99))
def test_negatives_are_unseen_by_their_user(pairs, seed):
    users, items = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    drawn, is_drawn = draw_unseen(users, items, 7, np.random.default_rng(seed))
    for user, item, ok in zip(users, drawn, is_drawn, strict=True):
        left = set(range(1, 8)) - {i for u, i in pairs if u == user}
        assert (item in left) == ok
        assert bool(ok) == bool(left)  # 64 tries miss one of seven items once in 20,000 rows


def test_negatives_are_uniform():
    users = np.ones(20_000, dtype=np.int64)
    items = np.resize([1, 4], 20_000)
    drawn, is_drawn = draw_unseen(users, items, 6, np.random.default_rng(0))
    assert is_drawn.all()
    counts = np.bincount(drawn, minlength=7)
    assert counts[[0, 1, 4]].sum() == 0
    assert np.abs(counts[[2, 3, 5, 6]] - 5_000).max() < 5 * np.sqrt(20_000 * 0.25 * 0.75)
