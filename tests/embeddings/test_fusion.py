"""Fusion of image and text embeddings."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from sda_core.embeddings.fusion import fuse
from sda_core.errors import DataError
from tests.embeddings.noise_shop import (
    export_params,
    random_halves,
    unit,
)


@pytest.mark.parametrize("num_items", [12, 16, 17, 400])  # fewer rows than columns, as many, more
def test_components_equal_scikit_learn(num_items):
    image, text = random_halves(num_items, 8)
    fit_ids = np.arange(1, num_items + 1)[:: 1 if num_items < 100 else 2]
    fused = fuse(image, text, np.ones(num_items, dtype=bool), fit_ids, export_params(fused_dim=5, normalize=False))
    joined = np.hstack([image, text]).astype(np.float64)
    oracle: Any = PCA(n_components=5, svd_solver="full").fit(joined[fit_ids - 1])
    signs = np.sign(oracle.components_[np.arange(5), np.abs(oracle.components_).argmax(1)])
    np.testing.assert_allclose(fused, oracle.transform(joined) * signs, atol=1e-4)
    assert fused.dtype == np.float32


def test_components_are_exact_where_all_vectors_point_one_way():
    image, text = random_halves(300, 8)
    image += 1000.0  # a common direction a thousand times the differences, as language models give
    text += 1000.0
    fused = fuse(image, text, np.ones(300, dtype=bool), np.arange(1, 301), export_params(fused_dim=4, normalize=False))
    oracle = PCA(n_components=4, svd_solver="full").fit_transform(np.hstack([image, text]).astype(np.float64))
    np.testing.assert_allclose(np.abs(fused), np.abs(oracle), atol=1e-3)


def test_chunks_do_not_change_the_components(monkeypatch):
    image, text = random_halves(100, 8)
    arguments = (image, text, np.ones(100, dtype=bool), np.arange(1, 91), export_params())
    whole = fuse(*arguments)
    monkeypatch.setattr("sda_core.principal_axes._CHUNK_ROWS", 7)
    np.testing.assert_allclose(fuse(*arguments), whole, atol=1e-5)


def test_fitted_on_training_items_only():
    image, text = random_halves(60, 8)
    fit_ids = np.arange(1, 41)
    before = fuse(image, text, np.ones(60, dtype=bool), fit_ids, export_params())
    image[50] *= -3
    text[50] += 7
    after = fuse(image, text, np.ones(60, dtype=bool), fit_ids, export_params())
    changed = np.abs(before - after).max(1) > 1e-7
    assert np.flatnonzero(changed).tolist() == [50]


def test_row_order_and_repeats_of_fit_ids_do_not_matter():
    image, text = random_halves(60, 8)
    arguments = (image, text, np.ones(60, dtype=bool))
    a = fuse(*arguments, np.arange(1, 41), export_params())
    b = fuse(*arguments, np.random.default_rng(0).permutation(np.repeat(np.arange(1, 41), 3)), export_params())
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("fused_dim", "num_fit", "expected"), [(5, 40, 5), (99, 40, 16), (99, 6, 6)])
def test_width_is_capped(caplog, fused_dim, num_fit, expected):
    image, text = random_halves(60, 8)
    with caplog.at_level(logging.INFO, logger="sda_core"):
        fused = fuse(image, text, np.ones(60, dtype=bool), np.arange(1, num_fit + 1), export_params(fused_dim=fused_dim))
    assert fused.shape == (60, expected)
    assert ("components instead of" in caplog.text) == (expected < fused_dim)


def test_concat_mean_image_text():
    image, text = random_halves(10, 4)
    everywhere, fit_ids = np.ones(10, dtype=bool), np.arange(1, 11)

    def fused(fusion: str, normalize: bool) -> np.ndarray:
        return fuse(image, text, everywhere, fit_ids, export_params(fusion=fusion, normalize=normalize))

    np.testing.assert_allclose(fused("concat", True), np.hstack([unit(image), unit(text)]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(fused("mean", True), unit(unit(image) + unit(text)), atol=1e-6)
    np.testing.assert_allclose(fused("image", True), unit(image), atol=1e-6)
    np.testing.assert_allclose(fused("text", True), unit(text), atol=1e-6)
    np.testing.assert_array_equal(fused("concat", False), np.hstack([image, text]))
    np.testing.assert_allclose(fused("mean", False), (image + text) / 2, atol=1e-6)
    np.testing.assert_array_equal(fused("image", False), image)
    np.testing.assert_array_equal(fused("text", False), text)


@settings(max_examples=50, deadline=None)
@given(
    num_items=st.integers(1, 30),
    dim=st.integers(1, 6),
    seed=st.integers(0, 1000),
    fusion=st.sampled_from(["late_concat_pca", "concat", "mean", "image", "text"]),
)
def test_arguments_stay_as_they_were_and_lengths_are_one(num_items, dim, seed, fusion):
    image, text = random_halves(num_items, dim, seed)
    has_image = np.random.default_rng(seed).random(num_items) < 0.7
    has_image[0] = True
    copies = image.copy(), text.copy(), has_image.copy()
    fused = fuse(image, text, has_image, np.array([1]), export_params(fusion=fusion))
    for now, before in zip((image, text, has_image), copies, strict=True):
        assert np.array_equal(now, before)
    assert np.isfinite(fused).all()
    lengths = np.linalg.norm(fused, axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()


def test_row_without_image_takes_the_mean_of_the_fitted():
    image, text = random_halves(10, 4)
    has_image = np.ones(10, dtype=bool)
    has_image[[2, 9]] = False
    image[~has_image] = 0
    fused = fuse(image, text, has_image, np.arange(1, 7), export_params(fusion="concat", normalize=False))
    np.testing.assert_allclose(fused[[2, 9], :4], np.repeat(image[[0, 1, 3, 4, 5]].mean(0)[None], 2, axis=0), atol=1e-6)
    np.testing.assert_array_equal(fused[has_image, :4], image[has_image])
    fused = fuse(image, text, has_image, np.array([3]), export_params(fusion="concat", normalize=False))
    np.testing.assert_allclose(fused[2, :4], image[has_image].mean(0), atol=1e-6)


def test_row_without_text_takes_the_mean_of_the_fitted():
    image, text = random_halves(10, 4)
    has_text, everywhere = np.ones(10, dtype=bool), np.ones(10, dtype=bool)
    has_text[[2, 9]] = False
    text[~has_text] = 0
    arguments = image, text, everywhere, np.arange(1, 7)
    fused = fuse(*arguments, export_params(fusion="concat", normalize=False), has_text=has_text)
    np.testing.assert_allclose(fused[[2, 9], 4:], np.repeat(text[[0, 1, 3, 4, 5]].mean(0)[None], 2, axis=0), atol=1e-6)
    np.testing.assert_array_equal(fused[has_text, 4:], text[has_text])
    np.testing.assert_array_equal(fused[:, :4], image)
    alone = fuse(*arguments, export_params(fusion="text", normalize=False), has_text=has_text)
    np.testing.assert_array_equal(alone[has_text], fused[has_text, 4:])
    with pytest.raises(DataError, match="'text', but no item has a text; use 'image'"):
        fuse(*arguments, export_params(fusion="text"), has_text=~everywhere)


@pytest.mark.parametrize("lacking", ["text", "image"])
def test_a_row_without_a_modality_is_exactly_the_other_one_in_the_fused_geometry(lacking):
    """All components and no scaling: distances and lengths of such rows are those of their centred other vectors."""
    image, text = random_halves(40, 4)
    has = np.arange(40) % 4 != 0
    present, absent = (image, text) if lacking == "text" else (text, image)
    absent[~has] = 100.0  # must not matter
    everywhere, fit_rows = np.ones(40, dtype=bool), np.arange(30)
    flags = {"has_image": everywhere, "has_text": has} if lacking == "text" else {"has_image": has, "has_text": everywhere}
    fused = fuse(image, text, fit_ids=fit_rows + 1, params=export_params(fused_dim=8, normalize=False), **flags)[~has]
    centred = (present - present[fit_rows].mean(0))[~has]
    np.testing.assert_allclose(fused @ fused.T, centred @ centred.T, atol=1e-4)
    of_absent = (absent - absent[fit_rows][has[fit_rows]].mean(0))[has]
    both = fuse(image, text, fit_ids=fit_rows + 1, params=export_params(fused_dim=8, normalize=False), **flags)[has]
    np.testing.assert_allclose(both @ fused.T, (present - present[fit_rows].mean(0))[has] @ centred.T, atol=1e-4)
    assert np.abs(both @ both.T - of_absent @ of_absent.T).max() > 0.1  # rows with both have more than one of them


CENTRED = [("late_concat_pca", scaling, with_base) for scaling in ("none", "even") for with_base in (False, True)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("only", [None, "image", "text"])
@pytest.mark.parametrize(
    ("fusion", "axis_scaling", "with_base"),
    [*CENTRED, ("concat", "none", True), *((fusion, "none", False) for fusion in ("concat", "mean", "image", "text"))],
)
def test_an_item_without_content_is_zero(fusion, axis_scaling, with_base, only, normalize):
    """Nothing is known of it, so no item is near it; rounding noise of length 1 made such items each other's nearest items."""
    image, text = random_halves(60, 5)
    row = np.arange(60)
    has_image, has_text = row % 3 != 0, row % 4 != 0
    weights = {"image_weight": float(only != "text"), "text_weight": float(only != "image")}
    params = export_params(fusion=fusion, axis_scaling=axis_scaling, normalize=normalize, with_base=with_base, **weights)
    base = (2 * image, image + text) if with_base else None
    fused = fuse(image, text, has_image, np.arange(1, 41), params, base, has_text)
    kept = fusion if fusion in ("image", "text") else only
    expected = {"image": has_image, "text": has_text, None: has_image | has_text}[kept]
    np.testing.assert_array_equal(fused.any(axis=1), expected)


