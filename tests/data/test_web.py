"""Waiting times between attempts, and coroutines from any thread."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.web import (
    MAX_BACKOFF_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    backoff,
    content_length,
    new_client,
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


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1.5", "\u0663", "Wed, 99 Foo 2015"])
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
