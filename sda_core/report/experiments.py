"""Read the tables and plots under ``experiments/``, for ``sda report --experiments``.

A table is a ``.tsv`` or ``.csv`` file with a header, or a pipe table in a ``.md`` file, with the heading above as caption.  A
plot is a ``.png`` or ``.svg`` file, shown as an image, so that scripts in it do not run.  A folder of ``experiments/results``
is one experiment, and so is every other file.  Files that are too large or unreadable are listed but not shown.  Experiments
are not part of the pipeline, so the pipeline's page does not show them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from sda_core.errors import ArtifactError
from sda_core.report.model import EncodedImage, Experiment, Table

_SEPARATORS = {".tsv": "\t", ".csv": ","}
_PLOTS = {".png": "image/png", ".svg": "image/svg+xml"}
_MAX_EXPERIMENTS = 40
_MAX_BYTES = 400_000
_MAX_ROWS = 40
_MAX_COLUMNS = 12
_MAX_TABLES = 12  # per file
_RESULTS = "results"
_SKIPPED = {"positions", "runs", "gradients", "views", "long_tail"}  # state from which the scripts resume


def read_experiments(folder: Path) -> tuple[Experiment, ...]:
    """Read the experiments, sorted by path; beyond ``_MAX_EXPERIMENTS`` they are only listed.

    Args:
        folder: the folder ``experiments/``.

    Raises:
        ArtifactError: there are no experiments.
    """
    found = experiments(folder)
    if not found:
        raise ArtifactError(
            str(folder),
            "contains no table and no plot",
            "run one of `python -m experiments`, which write to experiments/results/",
        )
    return found


def experiments(folder: Path) -> tuple[Experiment, ...]:
    """As :func:`read_experiments`, but empty if there are none."""
    found = [p for p in folder.rglob("*") if p.suffix in {*_SEPARATORS, *_PLOTS, ".md"} and p.is_file()]
    together: dict[str, list[Path]] = {}
    for path in sorted(path for path in found if not _SKIPPED & set(path.relative_to(folder).parts)):
        parts = path.relative_to(folder).parts
        together.setdefault(parts[1] if parts[0] == _RESULTS and len(parts) == 3 else "/".join(parts), []).append(path)
    shown = [_joined(name, [_read(path, name) for path in together[name]]) for name in list(together)[:_MAX_EXPERIMENTS]]
    left_out = list(together)[_MAX_EXPERIMENTS:]
    if left_out:
        shown.append(Experiment(f"{len(left_out)} more", (), (), (f"not shown: {', '.join(left_out)}",)))
    return tuple(shown)


def _joined(name: str, parts: list[Experiment]) -> Experiment:
    """The files of one experiment."""
    return Experiment(
        name,
        tuple(table for part in parts for table in part.tables),
        tuple(plot for part in parts for plot in part.plots),
        tuple(remark for part in parts for remark in part.remarks),
    )


def _read(path: Path, name: str) -> Experiment:
    prefix = "" if name.endswith(path.name) else f"{path.name} "
    if path.stat().st_size > _MAX_BYTES:
        return Experiment(name, (), (), (f"{prefix}too large to be shown here ({path.stat().st_size:,} bytes)",))
    try:
        if path.suffix in _PLOTS:
            return Experiment(name, (), (EncodedImage(_PLOTS[path.suffix], path.read_bytes()),), ())
        if path.suffix == ".md":
            tables = tuple(_pipe_tables(path.read_text(encoding="utf-8-sig").splitlines()))
        else:
            frame = pl.read_csv(path, separator=_SEPARATORS[path.suffix], infer_schema=False)
            tables = (_cut("", tuple(frame.columns), [tuple(cell or "" for cell in row) for row in frame.iter_rows()]),)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        return Experiment(name, (), (), (f"{prefix}cannot be read as a table ({type(error).__name__})",))
    if not tables:
        return Experiment(name, (), (), (f"{prefix}holds no table",))
    left_out = (f"{prefix}{len(tables) - _MAX_TABLES} more tables",) if len(tables) > _MAX_TABLES else ()
    return Experiment(name, tables[:_MAX_TABLES], (), left_out)


def _cut(caption: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """The part of a table that is shown, and a remark on the rest."""
    left_out = [f"{len(rows) - _MAX_ROWS:,} more rows"] if len(rows) > _MAX_ROWS else []
    left_out += [f"{len(columns) - _MAX_COLUMNS} more columns"] if len(columns) > _MAX_COLUMNS else []
    return Table(caption, columns[:_MAX_COLUMNS], tuple(row[:_MAX_COLUMNS] for row in rows[:_MAX_ROWS]), ", ".join(left_out))


def _pipe_tables(lines: list[str]) -> Iterator[Table]:
    """The pipe tables of a Markdown file, each with the last heading before it; all cells are text."""
    caption, place = "", 0
    while place < len(lines):
        line = lines[place].strip()
        place += 1
        if line.startswith("#"):
            caption = line.strip("#").strip().replace("`", "")
        if not line.startswith("|") or place == len(lines):
            continue
        columns, rule, rows = _cells(line), _cells(lines[place].strip()), []
        if len(rule) != len(columns) or not all(re.fullmatch(":?-+:?", cell) for cell in rule):
            continue
        for row in lines[place + 1 :]:
            if not row.strip().startswith("|"):
                break
            cells = _cells(row.strip())
            rows.append((*cells, *[""] * (len(columns) - len(cells)))[: len(columns)])
        place += 1 + len(rows)
        yield _cut(caption, columns, rows)
        caption = ""  # the caption is not repeated for a second table under the same heading


def _cells(line: str) -> tuple[str, ...]:
    """The cells between the pipes of a line; ``\\|`` is a pipe in a cell."""
    inner = re.sub(r"(?<!\\)\|$", "", line.removeprefix("|"))
    return tuple(cell.strip().replace("\\|", "|").replace("`", "") for cell in re.split(r"(?<!\\)\|", inner))
