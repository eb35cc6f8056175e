"""Items, users and purchases of the built-in shop.

Every item has six visible attributes and a hidden one.  They are independent of each other and of popularity, and uniform
over their values:

=========  ==========================================================  ==========
attribute  shown by                                                    block
=========  ==========================================================  ==========
category   image and text (a tree: department, then category)          both
colour     image and text                                              both
pattern    image only                                                  image
shape      image only (the motif printed on the product)               image
brand      text only                                                   text
style      text only                                                   text
circle     neither: only the order of purchases reveals it             hidden
=========  ==========================================================  ==========

A user's next item is drawn by a softmax (a multinomial logit: McFadden 1974) over the items not bought yet:

    logit(user, item | last) = log popularity(item)
                             + content_strength  * content(user, item)
                             + sequence_strength * step(last, item),      -inf before the item arrives

* ``popularity`` is ``rank ** -popularity_exponent``, ranks in random order (Zipf).
* ``content = sqrt(image_share) * image + sqrt(text_share) * text + sqrt(rest) * both``.  Each block is the mean, times
  ``sqrt(2)``, of the user's tastes for the values of its two attributes; a taste is standard normal (half of the taste for
  a category is that for its department).  So each block has variance 1 over items, the shares are shares of variance, and
  changing them does not change the total strength.
* ``step`` models sequences: the circle after the last item's circle (hidden), the companion of its category (both), the
  same pattern (image), the same style (text).  Each is a 0/1 indicator scaled to variance 1.  The three visible ones are
  mixed as in ``content`` and have the share ``c**2 / (1 + c**2)`` of the variance, c the content strength; the hidden one has
  the rest.  So with ``content_strength`` 0 there are still sequences to learn from ids, but they do not depend on anything
  that images or texts show.

A share of the items (``new_item_share``) arrives on a day drawn uniformly over the second half of the period; the others are
available from the first day.  Items are not bought before they arrive, so items that arrive late are rare in training.

Listings are incomplete.  An item's text names each of its four text attributes with a separate probability,
``text_completeness ** e`` (:data:`NAMING_EXPONENTS`): sellers nearly always name the product, and often omit what the image
shows.  The attributes named in a less complete shop are a subset of those in a more complete one.

In a large shop a user considers only :data:`NUM_CONSIDERED` items, half of them drawn by popularity and half uniformly, with
importance weights that make the draw follow the same softmax (exact if the shop is not larger).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sda_core.errors import ConfigError
from sda_core.params import DemoDataset
from sda_core.seed import generator

Attribute = Literal["category", "colour", "pattern", "shape", "brand", "style"]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

DEPARTMENTS = {
    "Tableware": ("Mugs", "Bowls", "Bottles", "Teapots"),
    "Bags": ("Backpacks", "Handbags", "Pouches", "Suitcases"),
    "Clothing": ("Shirts", "Dresses", "Hats", "Socks"),
    "Home": ("Cushions", "Lamps", "Vases", "Armchairs"),
}
CATEGORIES = tuple(category for categories in DEPARTMENTS.values() for category in categories)
DEPARTMENT_OF = tuple(department for department, categories in DEPARTMENTS.items() for _ in categories)

VALUES: dict[Attribute, tuple[str, ...]] = {
    "category": CATEGORIES,
    "colour": ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey"),
    "pattern": ("plain", "stripes", "bars", "dots", "checks", "zigzag"),
    "shape": ("disc", "square", "triangle", "star", "cross", "ring"),
    "brand": (
        "Fernwick", "Hearth & Hale", "Quillan", "Norrvik", "Sandelow", "Tallis & Row", "Brightmoor", "Maribou",
        "Oldmarrow", "Kestrel Lane", "Vantosa", "Peakridge", "Lumenta", "Dovecote & Co", "Arrigo", "Willowmere",
    ),
    "style": ("vintage", "minimalist", "bohemian", "industrial", "nautical", "rustic", "sporty", "romantic"),
}  # fmt: skip
ATTRIBUTES: tuple[Attribute, ...] = tuple(VALUES)
BLOCKS: dict[str, tuple[Attribute, Attribute]] = {
    "image": ("pattern", "shape"),
    "words": ("brand", "style"),
    "both": ("category", "colour"),
}
NAMING_EXPONENTS: dict[Attribute, float] = {"category": 0.25, "brand": 0.5, "style": 1.0, "colour": 1.5}
"""Exponents of the naming probability: at ``text_completeness`` 0.6, 88, 77, 60 and 46 % of the texts name the attribute."""
NUM_CIRCLES = 12
MAX_STRENGTH = 1000.0  # beyond it, single precision cannot resolve the noise

NUM_CONSIDERED = 1024
CHUNK_USERS = 512
MIN_HISTORY = 5  # for all users except SHORT_SHARE of them
SHORT_SHARE = 0.03  # share of users with 3 or 4 purchases, so that a 5-core drops something
LENGTH_SPREAD = 0.75  # sigma of the log-normal surplus over MIN_HISTORY
FIRST_DAY = 14_245  # days since 1970: 2009-01-01, within all three editions
NUM_DAYS = 2_000  # up to mid-2014
RATING_SHARES = (0.05, 0.05, 0.09, 0.20, 0.61)  # of 1 to 5 stars; ratings do not depend on taste

_ID_LETTERS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype="S1")


@dataclass(frozen=True, eq=False)
class World:
    """The ground truth of the raw files.

    Items are numbered 0..I-1 and users 0..U-1 here; the raw files use ``asins`` and ``user_names``.
    """

    asins: tuple[str, ...]
    user_names: tuple[str, ...]
    attributes: dict[Attribute, Bytes]
    """Each ``(I,)``: index of the value in :data:`VALUES`."""
    circle: Bytes
    """``(I,)``: the hidden attribute."""
    log_popularity: Floats
    """``(I,)``: natural log of the Zipf weight."""
    arrival: Ints
    """``(I,)``: the first day, in days since 1970, on which the item can be bought."""
    is_named: dict[Attribute, Bools]
    """Each ``(I,)``: whether the item's text names its value; always false for attributes that only the image shows."""
    has_description: Bools
    """``(I,)``."""
    has_image: Bools
    """``(I,)``."""
    has_metadata: Bools
    """``(I,)``."""
    companion: Bytes
    """``(categories,)``: the companion of each category, which tends to follow it; a single cycle."""
    user: Ints
    """``(K,)``: the user of each interaction, ascending."""
    item: Ints
    """``(K,)``: its item; no item twice for one user."""
    day: Ints
    """``(K,)``: days since 1970, ascending within a user; a share of the purchases is on the day of the previous one."""
    rating: Bytes
    """``(K,)``: 1 to 5."""

    @property
    def num_items(self) -> int:
        """The number of items."""
        return len(self.asins)

    @property
    def num_users(self) -> int:
        """The number of users."""
        return len(self.user_names)

    def value(self, attribute: Attribute, item: int) -> str:
        """The name of the value of an item's attribute."""
        return VALUES[attribute][int(self.attributes[attribute][item])]


