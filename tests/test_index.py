"""The FAISS index: exactness, equal bytes, honest recall, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from sda_core.errors import ArtifactError, ConfigError, DataError
from sda_core.fingerprint import sha256_path
from sda_core.index import build_index, load_index, neighbors, search
from sda_core.params import IndexParams


def index_params(factory: str = "Flat", **changes: object) -> IndexParams:
    values: dict[str, object] = {
        "factory": factory, "nprobe": None, "ef_search": None, "recall_at": 10, "num_queries": 100, "min_recall": 0.0,
    }  # fmt: skip
    return IndexParams.model_validate({**values, **changes})


def clustered(num_items: int = 900, width: int = 24, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(16, width))
    rows = centres[random.integers(0, 16, num_items)] + 0.4 * random.normal(size=(num_items, width))
    return (rows * random.uniform(0.1, 10.0, size=(num_items, 1))).astype(np.float32)  # lengths must not matter


def brute_force(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    return np.argsort(-cosines, kind="stable")


FACTORIES = ["Flat", "HNSW32", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ6x4", "PCA12,Flat"]


@pytest.mark.parametrize("factory", FACTORIES)
def test_two_builds_give_equal_bytes(factory: str, tmp_path: Path) -> None:
    vectors, ids = clustered(), np.arange(1, 901)
    first = build_index(vectors, ids, index_params(factory), tmp_path / "a")
    second = build_index(vectors.copy(), ids, index_params(factory), tmp_path / "b")
    assert sha256_path(tmp_path / "a") == sha256_path(tmp_path / "b")
    assert first == second
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["ids.parquet", "index.json", "items.faiss"]


def test_hnsw_is_added_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer FAISS gives equal bytes on any number of threads, older does not: so the threads are looked at, too."""
    make, seen = faiss.index_factory, []

    def watched(*arguments: object) -> faiss.Index:
        index = make(*arguments)
        add = index.add
        index.add = lambda rows: (seen.append(faiss.omp_get_max_threads()), add(rows))
        return index

    monkeypatch.setattr(faiss, "index_factory", watched)
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 4):
            faiss.omp_set_num_threads(threads)
            build_index(clustered(), None, index_params("HNSW32"), tmp_path / str(threads))
            assert faiss.omp_get_max_threads() == threads  # left as it was
    finally:
        faiss.omp_set_num_threads(before)
    assert seen == [1, 1]
    assert sha256_path(tmp_path / "1") == sha256_path(tmp_path / "4")


def test_flat_is_exact_search_by_cosine(tmp_path: Path) -> None:
    vectors = clustered()
    ids = np.random.default_rng(1).permutation(np.arange(1, 5000))[:900]  # ids are no positions
    metadata = build_index(vectors, ids, index_params(), tmp_path)
    assert metadata["recall"] == 1.0
    queries = clustered(7, seed=2)
    found, scores = search(tmp_path, queries, 12)
    for row, query in enumerate(queries):
        order = brute_force(vectors, query)[:12]
        assert found[row].tolist() == ids[order].tolist()
        expected = vectors[order] @ query / np.linalg.norm(vectors[order], axis=1) / np.linalg.norm(query)
        np.testing.assert_allclose(scores[row], expected, atol=1e-5)


@pytest.mark.parametrize(("factory", "changes"), [("Flat", {}), ("HNSW32", {"ef_search": 64}), ("IVF16,Flat", {"nprobe": 16})])
def test_neighbors_leave_the_item_out(factory: str, changes: dict[str, object], tmp_path: Path) -> None:
    vectors, ids = clustered(), np.arange(1, 901)
    build_index(vectors, ids, index_params(factory, **changes), tmp_path)
    for item in (1, 450, 900):
        found, scores = neighbors(tmp_path, item, 5)
        expected = [int(ids[place]) for place in brute_force(vectors, vectors[item - 1]) if ids[place] != item][:5]
        assert found.tolist() == expected
        assert (np.diff(scores) <= 0).all()


def test_neighbors_leave_the_item_out_even_among_its_equals(tmp_path: Path) -> None:
    vectors = np.ones((6, 4), dtype=np.float32)
    build_index(vectors, None, index_params(), tmp_path)
    for item in range(1, 7):
        found, scores = neighbors(tmp_path, item, 3)
        assert len(set(found.tolist())) == 3
        assert item not in found
        np.testing.assert_allclose(scores, 1.0, atol=1e-6)


