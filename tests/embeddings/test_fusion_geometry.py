"""Weights, balance and scaling of fused item vectors, and the base beside the adapted ones, against NumPy and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from sda_core.embeddings.fusion import fuse
from sda_core.params import ExportParams
from tests.sections import SHIPPED, changed

EVERY = np.arange(1, 201)
HAS_IMAGE = np.ones(200, dtype=bool)


def export(**changes: Any) -> ExportParams:
    return changed(SHIPPED.export_embeddings, **({"fused_dim": 6, "center": False, "normalize": False} | changes))


def halves(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(200, 3)) @ random.normal(size=(3, 16))
    both = (shared + 0.3 * random.normal(size=(200, 16)) + 2).astype(np.float32)
    return scale * both[:, :8], both[:, 8:].copy()


def test_weights_are_factors() -> None:
    image, text = halves()
    found = fuse(image, text, HAS_IMAGE, EVERY, export(fusion="concat", image_weight=0.5, text_weight=2.0))
    np.testing.assert_allclose(found, np.hstack([0.5 * image, 2 * text]), rtol=1e-6)
    alone = fuse(image, text, HAS_IMAGE, EVERY, export(image_weight=0.0))
    oracle = PCA(n_components=6, svd_solver="full").fit_transform(text.astype(np.float64))
    np.testing.assert_allclose(np.abs(alone), np.abs(oracle), atol=1e-4)


def test_equal_energy_makes_both_modalities_vary_alike() -> None:
    image, text = halves(scale=30.0)
    found = fuse(image, text, HAS_IMAGE, EVERY, export(fusion="concat", balance="equal_energy"))
    spreads = [((part - part.mean(0)) ** 2).sum(1).mean() for part in (found[:, :8], found[:, 8:])]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-4)
    before = [((part.astype(np.float64) - part.mean(0)) ** 2).sum(1).mean() for part in (image, text)]
    assert sum(spreads) == pytest.approx(sum(before), rel=1e-4), "what both have together stays"
    twice = fuse(2 * image, text, HAS_IMAGE, EVERY, export(balance="equal_energy"))
    once = fuse(image, text, HAS_IMAGE, EVERY, export(balance="equal_energy"))
    cosines = [x @ x.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1)) for x in (once, twice)]
    np.testing.assert_allclose(*cosines, atol=1e-3)


def test_equal_energy_looks_at_fitted_rows_only() -> None:
    image, text = halves()
    fit_ids = np.arange(1, 101)
    options = export(fusion="concat", balance="equal_energy")
    before = fuse(image, text, HAS_IMAGE, fit_ids, options)
    image[150] *= 50
    after = fuse(image, text, HAS_IMAGE, fit_ids, options)
    assert np.flatnonzero(np.abs(before - after).max(1) > 1e-6).tolist() == [150]


def test_a_modality_without_variation_is_left_as_it_is() -> None:
    image, text = halves()
    found = fuse(np.full_like(image, 3.0), text, HAS_IMAGE, EVERY, export(fusion="concat", balance="equal_energy"))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, :8], 3.0)


@pytest.mark.parametrize("num_fit", [12, 200], ids=["svd", "covariance"])
def test_even_scaling_divides_by_variance_plus_mean_variance(num_fit: int) -> None:
    image, text = halves()
    fit_ids = EVERY[:num_fit]
    plain = fuse(image, text, HAS_IMAGE, fit_ids, export()).astype(np.float64)
    even = fuse(image, text, HAS_IMAGE, fit_ids, export(axis_scaling="even"))
    variance = plain[:num_fit].var(0)
    np.testing.assert_allclose(even, plain / np.sqrt(variance + variance.mean()), rtol=1e-3, atol=1e-5)
    spread = even[:num_fit].var(0)
    assert spread.max() < 1
    assert spread.max() / spread.min() < variance.max() / variance.min()
    assert (np.diff(spread) <= 1e-6).all(), "the order of the components stays"


def test_the_base_stands_behind_the_adapted_vectors() -> None:
    (image, text), base = halves(), halves(seed=1)
    found = fuse(image, text, HAS_IMAGE, EVERY, export(fusion="concat", image_weight=0.5, with_base=True), base)
    np.testing.assert_allclose(found, np.hstack([0.5 * image, text, 0.5 * base[0], base[1]]), rtol=1e-6)
    components = fuse(image, text, HAS_IMAGE, EVERY, export(with_base=True), base)
    joined = np.hstack([image, text, *base]).astype(np.float64)
    np.testing.assert_allclose(
        np.abs(components), np.abs(PCA(n_components=6, svd_solver="full").fit_transform(joined)), atol=1e-3
    )


def test_an_item_without_an_image_takes_the_mean_of_either_kind() -> None:
    (image, text), base = halves(), halves(seed=1)
    has_image = HAS_IMAGE.copy()
    has_image[7] = False
    found = fuse(image, text, has_image, EVERY, export(fusion="concat", with_base=True), base)
    known = np.delete(np.arange(200), 7)
    np.testing.assert_allclose(found[7, :8], image[known].mean(0), atol=1e-5)
    np.testing.assert_allclose(found[7, 16:24], base[0][known].mean(0), atol=1e-5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("num_fit", [120, 200], ids=["some-fitted", "all-fitted"])
def test_centred_rows_are_scaled_to_unit_length_around_the_mean_of_the_fitted_ones(num_fit: int) -> None:
    image, text = halves(scale=3.0)
    fit_ids, centred = EVERY[:num_fit], {"center": True, "normalize": True}
    expected = [unit(part.astype(np.float64) - part[:num_fit].astype(np.float64).mean(0)) for part in (image, text)]
    found = fuse(image, text, HAS_IMAGE, fit_ids, export(fusion="concat", **centred))
    np.testing.assert_allclose(found, np.hstack(expected) / np.sqrt(2), atol=1e-6)
    for fusion, oracle in zip(("image", "text"), expected, strict=True):
        np.testing.assert_allclose(fuse(image, text, HAS_IMAGE, fit_ids, export(fusion=fusion, **centred)), oracle, atol=1e-6)
    components = fuse(image, text, HAS_IMAGE, fit_ids, export(**centred))
    fitted = PCA(n_components=6, svd_solver="full").fit(np.hstack(expected)[:num_fit])
    np.testing.assert_allclose(np.abs(components), np.abs(unit(fitted.transform(np.hstack(expected)))), atol=1e-4)


def test_centred_vectors_do_not_depend_on_what_all_items_have_in_common() -> None:
    """Without centring a common direction takes the length, and the differences between items become small."""
    image, text = halves()
    fused, moved = (
        {center: fuse(image + shift, text, HAS_IMAGE, EVERY, export(center=center, normalize=True)) for center in (False, True)}
        for shift in (0.0, 100.0)
    )
    np.testing.assert_allclose(np.abs(moved[True]), np.abs(fused[True]), atol=1e-3)
    assert np.abs(np.abs(moved[False]) - np.abs(fused[False])).max() > 0.1


@pytest.mark.parametrize("with_base", [False, True])
def test_centring_ignores_rows_without_a_vector(with_base: bool) -> None:
    """What stands in such a row changes nothing, and its half is the mean of the centred rows."""
    (image, text), base = halves(), halves(seed=1)
    has_image = HAS_IMAGE.copy()
    has_image[[7, 150]] = False
    options = export(fusion="concat", center=True, normalize=True, with_base=with_base)
    found = fuse(image, text, has_image, EVERY[:120], options, base if with_base else None)
    image[[7, 150]] = 1e6
    again = fuse(image, text, has_image, EVERY[:120], options, base if with_base else None)
    np.testing.assert_array_equal(found, again)
    fitted = np.delete(np.arange(120), 7)
    lengths = np.linalg.norm(found[:, 8:16], axis=1, keepdims=True)
    mean = (found[fitted, :8] / lengths[fitted]).mean(0)  # each half has unit length before the whole has
    np.testing.assert_allclose(found[7, :8] / lengths[7], mean, atol=1e-5)
    np.testing.assert_allclose(found[150, :8] / lengths[150], mean, atol=1e-5)


def test_without_a_fitted_item_that_has_an_image_the_others_give_the_mean() -> None:
    image, text = halves()
    has_image = np.arange(200) >= 100
    found = fuse(image, text, has_image, EVERY[:50], export(fusion="image", center=True, normalize=True))
    np.testing.assert_allclose(found[100:], unit(image[100:] - image[100:].mean(0)), atol=1e-5)
    assert not found[:100].any()


def test_neutral_values_change_no_bit() -> None:
    """They take no arithmetic."""
    image, text = halves()
    found = fuse(image, text, HAS_IMAGE, EVERY, export(fusion="concat"))
    assert found.tobytes() == np.hstack([image, text]).tobytes()
