"""Convert the counts of the filter and image stages to :class:`DataCoverage`: every row is kept or dropped for a reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from sda_core.artifacts import Workspace, read_json
from sda_core.dropped_values import REASONS
from sda_core.errors import ArtifactError
from sda_core.image_store import FORMAT_PREFIX, IMAGE_STATUSES
from sda_core.params import FilterParams
from sda_core.report.model import Count, DataCoverage, Share, Spread, ValueCounts

_DROPPED = "rows_dropped_"
_ADVICE = "run `dvc repro` to make it again"
_SPLITS = {
    "train": "Training",
    "valid": "Validation",
    "test": "Test",
    "rest": "Further rows of the held-out periods",
}
_TIES = {
    "pairs": "Neighbouring interactions of a user",
    "valid_targets": "Validation targets that share their time",
    "test_targets": "Test targets that share their time",
}
_TEXTS = ("title", "brand", "price", "categories", "features", "description")
_UNUSED_FILES = {
    "num_folder_no_item": "Image in the folder that matches no kept item",
    "num_folder_no_image": "File in the folder without an image extension",
    "num_archive_no_item": "Image in the archive that matches no kept item",
    "num_archive_no_image": "File in the archive without an image extension",
    "num_archive_unsafe_path": "File in the archive with an absolute path, or one that leaves the folder",
    "num_archive_no_file": "Link or device in the archive",
}
"""Files that no item uses; the image stage counts them if there is a folder or an archive."""
_UNITS = {
    "times_in_seconds": "In seconds",
    "times_in_milliseconds": "In milliseconds",
    "times_in_microseconds": "In microseconds",
    "times_in_nanoseconds": "In nanoseconds",
    "times_as_text": "As ISO 8601 text",
    "times_without_date": "Small numbers that are not dates; only their order is used",
}
_GRID = np.concatenate([np.arange(0.0, 3.0, 0.5), np.arange(3.0, 10.0), np.arange(10.0, 100.1, 2.5)]) / 100


@dataclass(frozen=True)
class _Numbers:
    """A flat JSON file of numbers, read by name."""

    path: Path
    values: Mapping[str, Any]

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArtifactError(str(self.path), f"should hold a number {name!r} (got {value!r})", _ADVICE)
        return value

    def count(self, name: str) -> int:
        value = self.number(name)
        if not isinstance(value, int) or value < 0:
            raise ArtifactError(str(self.path), f"{name!r} should be a count (got {value!r})", _ADVICE)
        return value

    def spread(self, prefix: str) -> Spread:
        return Spread(*(self.number(f"{prefix}_{end}") for end in ("mean", "min", "p10", "p50", "p90", "p99", "max")))


def _read(path: Path, name: str) -> _Numbers:
    values = read_json(path, name)
    if not isinstance(values, dict):
        raise ArtifactError(str(path), f"{name} should be names with numbers", _ADVICE)
    return _Numbers(path, values)


def _reasons(params: FilterParams) -> Iterator[tuple[str, str]]:
    """Every reason to drop a row, by name in the statistics, in the order of the filter's steps."""
    least = (params.min_user_interactions, params.min_item_interactions)
    core = ("core", f"User below {least[0]} or item below {least[1]} interactions")
    others = {"first": "the first is kept", "last": "the last is kept", "keep": "all are kept"}
    duplicate = ("duplicate", f"Repeated user and item ({others[params.duplicates]})")
    yield "rating", f"Rating below {params.min_rating:g}"
    match params.method:
        case "kcore":
            yield from (duplicate, core)
        case "single_pass":
            yield from (core, duplicate)
        case _:
            assert_never(params.method)
    yield "no_metadata", "Item without metadata"
    yield "no_image", "Item without an image in its metadata"


def _drops(statistics: _Numbers, params: FilterParams) -> tuple[Count, ...]:
    labels = {f"{_DROPPED}{name}": label for name, label in _reasons(params)}
    missing = [name for name in statistics.values if name.startswith(_DROPPED) and name not in labels]
    if missing:
        raise ArtifactError(str(statistics.path), f"drops rows for reasons unknown here: {', '.join(missing)}", _ADVICE)
    named = {"rows_bad": "Line that cannot be read", **labels}
    return tuple(Count(name, label, statistics.count(name)) for name, label in named.items())


def _values(statistics: _Numbers) -> tuple[ValueCounts, ...]:
    """Counts of used and dropped values of each metadata field; the reasons add up to the dropped ones."""
    fields: list[ValueCounts] = []
    for name, labels in REASONS.items():
        total = f"values_dropped_{name}"
        reasons = tuple(
            Count(f"{total}_{reason}", label, statistics.count(f"{total}_{reason}")) for reason, label in labels.items()
        )
        _add_up(statistics.path, total, statistics.count(total), [reason.value for reason in reasons])
        label = name.replace("_", " ").capitalize()
        fields.append(ValueCounts(name, label, statistics.count(f"values_used_{name}"), statistics.count(total), reasons))
    known = {f"values_dropped_{name}" for name in REASONS} | {reason.name for field in fields for reason in field.reasons}
    unknown = [name for name in statistics.values if name.startswith("values_dropped_") and name not in known]
    if unknown:
        raise ArtifactError(str(statistics.path), f"drops values for reasons unknown here: {', '.join(unknown)}", _ADVICE)
    return tuple(fields)


