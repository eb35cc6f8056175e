"""Positions through an index against positions by all scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sda_core.errors import ConfigError, TrainingError
from sda_core.index import inner_product_search
from sda_core.params import PopParams
from sda_core.ranking import place, place_targets
from sda_core.ranking.retrieval import RECALL
from sda_core.recommenders import Recommender, evaluation_data

CPU = torch.device("cpu")


class Factors(Recommender):
    """Given factors of users and items."""

    def __init__(self, user_UK: np.ndarray, item_IK: np.ndarray) -> None:
        super().__init__(PopParams(kind="pop", counts="train"), len(user_UK) - 1, len(item_IK) - 1, None)
        self.user_UK, self.item_IK = torch.tensor(user_UK).float(), torch.tensor(item_IK).float()

    def fit(self, data, *, checkpoint, fingerprint, device):
        return []

    def _item_matrix(self):
        return self.item_IK

    def _queries(self, user_ids_B, history_BL):
        return self.user_UK[user_ids_B]

    def _score(self, user_ids_B, history_BL):
        return self.user_UK[user_ids_B] @ self.item_IK.T


@st.composite
def _worlds(draw):
    num_items = draw(st.integers(4, 12))
    histories = draw(st.lists(st.lists(st.integers(1, num_items), min_size=3, max_size=9), min_size=1, max_size=7))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    users, items = (random.integers(-1, 2, size=(size + 1, 3)) for size in (len(histories), num_items))  # small: ties abound
    return histories, users, items, draw(st.integers(1, num_items)), draw(st.integers(1, 9))


@settings(deadline=None, max_examples=50)
@given(_worlds())
@example(([[1, 1, 1]] * 3, np.ones((4, 3)), np.arange(39).reshape(13, 3) % 5, 10, 1))  # the target takes a place of the depth
def test_ties_within_the_depth_are_counted_exactly(retrieval_params, make_table, world):
    """Items come twice, targets come back from the history, and half of the items share a score with another."""
    histories, users, items, depth, batch_size = world
    data = evaluation_data(make_table(histories), num_items=len(items) - 1)
    model = Factors(users, items)
    exact = place_targets(model, data, None, 7, CPU)
    placed, told = place(model, data, None, retrieval_params(depth, batch_size=batch_size), CPU)
    within = (exact["num_better"] + exact["num_tied"]).to_numpy() < depth
    assert placed.filter(within).equals(exact.filter(within))
    assert placed["candidates"].equals(exact["candidates"])
    assert (placed["num_better"] + placed["num_tied"] < placed["candidates"]).all()
    if depth >= 10:
        assert told == {RECALL: 1.0}


def test_recall_is_the_share_of_the_exact_top_10(retrieval_params, make_table, monkeypatch):
    """A search that sees every other item finds half of the ten; the loss is told, and targets it misses are last."""
    random = np.random.default_rng(0)
    model = Factors(random.normal(size=(21, 4)), random.normal(size=(401, 4)))
    data = evaluation_data(make_table([[*(1 + random.permutation(399)[:5]).tolist(), 400] for _ in range(20)]))
    shares = []

    def half_blind(items_IK, section):
        exact = inner_product_search(items_IK, section)

        def search(queries, k):
            found = exact(queries, len(items_IK))
            return np.stack([row[row % 2 == 0][:k] for row in found])

        return search

    monkeypatch.setattr("sda_core.index.inner_product_search", half_blind)
    for user in range(1, 21):
        seen = data.histories.of(user)
        scores = model.item_IK.numpy()[1:] @ model.user_UK.numpy()[user]
        best = [item for item in np.argsort(-scores) if item + 1 not in seen][:10]
        shares.append(np.mean([item % 2 == 0 for item in best]))
    placed, told = place(model, data, None, retrieval_params(depth=10), CPU)
    assert told[RECALL] == pytest.approx(np.mean(shares))
    assert 0.3 < told[RECALL] < 0.7
    is_hidden = placed["target_item_id"].to_numpy() % 2 == 0  # item 400 stands in row 399
    assert is_hidden.all()
    assert (placed["num_better"] + 1 == placed["candidates"]).all()


@pytest.mark.parametrize(("factory", "search"), [("HNSW32", {"ef_search": 64}), ("IVF8,Flat", {"nprobe": 8}), ("SQ8", {})])
def test_other_indexes_find_nearly_all(retrieval_params, factory, search, make_table):
    random = np.random.default_rng(1)
    model = Factors(random.normal(size=(31, 8)), random.normal(size=(501, 8)) * random.uniform(0.5, 2.0, size=(501, 1)))
    data = evaluation_data(make_table([(1 + random.permutation(500)[:6]).tolist() for _ in range(30)]), num_items=500)
    exact = place_targets(model, data, None, 7, CPU)
    placed, told = place(model, data, None, retrieval_params(120, factory, **search), CPU)
    assert told[RECALL] > 0.95
    position, right = (frame["num_better"].to_numpy() for frame in (placed, exact))
    found = placed["num_better"].to_numpy() < placed["candidates"].to_numpy() - 1
    assert 3 <= found.sum() < 30
    assert (position[found] <= right[found]).all()  # what is missed cannot stand before the target
    np.testing.assert_allclose(position[found], right[found], atol=3)


def test_an_index_that_faiss_does_not_know_is_named_by_its_param(retrieval_params, make_table):
    data = evaluation_data(make_table([[1, 2, 3], [3, 2, 1]]))
    model = Factors(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ConfigError, match=r"params.yaml: evaluate.retrieval.factory"):
        place(model, data, None, retrieval_params(3, "IVF4,Nonsense"), CPU)
    with pytest.raises(ConfigError, match=r"params.yaml: evaluate.retrieval.nprobe"):
        place(model, data, None, retrieval_params(3, nprobe=2), CPU)


@pytest.mark.parametrize("side", ["user_UK", "item_IK"])
def test_nan_is_an_error(retrieval_params, side, make_table):
    data = evaluation_data(make_table([[1, 2, 3], [3, 2, 1]]))
    model = Factors(np.ones((3, 2)), np.ones((4, 2)))
    getattr(model, side)[2, 1] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        place(model, data, None, retrieval_params(3), CPU)
