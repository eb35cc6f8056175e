"""Build and search a FAISS index of item vectors; only this module imports FAISS.

* An index is specified by FAISS's factory string (``Flat``, ``HNSW32``, ``IVF256,Flat``, ``IVF256,SQ8``, ...).
* Vectors are scaled to unit length, so inner products are cosines.
* **Built on one thread.**  In FAISS before 1.15 HNSW links depend on the order in which threads add vectors (faiss issues 983
  and 2548); on one thread two builds give equal bytes in every version.  k-means and PQ training are seeded inside FAISS.
* Recall is measured with items as queries.  The item itself is excluded from both lists, because it would always be found.
  A neighbour counts as correct if its true similarity is at least that of the k-th true neighbour, so ties do not matter.
* ``ids.parquet`` maps positions in the index to item ids; ``index.json`` holds its hash and that of the item vectors.
* :func:`inner_product_search` is different: an index in memory, over vectors of any length.
* :func:`load_index` opens a folder for many queries; :func:`search` and :func:`neighbors` open it for one.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import polars as pl

from sda_core.artifacts import Table, read_json, replace_file, write_json
from sda_core.errors import ArtifactError, ConfigError, DataError
from sda_core.params import IndexParams, RetrievalParams, SearchParams
from sda_core.unit_rows import row_lengths, unit_rows

_log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

INDEX_IDS = Table("index ids", {"position": pl.Int32, "item_id": pl.Int32})  # position in the index, from 0

_INDEX, _IDS, _META = "items.faiss", "ids.parquet", "index.json"
_WRITE_BYTES = 1 << 20
_SLACK = 1e-6  # similarities closer than this count as equal: float32 sums in another order differ by this much
_WHERE = "params.yaml: build_index"
_ADVICE = "run `dvc repro` to make it again"


def _matrix(vectors: npt.NDArray[np.floating], what: str) -> Vectors:
    """A copy of the rows; float32, contiguous.

    Raises:
        DataError: the input is not a matrix or not finite.
    """
    rows = np.array(vectors, dtype=np.float32, order="C")
    if rows.ndim != 2 or not rows.shape[1]:
        raise DataError(what, f"should be a matrix of one vector per row (got shape {rows.shape})")
    if not np.isfinite(rows).all():
        raise DataError(what, "hold values that are not finite")
    return rows


def _scale(rows: Vectors, what: str) -> Vectors:
    """The rows scaled to unit length, in place.

    Raises:
        DataError: a row is zero.
    """
    lengths = row_lengths(rows)
    if (lengths == 0).any():
        problem = f"{int((lengths == 0).sum())} of {len(rows)} are all zero, so they have no cosine"
        raise DataError(what, problem, "check the adapter's training: the representation may have collapsed")
    return unit_rows(rows, out=rows)


def _ids_hash(item_ids: Ids) -> str:
    return hashlib.sha256(np.ascontiguousarray(item_ids, dtype="<i4").tobytes()).hexdigest()


def _vectors_hash(vectors_ID: npt.NDArray[np.floating]) -> str:
    """Hex SHA-256 of all item vectors before they are scaled, including rows of zeros."""
    digest = hashlib.sha256(repr(vectors_ID.shape).encode())
    digest.update(np.ascontiguousarray(vectors_ID, dtype="<f4").tobytes())
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Generator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """The last clause of a FAISS error, without C++ function and file names."""
    text = " ".join(str(error).split())
    return re.sub(r"^.*?\.(?:cpp|h|cu):\d+: ", "", text).removeprefix("Error: ")


def _on_gpu(index: faiss.Index) -> faiss.Index | None:
    """The index on the first GPU; None if FAISS has no GPU build, finds no GPU, or has no GPU version of this index."""
    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0):
        return None
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        _log.info("FAISS keeps this index on the CPU: %s", _reason(error))
        return None


def _make(vectors_ID: Vectors, params: SearchParams, where: str = _WHERE) -> faiss.Index:
    """A trained and filled index, on the CPU.

    Args:
        vectors_ID: the vectors to index, unchanged.
        params: factory string and search settings.
        where: name of the section, for messages.
    """
    try:
        index = faiss.index_factory(vectors_ID.shape[1], params.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        problem = (
            f"FAISS cannot make an index from {params.factory!r} for vectors of width {vectors_ID.shape[1]} ({_reason(error)})"
        )
        raise ConfigError(f"{where}.factory", problem, "use e.g. Flat, HNSW32, 'IVF256,Flat' or 'IVF256,SQ8'") from None
    for key, name, value in (("nprobe", "nprobe", params.nprobe), ("efSearch", "ef_search", params.ef_search)):
        if value is None:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, key, value)
        except RuntimeError:
            problem = f"is {value}, but an index of the kind {params.factory!r} has no such setting"
            raise ConfigError(f"{where}.{name}", problem, "set it to null") from None
    try:
        filling = _on_gpu(index)
        if filling is not None:
            filling.train(vectors_ID)
            filling.add(vectors_ID)
            return faiss.index_gpu_to_cpu(filling)
        with _one_thread():
            index.train(vectors_ID)
            index.add(vectors_ID)
    except RuntimeError as error:
        problem = f"{params.factory!r} cannot hold these {len(vectors_ID)} vectors ({_reason(error)})"
        raise ConfigError(f"{where}.factory", problem, "use fewer lists or codes, or Flat") from None
    return index


def _without_self(found: npt.NDArray[np.int64], own: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The first ``k`` of each row of ``found`` (Q, k + 1) that differ from the row's own position; padded with -1."""
    kept = np.full((len(found), k), -1, dtype=np.int64)
    for row, (places, mine) in enumerate(zip(found, own, strict=True)):
        others = places[places != mine][:k]
        kept[row, : len(others)] = others
    return kept


