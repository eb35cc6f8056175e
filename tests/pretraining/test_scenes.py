"""Scenes: attributes are drawn by themselves, held-out pairs are never trained on, images show what their attributes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pretraining.common import settings
from pretraining.images import COLOURS
from pretraining.scene_features import seen_at
from pretraining.scenes import WORDS, Product, Scene, distance, drawn_scene, held_out, rendered
from sda_core.data.demo.images import MOTIFS, PRODUCTS

PARAMS = settings()["scenes"]
SEED = settings()["seed"]
CUP = Product("cup", "disc", "red", "plain", "", "plastic", "", "")
ONE = Scene((CUP,), 1, "large", "centre", "", "white")


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    """Outlines made here: the icon packages need not be there."""
    y, x = np.mgrid[-1:1:240j, -1:1:240j]
    return {"disc": np.where(np.hypot(x, y) < 0.98, 255, 0).astype(np.uint8), "star": np.full((240, 240), 255, np.uint8)}


def shown(scene: Scene, masks: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    return rendered(scene, masks, 112, np.random.default_rng(seed)).astype(np.float32)


def nearest(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def test_a_held_out_pair_is_never_trained_on():
    share = PARAMS["share_pairs_test"]
    pairs = [(type_, colour) for type_ in WORDS["types"] for colour in COLOURS]
    assert np.mean([held_out(*pair, SEED, share) for pair in pairs]) == pytest.approx(share, abs=0.02)
    for place in range(400):
        first = drawn_scene("test", SEED, place, PARAMS).products[0]
        assert held_out(first.type, first.colour, SEED, share)
        for product in drawn_scene("train", SEED, place, PARAMS).products:
            assert not held_out(product.type, product.colour, SEED, share)


def test_what_is_named_can_be_told_apart():
    for place in range(300):
        scene = drawn_scene("train", SEED, place, PARAMS)
        for product in scene.products:
            least = PARAMS["least_colour_distance"]
            assert distance(product.colour, scene.background) >= least
            if product.second:
                assert min(distance(product.second, product.colour), distance(product.second, scene.background)) >= least
            if product.motif:
                assert distance(product.motif_colour, product.colour) >= least


def test_attributes_do_not_tell_each_other():
    found = [drawn_scene("train", SEED, place, PARAMS) for place in range(2000)]
    products = [scene.products[0] for scene in found]
    patterned = np.array([product.pattern != "plain" for product in products])
    cold = np.array([product.colour in ("blue", "green", "turquoise") for product in products])
    assert abs(np.corrcoef(patterned, cold)[0, 1]) < 0.08
    assert {scene.count for scene in found} == {1, 2, 3, 4}
    assert {product.material for product in products} == set(WORDS["materials"])


def test_a_scene_depends_on_its_number_alone():
    assert drawn_scene("train", SEED, 7, PARAMS) == drawn_scene("train", SEED, 7, PARAMS)
    assert drawn_scene("train", SEED, 7, PARAMS) != drawn_scene("train", SEED, 8, PARAMS)


@pytest.mark.parametrize("colour", ["red", "green", "blue", "black", "orange"])
def test_colour_and_background_are_seen(masks, colour):
    image = shown(replace(ONE, products=(replace(CUP, colour=colour),)), masks)
    assert nearest(image[45:67, 45:67].mean((0, 1))) == colour
    assert nearest(image[:6, :6].mean((0, 1))) == "white"


def test_count_place_and_size_are_seen(masks):
    def area(scene: Scene) -> np.ndarray:
        return shown(scene, masks)[..., 1] < 120  # red on white

    assert area(ONE).sum() > 2.5 * area(replace(ONE, size="small")).sum()
    one, two, four = (area(replace(ONE, size="", place="", count=count) if count > 1 else replace(ONE, size="small")).sum()
                      for count in (1, 2, 4))  # fmt: skip
    assert one < two < four
    for place, axis, sign in (("left", 1, -1), ("right", 1, 1), ("top", 0, -1), ("bottom", 0, 1)):
        middle = np.argwhere(area(replace(ONE, size="small", place=place))).mean(0) - 55.5
        assert sign * middle[axis] > 15
        assert abs(middle[1 - axis]) < 10


def test_the_relation_is_seen(masks):
    pair = (CUP, replace(CUP, type="hat", colour="blue"))
    image = shown(Scene(pair, 1, "", "", "left of", "white"), masks)
    red, blue = (np.argwhere((image[..., channel] > 150) & (image[..., 2 - channel] < 110)).mean(0) for channel in (0, 2))
    assert red[1] < blue[1] - 30


@pytest.mark.parametrize("pattern", [name for name in WORDS["patterns"] if name != "plain"])
def test_patterns_show_both_colours_and_differ(masks, pattern):
    patterned = replace(ONE, products=(replace(CUP, pattern=pattern, second="blue"),))
    middle = shown(patterned, masks)[36:76, 36:76].reshape(-1, 3)
    shares = [np.mean([nearest(pixel) == colour for pixel in middle[::7]]) for colour in ("red", "blue")]
    assert min(shares) > 0.08


def test_materials_and_motifs_change_the_image(masks):
    plain = shown(ONE, masks)
    for product in (replace(CUP, material=name) for name in WORDS["materials"] if name != "plastic"):
        assert np.abs(shown(replace(ONE, products=(product,)), masks) - plain)[40:70, 40:70].mean() > 4
    with_motif = shown(replace(ONE, products=(replace(CUP, motif="star", motif_colour="yellow"),)), masks)
    assert nearest(with_motif[50:62, 50:62].mean((0, 1))) == "yellow"


def test_no_outline_of_the_built_in_shop():
    """Its outlines are polygons of its own; scenes take theirs from icon packages alone."""
    icons = [icon for entry in WORDS["types"].values() for icon in entry["icons"]] + list(WORDS["motifs"].values())
    assert all(icon.split(":")[0] in {"game-icons", "mdi", "healthicons", "temaki"} for icon in icons)
    assert not set(icons) & (set(PRODUCTS) | set(MOTIFS))


def test_training_scenes_are_seen_at_one_side_and_held_out_ones_at_all():
    import polars as pl

    splits = pl.Series(["train"] * 300 + ["valid"] * 5 + ["test"] * 5)
    found = seen_at(splits, {112: 0.5, 56: 0.5}, 3)
    assert len(found[112]) + len(found[56]) == 320
    assert np.intersect1d(found[112], found[56]).tolist() == list(range(300, 310))
    assert 110 < len(found[56]) - 10 < 190
