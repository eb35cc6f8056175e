"""Captions are varied and true, questions have one right answer."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pretraining.common import generator, settings
from pretraining.conversations import (
    CHOICES,
    QUESTIONS,
    answers,
    caption,
    field_pairs,
    joined,
    plural,
    question,
    reading,
    turns,
)
from pretraining.scenes import RELATIONS, WORDS, Scene, drawn_scene

PARAMS, SEED = settings()["scenes"], settings()["seed"]
SCENES = [drawn_scene("train", SEED, place, PARAMS) for place in range(250)]


def named(text: str, words: dict[str, list[str]]) -> set[str]:
    """Which values a text names; a longer name hides the shorter ones inside it."""
    by_word = {word: value for value, synonyms in words.items() for word in synonyms}
    pattern = "|".join(sorted(map(re.escape, by_word), key=len, reverse=True))
    return {by_word[found] for found in re.findall(rf"(?<![a-z])(?:{pattern})(?![a-z])", text)}


def own_values(scene: Scene) -> dict[str, set[str]]:
    """What a text may say of a scene."""
    products = scene.products
    return {
        "colours": {scene.background} | {c for p in products for c in (p.colour, p.second, p.motif_colour) if c},
        "patterns": {product.pattern for product in products},
        "materials": {product.material for product in products},
        "counts": {str(scene.count)},
        "sizes": {scene.size} if scene.size else set(),
    }


def without_nouns(text: str, scene: Scene) -> str:
    """A text without its products' names, which may hold words such as ``rose`` or ``little``."""
    for product in scene.products:
        for noun in sorted(WORDS["types"][product.type]["words"], key=len, reverse=True):
            text = text.replace(plural(noun), " ").replace(noun, " ")
    return text


@pytest.mark.parametrize("compose", [caption, lambda scene, rng: joined(field_pairs(scene, rng), rng)], ids=["caption", "fields"])
def test_a_text_names_only_what_is_there(compose):
    for place, scene in enumerate(SCENES):
        for again in range(3):
            text = compose(scene, generator("true", place, again))
            rest = without_nouns(text, scene)
            for kind, own in own_values(scene).items():
                assert named(rest, WORDS[kind]) <= own, (kind, text, scene)
            types = {product.type for product in scene.products}
            assert (
                any(plural(noun) in text or noun in text for name in types for noun in WORDS["types"][name]["words"])
                or ":" in text
            )
            motifs = {product.motif for product in scene.products} | {product.type for product in scene.products}
            assert all(motif in motifs for motif in WORDS["motifs"] if f" {motif} on it" in text)


def test_a_caption_says_where_and_how():
    for place, scene in enumerate(SCENES):
        texts = [caption(scene, generator("where", place, again)) for again in range(3)]
        if scene.relation:
            assert all(scene.relation in text for text in texts)
        assert not any(f" {other} " in text for text in texts for other in RELATIONS if other != scene.relation)
        if scene.count > 1:
            assert all(WORDS["counts"][str(scene.count)][0] in text for text in texts)


def test_captions_are_varied():
    for scene in SCENES[:40]:
        found = {caption(scene, np.random.default_rng(seed)) for seed in range(60)}
        assert len(found) > 30
    openings = {caption(SCENES[0], np.random.default_rng(seed)).split()[0] for seed in range(60)}
    assert len(openings) >= 4


def test_a_text_depends_on_scene_and_seed_alone():
    assert turns(SCENES[3], 5, np.random.default_rng(1)) == turns(SCENES[3], 5, np.random.default_rng(1))
    assert turns(SCENES[3], 5, np.random.default_rng(1)) != turns(SCENES[3], 5, np.random.default_rng(2))


def test_answers_are_among_the_choices_and_true():
    for scene in SCENES:
        known, product = answers(scene), scene.products[0]
        assert all(answer in CHOICES[about] for about, answer in known.items())
        assert set(known) <= set(QUESTIONS)
        if scene.relation:
            assert set(known) == {"background"}  # of two products, questions name the one that they are about
            continue
        assert known["type"] == WORDS["types"][product.type]["words"][0]
        assert known["motif"] == (product.motif or "nothing")
        assert ("colour" in known) == (product.pattern == "plain")


def test_yes_and_no_are_true_and_balanced():
    replies = []
    for place, scene in enumerate(SCENES * 8):
        turn = question(scene, generator("yes", place))
        if turn.about == "yes or no":
            (value,) = re.findall(r"^is the \w+ (.+)\?$", turn.question)
            replies.append(turn.answer == "yes")
            assert (value in answers(scene).values()) == (turn.answer == "yes") or value in CHOICES["colour"]
    assert 0.35 < np.mean(replies) < 0.65


def test_questions_about_one_of_two_name_it():
    for place, scene in enumerate(SCENES * 4):
        turn = question(scene, generator("two", place))
        if turn.about.endswith("of one"):
            (product,) = [p for p in scene.products if f" {WORDS['types'][p.type]['words'][0]}?" in turn.question]
            wanted = product.colour if turn.about.startswith("colour") else product.pattern
            assert turn.answer == WORDS["colours" if turn.about.startswith("colour") else "patterns"][wanted][0]


def test_a_description_holds_the_answer_to_its_question():
    for place, scene in enumerate(SCENES):
        text, turn = reading(scene, generator("reading", place))
        assert turn.answer in text
        assert turn.question in QUESTIONS[turn.about]


def test_plurals():
    assert [plural(noun) for noun in ("cup", "leaf", "brush", "trousers", "glasses", "fish", "reading lamp", "paint brush")] == [
        "cups", "leaves", "brushes", "trousers", "glasses", "fish", "reading lamps", "paint brushes",
    ]  # fmt: skip
