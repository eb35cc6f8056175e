"""Positions against brute force, and the popularity numbers of a real data set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.errors import TrainingError
from sda_core.params import PopParams
from sda_core.ranking import place_targets
from sda_core.recommenders import Recommender, build, evaluation_data, position, training_data
from sda_core.recommenders.position import ndcg_at_10

CPU = torch.device("cpu")


class Given(Recommender):
    """Scores that are given: one row per user."""

    def __init__(self, score_UI: torch.Tensor) -> None:
        super().__init__(PopParams(kind="pop", counts="train"), len(score_UI) - 1, score_UI.shape[1] - 1, None)
        self.score_UI = score_UI

    def fit(self, data, *, checkpoint, fingerprint, device):
        return []

    def _score(self, user_ids_B, history_BL):
        return self.score_UI[user_ids_B].clone()


@st.composite
def _worlds(draw):
    num_items = draw(st.integers(3, 12))
    histories = draw(st.lists(st.lists(st.integers(1, num_items), min_size=3, max_size=9), min_size=1, max_size=7))
    values = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0, torch.inf])  # few values: ties abound
    scores = draw(
        st.lists(
            st.lists(values, min_size=num_items + 1, max_size=num_items + 1),
            min_size=len(histories) + 1,
            max_size=len(histories) + 1,
        )
    )
    candidates = draw(
        st.none()
        | st.lists(st.lists(st.integers(0, num_items), min_size=4, max_size=4), min_size=len(histories), max_size=len(histories))
    )
    return num_items, histories, scores, candidates, draw(st.integers(1, 9))


@settings(deadline=None, max_examples=50)
@given(_worlds())
def test_counts_equal_brute_force(world):
    num_items, histories, scores, candidates, batch_size = world
    rows = [
        (user, item, place, 1.0, "test" if place == len(history) - 1 else "train")
        for user, history in enumerate(histories, start=1)
        for place, item in enumerate(history)
    ]
    schema = {"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32, "split": pl.String}
    data = evaluation_data(pl.DataFrame(rows, schema=schema, orient="row"), num_items=num_items)
    given_candidates = None if candidates is None else np.array(candidates, dtype=np.int32)
    placed = place_targets(Given(torch.tensor(scores)), data, given_candidates, batch_size, CPU)
    assert dict(placed.schema) == dict.fromkeys(["user_id", "target_item_id", "num_better", "num_tied", "candidates"], pl.Int32)
    for row, (user, history) in enumerate(enumerate(histories, start=1)):
        target = history[-1]
        pool = set(range(1, num_items + 1)) - set(history[:-1]) if candidates is None else set(candidates[row]) - {0}
        others = pool - {target}
        expected = (
            user,
            target,
            sum(scores[user][item] > scores[user][target] for item in others),
            sum(scores[user][item] == scores[user][target] for item in others),
            len(others) + 1,
        )
        assert placed.row(row) == expected


def test_chunks_change_nothing(fitted, checkerboard, monkeypatch):
    data = evaluation_data(checkerboard[0])
    for name in ("sasrec-content", "bpr"):
        recommender, _, _ = fitted(name)
        expected = place_targets(recommender, data, None, 48, CPU)
        assert place_targets(recommender, data, None, 5, CPU).equals(expected)
    monkeypatch.setattr(position, "SCORES_PER_CHUNK", 60)
    assert place_targets(recommender, data, None, 48, CPU).equals(expected)


@pytest.mark.parametrize(("batch_size", "cap", "largest"), [(1000, 70, 6), (4, 10**6, 4), (1000, 3, 1)])
def test_no_score_matrix_is_larger_than_the_cap(batch_size, cap, largest, make_table, monkeypatch):
    """A large catalogue is scored for fewer users at once, one by one in the end; never for all of them."""
    rows: list[int] = []

    class Watched(Given):
        def _score(self, user_ids_B, history_BL):
            rows.append(len(user_ids_B))
            return super()._score(user_ids_B, history_BL)

    data = evaluation_data(make_table([[1, 2, 3], [3, 4, 10]] * 20))
    monkeypatch.setattr(position, "SCORES_PER_CHUNK", cap)
    placed = place_targets(Watched(torch.rand(41, 11)), data, None, batch_size, CPU)
    assert len(placed) == sum(rows) == 40
    assert max(rows) == largest


def test_nan_is_an_error(make_table):
    data = evaluation_data(make_table([[1, 2, 3], [3, 2, 1]]))
    scores = torch.zeros(3, 4)
    scores[2, 2] = torch.nan
    with pytest.raises(TrainingError, match="NaN"):
        place_targets(Given(scores), data, None, 8, CPU)


def test_ndcg_counts_ties_against_the_target():
    counts = np.array([[0, 0, 50], [2, 0, 50], [8, 1, 50], [8, 2, 50], [0, 49, 50]])
    assert ndcg_at_10(counts) == pytest.approx((1.0 + 0.5 + 1 / np.log2(11) + 0 + 0) / 5)


@pytest.fixture(scope="module")
def beauty(real_data: Path) -> pl.DataFrame:
    """The full Beauty 5-core of the 2014 edition, leave-one-out."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    rows = []
    with gzip.open(real_data / "beauty_2014_sequences" / "reviews_Beauty_5.json.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            review = json.loads(line)
            user = users.setdefault(review["reviewerID"], len(users) + 1)
            rows.append((user, items.setdefault(review["asin"], len(items) + 1), review["unixReviewTime"]))
    frame = pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64}, orient="row")
    frame = frame.sort("user_id", "timestamp", maintain_order=True)
    from_end = pl.len().over("user_id") - 1 - pl.int_range(pl.len()).over("user_id")
    split = pl.when(from_end == 0).then(pl.lit("test")).when(from_end == 1).then(pl.lit("valid")).otherwise(pl.lit("train"))
    return frame.with_columns(rating=pl.lit(5.0, pl.Float32), split=split)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("counts", "pessimistic", "half_the_ties"),
    [
        ("all", (0.0152, 0.0068), (0.0152, 0.0068)),
        ("train_valid", (0.0130, 0.0059), (0.0141, 0.0063)),
        ("train", (0.0110, 0.0053), (0.0120, 0.0056)),
    ],
)
def test_popularity_on_beauty_gives_the_known_numbers(counts, pessimistic, half_the_ties, beauty, tmp_path):
    """Hit@10 and NDCG@10.  With counts of all splits it is the published PopRec row, which thereby leaks."""
    leaked = beauty.filter(pl.col("split") == "test")["item_id"].to_numpy() if counts == "all" else None
    data = training_data(beauty, leaked_test_items=leaked)
    assert (data.num_users, data.num_items, len(beauty)) == (22_363, 12_101, 198_502)
    pop = build(PopParams(kind="pop", counts=counts), data.num_users, data.num_items, None, seed=5)
    pop.fit(data, checkpoint=tmp_path / "unused", fingerprint="", device=CPU)
    placed = place_targets(pop, evaluation_data(beauty), None, 256, CPU)
    better, tied = placed["num_better"].to_numpy(), placed["num_tied"].to_numpy()
    for share, expected in ((1.0, pessimistic), (0.5, half_the_ties)):
        before = better + share * tied  # items before the target; it is hit where fewer than 10 are
        found = (before < 10).mean(), np.where(before < 10, 1 / np.log2(2 + before), 0).mean()
        assert found == pytest.approx(expected, abs=5.1e-5)