def test_neighbor_lists(tmp_path: Path) -> None:
    build_index(clustered(60), None, index_params(), tmp_path)
    lists = load_index(tmp_path).neighbor_lists([50, 3], 4)
    assert list(lists) == [50, 3]
    for item, pairs in lists.items():
        ids, scores = neighbors(tmp_path, item, 4)
        assert pairs == list(zip(ids.tolist(), scores.tolist(), strict=True))
        assert len(pairs) == 4


def test_neighbors_of_a_compressed_index_are_near(tmp_path: Path) -> None:
    vectors = clustered()
    build_index(vectors, None, index_params("IVF16,SQ8", nprobe=16), tmp_path)
    opened = load_index(tmp_path)
    common = 0
    for item in range(1, 101):
        exact = {int(place) + 1 for place in brute_force(vectors, vectors[item - 1]) if place != item - 1 and place >= 0}
        nearest = [int(place) + 1 for place in brute_force(vectors, vectors[item - 1])[1:11]]
        found, _ = opened.neighbors(item, 10)
        assert set(found.tolist()) <= exact
        common += len(set(nearest) & set(found.tolist()))
    assert common / 1000 > 0.9


def test_recall_is_measured_and_improves_with_search_effort(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 48)).astype(np.float32)  # no structure: hard for lists
    recalls = [
        build_index(vectors, None, index_params("IVF32,Flat", nprobe=nprobe), tmp_path / str(nprobe))["recall"]
        for nprobe in (1, 8, 32)
    ]
    assert recalls[0] < 0.5 < recalls[1] < recalls[2] == 1.0

    # against a count made by hand: of each query's 10 true neighbours, how many does the index return besides itself?
    opened, right = load_index(tmp_path / "8"), 0
    queries = np.unique(np.linspace(0, 1999, 100).round().astype(int))
    for query in queries:
        true = set((brute_force(vectors, vectors[query])[1:11] + 1).tolist())
        found, _ = opened.search(vectors[query][None], 11)
        right += len(true & {int(item) for item in found[0] if item != query + 1})
    assert recalls[1] == pytest.approx(right / (10 * len(queries)), abs=0.002)


def test_recall_does_not_punish_equal_vectors(tmp_path: Path) -> None:
    vectors = np.repeat(clustered(60), 15, axis=0)  # every item has 14 doubles, so any 10 of them are right
    assert build_index(vectors, None, index_params("HNSW32", ef_search=200), tmp_path)["recall"] > 0.95


def test_recall_floor_stops(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 48)).astype(np.float32)
    with pytest.raises(ConfigError, match=r"build_index\.min_recall.*below 0\.9.*nprobe"):
        build_index(vectors, None, index_params("IVF32,Flat", nprobe=1, min_recall=0.9), tmp_path)
    assert not list(tmp_path.iterdir())


def test_search_settings_travel_with_the_file(tmp_path: Path) -> None:
    build_index(clustered(), None, index_params("IVF16,Flat", nprobe=7), tmp_path / "ivf")
    assert load_index(tmp_path / "ivf").index.nprobe == 7
    build_index(clustered(), None, index_params("HNSW32", ef_search=77), tmp_path / "hnsw")
    assert faiss.downcast_index(load_index(tmp_path / "hnsw").index).hnsw.efSearch == 77
    description = json.loads((tmp_path / "ivf" / "index.json").read_text(encoding="utf-8"))
    assert (description["nprobe"], description["ef_search"], description["d"], description["ntotal"]) == (7, None, 24, 900)
    assert "queries" not in " ".join(description)  # speed differs between runs; the files must not


