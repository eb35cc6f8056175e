"""Import item vectors: read and check them, and join them to the shop's items by id.

Two forms are supported:

* **a parquet file** with one column of ids (strings, or whole numbers) and at least one column of vectors (lists of numbers,
  of fixed or equal size);
* **a folder** of ``.npy`` matrices and a list of the items of the rows: ``ids.txt`` with one id per line, or MMRec's
  ``i_id_mapping.csv``.  A matrix has the name of the column (``embedding.npy``), or MMRec's name (``image_feat.npy``,
  ``text_feat.npy``).

The params give the names of the columns.  Errors are reported in one line with an item: duplicate ids, rows without an id,
vectors of different widths, values that are not finite.  Vectors that all have one direction are an error, too.  Rows of other
items are skipped and counted, because the file may cover a whole catalogue of which the filter kept a part.  **A row of zeros
counts as a missing vector**: many tools write it for items without input, and it has no direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sda_core.errors import ArtifactError, DataError
from sda_core.params import ImportEmbeddingsParams
from sda_core.unit_rows import unit_rows

_ROWS = 8192  # rows checked at a time
_SAME = 1e-6  # two unit vectors with no larger difference in any value are the same in float32
_IDS, _MMREC_IDS = "ids.txt", "i_id_mapping.csv"
_MMREC_NAMES = {"image_embedding": "image_feat", "text_embedding": "text_feat"}


@dataclass(frozen=True)
class ForeignVectors:
    """Vectors by item: row r of every matrix is that of item id r + 1."""

    image: np.ndarray | None  # (I, D) float32, zero where missing; None without such a column
    text: np.ndarray | None  # (I, D) float32, zero where missing; the width may differ
    embedding: np.ndarray | None  # (I, D) float32, zero where missing; None if images and texts are still to be fused
    has_image: np.ndarray  # (I,) bool, whether a row of `image` is valid
    has_text: np.ndarray
    num_missing: int  # items without any vector
    num_other: int  # rows of items that are not in the shop

    def metadata(self, source: str, fusion: str, normalized: bool, embedding_dim: int) -> dict[str, str]:
        """The metadata for the file of an imported variant."""
        return {
            "imported_from": source,
            "imported_missing_items": str(self.num_missing),
            "imported_other_rows": str(self.num_other),
            "fusion": "none" if self.embedding is not None else fusion,
            "normalized": str(normalized).lower(),
            "embedding_dim": str(embedding_dim),
        }


class _Column:
    """One kind of vector, filled row by row."""

    def __init__(self, name: str, where: Path, num_items: int) -> None:
        self.name = name
        self.where = where
        self.known = np.zeros(num_items, dtype=bool)
        self.matrix_ID: np.ndarray | None = None

    def problem(self, text: str, advice: str = "") -> DataError:
        return DataError(str(self.where), f"{self.name!r} {text}", advice)

    def place(self, vectors_nD: np.ndarray, places_n: np.ndarray, raw_item_ids: Sequence[str]) -> None:
        """Store rows; ``places_n`` are their indices in the result.

        Raises:
            DataError: the width differs from previous rows, or values are not finite.
        """
        if not len(places_n):
            return
        finite_n = np.isfinite(vectors_nD).all(axis=1)
        if not finite_n.all():
            item = raw_item_ids[int(places_n[~finite_n][0])]
            raise self.problem(f"holds a value that is not finite (item {item!r})", "correct the file, or remove the item")
        given_nD = vectors_nD
        with np.errstate(over="ignore", under="ignore"):
            vectors_nD = np.asarray(vectors_nD, dtype=np.float32)
            squared_n = np.einsum("nd,nd->n", vectors_nD, vectors_nD)
        lost_n = given_nD.any(axis=1) & ((squared_n < np.finfo(np.float32).tiny) | np.isinf(squared_n))
        if lost_n.any():
            row = int(np.flatnonzero(lost_n)[0])
            largest, item = np.abs(given_nD[row]).max(), raw_item_ids[int(places_n[row])]
            raise self.problem(
                f"holds a vector whose length float32 cannot express (item {item!r}, largest value {largest:.3g})",
                "scale the vectors, for instance to unit length",
            )
        if self.matrix_ID is None:
            self.matrix_ID = np.zeros((len(self.known), vectors_nD.shape[1]), dtype=np.float32)
        if self.matrix_ID.shape[1] != vectors_nD.shape[1]:
            widths = f"{self.matrix_ID.shape[1]} and {vectors_nD.shape[1]}"
            raise self.problem(f"holds vectors of widths {widths} (the latter of item {raw_item_ids[int(places_n[0])]!r})")
        self.matrix_ID[places_n] = vectors_nD
        self.known[places_n] = vectors_nD.any(axis=1)

    def check_differ(self) -> None:
        """Check that not all vectors have one direction; a recommender would learn nothing from them.

        Raises:
            DataError: they do.
        """
        rows = np.flatnonzero(self.known)
        if self.matrix_ID is None or len(rows) < 2:
            return
        first_D = unit_rows(self.matrix_ID[rows[:1]])[0]
        for begin in range(0, len(rows), _ROWS):  # no second copy of a large matrix
            if np.abs(unit_rows(self.matrix_ID[rows[begin : begin + _ROWS]]) - first_D).max() > _SAME:
                return
        problem = f"has the same direction for all {len(rows)} items that have a vector"
        raise self.problem(problem, "compute them again; each item needs its own")


class _Join:
    """Maps ids to rows of the result; rejects duplicate ids."""

    def __init__(self, where: Path, raw_item_ids: Sequence[str]) -> None:
        self.where = where
        self.raw_item_ids = raw_item_ids
        self.place_of = {raw: place for place, raw in enumerate(raw_item_ids)}
        self.seen = np.zeros(len(raw_item_ids), dtype=bool)
        self.num_other = 0
        self.num_rows = 0
        self.example = ""

    def places(self, ids: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """For the rows that are items of the shop: their indices in ``ids`` and in the result.

        Raises:
            DataError: a row has no id, or an id occurs twice.
        """
        rows, places = [], []
        for row, raw in enumerate(ids):
            if raw is None:
                raise DataError(str(self.where), f"row {self.num_rows + row + 1} has no item id")
            place = self.place_of.get(raw)
            if place is None:
                self.num_other += 1
                self.example = self.example or raw
                continue
            if self.seen[place]:
                raise DataError(str(self.where), f"item {raw!r} occurs twice", "keep one row per item")
            self.seen[place] = True
            rows.append(row)
            places.append(place)
        self.num_rows += len(ids)
        return np.array(rows, dtype=np.int64), np.array(places, dtype=np.int64)


def read_vectors(path: Path, raw_item_ids: Sequence[str], params: ImportEmbeddingsParams, normalize: bool) -> ForeignVectors:
    """Read item vectors from a file or folder.

    Args:
        path: a parquet file or a folder; see the module's docstring.
        raw_item_ids: the shop's ids of its items, row r for item id r + 1.
        params: the names of the columns, and the maximum number of items without a vector.
        normalize: whether to scale ``embedding`` to unit length, as ``export_embeddings.normalize`` does for other vectors.

    Returns:
        The vectors.  A single kind of vector is also the ``embedding``; if there are only images and texts, the caller must
        fuse them.

    Raises:
        ArtifactError: there is no such file, or it cannot be read.
        DataError: the contents do not fit; the message names the item.
    """
    join = _Join(path, raw_item_ids)
    names = {
        "embedding": params.embedding_column,
        "text_embedding": params.text_column,
        "image_embedding": params.image_column,
    }
    if path.is_dir():
        columns = _read_folder(path, join, names)
    elif path.is_file():
        columns = _read_parquet(path, join, names, params.item_column)
    else:
        raise ArtifactError(
            str(path),
            "no such file or folder",
            "correct the path in import_embeddings.variants; it is relative to the project folder",
        )
    columns = {ours: column for ours, column in columns.items() if column.known.any()}
    if not columns:
        if join.num_rows == 0:
            raise DataError(str(path), "has no rows", "write one row per item")
        if join.num_other == join.num_rows:
            problem = f"none of its {join.num_rows} ids is an item of this shop"
            advice = f"its ids look like {join.example!r}, the shop's like {raw_item_ids[0]!r}"
            raise DataError(str(path), problem, advice)
        raise DataError(str(path), "has no vector that is not null or zero for any item of this shop")
    for column in columns.values():
        column.check_differ()
    image, text, only = columns.get("image_embedding"), columns.get("text_embedding"), columns.get("embedding")
    if only is None and len(columns) == 1:
        (only,) = columns.values()
    missing = ~np.any([column.known for column in columns.values()], axis=0) if only is None else ~only.known
    _check_missing(path, missing, raw_item_ids, params.max_missing_share)
    embedding = None if only is None else only.matrix_ID
    none = np.zeros(len(raw_item_ids), dtype=bool)
    return ForeignVectors(
        image=None if image is None else image.matrix_ID,
        text=None if text is None else text.matrix_ID,
        embedding=unit_rows(embedding) if embedding is not None and normalize else embedding,
        has_image=none if image is None else image.known,
        has_text=none if text is None else text.known,
        num_missing=int(missing.sum()),
        num_other=join.num_other,
    )


def _check_missing(path: Path, missing_I: np.ndarray, raw_item_ids: Sequence[str], allowed: float) -> None:
    share = float(missing_I.mean())
    if share > allowed:
        examples = ", ".join(repr(raw_item_ids[place]) for place in np.flatnonzero(missing_I)[:3])
        raise DataError(
            str(path),
            f"has no vector for {int(missing_I.sum())} of the {len(missing_I)} items ({100 * share:.3g} %), e.g. {examples}",
            f"add them, or raise import_embeddings.max_missing_share (now {allowed:g}); such items get a vector of zeros",
        )


# ---------------------------------------------------------------------------------------------------- parquet
def _read_parquet(path: Path, join: _Join, names: Mapping[str, str], item_column: str) -> dict[str, _Column]:
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if item_column not in found.names:
                raise DataError(
                    str(path),
                    f"has no column {item_column!r} (got {', '.join(found.names)})",
                    "set import_embeddings.item_column",
                )
            present = {ours: theirs for ours, theirs in names.items() if theirs in found.names}
            if twice := [name for name in (item_column, *present.values()) if found.names.count(name) > 1]:
                raise DataError(
                    str(path), f"has {found.names.count(twice[0])} columns of the name {twice[0]!r}", "keep one of them"
                )
            if not present:
                raise DataError(
                    str(path),
                    f"has no column of vectors (expected {', '.join(names.values())}; got {', '.join(found.names)})",
                    "set import_embeddings.embedding_column, or image_column and text_column",
                )
            columns = {ours: _Column(theirs, path, len(join.raw_item_ids)) for ours, theirs in present.items()}
            for batch in file.iter_batches(batch_size=_ROWS, columns=[item_column, *present.values()]):
                rows, places = join.places(_texts(path, item_column, batch.column(item_column)))
                for ours, theirs in present.items():
                    vectors, is_there = _matrix(columns[ours], batch.column(theirs).take(pa.array(rows)))
                    columns[ours].place(vectors, places[is_there], join.raw_item_ids)
            return columns
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0].removesuffix(".")
        advice = "name a parquet file, or a folder with matrices (.npy) and their list of ids"
        raise ArtifactError(str(path), f"cannot be read as a parquet file ({reason})", advice) from None


def _texts(path: Path, name: str, column: pa.Array) -> list[str | None]:
    """Ids as texts; whole numbers become their digits."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise DataError(str(path), f"column {name!r} should hold texts or whole numbers (got {column.type})")
    return column.cast(pa.string()).to_pylist()


