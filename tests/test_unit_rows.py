"""Rows of length one."""

from __future__ import annotations

import numpy as np
import pytest

from sda_core.unit_rows import row_lengths, unit_rows


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_have_length_one_and_zero_rows_stay(dtype: type) -> None:
    rows = np.array([[3, 4], [0, 0], [0, -2]], dtype=dtype)
    assert row_lengths(rows).tolist() == [5, 0, 2]
    unit = unit_rows(rows)
    assert unit.dtype == dtype
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)
    assert rows[0].tolist() == [3, 4]
    half = rows[:, :1]  # a part of a wider matrix, in place
    assert unit_rows(half, out=half) is half
    assert rows.tolist() == [[1, 4], [0, 0], [0, -2]]
