"""Convert raw files to the tables of the pipeline: filter interactions and items, number ids, split histories.

Steps with ``method: kcore``:

1. Read the reviews.  Skip bad lines (``rows_bad``), including times that are small numbers (``0``) if other times of the
   file are dates.
2. Drop ratings below ``min_rating`` (``rows_dropped_rating``).
3. ``duplicates: first | last``: keep the first or the last of several interactions of a user with an item, in history
   order (``rows_dropped_duplicate``).  This precedes the core, so that a repeated purchase does not lift a user or an
   item over its threshold.
4. k-core (``rows_dropped_core``).
5. Read the metadata of the remaining items.
6. ``items_without_metadata: drop``: drop interactions with items that are not in the metadata
   (``rows_dropped_no_metadata``).
7. ``items_without_image: drop``: drop interactions with items that have no metadata or no image in it
   (``rows_dropped_no_image``).
8. k-core again (also ``rows_dropped_core``), so that the thresholds hold for the remaining rows.

The core comes before the metadata, so that only the metadata of the remaining items has to be read.  The kept rows are the
same as if the items had been dropped first: dropping items from a core and computing the core again gives the core of the
smaller set, because that is a subset of the larger core.  The counts differ: a row whose item has no metadata counts as
``rows_dropped_core`` if the first core drops it.

Steps with ``method: single_pass``, the order of the paper's public code: 1, 2, then thresholds counted once on the raw
rows (duplicates included), then 3, then users with fewer than ``min_user_interactions`` remaining rows, then 5, 6, 7.
Nothing is counted again, so items and users below the thresholds may remain.

Then, for both methods: ids run from 1 in the order of the raw ids (by code point), so they depend on the kept rows and not
on the order of the file; histories are sorted by time, to the millisecond if the edition has it; the split labels each
row.  ``time_resolution_seconds`` first rounds times down (86400: to days in UTC), for files whose times within a day are
artificial.  Equal times are in a random order (``ties: random``, :mod:`sda_core.data.ties`) or in raw-file order
(``ties: file``).  With ``ties: random`` the tables and counts do not depend on the order of the lines of either file.

``rows_read`` always equals the number of kept interactions plus ``rows_bad`` and all ``rows_dropped_*``; minus ``rows_bad``
it equals the sum of all ``times_in_*``, ``times_as_text`` and ``times_without_date``.  For the items of the core,
``values_used_*`` and ``values_dropped_*`` count the metadata values of each field; the latter is the sum over its reasons.

Memory: 20 bytes per row, every raw id once, the metadata of the items of the core, and a block of the file; single steps
need a few additional arrays of 8 bytes per row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS
from sda_core.data.amazon import BLOCK_BYTES, LineCount, read_metadata, read_reviews
from sda_core.data.kcore import core_mask, single_pass_mask
from sda_core.data.split import label_by_time, label_last
from sda_core.data.ties import describe_ties, random_order, warn_of_ties
from sda_core.data.times import FIRST_SECOND
from sda_core.errors import DataError
from sda_core.params import FilterParams

_log = logging.getLogger(__name__)

Scalar = int | float


@dataclass(frozen=True)
class FilteredData:
    """The tables after filter and split, with the schemas of ``sda_core.artifacts``, and flat counts."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    statistics: Mapping[str, Scalar]

    @property
    def counts(self) -> dict[str, object]:
        """The statistics in the closing line of the stage."""
        return {name: self.statistics[name] for name in ("rows_read", "num_users", "num_items", "num_interactions")}

    def check_targets(self) -> None:
        """Reject a split without a test target, with which nothing could be evaluated.

        Raises:
            DataError: there is none: with ``leave_one_out`` no user has three interactions.
        """
        if not self.statistics["num_test"]:
            problem = "leave_one_out leaves no test target, because no user has 3 interactions"
            raise DataError("params.yaml: filter.split", problem, "use more data, or split by time: global_time")


