"""Compose the training texts of nano_lvlm: captions of scenes, questions with answers, and plain texts.

A caption has a random subset of a scene's attributes, in random order and with random synonyms.  All of them are true of the
scene.  So a scene rarely has the same caption twice, and its attributes can be predicted only from the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretraining.scenes import WORDS, Product, Scene

CAPTION_PROMPTS = (
    "describe the image", "what is in the image?", "caption", "write a caption", "product photo", "describe the product",
    "what does this photo show?", "image",
)  # fmt: skip
FIELD_PROMPTS = ("list the attributes", "attributes", "product details", "write the fields")
OPENINGS = ("", "", "a photo of ", "an image of ", "we see ", "the image shows ", "product: ", "here: ")
_PLURALS = {
    "leaf": "leaves", "fish": "fish", "puppy": "puppies", "bunny": "bunnies", "lorry": "lorries", "cactus": "cacti",
    "coat of arms": "coats of arms", "pot with a lid": "pots with a lid", "pair of shears": "pairs of shears",
}  # fmt: skip
_ALWAYS_PLURAL = {"glasses", "spectacles", "trousers", "pants", "scissors", "headphones"}


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        about: the attribute; ``caption`` or ``fields`` for a description; ``yes or no``.
        question: the question.
        answer: the correct answer.
    """

    about: str
    question: str
    answer: str


def plural(noun: str) -> str:
    """The plural of a noun."""
    *rest, last = noun.split(" ")
    if noun in _ALWAYS_PLURAL or noun in _PLURALS:
        return _PLURALS.get(noun, noun)
    ended = _PLURALS.get(last) or (f"{last}es" if last.endswith(("s", "x", "ch", "sh")) else f"{last}s")
    return " ".join([*rest, ended])


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def word(kind: str, value: str, rng: np.random.Generator, share_first: float = 0.6) -> str:
    """Draw a word for a value: the first of its list with probability ``share_first``, else a synonym."""
    words = WORDS["types"][value]["words"] if kind == "types" else WORDS[kind][value]
    return words[0] if len(words) == 1 or rng.random() < share_first else _one(rng, words[1:])


def colours(product: Product, rng: np.random.Generator) -> str:
    """The colours of a product, such as ``red``, or ``red and white`` in random order."""
    names = [word("colours", colour, rng, 0.75) for colour in (product.colour, product.second) if colour]
    return " and ".join(rng.permutation(names).tolist())


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def phrase(product: Product, count: int, size: str, keep: float, rng: np.random.Generator) -> str:
    """The noun of a product with some attributes before and after it; ``keep`` is the probability of an attribute."""
    noun = word("types", product.type, rng, 0.75)
    before: list[str] = []
    after: list[str] = []
    if rng.random() < keep:
        tint = colours(product, rng)
        if rng.random() < 0.75:
            before.append(tint)
        else:
            after.append(f"in {tint}")
    if product.pattern != "plain" and rng.random() < keep:
        pattern = word("patterns", product.pattern, rng)
        (after if pattern.startswith("with") else before).append(pattern)
    if rng.random() < 0.6 * keep and product.material != "plastic":
        material = word("materials", product.material, rng)
        if rng.random() < 0.6:
            before.append(material)
        else:
            after.append(f"made of {material}")
    if size and rng.random() < 0.6 * keep:
        before.append(word("sizes", size, rng))
    if product.motif and rng.random() < keep:
        ink = word("colours", product.motif_colour, rng, 0.75)
        after.append(f"with {_article(f'{ink} {product.motif}')} on it")
    many = count > 1 or noun in _ALWAYS_PLURAL
    text = " ".join([*rng.permutation(before).tolist(), plural(noun) if count > 1 else noun, *rng.permutation(after).tolist()])
    if count > 1:
        return f"{WORDS['counts'][str(count)][0]} {text}"
    return text if many else _article(text)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption of a scene."""
    keep = 1.0 if rng.random() < 0.4 else 0.75
    first = phrase(scene.products[0], scene.count, scene.size, keep, rng)
    if scene.relation:
        first += f" {scene.relation} {phrase(scene.products[1], 1, '', keep, rng)}"
    ground = _one(rng, ("on {} background", "against {} background", "in front of {} wall")).format(
        _article(word("colours", scene.background, rng, 0.75))
    )
    parts = [ground] if rng.random() < keep else []
    if scene.place and rng.random() < 0.6 * keep:
        parts.append(f"at the {word('places', scene.place, rng)}")
    parts = rng.permutation(parts).tolist()
    if parts and rng.random() < 0.2:
        return ", ".join([*parts, first])
    return _one(rng, OPENINGS) + " ".join([first, *parts])


def field_pairs(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Fields of a product in random order: attribute, name of the field, value."""
    product = scene.products[0]
    colour_name = _one(rng, ("colour", "color"))
    pairs = [
        ("type", "type", word("types", product.type, rng, 0.8)),
        ("colour", colour_name, colours(product, rng)),
        ("pattern", "pattern", word("patterns", product.pattern, rng, 0.9)),
        ("background", "background", word("colours", scene.background, rng, 0.8)),
    ]
    if product.material != "plastic":
        pairs.append(("material", "material", word("materials", product.material, rng, 0.8)))
    if product.motif:
        motif = f"{word('colours', product.motif_colour, rng, 0.8)} {product.motif}"
        pairs.append(("motif", _one(rng, ("motif", "print")), motif))
    if scene.count > 1:
        pairs.append(("count", _one(rng, ("number", "pieces")), WORDS["counts"][str(scene.count)][0]))
    if scene.size:
        pairs.append(("size", "size", word("sizes", scene.size, rng, 0.8)))
    kept = [pair for pair in pairs if rng.random() < 0.85] or pairs[:1]
    return [kept[place] for place in rng.permutation(len(kept))]