def world(dataset: DemoDataset) -> World:
    """Draw items, tastes and histories; equal settings give an equal world for every edition.

    Raises:
        ConfigError: the histories are too long for so few items, or a strength is too large to compute with.
    """
    for name in ("popularity_exponent", "content_strength", "sequence_strength"):
        if not getattr(dataset, name) <= MAX_STRENGTH:
            raise ConfigError(f"dataset.{name}", f"should be at most {MAX_STRENGTH:g} (got {getattr(dataset, name)})")
    if dataset.mean_history_length > dataset.num_items / 2:
        raise ConfigError(
            "dataset.mean_history_length",
            f"should be at most half of num_items ({dataset.num_items}) (got {dataset.mean_history_length})",
            "make the shop larger or its histories shorter",
        )
    seed, num_items = dataset.seed, dataset.num_items
    draw = generator(seed, "demo", "items")
    attributes: dict[Attribute, Bytes] = {
        name: draw.integers(len(values), size=num_items).astype(np.uint8) for name, values in VALUES.items()
    }
    circle = draw.integers(NUM_CIRCLES, size=num_items).astype(np.uint8)
    place = draw.permutation(num_items) + 1
    log_popularity = (-dataset.popularity_exponent * np.log(place)).astype(np.float32)
    has_image = np.ones(num_items, dtype=np.bool_)
    has_image[draw.permutation(num_items)[: round(dataset.missing_image_share * num_items)]] = False
    has_metadata = np.ones(num_items, dtype=np.bool_)
    has_metadata[draw.permutation(num_items)[: round(dataset.missing_metadata_share * num_items)]] = False
    arrival = _arrivals(dataset)
    is_named, has_description = _listings(dataset)
    cycle = draw.permutation(len(CATEGORIES))
    companion = np.empty(len(CATEGORIES), dtype=np.uint8)
    companion[cycle] = np.roll(cycle, 1)

    lengths = _history_lengths(dataset)
    user = np.repeat(np.arange(dataset.num_users, dtype=np.int32), lengths)
    day = _days(seed, lengths, dataset.same_day_share)
    item = _histories(dataset, attributes, circle, log_popularity, arrival, companion, lengths, day)
    draw = generator(seed, "demo", "ratings")
    return World(
        asins=identifiers(seed, "items", num_items, "B0", 8),
        user_names=identifiers(seed, "users", dataset.num_users, "A", 13),
        attributes=attributes,
        circle=circle,
        log_popularity=log_popularity,
        arrival=arrival,
        is_named=is_named,
        has_description=has_description,
        has_image=has_image,
        has_metadata=has_metadata,
        companion=companion,
        user=user,
        item=item,
        day=day,
        rating=(1 + np.searchsorted(np.cumsum(RATING_SHARES)[:-1], draw.random(len(item)), side="right")).astype(np.uint8),
    )


