"""From raw files to the tables of the pipeline: which interactions and items are kept, their ids, and the split.

Steps with ``method: kcore``:

1. read the reviews; lines that cannot be used are dropped (``rows_bad``);
2. drop ratings below ``min_rating`` (``rows_dropped_rating``);
3. ``items_without_metadata: drop``: drop interactions with items that the metadata does not know
   (``rows_dropped_no_metadata``), before the core, so that the core holds for what is left;
4. ``duplicates: first | last``: of several interactions of one user with one item keep the earliest or the latest by
   time, raw-file order among equal times (``rows_dropped_duplicate``), before the core, so that a repeated purchase
   does not carry a user or an item over its threshold;
5. k-core (``rows_dropped_core``).

Steps with ``method: single_pass``, the order of the paper's public code: 1, 2, then thresholds counted once on the raw
rows (duplicates included), then 4, then users that are left with fewer than ``min_user_interactions``, then 3; nothing is
counted again, so items and users below the thresholds may be left.

Then, for both: ids run from 1 in the order of the raw ids (by code point), so they depend on what was kept and not on
the order of the file; histories are sorted by time, to the millisecond where the edition has it, equal times in
raw-file order; the split labels each row.

``rows_read`` is always the number of interactions kept plus all drops.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import polars as pl

from sda_core.artifacts import INTERACTIONS, ITEMS, USERS
from sda_core.data.amazon import REVIEW_SCHEMA, LineCount, read_metadata, read_reviews
from sda_core.data.kcore import core_mask, single_pass_mask
from sda_core.data.split import MIN_SPLIT_LENGTH, label_last
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


def filter_dataset(reviews: Path, metadata: Path, edition: int, params: FilterParams) -> FilteredData:
    """Read, filter, number and split a data set; the steps and their order are in the module's docstring.

    Args:
        reviews: the raw reviews.
        metadata: the raw metadata.
        edition: 2014, 2018 or 2023.
        params: section ``filter``.

    Returns:
        Interactions sorted by user and time, items and users sorted by id, and the counts.

    Raises:
        ConfigError: no such edition.
        DataError: a file cannot be read, has too many bad lines, or no interaction is left (the message says after
            which step).
    """
    review_lines, metadata_lines = LineCount(), LineCount()
    rows = _read_coded(reviews, edition, params, review_lines)
    rows, num_rating = _keep(rows, pl.col("rating") >= params.min_rating)
    _require_rows(rows, "filter.min_rating", f"every rating is below {params.min_rating:g}")

    wanted = frozenset(rows.items["raw_item_id"].gather(rows.frame["item"].unique()))
    known = read_metadata(metadata, edition, max_bad_line_share=params.max_bad_line_share, keep=wanted, lines=metadata_lines)
    num_no_metadata = num_core = 0
    match params.method:
        case "kcore":
            rows, num_no_metadata = _drop_without_metadata(rows, known["raw_item_id"], params)
            rows, num_duplicate = _drop_duplicates(rows, params)
            rows, num_core = _keep_core(rows, params)
        case "single_pass":
            rows, num_threshold = _keep_frequent(rows, params)
            rows, num_duplicate = _drop_duplicates(rows, params)
            rows, num_short = _keep_long_histories(rows, params)
            num_core = num_threshold + num_short
            rows, num_no_metadata = _drop_without_metadata(rows, known["raw_item_id"], params)
        case _:
            assert_never(params.method)

    data = _tables(rows, known, params)
    statistics: dict[str, Scalar] = {
        "rows_read": review_lines.total,
        "rows_bad": review_lines.num_bad,
        "rows_dropped_duplicate": num_duplicate,
        "rows_dropped_rating": num_rating,
        "rows_dropped_no_metadata": num_no_metadata,
        "rows_dropped_core": num_core,
        "rows_repaired": review_lines.repaired.total(),
        "metadata_rows_read": metadata_lines.total,
        "metadata_rows_bad": metadata_lines.num_bad,
        **data.statistics,
    }
    dropped = sum(statistics[f"rows_{reason}"] for reason in ("bad", *(f"dropped_{step}" for step in _DROPS)))
    assert statistics["rows_read"] == statistics["num_interactions"] + dropped
    _log.info(
        "%d rows read, %d kept: %d users, %d items, density %.5f",
        statistics["rows_read"],
        statistics["num_interactions"],
        statistics["num_users"],
        statistics["num_items"],
        statistics["density"],
    )
    return FilteredData(data.interactions, data.items, data.users, statistics)


_DROPS = ("duplicate", "rating", "no_metadata", "core")


# ------------------------------------------------------------------------------------------------ coded rows
@dataclass(frozen=True)
class _Rows:
    """Interactions with ids as numbers into two tables of raw ids, sorted by user, time and raw-file order."""

    frame: pl.DataFrame  # user, item (UInt32), rating, timestamp, millisecond
    users: pl.DataFrame  # raw_user_id, sorted
    items: pl.DataFrame  # raw_item_id, sorted

    def __len__(self) -> int:
        return len(self.frame)

    def codes(self, column: str) -> np.ndarray:
        return self.frame[column].to_numpy().astype(np.int64)


def _read_coded(path: Path, edition: int, params: FilterParams, lines: LineCount) -> _Rows:
    stream = read_reviews(path, edition, max_bad_line_share=params.max_bad_line_share, lines=lines)
    table = pl.concat([pl.DataFrame(schema=REVIEW_SCHEMA), *stream])
    if table.is_empty():
        raise DataError(str(path), "holds no usable review", "check dataset.edition and the file")
    users = table.select(pl.col("raw_user_id").unique().sort())
    items = table.select(pl.col("raw_item_id").unique().sort())
    frame = table.select(
        _code("raw_user_id", users).alias("user"),
        _code("raw_item_id", items).alias("item"),
        pl.col("rating").cast(pl.Float32),
        "timestamp",
        "millisecond",
    )
    return _Rows(frame.sort(["user", "timestamp", "millisecond"], maintain_order=True), users, items)


def _code(column: str, sorted_ids: pl.DataFrame) -> pl.Expr:
    """Each id's place in a table of sorted ids."""
    return pl.col(column).cast(pl.Enum(sorted_ids[column])).to_physical().cast(pl.UInt32)