def _recall(index: faiss.Index, vectors_ID: Vectors, params: IndexParams) -> tuple[float, float]:
    """Recall at ``recall_at`` against exact search, and queries per second of the index."""
    num_items = len(vectors_ID)
    k = min(params.recall_at, num_items - 1)
    if k < 1:
        return 1.0, 0.0
    own = np.unique(np.linspace(0, num_items - 1, min(params.num_queries, num_items)).round().astype(np.int64))
    queries = vectors_ID[own]
    exact = faiss.IndexFlatIP(vectors_ID.shape[1])
    exact.add(vectors_ID)
    truth = _without_self((_on_gpu(exact) or exact).search(queries, k + 1)[1], own, k)
    begin = time.perf_counter()
    found = _without_self((_on_gpu(index) or index).search(queries, k + 1)[1], own, k)
    seconds = time.perf_counter() - begin
    # The threshold is the k-th true similarity.  Scores of compressed indexes are approximate, so compute them exactly.
    bar = np.einsum("qd,qd->q", queries, vectors_ID[truth[:, -1]]) - _SLACK
    similarity = np.einsum("qd,qkd->qk", queries, vectors_ID[found])
    right = (similarity >= bar[:, None]) & (found >= 0)
    return float(right.mean()), len(own) / max(seconds, 1e-9)


