"""The built-in shop as raw files of a real edition: reviews, metadata and ``images.zip``.

=======  ================================  ============================  ===========================================
edition  reviews                           metadata                      syntax
=======  ================================  ============================  ===========================================
2014     ``reviews_<category>_5.json.gz``  ``meta_<category>.json.gz``   reviews JSON, metadata Python literals
2018     ``<category>_5.json.gz``          ``meta_<category>.json.gz``   JSON
2023     ``<category>.jsonl.gz``           ``meta_<category>.jsonl.gz``  JSON, joined by ``parent_asin``, milliseconds
=======  ================================  ============================  ===========================================

Reviews are sorted by item id, as in the published files.  Purchases of one day have equal times in 2014 and 2018; only 2023
has their order.  A line has one of its edition's defects with probability ``quirk_share``.  Malformed lines are added to the
valid ones, at most a share of :data:`MAX_MALFORMED_SHARE`, and a second review of the same item by the same user has the
time of the first, so the interactions are the same in all three editions.  Numbers that real files derive from sales
(ratings count, sales rank, votes) are random, so that no content field reveals popularity.
"""

from __future__ import annotations

import datetime
import gzip
import html
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from sda_core.artifacts import replace_file
from sda_core.data.demo.images import encoded_images
from sda_core.data.demo.latent import World, identifiers, world
from sda_core.data.demo.words import ItemWords, describe
from sda_core.log import track
from sda_core.params import DemoDataset
from sda_core.seed import generator

Row = dict[str, Any]

MAX_MALFORMED_SHARE = 0.01
MALFORMED_PART = 0.05  # of the defects
REPEATED_PART = 0.2  # of the defects in reviews: the same user reviews the item again
VARIANT_SHARE = 0.3  # of the items in 2023 are sold under an `asin` that is not their `parent_asin`
LINES_AT_ONCE = 4096
SECONDS_A_DAY = 86_400

NAMES = ("Alex", "J. Rivera", "Amazon Customer", "Kim", "M. Okafor", 'Sam "the reader"', "Renée", "Pat & Lou", "Dana W.", "Yusuf")
SUMMARIES = ("Five Stars", "As expected", "Good value", "Nice", "Not for me", "Would buy again", "It's okay", "A present")
TEXTS = (
    "Arrived on time and well packed.",
    "Just as it was described.",
    "Bought it as a present; it was well received.",
    "Does what it should. I can't complain.",
    "Took a while to arrive, but I'm happy now.",
    "I expected a little more for the money.",
    "Second one I own &amp; still content.",
)
JUNK_TITLE = '<span class="a-size-medium a-color-secondary a-text-normal"'
JUNK_PRICE = ".a-section.offer-box{margin-bottom:0;padding:4px 8px}#buyNow_feature_div .a-button{width:100%} $"
JUNK_LINE = '<span class="a-size-base a-color-secondary">\n                {}\n            </span>'

META_DEFECTS: dict[int, tuple[str, ...]] = {
    2014: ("no_title", "no_price", "empty_brand", "entities", "line_breaks"),
    2018: (
        "same_line_twice", "junk_title_line_first", "junk_title", "junk_price", "entities", "rank_text",
        "older_image_field", "junk_feature", "long_category",
    ),
    2023: ("null_price", "no_description", "main_not_first", "no_hi_res", "null_store", "entities"),
}  # fmt: skip
REVIEW_DEFECTS: dict[int, tuple[str, ...]] = {
    2014: ("no_name", "empty_text"),
    2018: ("vote_text", "no_text", "no_text_no_summary", "style", "review_image"),
    2023: ("empty_texts", "review_image", "unverified"),
}


def file_names(dataset: DemoDataset) -> tuple[str, str, str]:
    """Names of the reviews, the metadata and the images file, as in the published edition."""
    category = dataset.category
    match dataset.edition:
        case 2014:
            return f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz", "images.zip"
        case 2018:
            return f"{category}_5.json.gz", f"meta_{category}.json.gz", "images.zip"
        case 2023:
            return f"{category}.jsonl.gz", f"meta_{category}.jsonl.gz", "images.zip"
        case _:
            assert_never(dataset.edition)