def identifiers(seed: int, purpose: str, num: int, prefix: str, width: int) -> tuple[str, ...]:
    """Distinct ids: the prefix and ``width`` random letters and digits."""
    draw = generator(seed, "demo", "ids", purpose)
    found: dict[str, None] = {}
    while len(found) < num:
        letters = _ID_LETTERS[draw.integers(len(_ID_LETTERS), size=(num, width))]
        found.update(dict.fromkeys(prefix + row.decode() for row in letters.view(f"S{width}").ravel().tolist()))
    return tuple(found)[:num]


def _history_lengths(dataset: DemoDataset) -> npt.NDArray[np.int64]:
    """``(U,)``: mostly ``MIN_HISTORY`` + a log-normal surplus, with the requested mean."""
    draw = generator(dataset.seed, "demo", "lengths")
    short = draw.random(dataset.num_users) < SHORT_SHARE
    mean_surplus = (dataset.mean_history_length - SHORT_SHARE * (MIN_HISTORY - 1.5)) / (1.0 - SHORT_SHARE) - MIN_HISTORY
    surplus = draw.lognormal(np.log(mean_surplus) - LENGTH_SPREAD**2 / 2.0, LENGTH_SPREAD, size=dataset.num_users)
    whole = np.floor(surplus + draw.random(dataset.num_users)).astype(np.int64)
    lengths = np.where(short, MIN_HISTORY - 1 - draw.integers(2, size=dataset.num_users), MIN_HISTORY + whole)
    # There must be enough distinct items: half of the considered ones are drawn uniformly, and new ones may not have arrived.
    all_considered = dataset.num_items <= NUM_CONSIDERED
    most = _num_old(dataset) // 2 if all_considered else int(NUM_CONSIDERED * (1.0 - dataset.new_item_share)) // 3
    return np.minimum(lengths, most)


def _num_old(dataset: DemoDataset) -> int:
    """The number of items available from the first day."""
    return dataset.num_items - round(dataset.new_item_share * dataset.num_items)


