"""Vectors made elsewhere: joined by id whatever their form, and every defect is one line that names an item."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sda_core.errors import SDAError
from sda_core.exchange import vectors as module
from sda_core.exchange.vectors import ForeignVectors, read_vectors
from sda_core.params import ImportEmbeddingsParams

SHOP = ["B0", "B1", "B2", "B3"]
VECTORS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 4, 4]], dtype=np.float32)
ORDER = [2, 0, 3, 1]  # the file's rows are never in the shop's order


def params(**changes: object) -> ImportEmbeddingsParams:
    section: dict[str, object] = {
        "variants": {},
        "item_column": "asin",
        "image_column": "image",
        "text_column": "text",
        "embedding_column": "vector",
        "max_missing_share": 0.0,
    }
    return ImportEmbeddingsParams.model_validate(section | changes)


def read(path: Path, normalize: bool = False, **changes: object) -> ForeignVectors:
    return read_vectors(path, SHOP, params(**changes), normalize)


def problem(path: Path, **changes: object) -> str:
    with pytest.raises(SDAError) as caught:
        read(path, **changes)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    def write(ids: object = None, **columns: object) -> Path:
        asin = [SHOP[place] for place in ORDER] if ids is None else ids
        made = {"asin": asin, **(columns or {"vector": VECTORS[ORDER].tolist()})}
        pq.write_table(pa.table(made), tmp_path / "foreign.parquet", row_group_size=2)
        return tmp_path / "foreign.parquet"

    return write


# ---------------------------------------------------------------------------------------------------- parquet
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float32(), 3),
        pa.large_list(pa.float16()),
        pa.list_(pa.int8()),
        pa.fixed_shape_tensor(pa.float32(), [3]),
    ],
    ids=str,
)
def test_any_list_of_numbers(parquet, kind: pa.DataType) -> None:
    storage = kind.storage_type if isinstance(kind, pa.ExtensionType) else kind
    column = pa.array(VECTORS[ORDER].tolist(), storage)
    found = read(parquet(vector=pa.ExtensionArray.from_storage(kind, column) if storage is not kind else column))
    assert found.embedding is not None
    assert found.embedding.dtype == np.float32
    np.testing.assert_array_equal(found.embedding, VECTORS)
    assert (found.image, found.text, found.num_missing, found.num_other) == (None, None, 0, 0)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_join_is_by_id_over_batches(parquet, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(module, "_ROWS", batch)
    found = read(
        parquet(ids=["x", "B2", "B0", "y", "B3", "B1"], vector=[[9.0] * 3, *VECTORS[[2, 0]], [7.0] * 3, *VECTORS[[3, 1]]])
    )
    np.testing.assert_array_equal(found.embedding, VECTORS)
    assert found.num_other == 2


def test_whole_numbers_as_ids(parquet) -> None:
    path = parquet(ids=[3, 1, 2], vector=[[3.0, 0.0], [1.0, 0.5], [2.0, 2.0]])
    found = read_vectors(path, ["1", "2", "3"], params(), normalize=False)
    np.testing.assert_array_equal(found.embedding, [[1.0, 0.5], [2.0, 2.0], [3.0, 0.0]])


def test_images_and_texts_are_left_to_be_fused(parquet) -> None:
    image = [VECTORS[2].tolist(), None, VECTORS[3].tolist(), VECTORS[1].tolist()]  # B0 has no image
    found = read(parquet(image=pa.array(image), text=[[1.0, 2.0], [2.0, 1.0]] * 2))
    assert found.embedding is None
    assert found.image is not None
    assert found.has_image.tolist() == [False, True, True, True]
    assert (found.text is not None, found.has_text.all(), found.num_missing) == (True, True, 0)
    np.testing.assert_array_equal(found.image[1:], VECTORS[1:])


def test_an_item_is_missing_if_it_has_neither_image_nor_text(parquet) -> None:
    image = pa.array([VECTORS[2].tolist(), None, None, VECTORS[1].tolist()])  # the order is B2, B0, B3, B1
    text = pa.array([[1.0, 2.0], [2.0, 1.0], None, None])
    assert "has no vector for 1 of the 4 items (25 %), e.g. 'B3'" in problem(parquet(image=image, text=text))
    found = read(parquet(image=image, text=text), max_missing_share=0.25)
    assert found.has_image.tolist() == [False, True, True, False]
    assert found.has_text.tolist() == [True, False, True, False]
    assert found.num_missing == 1


@pytest.mark.parametrize("name", ["asin", "vector"])
def test_a_column_that_occurs_twice(tmp_path: Path, name: str) -> None:
    columns = {"asin": pa.array(SHOP), "vector": pa.array(VECTORS.tolist())}
    made = pa.table([*columns.values(), columns[name]], names=[*columns, name])
    pq.write_table(made, tmp_path / "twice.parquet")
    assert f"has 2 columns of the name '{name}'; keep one of them" in problem(tmp_path / "twice.parquet")


@pytest.mark.parametrize("value", [3e38, 1e-40, -2e19, 1e-20, 1e300, -1e39, 1e-300])
def test_lengths_that_float32_cannot_express(parquet, value: float) -> None:
    path = parquet(vector=[[1.0, 1.0], [value, value], [1.0, 0.0], [1.0, 1.0]])
    assert "'vector' holds a vector whose length float32 cannot express (item 'B0', largest value" in problem(path)


@pytest.mark.parametrize("rows", [4, 20], ids=lambda rows: f"{rows} at a time")
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.5, 1e6], [1.0, 1.0, 1.0, 0.0]], ids=str)
@pytest.mark.parametrize("name", ["vector", "image", "text"])
def test_one_direction_for_all_items(parquet, monkeypatch: pytest.MonkeyPatch, name: str, scales: list[float], rows: int) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    same = [(np.array([0.3, -0.1, 2.0]) * scale).tolist() for scale in scales]
    items = sum(scale != 0.0 for scale in scales)
    other = {"text" if name == "image" else "image": VECTORS.tolist()}
    told = problem(parquet(SHOP, **{name: same}, **other), max_missing_share=0.5)
    assert f"'{name}' has the same direction for all {items} items that have a vector; compute them again" in told
    nearly = [*same[:3], [0.3, -0.1, 2.0001]]
    read(parquet(SHOP, **{name: nearly}, **other), max_missing_share=0.5)


def test_a_single_vector_has_no_other_to_differ_from(parquet) -> None:
    read(parquet(SHOP, vector=[[1.0, 2.0], None, None, None]), max_missing_share=0.75)


@pytest.mark.parametrize("value", [1e18, 1e-18])
def test_large_and_small_vectors_keep_their_direction(parquet, value: float) -> None:
    found = read(parquet(vector=[[1.0, 1.0], [value, value], [1.0, 0.0], [1.0, 1.0]]), normalize=True)
    np.testing.assert_allclose(found.embedding[0], [0.5**0.5] * 2, rtol=1e-5)


def test_a_single_kind_of_vector_is_the_embedding(parquet) -> None:
    found = read(parquet(text=VECTORS[ORDER].tolist()))
    np.testing.assert_array_equal(found.embedding, VECTORS)
    np.testing.assert_array_equal(found.text, VECTORS)
    assert found.image is None


def test_normalized_as_ours(parquet) -> None:
    found = read(parquet(), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(found.embedding, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.embedding[3], [3**-0.5] * 3, rtol=1e-6)


@pytest.mark.parametrize("vector", [None, [0.0, 0.0, 0.0]], ids=["null", "zeros"])
def test_missing_vectors_are_counted_and_stay_zero(parquet, vector: list[float] | None) -> None:
    path = parquet(vector=pa.array([VECTORS[2].tolist(), vector, VECTORS[3].tolist(), VECTORS[1].tolist()]))
    line = problem(path)
    assert "has no vector for 1 of the 4 items (25 %), e.g. 'B0'; add them, or raise import_embeddings.max_missing_share" in line
    found = read(path, max_missing_share=0.25)
    assert found.num_missing == 1
    assert not found.embedding[0].any()
    np.testing.assert_array_equal(found.embedding[1:], VECTORS[1:])
    assert found.metadata("f", "concat", False, 3)["imported_missing_items"] == "1"


def test_items_that_are_not_in_the_file_are_missing(parquet) -> None:
    path = parquet(ids=["B3", "B1"], vector=VECTORS[[3, 1]].tolist())
    assert "2 of the 4 items (50 %), e.g. 'B0', 'B2'" in problem(path, max_missing_share=0.49)
    assert read(path, max_missing_share=0.5).num_missing == 2


@pytest.mark.parametrize(
    ("ids", "columns", "expected"),
    [
        (["B0", "B1", "B0", "B2"], {}, "item 'B0' occurs twice"),
        (["B0", None, "B1", "B2"], {}, "row 2 has no item id"),
        (["b0", "b1", "b2", "b3"], {}, "none of its 4 ids is an item of this shop; its ids look like 'b0', the shop's like 'B0'"),
        ([0.5, 1.0, 2.0, 3.0], {}, "column 'asin' should hold texts or whole numbers (got double)"),
        (None, {"vector": [[1.0], [2.0], [np.nan], [1.0]]}, "'vector' holds a value that is not finite (item 'B3')"),
        (None, {"vector": [[1.0], [np.inf], [1.0], [1.0]]}, "'vector' holds a value that is not finite (item 'B0')"),
        (None, {"vector": [[1.0], [None], [1.0], [1.0]]}, "'vector' holds a value that is not finite (item 'B0')"),
        (None, {"vector": [[1.0], [1.0, 2.0], [1.0], [1.0]]}, "'vector' holds vectors of widths 1, 2 (expected one width)"),
        (None, {"vector": [1.0, 2.0, 3.0, 4.0]}, "'vector' should hold lists of numbers (got double)"),
        (None, {"vector": [["a"], ["b"], ["c"], ["d"]]}, "'vector' should hold lists of numbers (got list"),
        (None, {"vector": [[0.0], [0.0], [0.0], [0.0]]}, "has no vector that is not null or zero for any item"),
        (None, {"vectors": [[1.0]] * 4}, "has no column of vectors (expected vector, text, image; got asin, vectors)"),
    ],
)
def test_a_defect_is_one_line(parquet, ids: list | None, columns: dict, expected: str) -> None:
    assert expected in problem(parquet(ids, **columns))


def test_a_file_without_rows(parquet) -> None:
    path = parquet([], vector=pa.array([], type=pa.list_(pa.float32())))
    assert problem(path).endswith("has no rows; write one row per item")


def test_widths_that_differ_between_batches(parquet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 1)
    path = parquet(vector=[[1.0], [1.0, 2.0], [1.0], [1.0]])
    assert "'vector' holds vectors of widths 1 and 2 (the latter of item 'B0')" in problem(path)


def test_defects_of_other_items_do_no_harm(parquet) -> None:
    found = read(parquet(ids=["x", *SHOP, "x"], vector=[[np.nan] * 3, *VECTORS, [np.inf] * 3]))
    np.testing.assert_array_equal(found.embedding, VECTORS)


def test_no_such_column_of_ids(parquet) -> None:
    assert "has no column 'raw_item_id' (got asin, vector)" in problem(parquet(), item_column="raw_item_id")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file or folder" in problem(tmp_path / "nowhere.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    advice = "; name a parquet file, or a folder with matrices (.npy) and their list of ids"
    for content in (b"PAR1 no more", b"", b"id,embedding\nB0,1\n", b"\x93NUMPY"):
        (tmp_path / "x.parquet").write_bytes(content)
        told = problem(tmp_path / "x.parquet")
        assert "cannot be read as a parquet file (" in told
        assert told.endswith(advice)
        assert ". " not in told


# ----------------------------------------------------------------------------------------------------- folder
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "foreign"
    made.mkdir()
    np.save(made / "vector.npy", VECTORS[ORDER].astype(np.float16))
    (made / "ids.txt").write_text("".join(f"{SHOP[place]}\n" for place in ORDER))
    return made


def test_a_matrix_and_a_list_of_ids(folder: Path) -> None:
    found = read(folder)
    np.testing.assert_array_equal(found.embedding, VECTORS)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\n \t\n\n", "\r\n\r\n"])
def test_blank_lines_at_the_end_of_the_ids_are_no_ids(folder: Path, end: str) -> None:
    (folder / "ids.txt").write_bytes(("\n".join(SHOP[place] for place in ORDER) + end).encode())
    np.testing.assert_array_equal(read(folder).embedding, VECTORS)


@pytest.mark.parametrize(("text", "line"), [("\nB0\nB1\nB2\n", 1), ("B0\n\nB1\nB2\n", 2), ("B0\nB1\n \t\nB2", 3)])
def test_a_blank_line_among_the_ids_is_named(folder: Path, text: str, line: int) -> None:
    (folder / "ids.txt").write_text(text)
    assert problem(folder) == (f"{folder}/ids.txt: line {line} is blank; write one id per line, in the order of the rows")


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_an_empty_list_of_ids(folder: Path, text: str) -> None:
    (folder / "ids.txt").write_text(text)
    assert "has 4 rows, but its list of ids has 0" in problem(folder)


def test_a_folder_of_mmrec(folder: Path) -> None:
    (folder / "vector.npy").rename(folder / "image_feat.npy")
    np.save(folder / "text_feat.npy", VECTORS[ORDER, :2])
    (folder / "ids.txt").unlink()
    lines = ["asin\titemID", *(f"{SHOP[place]}\t{row}" for row, place in sorted(enumerate(ORDER), reverse=True))]
    (folder / "i_id_mapping.csv").write_text("\n".join(lines))
    found = read(folder, max_missing_share=0.25)
    np.testing.assert_array_equal(found.image, VECTORS)
    np.testing.assert_array_equal(found.text[[0, 1, 3]], VECTORS[[0, 1, 3], :2])
    assert found.has_text.tolist() == [True, True, False, True]  # B2's is a row of zeros


def test_pickled_objects_are_refused(folder: Path) -> None:
    np.save(folder / "vector.npy", np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    assert "cannot be read as a matrix of numbers" in problem(folder)


def _archive(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, vectors=np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda folder: (folder / "ids.txt").write_text("B0\nB1\n"), "has 4 rows, but its list of ids has 2"),
        (lambda folder: (folder / "ids.txt").write_bytes(b"\xff\n"), "is not UTF-8 text"),
        (lambda folder: (folder / "ids.txt").unlink(), "does not say which item each row is"),
        (lambda folder: (folder / "vector.npy").unlink(), "holds no matrix of vectors"),
        (lambda folder: (folder / "vector.npy").write_bytes(b"no"), "cannot be read as a matrix of numbers"),
        (lambda folder: (folder / "vector.npy").write_bytes(b"PK\x03\x04aaaa"), "is an archive of arrays"),
        (lambda folder: _archive(folder / "vector.npy"), "is an archive of arrays (.npz), expected one array"),
        (lambda folder: np.save(folder / "vector.npy", np.zeros(4)), "should be a matrix of numbers (got shape (4,)"),
        (lambda folder: np.save(folder / "vector.npy", np.array([["a"]] * 4)), "should be a matrix of numbers"),
    ],
)
def test_a_defect_of_a_folder_is_one_line(folder: Path, edit: Callable[[Path], object], expected: str) -> None:
    edit(folder)
    assert expected in problem(folder)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("asin\titem\nB0\t0\n", "should have two columns, one of them itemID (got asin, item)"),
        ("asin\titemID\nB0\t0\nB1\t2\n", "column 'itemID' should run from 0 to 1, each once"),
        ("asin\titemID\nB0\t0\nB1\tx\n", "column 'itemID' should run from 0 to 1, each once"),
    ],
)
def test_a_defect_of_mmrecs_table(folder: Path, table: str, expected: str) -> None:
    (folder / "ids.txt").unlink()
    (folder / "i_id_mapping.csv").write_text(table)
    assert expected in problem(folder)
