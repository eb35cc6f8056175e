"""Code that experiments share: item vectors for a recommender."""

from __future__ import annotations

import numpy as np

from experiments import workspaces


def test_the_row_of_the_padding_is_zero_and_the_others_are_those_of_the_items() -> None:
    vectors_IF = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    made = workspaces.padded(vectors_IF)
    assert made.dtype == np.float32
    assert not made[0].any()
    np.testing.assert_array_equal(made[1:], vectors_IF)
