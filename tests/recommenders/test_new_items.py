"""How much the scores of new items are raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.recommenders import build, evaluation_data, load, training_data
from sda_core.recommenders.new_items import STEPS, choose

CPU = torch.device("cpu")
COLD = (7, 8)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.01, 9.0))
def test_the_largest_within_the_cost_is_chosen(seed: int, cost: float, spread: float) -> None:
    random = np.random.default_rng(seed)
    ndcg_CU = random.random((len(STEPS), 7))
    is_new_U = random.random(7) < 0.3
    made = choose(lambda offset: ndcg_CU[round(4 * offset / spread)], is_new_U, spread, cost)
    means = ndcg_CU.mean(axis=1)
    allowed = [step for step in range(len(STEPS)) if means[step] >= (1 - cost) * means.max()]
    assert made.offset == pytest.approx(spread * allowed[-1] / 4)
    assert made.before[0] == pytest.approx(means[0])
    assert made.after[0] == pytest.approx(means[allowed[-1]])
    if is_new_U.any():
        assert made.after[1] == pytest.approx(ndcg_CU[allowed[-1]][is_new_U].mean())
    else:
        assert made.before[1] is None
        assert made.after[1] is None


def test_if_nothing_finds_a_target_nothing_is_raised() -> None:
    made = choose(lambda _: np.zeros(5), np.array([True, False, False, False, False]), 1.0, 0.01)
    assert made.offset == 0.0


@pytest.mark.parametrize("name", ["sasrec-content", "bert4rec-content"])
@pytest.mark.parametrize("representation", ["content", "id+content"])
def test_one_number_for_all_new_items_and_the_rest_stays(
    name: str, representation: str, recommender_cases: Any, checkerboard: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores, the matrix for an index, a saved model and a resumed fit agree."""
    interactions, vectors = checkerboard
    is_late = pl.col("item_id").is_in(COLD)
    interactions = interactions.filter(~(is_late & (pl.col("split") == "train")))  # a target of validation and test alone
    num_items = len(vectors) - 1
    data = training_data(interactions, num_items=num_items)
    plain = recommender_cases[name][0].model_copy(update={"representation": representation, "max_epochs": 8})
    models = {}
    caplog.set_level("INFO", "sda_core")
    for cost in (None, 0.5):
        params = plain.model_copy(update={"new_item_cost": cost})
        models[cost] = build(params, data.num_users, num_items, vectors, seed=5)
        models[cost].fit(data, checkpoint=tmp_path / f"{cost}", fingerprint=name, device=CPU)
    (line,) = (text for text in caplog.messages if "new items" in text)
    assert "the scores of 2 new items are raised by" in line
    known = evaluation_data(interactions, num_items=num_items)
    asked = torch.from_numpy(known.users).long(), torch.from_numpy(known.histories.last(known.users, 12)).long()
    raised_BI = models[0.5].score(*asked)[:, 1:] - models[None].score(*asked)[:, 1:]
    is_new_I = np.isin(np.arange(1, num_items + 1), COLD)
    offset = models[0.5].new_item_offset_I[COLD[0]].item()
    assert offset > 0.0
    torch.testing.assert_close(raised_BI[:, is_new_I], torch.full_like(raised_BI[:, is_new_I], offset), rtol=1e-4, atol=1e-5)
    assert raised_BI[:, ~is_new_I].abs().max() < 1e-5
    product_BI = models[0.5].queries(*asked) @ models[0.5].item_matrix().T
    torch.testing.assert_close(product_BI[:, 1:], models[0.5].score(*asked)[:, 1:])
    models[0.5].save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", vectors, CPU)
    assert torch.equal(loaded.score(*asked), models[0.5].score(*asked))
    again = build(models[0.5].params, data.num_users, num_items, vectors, seed=5)
    again.fit(data, checkpoint=tmp_path / "0.5", fingerprint=name, device=CPU)  # from the checkpoint of the first fit
    assert torch.equal(again.score(*asked), models[0.5].score(*asked))


def test_without_new_items_nothing_is_raised(recommender_cases: Any, checkerboard: Any, tmp_path: Path) -> None:
    interactions, vectors = checkerboard
    params = recommender_cases["sasrec-content"][0].model_copy(update={"new_item_cost": 1.0, "max_epochs": 1})
    data = training_data(interactions)
    model = build(params, data.num_users, data.num_items, vectors, seed=5)
    model.fit(data, checkpoint=tmp_path / "checkpoint", fingerprint="x", device=CPU)
    assert not model.new_item_offset_I.any()
    assert build(params, data.num_users, data.num_items, None, seed=5).new_item_offset_I is None  # ids alone
