"""The texts of the shop's items, which name category, colour, brand and style (if the seller names them), and nothing else.

Each listing names an attribute or omits it (:attr:`~sda_core.data.demo.latent.World.is_named`).  A named one appears in one to
three of these places: the title, a field (brand, category path, a feature line), the description.  Each mention uses a random
synonym, titles have a random order, and phrases without information are added.  Words of titles and descriptions are dropped,
replaced or misspelt with probability ``text_noise``, a third each.  One mention of each named attribute is never changed, so
the complete text always identifies it.  No word, field or price depends on an attribute that is not named, and no word
depends on pattern or shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from sda_core.data.demo.latent import DEPARTMENT_OF, Attribute, World
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
FEATURE_LABELS: tuple[tuple[str, Attribute], ...] = (("Color", "colour"), ("Style", "style"))
SLOTS: dict[Attribute, str] = {"category": "noun", "colour": "colour", "brand": "brand", "style": "style"}
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
    "Thousands sold, hardly any returned",
    "Please measure before you order",
)
SALES_PHRASES = (
    "- Fast Dispatch", "| Best Price", "*NEW*", "(Free Returns)", "- Limited Offer", "| Customer Favourite", "!!!",
    "- Top Seller",
)  # fmt: skip
GENERIC_NOUNS = ("item", "piece", "find")  # if the seller does not name the product
USES = ("at home", "on the road", "for the whole family", "for weekends", "for every season", "for friends and guests")
TITLES = (  # ordered parts; a part whose attribute is omitted is not written
    ("{brand}", "{style}", "{noun}", "{colour}", "{filler}"),
    ("{brand}", "{colour}", "{noun}", "{style}", "{filler}", "{filler2}"),
    ("{style}", "{noun}", "by {brand}", "{colour}"),
    ("{brand}", "{noun}", "- {filler}", "{style}", "{colour}"),
    ("{filler}", "{colour}", "{noun}", "from {brand},", "{style}"),
    ("{noun}", "{filler}", "{colour},", "{style}", "{brand}"),
)
SENTENCES: dict[Attribute | None, tuple[str, ...]] = {  # by the attribute that they name
    "category": ("Our {noun} is {filler} and {filler2}.", "A {filler} {noun} {use}.", "You get one {noun}, {filler2} and boxed."),
    "colour": ("This one comes in {colour}.", "The shade is {colour}.", "In {colour}, as ordered by many."),
    "brand": ("{brand} made it {use}.", "From the workbench of {brand}.", "{brand} has sold such things for years."),
    "style": ("A {style} note for any day.", "It looks {style}, {use}.", "Anyone who likes it {style} is right here."),
    None: ("{filler} and {filler2}, {use}.", "The {filler} choice {use}.", "Order today and see for yourself."),
}
BASE_CENTS = {"Tableware": 1500, "Bags": 4200, "Clothing": 2400, "Home": 5600}
ANY_CENTS = 3100  # if the seller does not name the product
OTHER_DEPARTMENT = "Everything Else"
PLACES = ("title", "field", "description")
TITLE_CHANCE, DESCRIPTION_CHANCE = 0.75, 0.5  # probability that a named attribute appears there
FIELD_CHANCE: dict[Attribute, float] = {"category": 0.95, "brand": 0.7, "colour": 0.5, "style": 0.4}
SALES_CHANCE = 0.35
SHOUTED_CHANCE, PLAIN_CHANCE = 0.1, 0.25  # of titles in capitals, and unchanged; the others are in title case
MIN_MISTYPED = 4  # minimum length of a misspelt word

Word = tuple[str, bool]  # the word, and whether it is protected from noise


@dataclass(frozen=True)
class ItemWords:
    """The texts of one item, the same in every edition."""

    title: str
    brand: str
    """``""`` if the field is empty."""
    path: tuple[str, ...]
    """Root, department, category; the root and :data:`OTHER_DEPARTMENT` if the category is not named."""
    features: tuple[str, ...]
    description: str
    """``""`` if there is none."""
    price_cents: int


def describe(shop: World, seed: int, root: str, text_noise: float) -> Iterator[ItemWords]:
    """The texts of every item, in the shop's order.

    Args:
        shop: the items.
        seed: seed of the dataset.
        root: name of the shop, first in each category path.
        text_noise: probability that a word of a title or description is dropped, replaced or misspelt.
    """
    for item in range(shop.num_items):
        yield _describe(shop, item, random.Random(derive(seed, "demo", "words", item)), root, text_noise)


def _describe(shop: World, item: int, draw: random.Random, root: str, text_noise: float) -> ItemWords:
    category, brand = shop.value("category", item), shop.value("brand", item)
    synonyms: dict[Attribute, tuple[str, ...]] = {
        "category": CATEGORY_WORDS[category],
        "colour": COLOUR_WORDS[shop.value("colour", item)],
        "brand": (brand, brand, brand),
        "style": STYLE_WORDS[shop.value("style", item)],
    }
    # Everything is drawn for every item, named or not, so that omissions do not change other draws.
    has_description = bool(shop.has_description[item])
    spots = {name: _places_of_mention(draw, FIELD_CHANCE[name], has_description=has_description) for name in synonyms}
    spoken: dict[str, dict[Attribute, str]] = {
        place: {
            name: draw.choice(words) if bool(shop.is_named[name][item]) and place in spots[name] else _omitted(draw)
            for name, words in synonyms.items()
        }
        for place in PLACES
    }
    anchored: dict[str, set[Attribute]] = {place: {name for name in synonyms if spots[name][0] == place} for place in PLACES}
    title = _noisy(_title(draw, spoken["title"], anchored["title"]), draw, text_noise)
    title = _cased(f"{title} {draw.choice(SALES_PHRASES)}" if draw.random() < SALES_CHANCE else title, draw)
    description = _noisy(_description(draw, spoken["description"], anchored["description"]), draw, text_noise)
    field = spoken["field"]
    features = [f"{label}: {field[name]}" for label, name in FEATURE_LABELS if field[name]]
    features += draw.sample(FILLER_LINES, draw.choice((1, 2, 3)))
    department = DEPARTMENT_OF[int(shop.attributes["category"][item])]
    base = BASE_CENTS[department] if bool(shop.is_named["category"][item]) else ANY_CENTS
    return ItemWords(
        title=title,
        brand=field["brand"],
        path=(root, department, category) if field["category"] else (root, OTHER_DEPARTMENT),
        features=tuple(features),
        description=description if has_description else "",
        price_cents=int(base * draw.lognormvariate(0.0, 0.5)) // 10 * 10 + 9,
    )


def _places_of_mention(draw: random.Random, field_chance: float, *, has_description: bool) -> list[str]:
    """The places of a mention, at least one; the first is protected from noise."""
    chances = {"title": TITLE_CHANCE, "field": field_chance, "description": DESCRIPTION_CHANCE}
    taken = {place: draw.random() < chance for place, chance in chances.items()}
    order = draw.sample(PLACES, len(PLACES))
    spots = [place for place in order if taken[place] and (place != "description" or has_description)]
    return spots or ["title"]


def _omitted(draw: random.Random) -> str:
    """An empty text, after as many draws as a synonym needs."""
    draw.choice((0, 1, 2))
    return ""


def _title(draw: random.Random, spoken: dict[Attribute, str], anchored: set[Attribute]) -> list[Word]:
    parts = draw.choice(TITLES)
    filler, filler2 = draw.sample(FILLERS, 2)
    generic = draw.choice(GENERIC_NOUNS)
    words: list[Word] = []
    for part in parts:
        inside: list[Attribute] = [attribute for attribute, slot in SLOTS.items() if f"{{{slot}}}" in part]
        name = inside[0] if inside else None
        if name is not None and name != "category" and not spoken[name]:
            continue
        values = {slot: spoken[attribute] for attribute, slot in SLOTS.items()} | {"filler": filler, "filler2": filler2}
        values["noun"] = spoken["category"] or generic
        kept = name is not None and name in anchored and bool(spoken[name])
        words += [(word, kept) for word in part.format(**values).split()]
    return words


def _description(draw: random.Random, spoken: dict[Attribute, str], anchored: set[Attribute]) -> list[Word]:
    sentences: list[list[Word]] = []
    for name, templates in SENTENCES.items():
        template, use = draw.choice(templates), draw.choice(USES)
        filler, filler2 = draw.sample(FILLERS, 2)
        if name is not None and not spoken[name]:
            continue
        values = {slot: spoken[attribute] for attribute, slot in SLOTS.items()}
        values |= {"filler": filler, "filler2": filler2, "use": use}
        text = template.format(**values)
        sentences.append([(word, name is not None and name in anchored) for word in f"{text[0].upper()}{text[1:]}".split()])
    ranks = {number: draw.random() for number in range(len(SENTENCES))}
    order = sorted(range(len(sentences)), key=ranks.__getitem__)
    return [word for number in order for word in sentences[number]]


def _cased(title: str, draw: random.Random) -> str:
    chance = draw.random()
    if chance < SHOUTED_CHANCE:
        return title.upper()
    return title if chance < SHOUTED_CHANCE + PLAIN_CHANCE else title.title()


def _noisy(words: list[Word], draw: random.Random, text_noise: float) -> str:
    """Drop, replace or misspell each unprotected word with probability ``text_noise``; at least one word remains."""
    left: list[str] = []
    for word, is_kept in words:
        chance, kind, other, place = draw.random(), draw.randrange(3), draw.choice(FILLERS), draw.random()
        if is_kept or chance >= text_noise:
            left.append(word)
        elif kind == 1:
            left.append(other)
        elif kind == 2:
            left.append(_mistyped(word, place))
    return " ".join(left or [words[0][0]])


def _mistyped(word: str, place: float) -> str:
    """Exchange two neighbouring letters of a word."""
    if len(word) < MIN_MISTYPED:
        return word
    first = 1 + int(place * (len(word) - 2))
    return f"{word[:first]}{word[first + 1 : first + 2]}{word[first]}{word[first + 2 :]}"
