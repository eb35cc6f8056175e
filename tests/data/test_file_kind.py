"""A raw file of another kind is told in one line that says what it is and what to do, at download and by the readers."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.amazon import read_metadata, read_reviews
from sda_core.data.file_kind import HEAD_BYTES, wrong_kind
from sda_core.errors import DataError
from sda_core.fetch.transfer import RejectedError, Wanted, check_contents

ROWS = [
    {"user_id": f"u{number % 3}", "parent_asin": f"i{number}", "rating": 5, "timestamp": 1700000000000 + number}
    for number in range(40)
]
ITEMS = [
    {"parent_asin": f"i{number}", "title": f"Thing {number}", "images": [{"large": "https://h/a.jpg"}]} for number in range(9)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FRAME = pl.DataFrame(ROWS)


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, data)

    return written(write)


def tarred(data: bytes) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            info = tarfile.TarInfo("reviews.jsonl")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    return written(write)


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "x.db")
    connection.execute("CREATE TABLE reviews (user_id, rating)")
    connection.commit()
    connection.close()
    return (folder / "x.db").read_bytes()


CSV = "user_id,parent_asin,rating,timestamp\n" + "".join(f"u,i{n},5,17000000{n:02d}\n" for n in range(30))
KINDS: dict[str, tuple[bytes, str, str]] = {
    "array on one line": (json.dumps(ROWS).encode(), "a JSON array", "jq -c '.[]'"),
    "array, indented": (json.dumps(ROWS, indent=2).encode(), "a JSON array", "jq -c '.[]'"),
    "array, an object per line": (("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]").encode(), "a JSON array", "jq"),
    "array after a byte order mark": (b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(), "a JSON array", "jq"),
    "array of arrays": (json.dumps([list(row.values()) for row in ROWS]).encode(), "a JSON array", "jq"),
    "Python list": (repr(ROWS).encode(), "a JSON array", "jq"),
    "empty array": (b"[]\n", "a JSON array", "jq"),
    "rows inside an object": (json.dumps({"reviews": ROWS}).encode(), "one JSON object with the rows inside", ".reviews[]"),
    "rows inside, indented": (json.dumps({"data": ROWS}, indent=1).encode(), "one JSON object with the rows inside", ".data[]"),
    "rows inside, after other keys": (
        json.dumps({"version": 1, "reviews": ROWS}).encode(), "one JSON object with the rows inside", ".reviews[]",
    ),
    "many rows inside": (json.dumps({"reviews": ROWS * 900}).encode(), "one JSON object with the rows inside", ".reviews[]"),
    "columns": (
        json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}).encode(), "columns", "records",
    ),
    "columns as lists": (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(), "columns", "records"),
    "many columns as lists": (
        json.dumps({key: [row[key] for row in ROWS * 900] for key in ROWS[0]}).encode(), "columns", "records",
    ),
    "columns as lists, indented": (
        json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}, indent=1).encode(), "columns", "records",
    ),
    "many rows under keys": (
        json.dumps(dict(enumerate(ROWS * 900))).encode(), "one JSON object with a row under each key", "jq -c '.[]'",
    ),
    "rows under keys, indented": (
        json.dumps(dict(enumerate(ROWS)), indent=2).encode(), "one JSON object with a row under each key", "jq -c '.[]'",
    ),
    "rows under keys": (
        json.dumps({f"r{n}": row for n, row in enumerate(ROWS)}).encode(), "one JSON object with a row under each key", "jq -c",
    ),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16 text, expected UTF-8", "iconv -f UTF-16 "),
    "UTF-16 without a mark": (LINES.decode().encode("utf-16-le"), "UTF-16 text, expected UTF-8", "iconv -f UTF-16LE "),
    "UTF-16, big end first": (LINES.decode().encode("utf-16-be"), "UTF-16 text, expected UTF-8", "iconv -f UTF-16BE "),
    "UTF-32": (LINES.decode().encode("utf-32"), "UTF-32 text, expected UTF-8", "iconv -f UTF-32 "),
    "CSV as UTF-16": (CSV.encode("utf-16"), "UTF-16 text, expected UTF-8", "iconv -f UTF-16 "),
    "array as UTF-16": (json.dumps(ROWS).encode("utf-16-le"), "UTF-16 text, expected UTF-8", "iconv -f UTF-16LE "),
    "columns and data": (json.dumps({"columns": ["a"], "data": [[1]]}).encode(), "columns", "records"),
    "indented objects": ("\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), "indented over several lines", "jq -c ."),
    "CSV": (CSV.encode(), "comma-separated values (CSV)", "polars.read_csv"),
    "CSV with a byte order mark": (b"\xef\xbb\xbf" + CSV.encode(), "comma-separated values (CSV)", "polars.read_csv"),
    "CSV of Windows": (CSV.replace("\n", "\r\n").encode(), "comma-separated values (CSV)", "polars.read_csv"),
    "semicolons": (CSV.replace(",", ";").encode(), "separated by ';'", "separator=';'"),
    "TSV": (CSV.replace(",", "\t").encode(), "tab-separated values (TSV)", "polars.read_csv"),
    "MovieLens": (b"1::1193::5::978300760\n1::661::3::978302109\n", "separated by '::'", "convert it"),
    "parquet": (written(FRAME.write_parquet), "a parquet file", "polars.read_parquet"),
    "Arrow": (written(FRAME.write_ipc), "an Arrow (Feather) file", "polars.read_ipc"),
    "Arrow stream": (written(FRAME.write_ipc_stream), "an Arrow stream", "polars.read_ipc_stream"),
    "Avro": (written(FRAME.write_avro), "an Avro file", "polars.read_avro"),
    "bzip2": (bz2.compress(LINES), "a bzip2 file", "bunzip2"),
    "xz": (lzma.compress(LINES), "an xz file", "unxz"),
    "lzma": (lzma.compress(LINES, format=lzma.FORMAT_ALONE), "an lzma file", "unlzma"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(60), "a zstandard file", "unzstd"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(60), "an lz4 file", "unlz4"),
    "zip": (zipped("reviews.jsonl", LINES), "a zip archive", "unzip"),
    "Excel": (zipped("[Content_Types].xml", b"<Types/>"), "an Excel or Office document", "CSV"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Excel or Office document", "CSV"),
    "npz": (written(lambda stream: np.savez(stream, a=np.arange(3))), "a file of NumPy arrays", "convert it"),
    "npy": (written(lambda stream: np.save(stream, np.arange(300))), "a NumPy array", "convert it"),
    "tar": (tarred(LINES), "a tar archive", "tar -xf"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7z archive", "7z x"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(60), "a rar archive", "unrar"),
    "gzip in gzip": (gzip.compress(gzip.compress(LINES)), "gzip inside gzip", "gunzip"),
    "HTML": (b"<!DOCTYPE html><html><body>Sorry</body></html>", "HTML", ""),
    "XML": (b"<?xml version='1.0'?><rows><row/></rows>", "XML", ""),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer", "git lfs pull"),
    **{
        f"pickle {protocol}": (pickle.dumps(ROWS, protocol), "a Python pickle", "convert it")  # written, never read
        for protocol in (2, 3, 4, 5)
    },
}  # fmt: skip


def told(content: bytes, path: Path) -> list[str]:
    """What the readers and the download say of a file."""
    path.write_bytes(content)
    messages: list[str] = []
    for read in (
        lambda: list(read_reviews(path, 2023, max_bad_line_share=1.0)),
        lambda: read_metadata(path, 2023, max_bad_line_share=1.0),
        lambda: read_metadata(path, 2014, max_bad_line_share=1.0),
    ):
        with pytest.raises(DataError) as error:
            read()
        messages.append(str(error.value))
    with pytest.raises(RejectedError) as refused:
        check_contents(path, Wanted(path, "reviews", None))
    return [*messages, str(refused.value)]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    content, kind, advice = KINDS[name]
    for message in told(content, tmp_path / "r.jsonl"):
        assert kind in message
        assert advice in message
        assert "\n" not in message
        assert len(message) < 400
    if name not in ("gzip in gzip", "HTML", "XML"):  # the download refuses these with its own words where gzip is expected
        for message in told(gzip.compress(content), tmp_path / "r.json.gz"):
            assert kind in message


def test_a_database_is_named(tmp_path: Path) -> None:
    assert all("an SQLite database" in message for message in told(database(tmp_path), tmp_path / "r.jsonl"))


def test_binary_data_of_an_unknown_kind_is_left_to_the_readers(tmp_path: Path) -> None:
    for content in (bytes(range(1, 255)) * 20, gzip.compress(bytes(range(1, 255)) * 20)):
        (tmp_path / "r").write_bytes(content)
        with pytest.raises(DataError, match="is binary data of an unknown kind, expected JSON lines"):
            list(read_reviews(tmp_path / "r", 2023, max_bad_line_share=1.0))


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        gzip.compress(LINES),
        b"\xef\xbb\xbf" + LINES,
        "".join(json.dumps(item) + "\n" for item in ITEMS).encode(),
        "".join(repr(item) + "\n" for item in ITEMS).encode(),
        json.dumps({"images": [{"large": "x" * 2 * HEAD_BYTES}], "parent_asin": "i1"}).encode(),
        json.dumps({"details": {"0": "x", "1": "y"}, "parent_asin": "i1"}).encode() + b"\n" + LINES,
        json.dumps(ROWS[0])[:-5].encode() + b"\n" + LINES,
        b"{\n" + LINES,
        b"{broken\n" + LINES,
        b"\n\n  \n" + LINES,
        b"no JSON at all\n" + LINES,
        b"a, b\n" + LINES,
        b"",
        b"\n",
        b"\x1f\x8b",
        gzip.compress(b"", mtime=0),
        b"\x1f\x8b" + b"damaged" * 10,
    ],
)
def test_lines_of_json_are_left_to_the_readers_even_where_they_are_damaged(content: bytes) -> None:
    assert wrong_kind(content[:HEAD_BYTES]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"parent_asin": st.text(max_size=5)},
            optional=dict.fromkeys(["title", "images", "details", "categories", "extra", "data", "columns"], JSON),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_no_file_of_the_edition_is_taken_for_another_kind(records: list[dict[str, Any]], as_literal: bool) -> None:
    write: Callable[[object], str] = repr if as_literal else json.dumps
    content = "\n".join(map(write, records)).encode("utf-8", "replace")
    assert wrong_kind(content) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_looked_at_without_an_error(content: bytes) -> None:
    for data in (content, b"{" + content, b"[" + content, b"\x1f\x8b" + content, gzip.compress(content)):
        kind = wrong_kind(data)
        assert kind is None or str(kind).isprintable()


def records_2014() -> list[dict[str, Any]]:
    return [{"asin": f"B{n}", "title": f"Thing {n}", "imUrl": "http://h/a.jpg", "categories": [["A"]]} for n in range(20)]


def records_2018() -> list[dict[str, Any]]:
    return [{"asin": f"B{n}", "title": f"Thing {n}", "imageURL": ["http://h/a.jpg"], "category": ["A"]} for n in range(20)]


def records_2023() -> list[dict[str, Any]]:
    return [{"parent_asin": f"B{n}", "title": f"Thing {n}", "images": [], "store": "x"} for n in range(20)]


@pytest.mark.parametrize(
    ("records", "edition", "expected"),
    [
        (records_2014(), 2018, "2014"),
        (records_2014(), 2023, "2014"),
        (records_2018(), 2014, "2018"),
        (records_2018(), 2023, "2018"),
        (records_2023(), 2014, "2023"),
        (records_2023(), 2018, "2023"),
    ],
)
@pytest.mark.parametrize("keep", [None, frozenset({"B1"})])
def test_metadata_of_another_edition_is_named(
    records: list[dict[str, Any]], edition: int, expected: str, keep: frozenset[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "m").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=f"fields that look like edition {expected}.*; set dataset.edition to {expected}$"):
        read_metadata(tmp_path / "m", edition, max_bad_line_share=0.05, keep=keep)


def test_python_literals_under_another_edition_are_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("".join(repr(record) + "\n" for record in records_2014()))
    for edition in (2018, 2023):
        with pytest.raises(DataError, match=r"fields that look like edition 2014.*set dataset.edition to 2014$"):
            read_metadata(tmp_path / "m", edition, max_bad_line_share=0.05)


@pytest.mark.parametrize(("edition", "expected"), [(2014, "2023"), (2018, "2023"), (2023, "2014 or 2018")])
def test_reviews_of_another_edition_are_named(edition: int, expected: str, tmp_path: Path) -> None:
    old = {"reviewerID": "u", "asin": "i", "overall": 5, "unixReviewTime": 1700000000}
    (tmp_path / "r").write_text((json.dumps(old if edition == 2023 else ROWS[0]) + "\n") * 20)
    with pytest.raises(DataError, match=f"fields that look like edition {expected} 20.*; set dataset.edition to {expected}$"):
        list(read_reviews(tmp_path / "r", edition, max_bad_line_share=0.05))


def test_reviews_in_place_of_metadata_are_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(LINES)
    with pytest.raises(DataError, match="a review, not an item 40"):
        read_metadata(tmp_path / "m", 2023, max_bad_line_share=0.05)