def write_shop(dataset: DemoDataset, folder: Path) -> None:
    """Write the shop's raw files into ``folder``; equal settings give equal bytes.

    Raises:
        ConfigError: see :func:`~sda_core.data.demo.latent.world`.
    """
    shop = world(dataset)
    reviews, metadata, images = (folder / name for name in file_names(dataset))
    _write_lines(reviews, review_lines(dataset, shop))
    _write_lines(metadata, metadata_lines(dataset, shop))
    with replace_file(images) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        images = encoded_images(shop, dataset.seed, dataset.image_side, dataset.image_clutter)
        num_images = int(np.count_nonzero(shop.has_image & shop.has_metadata))
        for asin, data in track(images, num_images, "drawing the shop", "images"):
            entry = zipfile.ZipInfo(_image_name(asin), date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix on every machine, for equal bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def _image_name(asin: str) -> str:
    return f"images/{asin}.jpg"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with (
        replace_file(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
    ):
        batch: list[str] = []
        for line in lines:
            batch.append(line)
            if len(batch) == LINES_AT_ONCE:
                packed.write(("\n".join(batch) + "\n").encode())
                batch.clear()
        if batch:
            packed.write(("\n".join(batch) + "\n").encode())


def _with_malformed(rows: Iterator[tuple[Row, int]], write: Callable[[Row], str]) -> Iterator[str]:
    """The lines of the rows; a row whose number is not 0 is preceded by a malformed line."""
    for row, malformed in rows:
        line = write(row)
        if malformed:
            yield (line[: len(line) * 2 // 3], "{}", "[]", "Internal Server Error")[malformed - 1]
        yield line


def _malformed(dataset: DemoDataset, purpose: str, num: int) -> list[int]:
    """For each of ``num`` rows 0 (mostly), or the number of the malformed line before it."""
    draw = generator(dataset.seed, "demo", "malformed", purpose)
    broken = draw.random(num) < min(MALFORMED_PART * dataset.quirk_share, MAX_MALFORMED_SHARE)
    return np.where(broken, draw.integers(1, 5, size=num), 0).tolist()


# ---------------------------------------------------------------------------------------------- reviews
def review_lines(dataset: DemoDataset, shop: World) -> Iterator[str]:
    """The lines of the reviews file."""
    return _with_malformed(_review_rows(dataset, shop), json.dumps)


def _review_rows(dataset: DemoDataset, shop: World) -> Iterator[tuple[Row, int]]:
    """Each review, and the number of the malformed line before it."""
    num = len(shop.user)
    order = np.lexsort((shop.user, shop.day, np.argsort(np.argsort(shop.asins))[shop.item]))
    malformed = _malformed(dataset, "reviews", num)
    draw = generator(dataset.seed, "demo", "reviews")
    repeated = draw.random(num) < REPEATED_PART * dataset.quirk_share
    second_rating = draw.integers(1, 6, size=num)
    name = draw.integers(len(NAMES), size=dataset.num_users)
    summary, text, millisecond, votes = (draw.integers(high, size=num) for high in (len(SUMMARIES), len(TEXTS), 1000, 5))
    moment = _moments(shop, millisecond)
    defective = draw.random(num) < (1.0 - REPEATED_PART) * dataset.quirk_share
    defects = REVIEW_DEFECTS[dataset.edition]
    defect = draw.integers(len(defects), size=num)
    child = _child_asins(dataset, shop)
    for place, line in enumerate(order.tolist()):
        user, item = int(shop.user[line]), int(shop.item[line])
        row = _review(
            dataset.edition,
            user=shop.user_names[user],
            name=NAMES[int(name[user])],
            asin=shop.asins[item],
            child=child[item],
            rating=float(shop.rating[line]),
            day=int(shop.day[line]),
            millisecond=int(moment[line]),
            summary=SUMMARIES[int(summary[line])],
            text=TEXTS[int(text[line])],
            votes=int(votes[line]),
            defect=defects[int(defect[line])] if defective[line] else None,
        )
        yield row, malformed[place]
        if repeated[line]:
            yield {**row, ("rating" if dataset.edition == 2023 else "overall"): float(second_rating[line])}, 0


def _moments(shop: World, millisecond: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``(K,)``: milliseconds of the day, ascending with a user's purchases of one day.

    Half of the drawn milliseconds, sorted within the day, plus the number of purchases before: no two are equal.
    """
    row = np.arange(len(shop.user))
    begins = np.concatenate([[True], (np.diff(shop.user) != 0) | (np.diff(shop.day) != 0)])
    number = row - np.maximum.accumulate(np.where(begins, row, 0))
    halves = millisecond // 2
    return halves[np.lexsort((halves, np.cumsum(begins)))] + number


def _child_asins(dataset: DemoDataset, shop: World) -> tuple[str, ...]:
    """``(I,)``: the `asin` that 2023 reviews name beside `parent_asin`."""
    others = identifiers(dataset.seed, "variants", shop.num_items, "B1", 8)
    differs = generator(dataset.seed, "demo", "variants").random(shop.num_items) < VARIANT_SHARE
    return tuple(other if different else asin for asin, other, different in zip(shop.asins, others, differs, strict=True))


def _review(
    edition: int,
    *,
    user: str,
    name: str,
    asin: str,
    child: str,
    rating: float,
    day: int,
    millisecond: int,
    summary: str,
    text: str,
    votes: int,
    defect: str | None,
) -> Row:
    if edition == 2023:
        image: list[Row] = []
        if defect == "review_image":
            address = f"https://images-na.ssl-images-amazon.com/images/I/{asin}"
            image = [{f"{size}_image_url": f"{address}._SL{pixels}_.jpg" for size, pixels in (("small", 256), ("large", 1600))}]
        return {
            "rating": rating,
            "title": "" if defect == "empty_texts" else summary,
            "text": "" if defect == "empty_texts" else text,
            "images": image,
            "asin": child,
            "parent_asin": asin,
            "user_id": user,
            "timestamp": 1000 * SECONDS_A_DAY * day + millisecond,
            "helpful_vote": votes,
            "verified_purchase": defect != "unverified",
        }
    date = datetime.date(1970, 1, 1) + datetime.timedelta(days=day)
    times: Row = {"unixReviewTime": SECONDS_A_DAY * day, "reviewTime": f"{date.month:02d} {date.day}, {date.year}"}
    if edition == 2014:
        row: Row = {"reviewerID": user, "asin": asin, "reviewerName": name, "helpful": [votes // 2, votes]}
        row |= {"reviewText": "" if defect == "empty_text" else text, "overall": rating, "summary": summary, **times}
        if defect == "no_name":
            del row["reviewerName"]
        return row
    row = {"overall": rating, "verified": True, "reviewTime": times["reviewTime"], "reviewerID": user, "asin": asin}
    row |= {"reviewerName": name, "reviewText": text, "summary": summary, "unixReviewTime": times["unixReviewTime"]}
    match defect:
        case "vote_text":
            row["vote"] = f"{1 + votes},{millisecond:03d}" if votes == 4 else str(1 + votes)
        case "no_text":
            del row["reviewText"]
        case "no_text_no_summary":
            del row["reviewText"], row["summary"]
        case "style":
            row["style"] = {"Size:": " Large", "Format:": " Boxed"}
        case "review_image":
            row["image"] = [f"https://images-na.ssl-images-amazon.com/images/I/{asin}._SY88.jpg"]
        case _:
            pass
    return row


# --------------------------------------------------------------------------------------------- metadata
def metadata_lines(dataset: DemoDataset, shop: World) -> Iterator[str]:
    """The lines of the metadata file."""
    return _with_malformed(_metadata_rows(dataset, shop), repr if dataset.edition == 2014 else json.dumps)


def _metadata_rows(dataset: DemoDataset, shop: World) -> Iterator[tuple[Row, int]]:
    """Each metadata line, and the number of the malformed line before it."""
    malformed = _malformed(dataset, "metadata", shop.num_items)
    draw = generator(dataset.seed, "demo", "metadata")
    defective = draw.random(shop.num_items) < dataset.quirk_share
    defects = META_DEFECTS[dataset.edition]
    defect = draw.integers(len(defects), size=shop.num_items)
    number = draw.integers(1, 1_000_000, size=shop.num_items)
    root = dataset.category.replace("_", " ")
    for item, words in enumerate(describe(shop, dataset.seed, root, dataset.text_noise)):
        if not shop.has_metadata[item]:
            continue
        asin = shop.asins[item]
        image = _image_name(asin) if shop.has_image[item] else None
        kind = defects[int(defect[item])] if defective[item] else None
        if kind == "entities":
            words = _escaped(words)
        match dataset.edition:
            case 2014:
                rows = [_metadata_2014(asin, words, image, int(number[item]), kind)]
            case 2018:
                rows = _metadata_2018(asin, words, image, int(number[item]), kind)
            case 2023:
                rows = [_metadata_2023(asin, words, image, int(number[item]), kind)]
            case _:
                assert_never(dataset.edition)
        yield rows[0], malformed[item]
        for row in rows[1:]:
            yield row, 0


def _escaped(words: ItemWords) -> ItemWords:
    """The texts with HTML entities, like scraped ones."""
    return ItemWords(
        title=html.escape(words.title),
        brand=html.escape(words.brand),
        path=words.path,
        features=tuple(html.escape(line) for line in words.features),
        description=html.escape(words.description),
        price_cents=words.price_cents,
    )


def _metadata_2014(asin: str, words: ItemWords, image: str | None, number: int, defect: str | None) -> Row:
    """A list with one category path; feature lines start the description, because 2014 has no field for them."""
    gap = "\n\n" if defect == "line_breaks" else " "
    row: Row = {
        "asin": asin,
        "description": f"{'. '.join(words.features)}.{gap}{words.description}".rstrip(),
        "title": words.title,
        "price": words.price_cents / 100,
        "salesRank": {words.path[1]: number},
        "imUrl": image,
        "brand": "" if defect == "empty_brand" else words.brand,
        "categories": [list(words.path), [words.path[0], "Gifts"]],
    }
    absent = {"no_title": "title", "no_price": "price"}.get(defect or "")
    if not words.brand:
        del row["brand"]
    return {key: value for key, value in row.items() if key != absent and value is not None}


def _metadata_2018(asin: str, words: ItemWords, image: str | None, number: int, defect: str | None) -> list[Row]:
    """One line, or two of the same item."""
    images = [] if image is None else [image]
    place = f"{number:,} in {words.path[1]} ("
    row: Row = {
        "category": list(words.path),
        "tech1": "",
        "description": [words.description] if words.description else [],
        "fit": "",
        "title": words.title,
        "also_buy": [],
        "tech2": "",
        "brand": words.brand,
        "feature": list(words.features),
        "rank": place if defect == "rank_text" else [f">#{place}See Top 100 in {words.path[1]})"],
        "also_view": [],
        "details": {},
        "main_cat": words.path[1],
        "similar_item": "",
        "date": "",
        "price": f"${words.price_cents / 100:.2f}",
        "asin": asin,
        "imageURL": images,
        "imageURLHighRes": images,
    }
    match defect:
        case "same_line_twice":
            return [row, row]
        case "junk_title_line_first":
            return [{**row, "title": JUNK_TITLE}, row]
        case "junk_title":
            row["title"] = JUNK_TITLE
        case "junk_price":
            row["price"] = JUNK_PRICE
        case "older_image_field":
            del row["imageURL"], row["imageURLHighRes"]
            row["image"] = images
        case "junk_feature":
            row["feature"] = [*words.features[:2], *(JUNK_LINE.format(line) for line in words.features[2:])]
        case "long_category":
            row["category"] = [*words.path, *words.features[2:]]
        case _:
            pass
    return [row]


def _metadata_2023(asin: str, words: ItemWords, image: str | None, number: int, defect: str | None) -> Row:
    images: list[Row] = []
    if image is not None:
        hi_res = None if defect == "no_hi_res" else image
        images = [{"thumb": image, "large": image, "variant": "MAIN", "hi_res": hi_res}]
    if image is not None and defect == "main_not_first":
        # The archive has one image per item: a reader that uses the first entry finds nothing, which its coverage shows.
        other = image.replace(".jpg", ".PT01.jpg")
        images.insert(0, {"thumb": other, "large": other, "variant": "PT01", "hi_res": other})
    return {
        "main_category": words.path[1],
        "title": words.title,
        "average_rating": 1.0 + number % 41 / 10,
        "rating_number": number % 1000,
        "features": list(words.features),
        "description": [] if defect == "no_description" or not words.description else [words.description],
        "price": None if defect == "null_price" else words.price_cents / 100,
        "images": images,
        "videos": [],
        "store": None if defect == "null_store" else words.brand or None,
        "categories": list(words.path),
        "details": {},
        "parent_asin": asin,
        "bought_together": None,
    }
