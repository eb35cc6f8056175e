"""Popularity counts what it is told to count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sda_core.errors import TrainingError
from sda_core.params import PopParams
from sda_core.ranking import place_targets
from sda_core.recommenders import build, evaluation_data, training_data

CPU = torch.device("cpu")
HISTORIES = [[1, 2, 3, 4], [1, 2, 4, 5], [1, 3, 3, 5]]


def _counts(counts, interactions, tmp_path, leaked=None):
    data = training_data(interactions, leaked_test_items=leaked)
    pop = build(PopParams(kind="pop", counts=counts), data.num_users, data.num_items, None, seed=5)
    assert pop.fit(data, checkpoint=tmp_path / "unused", fingerprint="", device=CPU) == []
    scores = pop.score(torch.tensor([1, 3]), torch.zeros((2, 0), dtype=torch.int64))
    assert torch.equal(scores[0], scores[1])
    return scores[0, 1:].tolist()


def test_counts_by_hand(make_table, tmp_path):
    interactions = make_table(HISTORIES)
    assert _counts("train", interactions, tmp_path) == [3, 2, 1, 0, 0]
    assert _counts("train_valid", interactions, tmp_path) == [3, 2, 3, 1, 0]
    assert _counts("all", interactions, tmp_path, leaked=np.array([4, 5, 5])) == [3, 2, 3, 2, 2]


def test_counting_all_needs_the_leaked_items(make_table, tmp_path):
    with pytest.raises(TrainingError, match="no test items were given"):
        _counts("all", make_table(HISTORIES), tmp_path)


def test_beats_chance_where_items_differ_in_popularity(tmp_path, make_table):
    random = np.random.default_rng(2)
    chance = 1 / np.arange(1, 101)
    histories = [random.choice(np.arange(1, 101), size=8, replace=False, p=chance / chance.sum()).tolist() for _ in range(300)]
    interactions = make_table(histories)
    data = training_data(interactions)
    pop = build(PopParams(kind="pop", counts="train"), data.num_users, data.num_items, None, seed=5)
    pop.fit(data, checkpoint=tmp_path / "unused", fingerprint="", device=CPU)
    placed = place_targets(pop, evaluation_data(interactions), None, 64, CPU)
    hits = (placed["num_better"] + placed["num_tied"] < 10).mean()
    assert hits > 0.2, f"hit@10 {hits:.3f} (chance 0.108)"