def _listings(dataset: DemoDataset) -> tuple[dict[Attribute, Bools], Bools]:
    """The attributes named in each item's text, and the items with a description; independent of everything else."""
    draw = generator(dataset.seed, "demo", "listings")
    uniform = draw.random((len(ATTRIBUTES), dataset.num_items))
    is_named: dict[Attribute, Bools] = {}
    for name, uniform_I in zip(ATTRIBUTES, uniform, strict=True):
        chance = dataset.text_completeness ** NAMING_EXPONENTS[name] if name in NAMING_EXPONENTS else 0.0
        is_named[name] = uniform_I < chance
    has_description = np.ones(dataset.num_items, dtype=np.bool_)
    has_description[draw.permutation(dataset.num_items)[: round(dataset.missing_description_share * dataset.num_items)]] = False
    return is_named, has_description


def _arrivals(dataset: DemoDataset) -> Ints:
    """``(I,)``: the day on which each item arrives; the first day except for a share of the items."""
    draw = generator(dataset.seed, "demo", "arrivals")
    order, later = draw.permutation(dataset.num_items), draw.integers(NUM_DAYS // 2, NUM_DAYS, size=dataset.num_items)
    arrival = np.full(dataset.num_items, FIRST_DAY, dtype=np.int32)
    new = order[_num_old(dataset) :]
    arrival[new] += later[new].astype(np.int32)
    return arrival


def _days(seed: int, lengths: npt.NDArray[np.int64], same_day_share: float) -> Ints:
    """``(K,)``: ascending days within a user, with random bursts and pauses.

    Each purchase except a user's first is on the day of the previous one with probability ``same_day_share``.
    """
    draw = generator(seed, "demo", "days")
    gaps = draw.exponential(size=int(lengths.sum()))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    elapsed = np.cumsum(gaps)
    before = np.repeat(elapsed[starts] - gaps[starts], lengths)
    fraction = (elapsed - before) / np.repeat(elapsed[ends - 1] - (elapsed[starts] - gaps[starts]), lengths)
    slack = NUM_DAYS - lengths
    span = np.floor(slack * np.minimum(1.0, lengths * draw.uniform(0.005, 0.05, size=len(lengths))))
    start = np.floor((slack - span) * draw.random(len(lengths)))
    within = np.arange(len(gaps)) - np.repeat(starts, lengths)
    days = FIRST_DAY + np.repeat(start, lengths) + within + np.floor(fraction * np.repeat(span, lengths))
    row = np.arange(len(gaps))
    is_same_day = generator(seed, "demo", "same day").random(len(gaps)) < same_day_share
    is_same_day[starts] = False
    return days[np.maximum.accumulate(np.where(is_same_day, 0, row))].astype(np.int32)


def _histories(
    dataset: DemoDataset,
    attributes: dict[Attribute, Bytes],
    circle: Bytes,
    log_popularity: Floats,
    arrival: Ints,
    companion: Bytes,
    lengths: npt.NDArray[np.int64],
    day: Ints,
) -> Ints:
    """``(K,)``: the items of each user in the order of purchase; ``day`` is the day of each purchase."""
    block_weight = {
        "image": np.sqrt(dataset.image_share),
        "words": np.sqrt(dataset.text_share),
        "both": np.sqrt(max(0.0, 1.0 - dataset.image_share - dataset.text_share)),
    }
    content_part = dataset.content_strength**2 / (1.0 + dataset.content_strength**2)
    visible = dataset.sequence_strength * np.sqrt(content_part)
    gains = {
        "circle": _indicator_gain(dataset.sequence_strength * np.sqrt(1.0 - content_part), NUM_CIRCLES),
        "category": _indicator_gain(visible * block_weight["both"], len(VALUES["category"])),
        "pattern": _indicator_gain(visible * block_weight["image"], len(VALUES["pattern"])),
        "style": _indicator_gain(visible * block_weight["words"], len(VALUES["style"])),
    }
    follower: dict[str, tuple[Bytes, Bytes]] = {  # values of an item, and values favoured in the next one
        "circle": (circle, (circle + 1) % NUM_CIRCLES),
        "category": (attributes["category"], companion[attributes["category"]]),
        "pattern": (attributes["pattern"], attributes["pattern"]),
        "style": (attributes["style"], attributes["style"]),
    }
    popularity = np.exp(log_popularity.astype(np.float64) - log_popularity.max())
    popularity /= popularity.sum()
    item = np.empty(int(lengths.sum()), dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    for first in range(0, dataset.num_users, CHUNK_USERS):
        draw = generator(dataset.seed, "demo", "histories", first // CHUNK_USERS)
        chunk_lengths = lengths[first : first + CHUNK_USERS]
        order = np.argsort(-chunk_lengths, kind="stable")  # longest first, so that the remaining users are a prefix
        num = len(order)
        considered, logits = _considered(draw, num, popularity, log_popularity)
        for block, names in BLOCKS.items():
            weight = np.float32(dataset.content_strength * block_weight[block] / np.sqrt(2.0))
            for name in names:
                taste = weight * _taste(draw, num, name)
                logits += np.take_along_axis(taste, attributes[name][considered].astype(np.intp), axis=1)
        arrives = arrival[considered] if dataset.new_item_share > 0.0 else None
        kinds = {name: own[considered] for name, (own, _) in follower.items() if gains[name] > 0.0}
        chosen = np.empty(0, dtype=np.int32)
        for position in range(int(chunk_lengths.max())):
            active = int(np.count_nonzero(chunk_lengths > position))
            now = logits[:active].copy()
            if arrives is not None:
                today = day[starts[first + order[:active]] + position]
                now[arrives[:active] > today[:, None]] = -np.inf
            if position:
                chosen = chosen[:active]
                for name, kind in kinds.items():
                    wanted = follower[name][1][chosen]
                    now += gains[name] * (kind[:active] == wanted[:, None])
            places = _softmax_draw(now, draw.random(active, dtype=np.float32))
            chosen = considered[np.arange(active), places]
            item[starts[first + order[:active]] + position] = chosen
            logits[:active][considered[:active] == chosen[:, None]] = -np.inf
    return item


def _indicator_gain(weight: float, num_values: int) -> np.float32:
    """The value of a hit such that a 0/1 indicator of probability ``1 / num_values`` has the standard deviation ``weight``."""
    share = 1.0 / num_values
    return np.float32(weight / np.sqrt(share * (1.0 - share)))


def _considered(
    draw: np.random.Generator, num: int, popularity: npt.NDArray[np.float64], log_popularity: Floats
) -> tuple[Ints, Floats]:
    """``(num, C)`` items that each user considers, and their logits without tastes."""
    num_items = len(popularity)
    if num_items <= NUM_CONSIDERED:
        return np.tile(np.arange(num_items, dtype=np.int32), (num, 1)), np.tile(log_popularity, (num, 1))
    half = NUM_CONSIDERED // 2
    popular = np.searchsorted(np.cumsum(popularity)[:-1], draw.random((num, half)), side="right")
    uniform = draw.integers(num_items, size=(num, NUM_CONSIDERED - half))
    considered = np.concatenate([popular, uniform], axis=1).astype(np.int32)
    proposal = 0.5 * popularity + 0.5 / num_items
    weight = (np.log(np.maximum(popularity, np.finfo(np.float64).tiny)) - np.log(proposal)).astype(np.float32)
    return considered, weight[considered]


def _taste(draw: np.random.Generator, num: int, name: Attribute) -> Floats:
    """``(num, values)``: each user's standard normal taste for each value of an attribute."""
    taste = draw.standard_normal((num, len(VALUES[name])), dtype=np.float32)
    if name == "category":
        departments = list(DEPARTMENTS)
        department = draw.standard_normal((num, len(departments)), dtype=np.float32)
        of_category = np.array([departments.index(department) for department in DEPARTMENT_OF])
        taste = np.sqrt(np.float32(0.5)) * (taste + department[:, of_category])
    return taste


def _softmax_draw(logits: Floats, uniform: Floats) -> npt.NDArray[np.int64]:
    """One column per row, drawn by the row's softmax, through its inverse cumulative distribution; overwrites ``logits``."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    cumulative = np.cumsum(logits, axis=1, dtype=np.float64)
    target = uniform.astype(np.float64) * cumulative[:, -1]  # uniform < 1, so the target stays below the total
    return np.count_nonzero(cumulative <= target[:, None], axis=1)
