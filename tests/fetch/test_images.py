"""Fetching images: from a real server with faults, from folders and zip files, interrupted and resumed."""

from __future__ import annotations

import errno
import gzip
import io
import json
import random
import struct
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from PIL import Image

from sda_core.artifacts import IMAGES, ITEMS
from sda_core.errors import ArtifactError, DownloadError, StorageError
from sda_core.fetch import images as module
from sda_core.fetch.decoding import PreparedImage, prepare
from sda_core.fetch.folders import folder_lock
from sda_core.fetch.images import fetch_images
from sda_core.image_store import IMAGE_STATUSES, STATUSES, ImageStore, read_images
from sda_core.params import FetchImagesParams

Reference = str | Sequence[str] | None


def settings(**changes: Any) -> FetchImagesParams:
    values: dict[str, Any] = {
        "num_workers": 8,
        "max_per_host": 4,
        "timeout_seconds": 5.0,
        "num_retries": 2,
        "backoff_seconds": 0.01,
        "max_bytes": 200_000,
        "max_pixels": 1_000_000,
        "stored_pixels": 64 * 64,
        "shard_rows": 4,
    }
    return FetchImagesParams(**(values | changes))


def items_table(references: Sequence[Reference], raw_ids: Sequence[str] | None = None) -> pl.DataFrame:
    lists = [[] if entry is None else [entry] if isinstance(entry, str) else list(entry) for entry in references]
    num_items = len(lists)
    columns: dict[str, Any] = {
        "item_id": range(1, num_items + 1),
        "raw_item_id": raw_ids or [f"B{number:09d}" for number in range(1, num_items + 1)],
        "title": [""] * num_items,
        "brand": [""] * num_items,
        "price": [""] * num_items,
        "categories": [[]] * num_items,
        "features": [[]] * num_items,
        "description": [""] * num_items,
        "image_references": lists,
        "has_metadata": [True] * num_items,
    }
    return pl.DataFrame(columns, schema=dict(ITEMS.columns))


