"""What the shop writes about an item: it names category, colour, brand and style, and nothing else.

Titles and descriptions take a synonym for each value, mix in words that say nothing, and lose or change words with the chance
``text_noise``.  Brand, category path and feature lines are free of that noise, as structured fields are in real
catalogues: whoever reads everything can always tell the four attributes.  No word depends on pattern or shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from sda_core.data.demo.latent import DEPARTMENT_OF, World
from sda_core.seed import derive

CATEGORY_WORDS = {
    "Mugs": ("mug", "coffee cup", "tea cup"),
    "Bowls": ("bowl", "serving dish", "salad bowl"),
    "Bottles": ("bottle", "carafe", "flask"),
    "Teapots": ("teapot", "tea kettle", "brewing pot"),
    "Backpacks": ("backpack", "rucksack", "daypack"),
    "Handbags": ("handbag", "purse", "tote"),
    "Pouches": ("pouch", "clutch", "zip case"),
    "Suitcases": ("suitcase", "trolley case", "cabin luggage"),
    "Shirts": ("T-shirt", "tee", "short sleeve top"),
    "Dresses": ("dress", "sundress", "gown"),
    "Hats": ("hat", "sun hat", "cloche"),
    "Socks": ("socks", "stockings", "hosiery"),
    "Cushions": ("cushion", "throw pillow", "pillow"),
    "Lamps": ("table lamp", "desk lamp", "bedside light"),
    "Vases": ("vase", "flower vase", "urn"),
    "Armchairs": ("armchair", "easy chair", "lounge chair"),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine", "apricot"),
    "yellow": ("yellow", "lemon", "mustard"),
    "green": ("green", "emerald", "forest green"),
    "teal": ("teal", "turquoise", "petrol"),
    "blue": ("blue", "navy", "cobalt"),
    "purple": ("purple", "violet", "plum"),
    "pink": ("pink", "rose", "blush"),
    "brown": ("brown", "chestnut", "cocoa"),
    "grey": ("grey", "slate", "ash"),
}
STYLE_WORDS = {
    "vintage": ("vintage", "retro", "old-time"),
    "minimalist": ("minimalist", "pared-back", "understated"),
    "bohemian": ("bohemian", "boho", "free-spirited"),
    "industrial": ("industrial", "workshop", "loft"),
    "nautical": ("nautical", "seaside", "sailor"),
    "rustic": ("rustic", "farmhouse", "country"),
    "sporty": ("sporty", "athletic", "active"),
    "romantic": ("romantic", "dreamy", "whimsical"),
}
FILLERS = (
    "everyday", "premium", "sturdy", "handy", "classic", "lightweight", "durable", "quality",
    "large", "small", "medium", "new", "boxed", "washable", "comfortable", "reliable",
    "practical", "popular", "gift", "exclusive", "improved", "original", "elegant", "useful",
)  # fmt: skip
FILLER_LINES = (
    "Made with care in small batches",
    "Easy to clean & easy to store",
    "A welcome gift for birthdays and holidays",
    "Ships in recyclable packaging",
    "Backed by a two year guarantee",
    "Tested for daily use",
    "Customer service answers within a day",
    "Weighs less than you'd think",
)
USES = ("at home", "on the road", "for the whole family", "for weekends", "for every season", "for friends and guests")
TITLES = (
    "{brand} {style} {noun} {colour} {filler}",
    "{brand} {colour} {noun} {style} {filler} {filler2}",
    "{style} {noun} by {brand} {colour}",
    "{brand} {noun} - {filler} {style} {noun2}, {colour}",
    "{filler} {colour} {noun} from {brand}, {style}",
)
SENTENCES = (
    "This {filler} {noun} in {colour} brings a {style} note to any day.",
    "{brand} made the {style} {noun2} {use}.",
    "You get a {filler2} {colour} {noun} that lasts.",
    "The {filler} choice {use}: a {style} {noun2} by {brand}.",
    "Our {noun} is {filler}, {filler2} and very {style}.",
)
BASE_CENTS = {"Tableware": 1500, "Bags": 4200, "Clothing": 2400, "Home": 5600}


@dataclass(frozen=True)
class ItemWords:
    """The texts of one item, the same in every edition."""

    title: str
    brand: str
    path: tuple[str, ...]
    """Root, department, category."""
    features: tuple[str, ...]
    description: str
    price_cents: int


def describe(shop: World, seed: int, root: str, text_noise: float) -> Iterator[ItemWords]:
    """The texts of every item, in the shop's order.

    Args:
        shop: the items.
        seed: of the dataset.
        root: name of the whole shop, first in each category path.
        text_noise: chance that a word of a title or description is dropped or replaced.
    """
    for item in range(shop.num_items):
        yield _describe(shop, item, random.Random(derive(seed, "demo", "words", item)), root, text_noise)


def _describe(shop: World, item: int, draw: random.Random, root: str, text_noise: float) -> ItemWords:
    category, brand = shop.value("category", item), shop.value("brand", item)
    colours, styles = COLOUR_WORDS[shop.value("colour", item)], STYLE_WORDS[shop.value("style", item)]

    def fill(template: str) -> str:
        filler, filler2 = draw.sample(FILLERS, 2)
        return template.format(
            brand=brand,
            noun=draw.choice(CATEGORY_WORDS[category]),
            noun2=draw.choice(CATEGORY_WORDS[category]),
            colour=draw.choice(colours),
            style=draw.choice(styles),
            filler=filler,
            filler2=filler2,
            use=draw.choice(USES),
        )

    title = _noisy(fill(draw.choice(TITLES)), draw, text_noise).title()
    sentences = draw.sample(SENTENCES, draw.choice((2, 3)))
    features = [
        f"Color: {draw.choice(colours)}",
        f"Style: {draw.choice(styles)}",
        *draw.sample(FILLER_LINES, draw.choice((1, 2, 3))),
    ]
    department = DEPARTMENT_OF[int(shop.attributes["category"][item])]
    return ItemWords(
        title=title,
        brand=brand,
        path=(root, department, category),
        features=tuple(features),
        description=_noisy(" ".join(fill(sentence) for sentence in sentences), draw, text_noise),
        price_cents=int(BASE_CENTS[department] * draw.lognormvariate(0.0, 0.5)) // 10 * 10 + 9,
    )


def _noisy(text: str, draw: random.Random, text_noise: float) -> str:
    """Drop or replace each word with the chance ``text_noise``, half and half; one word at least is left."""
    kept: list[str] = []
    for word in text.split():
        if draw.random() >= text_noise:
            kept.append(word)
        elif draw.random() < 0.5:
            kept.append(draw.choice(FILLERS))
    return " ".join(kept) if kept else draw.choice(FILLERS)
