"""Agreeing and conflicting pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import conflicting_items
from experiments.conflicting_items import AGREEING, IMAGE, KINDS, TEXT
from sda_core.embeddings.controls import Vectors


def vectors(image: np.ndarray, text: np.ndarray) -> Vectors:
    return Vectors(image, text, np.concatenate([image, text], axis=1), *2 * [np.ones(len(image), dtype=bool)])


@pytest.fixture
def shop() -> Vectors:
    """40 items in 8 groups of looks and 5 of texts, hardly alike across groups."""
    random = np.random.default_rng(0)
    looks, texts = np.arange(40) % 8, np.arange(40) % 5
    return vectors(np.eye(8)[looks] + 0.01 * random.normal(size=(40, 8)), np.eye(5)[texts] + 0.01 * random.normal(size=(40, 5)))


def test_pairs_of_a_kind_are_what_the_kind_says(shop: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conflicting_items, "SHARE_ALIKE", 0.1)
    pairs = conflicting_items.chosen_by_base(shop, np.arange(40))
    first, second = np.triu_indices(40, 1)
    same_looks, same_text = first % 8 == second % 8, first % 5 == second % 5
    assert pairs[IMAGE].any()
    assert pairs[TEXT].any()
    assert same_looks[pairs[IMAGE]].all()
    assert not same_text[pairs[IMAGE]].any()
    assert same_text[pairs[TEXT]].all()
    assert not same_looks[pairs[TEXT]].any()
    assert not (pairs[AGREEING] & (pairs[IMAGE] | pairs[TEXT])).any()


def test_cosines_are_in_the_order_of_the_triangle() -> None:
    random = np.random.default_rng(1).normal(size=(6, 3))
    unit = random / np.linalg.norm(random, axis=1, keepdims=True)
    expected = [unit[i] @ unit[j] for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(conflicting_items.pair_cosines(random), expected)


def test_auc_counts_ties_by_halves_and_needs_pairs() -> None:
    assert conflicting_items.auc(np.array([0.9, 0.5]), np.array([0.5, 0.1])) == pytest.approx(3.5 / 4)
    assert np.isnan(conflicting_items.auc(np.array([0.9]), np.array([])))


def test_table_and_plot(tmp_path: Path) -> None:
    def of_seed(shift: float) -> dict[str, np.ndarray]:
        return {kind: np.array([0.5, 0.6]) - shift * place for place, kind in enumerate(KINDS)}

    measured = {("base", "sda"): [of_seed(0.0), of_seed(0.2)]}
    row = conflicting_items.table(measured, 2).splitlines()[4]
    assert row == "| base | sda | 2, 0.550 | 2, 0.450 | 2, 0.350 | 0.750 (0.500 .. 1.000) | 0.750 (0.500 .. 1.000) |"
    conflicting_items.plot(measured, tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")
