"""Waiting times between attempts, and coroutines from any thread."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.errors import DownloadError
from sda_core.fetch.http import (
    MAX_BACKOFF_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    AttemptError,
    backoff,
    certificate_problem,
    content_length,
    exchange,
    new_client,
    open_stream,
    reason,
    retry_after,
    run,
)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.0, 100.0), st.text(max_size=20))
def test_backoff_is_bounded(attempt: int, base_seconds: float, url: str) -> None:
    seconds = backoff(attempt, base_seconds, url)
    full = min(base_seconds * 2.0 ** min(attempt, 32), MAX_BACKOFF_SECONDS)
    assert 0.5 * full <= seconds <= full


def test_backoff_grows_and_differs_between_addresses() -> None:
    assert [backoff(attempt, 1.0, "a") >= 2**attempt / 2 for attempt in range(6)] == [True] * 6
    assert len({backoff(0, 1.0, str(number)) for number in range(20)}) == 20


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7.0, 7.0),
        (" 0 ", 0.0, 0.0),
        ("999999999999999999999", MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),
    ],
)
def test_retry_after(text: str, low: float, high: float) -> None:
    seconds = retry_after(httpx.Response(503, headers={"Retry-After": text}))
    assert seconds is not None
    assert low <= seconds <= high


def test_retry_after_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=60)
    for text in (format_datetime(later), format_datetime(later.replace(tzinfo=None))):
        seconds = retry_after(httpx.Response(503, headers={"Retry-After": text}))
        assert seconds is not None
        assert 20.0 <= seconds <= 60.0
    far = format_datetime(datetime.now(UTC) + timedelta(days=60))
    assert retry_after(httpx.Response(503, headers={"Retry-After": far})) == MAX_RETRY_AFTER_SECONDS


HUGE_DATES = ["Wed, 21 Oct 99999999999999999999 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 +99999999999999"]


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1.5", "\u0663", "Wed, 99 Foo 2015", *HUGE_DATES])
def test_retry_after_without_sense(text: str | None) -> None:
    assert retry_after(httpx.Response(503, headers={} if text is None else {"Retry-After": text.encode()})) is None


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ({"Content-Length": "12"}, 12),
        ({}, None),
        ({"Content-Length": "-1"}, None),
        ({"Content-Length": "9" * 5000}, None),
        ({"Content-Length": "12", "Transfer-Encoding": "chunked"}, None),
    ],
)
def test_content_length(headers: dict[str, str], length: int | None) -> None:
    assert content_length(httpx.Response(200, headers=headers)) == length


async def _double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_run_with_and_without_a_running_loop() -> None:
    async def notebook() -> int:
        return run(_double(4))

    assert run(_double(4)) == asyncio.run(notebook()) == 8


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    async def ask() -> None:
        async with new_client(2.0, 1) as client:
            await client.get("http://127.0.0.1:1/x")

    with pytest.raises(httpx.ConnectError) as caught:
        run(ask())
    assert reason(caught.value).startswith("ConnectError")


def test_reason_without_text() -> None:
    assert reason(httpx.ReadTimeout("")) == "ReadTimeout"
    assert reason(ValueError("two\n lines")) == "ValueError: two lines"


# ------------------------------------------------------------------------------------------ what is opened
def get(url: str) -> tuple[int, bytes]:
    """Status and body of an address, as the downloader asks for it."""

    async def ask() -> tuple[int, bytes]:
        async with new_client(2.0, 1) as client:
            response = await open_stream(client, url)
            body = await response.aread()
            await response.aclose()
            return response.status_code, body

    return run(ask())


def failure(url: str, timeout_seconds: float = 60.0, whole: bool = True, pause_seconds: float = 0.0) -> AttemptError | None:
    """Why an exchange failed whose block waits before it reads the body; None where it did not."""

    async def ask() -> None:
        async with new_client(60.0, 1) as client, exchange(client, url, timeout_seconds, whole=whole) as response:
            await asyncio.sleep(pause_seconds)
            await response.aread()

    try:
        run(ask())
    except AttemptError as error:
        return error
    return None


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_an_answer_that_may_be_another_one_later(server: Any, code: int) -> None:
    error = failure(server.put("/x", b"", always=server.status(code, Retry_After="7")))
    assert error is not None
    assert (error.code, error.wait_seconds, error.kind, error.is_final) == (code, 7.0, "other", False)
    assert str(error).startswith(f"HTTP {code}")
    assert backoff(3, 1.0, "x", error.wait_seconds) == 7.0


def test_what_a_failed_exchange_says(server: Any, tls_server: Any) -> None:
    assert failure(server.put("/good", b"x")) is None
    assert failure(server.url("/none")) is None, "that answer stays"
    found = {
        "address": failure("http://127.0.0.1:99999/x"),
        "certificate": failure(tls_server.put("/x", b"x")),
        "timeout": failure(server.put("/late", b"x", always=server.silence()), timeout_seconds=0.2),
        "other": failure(server.put("/cut", bytes(9), always=server.drop(1))),
    }
    assert [error.kind if error else None for error in found.values()] == list(found)
    assert [error.is_final if error else None for error in found.values()] == [True, True, False, False]


@pytest.mark.slow
def test_the_bound_on_time_holds_for_the_block_or_for_the_answer_alone(server: Any) -> None:
    url = server.put("/x", b"x")
    error = failure(url, timeout_seconds=0.5, pause_seconds=60.0)
    assert error is not None
    assert error.kind == "timeout"
    assert failure(url, timeout_seconds=5.0, whole=False, pause_seconds=5.5) is None


def test_redirects_are_followed_and_their_bodies_left(server: Any) -> None:
    server.put("/end", b"here")
    url = server.put("/begin", b"", always=server.endless_redirect("/middle"))
    server.put("/middle", b"", always=server.status(307, Location=server.url("/end")))
    assert get(url) == (200, b"here")


def test_redirects_without_end(server: Any) -> None:
    url = server.put("/r", b"", always=server.status(302, Location="/r"))
    with pytest.raises(httpx.TooManyRedirects):
        get(url)
    assert server.count()["/r"] == 9


@pytest.mark.parametrize("place", ["http://xn--/x", "http://127.0.0.1:99999/x"])
def test_addresses_that_cannot_be_asked(server: Any, place: str) -> None:
    with pytest.raises(httpx.InvalidURL):
        get(place)
    with pytest.raises(httpx.InvalidURL):
        get(server.put("/r", b"", always=server.status(302, Location=place)))


# ------------------------------------------------------------------------------------------------- proxies
def test_a_real_proxy_for_http(server: Any, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    url = server.put("/x", b"pages")
    assert get(url.replace("127.0.0.1", "shop.test")) == (200, b"pages")
    assert [line.split(":")[0] for line in proxy.seen] == ["GET shop.test"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert get(url) == (200, b"pages")
    assert len(proxy.seen) == 1, "NO_PROXY"


def test_a_real_proxy_for_https(tls_server: Any, proxy: Any, authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    url = tls_server.put("/x", b"pages")
    assert get(url.replace("127.0.0.1", "shop.test")) == (200, b"pages")
    assert [line.split(":")[0] for line in proxy.seen] == ["CONNECT shop.test"]
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    assert get(url) == (200, b"pages")
    assert len(proxy.seen) == 1, "NO_PROXY"


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("HTTP_PROXY", "ftp://me:hunter2@127.0.0.1:3128", "http://host:port"),
        ("HTTPS_PROXY", "http://me:hunter2/@127.0.0.1:x", "http://host:port"),
        ("NO_PROXY", "[::1]", "http://host:port"),
    ],
)
def test_proxies_that_cannot_be_used(
    bare_environment: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DownloadError, match=f"^environment: {name}: ") as caught:
        new_client(1.0, 1)
    assert advice in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_socks_without_its_package(bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"^environment: all_proxy: .*socksio"):
        new_client(1.0, 1)


# -------------------------------------------------------------------------------------------- certificates
@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_an_authority_of_ones_own(tls_server: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    url = tls_server.put("/x", b"pages")
    with pytest.raises(httpx.ConnectError) as caught:
        get(url)
    text = certificate_problem(caught.value)
    assert text is not None
    assert "certifi" in text
    assert "SSL_CERT_FILE" in text
    monkeypatch.setenv(name, str(authority.certificate))
    assert get(url) == (200, b"pages")


@pytest.mark.parametrize("name", ["SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_a_folder_of_authorities(
    tls_server: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    url = tls_server.put("/x", b"pages")
    shutil.copy(authority.certificate, tmp_path / f"{subject_hash(authority.certificate)}.0")
    monkeypatch.setenv(name, str(tmp_path))
    assert get(url) == (200, b"pages")


def subject_hash(certificate: Path) -> str:
    """The name under which OpenSSL looks for an authority: SHA-1 of its canonical subject, first four bytes reversed."""
    from cryptography import x509

    (attribute,) = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
    value = str(attribute.value).lower().encode()
    oid = bytes.fromhex("0603550403")  # common name
    pair = oid + b"\x0c" + bytes([len(value)]) + value
    sequence = b"\x30" + bytes([len(pair)]) + pair
    digest = hashlib.sha1(b"\x31" + bytes([len(sequence)]) + sequence).digest()
    return digest[3::-1].hex()


def test_another_authority_than_the_one_that_is_trusted(
    tls_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Any
) -> None:
    other = Path(httpx.__file__).parent  # any folder without certificates
    monkeypatch.setenv("SSL_CERT_DIR", str(other))
    with pytest.raises(httpx.ConnectError) as caught:
        get(tls_server.put("/x", b"pages"))
    assert f"SSL_CERT_DIR: {other}" in str(certificate_problem(caught.value))


def test_a_certificate_of_another_host(tls_server: Any, authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    with pytest.raises(httpx.ConnectError) as caught:
        get(tls_server.put("/x", b"pages").replace("127.0.0.1", "localhost"))
    text = str(certificate_problem(caught.value))
    assert "localhost" in text
    assert "SSL_CERT_FILE" not in text, "another authority would not help"


@pytest.mark.parametrize("contents", [None, b"", b"no certificate"])
def test_authorities_that_cannot_be_used(
    bare_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, contents: bytes | None
) -> None:
    if contents is not None:
        (tmp_path / "ca.pem").write_bytes(contents)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(DownloadError, match=r"^environment: SSL_CERT_FILE: .*ca\.pem") as caught:
        new_client(1.0, 1)
    assert "\n" not in str(caught.value)


def test_other_failures_are_no_certificate_problem() -> None:
    assert certificate_problem(httpx.ConnectError("refused")) is None
    assert certificate_problem(ssl.SSLError(1, "bad record")) is None
