"""All paths and table schemas of a project, and atomic writing.

* :class:`Workspace` is a frozen dataclass of paths below one root.
* :class:`Table` is a schema: ``read`` checks presence and columns, ``write`` writes a temporary file and renames it, so
  that a reader never sees an incomplete file.
* :func:`replace_directory` does the same for a whole directory.
* :func:`storage` turns a full disk, a read-only folder or a missing permission into an error of one line.

The formats are Parquet, safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from safetensors import SafetensorError

from sda_core.errors import ArtifactError, SDAError, StorageError, failed_path, storage_errno, storage_error

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# ------------------------------------------------------------------------------------------------- paths
MANIFEST_NAME = "manifest.json"
"""Name of the list of raw files in their folder."""

FILE_NAME_PATTERN = r"^[^/\\:\x00-\x1f\x7f.][^/\\:\x00-\x1f\x7f]*$"
"""A name that cannot leave its folder (also on Windows, hence no colon) and is not hidden."""


@dataclass(frozen=True)
class Workspace:
    """Every path of a run.  ``root`` is the project folder (the one with ``params.yaml``)."""

    root: Path

    # data -----------------------------------------------------------------------------------------------
    @property
    def raw(self) -> Path:
        """Raw files as downloaded, and the manifest."""
        return self.root / "data" / "raw"

    @property
    def truth(self) -> Path:
        """Table :data:`TRUTH`; only the stage ``control_embeddings`` depends on it."""
        return self.root / "data" / "truth.parquet"

    @property
    def filtered(self) -> Path:
        """Interactions, items and users after filter and split."""
        return self.root / "data" / "filtered"

    @property
    def interactions(self) -> Path:
        """Table :data:`INTERACTIONS`."""
        return self.filtered / "interactions.parquet"

    @property
    def items(self) -> Path:
        """Table :data:`ITEMS`."""
        return self.filtered / "items.parquet"

    @property
    def users(self) -> Path:
        """Table :data:`USERS`."""
        return self.filtered / "users.parquet"

    @property
    def statistics(self) -> Path:
        """Counts of the filter stage, flat JSON."""
        return self.filtered / "statistics.json"

    def negatives(self, protocol: str) -> Path:
        """Table :data:`NEGATIVES` of a sampled protocol; empty under ``fullrank``."""
        return self.root / "data" / "negatives" / f"{protocol}.parquet"

    @property
    def images(self) -> Path:
        """Folder of image shards, table :data:`IMAGES`."""
        return self.root / "data" / "images"

    @property
    def image_coverage(self) -> Path:
        """Counts of the image stage by status, flat JSON."""
        return self.images / "coverage.json"

    # models ---------------------------------------------------------------------------------------------
    def adapter(self, variant: str) -> Path:
        """PEFT folder of a trained variant, with its loss curve ``loss.tsv``."""
        return self.root / "adapters" / variant

    def embeddings(self, variant: str) -> Path:
        """Parquet file of item vectors; variant ``id`` has ids only."""
        return self.root / "embeddings" / f"{variant}.parquet"

    def index(self, variant: str) -> Path:
        """Folder of the FAISS index: ``items.faiss``, ``index.json``, ``ids.parquet``."""
        return self.root / "indexes" / variant

    def recommender(self, variant: str, recommender: str) -> Path:
        """Folder of a recommender: a folder for each seed, and ``history.tsv``, the mean over seeds by epoch."""
        return self.root / "models" / variant / recommender

    def model(self, variant: str, recommender: str, seed: int) -> Path:
        """Folder of a recommender trained with one seed: ``model.safetensors``, ``model.json``, ``history.tsv``."""
        return self.recommender(variant, recommender) / str(seed)

    def positions(self, variant: str, recommender: str) -> Path:
        """Table :data:`SEED_POSITIONS`: the position of each test user's target, for every seed."""
        return self.root / "evaluation" / variant / f"{recommender}.parquet"

    def metrics(self, variant: str, recommender: str) -> Path:
        """Flat JSON of scalars."""
        return self.root / "metrics" / variant / f"{recommender}.json"

    @property
    def comparisons(self) -> Path:
        """Gains of the trained variants, with intervals: flat JSON for ``dvc metrics diff``, written by the report stage."""
        return self.root / "comparisons.json"

    @property
    def pairs(self) -> Path:
        """Every paired difference between variants, with p-values: flat JSON beside the page."""
        return self.report.parent / "pairs.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report" / "index.html"

    # beside the pipeline: ignored by Git and DVC ----------------------------------------------------------
    @property
    def costs(self) -> Path:
        """Costs of the stages, one JSON line per run; see :mod:`sda_core.costs`."""
        return self.root / "costs" / "stages.jsonl"

    @property
    def costs_page(self) -> Path:
        """The page of the report with the costs of the run."""
        return self.costs.parent / "report.html"

    @property
    def experiments(self) -> Path:
        """Tables and plots of the scripts in ``experiments/``."""
        return self.root / "experiments"

    @property
    def experiments_page(self) -> Path:
        """The page of the report with the tables and plots of the experiments."""
        return self.experiments / "results" / "report.html"

    def resume(self, stage: str, *parts: str) -> Path:
        """Scratch folder of an unfinished stage; outside DVC's outs, because DVC deletes those before a run."""
        return self.root.joinpath(".resume", stage, *parts)