# ----------------------------------------------------------------------------------------------------- steps
def _keep(rows: _Rows, condition: pl.Expr | pl.Series) -> tuple[_Rows, int]:
    """The rows under a condition, and how many there are not."""
    frame = rows.frame.filter(condition)
    return _Rows(frame, rows.users, rows.items), len(rows) - len(frame)


def _drop_without_metadata(rows: _Rows, known: pl.Series, params: FilterParams) -> tuple[_Rows, int]:
    if params.items_without_metadata == "keep":
        return rows, 0
    has_metadata = rows.items["raw_item_id"].is_in(known.implode())
    kept = _keep(rows, has_metadata.gather(rows.frame["item"]))
    _require_rows(
        kept[0],
        "filter.items_without_metadata",
        "is 'drop', and none of the items left is in the metadata file",
        "check that both files are of one category, or set it to 'keep'",
    )
    return kept


def _drop_duplicates(rows: _Rows, params: FilterParams) -> tuple[_Rows, int]:
    if params.duplicates == "keep":
        return rows, 0
    # The rows are in history order: the first of a pair is the earliest.
    frame = rows.frame.unique(["user", "item"], keep=params.duplicates, maintain_order=True)
    return _Rows(frame, rows.users, rows.items), len(rows) - len(frame)


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
        f"no interaction is left with at least {params.min_user_interactions} a user and {params.min_item_interactions} an item"
        f" (method {params.method}); of {len(before)} before, the longest history had {longest}, the most frequent item {most}",
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
        "timestamp",
        "rating",
    )
    match params.split:
        case "leave_one_out":
            interactions = label_last(interactions)
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
    return FilteredData(interactions, items, users, _describe(interactions, items))


def _numbered(codes: pl.Series, raw_ids: pl.DataFrame) -> pl.DataFrame:
    """The raw ids that occur, numbered from 1 in their order."""
    return raw_ids[codes.unique().sort()].with_row_index("id", offset=1).with_columns(pl.col("id").cast(pl.Int32))


def _new_ids(codes: pl.Series, num_codes: int) -> pl.Series:
    """Codes with the unused ones left out, from 1."""
    values = codes.to_numpy()
    used = np.zeros(num_codes, dtype=np.bool_)
    used[values] = True
    return pl.Series(np.cumsum(used, dtype=np.int32)[values])


def _describe(interactions: pl.DataFrame, items: pl.DataFrame) -> dict[str, Scalar]:
    histories = interactions["user_id"].value_counts()["count"].to_numpy()
    popularity = interactions["item_id"].value_counts()["count"].to_numpy()
    num_users, num_items = len(histories), len(popularity)
    parts = dict(interactions["split"].value_counts().iter_rows())
    return {
        "num_users": num_users,
        "num_items": num_items,
        "num_interactions": len(interactions),
        "num_train": int(parts.get("train", 0)),
        "num_valid": int(parts.get("valid", 0)),
        "num_test": int(parts.get("test", 0)),
        "num_users_too_short_to_test": int((histories < MIN_SPLIT_LENGTH).sum()),
        "density": len(interactions) / (num_users * num_items),
        "history_length_mean": float(histories.mean()),
        "history_length_median": float(np.median(histories)),
        "history_length_max": int(histories.max()),
        "item_count_p10": float(np.percentile(popularity, 10)),
        "item_count_p50": float(np.percentile(popularity, 50)),
        "item_count_p90": float(np.percentile(popularity, 90)),
        "item_count_max": int(popularity.max()),
        "share_items_with_metadata": _share(items["has_metadata"]),
        "share_items_with_title": _share(items["title"] != ""),
        "share_items_with_image_reference": _share(items["image_references"].list.len() > 0),
    }


def _share(flags: pl.Series) -> float:
    return float(flags.to_numpy().mean())
