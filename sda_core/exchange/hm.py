"""Convert the files of Kaggle's competition "H&M Personalized Fashion Recommendations" to a shop in the 2023 format.

============================  ==================================================================================
``articles.csv``              an article is a garment in one colour: names, groups, colour, description
``transactions_train.csv``    day, customer, article, price, channel; the shop records days, not times
``images/0xx/0xxxxxxxxx.jpg`` one photo per article, in a folder of the first three digits; a few articles have none
============================  ==================================================================================

An interaction is written once per day, customer and item, with the day at 0:00 UTC, so the filter can detect equal times.
An item has name, groups, colours and description in the fields of the prompt.  With ``products`` the colours of a garment
are one item (the first seven digits of the id), with text and photo of one colour: the most bought one that has a photo, or the
most bought one if none has.

Ids are ten digits with a leading 0, which tools that read them as numbers drop; shorter ids are padded with zeros.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from sda_core import __version__
from sda_core.artifacts import replace_directory
from sda_core.errors import ConfigError, DataError
from sda_core.exchange.own_folder import check_replaceable, describe
from sda_core.seed import generator

ARTICLES, TRANSACTIONS, IMAGES = "articles.csv", "transactions_train.csv", "images"
DESCRIPTION = "hm_import.json"
CATEGORIES = ("index_group_name", "section_name", "product_group_name", "product_type_name")
FEATURES = ("colour_group_name", "graphical_appearance_name", "garment_group_name")
DETAILS = ("department_name", "index_name", "perceived_colour_master_name", "perceived_colour_value_name")
_OF_ARTICLES = ("article_id", "prod_name", *CATEGORIES, *FEATURES, "detail_desc", *DETAILS)
_OF_TRANSACTIONS = ("t_dat", "customer_id", "article_id")
_ID_LENGTH, _PRODUCT_LENGTH = 10, 7
_ROWS = 500_000  # rows written at a time


@dataclass(frozen=True)
class Selection:
    """The selected part of the competition's rows.

    Attributes:
        from_date: the first day; None for the first day of the data.
        to_date: the last day; None for the last day of the data.
        customer_share: share of the customers who bought something on these days, 0 to 1, drawn at random.
        seed: seed of the draw.
        products: whether the colours of a garment are one item.
    """

    from_date: datetime.date | None = None
    to_date: datetime.date | None = None
    customer_share: float = 1.0
    seed: int = 0
    products: bool = False


def import_hm(source: Path, folder: Path, selection: Selection) -> dict[str, int]:
    """Write ``interactions.jsonl.gz``, ``items.jsonl.gz`` and ``images/`` of a part of the competition's rows.

    Photos are hard links if the file system supports them, else copies.

    Args:
        source: the competition's folder, unpacked.
        folder: the target folder; an older import there is replaced.
        selection: the part to import.

    Returns:
        Counts of interactions, customers, items and images, and of rows whose article is not in ``articles.csv``.

    Raises:
        ConfigError: a file is missing or is not the competition's, the selection is impossible, or the target is in use.
        DataError: a value cannot be read, or no row is left.
    """
    _check(folder, selection)
    articles = _articles(source / ARTICLES)
    rows = _transactions(source / TRANSACTIONS, selection)
    known = rows.join(articles.select("article_id"), on="article_id", how="semi")
    if known.is_empty():
        raise DataError(str(source / TRANSACTIONS), f"none of its {len(rows)} rows is of an article in {ARTICLES}")
    counts = {"unknown_article": len(rows) - len(known)}
    known = known.with_columns(item_id=pl.col("article_id").str.slice(0, _PRODUCT_LENGTH if selection.products else _ID_LENGTH))
    photos = _photos(source / IMAGES, known)
    interactions = known.select("t_dat", "customer_id", "item_id").unique().sort("t_dat", "customer_id", "item_id")
    items = photos.group_by("item_id", maintain_order=True).first().join(articles, on="article_id").sort("item_id")
    counts |= {
        "interactions": len(interactions),
        "customers": interactions["customer_id"].n_unique(),
        "items": len(items),
        "images": int(items["photo"].is_not_null().sum()),
    }
    with replace_directory(folder) as temporary:
        _write_interactions(temporary / "interactions.jsonl.gz", interactions)
        _write_items(temporary / "items.jsonl.gz", items)
        (temporary / IMAGES).mkdir()
        for item_id, photo in items.filter(pl.col("photo").is_not_null()).select("item_id", "photo").iter_rows():
            _place(Path(photo), temporary / IMAGES / f"{item_id}.jpg")
        describe(temporary, DESCRIPTION, {"sda_version": __version__, "products": selection.products, **counts})
    return counts


def _check(folder: Path, selection: Selection) -> None:
    first, last = selection.from_date, selection.to_date
    if first is not None and last is not None and first > last:
        raise ConfigError("--from-date", f"{first} is after --to-date {last}")
    if not 0.0 < selection.customer_share <= 1.0:
        raise ConfigError("--customer-share", f"should be above 0 and at most 1 (got {selection.customer_share:g})")
    check_replaceable(folder, DESCRIPTION)


# ------------------------------------------------------------------------------------------------- reading
def _scan(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    """Columns of a CSV file as texts."""
    if not path.is_file():
        advice = "name the folder into which the competition's archive was unpacked"
        raise ConfigError(str(path), "no such file", advice)
    try:
        scanned = pl.scan_csv(path, infer_schema=False)
        found = scanned.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from None
    if missing := [name for name in columns if name not in found]:
        got = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        raise DataError(str(path), f"has no column {', '.join(missing)} (got {got})", "use the competition's own file")
    return scanned.select(columns)


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: pl.exceptions.PolarsError) -> DataError:
    reason = str(error).strip().splitlines()[0][:200]
    return DataError(str(path), f"cannot be read as CSV ({reason})", "unpack the competition's archive again")


def _articles(path: Path) -> pl.DataFrame:
    """One row per article."""
    frame = _collect(path, _scan(path, _OF_ARTICLES).with_columns(pl.col("article_id").str.zfill(_ID_LENGTH)))
    _check_ids(path, frame)
    twice = frame.filter(pl.col("article_id").is_duplicated())
    if len(twice):
        raise DataError(str(path), f"has article {twice['article_id'][0]} twice", "use the competition's own file")
    return frame


def _transactions(path: Path, selection: Selection) -> pl.DataFrame:
    """Day, customer and article of the selected rows."""
    day = pl.col("t_dat").str.to_date("%Y-%m-%d", strict=False)
    scanned = _scan(path, _OF_TRANSACTIONS)
    wrong = _collect(path, scanned.filter(day.is_null() | pl.col("customer_id").is_null()).head(1))
    if len(wrong):
        got = ", ".join(str(value) for value in wrong.row(0))
        raise DataError(str(path), f"a row should be a day (2020-09-22), a customer and an article (got {got})")
    rows = scanned.with_columns(day, pl.col("article_id").str.zfill(_ID_LENGTH))
    if selection.from_date is not None:
        rows = rows.filter(pl.col("t_dat") >= selection.from_date)
    if selection.to_date is not None:
        rows = rows.filter(pl.col("t_dat") <= selection.to_date)
    frame = _collect(path, rows)
    if frame.is_empty():
        days = _collect(path, scanned.select(day.min().alias("first"), day.max().alias("last"))).row(0)
        problem = f"has no row of these days (it goes from {days[0]} to {days[1]})"
        raise DataError(str(path), problem, "change --from-date and --to-date")
    _check_ids(path, frame)
    if selection.customer_share < 1.0:
        customers = frame["customer_id"].unique().sort()
        number = max(1, round(selection.customer_share * len(customers)))
        chosen = generator(selection.seed, "hm customers").choice(len(customers), number, replace=False)
        frame = frame.filter(pl.col("customer_id").is_in(customers.gather(chosen).implode()))
    return frame


def _check_ids(path: Path, frame: pl.DataFrame) -> None:
    wrong = frame.filter(~pl.col("article_id").str.contains(rf"^\d{{{_ID_LENGTH}}}$").fill_null(False))
    if len(wrong):
        got = wrong["article_id"][0]
        raise DataError(str(path), f"article_id should be {_ID_LENGTH} digits (got {got!r})", "use the competition's own file")


def _photos(folder: Path, rows: pl.DataFrame) -> pl.DataFrame:
    """Articles by item, sorted: those with a photo first, then the most bought.

    Raises:
        ConfigError: there is no folder of photos.
    """
    if not folder.is_dir():
        raise ConfigError(str(folder), "no such folder", "unpack the competition's images there (make it empty to go without)")
    counted = rows.group_by("item_id", "article_id").len().sort("item_id", "article_id")
    paths = [folder / article[:3] / f"{article}.jpg" for article in counted["article_id"]]
    found = pl.Series("photo", [str(path) if path.is_file() else None for path in paths], dtype=pl.String)
    order = [pl.col("item_id"), pl.col("photo").is_null(), -pl.col("len").cast(pl.Int64), pl.col("article_id")]
    return counted.with_columns(found).sort(order)


# ------------------------------------------------------------------------------------------------- writing
def _write_interactions(path: Path, frame: pl.DataFrame) -> None:
    shaped = frame.lazy().select(
        user_id="customer_id",
        parent_asin="item_id",
        rating=pl.lit(5),
        timestamp=pl.col("t_dat").cast(pl.Datetime("ms")).cast(pl.Int64),
    )
    with gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) as stream:
        for start in range(0, len(frame), _ROWS):
            stream.write(shaped.slice(start, _ROWS).collect().write_ndjson().encode())


def _write_items(path: Path, items: pl.DataFrame) -> None:
    with gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) as stream:
        for row in items.iter_rows(named=True):
            item = {
                "parent_asin": row["item_id"],
                "title": row["prod_name"] or "",
                "store": "",
                "price": None,  # the competition's prices are scaled by an unknown factor
                "categories": [row[name] for name in CATEGORIES if row[name]],
                "features": [row[name] for name in FEATURES if row[name]],
                "description": [row["detail_desc"]] if row["detail_desc"] else [],
                "images": [],  # found by the item's id
                "details": {"article_id": row["article_id"], **{name: row[name] for name in DETAILS if row[name]}},
            }
            stream.write(f"{json.dumps(item, ensure_ascii=False)}\n".encode())


def _place(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)
