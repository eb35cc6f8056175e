"""A disk that takes no more, in one line whichever library meets it; and a bug stays a bug."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sda_core import artifacts
from sda_core.artifacts import (
    INTERACTIONS,
    USERS,
    read_json,
    replace_directory,
    replace_file,
    storage,
    write_json,
    write_parquet,
    write_text,
)
from sda_core.errors import ArtifactError, DataError, SDAError, StorageError, storage_errno, storage_error
from sda_core.index import build_index
from sda_core.params import IndexParams
from sda_core.processes import ALONE

NUMBERS = np.random.default_rng(0).random((4_000, 4)).astype(np.float32)
FRAME = pl.DataFrame({"a": NUMBERS[:, 0]})
WRITERS: dict[str, Callable[[Path], object]] = {
    "polars parquet": FRAME.write_parquet,
    "polars csv": FRAME.write_csv,
    "polars ndjson": FRAME.write_ndjson,
    "pyarrow": lambda path: pq.write_table(pa.table({"a": NUMBERS[:, 0]}), path),
    "safetensors": lambda path: save_file({"a": NUMBERS}, path),
    "numpy": lambda path: _numpy(path),
    "faiss": lambda path: faiss.write_index(_flat(), str(path)),
    "python": lambda path: path.write_bytes(NUMBERS.tobytes()),
}


def _numpy(path: Path) -> None:
    with path.open("wb") as handle:
        np.save(handle, NUMBERS)


def _flat() -> faiss.Index:
    index = faiss.IndexFlatIP(4)
    index.add(NUMBERS)
    return index


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 1,000 bytes."""
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_in_every_library(tmp_path: Path, small_files: None, library: str) -> None:
    path = tmp_path / "data" / "table"
    write_text(path, "before")
    with pytest.raises(StorageError) as caught, replace_file(path) as temporary:
        WRITERS[library](temporary)
    assert caught.value.where == str(path)
    assert caught.value.problem.startswith("cannot be written (")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"before"
    assert [p.name for p in path.parent.iterdir()] == ["table"]


