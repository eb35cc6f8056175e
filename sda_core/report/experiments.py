"""Tables and plots that lie under ``experiments/``: what a run of the scripts there left, shown as it is.

A table is a ``.tsv`` or ``.csv`` file with a header, a plot is a ``.png`` or ``.svg`` file (shown as a picture, so nothing
in it runs).  Files that are too large or cannot be read are named, not shown: they are no part of the pipeline.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from sda_core.report.model import Experiment, Picture

_TABLES = {".tsv": "\t", ".csv": ","}
_PLOTS = {".png": "image/png", ".svg": "image/svg+xml"}
_MAX_FILES = 24
_MAX_BYTES = 400_000
_MAX_ROWS = 40
_MAX_COLUMNS = 12
_SKIPPED = {"positions", "runs"}  # what the scripts keep to go on from


def experiments(folder: Path) -> tuple[Experiment, ...]:
    """What there is to show, by path; the first ``24`` of them."""
    found = [path for path in folder.rglob("*") if path.suffix in {*_TABLES, *_PLOTS} and path.is_file()]
    shown = [path for path in sorted(found) if not _SKIPPED & set(path.relative_to(folder).parts)]
    return tuple(_read(path, path.relative_to(folder).as_posix()) for path in shown[:_MAX_FILES])


def _read(path: Path, name: str) -> Experiment:
    if path.stat().st_size > _MAX_BYTES:
        return Experiment(name, (), (), None, f"too large to be shown here ({path.stat().st_size:,} bytes)")
    if path.suffix in _PLOTS:
        return Experiment(name, (), (), Picture(_PLOTS[path.suffix], path.read_bytes()), "")
    try:
        table = pl.read_csv(path, separator=_TABLES[path.suffix], infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        return Experiment(name, (), (), None, f"cannot be read as a table ({type(error).__name__})")
    rows = tuple(tuple(cell or "" for cell in row) for row in table.head(_MAX_ROWS).iter_rows())
    columns = tuple(table.columns)
    left_out = [f"{len(table) - _MAX_ROWS:,} more rows"] if len(table) > _MAX_ROWS else []
    left_out += [f"{len(columns) - _MAX_COLUMNS} more columns"] if len(columns) > _MAX_COLUMNS else []
    return Experiment(name, columns[:_MAX_COLUMNS], tuple(row[:_MAX_COLUMNS] for row in rows), None, ", ".join(left_out))
