"""Nearest items against independent references: dense NumPy in float64, and scikit-learn's cosine similarity."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics.pairwise import cosine_similarity

from sda_core.params import NearestParams
from sda_core.ranking import place_targets
from sda_core.recommenders import build, evaluation_data, load, nearest, training_data
from sda_core.recommenders.batches import validation_view
from sda_core.recommenders.nearest import WEIGHTS_OF_CONTENT
from tests.tolerances import up_to_rounding

CPU = torch.device("cpu")
SETTINGS = {
    "kind": "nearest",
    "representation": "id+content",
    "content_weight": None,
    "axis_scaling": "none",
    "num_neighbors": 1000,
    "shrinkage": 0.0,
    "max_length": 50,
    "new_item_cost": None,
}


def _params(**changes) -> NearestParams:
    return NearestParams.model_validate(SETTINGS | changes)


def _fit(params, interactions, vectors, folder: Path, **sizes):
    data = training_data(interactions, **sizes)
    recommender = build(params, data.num_users, data.num_items, vectors, seed=0)
    records = recommender.fit(data, checkpoint=folder / "unused", fingerprint="", device=CPU)
    assert not (folder / "unused").exists()
    return recommender, records, data


def _matrix(data) -> np.ndarray:
    """Users and items of training, (U + 1, I + 1), entries 0 and 1."""
    matrix = np.zeros((data.num_users + 1, data.num_items + 1))
    for user in range(1, data.num_users + 1):
        matrix[user, data.train.of(user)] = 1
    return matrix


def _mean_similarity(similarity_II: np.ndarray, history: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.mean([similarity_II[item] for item in history], axis=0)[1:]).float()


def _scores(recommender, history: list[int]) -> torch.Tensor:
    return recommender.score(torch.tensor([0]), torch.tensor([history]))[0, 1:]


@pytest.fixture
def shop(make_table) -> tuple[pl.DataFrame, np.ndarray]:
    """40 users, 30 items of unequal popularity; items 29 and 30 are in no training row."""
    random = np.random.default_rng(4)
    histories = [random.choice(28, size=random.integers(4, 12), replace=False) + 1 for _ in range(40)]
    vectors = np.zeros((31, 6), dtype=np.float32)
    vectors[1:] = random.normal(size=(30, 6)) + 3.0
    return make_table([history.tolist() for history in histories]), vectors


def test_similarity_by_users_is_the_cosine_of_scikit_learn(shop, tmp_path):
    recommender, _, data = _fit(_params(), shop[0], None, tmp_path, num_items=30)
    similarity = cosine_similarity(_matrix(data).T)
    np.fill_diagonal(similarity, 0.0)
    expected = _mean_similarity(similarity, [3, 7, 7, 12])
    torch.testing.assert_close(_scores(recommender, [3, 7, 7, 12]), expected, **up_to_rounding(expected))


def test_shrinkage_and_the_number_of_neighbors(shop, tmp_path):
    recommender, _, data = _fit(_params(shrinkage=2.5, num_neighbors=3), shop[0], None, tmp_path, num_items=30)
    together = _matrix(data).T @ _matrix(data)
    lengths = np.sqrt(np.diag(together))
    similarity = together / (np.outer(lengths, lengths) + 2.5)
    np.fill_diagonal(similarity, 0.0)
    for row in similarity:
        row[np.lexsort((np.arange(31), -row))[3:]] = 0.0  # among equals the lowest ids stay
    for history in ([1], [5, 9, 20], list(range(1, 31))):
        expected = _mean_similarity(similarity, history)
        torch.testing.assert_close(_scores(recommender, history), expected, **up_to_rounding(expected))
    assert (_scores(recommender, [5, 9])[28:] == 0.0).all()  # nobody has the new items


def test_many_items_are_computed_in_chunks_with_the_same_result(shop, tmp_path, monkeypatch):
    one, _, _ = _fit(_params(num_neighbors=4), shop[0], None, tmp_path, num_items=30)
    monkeypatch.setattr("sda_core.recommenders.nearest._ITEMS_PER_CHUNK", 7)
    two, _, _ = _fit(_params(num_neighbors=4), shop[0], None, tmp_path, num_items=30)
    assert torch.equal(one.neighbor_ids_IK, two.neighbor_ids_IK)
    assert torch.equal(one.neighbor_similarities_IK, two.neighbor_similarities_IK)


@pytest.mark.parametrize("axis_scaling", ["none", "even"])
def test_similarity_by_content_is_the_cosine_without_the_mean(axis_scaling, shop, tmp_path):
    interactions, vectors = shop
    params = _params(representation="content", axis_scaling=axis_scaling)
    recommender, _, data = _fit(params, interactions, vectors, tmp_path, num_items=30)
    seen = np.unique(data.train.item_ids)
    centred = vectors[1:].astype(np.float64) - vectors[seen].mean(axis=0, dtype=np.float64)
    if axis_scaling == "even":
        variance, axes = np.linalg.eigh(np.cov(vectors[seen].T, bias=True))
        centred = centred @ axes / np.sqrt(variance + variance.mean())
    similarity = np.pad(cosine_similarity(centred), (1, 0))
    expected = _mean_similarity(similarity, [2, 30, 11])
    torch.testing.assert_close(_scores(recommender, [2, 30, 11]), expected, **up_to_rounding(expected))


def test_both_are_divided_by_their_spread_and_weighted(shop, tmp_path):
    interactions, vectors = shop
    one, two = (
        _fit(_params(representation=kind), interactions, vectors, tmp_path, num_items=30)[0] for kind in ("id", "content")
    )
    weight = 0.3
    both, _, data = _fit(_params(content_weight=weight), interactions, vectors, tmp_path, num_items=30)
    histories = [data.train.of(user).tolist() for user in range(1, 41)]
    spreads = [np.mean([_scores(part, history).double().numpy().std() for history in histories]) for part in (one, two)]
    np.testing.assert_allclose(both.spreads.numpy(), spreads, rtol=1e-5)
    expected = (1 - weight) * _scores(one, [4, 6]) / spreads[0] + weight * _scores(two, [4, 6]) / spreads[1]
    torch.testing.assert_close(_scores(both, [4, 6]), expected, **up_to_rounding(expected))


def test_the_weight_is_the_best_on_validation_and_test_rows_do_not_matter(shop, tmp_path, caplog):
    interactions, vectors = shop
    with caplog.at_level(logging.INFO):
        chosen, records, _ = _fit(_params(), interactions, vectors, tmp_path, num_items=30)
    fixed = {
        weight: _fit(_params(content_weight=weight), interactions, vectors, tmp_path, num_items=30)[1][0].valid_ndcg_10
        for weight in WEIGHTS_OF_CONTENT
    }
    best = max(fixed, key=fixed.get)
    assert float(chosen.content_weight) == pytest.approx(best)
    assert (records[0].valid_ndcg_10, records[0].loss, records[0].is_best) == (fixed[best], None, True)
    assert f"content_weight {best:.1f} has the highest valid ndcg@10, {fixed[best]:.4f}" in caplog.text
    without_test = interactions.filter(pl.col("split") != "test")
    again, _, _ = _fit(_params(), without_test, vectors, tmp_path, num_users=40, num_items=30)
    assert torch.equal(_scores(again, [4, 6]), _scores(chosen, [4, 6]))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_each_similarity_is_computed_once_for_all_weights(shop, tmp_path, monkeypatch, size):
    interactions, vectors = shop
    monkeypatch.setattr(nearest, "USERS_PER_CHUNK", size)
    recommender, _, data = _fit(_params(), interactions, vectors, tmp_path, num_items=30)
    validation = validation_view(data)
    one_by_one = []
    for weight in WEIGHTS_OF_CONTENT:
        recommender.content_weight.fill_(weight)
        one_by_one.append(recommender._validate(validation, torch.device("cpu")))
    assert len(set(one_by_one)) > 1, "the weight matters"
    calls = []
    by_users = recommender._score_by_users
    monkeypatch.setattr(recommender, "_score_by_users", lambda history: calls.append(len(history)) or by_users(history))
    assert recommender._validate_weights(validation, torch.device("cpu")) == one_by_one
    assert sum(calls) == len(validation.users)
    assert max(calls) <= size
    recommender._score(torch.zeros(1), torch.zeros(1, 3, dtype=torch.int64))
    assert recommender._kept is None, "nothing is kept after the weight was chosen"


def test_content_that_says_nothing_costs_little(checkerboard, tmp_path):
    interactions, vectors = checkerboard
    noise = np.zeros_like(vectors)
    noise[1:] = np.random.default_rng(0).normal(size=(24, 7))
    both, _, _ = _fit(_params(), interactions, noise, tmp_path)
    alone, _, _ = _fit(_params(), interactions, None, tmp_path)
    data = evaluation_data(interactions)
    hits = [
        (placed["num_better"] + placed["num_tied"] < 2).mean()
        for placed in (place_targets(part, data, None, 7, CPU) for part in (both, alone))
    ]
    assert float(both.content_weight) <= 0.5
    assert hits[0] >= hits[1] - 0.1


def test_a_new_item_is_found_by_content_alone(make_table, tmp_path):
    """Item 6 is in no training row; its vector is that of item 1."""
    interactions = make_table([[1, 2, 3, 4], [2, 1, 4, 3], [3, 4, 1, 2], [4, 3, 2, 5]])
    vectors = np.zeros((7, 3), dtype=np.float32)
    vectors[1:6] = np.random.default_rng(1).normal(size=(5, 3))
    vectors[6] = vectors[1]
    by_users, _, _ = _fit(_params(), interactions, None, tmp_path, num_items=6)
    by_content, _, _ = _fit(_params(representation="content"), interactions, vectors, tmp_path, num_items=6)
    assert _scores(by_users, [1])[5] == 0.0
    assert int(by_content.recommend(torch.tensor([0]), torch.tensor([[1]]), 1)[0][0, 0]) == 6


def test_equal_vectors_and_missing_ones_score_zero(make_table, tmp_path):
    interactions = make_table([[1, 2, 3, 4], [2, 1, 4, 3]])
    equal = np.zeros((5, 3), dtype=np.float32)
    equal[1:] = [0.1, 0.7, -0.3]
    recommender, _, _ = _fit(_params(representation="content"), interactions, equal, tmp_path)
    assert (_scores(recommender, [1, 2]) == 0.0).all()
    missing = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    missing[[0, 3]] = 0.0
    recommender, _, _ = _fit(_params(representation="content", axis_scaling="even"), interactions, missing, tmp_path)
    assert _scores(recommender, [1, 2])[2] == 0.0
    assert (_scores(recommender, [3]) == 0.0).all()


def test_items_without_a_vector_do_not_move_the_mean(shop, tmp_path):
    interactions, vectors = shop
    kept = vectors.copy()
    kept[5:15] = 0.0
    recommender, _, data = _fit(_params(representation="content"), interactions, kept, tmp_path, num_items=30)
    known = [item for item in np.unique(data.train.item_ids) if kept[item].any()]
    np.testing.assert_allclose(recommender.mean_D.numpy(), kept[known].mean(axis=0), rtol=1e-5)
    nothing = np.zeros_like(vectors)
    recommender, _, _ = _fit(_params(axis_scaling="even"), interactions, nothing, tmp_path, num_items=30)
    alone, _, _ = _fit(_params(), interactions, None, tmp_path, num_items=30)
    assert torch.equal(_scores(recommender, [4, 6]).argsort(), _scores(alone, [4, 6]).argsort())


def test_a_second_fit_forgets_the_first(shop, tmp_path):
    interactions, vectors = shop
    few = interactions.filter(pl.col("user_id") <= 10)
    params = _params(new_item_cost=0.5, axis_scaling="even")
    once, _, data = _fit(params, few, vectors, tmp_path, num_users=40, num_items=30)
    twice, _, _ = _fit(params, interactions, vectors, tmp_path, num_items=30)
    twice.fit(data, checkpoint=tmp_path / "unused", fingerprint="", device=CPU)
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name
    assert torch.equal(_scores(once, [4, 6]), _scores(twice, [4, 6]))


def test_no_validation_target_keeps_the_middle_and_says_so(shop, tmp_path, caplog):
    interactions, vectors = shop
    recommender, records, _ = _fit(
        _params(), interactions.filter(pl.col("split") == "train"), vectors, tmp_path, num_users=40, num_items=30
    )
    assert float(recommender.content_weight) == 0.5
    assert records[0].valid_ndcg_10 is None
    assert "no user has a validation target, so content_weight is 0.5" in caplog.text


def test_a_saved_model_is_small_and_scores_the_same(shop, tmp_path):
    interactions, vectors = shop
    recommender, _, _ = _fit(_params(axis_scaling="even"), interactions, vectors, tmp_path, num_items=30)
    recommender.save(tmp_path / "saved")
    again = load(tmp_path / "saved", vectors, CPU)
    assert torch.equal(_scores(again, [4, 6, 9]), _scores(recommender, [4, 6, 9]))
    assert float(again.content_weight) == float(recommender.content_weight)
    names = set(recommender.state_dict())
    assert names == {"neighbor_ids_IK", "neighbor_similarities_IK", "mean_D", "axes_DK", "spreads", "content_weight"}


def test_only_the_latest_items_count(shop, tmp_path):
    recommender, _, _ = _fit(_params(max_length=2), *shop, tmp_path, num_items=30)
    assert torch.equal(_scores(recommender, [9, 3, 5, 7]), _scores(recommender, [5, 7]))


def test_new_items_are_raised_at_a_bounded_cost(shop, tmp_path):
    """Items 29 and 30 are validation targets of some users; their vectors are those of items that these users have."""
    interactions, vectors = shop
    vectors = vectors.copy()
    late = pl.col("split") == "valid"
    interactions = interactions.with_columns(
        item_id=pl.when(late & (pl.col("user_id") % 4 == 0)).then(pl.lit(29, pl.Int32)).otherwise("item_id")
    )
    buyers = interactions.filter(late & (pl.col("item_id") == 29))["user_id"].to_list()
    vectors[29] = np.mean([vectors[training_data(interactions).train.of(user)].mean(axis=0) for user in buyers], axis=0)
    plain, before, _ = _fit(_params(), interactions, vectors, tmp_path, num_items=30)
    raised, after, _ = _fit(_params(new_item_cost=0.5), interactions, vectors, tmp_path, num_items=30)
    assert after[0].valid_ndcg_10 >= 0.5 * before[0].valid_ndcg_10
    difference = _scores(raised, [4, 6]) - _scores(plain, [4, 6])
    assert difference[28] > 0.0
    torch.testing.assert_close(difference[28], difference[29])
    assert difference[:28].abs().max() < 1e-5
    content, _, _ = _fit(_params(representation="content", new_item_cost=0.5), interactions, vectors, tmp_path, num_items=30)
    asked = torch.tensor([0]), torch.tensor([[4, 6]])
    product = (content.queries(*asked) @ content.item_matrix().T)[0, 1:]
    torch.testing.assert_close(product, _scores(content, [4, 6]))
    empty = torch.zeros((1, 3), dtype=torch.int64)
    assert not raised.score(asked[0], empty)[0, 1:].any()  # an empty history says nothing about new items
    assert not (content.queries(asked[0], empty) @ content.item_matrix().T)[0, 1:].any()
    raised.save(tmp_path / "raised")
    assert torch.equal(_scores(load(tmp_path / "raised", vectors, CPU), [4, 6]), _scores(raised, [4, 6]))


def test_a_weight_without_two_similarities_is_a_mistake():
    with pytest.raises(ValidationError, match=r"content_weight needs representation id\+content \(got content\); set it to null"):
        _params(representation="content", content_weight=0.5)
    with pytest.raises(ValidationError, match="new_item_cost needs content to tell new items apart"):
        _params(representation="id", new_item_cost=0.01)