def _matrix(column: _Column, array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The non-null rows as a matrix, and their indices."""
    if isinstance(array, pa.ExtensionArray):  # a fixed-shape tensor is stored as a list
        array = array.storage
    kind = array.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise column.problem(f"should hold lists of numbers (got {kind})")
    is_there = array.is_valid().to_numpy(zero_copy_only=False)
    there = array.filter(array.is_valid())
    widths = there.value_lengths().unique().to_pylist()
    if len(widths) > 1:
        raise column.problem(f"holds vectors of widths {', '.join(str(width) for width in sorted(widths))} (expected one width)")
    values = there.flatten().to_numpy(zero_copy_only=False)  # a null among numbers becomes NaN
    return values.reshape(len(there), widths[0] if widths else 0), is_there


# ----------------------------------------------------------------------------------------------------- folder
def _read_folder(path: Path, join: _Join, names: Mapping[str, str]) -> dict[str, _Column]:
    ids = _ids(path)
    files: dict[str, Path] = {}
    for ours, theirs in names.items():
        candidates = (path / f"{name}.npy" for name in (theirs, _MMREC_NAMES.get(ours, theirs)))
        file = next((file for file in candidates if file.is_file()), None)
        if file is not None:
            files[ours] = file
    if not files:
        expected = ", ".join(f"{name}.npy" for name in (*names.values(), *_MMREC_NAMES.values()))
        raise ArtifactError(str(path), f"holds no matrix of vectors (expected one of {expected})")
    matrices = {ours: _load(file, len(ids)) for ours, file in files.items()}
    columns = {ours: _Column(file.name, path, len(join.raw_item_ids)) for ours, file in files.items()}
    for start in range(0, len(ids), _ROWS):
        rows, places = join.places(ids[start : start + _ROWS])
        for ours, matrix in matrices.items():
            columns[ours].place(matrix[start + rows], places, join.raw_item_ids)
    return columns


def _load(file: Path, num_ids: int) -> np.ndarray:
    """A memory-mapped matrix."""
    try:
        with file.open("rb") as stream:
            is_archive = stream.read(2) == b"PK"
        if is_archive:
            raise ArtifactError(str(file), "is an archive of arrays (.npz), expected one array", "save it with numpy.save")
        matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(str(file), f"cannot be read as a matrix of numbers ({error})") from None
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise DataError(str(file), f"should be a matrix of numbers (got shape {matrix.shape} of {matrix.dtype})")
    if len(matrix) != num_ids:
        raise DataError(str(file), f"has {len(matrix)} rows, but its list of ids has {num_ids}")
    return matrix


def _ids(folder: Path) -> list[str]:
    """The item id of each row."""
    plain, mapping = folder / _IDS, folder / _MMREC_IDS
    try:
        if plain.is_file():
            return _listed(plain)
        if mapping.is_file():
            return list(_mapped(mapping))
    except UnicodeDecodeError as error:
        raise ArtifactError(str(plain), f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except pl.exceptions.PolarsError as error:
        raise ArtifactError(str(mapping), f"cannot be read as a table of ids ({error})") from None
    raise ArtifactError(
        str(folder), f"does not say which item each row is (expected {_IDS} with one id a line, or MMRec's {_MMREC_IDS})"
    )


def _listed(plain: Path) -> list[str]:
    """The ids in a text file; blank lines at its end are not ids."""
    lines = plain.read_text(encoding="utf-8-sig").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if blank := next((number for number, line in enumerate(lines, start=1) if not line.strip()), None):
        raise DataError(str(plain), f"line {blank} is blank", "write one id per line, in the order of the rows")
    return lines


def _mapped(mapping: Path) -> Iterator[str]:
    """The ids in MMRec's table in the order of its numbers, which start at 0."""
    table = pl.read_csv(mapping, separator="\t", infer_schema=False)
    if table.width != 2 or "itemID" not in table.columns:
        raise DataError(str(mapping), f"should have two columns, one of them itemID (got {', '.join(table.columns)})")
    numbers = table["itemID"].cast(pl.Int64, strict=False)
    if sorted(numbers.to_list(), key=lambda number: -1 if number is None else number) != list(range(len(table))):
        raise DataError(str(mapping), f"column 'itemID' should run from 0 to {len(table) - 1}, each once")
    raw = table.drop("itemID").to_series()
    yield from raw.gather(numbers.arg_sort()).to_list()
