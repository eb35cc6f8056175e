"""The downloader against a real server with faults, real processes that are killed, and hostile answers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sda_core.data.download import download
from sda_core.data.folders import folder_lock
from sda_core.data.manifest import check, manifest_file
from sda_core.errors import ArtifactError, DownloadError
from sda_core.params import AmazonDataset, DemoDataset, DownloadParams

ROOT = Path(__file__).resolve().parents[2]
GIFT_CARDS = ROOT / ".." / "shared" / "data" / "amazon_2018_gift_cards"


def packed(num_bytes: int, seed: int = 0) -> bytes:
    """A valid gzip file of about this many bytes."""
    return gzip.compress(np.random.default_rng(seed).bytes(num_bytes), mtime=0)


BODY = packed(300_000)
META = packed(2_000, seed=1)


def settings(**changes: Any) -> DownloadParams:
    values: dict[str, Any] = {"timeout_seconds": 5.0, "num_retries": 3, "backoff_seconds": 0.01, "max_file_bytes": 10_000_000}
    return DownloadParams(**(values | changes))


def amazon(reviews: str | tuple[str, ...], metadata: str | tuple[str, ...], **changes: Any) -> AmazonDataset:
    values: dict[str, Any] = {
        "source": "amazon",
        "edition": 2018,
        "category": "Things",
        "reviews": (reviews,) if isinstance(reviews, str) else reviews,
        "metadata": (metadata,) if isinstance(metadata, str) else metadata,
        "reviews_sha256": None,
        "metadata_sha256": None,
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
    with pytest.raises(DownloadError) as caught:
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
    began = time.monotonic()
    fetch(settings(timeout_seconds=0.4), faults=[server.drip()])
    assert time.monotonic() - began < 5
    assert (tmp_path / "raw" / "r.json.gz").read_bytes() == BODY
    assert any("range" in {name.lower() for name in headers} for _, headers in server.requests)


@pytest.mark.parametrize("fault", ["drip_headers", "silence"])
def test_no_answer_in_time(fetch: Any, server: Any, tmp_path: Path, fault: str) -> None:
    began = time.monotonic()
    fetch(settings(timeout_seconds=0.4), faults=[getattr(server, fault)()])
    assert time.monotonic() - began < 5
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
    assert "an HTML page came instead of the file (it begins '<!DOCTYPE html>" in text


def test_html_page_for_a_plain_file(server: Any, tmp_path: Path) -> None:
    server.put("/m.json", b'{"asin": "1"}\n')
    server.put("/r.json", b"", always=server.html(b"\n <HTML><head>"))
    dataset = amazon(server.url("/r.json"), server.url("/m.json"))
    assert "an HTML page" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_no_gzip(fetch: Any) -> None:
    assert 'is no gzip file (it begins \'{"a": 1}' in refusal(lambda: fetch(body=b'{"a": 1}' * 100))


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
        ("folder.json.gz", "no regular file"),
        ("cut.json.gz", "gzip is truncated"),
        ("text.json.gz", "is no gzip file"),
        ("big.json.gz", "more than download.max_file_bytes"),
        ("nul\0.json.gz", "no base name"),
        ("manifest.json", "no base name"),
        ("x/..", "no base name"),
        (".hidden", "no base name"),
        ("file://elsewhere/r.json.gz", "another host"),
        ("http://127.0.0.1:x/r.json.gz", "InvalidURL"),
        ("http://127.0.0.1/", "no base name"),
        ("http://127.0.0.1/%2e%2e%2fpasswd", "no base name"),
    ],
)
def test_local_sources_that_will_not_do(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "folder.json.gz").mkdir()
    (tmp_path / "cut.json.gz").write_bytes(BODY[:1000])
    (tmp_path / "text.json.gz").write_bytes(b"hello, I am text")
    (tmp_path / "big.json.gz").write_bytes(packed(600_000))
    (tmp_path / "m.json.gz").write_bytes(META)
    dataset = amazon(source, "m.json.gz")
    assert problem in refusal(lambda: download(dataset, settings(max_file_bytes=500_000), tmp_path / "raw", tmp_path))


def test_two_files_of_one_name(tmp_path: Path) -> None:
    dataset = amazon("a/x.json.gz", "b/x.json.gz")
    assert "both named x.json.gz" in refusal(lambda: download(dataset, settings(), tmp_path / "raw", tmp_path))


def test_full_disk(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sda_core.data import transfer

    monkeypatch.setattr(transfer, "_DISK_RESERVE_BYTES", 1 << 60)
    assert "more bytes, and the disk has" in refusal(fetch)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a file, not a folder")
    (tmp_path / "r.json.gz").write_bytes(BODY)
    text = refusal(lambda: download(amazon("r.json.gz", "m.json.gz"), settings(), tmp_path / "raw", tmp_path))
    assert "cannot be written" in text


# ------------------------------------------------------------------------------------------ kept and checked
def test_manifest_problems(fetch: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with pytest.raises(ArtifactError, match="missing"):
        manifest_file(raw, "reviews")
    fetch()
    with pytest.raises(ArtifactError, match="names no images file"):
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
    with pytest.raises(ArtifactError, match=r"no (manifest|valid JSON)"):
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
        from sda_core.data.folders import folder_lock
        with folder_lock(Path({str(tmp_path / "raw")!r})):
            Path({str(tmp_path / "held")!r}).touch()
            time.sleep(60)
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
def killed_download(dataset: AmazonDataset, params: DownloadParams, raw: Path, when: Callable[[], bool], wait_until: Any) -> None:
    """Run a download in a process of its own and kill it when the time has come."""
    code = f"""
        from pathlib import Path
        from sda_core.data.download import download
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