def filter_dataset(
    reviews: Path, metadata: Path, edition: int, params: FilterParams, *, block_bytes: int = BLOCK_BYTES
) -> FilteredData:
    """Read, filter, number and split a dataset; the module's docstring lists the steps in order.

    Args:
        reviews: the raw reviews.
        metadata: the raw metadata.
        edition: 2014, 2018 or 2023.
        params: section ``filter``.
        block_bytes: size of the blocks in which files are read; does not affect the tables.

    Returns:
        Interactions sorted by user and time, items and users sorted by id, and the counts.

    Raises:
        ConfigError: no such edition.
        DataError: a file cannot be read or has too many bad lines, no interaction is left (the message names the step), or
            a part of the split has no rows.
    """
    review_lines, metadata_lines = LineCount(), LineCount()
    rows = _read_coded(reviews, edition, params, review_lines, block_bytes)
    rows, num_rating = _keep(rows, pl.col("rating") >= params.min_rating)
    _require_rows(rows, "filter.min_rating", f"every rating is below {params.min_rating:g}")
    match params.method:
        case "kcore":
            rows, num_duplicate = _drop_duplicates(rows, params)
            rows, num_core = _keep_core(rows, params)
        case "single_pass":
            rows, num_threshold = _keep_frequent(rows, params)
            rows, num_duplicate = _drop_duplicates(rows, params)
            rows, num_short = _keep_long_histories(rows, params)
            num_core = num_threshold + num_short
        case _:
            assert_never(params.method)
    known = read_metadata(
        metadata,
        edition,
        max_bad_line_share=params.max_bad_line_share,
        keep=frozenset(rows.items["raw_item_id"].gather(rows.frame["item"].unique())),
        lines=metadata_lines,
        block_bytes=block_bytes,
    )
    rows, num_no_metadata = _drop_without_metadata(rows, known, params)
    rows, num_no_image = _drop_without_image(rows, known, params)
    if params.method == "kcore" and num_no_metadata + num_no_image:
        rows, num_again = _keep_core(rows, params)
        num_core += num_again

    data = _tables(rows, known, params)
    statistics: dict[str, Scalar] = {
        "rows_read": review_lines.total,
        "rows_bad": review_lines.num_bad,
        "rows_dropped_rating": num_rating,
        "rows_dropped_duplicate": num_duplicate,
        "rows_dropped_core": num_core,
        "rows_dropped_no_metadata": num_no_metadata,
        "rows_dropped_no_image": num_no_image,
        "rows_repaired": review_lines.repaired.total(),
        "metadata_rows_read": metadata_lines.total,
        "metadata_rows_bad": metadata_lines.num_bad,
        "metadata_rows_repaired": metadata_lines.repaired.total(),
        "metadata_rows_not_used": metadata_lines.not_used,
        **review_lines.time_statistics(edition),
        "ids_repaired": review_lines.stripped_ids.total(),
        "metadata_ids_repaired": metadata_lines.stripped_ids.total(),
        **metadata_lines.values.statistics(),
        **data.statistics,
    }
    dropped = sum(value for name, value in statistics.items() if name == "rows_bad" or name.startswith("rows_dropped_"))
    if statistics["rows_read"] != statistics["num_interactions"] + dropped:
        problem = f"{statistics['rows_read']} rows were read, but {statistics['num_interactions']} kept and {dropped} dropped"
        raise DataError(str(reviews), problem, "report this as a bug, with a file that shows it")
    _log.info(
        "%d rows read, %d kept: %d users, %d items, density %.5f",
        statistics["rows_read"],
        statistics["num_interactions"],
        statistics["num_users"],
        statistics["num_items"],
        statistics["density"],
    )
    return FilteredData(data.interactions, data.items, data.users, statistics)


