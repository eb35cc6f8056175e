"""Nearest items against scikit-learn, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from sda_core.explore.nearest import nearest


def test_cosines_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.zeros((1, 5)), rng.normal(size=(40, 5)) * rng.uniform(0.1, 9, size=(40, 1))]).astype(np.float32)
    query = rng.normal(size=5) * 7
    cosines = cosine_similarity(vectors[1:], query[None])[:, 0]
    found = nearest(vectors, query, 6)
    assert [item for item, _ in found] == (np.argsort(-cosines)[:6] + 1).tolist()
    assert [cosine for _, cosine in found] == pytest.approx(np.sort(cosines)[::-1][:6].tolist(), abs=1e-5)


def test_padding_the_item_itself_and_items_without_a_vector_are_left_out() -> None:
    vectors = np.array([[0, 0], [1, 0], [0, 0], [1, 0], [-1, 0]], dtype=np.float32)
    assert nearest(vectors, vectors[1], 10, leave_out=1) == [(3, 1.0), (4, -1.0)]
    assert nearest(vectors, vectors[1], 1) == [(1, 1.0)]  # of equal ones the first


def test_more_than_there_are() -> None:
    assert nearest(np.zeros((3, 2), dtype=np.float32), np.ones(2), 5) == []
