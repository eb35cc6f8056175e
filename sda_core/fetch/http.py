"""What the downloader and the image fetcher share about HTTP: the client, when to try again, and how long to wait.

* Asynchronous throughout, because only a deadline around the whole exchange stops a server that drips its headers.
* Proxies come from the environment, as httpx reads them.
* Certificate authorities come from the first of ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` (both are used where both are
  set), ``REQUESTS_CA_BUNDLE`` and ``CURL_CA_BUNDLE`` that is set, or else from the certifi package.
  truststore would trust the system's, which a slim container lacks; httpx alone does not know the last two.
* Redirects are followed, to http and https only.
* Retries are counted by the callers.  tenacity and httpx-retries repeat one request; here a whole host waits or is given
  up, a body is resumed, and progress gives back all retries, so they would replace the four lines of :func:`backoff`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from sda_core import __version__
from sda_core.errors import DownloadError
from sda_core.seed import derive

T = TypeVar("T")

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that may be another one a moment later (RFC 9110 section 15, RFC 6585, RFC 8470)."""

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 120.0
_MAX_REDIRECTS = 8
_MAX_PORT = 65_535
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})  # X509_V_ERR_*: self-signed, or no known issuer


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also from a notebook, whose thread already has a running loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, coroutine).result()
    return asyncio.run(coroutine)


# ------------------------------------------------------------------------------------------------- client
def _authorities() -> tuple[str, str, str]:
    """Which variables say whom to trust, and the file and the folder they name; "" where there is none."""
    file, folder = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    if file or folder:
        return " and ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), file, folder
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if place := os.environ.get(name, ""):
            return (name, "", place) if Path(place).is_dir() else (name, place, "")
    return "", "", ""


@functools.cache
def _tls(variables: str, file: str, folder: str) -> ssl.SSLContext:
    """One for the process: reading the certificates takes longer than fetching an image."""
    if not variables:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except OSError as error:  # ssl.SSLError is one
        raise DownloadError(
            f"environment: {variables}",
            f"cannot be used as certificate authorities ({file or folder}: {reason(error)})",
            "name a PEM file with the certificates to trust, or unset the variable",
        ) from None


def new_client(timeout_seconds: float, num_connections: int) -> httpx.AsyncClient:
    """A client that asks for bodies as they are stored, so that lengths, ranges and hashes speak of the file itself.

    Raises:
        DownloadError: the environment's proxies or certificate authorities cannot be used.
    """
    verify = _tls(*_authorities())
    try:
        return httpx.AsyncClient(
            verify=verify,
            # waiting for one of our own connections is no fault of the server
            timeout=httpx.Timeout(timeout_seconds, pool=None),
            limits=httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections),
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            headers={"User-Agent": f"sda/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"},
        )
    except (httpx.InvalidURL, ValueError):  # without their text, which can hold a piece of a password
        problem, advice = "one of them is not a usable address", "a proxy is given as http://host:port"
    except ImportError:
        problem, advice = "a SOCKS proxy needs the package socksio", "run `pip install 'httpx[socks]'`, or use an HTTP proxy"
    names = [name for name in _PROXY_VARIABLES for name in (name, name.lower()) if os.environ.get(name)]
    raise DownloadError(f"environment: {', '.join(names)}", problem, advice)