# ------------------------------------------------------------------------------------------------ coded rows
@dataclass(frozen=True)
class _Rows:
    """Interactions with ids as indices into two tables of raw ids, in history order: by user, time and ``filter.ties``."""

    frame: pl.DataFrame  # user, item (UInt32), rating, milliseconds
    users: pl.DataFrame  # raw_user_id, sorted
    items: pl.DataFrame  # raw_item_id, sorted

    def __len__(self) -> int:
        return len(self.frame)

    def codes(self, column: str) -> np.ndarray:
        return self.frame[column].to_numpy().astype(np.int64)


def _read_coded(path: Path, edition: int, params: FilterParams, lines: LineCount, block_bytes: int) -> _Rows:
    # Each side has its own categories: the ids of a block are converted to numbers at once, and only new ids are stored.
    user, item = (pl.Categorical(pl.Categories.random()) for _ in range(2))
    blocks = [pl.DataFrame(schema={"user": user, "item": item, "rating": pl.Float32, "milliseconds": pl.Int64})]
    for block in read_reviews(path, edition, max_bad_line_share=params.max_bad_line_share, lines=lines, block_bytes=block_bytes):
        blocks.append(
            block.select(
                pl.col("raw_user_id").cast(user).alias("user"),
                pl.col("raw_item_id").cast(item).alias("item"),
                pl.col("rating").cast(pl.Float32),
                (pl.col("timestamp") * 1000 + pl.col("millisecond")).alias("milliseconds"),
            )
        )
    frame = pl.concat(blocks)
    del blocks
    if 0 < (num_small := lines.units["small"]) < len(frame):
        frame = frame.filter(pl.col("milliseconds") >= 1000 * FIRST_SECOND)
        lines.undate(path, num_small, params.max_bad_line_share)
    if frame.is_empty():
        raise DataError(str(path), "contains no usable review", "check dataset.edition and the file")
    user_codes, users = _coded(frame["user"])
    item_codes, items = _coded(frame["item"])
    frame = frame.with_columns(user_codes, item_codes)  # frees the categories before the sort
    resolution = 1000 * params.time_resolution_seconds
    if resolution:
        frame = frame.with_columns(pl.col("milliseconds") // resolution * resolution)
    frame = frame.sort(["user", "milliseconds"], maintain_order=True)
    rows = _Rows(frame, users.rename({"user": "raw_user_id"}), items.rename({"item": "raw_item_id"}))
    return rows if params.ties == "file" else _shuffled_ties(rows, params.ties_seed)


def _shuffled_ties(rows: _Rows, seed: int) -> _Rows:
    order = random_order(
        rows.codes("user"),
        rows.frame["milliseconds"].to_numpy(),
        rows.codes("item"),
        rows.frame["rating"].to_numpy(),
        rows.users["raw_user_id"],
        rows.items["raw_item_id"],
        seed,
    )
    return _Rows(rows.frame[order], rows.users, rows.items)


def _coded(ids: pl.Series) -> tuple[pl.Series, pl.DataFrame]:
    """The index of each id in the table of sorted ids, and that table."""
    distinct = ids.unique()
    table = pl.DataFrame({ids.name: distinct.cast(pl.String), "code": distinct.to_physical()}).sort(ids.name)
    found = table["code"].to_numpy()
    place = np.zeros(int(found.max()) + 1, dtype=np.uint32)
    place[found] = np.arange(len(found), dtype=np.uint32)
    return pl.Series(ids.name, place[ids.to_physical().to_numpy()]), table.select(ids.name)


# ----------------------------------------------------------------------------------------------------- steps
def _keep(rows: _Rows, condition: pl.Expr | pl.Series) -> tuple[_Rows, int]:
    """The rows that fulfil a condition, and the number of the others."""
    frame = rows.frame.filter(condition)
    return _Rows(frame, rows.users, rows.items), len(rows) - len(frame)


def _drop_without_metadata(rows: _Rows, known: pl.DataFrame, params: FilterParams) -> tuple[_Rows, int]:
    if params.items_without_metadata == "keep":
        return rows, 0
    kept = _keep(rows, _is_among(rows, known["raw_item_id"]))
    _require_rows(
        kept[0],
        "filter.items_without_metadata",
        "is 'drop', and none of the items left is in the metadata file",
        "check that both files are of one category, or set it to 'keep'",
    )
    return kept


def _drop_without_image(rows: _Rows, known: pl.DataFrame, params: FilterParams) -> tuple[_Rows, int]:
    if params.items_without_image == "keep":
        return rows, 0
    with_image = known.filter(pl.col("image_references").list.len() > 0)
    kept = _keep(rows, _is_among(rows, with_image["raw_item_id"]))
    _require_rows(
        kept[0],
        "filter.items_without_image",
        "is 'drop', but no remaining item has an image in its metadata",
        "set it to 'keep'",
    )
    return kept


def _is_among(rows: _Rows, raw_item_ids: pl.Series) -> pl.Series:
    """Mask of the rows with these items."""
    return rows.items["raw_item_id"].is_in(raw_item_ids.implode()).gather(rows.frame["item"])


def _drop_duplicates(rows: _Rows, params: FilterParams) -> tuple[_Rows, int]:
    if params.duplicates == "keep":
        return rows, 0
    pairs = pl.Series(rows.codes("user") * len(rows.items) + rows.codes("item"))
    # The rows are in history order: the first of a pair is the earliest.
    return _keep(rows, pairs.is_first_distinct() if params.duplicates == "first" else pairs.is_last_distinct())


def _keep_core(rows: _Rows, params: FilterParams) -> tuple[_Rows, int]:
    mask = core_mask(rows.codes("user"), rows.codes("item"), params.min_user_interactions, params.min_item_interactions)
    kept = _keep(rows, pl.Series(mask))
    _require_core(kept[0], rows, params)
    return kept


def _keep_frequent(rows: _Rows, params: FilterParams) -> tuple[_Rows, int]:
    mask = single_pass_mask(rows.codes("user"), rows.codes("item"), params.min_user_interactions, params.min_item_interactions)
    kept = _keep(rows, pl.Series(mask))
    _require_core(kept[0], rows, params)
    return kept


def _keep_long_histories(rows: _Rows, params: FilterParams) -> tuple[_Rows, int]:
    kept = _keep(rows, pl.len().over("user") >= params.min_user_interactions)
    _require_core(kept[0], rows, params)
    return kept


def _require_core(kept: _Rows, before: _Rows, params: FilterParams) -> None:
    longest, most = (before.frame[column].value_counts()["count"].max() for column in ("user", "item"))
    _require_rows(
        kept,
        "filter.min_user_interactions, filter.min_item_interactions",
        f"no interaction is left with at least {params.min_user_interactions} per user and {params.min_item_interactions} per"
        f" item (method {params.method}); of {len(before)}, the longest history had {longest}, the most frequent item {most}",
    )


def _require_rows(rows: _Rows, parameter: str, problem: str, advice: str = "lower it") -> None:
    if len(rows) == 0:
        raise DataError(f"params.yaml: {parameter}", problem, advice)


# ---------------------------------------------------------------------------------------------------- tables
def _tables(rows: _Rows, known: pl.DataFrame, params: FilterParams) -> FilteredData:
    users = _numbered(rows.frame["user"], rows.users)
    items = _numbered(rows.frame["item"], rows.items)
    interactions = rows.frame.select(
        _new_ids(rows.frame["user"], len(rows.users)).alias("user_id"),
        _new_ids(rows.frame["item"], len(rows.items)).alias("item_id"),
        (pl.col("milliseconds") // 1000).alias("timestamp"),
        "rating",
    )
    match params.split:
        case "leave_one_out":
            interactions = label_last(interactions)
        case "global_time":
            assert params.valid_from is not None  # checked by FilterParams
            assert params.test_from is not None
            interactions = label_by_time(interactions, params.valid_from, params.test_from)
        case _:
            assert_never(params.split)
    text, texts = pl.lit(""), pl.lit([], dtype=pl.List(pl.String))
    items = (
        items.rename({"id": "item_id"})
        .join(known.with_columns(has_metadata=pl.lit(True)), on="raw_item_id", how="left", maintain_order="left")
        .with_columns(
            pl.col("title", "brand", "price", "description").fill_null(text),
            pl.col("categories", "features", "image_references").fill_null(texts),
            pl.col("has_metadata").fill_null(False),
        )
        .select(list(ITEMS.columns))
    )
    users = users.rename({"id": "user_id"}).select(list(USERS.columns))
    interactions = interactions.select(list(INTERACTIONS.columns))
    history = (rows.codes("user"), rows.frame["milliseconds"].to_numpy())
    ties = describe_ties(*history, interactions["split"])
    warn_of_ties(ties, *history, rows.codes("item"), params.ties, params.ties_seed)
    return FilteredData(interactions, items, users, {**_describe(interactions, items), **ties})


def _numbered(codes: pl.Series, raw_ids: pl.DataFrame) -> pl.DataFrame:
    """The raw ids that occur, numbered from 1 in sorted order."""
    return raw_ids[codes.unique().sort()].with_row_index("id", offset=1).with_columns(pl.col("id").cast(pl.Int32))


def _new_ids(codes: pl.Series, num_codes: int) -> pl.Series:
    """Codes renumbered from 1 without the unused ones."""
    values = codes.to_numpy()
    used = np.zeros(num_codes, dtype=np.bool_)
    used[values] = True
    return pl.Series(np.cumsum(used, dtype=np.int32)[values])


def _describe(interactions: pl.DataFrame, items: pl.DataFrame) -> dict[str, Scalar]:
    """Sizes, lengths, popularity and coverage; ``mean_title_chars`` is the mean over items with a title."""
    histories = np.bincount(interactions["user_id"].to_numpy())[1:]
    popularity = np.bincount(interactions["item_id"].to_numpy())[1:]
    num_users, num_items, num_interactions = len(histories), len(popularity), len(interactions)
    parts = {str(label): int(count) for label, count in interactions["split"].value_counts().iter_rows()}
    num_top = math.ceil(0.2 * num_items)
    titles = items["title"].str.len_chars().to_numpy()
    return {
        "num_users": num_users,
        "num_items": num_items,
        "num_interactions": num_interactions,
        "num_train": parts.get("train", 0),
        "num_valid": parts.get("valid", 0),
        "num_test": parts.get("test", 0),
        "num_rest": parts.get("valid_rest", 0) + parts.get("test_rest", 0),
        "num_users_without_target": num_users - parts.get("test", 0),
        "density": num_interactions / (num_users * num_items),
        "first_time": int(interactions["timestamp"].to_numpy().min()),
        "last_time": int(interactions["timestamp"].to_numpy().max()),
        **_quantiles("history_length", histories),
        **_quantiles("item_count", popularity),
        "share_interactions_top_20_percent": float(np.sort(popularity)[-num_top:].sum() / num_interactions),
        "share_items_with_metadata": _share(items["has_metadata"]),
        "share_items_with_title": _share(items["title"] != ""),
        "share_items_with_brand": _share(items["brand"] != ""),
        "share_items_with_price": _share(items["price"] != ""),
        "share_items_with_categories": _share(items["categories"].list.len() > 0),
        "share_items_with_features": _share(items["features"].list.len() > 0),
        "share_items_with_description": _share(items["description"] != ""),
        "share_items_with_image_reference": _share(items["image_references"].list.len() > 0),
        "mean_title_chars": float(titles.sum() / max(np.count_nonzero(titles), 1)),
    }


def _quantiles(name: str, counts: npt.NDArray[np.int64]) -> dict[str, Scalar]:
    return {
        f"{name}_mean": float(counts.mean()),
        f"{name}_min": int(counts.min()),
        **{f"{name}_p{percent}": float(np.percentile(counts, percent)) for percent in (10, 50, 90, 99)},
        f"{name}_max": int(counts.max()),
    }


def _share(flags: pl.Series) -> float:
    return float(flags.to_numpy().mean())