def image_file(seed: int = 0, form: str = "PNG", side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def pixels(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def list_raw_files(raw: Path, archive: str | None = None) -> None:
    """The manifest, as the download stage leaves it."""
    entry = {"role": "images", "name": archive, "source": "x", "bytes": 0, "sha256": "0" * 64, "etag": None}
    files = [] if archive is None else [entry | {"bytes": (raw / archive).stat().st_size}]
    (raw / "manifest.json").write_text(json.dumps({"files": files}))


def fetch(
    items: pl.DataFrame, raw: Path, local_folder: Path | None, params: FetchImagesParams, out: Path, **folders: Path
) -> dict[str, int | float]:
    """Fetch with the archive ``raw/images.zip`` where there is one."""
    if not (raw / "manifest.json").exists():
        list_raw_files(raw, "images.zip" if (raw / "images.zip").exists() else None)
    return fetch_images(items, raw, local_folder, folders.get("image_folder"), params, out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def statuses(out: Path) -> list[str]:
    return [status for frame in read_images(out) for status in frame["status"]]


@pytest.fixture
def shop(server: Any) -> list[str]:
    """Ten good images on the server."""
    return [server.put(f"/{number}.png", image_file(number)) for number in range(10)]


# ---------------------------------------------------------------------------------------------- the good
def test_shards_and_coverage(shop: list[str], tmp_path: Path) -> None:
    out = tmp_path / "images"
    table = items_table([*shop, None])
    coverage = fetch(table, tmp_path, None, settings(), out)
    assert coverage == {
        "num_items": 11,
        "num_ok": 10,
        "share_ok": 10 / 11,
        **{f"num_{status}": int(status == "missing_url") for status in STATUSES[1:]},
    }
    assert sorted(contents(out)) == ["coverage.json", "shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet"]
    assert json.loads((out / "coverage.json").read_text()) == coverage
    frames = list(read_images(out))
    assert [frame.height for frame in frames] == [4, 4, 3]
    assert pl.concat(frames)["item_id"].to_list() == table["item_id"].to_list()
    assert pl.concat(frames)["raw_item_id"].to_list() == table["raw_item_id"].to_list()
    assert all(dict(frame.schema) == dict(IMAGES.columns) for frame in frames)
    store = ImageStore(out)
    assert len(store) == 11
    for number in range(10):
        assert store.status(number + 1) == "ok"
        assert np.array_equal(pixels(store.get(number + 1)), pixels(image_file(number)))
    assert (store.status(11), store.get(11)) == ("missing_url", None)
    assert not list(tmp_path.glob(".images*")), "the lock file is gone"


def test_order_of_rows_and_workers_do_not_matter(shop: list[str], server: Any, tmp_path: Path) -> None:
    table = items_table([*shop, server.url("/none.png"), None])
    fetch(table, tmp_path, None, settings(), tmp_path / "a")
    for page in server.pages.values():
        page.delay_seconds = random.Random(page.body).random() / 20
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=3)
    fetch(shuffled, tmp_path, None, settings(num_workers=1, max_per_host=1), tmp_path / "b")
    fetch(shuffled, tmp_path, None, settings(num_workers=32, max_per_host=32), tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize(("num_workers", "max_per_host", "most"), [(8, 3, 3), (2, 8, 2), (1, 1, 1)])
def test_requests_at_a_time(shop: list[str], server: Any, tmp_path: Path, num_workers: int, max_per_host: int, most: int) -> None:
    for page in server.pages.values():
        page.delay_seconds = 0.05
    fetch(items_table(shop), tmp_path, None, settings(num_workers=num_workers, max_per_host=max_per_host), tmp_path / "images")
    assert server.most_in_flight == most


def test_hosts_do_not_wait_for_each_other(
    shop: list[str], server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """One host that answers only when the other has served all it has; with one limit for both nobody would move."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")

    def late(handler: Any) -> None:
        wait_until(lambda: sum(server.count()[f"/{number}.png"] for number in range(1, 10)) == 9)
        handler.plain()

    server.pages["/0.png"].always = late
    others = [url.replace("127.0.0.1", "localhost") for url in shop[1:]]
    coverage = fetch(
        items_table([shop[0], *others]),
        tmp_path,
        None,
        settings(num_workers=2, max_per_host=1, num_retries=0, shard_rows=10),
        tmp_path / "images",
    )
    assert coverage["num_ok"] == 10


def test_a_host_serves_on_while_an_image_is_decoded(
    shop: list[str], server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """But no more bodies are gathered than there are workers."""
    num_asked: list[int] = []

    def slow(*arguments: Any) -> PreparedImage:
        if not num_asked:
            wait_until(lambda: len(server.requests) == 3)
            time.sleep(0.2)
        num_asked.append(len(server.requests))
        return prepare(*arguments)

    monkeypatch.setattr(module, "prepare", slow)
    monkeypatch.setattr(module, "_MAX_DECODERS", 1)
    fetch(items_table(shop), tmp_path, None, settings(num_workers=3, max_per_host=1), tmp_path / "images")
    assert num_asked[0] == 3
    assert statuses(tmp_path / "images") == ["ok"] * 10


def test_no_items(tmp_path: Path) -> None:
    coverage = fetch(items_table([]), tmp_path, None, settings(), tmp_path / "images")
    assert (coverage["num_items"], coverage["share_ok"]) == (0, 0.0)
    assert len(ImageStore(tmp_path / "images")) == 0


def test_best_reference_first(server: Any, tmp_path: Path) -> None:
    good, better = server.put("/good.png", image_file(1)), server.put("/better.png", image_file(2))
    gone, junk = server.url("/gone.png"), server.put("/junk.png", b"junk")
    table = items_table(
        [[better, good], [gone, junk, "", good], [gone, junk], ["not an address", gone], ["http://[::bad/x.png"], [junk, gone]]
    )
    fetch(table, tmp_path, None, settings(), tmp_path / "images")
    store = ImageStore(tmp_path / "images")
    assert np.array_equal(pixels(store.get(1)), pixels(image_file(2)))
    assert np.array_equal(pixels(store.get(2)), pixels(image_file(1)))
    assert [store.status(item_id) for item_id in (3, 4, 5, 6)] == ["corrupt", "http_404", "missing_url", "corrupt"]


# ---------------------------------------------------------------------------------------- faults of servers
def fetched(server: Any, tmp_path: Path, body: bytes | None = None, params: FetchImagesParams | None = None, **page: Any) -> str:
    url = server.put("/x.png", image_file() if body is None else body, **page)
    fetch(items_table([url]), tmp_path, None, params or settings(), tmp_path / "images")
    return statuses(tmp_path / "images")[0]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_errors_that_pass(server: Any, tmp_path: Path, code: int) -> None:
    assert fetched(server, tmp_path, faults=[server.status(code)] * 2) == "ok"


@pytest.mark.parametrize(
    ("code", "status", "num_requests"),
    [
        (404, "http_404", 1),
        (410, "http_404", 1),
        (403, "http_error", 1),
        (400, "http_error", 1),
        (500, "http_error", 3),
        (503, "http_error", 3),
    ],
)
def test_errors_that_stay(server: Any, tmp_path: Path, code: int, status: str, num_requests: int) -> None:
    assert fetched(server, tmp_path, always=server.status(code)) == status
    assert server.count()["/x.png"] == num_requests


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_stops_the_whole_host(shop: list[str], server: Any, tmp_path: Path, code: int) -> None:
    server.pages["/0.png"].faults = [server.status(code, Retry_After="1")]
    for number in range(1, 10):
        server.pages[f"/{number}.png"].delay_seconds = 0.01
    began = time.monotonic()
    fetch(items_table(shop), tmp_path, None, settings(max_per_host=1), tmp_path / "images")
    assert time.monotonic() - began >= 1.0
    assert statuses(tmp_path / "images") == ["ok"] * 10
    assert server.count()["/0.png"] == 2


def test_drops_in_the_body(server: Any, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, faults=[server.drop(100)]) == "ok"
    assert fetched(server, tmp_path, body=image_file(9), always=server.drop(100)) == "ok", (
        "kept from the first time: same address"
    )
    assert fetched(server, tmp_path, params=settings(stored_pixels=32 * 32), always=server.drop(100)) == "http_error"


@pytest.mark.parametrize("fault", ["drip", "drip_headers", "silence"])
def test_timeouts(server: Any, tmp_path: Path, fault: str) -> None:
    params = settings(timeout_seconds=0.2, num_retries=1)
    assert fetched(server, tmp_path, params=params, always=getattr(server, fault)()) == "timeout"


def test_too_many_bytes(server: Any, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, body=bytes(200_001)) == "too_large"
    assert fetched(server, tmp_path, params=settings(stored_pixels=32 * 32), always=server.endless()) == "too_large"
    assert (
        fetched(server, tmp_path, params=settings(stored_pixels=33 * 33), body=bytes(200_001), announce_length=False)
        == "too_large"
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", "corrupt"),
        (b"text in the name of an image", "corrupt"),
        (image_file(side=32)[:-50], "corrupt"),
        (png_header(50_000, 50_000), "too_large"),
        (image_file(side=1), "http_404"),  # the dot that stands for an image which is gone
    ],
)
def test_hostile_bodies(server: Any, tmp_path: Path, body: bytes, status: str) -> None:
    assert fetched(server, tmp_path, body=body) == status


def test_html_page_with_status_200(server: Any, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, always=server.html()) == "unsupported"


def test_redirects(server: Any, tmp_path: Path) -> None:
    server.put("/target.png", image_file())
    assert fetched(server, tmp_path, always=server.status(302, Location="/target.png")) == "ok"
    params = settings(stored_pixels=32 * 32)
    assert fetched(server, tmp_path, params=params, always=server.status(302, Location="/x.png")) == "http_error"
    assert (
        fetched(server, tmp_path, params=settings(stored_pixels=33 * 33), always=server.status(302, Location="ftp://127.0.0.1/"))
        == "http_error"
    )


def test_a_redirect_with_an_endless_body(server: Any, tmp_path: Path) -> None:
    server.put("/target.png", image_file())
    page = {"always": server.endless_redirect("/target.png")}
    assert fetched(server, tmp_path, **page) == "ok"


def test_an_unknown_authority_is_told_once(
    tls_server: Any, authority: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [tls_server.put(f"/{number}.png", image_file(number)) for number in range(3)]
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    coverage = fetch(items_table(urls), tmp_path, None, settings(), tmp_path / "images")
    assert coverage["num_http_error"] == 3
    assert len(caplog.records) == 1
    assert "127.0.0.1: its certificate is not accepted" in caplog.records[0].message
    assert "SSL_CERT_FILE" in caplog.records[0].message
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    assert fetch(items_table(urls), tmp_path, None, settings(), tmp_path / "images")["num_ok"] == 3


def test_a_dead_host_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "_MAX_HOST_FAILURES", 5)
    params = settings(backoff_seconds=0.2, num_retries=4, max_per_host=1)
    requests: list[str] = []
    exchange = module.exchange

    def counting(client: Any, url: str, timeout_seconds: float) -> Any:
        requests.append(url)
        return exchange(client, url, timeout_seconds)

    monkeypatch.setattr(module, "exchange", counting)
    fetch(items_table([f"http://127.0.0.1:9/{number}.png" for number in range(40)]), tmp_path, None, params, tmp_path / "images")
    assert len(requests) == 5, "not all retries of all images"
    assert statuses(tmp_path / "images") == ["http_error"] * 40


def test_a_host_that_only_drips_is_given_up(
    shop: list[str], server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_HOST_FAILURES", 3)
    for page in server.pages.values():
        page.always = server.drip()
    params = settings(timeout_seconds=0.1, num_retries=0, max_per_host=1)
    fetch(items_table(shop), tmp_path, None, params, tmp_path / "images")
    assert statuses(tmp_path / "images") == ["timeout"] * 10
    assert sum(server.count().values()) <= 3, "one that had no time to reach the server counts, too"


# ---------------------------------------------------------------------------------------- local files, zip
def test_local_folder(server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    (folder / "images").mkdir(parents=True)
    (folder / "posters").mkdir()
    for number, suffix in enumerate([".jpg", ".jpeg", ".png", ".webp"], start=1):
        (folder / "images" / f"ID{number}{suffix}").write_bytes(image_file(number, "PNG"))
    (folder / "posters" / "five.png").write_bytes(image_file(5))
    (folder / "images" / "ID9.jpg").write_bytes(b"text")
    (folder / "images" / "ID10.jpg").write_bytes(bytes(300_000))
    url = server.put("/x.png", image_file())
    references: list[Reference] = [
        None,
        url,
        "posters/five.png",
        None,
        "./posters/five.png",
        url,
        None,
        "posters/none.png",
        None,
        None,
    ]
    table = items_table(references, [f"ID{number}" for number in range(1, 11)])
    coverage = fetch(table, tmp_path, folder, settings(), tmp_path / "images")
    store = ImageStore(tmp_path / "images")
    for number in range(1, 6):
        assert np.array_equal(pixels(store.get(number)), pixels(image_file(number)))
    assert [store.status(item_id) for item_id in range(6, 11)] == [
        "missing_file",
        "missing_url",
        "missing_file",
        "corrupt",
        "too_large",
    ]
    assert server.requests == []
    assert coverage["num_ok"] == 5


TRICKS = [
    "../secret.png",
    "images/../../secret.png",
    "/etc/passwd",
    "{absolute}",
    "file://{absolute}",
    "images\\..\\secret.png",
    "C:/secret.png",
    "images/x\0.png",
    "images/" + "x" * 900 + ".png",
    "..",
    ".",
    "~/secret.png",
    "images",
    "data:image/png;base64,AAAA",
]


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_path_tricks(tmp_path: Path, source: str) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_file())
    folder = tmp_path / "local"
    (folder / "images").mkdir(parents=True)
    if source == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name in ("../secret.png", "images/../../secret.png", "/etc/passwd", "C:/secret.png", "..", "images/"):
                archive.writestr(name, image_file())
    table = items_table([reference.format(absolute=secret) for reference in TRICKS])
    coverage = fetch(table, tmp_path, folder if source == "folder" else None, settings(), tmp_path / "images")
    assert coverage["num_missing_file"] == coverage["num_items"] == len(TRICKS)


@pytest.mark.parametrize("raw_id", ["../secret", "../../secret", "a/b", "nul\0", "", "..", "{absolute}", "x" * 300])
def test_tricks_in_ids(tmp_path: Path, raw_id: str) -> None:
    folder = tmp_path / "local"
    (folder / "images" / "a").mkdir(parents=True)
    for path in (tmp_path / "secret.png", folder / "secret.png", folder / "images" / "a" / "b.png"):
        path.write_bytes(image_file())
    fetch(items_table([None], [raw_id.format(absolute=tmp_path / "secret")]), tmp_path, folder, settings(), tmp_path / "images")
    assert statuses(tmp_path / "images") == ["missing_url"]


def test_zip_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("images/1.png", image_file(1))
        archive.writestr("images/2.png", b"text")
        archive.writestr("images/3.png", bytes(200_001), zipfile.ZIP_DEFLATED)
        archive.writestr("images/4.png", bytes(190_000), zipfile.ZIP_DEFLATED)
        archive.writestr("images/5.png", image_file(5), zipfile.ZIP_BZIP2)
        archive.writestr("images/6.png", image_file(6))
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(b"IDAT", data.index(b"images/6.png")) + 20] ^= 1  # its checksum no longer fits
    (tmp_path / "images.zip").write_bytes(data)
    table = items_table([f"images/{number}.png" for number in range(1, 8)])
    fetch(table, tmp_path, None, settings(), tmp_path / "images")
    assert statuses(tmp_path / "images") == ["ok", "corrupt", "too_large", "corrupt", "unsupported", "corrupt", "missing_file"]


def make_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_entries(server: Any, tmp_path: Path) -> None:
    """By path, by name, and what is not there from its address; the archive is the one that the manifest names."""
    make_tar(
        tmp_path / "images.tar",
        {"a/1.png": image_file(1), "b/B2.jpg": image_file(2), "a/3.png": b"text", "B4.png": image_file(4)},
    )
    list_raw_files(tmp_path, "images.tar")
    url = server.put("/x.png", image_file(5))
    table = items_table(["a/1.png", None, "a/3.png", url, url, None], [f"B{number}" for number in range(1, 7)])
    fetch(table, tmp_path, None, settings(), tmp_path / "images")
    store = ImageStore(tmp_path / "images")
    for number in (1, 2, 4, 5):
        assert np.array_equal(pixels(store.get(number)), pixels(image_file(number)))
    assert (store.status(3), store.status(6)) == ("corrupt", "missing_url")
    assert server.count() == {"/x.png": 1}


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar.gz", {"1.png": image_file()}, "w:gz")
    (tmp_path / "x.zip").write_bytes(b"PK no more")
    for name, message in (("x.zip", "neither a zip nor a tar"), ("x.tar.gz", "compressed as a whole.*unpack it to a plain .tar")):
        list_raw_files(tmp_path, name)
        with pytest.raises(ArtifactError, match=message) as caught:
            fetch(items_table(["1.png"]), tmp_path, None, settings(), tmp_path / "images")
        assert "\n" not in str(caught.value)
    (tmp_path / "x.tar.gz").unlink()
    with pytest.raises(ArtifactError, match="raw file is missing"):
        fetch(items_table(["1.png"]), tmp_path, None, settings(), tmp_path / "images")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest.*dvc repro download"):
        fetch_images(items_table(["1.png"]), tmp_path, None, None, settings(), tmp_path / "images")
    assert not (tmp_path / "images").exists()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_unsupported_formats_are_counted_by_name(
    server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the rows, in the counts (of rows that were kept, too) and in the log; an address may still help."""
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in (("A.heic", HEIC), ("B.JPG", HEIC), ("C.svg", b"<svg/>"), ("D.jpg", b"junk"), ("E.heic", HEIC)):
        (folder / name).write_bytes(data)
    (folder / "other.jpg").write_bytes(image_file())
    (folder / "._A.jpg").write_bytes(image_file())
    table = items_table([None, None, None, None, server.put("/e.png", image_file(5))], list("ABCDE"))
    for _ in range(2):
        caplog.clear()
        coverage = fetch(table, tmp_path, None, settings(), tmp_path / "images", image_folder=folder)
        assert statuses(tmp_path / "images") == ["unsupported", "unsupported", "unsupported", "corrupt", "ok"]
        assert {name: number for name, number in coverage.items() if number and name.startswith("num_")} == {
            "num_items": 5,
            "num_ok": 1,
            "num_corrupt": 1,
            "num_unsupported": 3,
            "num_unsupported_heic": 2,
            "num_unsupported_svg": 1,
            "num_folder_no_item": 1,
            "num_folder_no_image": 1,
        }
        assert json.loads((tmp_path / "images" / "coverage.json").read_text()) == coverage
        assert "2 items have images of an unsupported format (HEIC), first 'A', 'B': the files are not damaged" in caplog.text
        assert "1 items have images of an unsupported format (SVG), first 'C'" in caplog.text
    assert pl.concat(read_images(tmp_path / "images"))["reason"].to_list() == ["HEIC", "HEIC", "SVG", None, None]
    monkeypatch.setattr(module, "FORMATS", ("HEIC", *module.FORMATS))
    monkeypatch.setattr(module, "prepare", lambda *_: PreparedImage("ok", image_file(9), 16, 16))
    fetch(table, tmp_path, None, settings(), tmp_path / "images", image_folder=folder)
    assert statuses(tmp_path / "images") == ["ok", "ok", "unsupported", "corrupt", "ok"], "what is decoded now is tried again"


def test_folders_and_archives_of_other_systems(tmp_path: Path) -> None:
    """The same items from a folder, and from archives as Windows and macOS pack it."""
    ids = ["sku 17", "Größe", "a/b", "x"]
    names = ["sku 17.JPG", "Größe.Png", "a%2Fb.webp", "photo of x.TIF"]
    references: list[Reference] = [None, None, None, "images\\photo%20of%20x.tif"]
    folder = tmp_path / "local"
    (folder / "images").mkdir(parents=True)
    with (
        zipfile.ZipFile(tmp_path / "windows.zip", "w") as windows,
        zipfile.ZipFile(tmp_path / "macos.zip", "w") as macos,
    ):
        for number, name in enumerate(names):
            data = image_file(number, "TIFF" if name.endswith("TIF") else "PNG")
            (folder / "images" / name).write_bytes(data)
            entry = zipfile.ZipInfo("placeholder")
            entry.filename = f"shop\\images\\{name}"
            windows.writestr(entry, data)
            macos.writestr(f"shop/images/{unicodedata.normalize('NFD', name)}", data)
            macos.writestr(f"__MACOSX/shop/images/._{unicodedata.normalize('NFD', name)}", b"\0\5\x16\7")
    fetch(items_table(references, ids), tmp_path, folder, settings(), tmp_path / "a")
    assert statuses(tmp_path / "a") == ["ok"] * 4
    for name in ("windows.zip", "macos.zip"):
        list_raw_files(tmp_path, name)
        fetch(items_table(references, ids), tmp_path, None, settings(), tmp_path / name.partition(".")[0])
        store, wanted = ImageStore(tmp_path / name.partition(".")[0]), ImageStore(tmp_path / "a")
        assert [store.get(number) for number in range(1, 5)] == [wanted.get(number) for number in range(1, 5)]


def test_an_archive_with_a_password_is_not_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("A.png", image_file())
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "images.zip").write_bytes(data)
    coverage = fetch(items_table([None], ["A"]), tmp_path, None, settings(), tmp_path / "images")
    assert (coverage["num_unsupported"], coverage["num_unsupported_archive_entry_encrypted"]) == (1, 1)
    assert "pack the archive again with Deflate and without a password" in caplog.text


# ------------------------------------------------------------------------------------------ kept and resumed
def test_nothing_to_do(shop: list[str], server: Any, tmp_path: Path) -> None:
    out = tmp_path / "images"
    fetch(items_table(shop), tmp_path, None, settings(), out)
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    server.requests.clear()
    fetch(items_table(shop), tmp_path, None, settings(num_workers=3, timeout_seconds=9.0), out)
    assert server.requests == []
    assert contents(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}


def test_only_what_failed_for_a_time_is_tried_again(shop: list[str], server: Any, tmp_path: Path) -> None:
    out = tmp_path / "images"
    fetch(items_table([*shop, server.url("/11.png")]), tmp_path, None, settings(), tmp_path / "undisturbed")
    server.pages["/2.png"].always = server.status(500)
    server.pages["/7.png"].always = server.silence()
    table = items_table([*shop, server.url("/11.png")])
    first = fetch(table, tmp_path, None, settings(timeout_seconds=1.0, num_retries=0), out)
    assert (first["num_http_error"], first["num_timeout"], first["num_http_404"]) == (1, 1, 1)
    server.pages["/2.png"].always = server.pages["/7.png"].always = None
    server.requests.clear()
    second = fetch(table, tmp_path, None, settings(), out)
    assert server.count() == {"/2.png": 1, "/7.png": 1}
    assert second["num_ok"] == 10
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_another_choice_of_items_keeps_the_images(shop: list[str], server: Any, tmp_path: Path) -> None:
    out = tmp_path / "images"
    fetch(items_table(shop), tmp_path, None, settings(), out)
    ids = [f"B{number:09d}" for number in range(1, 11)]
    chosen = [9, 8, 5, 3, 2, 0]
    table = items_table([shop[number] for number in chosen], [ids[number] for number in chosen])
    server.requests.clear()
    fetch(table, tmp_path, None, settings(shard_rows=5), out)
    assert server.requests == []
    assert sorted(contents(out)) == ["coverage.json", "shard-00000.parquet", "shard-00001.parquet"]
    fetch(table, tmp_path, None, settings(shard_rows=5), tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")


@pytest.mark.parametrize("change", [{"stored_pixels": 1024}, {"max_bytes": 150_000}, {"max_pixels": 900_000}])
def test_other_bounds_make_images_again(shop: list[str], server: Any, tmp_path: Path, change: dict[str, int]) -> None:
    fetch(items_table(shop[:2]), tmp_path, None, settings(), tmp_path / "images")
    server.requests.clear()
    fetch(items_table(shop[:2]), tmp_path, None, settings(**change), tmp_path / "images")
    assert sum(server.count().values()) == 2


def test_a_changed_local_image_is_seen(tmp_path: Path) -> None:
    (tmp_path / "local" / "images").mkdir(parents=True)
    path = tmp_path / "local" / "images" / "A.png"
    for seed in (1, 2):
        path.write_bytes(image_file(seed))
        fetch(items_table([None], ["A"]), tmp_path, tmp_path / "local", settings(), tmp_path / "images")
        assert np.array_equal(pixels(ImageStore(tmp_path / "images").get(1)), pixels(image_file(seed)))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "folder"])
def test_damaged_shards_and_strange_files(shop: list[str], server: Any, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "images"
    fetch(items_table(shop), tmp_path, None, settings(), out)
    before = contents(out)
    path = out / "shard-00001.parquet"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "foreign":
        pl.DataFrame({"x": [1]}).write_parquet(path)
    else:
        path.write_bytes(data[:-200] if damage == "cut" else b"")
    (out / "shard-00009.parquet").write_bytes(data)
    (out / "notes.txt").write_text("x")
    server.requests.clear()
    fetch(items_table(shop), tmp_path, None, settings(), out)
    assert contents(out) == before
    assert sum(server.count().values()) <= 4


def test_one_run_at_a_time(shop: list[str], tmp_path: Path) -> None:
    with folder_lock(tmp_path / "images"), pytest.raises(DownloadError, match="another run is writing"):
        fetch(items_table(shop), tmp_path, None, settings(), tmp_path / "images")


def test_no_such_local_folder(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"dataset\.local_folder: there is no folder"):
        fetch(items_table([]), tmp_path, tmp_path / "none", settings(), tmp_path / "images")


@pytest.mark.parametrize("place", ["images", "images/mine", "link"])
def test_images_of_the_user_in_the_folder_that_is_cleared(tmp_path: Path, place: str) -> None:
    kept = tmp_path / "images" / "mine" / "B1.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(image_file())
    (tmp_path / "link").symlink_to(tmp_path / "images" / "mine")
    with pytest.raises(DownloadError, match=r"dataset\.image_folder: .* which this stage clears"):
        fetch(items_table([]), tmp_path, None, settings(), tmp_path / "images", image_folder=tmp_path / place)
    with pytest.raises(DownloadError, match=r"dataset\.local_folder: .* which this stage clears"):
        fetch(items_table([]), tmp_path, tmp_path, settings(), tmp_path / "images")
    assert kept.read_bytes() == image_file()


def test_local_images_need_no_network_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://x:1")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "B1.png").write_bytes(image_file())
    items = items_table([("B1.png",)], ["B1"])
    assert fetch(items, tmp_path, None, settings(), tmp_path / "images", image_folder=tmp_path / "mine")["num_ok"] == 1


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        fetch(items_table([]), tmp_path, None, settings(), tmp_path / "images")


def test_wrong_table(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="image_references"):
        fetch(items_table([]).drop("image_references"), tmp_path, None, settings(), tmp_path / "images")


def test_a_full_disk_leaves_no_sign_of_a_whole_folder(shop: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "images"
    fetch(items_table(shop), tmp_path, None, settings(), tmp_path / "undisturbed")
    fetch(items_table(shop), tmp_path, None, settings(stored_pixels=32 * 32), out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", full)
        with pytest.raises(StorageError, match="No space left"):
            fetch(items_table(shop), tmp_path, None, settings(), out)
    with pytest.raises(ArtifactError, match="not all fetched"):
        ImageStore(out)
    fetch(items_table(shop), tmp_path, None, settings(), out)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_killed_while_shards_make_way(shop: list[str], server: Any, tmp_path: Path) -> None:
    """A run that was killed between setting a shard aside and writing its successor."""
    out = tmp_path / "images"
    fetch(items_table(shop), tmp_path, None, settings(), out)
    before = contents(out)
    (out / "shard-00001.parquet").rename(out / ".old-0123456789abcdef.parquet")
    (out / "coverage.json").unlink()
    server.requests.clear()
    fetch(items_table(shop), tmp_path, None, settings(), out)
    assert server.requests == []
    assert contents(out) == before


# ---------------------------------------------------------------------------------------------- real data
def gift_cards(folder: Path) -> pl.DataFrame:
    with gzip.open(folder / "Gift_Cards_5.json.gz") as stream:
        ids = sorted({json.loads(line)["asin"] for line in stream})
    with gzip.open(folder / "meta_Gift_Cards.json.gz") as stream:
        metadata = {row["asin"]: row for row in map(json.loads, stream)}
    references = [[*metadata[raw_id].get("imageURLHighRes", []), *metadata[raw_id].get("imageURL", [])] for raw_id in ids]
    return items_table(references, ids)


def movies(folder: Path) -> pl.DataFrame:
    ids = sorted(path.stem for path in (folder / "images").iterdir())[:120]
    return items_table([f"images/{raw_id}.jpg" for raw_id in ids], ids)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "table", "num_items", "num_ok"),
    [("amazon_2018_gift_cards", gift_cards, 148, 115), ("movies_2023_format", movies, 120, 120)],
)
def test_real_images_from_everywhere(
    real_data: Path,
    tmp_path: Path,
    name: str,
    table: Callable[[Path], pl.DataFrame],
    num_items: int,
    num_ok: int,
) -> None:
    """The same bytes for every item from the local folder, the folder of images, a zip file and a tar file."""
    source = real_data / name
    items = table(source)
    params = settings(max_bytes=20_000_000, max_pixels=50_000_000, stored_pixels=65_536, shard_rows=64, num_retries=0)
    wanted = set(items["raw_item_id"])
    paths = [path for path in sorted((source / "images").iterdir()) if path.stem in wanted]
    no_addresses = items.with_columns(
        pl.col("image_references").list.eval(pl.element().filter(~pl.element().str.starts_with("http")))
    )
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, f"images/{path.name}")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in reversed(paths):
            archive.add(path, f"./some/where/{path.name}")
    list_raw_files(tmp_path)
    coverage = fetch(items, tmp_path, source, params, tmp_path / "local")
    assert (coverage["num_items"], coverage["num_ok"]) == (num_items, num_ok)
    assert coverage["num_missing_file"] + coverage["num_missing_url"] == num_items - num_ok
    fetch(no_addresses, tmp_path, None, params, tmp_path / "folder", image_folder=source / "images")
    for kind in ("zip", "tar"):
        list_raw_files(tmp_path, f"images.{kind}")
        fetch(no_addresses, tmp_path, None, params, tmp_path / kind)
    local, *others = (ImageStore(tmp_path / kind) for kind in ("local", "folder", "zip", "tar"))
    images = {number: local.get(number) for number in range(1, num_items + 1)}
    for store in others:
        assert {number: store.get(number) for number in images} == images
    shapes = [pixels(data).shape for data in images.values() if data is not None]
    assert all(shape[0] * shape[1] <= 65_536 and shape[2] == 3 for shape in shapes)


def test_statuses_are_ordered_by_hope() -> None:
    assert sorted(STATUSES, key=lambda name: IMAGE_STATUSES[name].hope)[-3:] == ["http_error", "timeout", "ok"]
    assert len({status.hope for status in IMAGE_STATUSES.values()}) == len(STATUSES)