def test_a_full_disk_at_any_byte_of_a_table(tmp_path: Path) -> None:
    """Polars gives the reason for a page that does not fit, and none for a header or a footer that does not."""
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    random = np.random.default_rng(0)
    rows = 1_500
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(rows // 5, dtype=np.int32), 5),
            "item_id": random.integers(0, 99, rows).astype(np.int32),
            "timestamp": random.integers(0, 2**40, rows),
            "rating": np.full(rows, 5, dtype=np.float32),
            "split": np.where(np.arange(rows) % 5 < 3, "train", "test"),
        },
        schema=INTERACTIONS.columns,
    )
    path = tmp_path / "interactions.parquet"
    INTERACTIONS.write(frame, path)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for num_bytes in (*range(0, len(whole), len(whole) // 40), 8_190, 8_192, 8_200, len(whole) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            with pytest.raises(StorageError, match=r"cannot be written \(File too large\); raise the limit") as caught:
                write_parquet(frame, path, row_group_size=65_536)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.where == str(path)
        assert path.read_bytes() == whole
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    write_parquet(frame, path, row_group_size=65_536)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("library", WRITERS)
def test_a_folder_where_a_file_should_be(tmp_path: Path, library: str) -> None:
    path = tmp_path / "data"
    path.mkdir()
    with (
        pytest.raises(StorageError, match=r"cannot be written \(Is a directory\); move the folder away"),
        replace_file(path) as temporary,
    ):
        WRITERS[library](temporary)
    assert list(tmp_path.iterdir()) == [path]
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_where_a_folder_should_be(tmp_path: Path, library: str) -> None:
    (tmp_path / "data").write_bytes(b"mine")
    with pytest.raises(StorageError) as caught, replace_file(tmp_path / "data" / "table") as temporary:
        WRITERS[library](temporary)
    assert caught.value.where == str(tmp_path / "data")
    assert "move away the file whose path should be a folder" in str(caught.value)
    assert (tmp_path / "data").read_bytes() == b"mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("path", ["/proc/new", "/proc/new/table"])
def test_a_file_system_that_takes_no_files(path: str) -> None:
    for write in (replace_file, replace_directory):
        with pytest.raises(StorageError, match="cannot be created there; use another folder"), write(Path(path)):
            pass


@pytest.mark.parametrize(
    "num_items", [10, 200]
)  # 10: all of the index fits FAISS's own buffer, which it writes when it closes the file
def test_an_index_that_was_cut_off_never_passes_for_a_whole_one(tmp_path: Path, small_files: None, num_items: int) -> None:
    params = IndexParams.model_validate(
        {"factory": "Flat", "nprobe": None, "ef_search": None, "recall_at": 1, "num_queries": 1, "min_recall": 0.0}
    )
    vectors = np.random.default_rng(1).normal(size=(num_items, 32)).astype(np.float32)  # 10: 1,325 bytes
    with pytest.raises(StorageError, match=r"items\.faiss: cannot be written"):
        build_index(vectors, None, params, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []


def test_a_damaged_part_of_a_table_is_one_line(tmp_path: Path) -> None:
    """Its footer, which is read first, is whole."""
    path = tmp_path / "users.parquet"
    rows = {"user_id": range(1, 2001), "raw_user_id": [f"user {n}" for n in range(2000)]}
    USERS.write(pl.DataFrame(rows, schema=dict(USERS.columns)), path)
    data = bytearray(path.read_bytes())
    for place in range(4, len(data) - 8 - int.from_bytes(data[-8:-4], "little")):
        data[place] ^= 0xFF
    path.write_bytes(data)
    for read in (USERS.read, lambda path: USERS.query(path, lambda rows: rows.select("raw_user_id"))):
        with pytest.raises(ArtifactError, match="is not a readable parquet file"):
            read(path)


NUMBERS_OF_ERRORS = [
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE,
]  # fmt: skip
FORMS: dict[str, Callable[[int], Exception]] = {
    "Python": lambda number: OSError(number, os.strerror(number)),
    "Python, with a path": lambda number: OSError(number, os.strerror(number), "x"),
    "polars, opening": lambda number: OSError(f"{os.strerror(number)} (os error {number}): x.parquet"),
    "polars, writing": lambda number: pl.exceptions.ComputeError(
        f"parquet: File out of specification: underlying IO error: {os.strerror(number)} (os error {number})"
    ),
    "safetensors": lambda number: SafetensorError(
        f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", NUMBERS_OF_ERRORS, ids=errno.errorcode.get)
def test_every_failure_in_every_form(number: int, form: str) -> None:
    error = storage_error(FORMS[form](number), "some/path")
    assert error is not None
    assert str(error).startswith(f"some/path: cannot be written ({os.strerror(number)}); ")
    assert len(error.advice) > 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO])
def test_what_faiss_and_torch_say(number: int) -> None:
    text = f"Error in write_index: 'ret == (size)' failed: write error in x: 4051 != 64000 ({os.strerror(number)})"
    assert storage_errno(RuntimeError(text)) == number
    cause = ValueError("cannot save")
    cause.__cause__ = OSError(number, os.strerror(number))
    assert storage_errno(cause) == number


@pytest.mark.parametrize(
    "bug",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        OSError("No such file or directory (os error 2): x"),
        OSError("something else"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        pl.exceptions.ComputeError("column not found"),
        SafetensorError("Error while deserializing header: HeaderTooLarge"),
        KeyError("a"),
        DataError("a table", "says: No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_a_bug_stays_a_bug(tmp_path: Path, bug: BaseException) -> None:
    assert storage_errno(bug) is None
    for replace in (replace_file, replace_directory):
        with pytest.raises(type(bug)) as caught, replace(tmp_path / "a"):
            raise bug
        assert caught.value is bug
        assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=60))
def test_no_text_of_an_unrelated_error_is_taken_for_a_full_disk(text: str) -> None:
    assert storage_errno(ValueError(text)) is None or any(os.strerror(number) in text for number in NUMBERS_OF_ERRORS)


def test_a_copy_that_does_not_fit_names_the_copy_and_not_its_source(tmp_path: Path, small_files: None) -> None:
    source, target = Path(__file__), tmp_path / "target"  # larger than the limit, and only read
    assert source.stat().st_size > 1_000
    with pytest.raises(StorageError) as caught, replace_file(target) as temporary:
        shutil.copyfile(source, temporary)
    assert str(caught.value).startswith(f"{target}: cannot be written (File too large)")


def test_the_path_that_is_named_is_the_final_one(tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "data" / "filtered"
    with (
        pytest.raises(StorageError) as caught,
        replace_directory(target) as outer,
        replace_directory(outer / "part") as inner,
        storage(inner / "users.parquet"),
    ):
        full()
    assert caught.value.where == str(target / "part" / "users.parquet")
    assert list((tmp_path / "data").iterdir()) == []


def test_another_file_that_was_read_meanwhile_is_named_itself(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "source"
    with pytest.raises(StorageError) as caught, replace_file(tmp_path / "data" / "copy"):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))
    assert str(caught.value) == f"{source}: cannot be used (Permission denied); change its permissions, or use another folder"


def test_the_reason_is_not_hidden_by_the_cleaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only file system even the removal of what is not there fails."""

    def unlink(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StorageError, match="No space left"), replace_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "mkdtemp"])
def test_what_the_system_refuses_late_or_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A network disk tells of a quota when the file is synced."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "mkdtemp": (artifacts.tempfile, "mkdtemp")}[step], refuse)
    with (
        pytest.raises(StorageError, match=f"{os.strerror(errno.EDQUOT)}.*raise the disk quota"),
        replace_directory(tmp_path / "a") as folder,
    ):
        write_json(folder / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_swapped_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report"
    with replace_directory(target) as folder:
        write_text(folder / "index.html", "old")
    renamed = Path.replace

    def replace(path: Path, to: Any) -> Path:
        if Path(to) == target and path.name.count(".") and not path.name.endswith(".old.tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return renamed(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(StorageError, match="report: cannot be written"), replace_directory(target) as folder:
            folder.joinpath("index.html").write_bytes(b"new")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"index.html": b"old"}
    assert list(tmp_path.iterdir()) == [target]
    with replace_directory(target) as folder:
        write_text(folder / "other.html", "new")
    assert [path.name for path in target.iterdir()] == ["other.html"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_bytes(b"mine")
    (tmp_path / "report").symlink_to(elsewhere)
    with replace_directory(tmp_path / "report") as folder:
        write_text(folder / "index.html", "new")
    assert not (tmp_path / "report").is_symlink()
    assert (elsewhere / "mine").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "report"]


def test_reading_has_its_line_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="is a folder, expected the users table"):
        USERS.read(tmp_path)
    with pytest.raises(StorageError, match=r"cannot be read \(Is a directory\); move the folder away"):
        read_json(tmp_path, "numbers")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Permission denied (os error 13): x")

    (tmp_path / "x").write_bytes(b"")
    monkeypatch.setattr(artifacts.pl, "scan_parquet", refuse)
    with pytest.raises(StorageError, match=r"x: cannot be read \(Permission denied\); change its permissions"):
        INTERACTIONS.read(tmp_path / "x")


def test_it_crosses_the_border_of_a_process() -> None:
    error = StorageError("a", "cannot be written (No space left on device)", "free some space")
    with pytest.raises(StorageError) as caught, ALONE.raise_on_all_ranks():
        raise error
    assert isinstance(caught.value, SDAError)
    assert error.__reduce__() == (StorageError, ("a", "cannot be written (No space left on device)", "free some space"))


@pytest.mark.skipif(os.name == "nt", reason="whether a process lives cannot be asked there")
def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_write(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "table.json"
    left = [
        f".table.json.{ended.pid}.tmp",
        f".other.json.{ended.pid}.tmp",
        f".table.json.{os.getppid()}.tmp",
        ".table.json.x.tmp",
    ]
    for name in left:
        (tmp_path / name).write_text("half")
    write_json(path, {})
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["table.json", *left[1:]])
