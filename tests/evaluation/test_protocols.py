"""Sampled candidates: what they may hold, what they may depend on, and how they are distributed."""

from __future__ import annotations

import logging

import numpy as np
import polars as pl
import pytest

from sda_core.evaluation import candidates, candidates_hash, evaluated_users


def shop_of(num_users: int, num_items: int, seed: int = 0, length: int = 6) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_items + 1) ** 0.5
    weights /= weights.sum()
    rows = [
        (user, int(item) + 1, split)
        for user in range(1, num_users + 1)
        for item, split in zip(
            random.choice(num_items, size=length, replace=False, p=weights),
            [*["train"] * (length - 2), "valid", "test"],
            strict=True,
        )
    ]
    # the last item exists whatever was drawn
    rows.append((1, num_items, "train"))
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String}, orient="row").unique(
        ["user_id", "item_id"], maintain_order=True
    )


SAMPLED = pytest.mark.parametrize("protocol", ["uni100", "pop100"])


def test_fullrank_has_no_table() -> None:
    assert candidates("fullrank", shop_of(5, 30), 7) is None


@SAMPLED
def test_rows_are_distinct_items_the_user_never_had(protocol: str) -> None:
    shop = shop_of(200, 500)
    table = candidates(protocol, shop, 7)  # type: ignore[arg-type]
    assert table is not None
    assert table.shape == (200, 100)
    assert table.dtype == np.int32
    for user, row in zip(evaluated_users(shop).tolist(), table, strict=True):
        own = set(shop.filter(pl.col("user_id") == user)["item_id"].to_list())
        assert len(set(row.tolist())) == 100
        assert not own & set(row.tolist())
        assert row.min() >= 1
        assert row.max() <= 500
        assert (np.diff(row) > 0).all()


@SAMPLED
def test_depends_on_nothing_but_the_data_and_the_seed(protocol: str) -> None:
    shop = shop_of(150, 400)
    table = candidates(protocol, shop, 7)  # type: ignore[arg-type]
    again = candidates(protocol, shop.sample(fraction=1.0, shuffle=True, seed=3), 7)  # type: ignore[arg-type]
    other = candidates(protocol, shop, 8)  # type: ignore[arg-type]
    assert table is not None
    assert again is not None
    assert other is not None
    np.testing.assert_array_equal(table, again)
    assert candidates_hash(table) == candidates_hash(again)
    assert candidates_hash(table) != candidates_hash(other)


def test_uniform_rows_do_not_depend_on_the_other_users() -> None:
    """A user's negatives stay the same when other users leave."""
    shop = shop_of(30, 400)
    fewer = shop.filter((pl.col("user_id") % 2 == 0) | (pl.col("item_id") == 400))
    whole, part = candidates("uni100", shop, 7), candidates("uni100", fewer, 7)
    assert whole is not None
    assert part is not None
    users = evaluated_users(fewer).tolist()
    kept = [row for user, row in zip(evaluated_users(shop).tolist(), whole, strict=True) if user in users]
    np.testing.assert_array_equal(part, np.array(kept))


def test_users_without_a_test_target_have_no_row() -> None:
    shop = shop_of(10, 200).filter(~((pl.col("user_id") == 4) & (pl.col("split") == "test")))
    assert 4 not in evaluated_users(shop).tolist()
    table = candidates("uni100", shop, 7)
    assert table is not None
    assert len(table) == 9


@SAMPLED
def test_what_a_user_took_after_the_target_is_no_negative(protocol: str) -> None:
    """A split by time: of 103 items the user has three, so that just a hundred are left."""
    rows = [(1, 1, "train"), (1, 2, "test"), (1, 3, "test_rest"), (2, 4, "train"), (2, 5, "valid_rest")]
    rows += [(3, item, "train") for item in range(1, 104)] + [(4, 3, "test_rest")]
    shop = pl.DataFrame(rows, schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String}, orient="row")
    assert evaluated_users(shop).tolist() == [1]  # a rest row alone makes no target
    table = candidates(protocol, shop, 7)  # type: ignore[arg-type]
    assert table is not None
    assert table.tolist() == [list(range(4, 104))]


