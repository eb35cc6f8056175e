"""Positions from scores to the last digit: every protocol under every tie policy, against sorted lists."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from sda_core.evaluation import candidates, score_positions
from sda_core.params import PopParams
from sda_core.ranking import place_targets
from sda_core.recommenders import Recommender, evaluation_data
from sda_core.recommenders.position import _compare_matrix, _compare_rows

CPU = torch.device("cpu")
NUM_USERS, NUM_ITEMS = 40, 130
PROTOCOLS = pytest.mark.parametrize("protocol", ["fullrank", "uni100", "pop100"])
POLICIES = pytest.mark.parametrize("ties", ["pessimistic", "mean", "optimistic"])


class Given(Recommender):
    """Scores that are given: one row per user."""

    def __init__(self, score_UI: torch.Tensor) -> None:
        super().__init__(PopParams(kind="pop", counts="train"), NUM_USERS, NUM_ITEMS, None)
        self.score_UI = score_UI

    def fit(self, data, *, checkpoint, fingerprint, device):
        return []

    def _score(self, user_ids_B, history_BL):
        return self.score_UI[user_ids_B].clone()


@pytest.fixture(scope="module")
def interactions() -> pl.DataFrame:
    """Users of 3 to 40 items, in which an item may come twice and the target may have come before; some have no test row."""
    random = np.random.default_rng(2)
    rows = [(1, NUM_ITEMS, 0, 1.0, "train")]
    for user in range(1, NUM_USERS + 1):
        history = (NUM_ITEMS * random.random(random.integers(3, 41)) ** 2).astype(int) + 1
        if user % 7 == 0:
            history[-1] = history[0]
        for place, item in enumerate(history.tolist(), start=1):
            from_end = len(history) - place
            split = "train" if from_end > 1 else "valid" if from_end == 1 else "test" if user % 9 else "test_rest"
            rows.append((user, item, place, 1.0, split))
    schema = {"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32, "split": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


@pytest.fixture(scope="module")
def negatives(interactions: pl.DataFrame) -> dict[str, np.ndarray | None]:
    """By protocol, what the stage draws."""
    return {"fullrank": None, **{name: candidates(name, interactions, 7) for name in ("uni100", "pop100")}}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pools(interactions: pl.DataFrame, negatives: dict[str, np.ndarray | None]) -> dict[str, dict[int, tuple[int, set[int]]]]:
    """By protocol and user, the target and the candidates beside it, from the rows alone."""
    found: dict[str, dict[int, tuple[int, set[int]]]] = {}
    rows = list(interactions.select("user_id", "item_id", "split").iter_rows())
    targets = {user: item for user, item, split in rows if split == "test"}
    for protocol, drawn in negatives.items():
        found[protocol] = {}
        for row, (user, target) in enumerate(targets.items()):
            earlier = {item for owner, item, split in rows if owner == user and split in ("train", "valid")}
            others = set(range(1, NUM_ITEMS + 1)) - earlier if drawn is None else set(drawn[row].tolist()) - {0}
            found[protocol][user] = (target, others - {target})
    return found


@PROTOCOLS
@POLICIES
@pytest.mark.parametrize("num_values", [3, 10**6])  # many ties, hardly one
def test_positions_are_places_in_a_sorted_list(protocol, ties, num_values, interactions, negatives, pools):
    scores = np.random.default_rng(num_values).integers(0, num_values, size=(NUM_USERS + 1, NUM_ITEMS + 1)).astype(np.float32)
    data = evaluation_data(interactions)
    placed = score_positions(place_targets(Given(torch.from_numpy(scores)), data, negatives[protocol], 8, CPU), ties)
    expected = pools[protocol]
    assert placed["user_id"].to_list() == list(expected)
    for user, target, position, num_candidates in placed.select(
        "user_id", "target_item_id", "position", "candidates"
    ).iter_rows():
        assert target == expected[user][0]
        pool = expected[user][1] | {target}
        assert num_candidates == len(pool)
        last = sorted(pool, key=lambda item: (-scores[user, item], item == target)).index(target) + 1
        first = sorted(pool, key=lambda item: (-scores[user, item], item != target)).index(target) + 1
        assert position == {"pessimistic": last, "mean": (first + last) / 2, "optimistic": first}[ties]


@PROTOCOLS
@POLICIES
@pytest.mark.parametrize("value", [0.0, -torch.inf])
def test_a_constant_scorer_gets_what_the_policy_says(protocol, ties, value, interactions, negatives, pools):
    """Whatever the constant is: the last place, the middle or the first one among the candidates of each user."""
    constant = Given(torch.full((NUM_USERS + 1, NUM_ITEMS + 1), value))
    placed = score_positions(place_targets(constant, evaluation_data(interactions), negatives[protocol], 8, CPU), ties)
    num_candidates = placed["candidates"].to_numpy()
    assert (num_candidates == [len(others) + 1 for _, others in pools[protocol].values()]).all()
    expected = {"pessimistic": num_candidates, "mean": (1 + num_candidates) / 2, "optimistic": np.ones(len(placed))}[ties]
    assert (placed["position"].to_numpy() == expected).all()


def test_rows_are_counted_as_whole_matrices_are():
    """A CPU counts row by row, other devices the whole matrix."""
    random = np.random.default_rng(3)
    score_BI = torch.from_numpy(random.choice([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf], size=(9, 300)).astype(np.float32))
    score_BI[:, 0] = torch.inf  # no item: would count as better
    target_score_B1 = score_BI[:, 7:8].clone()
    by_rows, as_a_matrix = _compare_rows(score_BI, target_score_B1), _compare_matrix(score_BI, target_score_B1)
    for counted, expected in zip(by_rows, as_a_matrix, strict=True):
        assert counted.dtype == expected.dtype == torch.int32
        assert counted.tolist() == expected.tolist()
    assert as_a_matrix[0].tolist() == [sum(row[1:] > row[7]) for row in score_BI.numpy()]
