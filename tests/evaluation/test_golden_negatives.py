"""Sampled negatives on another machine, or next year: the hash is part of what a published number means."""

from __future__ import annotations

import polars as pl
import pytest

from sda_core.evaluation import candidates, candidates_hash


@pytest.fixture(scope="module")
def shop() -> pl.DataFrame:
    """12 users of 5 items each by a rule, 150 items; no random number."""
    rows = [
        (user, (37 * user + place * place) % 150 + 1, ["train", "train", "train", "valid", "test"][place])
        for user in range(1, 13)
        for place in range(5)
    ]
    rows += [(13, item, "train") for item in range(1, 151)]
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String}, orient="row")


@pytest.mark.parametrize(
    ("protocol", "seed", "expected"),
    [
        ("uni100", 7, "9ad7c49becef721e5b5b30fca2499027ca4e607287726abb24f7e272f767f9d9"),
        ("uni100", 8, "b7864d55965034f12ecae4d026db6ddbc4740652bd09181d6ccd044b73228cbc"),
        ("pop100", 7, "5eb684f6ec2765e54b8fc368d2269ea361830124dc59c373087c7b50af54b703"),
    ],
)
def test_negatives_are_these(protocol: str, seed: int, expected: str, shop: pl.DataFrame) -> None:
    """A change here changes every sampled number there is: it belongs into CHANGELOG.md."""
    table = candidates(protocol, shop, seed)  # type: ignore[arg-type]
    assert table is not None
    assert table.shape == (12, 100)
    assert candidates_hash(table) == expected
