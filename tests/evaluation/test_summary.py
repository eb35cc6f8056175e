"""From counts to the flat numbers of a metrics file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import sda_core.evaluation
from sda_core.artifacts import POSITIONS
from sda_core.errors import DataError
from sda_core.evaluation import score_positions, summarise
from sda_core.params import EvaluateParams
from tests.sections import seeded


def summary_params(**changes: object) -> EvaluateParams:
    values: dict[str, object] = {
        "protocol": "fullrank", "cutoffs": (1, 10), "ties": "pessimistic",
        "tail": {"definition": "train_lt_k", "max_count": 4, "share": 0.8},
        "negatives_seed": 7, "bootstrap_samples": 100, "bootstrap_seed": 7, "batch_size": 64, "retrieval": None,
    }  # fmt: skip
    return EvaluateParams.model_validate({**values, **changes})


def counted(rows: list[tuple[int, int, int, int, int]]) -> pl.DataFrame:
    columns = ["user_id", "target_item_id", "num_better", "num_tied", "candidates"]
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.Int32), orient="row")


@pytest.fixture
def shop() -> pl.DataFrame:
    """Item 1 sells well, item 2 sold twice, item 3 never in training; users 1..4 have test targets 1, 2, 3, 1."""
    rows = [(10 + n, 1, "train") for n in range(6)] + [(20 + n, 2, "train") for n in range(2)] + [(30, 3, "valid")]
    rows += [(1, 1, "test"), (2, 2, "test"), (3, 3, "test"), (4, 1, "test")]
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String}, orient="row")


PLACED = counted([(3, 3, 4, 0, 30), (1, 1, 0, 0, 30), (2, 2, 0, 2, 30), (4, 1, 20, 0, 30)])


def test_score_positions_gives_the_table(tmp_path: Path) -> None:
    frame = score_positions(PLACED, "mean")
    assert frame["user_id"].to_list() == [1, 2, 3, 4]
    assert frame["position"].to_list() == [1.0, 2.0, 5.0, 21.0]
    POSITIONS.write(frame, tmp_path / "positions.parquet")
    assert POSITIONS.read(tmp_path / "positions.parquet").equals(frame)
    assert list(frame.columns) == list(POSITIONS.columns)


@pytest.mark.parametrize(
    ("ties", "positions"), [("pessimistic", [1, 3, 5, 21]), ("mean", [1, 2, 5, 21]), ("optimistic", [1, 1, 5, 21])]
)
def test_score_positions_under_each_policy(ties: str, positions: list[float]) -> None:
    assert score_positions(PLACED, ties)["position"].to_list() == positions  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (PLACED.drop("num_tied"), "no column num_tied"),
        (pl.concat([PLACED, PLACED]), "occurs twice"),
        (counted([(1, 1, 20, 10, 30)]), "less than candidates"),
    ],
)
def test_score_positions_refuses(frame: pl.DataFrame, what: str) -> None:
    with pytest.raises(DataError, match=what):
        score_positions(frame, "mean")


def test_summary_by_hand(shop: pl.DataFrame) -> None:
    numbers = summarise(score_positions(PLACED, "pessimistic"), shop, summary_params())
    assert numbers["num_users"] == 4
    assert numbers["hit@1"] == 1 / 4
    assert numbers["hit@10"] == 3 / 4
    assert numbers["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(6)) / 4)
    assert numbers["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 5 + 1 / 21) / 4)
    assert (numbers["tail_num_users"], numbers["tail_num_items"]) == (2, 2)
    assert numbers["tail_hit@10"] == 1.0
    assert numbers["tail_ndcg@10"] == pytest.approx((1 / math.log2(4) + 1 / math.log2(6)) / 2)
    assert numbers["head_num_users"] == 2
    assert numbers["head_hit@10"] == 1 / 2
    assert (numbers["cold_num_users"], numbers["cold_num_items"]) == (1, 1)
    assert numbers["cold_mrr"] == pytest.approx(1 / 5)
    for name in ("hit@10", "ndcg@10", "tail_hit@10", "tail_ndcg@10"):
        assert numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"]
    assert "head_hit@10_low" not in numbers
    assert all(type(value) in (int, float) for value in numbers.values())
    json.dumps(numbers, allow_nan=False)


def test_numbers_are_means_over_the_seeds(shop: pl.DataFrame) -> None:
    other = counted([(1, 1, 3, 0, 30), (2, 2, 0, 0, 30), (3, 3, 4, 0, 30), (4, 1, 0, 0, 30)])
    tables = [score_positions(placed, "pessimistic") for placed in (PLACED, other)]
    alone = [summarise(table, shop, summary_params()) for table in tables]
    numbers = summarise(seeded(*tables), shop, summary_params())
    assert (numbers["num_seeds"], alone[0]["num_seeds"]) == (2, 1)
    for name in ("hit@1", "ndcg@10", "mrr", "tail_ndcg@10", "head_hit@10", "cold_ndcg@10"):
        assert numbers[name] == pytest.approx(np.mean([one[name] for one in alone]))
    assert numbers["ndcg@10_seed_sd"] == pytest.approx(np.std([one["ndcg@10"] for one in alone], ddof=1))
    assert numbers["num_users"] == 4
    assert "ndcg@10_seed_sd" not in alone[0]
    assert {name for name in numbers if name.endswith("_seed_sd")} == {
        f"{prefix}{metric}@{cutoff}_seed_sd" for prefix in ("", "tail_") for metric in ("hit", "ndcg") for cutoff in (1, 10)
    }


def test_an_empty_group_has_no_numbers(shop: pl.DataFrame) -> None:
    params = summary_params(tail={"definition": "paper", "max_count": 1, "share": 0.8})
    numbers = summarise(score_positions(PLACED, "pessimistic"), shop, params)
    assert [key for key in numbers if key.startswith("tail_")] == ["tail_num_users", "tail_num_items"]
    assert numbers["tail_num_users"] == 0


def test_no_samples_no_intervals(shop: pl.DataFrame) -> None:
    numbers = summarise(score_positions(PLACED, "pessimistic"), shop, summary_params(bootstrap_samples=0))
    assert not [key for key in numbers if key.endswith(("_low", "_high"))]


def test_row_order_is_nothing(shop: pl.DataFrame) -> None:
    positions = score_positions(PLACED, "mean")
    first = summarise(positions, shop, summary_params())
    second = summarise(positions.reverse(), shop.sample(fraction=1.0, shuffle=True, seed=1), summary_params())
    assert list(first) == list(second)
    assert first == pytest.approx(second, rel=1e-12)


def test_constant_scorer_under_each_policy(shop: pl.DataFrame) -> None:
    """All scores equal among 30 candidates: last, middle or first place for everybody."""
    placed = counted([(1, 1, 0, 29, 30), (2, 2, 0, 29, 30), (3, 3, 0, 29, 30), (4, 1, 0, 29, 30)])
    for ties, place in (("pessimistic", 30), ("mean", 15.5), ("optimistic", 1)):
        numbers = summarise(score_positions(placed, ties), shop, summary_params())  # type: ignore[arg-type]
        assert numbers["mrr"] == pytest.approx(1 / place)
        assert numbers["hit@10"] == float(place <= 10)


def test_unknown_target_or_no_users(shop: pl.DataFrame) -> None:
    positions = score_positions(counted([(1, 99, 0, 0, 30)]), "mean")
    with pytest.raises(DataError, match="not in the catalogue"):
        summarise(positions, shop, summary_params())
    with pytest.raises(DataError, match="no user has a test target"):
        summarise(positions.clear(), shop, summary_params())


def test_large_evaluations_are_quick(shop: pl.DataFrame) -> None:
    """The resampling works on distinct values, so a hundred thousand users take the memory of a few: 1,000 x U would be GBs."""
    users = np.arange(1, 100_001)
    placed = pl.DataFrame(
        {
            "user_id": users,
            "target_item_id": users % 3 + 1,
            "num_better": users % 50,
            "num_tied": users * 0,
            "candidates": users * 0 + 60,
        }
    )
    numbers = summarise(score_positions(placed, "mean"), shop, summary_params(bootstrap_samples=1000))
    assert numbers["hit@10_high"] - numbers["hit@10_low"] < 0.01


def test_public_names_and_no_torch() -> None:
    assert sorted(sda_core.evaluation.__all__) == sda_core.evaluation.__all__
    for name in sda_core.evaluation.__all__:
        assert hasattr(sda_core.evaluation, name)
    program = "import sys, sda_core.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
