"""Concept splits, captions and titles of the pre-training's corpora, on small made-up inputs."""

from __future__ import annotations

import numpy as np
import pytest

from pretraining.common import generator, number
from pretraining.images import (
    Components,
    cleaned_keyword,
    cleaned_title,
    difference_hashes,
    icon_title,
    join_near_duplicates,
    normalised,
    painted,
    split_of,
    svg_words,
)
from pretraining.texts import captions, sampled, shop_text, stricter


def test_a_concept_is_in_one_split_only():
    """Chains of shared keys end in one component, hence in one split."""
    rng = np.random.default_rng(0)
    keys = [[f"file:{place}", f"title:{rng.integers(700)}", f"code:{rng.integers(900)}"] for place in range(300)]
    components = Components()
    for group in keys:
        components.join(group)
    splits: dict[str, set[str]] = {}
    for group in keys:
        roots = {components.root(key) for key in group}
        assert len(roots) == 1
        split = split_of(roots.pop(), 3, 20, 0.3, 0.2, 100)
        for key in group:
            splits.setdefault(key, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == {"train", "valid", "test"}


def test_components_do_not_depend_on_the_order():
    pairs = [("a", "b"), ("c", "d"), ("b", "d"), ("x", "y")]
    roots = []
    for order in (pairs, pairs[::-1]):
        components = Components()
        for pair in order:
            components.join(pair)
        roots.append([components.root(key) for key in "abcdxy"])
    assert roots[0] == roots[1] == ["a", "a", "a", "a", "x", "x"]


def test_split_shares_and_large_concepts():
    splits = [split_of(f"concept {place}", 1, 20, 0.11, 0.04, 250) for place in range(4000)]
    assert splits.count("test") / 4000 == pytest.approx(0.11, abs=0.02)
    assert splits.count("valid") / 4000 == pytest.approx(0.04, abs=0.01)
    assert {split_of(f"concept {place}", 251, 20, 0.11, 0.04, 250) for place in range(400)} == {"train"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Red Apples", "red apple 2", True),
        ("woman health worker", "men health workers", True),
        ("woman", "man", False),
        ("red apple", "green apple", False),
    ],
)
def test_titles_of_one_concept(first, second, same):
    assert (normalised(first) == normalised(second)) is same


def test_near_duplicates_are_joined_and_blank_images_are_not():
    rng = np.random.default_rng(1)
    image = np.zeros((120, 120, 4), np.uint8)
    image[..., 3] = 255
    image[..., :3] = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((15, 15, 1)))
    nearly = image.copy()
    nearly[:4, :4, :3] = 0
    other = image[:, ::-1].copy()
    blank = np.full_like(image, 255)
    hashes = difference_hashes(np.stack([image, nearly, other, blank, blank]))
    components = Components()
    join_near_duplicates(components, list("abcde"), hashes, 2)
    assert components.root("a") == components.root("b")
    assert len({components.root(key) for key in "acde"}) == 4


def test_junk_in_the_words_of_clip_art(tmp_path):
    assert cleaned_keyword("HASH(0x87dfc24)") == ""
    assert cleaned_keyword(" Fruit_salad ") == "fruit salad"
    assert cleaned_title("mug_of_tea_02") == "mug of tea"
    assert cleaned_title("Clipart by Nicu Buculei - fc23") == ""
    file = tmp_path / "a.svg"
    file.write_text(
        "<svg><metadata><rdf:RDF><cc:Work><dc:title>Apple</dc:title><dc:subject><rdf:Bag><rdf:li>hash(0x1)</rdf:li>"
        "<rdf:li>fruit</rdf:li><rdf:li>fruit</rdf:li></rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>",
        encoding="utf-8",
    )
    assert svg_words(file) == ("Apple", ["fruit"])
    file.write_text("<svg><metadata><a></b></metadata></svg>", encoding="utf-8")
    assert svg_words(file) == ("", [])
    assert svg_words(tmp_path / "absent.svg") == ("", [])
    assert icon_title("car-dashboard-speed-1") == "car dashboard speed"


def test_painted_signs_are_what_their_caption_says():
    glyph = np.zeros((60, 60, 4), np.uint8)
    glyph[10:50, 10:50, 3] = 255
    captions_seen = set()
    for variant in range(8):
        pixels, caption = painted(glyph, "cup", variant, 5)
        again, same = painted(glyph, "cup", variant, 5)
        assert caption == same
        assert np.array_equal(pixels, again)
        assert np.array_equal(pixels[..., 3], glyph[..., 3])
        num_colours = len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0))
        assert num_colours == (2 if " and " in caption else 1)
        captions_seen.add(caption)
    assert len(captions_seen) > 4


def test_captions_and_titles_are_the_same_each_time():
    keywords = ["fruit", "food", "diet", "health", "ripe"]
    first = captions("red apple", keywords, "apple", 2)
    assert first == captions("red apple", keywords, "apple", 2)
    assert first[0] == "red apple"
    assert len(first[1].split(", ")) == 3
    assert captions("cup", [], "cup", 2) == ["cup"]
    assert shop_text(generator("a"), with_fields=False) == shop_text(generator("a"), with_fields=False)
    assert "title: " in shop_text(generator("b"), with_fields=True)
    assert sampled(["c", "a", "b", "a"], 2, "key") == sampled(["a", "b", "c"], 2, "key")
    assert number("a", "b") != number("ab", "")


def test_words_shared_by_splits_keep_to_the_strictest():
    """Words of a held-out concept are never trained on; a foreign image of a trained concept holds none back."""
    assert stricter("train", "test") == stricter("test", "train") == "test"
    assert stricter("valid", "train") == "valid"
    assert stricter("valid", "test") == "test"
    assert stricter("train", "foreign") == stricter("foreign", "train") == "train"
