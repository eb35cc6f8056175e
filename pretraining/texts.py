"""Collect the texts of training: words and glosses of WordNet, captions, and composed shop titles.

Writes ``work/texts.parquet`` (text, kind, split) and ``work/captions.parquet`` (image, text), whose values are rows of images
and of texts.  Words of held-out WordNet synsets are left out, and captions of held-out concepts are only in the concept's
split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from ruamel.yaml import YAML

from pretraining.common import HERE, WORK, generator, number, settings
from pretraining.fetch import folder_of
from pretraining.images import COLOURS, PATTERNS

SHOP_WORDS: dict[str, Any] = YAML(typ="safe", pure=True).load((HERE / "shop_words.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Synset:
    """A WordNet synset.

    Attributes:
        part: part of speech.
        name: part of speech and offset, which identify the synset.
        subject: number of its lexicographer file, one of 45.
        words: its words.
        gloss: its gloss without examples.
    """

    part: str
    name: str
    subject: int
    words: tuple[str, ...]
    gloss: str


def synsets() -> Iterator[Synset]:
    """Read the synsets of WordNet in the order of its files."""
    folder = folder_of("wordnet-base") / "usr" / "share" / "wordnet"
    for part in ("noun", "adj", "verb"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [fields[4 + 2 * place] for place in range(int(fields[3], 16))]
            plain = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            yield Synset(part, f"{part}:{fields[0]}", int(fields[1]), plain, gloss.split('; "')[0].strip())


def brand(rng: np.random.Generator) -> str:
    """Compose a random brand name of syllables."""
    word = "".join(rng.choice(SHOP_WORDS["syllables"], int(rng.integers(2, 4))))
    return (word + str(rng.choice(SHOP_WORDS["brand_tails"]))).title()


def shop_text(rng: np.random.Generator, *, with_fields: bool) -> str:
    """Compose a random shop title; with ``with_fields`` an entry with title, brand, price, categories and description."""
    department = str(rng.choice(list(SHOP_WORDS["departments"])))
    nouns, qualities, uses = (SHOP_WORDS["departments"][department][part] for part in ("products", "qualities", "uses"))

    def one(choices: list[str]) -> str:
        return str(rng.choice(choices))

    noun, maker = one(nouns), brand(rng)
    colour = one(list(COLOURS))
    pieces = [maker] if rng.random() < 0.8 else []
    if rng.random() < 0.25:
        pieces.append(one(SHOP_WORDS["syllables"]).title() + str(rng.integers(2, 900)))
    pieces += rng.choice(qualities, int(rng.integers(0, 3)), replace=False).tolist()
    if rng.random() < 0.2:
        pieces.append(colour)
    if rng.random() < 0.06:
        pieces.append(one(list(PATTERNS)))
    pieces.append(noun)
    if rng.random() < 0.35:
        pieces.append(f"for {one(uses)}")
    if rng.random() < 0.2:
        pieces.append(f"with {one(qualities)} {one(nouns)}")
    title = " ".join(pieces)
    extras = [one(SHOP_WORDS["sizes"]), one(SHOP_WORDS["packs"]), colour, f"{one(qualities)} and {one(qualities)}"]
    for extra in rng.permutation(extras)[: int(rng.choice([0, 1, 2, 3], p=[0.3, 0.35, 0.25, 0.1]))].tolist():
        title += one([", ", " - ", " ", ", "]) + extra
    title = title.title() if rng.random() < 0.7 else title
    if not with_fields:
        return title
    fields = [f"title: {title}", f"brand: {maker}", f"price: {rng.integers(2, 90)}.99", f"categories: {department}, {noun}"]
    description = f"{one(qualities)} {noun} for {one(uses)}, {one(qualities)} and {one(qualities)}"
    fields.append(f"{one(['description', 'features'])}: {description}")
    keep = [fields[0], *[part for part in fields[1:] if rng.random() < 0.6]]
    opening = one(
        [
            f"{department} product. ",
            f"{noun}. ",
            "",
            "The product has the following attributes: ",
            f"This {noun} is described by: ",
        ]
    )
    return opening + one([", ", "; ", "; ", ". "]).join(keep)


def captions(title: str, keywords: list[str], key: str, num_keywords: int) -> list[str]:
    """The captions of an image: its title, and the title with at most ``num_keywords`` keywords in random order."""
    if not keywords:
        return [title]
    some = generator("keywords", key).permutation(keywords)[:num_keywords].tolist()
    return [title, f"{title}, {', '.join(some)}"]


def stricter(first: str, second: str) -> str:
    """The stricter of two splits that have the same text; ``test`` is the strictest."""
    order = ("foreign", "train", "valid", "test")
    return max(first, second, key=order.index)


def sampled(texts: list[str], count: int, *key: object) -> list[str]:
    """Draw ``count`` different texts in random order; the draw depends only on the texts and the key."""
    unique = sorted(set(texts))
    return [unique[place] for place in generator(*key).permutation(len(unique))[:count]]


def main() -> None:
    """Collect, split and write all texts."""
    params = settings()
    text_params, seed = params["texts"], params["seed"]
    images = pl.read_parquet(WORK / "images.parquet")
    kinds: dict[str, tuple[str, str]] = {}  # text -> (kind, split)
    pairs: list[tuple[int, str]] = []
    for place, row in enumerate(images.iter_rows(named=True)):
        # a concept has one split over all sources, so a foreign image of a training concept does not restrict its texts
        split = "foreign" if row["foreign"] and row["split"] == "train" else row["split"]
        for text in captions(row["title"], row["keywords"], f"{row['concept']}:{row['title']}", text_params["num_keywords"]):
            known = kinds.get(text)
            kinds[text] = ("caption", split if known is None else stricter(split, known[1]))
            pairs.append((place, text))

    words: list[str] = []
    glosses: list[str] = []
    held_out: set[str] = set()
    for synset in synsets():
        share = number(seed, "synset", synset.name) / 2**63
        if share < text_params["share_synsets_test"]:
            held_out.update(synset.words)
            continue
        words += [word for word in synset.words if not any(letter.isdigit() for letter in word)]
        glosses.append(
            f"{', '.join(synset.words[:3])}: {synset.gloss}" if number(seed, "gloss", synset.name) % 2 else synset.gloss
        )
    words = [word for word in words if word not in held_out]
    rng = generator(seed, "titles")
    titles = [shop_text(rng, with_fields=False) for _ in range(text_params["num_titles"])]
    entries = [shop_text(rng, with_fields=True) for _ in range(text_params["num_entries"])]
    for kind, texts in (
        ("word", sampled(words, text_params["num_words"], seed, "words")),
        ("gloss", sampled(glosses, text_params["num_glosses"], seed, "glosses")),
        ("title", titles),
        ("entry", entries),
    ):
        for place, text in enumerate(texts):
            kinds.setdefault(text, (kind, "valid" if place % 100 == 0 else "train"))

    # texts of similar length are consecutive, which makes the teacher fast
    ordered = sorted(kinds, key=lambda text: (len(text), text))
    at = {text: place for place, text in enumerate(ordered)}
    table = pl.DataFrame(
        {"text": ordered, "kind": [kinds[text][0] for text in ordered], "split": [kinds[text][1] for text in ordered]}
    )
    table.write_parquet(WORK / "texts.parquet")
    pl.DataFrame({"image": [place for place, _ in pairs], "text": [at[text] for _, text in pairs]}).write_parquet(
        WORK / "captions.parquet"
    )
    print(table.group_by("kind", "split").agg(pl.len(), pl.col("text").str.len_chars().mean()).sort("kind", "split"))
