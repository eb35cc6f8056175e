"""Items that nobody bought in training, where learned ids and content stand side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from sda_core.recommenders import build, evaluation_data, training_data

CPU = torch.device("cpu")
COLD = (7, 8)  # one of each kind


@pytest.mark.parametrize("name", ["sasrec-content", "bert4rec-content"])
@pytest.mark.parametrize("id_dropout", [0.0, 0.3])
def test_content_alone_places_them(
    name: str, id_dropout: float, recommender_cases: Any, checkerboard: Any, tmp_path: Path
) -> None:
    """Every user gets the new item of the liked kind before most of the other kind, and the model is the same when loaded."""
    interactions, vectors = checkerboard
    interactions = interactions.filter(~(pl.col("item_id").is_in(COLD) & (pl.col("split") != "test")))
    num_items = len(vectors) - 1
    params = recommender_cases[name][0].model_copy(update={"representation": "id+content", "id_dropout": id_dropout})
    data = training_data(interactions, num_items=num_items)
    model = build(params, data.num_users, num_items, vectors, seed=5)
    model.fit(data, checkpoint=tmp_path / "checkpoint", fingerprint=name, device=CPU)
    known = evaluation_data(interactions, num_items=num_items)
    scores = model.score(torch.from_numpy(known.users), torch.from_numpy(known.histories.last(known.users, 12))).numpy()
    wins = []
    for row, user in enumerate(known.users):
        liked = next(item for item in COLD if item % 2 == user % 2)
        others = [item for item in range(1, num_items + 1) if item % 2 != user % 2 and item not in COLD]
        wins.append(scores[row, liked] > np.median(scores[row, others]))
    assert np.mean(wins) > 0.9
    assert not model.items.ids.weight[list(COLD)].any()
    assert model.items.ids.weight[[1, 2, 3]].any(dim=1).all()