def build_index(
    vectors_ID: npt.NDArray[np.floating], item_ids: npt.ArrayLike | None, params: IndexParams, folder: Path
) -> dict[str, Any]:
    """Build, measure and write an index.

    Args:
        vectors_ID: one vector per item, any length; a copy scaled to unit length is indexed.  A row of zeros means that the
            item has no vector, so it is not in the index.
        item_ids: (I,) the item of each row; None if the rows are the whole catalogue, items 1..I in order.
        params: factory string, search settings, measurement of the recall and its minimum.
        folder: target folder of ``items.faiss``, ``ids.parquet`` and ``index.json``.

    Returns:
        The contents of ``index.json``: factory, metric, d, ntotal, search settings, FAISS version, hashes of the ids and of the
        vectors, recall.
        Queries per second are only logged, because they differ between runs.

    Raises:
        ConfigError: an unknown factory string, too few items to train the index, or a search setting that the index does
            not have; or the recall is below ``min_recall``.
        DataError: vectors are not finite or all are zero, or ids do not fit.
    """
    vectors = _matrix(vectors_ID, "item vectors")
    vectors_hash = _vectors_hash(vectors)
    ids = np.arange(1, len(vectors) + 1, dtype=np.int32) if item_ids is None else np.asarray(item_ids, dtype=np.int32)
    if ids.shape != (len(vectors),) or len(np.unique(ids)) != len(ids) or not len(ids) or ids.min() < 1:
        raise DataError("item ids", f"should be {len(vectors)} distinct numbers from 1, one per vector (got {len(ids)})")
    has_vector = vectors.any(axis=1)
    if has_vector.any() and not has_vector.all():
        level = logging.INFO if has_vector.mean() > 0.5 else logging.WARNING
        _log.log(level, "%d of %d items have no vector and are not in the index", int((~has_vector).sum()), len(ids))
        vectors, ids = vectors[has_vector], ids[has_vector]
    vectors = _scale(vectors, "item vectors")
    index = _make(vectors, params)
    try:
        recall, queries_per_second = _recall(index, vectors, params)
    except RuntimeError as error:
        problem = f"an index of the kind {params.factory!r} cannot be searched ({_reason(error)})"
        raise ConfigError(f"{_WHERE}.factory", problem) from None
    _log.info("%s: recall@%d %.4f, %.0f queries/s", params.factory, params.recall_at, recall, queries_per_second)
    if recall < params.min_recall:
        problem = f"recall@{params.recall_at} of {params.factory!r} is {recall:.4f}, below {params.min_recall}"
        raise ConfigError(
            "params.yaml: build_index.min_recall", problem, "raise nprobe or ef_search, or use a finer factory or Flat"
        )
    metadata: dict[str, Any] = {
        "factory": params.factory,
        "metric": "inner_product",
        "d": int(index.d),
        "ntotal": int(index.ntotal),
        "nprobe": params.nprobe,
        "ef_search": params.ef_search,
        "faiss_version": faiss.__version__,
        "ids_sha256": _ids_hash(ids),
        "vectors_sha256": vectors_hash,
        "recall_at": params.recall_at,
        "recall": recall,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / _INDEX) as temporary, temporary.open("wb") as handle:
        # FAISS's own writer only prints errors when it closes the file, and a truncated index would look complete
        faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write, _WRITE_BYTES))  # pyright: ignore[reportAttributeAccessIssue]
    positions = np.arange(len(ids), dtype=np.int32)
    INDEX_IDS.write(pl.DataFrame({"position": positions, "item_id": ids}), folder / _IDS)
    write_json(folder / _META, metadata)
    return metadata