async def open_stream(client: httpx.AsyncClient, url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """GET an address; the body is still to be read, and to be closed, by the caller.

    Redirects are followed here, because httpx reads the body of each into memory, however long it is.

    Raises:
        httpx.InvalidURL: the address, or one that it leads to, cannot be asked.
        httpx.HTTPError: as ``client.send``.
    """
    try:
        request = client.build_request("GET", url, headers=headers)
        for _ in range(_MAX_REDIRECTS + 1):
            if (request.url.port or 0) > _MAX_PORT:
                raise httpx.InvalidURL(f"there is no port {request.url.port}")
            response = await client.send(request, stream=True, follow_redirects=False)
            if response.next_request is None:
                return response
            await response.aclose()
            request = response.next_request
    except UnicodeError as error:  # a host name that cannot be encoded
        raise httpx.InvalidURL(reason(error)) from None
    raise httpx.TooManyRedirects(f"more than {_MAX_REDIRECTS} redirects", request=request)


@dataclass(eq=False)
class AttemptError(Exception):
    """A request failed, or what it brought cannot be used.

    Attributes:
        problem: what happened.
        kind: an address or a certificate fails in the same way in every attempt; the others may not.
        code: the status of the answer, if there was one.
        wait_seconds: how long to wait before the next attempt, where something else than :func:`backoff` says so.
    """

    problem: str
    kind: Literal["address", "certificate", "timeout", "other"] = "other"
    code: int | None = None
    wait_seconds: float | None = None

    def __str__(self) -> str:
        return self.problem

    @property
    def is_final(self) -> bool:
        """Whether another attempt is of no use."""
        return self.kind in ("address", "certificate")


@asynccontextmanager
async def exchange(
    client: httpx.AsyncClient, url: str, timeout_seconds: float, headers: dict[str, str] | None = None, whole: bool = True
) -> AsyncGenerator[httpx.Response]:
    """GET an address; the block reads the body.

    Args:
        client: as :func:`new_client` makes it.
        url: the address.
        timeout_seconds: bound on the time until the answer begins, or until the block ends.
        headers: of the request.
        whole: whether the bound holds for the block, too.

    Raises:
        AttemptError: the request or the block failed, or the answer is one of :data:`RETRIED_STATUSES`.
    """
    try:
        async with (
            asyncio.timeout(timeout_seconds) as deadline,
            aclosing(await open_stream(client, url, headers)) as response,
        ):
            if response.status_code in RETRIED_STATUSES:
                raise AttemptError(status_line(response), code=response.status_code, wait_seconds=retry_after(response))
            if not whole:
                deadline.reschedule(None)
            yield response
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise AttemptError(reason(error), "address") from None
    except (httpx.TimeoutException, TimeoutError):
        raise AttemptError(f"no answer for {timeout_seconds:g} s", "timeout") from None
    except (httpx.TransportError, ssl.SSLError) as error:  # the latter where a stream is garbled midway
        untrusted = certificate_problem(error)
        raise AttemptError(untrusted or reason(error), "certificate" if untrusted else "other") from None


def certificate_problem(error: BaseException) -> str | None:
    """Why a server's certificate was not accepted, and what to do; None where that was not the failure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    text = f"its certificate is not accepted ({cause.verify_message})"
    if cause.verify_code not in _UNKNOWN_ISSUER:
        return text
    variables, file, folder = _authorities()
    trusted = f"{variables}: {', '.join(filter(None, (file, folder)))}" if variables else "the certifi package"
    return f"{text}; trusted are the authorities of {trusted}; if yours is another one, name its PEM file in SSL_CERT_FILE"


# ------------------------------------------------------------------------------------------------ waiting
def backoff(attempt: int, base_seconds: float, url: str, asked_seconds: float | None = None) -> float:
    """Seconds to wait before attempt number ``attempt + 1``: as asked by the server, else exponential with jitter.

    ``base_seconds * 2**attempt``, at most :data:`MAX_BACKOFF_SECONDS`, times a factor in [0.5, 1] that differs between
    addresses and processes, so that many of them do not come back in step.
    """
    if asked_seconds is not None:
        return asked_seconds
    factor = 0.5 + 0.5 * derive(os.getpid(), "backoff", url, attempt) / 2**63
    return min(base_seconds * 2.0 ** min(attempt, 32), MAX_BACKOFF_SECONDS) * factor


def retry_after(response: httpx.Response) -> float | None:
    """Seconds a ``Retry-After`` header asks for (RFC 9110 section 10.2.3), bounded; None where it is absent or no sense."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - datetime.now(UTC)).total_seconds()), MAX_RETRY_AFTER_SECONDS)


def content_length(response: httpx.Response) -> int | None:
    """Bytes of the body as announced; None where nothing (or no sense) is, or where chunks count instead."""
    text = response.headers.get("content-length", "")
    if "transfer-encoding" in response.headers or not (text.isascii() and text.isdigit() and len(text) <= 18):
        return None
    return int(text)


def status_line(response: httpx.Response) -> str:
    """The status of an answer, for messages."""
    return f"HTTP {response.status_code} {response.reason_phrase[:80]}".rstrip()


def reason(error: BaseException) -> str:
    """A transport error in a few words; some have no text of their own."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