def test_items_that_nobody_has_met_are_drawn_uniformly_and_never_by_popularity() -> None:
    shop = shop_of(200, 300)
    wider, popular = candidates("uni100", shop, 7, num_items=320), candidates("pop100", shop, 7, num_items=320)
    assert wider is not None
    assert popular is not None
    drawn = np.bincount(wider.ravel(), minlength=321)
    assert drawn[301:].min() > 0  # of 200 users x 100 of 314 each is drawn 64 times on average
    assert popular.max() <= 300
    known = candidates("uni100", shop, 7)
    assert known is not None
    np.testing.assert_array_equal(known, candidates("uni100", shop, 7, num_items=300))


def test_uniform_is_uniform_and_popular_is_popular() -> None:
    shop = shop_of(600, 300, length=5)
    uniform, popular = candidates("uni100", shop, 7), candidates("pop100", shop, 7)
    assert uniform is not None
    assert popular is not None
    train = shop.filter(pl.col("split") == "train")
    own = np.bincount(shop["item_id"].to_numpy(), minlength=301)[1:]
    free = 600 - own  # users that could have drawn the item
    drawn = np.bincount(uniform.ravel(), minlength=301)[1:]
    expected = free * 100 / 295
    assert abs(drawn - expected).max() < 6 * np.sqrt(expected.max())
    counts = np.bincount(train["item_id"].to_numpy(), minlength=301)[1:]
    share = np.bincount(popular.ravel(), minlength=301)[1:] / np.maximum(free, 1)
    assert share[counts == 0].max() == 0  # what was never bought in training is never drawn
    assert share[:10].mean() > 3 * share[100:][counts[100:] > 0].mean()


def test_popular_first_draws_follow_the_counts() -> None:
    """With one place to fill, the chance of an item is its share of the training rows (other than the user's own)."""
    from sda_core.evaluation.protocols import _draw

    urn = np.repeat(np.arange(1, 5, dtype=np.int32), [1, 2, 3, 94])
    random = np.random.default_rng(0)
    drawn = [int(_draw(urn, np.array([4], dtype=np.int32), 1, random)[0]) for _ in range(6000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5)[1:] / 6000, [1 / 6, 2 / 6, 3 / 6, 0], atol=0.025)


def test_the_slow_path_continues_the_same_distribution() -> None:
    """Two of three items are drawn in proportion to 1 : 1 : 9998, so the loop gives up and exponential keys take over."""
    from sda_core.evaluation.protocols import _draw

    urn = np.repeat(np.arange(1, 4, dtype=np.int32), [1, 1, 9998])
    random = np.random.default_rng(0)
    drawn = [tuple(_draw(urn, np.array([], dtype=np.int32), 2, random).tolist()) for _ in range(2000)]
    assert all(3 in pair for pair in drawn)
    assert sum(1 in pair for pair in drawn) / 2000 == pytest.approx(0.5, abs=0.05)


@SAMPLED
def test_small_catalogue_gives_what_there_is_and_says_so(protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    shop = shop_of(8, 40)
    with caplog.at_level(logging.WARNING):
        table = candidates(protocol, shop, 7)  # type: ignore[arg-type]
    assert table is not None
    assert "too small" in caplog.text
    sold = set(shop.filter(pl.col("split") == "train")["item_id"].to_list()) if protocol == "pop100" else set(range(1, 41))
    for user, row in zip(evaluated_users(shop).tolist(), table, strict=True):
        own = set(shop.filter(pl.col("user_id") == user)["item_id"].to_list())
        assert sorted(sold - own) == [item for item in row.tolist() if item]
        assert not row[len(sold - own) :].any()


def test_hash_sees_shape_and_values() -> None:
    table = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    assert candidates_hash(table) == candidates_hash(np.asfortranarray(table)) == candidates_hash(table.astype(np.int64))
    assert candidates_hash(table) != candidates_hash(table.reshape(4, 3))
    changed = table.copy()
    changed[0, 0] = 99
    assert candidates_hash(table) != candidates_hash(changed)
    assert len(candidates_hash(table)) == 64
