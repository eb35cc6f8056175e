"""Stored negatives: equal bytes, checked on use, and no comparison across different ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import NEGATIVES, SEED_POSITIONS
from sda_core.errors import ArtifactError
from sda_core.evaluation import (
    candidates,
    candidates_hash,
    check_same_negatives,
    evaluated_users,
    negatives_of,
    read_negatives,
    write_negatives,
)
from sda_core.params import EvaluateParams
from tests.evaluation.test_protocols import shop_of

NUM_ITEMS = 210


def params(protocol: str = "uni100", seed: int = 7) -> EvaluateParams:
    section = YAML(typ="safe").load((Path(__file__).parents[2] / "params.yaml").read_text())["evaluate"]
    changed = {"protocol": protocol, "negatives_seed": seed, "cutoffs": tuple(section["cutoffs"])}
    return EvaluateParams.model_validate(section | changed)


@pytest.fixture(scope="module")
def shop() -> pl.DataFrame:
    return shop_of(40, 200)


@pytest.mark.parametrize("protocol", ["uni100", "pop100"])
def test_what_is_read_is_what_was_drawn(protocol: str, shop: pl.DataFrame, tmp_path: Path) -> None:
    path, again = tmp_path / "a" / "n.parquet", tmp_path / "b" / "n.parquet"
    drawn = write_negatives(path, shop, params(protocol), NUM_ITEMS)
    write_negatives(again, shop.sample(fraction=1.0, shuffle=True, seed=1), params(protocol), NUM_ITEMS)
    assert path.read_bytes() == again.read_bytes()
    found = read_negatives(path, shop, params(protocol))
    expected = candidates(protocol, shop, 7, NUM_ITEMS)  # type: ignore[arg-type]
    assert expected is not None
    assert found.table_UN is not None
    np.testing.assert_array_equal(found.table_UN, expected)
    assert found.table_UN.dtype == np.int32
    assert found.sha256 == drawn.sha256 == candidates_hash(expected)
    assert found.metadata == {"negatives_sha256": candidates_hash(expected)}
    assert NEGATIVES.metadata(path) == {"protocol": protocol, "seed": "7", "sha256": found.sha256}
    assert NEGATIVES.read(path)["user_id"].to_list() == evaluated_users(shop).tolist()


def test_fullrank_has_an_empty_table_that_is_not_needed(shop: pl.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "fullrank.parquet"
    assert write_negatives(path, shop, params("fullrank"), NUM_ITEMS).metadata == {}
    assert len(NEGATIVES.read(path)) == 0
    assert NEGATIVES.metadata(path) == {"protocol": "fullrank"}
    path.unlink()
    found = read_negatives(path, shop, params("fullrank"))
    assert found.table_UN is None
    assert found.metadata == {}


def test_what_does_not_belong_here_is_refused(shop: pl.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "uni100.parquet"
    with pytest.raises(ArtifactError, match="negatives table is missing"):
        read_negatives(path, shop, params())
    write_negatives(path, shop, params(), NUM_ITEMS)
    with pytest.raises(ArtifactError, match=r"drawn with protocol uni100, params.yaml says pop100"):
        read_negatives(path, shop, params("pop100"))
    with pytest.raises(ArtifactError, match=r"drawn with seed 7, params.yaml says 8"):
        read_negatives(path, shop, params(seed=8))
    with pytest.raises(ArtifactError, match="other users"):
        read_negatives(path, shop.filter(pl.col("user_id") != 3), params())
    frame, told = NEGATIVES.read(path), NEGATIVES.metadata(path)
    changed = frame.with_columns(pl.Series("candidates", frame["candidates"].to_numpy()[::-1], dtype=pl.Array(pl.Int32, 100)))
    NEGATIVES.write(changed, path, told)
    with pytest.raises(ArtifactError, match=r"its negatives have sha256 \w+, its metadata says"):
        read_negatives(path, shop, params())
    NEGATIVES.write(frame, path)
    with pytest.raises(ArtifactError, match="drawn with protocol None"):
        read_negatives(path, shop, params())


def test_positions_of_other_negatives_are_not_compared(tmp_path: Path) -> None:
    columns = {
        "seed": [1],
        "user_id": [1],
        "target_item_id": [2],
        "position": [1.0],
        "candidates": [101],
        "num_better": [0],
        "num_tied": [0],
    }
    frame = pl.DataFrame(columns, schema=dict(SEED_POSITIONS.columns))
    paths = [tmp_path / f"{name}.parquet" for name in ("a", "b", "untold", "c")]
    for path, told in zip(
        paths, ({"negatives_sha256": "1" * 64}, {"negatives_sha256": "1" * 64}, None, {"negatives_sha256": "2" * 64}), strict=True
    ):
        SEED_POSITIONS.write(frame, path, told)
    assert negatives_of(paths[0]) == {"negatives_sha256": "1" * 64}
    assert negatives_of(paths[2]) == {}
    check_same_negatives(paths[:3])
    with pytest.raises(ArtifactError, match=r"c.parquet: was ranked among other negatives \(222222222222\) than .*a.parquet"):
        check_same_negatives(paths)


def test_metadata_are_all_that_differs(tmp_path: Path) -> None:
    """A table that is told nothing has the bytes it always had."""
    frame = pl.DataFrame({"user_id": [1], "candidates": [[1] * 100]}, schema=dict(NEGATIVES.columns))
    NEGATIVES.write(frame, tmp_path / "a")
    NEGATIVES.write(frame, tmp_path / "b", {})
    frame.write_parquet(tmp_path / "c", compression="zstd", row_group_size=65_536, statistics=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert NEGATIVES.metadata(tmp_path / "a") == {}
    NEGATIVES.write(frame, tmp_path / "d", {"b": "2", "a": "1"})
    assert NEGATIVES.metadata(tmp_path / "d") == {"a": "1", "b": "2"}
    assert NEGATIVES.read(tmp_path / "d").equals(frame)
