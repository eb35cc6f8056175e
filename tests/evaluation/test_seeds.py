"""Positions of several seeds side by side."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from sda_core.artifacts import POSITIONS, SEED_POSITIONS
from sda_core.errors import DataError
from sda_core.evaluation import hit, ndcg, stack
from sda_core.evaluation.seeds import seed_sd
from tests.sections import seeded


def placed(places: list[float], targets: tuple[int, ...] = (3, 1, 2)) -> pl.DataFrame:
    columns = {
        "user_id": [5, 2, 9],
        "target_item_id": list(targets),
        "position": places,
        "candidates": [30] * 3,
        "num_better": [0] * 3,
        "num_tied": [0] * 3,
    }
    return pl.DataFrame(columns, schema=dict(POSITIONS.columns))


def test_users_ascend_and_seeds_keep_their_order() -> None:
    table = pl.concat([seeded(placed([1.0, 2.0, 3.0]), first=7), seeded(placed([4.0, 5.0, 6.0]), first=3)])
    assert table.schema == pl.Schema(SEED_POSITIONS.columns)
    found = stack(table)
    assert found.seeds == (7, 3)
    assert found.user_U.tolist() == [2, 5, 9]
    assert found.target_U.tolist() == [1, 3, 2]
    np.testing.assert_array_equal(found.position_SU, [[2, 1, 3], [5, 4, 6]])
    shuffled = stack(table.sample(fraction=1.0, shuffle=True, seed=1).sort("seed", descending=True))
    np.testing.assert_array_equal(shuffled.position_SU, found.position_SU)


def test_a_table_without_seeds_is_one_seed() -> None:
    found = stack(placed([1.0, 2.0, 3.0]))
    assert found.seeds == (0,)
    assert found.position_SU.shape == (1, 3)


def test_values_are_those_of_each_seed() -> None:
    rows = [[1.0, 12.0, 3.0], [4.0, 5.0, 60.0]]
    found = stack(seeded(*map(placed, rows)))
    for metric, function in (("hit", hit), ("ndcg", ndcg)):
        value_SU = found.values(metric, 10)
        np.testing.assert_allclose(value_SU.mean(axis=1), [function(row, 10) for row in rows])
    mask = np.array([False, True, True, False])  # items 1 and 2: users 2 and 9
    np.testing.assert_allclose(found.values("hit", 10, mask), [[0, 1], [1, 0]])
    assert seed_sd(found.values("hit", 10)) == 0.0
    assert seed_sd(found.values("hit", 10)[:1]) is None


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (placed([1.0, 2.0, 3.0], targets=(3, 1, 1)), "seeds 1 and 2 do not have the same users"),
        (placed([1.0, 2.0, 3.0]).head(2), "seeds 1 and 2 do not have the same users"),
        (placed([1.0, 2.0, 3.0]).with_columns(user_id=pl.lit(1, pl.Int32)), "a user occurs twice"),
    ],
)
def test_seeds_that_do_not_belong_together_are_refused(other: pl.DataFrame, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        stack(seeded(placed([1.0, 2.0, 3.0]), other))