# ------------------------------------------------------------------------------------------------ tables
@dataclass(frozen=True)
class Table:
    """A parquet table's name and columns.

    Extra columns are allowed only if ``open`` is true (item vectors differ in width and number).
    """

    name: str
    columns: Mapping[str, pl.DataType | type[pl.DataType]]
    open: bool = False

    def check(self, schema: Mapping[str, pl.DataType], where: Path) -> None:
        """Compare a file's schema with this one.

        Raises:
            ArtifactError: a column is missing, unexpected or of another type.
        """
        for column, dtype in self.columns.items():
            if column not in schema:
                raise ArtifactError(str(where), f"{self.name} table has no column {column!r} (got {', '.join(schema)})")
            if schema[column] != dtype:
                raise ArtifactError(str(where), f"{self.name} table: column {column!r} should be {dtype} (got {schema[column]})")
        extra = [] if self.open else [column for column in schema if column not in self.columns]
        if extra:
            raise ArtifactError(str(where), f"{self.name} table has unexpected columns {', '.join(extra)}")

    def scan(self, path: Path) -> pl.LazyFrame:
        """Lazy reader of a checked file.

        Raises:
            ArtifactError: the file is missing, is not a parquet file, or has another schema.
        """
        if path.is_dir():
            raise ArtifactError(str(path), f"is a folder, expected the {self.name} table", "move it away and run `dvc repro`")
        if not path.is_file():
            raise ArtifactError(str(path), f"{self.name} table is missing", "run `dvc repro` to make it")
        with _readable(path):
            frame = pl.scan_parquet(path)
            schema = dict(frame.collect_schema())
        self.check(schema, path)
        return frame

    def query(self, path: Path, query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        """The rows of a query to the checked table, of which only the needed columns are read.

        Raises:
            ArtifactError: as :meth:`scan`, and if a part of the file is damaged.
        """
        frame = query(self.scan(path))
        with _readable(path):
            return frame.collect()

    def read(self, path: Path) -> pl.DataFrame:
        """The whole checked table; raises as :meth:`query`."""
        return self.query(path, lambda rows: rows)

    def count(self, path: Path) -> int:
        """The number of rows, read from the file's footer; raises as :meth:`query`."""
        return int(self.query(path, lambda rows: rows.select(pl.len())).item())

    def metadata(self, path: Path) -> dict[str, str]:
        """The metadata given to :meth:`write`; raises as :meth:`scan`."""
        self.scan(path)
        return {key: value for key, value in pl.read_parquet_metadata(path).items() if key != "ARROW:schema"}

    def write(self, frame: pl.DataFrame, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a checked table; the bytes depend only on the arguments and the polars version.

        Args:
            frame: the rows.
            path: path of the file.
            metadata: names and texts for the file's footer.

        Raises:
            ArtifactError: the frame has another schema.
            StorageError: the file cannot be written.
        """
        self.check(dict(frame.schema), path)
        told = dict(sorted((metadata or {}).items())) or None
        write_parquet(frame, path, row_group_size=65_536, metadata=told)


@contextmanager
def _readable(path: Path) -> Generator[None]:
    """Context that turns the errors of a damaged parquet file, or of its storage, into one line."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        if (failure := storage_error(error, str(path), "read")) is not None:
            raise failure from None
        reason = str(error).split("\n", 1)[0]
        raise ArtifactError(str(path), f"is not a readable parquet file ({reason})", "delete it and run `dvc repro`") from None


TRUTH = Table(
    "truth",
    {
        "raw_item_id": pl.String,
        "attribute": pl.String,
        "value": pl.String,
        "shown_by": pl.String,  # both, image or text: the modalities that can show the attribute
        "is_named": pl.Boolean,  # whether this item's text names it
    },
)
"""The true attributes of the built-in shop's items, one row for each item and attribute; empty for every other dataset."""

INTERACTIONS = Table(
    "interactions",
    {
        "user_id": pl.Int32,
        "item_id": pl.Int32,
        "timestamp": pl.Int64,  # seconds since 1970
        "rating": pl.Float32,
        "split": pl.String,  # train, valid, test; with split global_time also valid_rest, test_rest (data/split.py)
    },
)  # sorted by user_id, then time (to the millisecond where the edition has it), then the raw file's order

ITEMS = Table(
    "items",
    {
        "item_id": pl.Int32,
        "raw_item_id": pl.String,
        "title": pl.String,  # cleaned text; "" if missing
        "brand": pl.String,
        "price": pl.String,
        "categories": pl.List(pl.String),  # the first path only
        "features": pl.List(pl.String),
        "description": pl.String,
        "image_references": pl.List(pl.String),  # URLs or relative paths, best first
        "has_metadata": pl.Boolean,
    },
)  # sorted by item_id, which runs from 1 to I

USERS = Table("users", {"user_id": pl.Int32, "raw_user_id": pl.String})

IMAGES = Table(
    "images",
    {
        "item_id": pl.Int32,
        "raw_item_id": pl.String,
        "status": pl.String,  # one of image_store.STATUSES
        "image": pl.Binary,  # encoded RGB image; null unless ok
        "width": pl.Int32,
        "height": pl.Int32,
        "reason": pl.String,  # of unsupported: the name of the format; else null
    },
)

EMBEDDINGS = Table("embeddings", {"item_id": pl.Int32, "raw_item_id": pl.String}, open=True)
"""Further columns: ``image_embedding``, ``text_embedding``, ``embedding`` (fused), each ``fixed_size_list<float32>``.

A joint pass has only ``embedding``, and imported vectors may have only this one; the variant ``id`` has none of them.
"""

NEGATIVES = Table(
    "negatives",
    {
        "user_id": pl.Int32,  # those with a test target, ascending
        "candidates": pl.Array(pl.Int32, 100),  # distinct item ids, ascending, padded with zeros if the catalogue is too small
    },
)
"""The metadata hold the protocol, the seed and the SHA-256 of the candidates."""

POSITIONS = Table(
    "positions",
    {
        "user_id": pl.Int32,
        "target_item_id": pl.Int32,
        "position": pl.Float64,  # 1 = first place, under the tie policy; halves occur under `mean`
        "candidates": pl.Int32,  # number of ranked items, the target included
        "num_better": pl.Int32,  # candidates that score strictly higher than the target
        "num_tied": pl.Int32,  # other candidates that score the same
    },
)
"""Positions of one trained recommender."""

SEED_POSITIONS = Table("positions", {"seed": pl.Int32, **POSITIONS.columns})
"""Positions for every seed of a recommender, sorted by seed (in the order of the params), then user; 0 without a seed."""


# ------------------------------------------------------------------------------------------ writing whole
@contextmanager
def storage(path: Path, verb: str = "written") -> Generator[None, None, None]:
    """Context that turns errors of the file system at ``path``, from any library, into one line; other errors pass.

    Raises:
        StorageError: the disk is full or read-only, a permission is missing, or a folder is in the place of a file.
    """
    try:
        yield
    except SDAError:
        raise
    except (OSError, RuntimeError, pl.exceptions.PolarsError, SafetensorError) as error:
        if (failure := storage_error(error, *_path_of_error(error, path, verb))) is not None:
            raise failure from None
        if verb == "written" and _cannot_be_made(error, path):
            raise StorageError(str(path), "cannot be created there", "use another folder") from None
        raise


def _cannot_be_made(error: Exception, path: Path) -> bool:
    """Whether the system says of a new file in an existing folder that it does not exist, as in ``/proc``."""
    named = failed_path(error)
    if named is None or not isinstance(error, FileNotFoundError):
        return False
    new = Path(named)
    return new.parent.is_dir() and (new == path or new in path.parents or new.name.startswith(f".{path.name}."))


def _path_of_error(error: Exception, path: Path, verb: str) -> tuple[str, str]:
    """The path that an error concerns: a folder above ``path``, another file that was being read, or ``path`` itself."""
    named = failed_path(error)
    if named is None:
        return str(path), verb
    other = Path(named)
    if other in path.parents:
        return str(other), verb
    return (str(path), verb) if other.is_relative_to(path.parent) else (str(other), "used")


@contextmanager
def replace_file(path: Path) -> Generator[Path, None, None]:
    """Context that yields a temporary path beside ``path`` and renames it to ``path`` if the block succeeds.

    Raises:
        StorageError: the file cannot be written; an existing file at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            yield temporary
            with temporary.open("r+b") as handle:  # Windows syncs only files that are open for writing
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):  # this error would hide the one of the block
                temporary.unlink(missing_ok=True)


def write_parquet(
    frame: pl.DataFrame, path: Path, *, row_group_size: int | None = None, metadata: dict[str, str] | None = None
) -> None:
    """Write any table atomically, without a check against a schema.

    Args:
        frame: the rows.
        path: path of the file.
        row_group_size: rows per row group; None: polars decides.
        metadata: names and texts for the file's footer.

    Raises:
        StorageError: the file cannot be written.
    """

    def write(target: Path | io.BytesIO) -> None:
        frame.write_parquet(target, compression="zstd", row_group_size=row_group_size, statistics=True, metadata=metadata)

    with replace_file(path) as temporary:
        try:
            write(temporary)
        except pl.exceptions.ComputeError as error:
            if storage_errno(error) is not None:
                raise
            # If a page header or the footer does not fit on the disk, polars reports only "transport error".
            # Writing the same bytes with Python gives the reason.
            whole = io.BytesIO()
            write(whole)
            temporary.write_bytes(whole.getvalue())


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of ``path`` from killed processes; those of running processes are kept."""
    begin, end = f".{path.name}.", ".tmp"
    for left in path.parent.iterdir():
        number = left.name.removeprefix(begin).removesuffix(end)
        if left.name == f"{begin}{number}{end}" and number.isdigit() and not _is_running(int(number)):
            with suppress(OSError):  # cleaning up is optional
                left.unlink()


def _is_running(process: int) -> bool:
    """Whether a process with this id runs here; always true on Windows, where the check would end the process."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def replace_directory(path: Path) -> Generator[Path, None, None]:
    """Context that yields a temporary folder beside ``path``; it replaces the folder at ``path`` if the block succeeds.

    Raises:
        StorageError: a file of the folder cannot be written; an existing folder at ``path`` is unchanged.
    """
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            _swap(temporary, path)
        except StorageError as error:
            inner = Path(error.where)
            if not inner.is_relative_to(temporary):
                raise
            raise StorageError(str(path / inner.relative_to(temporary)), error.problem, error.advice) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Replace a folder by another one, by renames only, so that neither is ever visible in part."""
    if not (path.is_dir() or path.is_symlink()):
        new.replace(path)
        return
    old = new.with_name(f"{new.stem}.old.tmp")
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, with stable formatting; a number that is not finite is an error, not ``NaN``."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def tsv(records: Sequence[DataclassInstance]) -> str:
    """Format records of one dataclass as a table for ``dvc plots``: a header, tabs, empty for None; "" without records."""
    rows = [asdict(record) for record in records]
    lines = ["\t".join(rows[0])] if rows else []
    lines += ["\t".join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "".join(line + "\n" for line in lines)


def write_tsv(path: Path, records: Sequence[DataclassInstance]) -> None:
    """Write records in the format of :func:`tsv`."""
    write_text(path, tsv(records))


def read_json(path: Path, name: str) -> Any:
    """Read a JSON file of the pipeline.

    Raises:
        ArtifactError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ArtifactError(str(path), f"{name} is missing", "run `dvc repro` to make it") from None
    except OSError as error:
        if (failure := storage_error(error, str(path), "read")) is not None:
            raise failure from None
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(str(path), f"{name} is not valid JSON ({error})", "delete it and run `dvc repro`") from None
