"""Tail, head and cold items: the three definitions, on shops small enough to count by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.errors import DataError
from sda_core.evaluation import item_groups, training_counts
from sda_core.params import TailParams


def tail_params(definition: str = "train_lt_k", max_count: int = 4, share: float = 0.8) -> TailParams:
    return TailParams.model_validate({"definition": definition, "max_count": max_count, "share": share})


def shop_with(counts: dict[int, int], held_out: dict[int, int] | None = None) -> pl.DataFrame:
    """Interactions with the given training counts an item, and the given numbers of validation and test rows."""
    rows = [(item, "train") for item, count in counts.items() for _ in range(count)]
    rows += [(item, "test" if turn % 2 else "valid") for item, count in (held_out or {}).items() for turn in range(count)]
    return pl.DataFrame(
        {"user_id": range(1, len(rows) + 1), "item_id": [row[0] for row in rows], "split": [row[1] for row in rows]},
        schema={"user_id": pl.Int32, "item_id": pl.Int32, "split": pl.String},
    )


def ids(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def test_train_lt_k_by_hand() -> None:
    shop = shop_with({1: 3, 2: 4, 3: 10, 4: 1}, held_out={5: 7, 1: 5})
    groups = item_groups(shop, tail_params())
    assert ids(groups.tail) == {1, 4, 5}
    assert ids(groups.head) == {2, 3}
    assert ids(groups.cold) == {5}


def test_paper_counts_all_splits_and_may_be_empty() -> None:
    shop = shop_with({1: 3, 2: 4, 3: 10, 4: 1}, held_out={5: 7, 1: 5})
    assert ids(item_groups(shop, tail_params("paper")).tail) == {4}
    five_core = shop_with({1: 3, 2: 5}, held_out={1: 2})
    groups = item_groups(five_core, tail_params("paper"))
    assert not groups.tail.any()
    assert ids(groups.head) == {1, 2}


@pytest.mark.parametrize(
    ("counts", "share", "tail"),
    [
        ([1, 2, 3, 4, 5], 0.8, {1, 2, 3, 4}),
        ([5, 4, 3, 2, 1], 0.8, {2, 3, 4, 5}),
        ([1, 2, 2, 5], 0.5, {1}),  # cuts at 0.25 and 0.75 are equally far: the smaller
        ([1, 2, 2, 2, 5], 0.7, {1, 2, 3, 4}),
        ([1, 1, 1, 1, 1], 0.8, {1, 2, 3, 4, 5}),  # nothing tells them apart: all (1.0) is nearer to 0.8 than none
        ([1, 1, 1, 1, 1], 0.3, set()),
        ([1, 1, 1, 1, 9], 0.9, {1, 2, 3, 4}),
        ([1, 2, 3, 4, 5], 0.0, set()),
        ([1, 2, 3, 4, 5], 1.0, {1, 2, 3, 4, 5}),
    ],
)
def test_pareto_by_hand(counts: list[int], share: float, tail: set[int]) -> None:
    groups = item_groups(shop_with(dict(enumerate(counts, 1))), tail_params("pareto", share=share))
    assert ids(groups.tail) == tail
    assert ids(groups.head) == set(range(1, len(counts) + 1)) - tail


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=25).filter(any),
    st.sampled_from(get_args(TailParams.model_fields["definition"].annotation)),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_invariants(counts: list[int], definition: str, share: float, random) -> None:  # type: ignore[no-untyped-def]
    held_out = dict.fromkeys(range(1, len(counts) + 1), 1)
    params = tail_params(definition, share=share)
    groups = item_groups(shop_with(dict(enumerate(counts, 1)), held_out), params)
    assert [bool(mask[0]) for mask in (groups.tail, groups.head, groups.cold)] == [False] * 3  # padding
    assert (groups.tail[1:] ^ groups.head[1:]).all()  # a partition
    assert ids(groups.cold) == {item for item, count in enumerate(counts, 1) if count == 0}
    if groups.tail.any() and groups.head.any():
        numbers = np.array([0, *counts])
        assert numbers[groups.tail].max() < numbers[groups.head].min()  # rarer items first, equals never torn apart

    order = list(range(1, len(counts) + 1))
    random.shuffle(order)  # item i becomes order[i - 1]
    moved = {order[item - 1]: count for item, count in enumerate(counts, 1)}
    shuffled = item_groups(shop_with(moved, held_out).sample(fraction=1.0, shuffle=True, seed=1), params)
    assert {order[item - 1] for item in ids(groups.tail)} == ids(shuffled.tail)


def test_paper_counts_the_rest_of_a_split_by_time() -> None:
    shop = shop_with({1: 3, 2: 3}, held_out={1: 1})
    rest = shop[-1:].with_columns(split=pl.lit("test_rest"), item_id=pl.lit(2, pl.Int32))
    groups = item_groups(pl.concat([shop, rest]), tail_params("paper"))
    assert not groups.tail.any()
    assert ids(item_groups(pl.concat([shop, rest]), tail_params()).tail) == {1, 2}


def test_training_counts_leave_the_other_splits_out() -> None:
    assert training_counts(shop_with({1: 2, 3: 1}, held_out={2: 5, 3: 1}), 3).tolist() == [0, 2, 0, 1]


def test_items_that_nobody_has_met_belong_to_the_catalogue() -> None:
    """The last two of seven items have no interaction: they are tail and cold, and count for the share of pareto."""
    shop = shop_with({1: 6, 2: 2, 3: 4, 4: 3, 5: 5})
    groups = item_groups(shop, tail_params(), num_items=7)
    assert ids(groups.tail) == {2, 4, 6, 7}
    assert ids(groups.cold) == {6, 7}
    assert ids(groups.head) == {1, 3, 5}
    assert ids(item_groups(shop, tail_params("pareto", share=0.4)).tail) == {2, 4}
    assert ids(item_groups(shop, tail_params("pareto", share=0.4), num_items=7).tail) == {2, 6, 7}
    assert ids(item_groups(shop, tail_params("paper"), num_items=7).tail) == {2, 4, 6, 7}


def test_a_catalogue_smaller_than_its_interactions_is_refused() -> None:
    assert len(item_groups(shop_with({1: 1, 3: 1}), tail_params(), num_items=3).tail) == 4
    with pytest.raises(DataError, match="go up to item 3, the catalogue to 2"):
        item_groups(shop_with({1: 1, 3: 1}), tail_params(), num_items=2)


def test_no_interactions() -> None:
    with pytest.raises(DataError, match="interactions"):
        item_groups(shop_with({}), tail_params())