def long_tail(counts: Mapping[int, int], num_items: int) -> tuple[tuple[float, float], ...]:
    """Distribution of the interactions over the items: a Lorenz curve, most popular items first.

    Args:
        counts: number of interactions by item id; missing items have none.
        num_items: size of the catalogue.

    Returns:
        A few dozen points (share of items, share of the interactions of these items), from (0, 0) to (1, 1); empty without
        interactions.
    """
    popularity = np.zeros(num_items, dtype=np.int64)
    popularity[: len(counts)] = sorted(counts.values(), reverse=True)
    held = np.concatenate([[0], np.cumsum(popularity)])
    if held[-1] == 0:
        return ()
    places = np.unique((_GRID * num_items).round().astype(np.int64))
    return tuple((place / num_items, float(held[place] / held[-1])) for place in places.tolist())


def data_coverage(workspace: Workspace, params: FilterParams, training_counts: Mapping[int, int]) -> DataCoverage:
    """Read the counts of the filter and image stages, and check that they add up.

    Args:
        workspace: paths of a finished run.
        params: section ``filter`` of that run.
        training_counts: number of training interactions by item id.

    Raises:
        ArtifactError: a file is missing or damaged, a count is missing, or the counts do not add up.
    """
    statistics = _read(workspace.statistics, "statistics of the filter stage")
    counted = _read(workspace.image_coverage, "coverage of the image stage")
    rows_read, num_interactions, num_items = (statistics.count(n) for n in ("rows_read", "num_interactions", "num_items"))
    drops = _drops(statistics, params)
    splits = tuple(Count(f"num_{n}", label, statistics.count(f"num_{n}")) for n, label in _SPLITS.items())
    images = tuple(Count(n, status.label, counted.count(f"num_{n}")) for n, status in IMAGE_STATUSES.items())
    _add_up(statistics.path, "rows_read", rows_read, [num_interactions, *(drop.value for drop in drops)])
    _add_up(statistics.path, "num_interactions", num_interactions, [split.value for split in splits])
    names = [name for name in counted.values if name.startswith(FORMAT_PREFIX)]
    formats = tuple(Count(n, n.removeprefix(FORMAT_PREFIX).replace("_", " "), counted.count(n)) for n in names)
    unused = tuple(Count(n, label, counted.count(n)) for n, label in _UNUSED_FILES.items() if n in counted.values)
    _add_up(counted.path, "num_unsupported", counted.count("num_unsupported"), [number.value for number in formats])
    units = tuple(Count(name, label, statistics.count(name)) for name, label in _UNITS.items())
    num_usable = rows_read - statistics.count("rows_bad")
    _add_up(statistics.path, "rows_read without rows_bad", num_usable, [unit.value for unit in units])
    _add_up(counted.path, "num_items", counted.count("num_items"), [image.value for image in images])
    return DataCoverage(
        rows_read=rows_read,
        drops=drops,
        rows_repaired=statistics.count("rows_repaired"),
        metadata_rows_read=statistics.count("metadata_rows_read"),
        metadata_rows_bad=statistics.count("metadata_rows_bad"),
        metadata_rows_repaired=statistics.count("metadata_rows_repaired"),
        num_users=statistics.count("num_users"),
        num_items=num_items,
        num_interactions=num_interactions,
        density=statistics.number("density"),
        first_time=int(statistics.number("first_time")),
        last_time=int(statistics.number("last_time")),
        splits=splits,
        ties=tuple(Share(label, statistics.number(f"share_tied_{name}")) for name, label in _TIES.items()),
        ties_policy=params.ties,
        num_users_without_target=statistics.count("num_users_without_target"),
        history_lengths=statistics.spread("history_length"),
        item_counts=statistics.spread("item_count"),
        share_top_20_percent=statistics.number("share_interactions_top_20_percent"),
        long_tail=long_tail(training_counts, num_items),
        texts=(
            Share("Metadata", statistics.number("share_items_with_metadata")),
            *(Share(name.capitalize(), statistics.number(f"share_items_with_{name}")) for name in _TEXTS),
            Share("Address of an image", statistics.number("share_items_with_image_reference")),
        ),
        values=_values(statistics),
        times=units,
        num_times_converted=statistics.count("times_converted"),
        ids_repaired=statistics.count("ids_repaired"),
        metadata_ids_repaired=statistics.count("metadata_ids_repaired"),
        mean_title_chars=statistics.number("mean_title_chars"),
        images=images,
        unsupported_formats=formats,
        unused_files=unused,
        num_images_to_retry=sum(image.value for image in images if IMAGE_STATUSES[image.name].is_tried_again),
    )


def _add_up(path: Path, name: str, total: int, parts: list[int]) -> None:
    if total != sum(parts):
        raise ArtifactError(str(path), f"{name} is {total}, but its parts add up to {sum(parts)}", _ADVICE)