def joined(pairs: list[tuple[str, str, str]], rng: np.random.Generator) -> str:
    """Join fields to a text such as ``colour: red; type: cup``."""
    return _one(rng, ("; ", ", ", ". ")).join(f"{name}: {value}" for _, name, value in pairs)


def reading(scene: Scene, rng: np.random.Generator) -> tuple[str, Turn]:
    """A description as text, and a question whose answer is in it."""
    pairs = field_pairs(scene, rng)
    about, _, value = pairs[int(rng.integers(len(pairs)))]
    return joined(pairs, rng), Turn(about, _one(rng, QUESTIONS[about]), value)


def answers(scene: Scene) -> dict[str, str]:
    """The correct answer by attribute, for attributes with exactly one correct answer in this scene."""
    product = scene.products[0]
    found = {"background": WORDS["colours"][scene.background][0]}
    if scene.relation:
        return found
    found |= {
        "type": WORDS["types"][product.type]["words"][0],
        "pattern": WORDS["patterns"][product.pattern][0],
        "material": WORDS["materials"][product.material][0],
        "count": WORDS["counts"][str(scene.count)][0],
        "motif": product.motif or "nothing",
    }
    if not product.second:
        found["colour"] = WORDS["colours"][product.colour][0]
    if scene.place and scene.size == "small":
        found["place"] = WORDS["places"][scene.place][0]
    return found


CHOICES: dict[str, tuple[str, ...]] = {
    "type": tuple(entry["words"][0] for entry in WORDS["types"].values()),
    "colour": tuple(names[0] for names in WORDS["colours"].values()),
    "background": tuple(names[0] for names in WORDS["colours"].values()),
    "pattern": tuple(names[0] for names in WORDS["patterns"].values()),
    "material": tuple(names[0] for names in WORDS["materials"].values()),
    "count": tuple(names[0] for names in WORDS["counts"].values()),
    "place": tuple(names[0] for names in WORDS["places"].values()),
    "motif": (*WORDS["motifs"], "nothing"),
}
"""All possible answers by attribute."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "type": ("what is it?", "what product is this?", "which product is shown?", "type?"),
    "colour": ("what colour is it?", "which colour is the product?", "what color is it?", "colour?"),
    "background": ("what colour is the background?", "which colour is behind it?", "background?"),
    "pattern": ("what pattern does it have?", "which pattern is it?", "pattern?"),
    "material": ("what is it made of?", "which material is it?", "material?"),
    "count": ("how many are there?", "how many products are shown?", "number?"),
    "place": ("where is it?", "where in the image is the product?", "place?"),
    "motif": ("what is printed on it?", "which motif is on it?", "motif?"),
    "size": ("how large is it?", "size?"),
}


def question(scene: Scene, rng: np.random.Generator) -> Turn:
    """Draw a question about one attribute, open or yes/no."""
    known = answers(scene)
    about = _one(rng, list(known))
    draw = rng.random()
    if scene.relation and draw < 0.75:
        # with two products the question says which one it is about
        product = scene.products[int(rng.integers(2))]
        noun = WORDS["types"][product.type]["words"][0]
        verb = "are" if noun in _ALWAYS_PLURAL else "is"
        if not product.second and rng.random() < 0.6:
            return Turn("colour of one", f"what colour {verb} the {noun}?", WORDS["colours"][product.colour][0])
        return Turn("pattern of one", f"what pattern {verb} the {noun}?", WORDS["patterns"][product.pattern][0])
    if draw < 0.85 or about in ("motif", "count", "place"):
        return Turn(about, _one(rng, QUESTIONS[about]), known[about])
    wrong = _one(rng, [choice for choice in CHOICES[about] if choice != known[about]])
    asked, answer = (known[about], "yes") if rng.random() < 0.5 else (wrong, "no")
    name = "product" if about == "type" else about
    return Turn("yes or no", f"is the {name} {asked}?", answer)


def turns(scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
    """Draw ``count`` turns: first a caption or a list of fields, then questions or further captions."""
    found = []
    for place in range(count):
        draw = rng.random()
        if place == 0 or draw < 0.2:
            if rng.random() < 0.7 or scene.relation:
                found.append(Turn("caption", _one(rng, CAPTION_PROMPTS), caption(scene, rng)))
            else:
                found.append(Turn("fields", _one(rng, FIELD_PROMPTS), joined(field_pairs(scene, rng), rng)))
        else:
            found.append(question(scene, rng))
    return found