def inner_product_search(
    vectors_IK: npt.NDArray[np.floating], params: RetrievalParams
) -> Callable[[npt.NDArray[np.floating], int], npt.NDArray[np.int64]]:
    """An index in memory for the largest inner products, with vectors of any length, including zero.

    Args:
        vectors_IK: one vector per row, finite.
        params: factory string and search settings.

    Returns:
        A function of queries ``(Q, K)`` and a number k that returns the rows ``(Q, k)`` with the largest inner products, best
        first, padded with -1.

    Raises:
        ConfigError: an unknown factory string, too few vectors to train the index, or a search setting that the index does
            not have.
    """
    index = _make(np.ascontiguousarray(vectors_IK, dtype=np.float32), params, "params.yaml: evaluate.retrieval")

    def search(queries_QK: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
        return index.search(np.ascontiguousarray(queries_QK, dtype=np.float32), k)[1]

    return search


@dataclass(frozen=True)
class ItemIndex:
    """An opened index."""

    index: faiss.Index
    item_ids: Ids
    metadata: dict[str, Any]
    where: Path

    def check_vectors(self, vectors_ID: npt.NDArray[np.floating]) -> None:
        """Check that the index was built from these item vectors.

        Args:
            vectors_ID: one vector per item of the catalogue, as :func:`build_index` takes them.

        Raises:
            ArtifactError: it was built from others, so its neighbours are out of date.
        """
        if self.metadata.get("vectors_sha256") != _vectors_hash(vectors_ID):
            raise ArtifactError(str(self.where), "was not built from the current item vectors", _ADVICE)

    def search(self, queries_QD: npt.NDArray[np.floating], k: int) -> tuple[Ids, Vectors]:
        """The ``k`` items nearest to each query.

        Args:
            queries_QD: one query per row, any length; scaled to unit length.
            k: number of items, at least 1.

        Returns:
            Item ids and cosines, both (Q, k), best first.  If fewer were found (a small shop, few lists probed), the row is
            padded with id 0 and score -inf.

        Raises:
            DataError: queries have another width, are not finite or are zero; or ``k`` is less than 1.
        """
        queries = _scale(_matrix(queries_QD, "queries"), "queries")
        if queries.shape[1] != self.index.d:
            raise DataError("queries", f"are {queries.shape[1]} wide, the index in {self.where} is {self.index.d}")
        if k < 1:
            raise DataError("neighbours", f"k should be at least 1 (got {k})")
        scores, found = self.index.search(queries, min(k, int(self.index.ntotal)))
        items = np.zeros((len(queries), k), dtype=np.int32)
        cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
        width = found.shape[1]
        items[:, :width] = np.where(found >= 0, self.item_ids[found], 0)
        cosines[:, :width] = np.where(found >= 0, scores, -np.inf)
        return items, cosines

    def neighbors(self, item_id: int, k: int) -> tuple[Ids, Vectors]:
        """The ``k`` items nearest to an item, without the item itself.

        The item's vector is reconstructed from the index: exact for Flat, HNSW and IVF-Flat, compressed for SQ and PQ.

        Returns:
            Item ids and cosines, at most ``k`` of each, best first.

        Raises:
            DataError: there is no such item, the index cannot reconstruct vectors, or ``k`` is less than 1.
        """
        places = np.flatnonzero(self.item_ids == item_id)
        if not len(places):
            problem = f"item {item_id} is not in {self.where}: it does not exist, or has no vector"
            raise DataError("neighbours", problem, f"its ids run up to {int(self.item_ids.max())}")
        try:
            vector = np.asarray(self.index.reconstruct(int(places[0])), dtype=np.float32)
        except RuntimeError as error:
            problem = f"an index of the kind {self.metadata['factory']!r} cannot reconstruct its vectors ({_reason(error)})"
            raise DataError("neighbours", problem, "use e.g. Flat, HNSW32 or 'IVF256,Flat'") from None
        items, scores = self.search(vector[None, :], min(k, int(self.index.ntotal)) + 1)
        kept = ((items[0] != item_id) & (items[0] > 0)).nonzero()[0][:k]
        return items[0, kept], scores[0, kept]

    def neighbor_lists(self, item_ids: Iterable[int], k: int) -> dict[int, list[tuple[int, float]]]:
        """:meth:`neighbors` of several items, as pairs of item id and cosine; an item that is not in the index has none."""
        indexed = set(self.item_ids.tolist())
        nothing = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        found = {item_id: self.neighbors(item_id, k) if item_id in indexed else nothing for item_id in item_ids}
        return {item_id: list(zip(ids.tolist(), scores.tolist(), strict=True)) for item_id, (ids, scores) in found.items()}


def load_index(folder: Path) -> ItemIndex:
    """Open an index written by :func:`build_index`.

    Raises:
        ArtifactError: a file is missing or damaged, or the three files do not match.
    """
    metadata = read_json(folder / _META, "index description")
    table = INDEX_IDS.read(folder / _IDS).sort("position")
    item_ids = table["item_id"].to_numpy()
    path = folder / _INDEX
    if not path.is_file():
        raise ArtifactError(str(path), "index is missing", "run `dvc repro` to make it")
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(str(path), f"is not a readable FAISS index ({_reason(error)})", _ADVICE) from None
    keys = ("ntotal", "d", "ids_sha256", "factory")
    expected = tuple(metadata.get(key) for key in keys[:3]) if isinstance(metadata, dict) and set(keys) <= set(metadata) else ()
    if (int(index.ntotal), int(index.d), _ids_hash(item_ids)) != expected or len(item_ids) != index.ntotal:
        raise ArtifactError(str(folder), "items.faiss, ids.parquet and index.json do not belong together", _ADVICE)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()  # needed to reconstruct an item's vector
    return ItemIndex(index, item_ids, metadata, folder)


def search(folder: Path, queries_QD: npt.NDArray[np.floating], k: int) -> tuple[Ids, Vectors]:
    """The ``k`` items nearest to each query in the index of ``folder``; see :meth:`ItemIndex.search`."""
    return load_index(folder).search(queries_QD, k)


def neighbors(folder: Path, item_id: int, k: int) -> tuple[Ids, Vectors]:
    """The ``k`` items nearest to an item in the index of ``folder``; see :meth:`ItemIndex.neighbors`."""
    return load_index(folder).neighbors(item_id, k)
