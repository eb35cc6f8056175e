"""Principal axes against NumPy's eigendecomposition of the covariance."""

from __future__ import annotations

import numpy as np
import pytest

from sda_core import principal_axes as module
from sda_core.principal_axes import principal_axes, project


def _vectors(num_items: int, width: int = 6) -> np.ndarray:
    random = np.random.default_rng(3)
    scales = np.geomspace(1.0, 0.05, width)
    return (random.normal(size=(num_items, width)) * scales + 2.0).astype(np.float32)


@pytest.mark.parametrize("num_items", [40, 4], ids=["covariance", "singular values"])
@pytest.mark.parametrize("even", [False, True])
def test_axes_are_eigenvectors_of_the_covariance(num_items: int, even: bool) -> None:
    vectors, rows = _vectors(num_items), np.arange(0, num_items, 2) if num_items > 10 else np.arange(num_items)
    mean, axes = principal_axes(vectors, rows, 3, even=even)
    fitted = vectors[rows].astype(np.float64)
    np.testing.assert_allclose(mean, fitted.mean(axis=0))
    variance, wanted = np.linalg.eigh(np.cov(fitted.T, bias=True))
    variance, wanted = variance[::-1][:3], wanted[:, ::-1][:, :3]
    wanted = wanted * np.sign(wanted[np.abs(wanted).argmax(axis=0), np.arange(3)])
    if even:
        wanted = wanted / np.sqrt(variance + variance.mean())
    np.testing.assert_allclose(axes, wanted, atol=1e-8)
    np.testing.assert_allclose(project(vectors, mean, axes), (vectors - mean) @ wanted, atol=1e-5)


def test_there_are_no_more_axes_than_rows_or_columns() -> None:
    assert principal_axes(_vectors(40), np.arange(40), 100, even=False)[1].shape == (6, 6)
    assert principal_axes(_vectors(40), np.arange(2), 100, even=True)[1].shape == (6, 2)


def test_equal_rows_give_finite_axes() -> None:
    equal = np.full((5, 3), 0.7, dtype=np.float32)
    mean, axes = principal_axes(equal, np.arange(5), 3, even=True)
    assert np.isfinite(axes).all()
    assert not project(equal, mean, axes).any()


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = _vectors(40)
    whole = principal_axes(vectors, np.arange(40), 4, even=True)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 7)
    for one, other in zip(whole, principal_axes(vectors, np.arange(40), 4, even=True), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)
    np.testing.assert_allclose(project(vectors, *whole), (vectors - whole[0]) @ whole[1], atol=1e-5)
