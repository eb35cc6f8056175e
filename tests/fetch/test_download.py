"""The downloader against a real server with faults, real processes that are killed, and hostile answers."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sda_core.errors import ArtifactError, DownloadError, StorageError
from sda_core.fetch import transfer
from sda_core.fetch.download import download, verify
from sda_core.fetch.folders import folder_lock
from sda_core.fetch.manifest import check, manifest_file
from sda_core.params import AmazonDataset, DemoDataset, DownloadParams

ROOT = Path(__file__).resolve().parents[2]
GIFT_CARDS = ROOT / ".." / "shared" / "data" / "amazon_2018_gift_cards"


def packed(num_bytes: int, seed: int = 0) -> bytes:
    """A valid gzip file of about this many bytes."""
    return gzip.compress(np.random.default_rng(seed).bytes(num_bytes), mtime=0)


BODY = packed(300_000)
META = packed(2_000, seed=1)


def settings(**changes: Any) -> DownloadParams:
    values: dict[str, Any] = {"timeout_seconds": 60.0, "num_retries": 3, "backoff_seconds": 0.01, "max_file_bytes": 10_000_000}
    return DownloadParams(**(values | changes))


def amazon(reviews: str | tuple[str, ...], metadata: str | tuple[str, ...], **changes: Any) -> AmazonDataset:
    values: dict[str, Any] = {
        "source": "amazon",
        "edition": 2018,
        "category": "Things",
        "reviews": (reviews,) if isinstance(reviews, str) else reviews,
        "metadata": (metadata,) if isinstance(metadata, str) else metadata,
        "image_archive": None,
        "reviews_sha256": None,
        "metadata_sha256": None,
        "image_archive_sha256": None,
        "image_folder": None,
        "local_folder": None,
    }
    return AmazonDataset(**(values | changes))


def names(raw: Path) -> list[str]:
    return sorted(path.name for path in raw.iterdir())


def contents(raw: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(raw.iterdir())}


@pytest.fixture
def fetch(server: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Download the page ``/r.json.gz`` with the given faults; metadata are always well."""
    server.put("/m.json.gz", META)

    def fetch(params: DownloadParams | None = None, **page: Any) -> dict[str, Any]:
        server.put("/r.json.gz", **({"body": BODY} | page))
        dataset = amazon(server.url("/r.json.gz"), server.url("/m.json.gz"))
        return download(dataset, params or settings(), tmp_path / "raw", tmp_path)

    return fetch


def refusal(call: Callable[[], object]) -> str:
    """The one line of a download that fails."""
    with pytest.raises((DownloadError, StorageError)) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------ the good
def test_manifest_and_folder(fetch: Any, server: Any, tmp_path: Path) -> None:
    manifest = fetch()
    raw = tmp_path / "raw"
    assert names(raw) == ["m.json.gz", "manifest.json", "r.json.gz"]
    assert (raw / "r.json.gz").read_bytes() == BODY
    assert json.loads((raw / "manifest.json").read_text()) == manifest
    assert manifest["files"][0] == {
        "role": "reviews",
        "name": "r.json.gz",
        "source": server.url("/r.json.gz"),
        "bytes": len(BODY),
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "etag": '"v1"',
    }
    assert manifest_file(raw, "metadata") == raw / "m.json.gz"
    assert not list(tmp_path.glob(".raw*")), "the lock file is gone"
    check(raw)