@pytest.mark.parametrize(
    ("factory", "changes", "where"),
    [
        ("Flatt", {}, "factory"),
        ("PQ7", {}, "factory"),  # 24 is no multiple of 7
        ("LSH", {}, "factory"),  # knows no inner product
        ("IDMap,Flat", {}, "factory"),
        ("IVF4000,Flat", {}, "factory"),  # more lists than items
        ("IVF0,Flat", {}, "factory"),
        ("Flat", {"nprobe": 4}, "nprobe"),
        ("IVF16,Flat", {"ef_search": 4}, "ef_search"),
    ],
)
def test_bad_settings_are_one_line(factory: str, changes: dict[str, object], where: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_index(clustered(), None, index_params(factory, **changes), tmp_path / "index")
    text = str(caught.value)
    assert text.startswith(f"params.yaml: build_index.{where}: ")
    assert "\n" not in text
    assert ".cpp" not in text
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("bad", ["zero", "nan", "flat", "empty"])
def test_bad_vectors_are_refused(bad: str, tmp_path: Path) -> None:
    vectors = clustered(20)
    ids = np.arange(1, 21)
    match bad:
        case "zero":
            vectors[:] = 0
        case "nan":
            vectors[3, 0] = np.nan
        case "flat":
            vectors = vectors[:, 0]
        case _:
            vectors, ids = vectors[:0], ids[:0]
    with pytest.raises(DataError):
        build_index(vectors, ids, index_params(), tmp_path)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_items_without_a_vector_are_left_out(factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = clustered(40)
    vectors[[0, 7, 39]] = 0
    with caplog.at_level("INFO"):
        made = build_index(vectors, None, index_params(factory), tmp_path)
    assert made["ntotal"] == 37
    assert "3 of 40 items have no vector and are not in the index" in caplog.text
    opened = load_index(tmp_path)
    assert set(opened.item_ids.tolist()) == set(range(1, 41)) - {1, 8, 40}
    found, cosines = opened.neighbors(2, 39)
    assert len(found) >= 30  # HNSW is approximate
    assert not {1, 8, 40} & set(found.tolist())
    assert np.isfinite(cosines).all()
    with pytest.raises(DataError, match=r"item 8 is not in .*: it does not exist, or has no vector"):
        opened.neighbors(8, 3)
    assert opened.neighbor_lists([8, 2], 3)[8] == []


@pytest.mark.parametrize("ids", [np.arange(20), np.arange(1, 20), np.ones(20, dtype=int)])
def test_bad_ids_are_refused(ids: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="item ids"):
        build_index(clustered(20), ids, index_params(), tmp_path)


def test_tiny_shops(tmp_path: Path) -> None:
    assert build_index(clustered(1), [1], index_params(min_recall=1.0), tmp_path / "one")["recall"] == 1.0
    found, scores = neighbors(tmp_path / "one", 1, 5)
    assert len(found) == len(scores) == 0
    build_index(clustered(3), [5, 6, 7], index_params(), tmp_path / "three")
    found, scores = search(tmp_path / "three", clustered(2, seed=1), 5)
    assert found.shape == scores.shape == (2, 5)
    assert sorted(found[0, :3].tolist()) == [5, 6, 7]
    assert found[:, 3:].max() == 0
    assert np.isneginf(scores[:, 3:]).all()


def test_inputs_are_left_as_they_were(tmp_path: Path) -> None:
    vectors = clustered(50)
    before = vectors.copy()
    build_index(vectors, None, index_params(), tmp_path)
    search(tmp_path, vectors, 3)
    np.testing.assert_array_equal(vectors, before)


def test_questions_that_make_no_sense(tmp_path: Path) -> None:
    build_index(clustered(20), None, index_params(), tmp_path)
    with pytest.raises(DataError, match="item 21 is not in"):
        neighbors(tmp_path, 21, 3)
    with pytest.raises(DataError, match="at least 1"):
        search(tmp_path, clustered(1), 0)
    with pytest.raises(DataError, match="are 23 wide"):
        search(tmp_path, clustered(1)[:, :23], 3)


def test_damaged_or_mixed_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        load_index(tmp_path / "nowhere")
    for name in ("a", "b"):
        build_index(clustered(20 if name == "a" else 21), None, index_params(), tmp_path / name)
    (tmp_path / "a" / "ids.parquet").write_bytes((tmp_path / "b" / "ids.parquet").read_bytes())
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_index(tmp_path / "a")
    (tmp_path / "b" / "items.faiss").write_bytes(b"no index at all")
    with pytest.raises(ArtifactError, match="not a readable FAISS index"):
        load_index(tmp_path / "b")


def test_an_index_knows_its_vectors(tmp_path: Path) -> None:
    vectors = clustered(20)
    vectors[7] = 0.0
    build_index(vectors, None, index_params(), tmp_path)
    opened = load_index(tmp_path)
    opened.check_vectors(vectors)
    changed, scaled = vectors.copy(), 2 * vectors
    changed[3, 0] += 1e-3
    for others in (changed, scaled, vectors[:-1], vectors[::-1]):
        with pytest.raises(ArtifactError, match="was not built from the current item vectors; run `dvc repro`"):
            opened.check_vectors(others)


def test_the_module_brings_no_torch() -> None:
    program = "import sys, sda_core.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