def trickle(server: Any) -> Callable[[Any], None]:
    """Fast enough not to be cut, slow enough to be killed."""

    def fault(handler: Any) -> None:
        code, offset, headers = handler.begin()
        handler.answer(code, b"", headers, len(handler.page.body) - offset)
        for start in range(offset, len(handler.page.body), 10_000):
            handler.wfile.write(handler.page.body[start : start + 10_000])
            handler.wfile.flush()
            server.stopped.wait(0.1)

    return fault


def test_killed_in_the_middle_and_run_again(server: Any, tmp_path: Path, wait_until: Any) -> None:
    dataset = amazon(server.put("/r.json.gz", BODY), server.put("/m.json.gz", META))
    download(dataset, settings(), tmp_path / "undisturbed", tmp_path)
    raw = tmp_path / "raw"
    part = raw / "r.json.gz.part"
    server.pages["/r.json.gz"].faults = [trickle(server), trickle(server)]
    for _ in range(2):
        before = part.stat().st_size if part.exists() else 0
        killed_download(
            dataset, settings(), raw, lambda goal=before: part.exists() and part.stat().st_size > goal + 30_000, wait_until
        )
    assert names(raw) == ["r.json.gz.part", "r.json.gz.part.json"]
    server.requests.clear()
    download(dataset, settings(), raw, tmp_path)
    assert contents(raw) == contents(tmp_path / "undisturbed")
    asked = {name.lower(): value for name, value in server.requests[0][1].items()}
    assert int(asked["range"].removeprefix("bytes=").rstrip("-")) > 60_000


def test_killed_during_the_second_file(server: Any, tmp_path: Path, wait_until: Any) -> None:
    dataset = amazon(server.put("/r.json.gz", META), server.put("/m.json.gz", BODY))
    download(dataset, settings(), tmp_path / "undisturbed", tmp_path)
    raw = tmp_path / "raw"
    server.pages["/m.json.gz"].faults = [trickle(server)]
    killed_download(dataset, settings(), raw, (raw / "m.json.gz.part").exists, wait_until)
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
        text_noise=0.1,
        missing_image_share=0.1,
        missing_metadata_share=0.0,
        quirk_share=0.0,
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
