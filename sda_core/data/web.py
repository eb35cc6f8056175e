"""What the downloader and the picture fetcher share about HTTP: the client, when to try again, and how long to wait.

* Asynchronous throughout, because only a deadline around the whole exchange stops a server that drips its headers.
* Proxies come from the environment, as httpx reads them.
* Redirects are followed, to http and https only.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from sda_core import __version__
from sda_core.seed import derive

T = TypeVar("T")

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that may be another one a moment later (RFC 9110 section 15, RFC 6585, RFC 8470)."""

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 120.0
_MAX_REDIRECTS = 8


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also from a notebook, whose thread already has a running loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    else:
        running = True
    if not running:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for the process: reading the certificates takes longer than fetching a picture."""
    return httpx.create_ssl_context()


def new_client(timeout_seconds: float, num_connections: int) -> httpx.AsyncClient:
    """A client that asks for bodies as they are stored, so that lengths, ranges and hashes speak of the file itself."""
    return httpx.AsyncClient(
        verify=_tls(),
        timeout=httpx.Timeout(timeout_seconds, pool=None),  # waiting for one of our own connections is no fault of the server
        limits=httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections),
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        headers={"User-Agent": f"sda/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"},
    )


def backoff(attempt: int, base_seconds: float, url: str) -> float:
    """Seconds to wait before attempt number ``attempt + 1``: exponential with jitter.

    ``base_seconds * 2**attempt``, at most :data:`MAX_BACKOFF_SECONDS`, times a factor in [0.5, 1] that differs between
    addresses and processes, so that many of them do not come back in step.
    """
    factor = 0.5 + 0.5 * derive(os.getpid(), "backoff", url, attempt) / 2**63
    return min(base_seconds * 2.0 ** min(attempt, 32), MAX_BACKOFF_SECONDS) * factor


def retry_after(response: httpx.Response) -> float | None:
    """Seconds a ``Retry-After`` header asks for (RFC 9110 section 10.2.3), bounded; None where it is absent or no sense."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - datetime.now(UTC)).total_seconds()), MAX_RETRY_AFTER_SECONDS)


def content_length(response: httpx.Response) -> int | None:
    """Bytes of the body as announced; None where nothing (or no sense) is, or where chunks count instead."""
    text = response.headers.get("content-length", "")
    if "transfer-encoding" in response.headers or not (text.isascii() and text.isdigit() and len(text) <= 18):
        return None
    return int(text)


def reason(error: BaseException) -> str:
    """A transport error in a few words; some have no text of their own."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