def test_base_rows_without_text_are_filled_too():
    image, text = random_halves(12, 3)
    has_text, everywhere = np.arange(12) > 1, np.ones(12, dtype=bool)
    params = export_params(fusion="concat", normalize=False)
    fused = fuse(image, text, everywhere, np.arange(1, 13), params, (2 * image, 2 * text), has_text)
    np.testing.assert_allclose(fused[:2, 3:6], np.tile(text[2:].mean(0), (2, 1)), atol=1e-6)
    np.testing.assert_allclose(fused[:2, 9:], 2 * fused[:2, 3:6], atol=1e-6)


def test_zero_vector_stays_zero():
    image, text = random_halves(5, 4)
    text[3] = 0
    assert not fuse(image, text, np.ones(5, dtype=bool), np.arange(1, 6), export_params(fusion="text"))[3].any()


@pytest.mark.parametrize("fit_ids", [[], [0], [11], [-1]])
def test_fit_ids_that_cannot_be(fit_ids):
    image, text = random_halves(10, 4)
    with pytest.raises(DataError, match="item fusion"):
        fuse(image, text, np.ones(10, dtype=bool), np.array(fit_ids, dtype=int), export_params())


def test_widths_that_have_no_mean():
    with pytest.raises(DataError, match="is 'mean', but the vectors of images are 4 wide and those of texts 6"):
        fuse(np.zeros((3, 4)), np.zeros((3, 6)), np.ones(3, dtype=bool), np.array([1]), export_params(fusion="mean"))