def test_whole_files_are_not_fetched_again(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch()
    before = contents(tmp_path / "raw")
    server.requests.clear()
    fetch()
    assert server.requests == []
    assert contents(tmp_path / "raw") == before


@pytest.mark.parametrize("damage", [b"", b"x" * 10, "flip", None])
def test_damaged_files_are_fetched_again(fetch: Any, server: Any, tmp_path: Path, damage: bytes | str | None) -> None:
    fetch()
    path = tmp_path / "raw" / "r.json.gz"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(BODY[:-1] + bytes([BODY[-1] ^ 1]) if isinstance(damage, str) else damage)
    server.requests.clear()
    fetch()
    assert server.count() == {"/r.json.gz": 1}
    check(tmp_path / "raw")


def test_another_dataset_takes_the_place(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch()
    (tmp_path / "raw" / "old.part").write_bytes(b"x")
    (tmp_path / "raw" / "folder").mkdir()
    other = amazon(server.put("/a.json.gz", packed(10)), server.put("/b.json.gz", packed(20)))
    download(other, settings(), tmp_path / "raw", tmp_path)
    assert names(tmp_path / "raw") == ["a.json.gz", "b.json.gz", "manifest.json"]


def test_redirects_are_followed(fetch: Any, server: Any, tmp_path: Path) -> None:
    server.put("/elsewhere", BODY)
    fetch(always=server.status(302, Location="/elsewhere"))
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_from_a_running_loop(fetch: Any, tmp_path: Path) -> None:
    import asyncio

    async def notebook() -> None:
        fetch()

    asyncio.run(notebook())
    check(tmp_path / "raw")


# ----------------------------------------------------------------------------------------- faults that pass
def test_dropped_connections_are_resumed(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(faults=[server.drop(100_000), server.drop(50_000)])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    asked = [headers for path, headers in server.requests if path == "/r.json.gz"]
    assert [headers.get("range") or headers.get("Range") for headers in asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert all((headers.get("if-range") or headers.get("If-Range")) == '"v1"' for headers in asked[1:])


def test_progress_gives_retries_back(fetch: Any, server: Any, tmp_path: Path) -> None:
    body = packed(8 << 20)
    fetch(settings(num_retries=1, max_file_bytes=1 << 30), body=body, faults=[server.drop(3 << 19)] * 5)
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == body


def test_repeating_the_same_piece_is_no_progress(fetch: Any, server: Any) -> None:
    body = packed(4 << 20)
    text = refusal(
        lambda: fetch(settings(num_retries=2, max_file_bytes=1 << 30), body=body, ranges=False, always=server.drop(2 << 20))
    )
    assert "retries without progress: 2" in text
    assert server.count()["/r.json.gz"] == 3


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_errors_that_pass(fetch: Any, server: Any, tmp_path: Path, code: int) -> None:
    fetch(faults=[server.status(code)] * 2)
    assert server.count()["/r.json.gz"] == 3
    check(tmp_path / "raw")


def test_retry_after_is_heeded(fetch: Any, server: Any) -> None:
    began = time.monotonic()
    fetch(faults=[server.status(429, Retry_After="1")])
    assert time.monotonic() - began >= 1.0


def test_range_ignored(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(ranges=False, faults=[server.drop(100_000)])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_file_changes_midway(fetch: Any, server: Any, tmp_path: Path) -> None:
    newer = packed(250_000, seed=7)
    manifest = fetch(faults=[server.drop(100_000), server.replace(newer, '"v2"')])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == newer
    assert manifest["files"][0]["etag"] == '"v2"'


def test_file_changes_midway_and_the_server_does_not_look_at_if_range(server: Any, tmp_path: Path) -> None:
    """Plain lines: no gzip checksum would tell the mixture from a file."""
    older, newer = b'{"old": 1}\n' * 20_000, b'{"new": 1}\n' * 20_000

    def careless(handler: Any) -> None:
        handler.page.body, handler.page.etag = newer, '"v2"'
        headers = {"ETag": '"v2"', "Content-Range": f"bytes 100000-{len(newer) - 1}/{len(newer)}"}
        handler.answer(206, newer[100_000:], headers)

    url = server.put("/r.json", older, faults=[server.drop(100_000), careless])
    download(amazon(url, server.put("/m.json.gz", META)), settings(), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw" / "r.json").read_bytes() == newer


def test_wrong_range_is_not_appended(fetch: Any, server: Any, tmp_path: Path) -> None:
    def shifted(handler: Any) -> None:
        headers = {"ETag": '"v1"', "Content-Range": f"bytes 90000-{len(BODY) - 1}/{len(BODY)}"}
        handler.answer(206, BODY[90_000:], headers)

    fetch(faults=[server.drop(100_000), shifted])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_without_validator_nothing_is_resumed(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(etag=None, faults=[server.drop(100_000)])
    assert all("range" not in {name.lower() for name in headers} for _, headers in server.requests)
    check(tmp_path / "raw")


def test_weak_etags_do_not_serve_for_ranges(fetch: Any, server: Any, tmp_path: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    fetch(etag='W/"1"', last_modified=date, faults=[server.drop(100_000)])
    asked = {name.lower(): value for name, value in server.requests[1][1].items()}
    assert (asked["range"], asked["if-range"]) == ("bytes=100000-", date)
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_slow_drip_is_cut_and_resumed(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(settings(timeout_seconds=0.4, num_retries=100), faults=[server.drip()])  # uncut it would take an hour
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    assert any("range" in {name.lower() for name in headers} for _, headers in server.requests)


@pytest.mark.parametrize("fault", ["drip_headers", "silence"])
def test_no_answer_in_time(fetch: Any, server: Any, tmp_path: Path, fault: str) -> None:
    fetch(settings(timeout_seconds=0.4, num_retries=100), faults=[getattr(server, fault)()])
    check(tmp_path / "raw")


def test_short_body_is_completed(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(faults=[server.announce(len(BODY) + 5_000)])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


# ----------------------------------------------------------------------------------------- faults that stay
def test_errors_that_stay(fetch: Any, server: Any, tmp_path: Path) -> None:
    text = refusal(lambda: fetch(always=server.status(403)))
    assert "dataset.reviews" in text
    assert f"{server.url('/r.json.gz')}: HTTP 403 Forbidden" in text
    assert server.count()["/r.json.gz"] == 1, "not tried again"
    assert "manifest.json" not in names(tmp_path / "raw")


def test_html_page(fetch: Any, server: Any) -> None:
    text = refusal(lambda: fetch(always=server.html()))
    assert "the server sent an HTML page instead of the file (it begins '<!DOCTYPE html>" in text


def test_html_page_for_a_plain_file(server: Any, tmp_path: Path) -> None:
    server.put("/m.json", b'{"asin": "1"}\n')
    server.put("/r.json", b"", always=server.html(b"\n <HTML><head>"))
    dataset = amazon(server.url("/r.json"), server.url("/m.json"))
    assert "an HTML page" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_no_gzip(fetch: Any) -> None:
    assert 'is not a gzip file (it begins \'{"a": 1}' in refusal(lambda: fetch(body=b'{"a": 1}' * 100))


def test_truncated_gzip(fetch: Any, server: Any) -> None:
    assert "gzip is truncated or damaged" in refusal(lambda: fetch(body=BODY[:-100]))
    assert server.count()["/r.json.gz"] == 1


def test_early_end_of_a_body_of_unknown_length(fetch: Any, server: Any, tmp_path: Path) -> None:
    def early(handler: Any) -> None:
        handler.answer(200, BODY[:-100], {}, None)

    fetch(announce_length=False, faults=[early])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_empty_body(fetch: Any) -> None:
    assert "is empty" in refusal(lambda: fetch(body=b""))


def test_wrong_sha256(server: Any, tmp_path: Path) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY), server.put("/m.json.gz", META), reviews_sha256="0" * 64)
    text = refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))
    assert f"sha256 is {hashlib.sha256(BODY).hexdigest()} (expected {'0' * 64})" in text


def test_right_sha256(server: Any, tmp_path: Path) -> None:
    digest = hashlib.sha256(BODY).hexdigest()
    dataset = amazon(server.put("/r.json.gz", BODY), server.put("/m.json.gz", META), reviews_sha256=digest)
    assert download(dataset, settings(), tmp_path / "raw", tmp_path)["files"][0]["sha256"] == digest


def test_announced_too_large(fetch: Any, server: Any) -> None:
    text = refusal(lambda: fetch(settings(max_file_bytes=10_000)))
    assert f"has {len(BODY)} bytes, more than download.max_file_bytes (10000)" in text


def test_endless_body(fetch: Any, server: Any, tmp_path: Path) -> None:
    text = refusal(lambda: fetch(settings(max_file_bytes=1_000_000), always=server.endless(b"\x1f\x8b\x08")))
    assert "the body is longer than allowed" in text
    assert not list((tmp_path / "raw").glob("*.part*"))


def test_range_answer_longer_than_announced(fetch: Any, server: Any) -> None:
    def longer(handler: Any) -> None:
        headers = {"ETag": '"v1"', "Content-Range": f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"}
        handler.answer(206, BODY[100_000:] + bytes(1000), headers)

    assert "longer than announced" in refusal(lambda: fetch(faults=[server.drop(100_000), longer]))


def test_unasked_content_encoding(server: Any, tmp_path: Path) -> None:
    server.put("/r.json", b"", always=lambda handler: handler.answer(200, BODY, {"Content-Encoding": "gzip"}))
    dataset = amazon(server.url("/r.json"), server.put("/m.json", b"{}\n"))
    assert "Content-Encoding gzip" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    dataset = amazon("http://127.0.0.1:9/r.json.gz", "http://127.0.0.1:9/m.json.gz")
    text = refusal(lambda: download(dataset, settings(num_retries=1), tmp_path / "raw", tmp_path))
    assert "ConnectError" in text
    assert "retries without progress: 1" in text


def test_redirect_loop_and_foreign_scheme(fetch: Any, server: Any) -> None:
    assert "TooManyRedirects" in refusal(lambda: fetch(always=server.status(302, Location="/r.json.gz")))
    assert "UnsupportedProtocol" in refusal(lambda: fetch(always=server.status(302, Location="ftp://127.0.0.1/r.json.gz")))


# ------------------------------------------------------------------------------------------------- mirrors
def test_mirrors_in_turn(server: Any, tmp_path: Path) -> None:
    good = server.put("/mirror/r.json.gz", BODY)
    bad = server.put("/html/r.json.gz", b"", always=server.html())
    dataset = amazon((server.url("/gone/r.json.gz"), bad, "nowhere/r.json.gz", good), server.put("/m.json.gz", META))
    manifest = download(dataset, settings(), tmp_path / "raw", tmp_path)
    assert manifest["files"][0]["source"] == good
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_all_mirrors_fail_in_one_line(server: Any, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(BODY[:5000])
    sources = (server.url("/r.json.gz"), server.put("/html/r.json.gz", b"", always=server.html()), "no/r.json.gz", cut.as_uri())
    text = refusal(lambda: download(amazon(sources, "m.json.gz"), settings(), tmp_path / "raw", tmp_path))
    places = [text.index(part) for part in ("HTTP 404", "HTML page", "no such file", "gzip is truncated")]
    assert places == sorted(places)
    assert all(source in text for source in sources)
    assert "local_folder" in text


def test_a_piece_of_one_mirror_is_not_continued_from_another(server: Any, tmp_path: Path) -> None:
    first = server.put("/a/r.json.gz", packed(200_000, seed=3), always=server.drop(100_000))
    second = server.put("/b/r.json.gz", BODY)
    download(amazon((first, second), server.put("/m.json.gz", META)), settings(num_retries=0), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_passwords_are_not_told(server: Any, tmp_path: Path) -> None:
    server.put("/r.json.gz", BODY)
    secret = server.url("/r.json.gz").replace("127.0.0.1", "me:hunter2@127.0.0.1")
    gone = server.url("/m.json.gz").replace("127.0.0.1", "me:hunter2@127.0.0.1")
    text = refusal(lambda: download(amazon(secret, gone), settings(), tmp_path / "raw", tmp_path))
    assert "hunter2" not in text
    assert not any("hunter2" in path.read_text() for path in (tmp_path / "raw").glob("*.json"))


# --------------------------------------------------------------------------------------------- local files
@pytest.mark.parametrize("form", ["relative", "absolute", "url", "folder"])
def test_local_sources(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "r.json.gz").write_bytes(BODY)
    (folder / "m.json.gz").write_bytes(META)
    sources = {
        "relative": ["my data/r.json.gz", "my data/m.json.gz"],
        "absolute": [str(folder / "r.json.gz"), str(folder / "m.json.gz")],
        "url": [(folder / "r.json.gz").as_uri(), (folder / "m.json.gz").as_uri()],
        "folder": ["https://example.org/a/r.json.gz?x=1", "https://example.org/b/m.json.gz"],
    }[form]
    dataset = amazon(sources[0], sources[1], local_folder="my data" if form == "folder" else None)
    raw = tmp_path / "raw"
    first = download(dataset, settings(), raw, tmp_path)
    assert contents(raw)["r.json.gz"] == BODY
    assert first["files"][0]["etag"] is None
    before = contents(raw)
    assert download(dataset, settings(), raw, tmp_path) == first
    assert contents(raw) == before


def test_a_changed_local_file_is_copied_again(tmp_path: Path) -> None:
    (tmp_path / "r.json.gz").write_bytes(BODY)
    (tmp_path / "m.json.gz").write_bytes(META)
    raw = tmp_path / "raw"
    download(amazon("r.json.gz", "m.json.gz"), settings(), raw, tmp_path)
    (tmp_path / "r.json.gz").write_bytes(packed(999))
    download(amazon("r.json.gz", "m.json.gz"), settings(), raw, tmp_path)
    assert (raw / "r.json.gz").read_bytes() == packed(999)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("absent.json.gz", "no such file"),
        ("folder.json.gz", "not a regular file"),
        ("cut.json.gz", "gzip is truncated"),
        ("text.json.gz", "is not a gzip file"),
        ("big.json.gz", "more than download.max_file_bytes"),
        ("nul\0.json.gz", "no base name"),
        ("x\0y/r.json.gz", "no such file"),
        ("loop/r.json.gz", "no such file"),
        ("manifest.json", "no base name"),
        ("x/..", "no base name"),
        (".hidden", "no base name"),
        ("file://elsewhere/r.json.gz", "another host"),
        ("~nobody-of-this-name/r.json.gz", "home directory"),
        ("http://[x/r.json.gz", "no base name"),
        ("c:r.json.gz", "no base name"),
        ("raw/r.json.gz", "which this stage writes to"),
        ("http://127.0.0.1:x/r.json.gz", "InvalidURL"),
        ("http://127.0.0.1/", "no base name"),
        ("http://127.0.0.1/%2e%2e%2fpasswd", "no base name"),
    ],
)
def test_local_sources_that_will_not_do(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "folder.json.gz").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "cut.json.gz").write_bytes(BODY[:1000])
    (tmp_path / "text.json.gz").write_bytes(b"hello, I am text")
    (tmp_path / "big.json.gz").write_bytes(packed(600_000))
    (tmp_path / "m.json.gz").write_bytes(META)
    dataset = amazon(source, "m.json.gz")
    assert problem in refusal(lambda: download(dataset, settings(max_file_bytes=500_000), tmp_path / "raw", tmp_path))


@pytest.mark.parametrize(
    ("reviews", "metadata", "archive", "clash"),
    [
        ("a/x.json.gz", "b/x.json.gz", "c.zip", "reviews and metadata are both named x.json.gz"),
        ("a/x.json.gz", "b/X.json.gz", "c.zip", "reviews and metadata are both named x.json.gz"),
        ("a", "b/x", "http://c/x?y", "metadata and image_archive are both named x"),
        ("x/a", "b", "a", "reviews and image_archive are both named a"),
    ],
)
def test_two_files_of_one_name(tmp_path: Path, reviews: str, metadata: str, archive: str, clash: str) -> None:
    dataset = amazon(reviews, metadata, image_archive=(archive,))
    assert clash in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_full_disk(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_DISK_RESERVE_BYTES", 1 << 60)
    assert "more bytes, and the disk has" in refusal(fetch)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a file, not a folder")
    (tmp_path / "r.json.gz").write_bytes(BODY)
    text = refusal(lambda: download(amazon("r.json.gz", "m.json.gz"), settings(), tmp_path / "raw", tmp_path))
    assert "cannot be written" in text


@pytest.mark.parametrize("name", ["local_folder", "image_folder"])
def test_own_folders_in_the_folder_that_is_cleared(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "raw" / "mine" / "B1.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"image")
    (tmp_path / "link").symlink_to(tmp_path / "raw" / "mine")
    for place in ("raw/mine", str(tmp_path / "link"), "raw"):
        dataset = amazon("r.json.gz", "m.json.gz", **{name: place})
        text = refusal(lambda dataset=dataset: download(dataset, settings(), tmp_path / "raw", tmp_path))
        assert f"dataset.{name}" in text
        assert "clears" in text
    assert kept.read_bytes() == b"image"
    dataset = amazon("r.json.gz", "m.json.gz", **{name: "~nobody-of-this-name/x"})
    assert "home directory" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_a_local_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("r.json", "m.json"):
        (tmp_path / name).write_bytes(b"{}\n" * 1000)
    read = transfer._read

    def growing(reader: Any) -> bytes:
        with (tmp_path / "r.json").open("ab") as writer:
            writer.write(b"{}\n")
        return read(reader)

    monkeypatch.setattr(transfer, "_read", growing)
    text = refusal(lambda: download(amazon("r.json", "m.json"), settings(), tmp_path / "raw", tmp_path))
    assert "changed while it was copied" in text
    assert names(tmp_path / "raw") == []


def test_local_files_do_not_need_the_network_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("HTTPS_PROXY", "ftp://nothing")
    for name in ("r.json", "m.json"):
        (tmp_path / name).write_bytes(b"{}\n")
    download(amazon("r.json", "m.json"), settings(), tmp_path / "raw", tmp_path)
    text = refusal(lambda: download(amazon("http://127.0.0.1/r2.json", "m.json"), settings(), tmp_path / "raw", tmp_path))
    assert text.startswith("environment: SSL_CERT_FILE")


# ------------------------------------------------------------------------------------- archives of images
def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


IMAGES = {f"images/B{number}.jpg": np.random.default_rng(number).bytes(3000) for number in range(5)}
ZIP = zipped(IMAGES)
TAR = tarred(IMAGES)
LAST_HEADER = TAR.rindex(b"images/B4.jpg")


@pytest.mark.parametrize("form", ["web", "path", "folder"])
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("images.zip", ZIP),
        ("images", ZIP),
        ("images.tar", TAR),
        ("images.zip", tarred(IMAGES, tarfile.USTAR_FORMAT)),  # what it is stands in it
        ("p.tar", tarred({"x" * 150 + ".jpg": b"long name"}, tarfile.GNU_FORMAT)),
        ("p.tar", tarred({"x" * 150 + ".jpg": b"long name"}, tarfile.PAX_FORMAT)),
    ],
    ids=["zip", "zip without suffix", "tar", "tar named zip", "gnu long name", "pax long name"],
)
def test_an_archive_of_images(server: Any, tmp_path: Path, name: str, body: bytes, form: str) -> None:
    (tmp_path / "r.json.gz").write_bytes(BODY)
    (tmp_path / "m.json.gz").write_bytes(META)
    (tmp_path / name).write_bytes(body)
    url = server.put(f"/{name}", body, faults=[server.drop(1), server.drop(10), server.drop(259)])
    source = {"web": url, "path": name, "folder": f"https://example.org/{name}"}[form]
    digest = hashlib.sha256(body).hexdigest()
    dataset = amazon(
        "r.json.gz",
        "m.json.gz",
        image_archive=(source,),
        image_archive_sha256=digest,
        local_folder="." if form == "folder" else None,
    )
    raw = tmp_path / "raw"
    manifest = download(dataset, settings(), raw, tmp_path)
    assert names(raw) == sorted(["m.json.gz", "manifest.json", "r.json.gz", name])
    assert [file["role"] for file in manifest["files"]] == ["reviews", "metadata", "images"]
    assert manifest_file(raw, "images").read_bytes() == body
    assert all(verdict.ok for verdict in verify(raw))
    assert download(dataset, settings(), raw, tmp_path) == manifest
    without = download(amazon("r.json.gz", "m.json.gz"), settings(), raw, tmp_path)
    assert len(without["files"]) == 2
    assert not (raw / name).exists()


INNER = zipped({"inner.zip": ZIP, "after.jpg": b"x" * 100})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<!DOCTYPE html><html><body>Sorry</body></html>", "an HTML page instead of the file"),
        (b"<html>" + bytes(1000), "an HTML page instead of the file"),
        (b"", "is empty"),
        (b"P", "is not a zip or tar file"),
        (b'{"asin": "B1"}\n' * 100, "is not a zip or tar file"),
        (lzma.compress(TAR), "it is an xz file; pack the images as .zip or plain .tar"),
        (bz2.compress(TAR), "it is a bzip2 file; pack the images as .zip or plain .tar"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "it is a 7z archive; pack the images as .zip or plain .tar"),
        (gzip.compress(TAR), "is a gzip file, in which single images cannot be reached"),
        (ZIP[:-30], "zip cannot be used (it is truncated or damaged"),
        (ZIP[: len(ZIP) // 2], "zip cannot be used"),
        (ZIP[:4], "zip cannot be used"),
        (ZIP[:3000] + ZIP[3500:], "zip cannot be used (an entry lies outside of the file)"),
        (INNER[: INNER.index(b"PK\x05\x06") + 22], "zip cannot be used (its zip directory does not begin at its first entry)"),
        (ZIP.replace(b"PK\x01\x02", b"PK\x01\x03"), "zip cannot be used (it is truncated or damaged"),
        (zipped({}), "zip cannot be used (it holds no files)"),
        (zipped({"images/": b""}), "zip cannot be used (it holds no files)"),
        (TAR[:1000], "tar cannot be used (it is truncated or damaged (unexpected end of data))"),
        (TAR[:LAST_HEADER], "tar cannot be used (it is truncated: its end is cut off)"),
        (TAR[: LAST_HEADER + 200], "tar cannot be used (it is truncated: its end is cut off)"),
        (TAR[: LAST_HEADER + 2000], "tar cannot be used (it is truncated or damaged (unexpected end of data))"),
        (TAR[:LAST_HEADER] + b"?" * 512 + TAR[LAST_HEADER + 512 :], "tar cannot be used (its tar header at byte"),
        (tarred({}), "is not a zip or tar file"),
    ],
    ids=[str(number) for number in range(23)],
)
def test_archives_that_will_not_do(server: Any, tmp_path: Path, body: bytes, problem: str) -> None:
    (tmp_path / "r.json.gz").write_bytes(BODY)
    (tmp_path / "m.json.gz").write_bytes(META)
    (tmp_path / "local.zip").write_bytes(body)
    for source in (server.put("/images.zip", body), "local.zip"):
        dataset = amazon("r.json.gz", "m.json.gz", image_archive=(source,))
        text = refusal(lambda dataset=dataset: download(dataset, settings(), tmp_path / "raw", tmp_path))
        assert "params.yaml: dataset.image_archive" in text
        assert problem in text
        assert names(tmp_path / "raw") == ["m.json.gz", "m.json.gz.entry.json", "r.json.gz", "r.json.gz.entry.json"]


def test_an_archive_in_small_pieces(server: Any, tmp_path: Path) -> None:
    def pieces(handler: Any) -> None:
        handler.answer(200, b"", handler.headers_of(handler.page), len(TAR))
        for start in range(0, 1000, 50):
            handler.wfile.write(TAR[start : start + 50])
            handler.wfile.flush()
            server.stopped.wait(0.002)
        handler.wfile.write(TAR[1000:])

    (tmp_path / "r.json.gz").write_bytes(BODY)
    (tmp_path / "m.json.gz").write_bytes(META)
    url = server.put("/p.tar", TAR, faults=[pieces])
    download(amazon("r.json.gz", "m.json.gz", image_archive=(url,)), settings(num_retries=0), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw" / "p.tar").read_bytes() == TAR


def test_a_zip_is_no_reviews_file(fetch: Any, server: Any, tmp_path: Path) -> None:
    dataset = amazon(server.put("/r.json", ZIP), server.put("/m.json.gz", META))
    assert "is not a file of JSON lines" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_gzip_is_checked_under_any_name(server: Any, tmp_path: Path) -> None:
    dataset = amazon(server.put("/get?file=r", BODY[:-50]), server.put("/m.json.gz", META))
    assert "gzip is truncated" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_gzip_bomb(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_EXPANSION_FREE_BYTES", 1 << 20)
    assert "more than 300 times its size" in refusal(lambda: fetch(body=gzip.compress(bytes(20_000_000))))
    fetch(body=gzip.compress(bytes(1 << 20)))  # small ones may


# ------------------------------------------------------------------------------------------ hostile answers
def test_an_etag_that_cannot_be_sent_back(fetch: Any, server: Any, tmp_path: Path) -> None:
    fetch(etag='"\xe9"', faults=[server.drop(100_000)])
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    assert all("range" not in {name.lower() for name in headers} for _, headers in server.requests)


def test_file_changes_midway_and_only_its_date_tells(server: Any, tmp_path: Path) -> None:
    older, newer = b'{"old": 1}\n' * 20_000, b'{"new": 1}\n' * 20_000
    dates = {"Last-Modified": "Wed, 21 Oct 2020 07:28:00 GMT"}

    def careless(handler: Any) -> None:
        handler.page.body, handler.page.last_modified = newer, dates["Last-Modified"]
        handler.answer(206, newer[100_000:], dates | {"Content-Range": f"bytes 100000-{len(newer) - 1}/{len(newer)}"})

    url = server.put(
        "/r.json", older, etag=None, last_modified="Wed, 21 Oct 2015 07:28:00 GMT", faults=[server.drop(100_000), careless]
    )
    download(amazon(url, server.put("/m.json.gz", META)), settings(), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw" / "r.json").read_bytes() == newer


@pytest.mark.parametrize("place", ["http://xn--/x", "http://127.0.0.1:99999/x", "http://[::1/x"])
def test_redirects_to_nowhere(fetch: Any, server: Any, place: str) -> None:
    assert "dataset.reviews: no source" in refusal(
        lambda: fetch(settings(num_retries=1), always=server.status(302, Location=place))
    )


def test_the_body_of_a_redirect_is_not_read(fetch: Any, server: Any, tmp_path: Path) -> None:
    server.put("/elsewhere", BODY)
    fetch(always=server.endless_redirect("/elsewhere"))
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY


def test_a_useless_piece_does_not_count_as_taken_room(
    fetch: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece that cannot be gone on with is removed before the room is looked at."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "r.json.gz.part").write_bytes(bytes(1000))
    seen: list[bool] = []
    check_room = transfer._check_room

    def spy(*arguments: Any) -> None:
        seen.append((raw / "r.json.gz.part").exists())
        check_room(*arguments)

    monkeypatch.setattr(transfer, "_check_room", spy)
    fetch()
    assert seen == [False, False]


def test_an_untrusted_certificate_is_not_tried_again(tls_server: Any, tmp_path: Path) -> None:
    (tmp_path / "m.json.gz").write_bytes(META)
    dataset = amazon(tls_server.put("/r.json.gz", BODY), "m.json.gz")
    text = refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))
    assert "certificate is not accepted" in text
    assert "retries" not in text
    assert "SSL_CERT_FILE" in text


def test_a_garbled_tunnel_is_resumed(
    tls_server: Any, proxy: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    (tmp_path / "m.json.gz").write_bytes(META)
    proxy.garble_after = 150_000
    dataset = amazon(tls_server.put("/r.json.gz", BODY).replace("127.0.0.1", "shop.test"), "m.json.gz")
    download(dataset, settings(), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    assert tls_server.count()["/r.json.gz"] == 2
    assert proxy.garble_after is None


# --------------------------------------------------------------------------- what someone else left in the folder
def planted(raw: Path, version: dict[str, Any] | bytes, piece: bytes) -> None:
    raw.mkdir(exist_ok=True)
    (raw / "r.json.gz.part").write_bytes(piece)
    data = version if isinstance(version, bytes) else json.dumps(version).encode()
    (raw / "r.json.gz.part.json").write_bytes(data)


@pytest.mark.parametrize("etag", ['"v1"\r\nX-Other: 1', '"\u00e9"', "", "x" * 5000, 7])
def test_a_crafted_record_of_a_piece(fetch: Any, server: Any, tmp_path: Path, etag: object) -> None:
    planted(tmp_path / "raw", {"source": server.url("/r.json.gz"), "etag": etag, "last_modified": None}, BODY[:1000])
    fetch(settings(num_retries=0))
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    assert all("range" not in {name.lower() for name in headers} for _, headers in server.requests)


def test_a_planted_link_leads_nowhere(fetch: Any, server: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(BODY[:1000])
    planted(tmp_path / "raw", {"source": server.url("/r.json.gz"), "etag": '"v1"', "last_modified": None}, b"")
    for name in ("r.json.gz.part", "r.json.gz", "m.json.gz.part.json", "m.json.gz.part", "manifest.json", "m.json.gz.entry.json"):
        (tmp_path / "raw" / name).unlink(missing_ok=True)
        (tmp_path / "raw" / name).symlink_to(outside)
    fetch()
    assert outside.read_bytes() == BODY[:1000]
    assert not any(path.is_symlink() for path in (tmp_path / "raw").iterdir())
    check(tmp_path / "raw")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["r.json.gz.part", "r.json.gz.part.json", "r.json.gz", "manifest.json", "x.entry.json"])
def test_folders_and_pipes_in_the_way(fetch: Any, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    (tmp_path / "raw").mkdir()
    make(tmp_path / "raw" / name)
    if make is os.mkdir:
        (tmp_path / "raw" / name / "inner").touch()
    fetch()
    assert names(tmp_path / "raw") == ["m.json.gz", "manifest.json", "r.json.gz"]
    check(tmp_path / "raw")


ENTRY = {"role": "reviews", "source": "x", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest(), "etag": None}


@pytest.mark.parametrize(
    "name", ["../victim", "/victim", "a/../../victim", "..\\victim", "C:victim", ".victim", "", "v\n", "a" * 300]
)
@pytest.mark.parametrize("where", ["manifest.json", "r.json.gz.entry.json"])
def test_a_crafted_name_leads_nowhere(fetch: Any, server: Any, tmp_path: Path, where: str, name: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / "victim").write_bytes(b"abc")
    entry = ENTRY | {"name": name, "source": server.url("/r.json.gz")}
    (raw / where).write_text(json.dumps({"files": [entry]} if where == "manifest.json" else entry))
    if where == "manifest.json":
        for reader in (check, verify, lambda raw: manifest_file(raw, "reviews")):
            with pytest.raises(ArtifactError, match="is not a manifest"):
                reader(raw)
    fetch()
    assert (tmp_path / "victim").read_bytes() == b"abc"
    assert (raw / "r.json.gz").read_bytes() == BODY


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"files": ' * 100_000,
        json.dumps({"files": [ENTRY | {"name": "a"}, ENTRY | {"name": "b"}]}),
        json.dumps({"files": [ENTRY | {"name": "a"}, ENTRY | {"name": "A", "role": "metadata"}]}),
        json.dumps({"files": [ENTRY | {"name": "a", "bytes": -1}]}),
        json.dumps({"files": [ENTRY | {"name": "a", "bytes": 1e300}]}),
        "\ud800",
    ],
    ids=["deep", "deep objects", "a role twice", "a name twice", "negative", "huge", "surrogate"],
)
def test_crafted_manifests(fetch: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactError, match="is not a manifest") as caught:
        check(tmp_path / "raw")
    assert len(str(caught.value)) < 600
    fetch()
    check(tmp_path / "raw")


# ------------------------------------------------------------------------------------------ kept and checked
def test_verify(fetch: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with pytest.raises(ArtifactError, match="manifest of raw files is missing"):
        verify(raw)
    manifest = fetch()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in raw.iterdir()}
    assert [(verdict.ok, verdict.line) for verdict in verify(raw)] == [
        (True, f"{file['role']} {file['name']} {file['bytes']} bytes sha256 {file['sha256'][:16]} ok")
        for file in manifest["files"]
    ]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in raw.iterdir()} == before


def test_verify_tells_all_problems(fetch: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fetch()
    (raw / "r.json.gz").write_bytes(BODY[:-1] + b"?")
    (raw / "m.json.gz").unlink()
    (raw / "x\ny").touch()
    verdicts = verify(raw)
    assert [verdict.ok for verdict in verdicts] == [False] * 3
    texts = ["sha256 is", "raw file is missing", "'x\\ny' is not in the manifest"]
    assert all(text in verdict.line for text, verdict in zip(texts, verdicts, strict=True))
    assert not any("\n" in verdict.line for verdict in verdicts)


def test_verify_unpacks(fetch: Any, tmp_path: Path) -> None:
    """A manifest that was written for a damaged file."""
    raw = tmp_path / "raw"
    manifest = fetch()
    cut = BODY[:-100]
    (raw / "r.json.gz").write_bytes(cut)
    manifest["files"][0] |= {"bytes": len(cut), "sha256": hashlib.sha256(cut).hexdigest()}
    (raw / "manifest.json").write_text(json.dumps(manifest))
    check(raw)
    assert [verdict.ok for verdict in verify(raw)] == [False, True]
    assert "gzip is truncated" in verify(raw)[0].line


def test_manifest_problems(fetch: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with pytest.raises(ArtifactError, match="missing"):
        manifest_file(raw, "reviews")
    fetch()
    with pytest.raises(ArtifactError, match="lists no images file"):
        manifest_file(raw, "images")
    (raw / "r.json.gz").write_bytes(BODY[:-1] + b"?")
    manifest_file(raw, "reviews")
    with pytest.raises(ArtifactError, match="sha256 is"):
        check(raw)
    (raw / "r.json.gz").write_bytes(BODY[:-1])
    with pytest.raises(ArtifactError, match=f"has {len(BODY) - 1} bytes"):
        manifest_file(raw, "reviews")
    (raw / "r.json.gz").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        check(raw)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": [{}]}', '{"files": 3}', '{"files": [{"role": "reviews", "name": "../x"}]}']
)
def test_bad_manifests(fetch: Any, tmp_path: Path, text: str) -> None:
    fetch()
    (tmp_path / "raw" / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"not (a manifest|valid JSON)"):
        check(tmp_path / "raw")
    fetch()  # mends it
    check(tmp_path / "raw")


def test_one_run_at_a_time(fetch: Any, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "raw"):
        assert "another run is writing" in refusal(fetch)
    fetch()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path, wait_until: Any, fetch: Any) -> None:
    code = f"""
        import time
        from pathlib import Path
        from sda_core.fetch.folders import folder_lock
        with folder_lock(Path({str(tmp_path / "raw")!r})):
            Path({str(tmp_path / "held")!r}).touch()
            time.sleep(3600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    wait_until((tmp_path / "held").exists)
    assert "another run is writing" in refusal(fetch)
    process.kill()
    process.wait()
    fetch()


# ------------------------------------------------------------------------------------------------ kill -9
def killed_download(dataset: AmazonDataset, raw: Path, when: Callable[[], bool], wait_until: Any) -> None:
    """Run a download that waits for bytes in a process of its own, and kill it when the time has come."""
    params = settings(timeout_seconds=3600.0)
    code = f"""
        from pathlib import Path
        from sda_core.fetch.download import download
        from sda_core.params import AmazonDataset, DownloadParams
        dataset = AmazonDataset.model_validate_json({dataset.model_dump_json()!r})
        params = DownloadParams.model_validate_json({params.model_dump_json()!r})
        download(dataset, params, Path({str(raw)!r}), Path({str(raw.parent)!r}))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        wait_until(lambda: when() or process.poll() is not None)
        assert process.poll() is None, "ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_in_the_middle_and_run_again(server: Any, tmp_path: Path, wait_until: Any) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY), server.put("/m.json.gz", META))
    download(dataset, settings(), tmp_path / "undisturbed", tmp_path)
    raw = tmp_path / "raw"
    part = raw / "r.json.gz.part"
    server.pages["/r.json.gz"].faults = [server.block(40_000), server.block(40_000)]
    for size in (40_000, 80_000):
        killed_download(dataset, raw, lambda size=size: part.exists() and part.stat().st_size == size, wait_until)
    assert names(raw) == ["r.json.gz.part", "r.json.gz.part.json"]
    server.requests.clear()
    download(dataset, settings(), raw, tmp_path)
    assert contents(raw) == contents(tmp_path / "undisturbed")
    asked = {name.lower(): value for name, value in server.requests[0][1].items()}
    assert asked["range"] == "bytes=80000-"


def test_killed_during_the_second_file(server: Any, tmp_path: Path, wait_until: Any) -> None:
    dataset = amazon(server.put("/r.json.gz", META), server.put("/m.json.gz", BODY))
    download(dataset, settings(), tmp_path / "undisturbed", tmp_path)
    raw = tmp_path / "raw"
    server.pages["/m.json.gz"].faults = [server.block(50_000)]
    killed_download(dataset, raw, (raw / "m.json.gz.part").exists, wait_until)
    server.requests.clear()
    download(dataset, settings(), raw, tmp_path)
    assert contents(raw) == contents(tmp_path / "undisturbed")
    assert set(server.count()) == {"/m.json.gz"}, "the first file was whole"


def test_a_rotten_piece_costs_one_fresh_start(server: Any, tmp_path: Path) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY, faults=[server.drop(100_000)]), server.put("/m.json.gz", META))
    raw = tmp_path / "raw"
    refusal(lambda: download(dataset, settings(num_retries=0), raw, tmp_path))
    part = raw / "r.json.gz.part"
    assert part.stat().st_size == 100_000
    part.write_bytes(part.read_bytes()[:50_000] + bytes(50_000))  # what a power cut can leave
    download(dataset, settings(), raw, tmp_path)
    assert (raw / "r.json.gz").read_bytes() == BODY


def test_a_whole_part_is_only_checked(server: Any, tmp_path: Path) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY, faults=[server.drop(100_000)]), server.put("/m.json.gz", META))
    raw = tmp_path / "raw"
    refusal(lambda: download(dataset, settings(num_retries=0), raw, tmp_path))
    (raw / "r.json.gz.part").write_bytes(BODY)
    server.requests.clear()
    download(dataset, settings(num_retries=0), raw, tmp_path)
    assert server.count()["/r.json.gz"] == 1
    assert (raw / "r.json.gz").read_bytes() == BODY


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_killed_between_check_and_rename(server: Any, tmp_path: Path, etag: str | None) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY, etag=etag), server.put("/m.json.gz", META))
    raw = tmp_path / "raw"
    manifest = download(dataset, settings(), raw, tmp_path)
    before = contents(raw)
    (raw / "r.json.gz").rename(raw / "r.json.gz.part")
    (raw / "r.json.gz.entry.json").write_text(json.dumps(manifest["files"][0]))
    (raw / "m.json.gz.entry.json").write_text(json.dumps(manifest["files"][1]))
    (raw / "manifest.json").unlink()
    server.requests.clear()
    download(dataset, settings(), raw, tmp_path)
    assert contents(raw) == before
    assert server.requests == []


# -------------------------------------------------------------------------------------------- shop, real data
def test_demo_shop(tmp_path: Path) -> None:
    demo = pytest.importorskip("sda_core.data.demo")
    if not hasattr(demo, "write_shop"):
        pytest.skip("the shop is not there")
    dataset = DemoDataset(
        source="demo",
        edition=2018,
        category="Tiny",
        seed=1,
        num_users=40,
        num_items=30,
        mean_history_length=6.0,
        popularity_exponent=0.8,
        content_strength=1.0,
        image_share=0.3,
        text_share=0.3,
        sequence_strength=1.0,
        same_day_share=0.2,
        text_noise=0.1,
        missing_image_share=0.1,
        missing_metadata_share=0.0,
        quirk_share=0.0,
        new_item_share=0.0,
        text_completeness=1.0,
        image_clutter=0.0,
        missing_description_share=0.0,
        image_side=16,
    )
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "stale.json.gz").write_bytes(b"x")
    manifest = download(dataset, settings(), raw, tmp_path)
    assert [file["role"] for file in manifest["files"]] == ["reviews", "metadata", "images"]
    assert names(raw) == sorted([*(file["name"] for file in manifest["files"]), "manifest.json"])
    check(raw)
    before = contents(raw)
    download(dataset, settings(), raw, tmp_path)
    assert contents(raw) == before


@pytest.mark.real_data
@pytest.mark.skipif(not GIFT_CARDS.is_dir(), reason="../shared/data is absent")
def test_gift_cards(tmp_path: Path) -> None:
    dataset = amazon(
        "https://mcauleylab.ucsd.edu/x/Gift_Cards_5.json.gz",
        "https://mcauleylab.ucsd.edu/y/meta_Gift_Cards.json.gz",
        local_folder=str(GIFT_CARDS),
    )
    raw = tmp_path / "raw"
    download(dataset, settings(max_file_bytes=1 << 30), raw, tmp_path)
    check(raw)
    with gzip.open(manifest_file(raw, "reviews")) as stream:
        assert sum(1 for _ in stream) == 2972
