"""HTTP for the downloader and the image fetcher: the client, conditions for retries, and waiting times.

* All functions are asynchronous, because only a deadline for the whole exchange stops a server that sends headers slowly.
* Proxies are read from the environment by httpx.
* Certificate authorities are taken from the first of these that is set: ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` (both are used
  if both are set), ``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``; else from the certifi package.  truststore would use the
  system's, which a slim container lacks; httpx alone does not support the last two variables.
* Redirects are followed, to http and https only.
* Callers count retries.  tenacity and httpx-retries repeat one request; here a whole host waits or is given up, a body is
  resumed, and progress resets the number of retries, so they would only replace the four lines of :func:`backoff`.
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
"""Transient status codes (RFC 9110 section 15, RFC 6585, RFC 8470)."""

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 120.0
_MAX_REDIRECTS = 8
_MAX_PORT = 65_535
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})  # X509_V_ERR_*: self-signed, or unknown issuer


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also in a notebook, whose thread already has a running loop."""
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
    """The names of the variables with certificate authorities, and the file and folder in them; "" for a missing one."""
    file, folder = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    if file or folder:
        return " and ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), file, folder
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if place := os.environ.get(name, ""):
            return (name, "", place) if Path(place).is_dir() else (name, place, "")
    return "", "", ""


@functools.cache
def _tls(variables: str, file: str, folder: str) -> ssl.SSLContext:
    """The TLS context, one per process, because reading the certificates takes longer than fetching an image."""
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
    """A client that requests bodies without compression, so that lengths, ranges and hashes are those of the file.

    Raises:
        DownloadError: the environment's proxies or certificate authorities cannot be used.
    """
    verify = _tls(*_authorities())
    try:
        return httpx.AsyncClient(
            verify=verify,
            # waiting for a free connection of our own pool is not a failure of the server
            timeout=httpx.Timeout(timeout_seconds, pool=None),
            limits=httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections),
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            headers={"User-Agent": f"sda/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"},
        )
    except (httpx.InvalidURL, ValueError):  # without their text, which may contain part of a password
        problem, advice = "one of them is not a usable address", "a proxy is given as http://host:port"
    except ImportError:
        problem, advice = "a SOCKS proxy needs the package socksio", "run `pip install 'httpx[socks]'`, or use an HTTP proxy"
    names = [name for name in _PROXY_VARIABLES for name in (name, name.lower()) if os.environ.get(name)]
    raise DownloadError(f"environment: {', '.join(names)}", problem, advice)


async def open_stream(client: httpx.AsyncClient, url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """GET an address; the caller reads and closes the body.

    Redirects are followed here, because httpx reads the body of each into memory, regardless of its length.

    Raises:
        httpx.InvalidURL: the address, or one that it redirects to, is invalid.
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
    """A request failed, or its response cannot be used.

    Attributes:
        problem: description of the failure.
        kind: kind of the failure; an address or a certificate fails in every attempt, the others may be transient.
        code: the status code of the response, if there was one.
        wait_seconds: waiting time before the next attempt, if it is not that of :func:`backoff`.
    """

    problem: str
    kind: Literal["address", "certificate", "timeout", "other"] = "other"
    code: int | None = None
    wait_seconds: float | None = None

    def __str__(self) -> str:
        return self.problem

    @property
    def is_final(self) -> bool:
        """Whether another attempt would fail, too."""
        return self.kind in ("address", "certificate")


@asynccontextmanager
async def exchange(
    client: httpx.AsyncClient, url: str, timeout_seconds: float, headers: dict[str, str] | None = None, whole: bool = True
) -> AsyncGenerator[httpx.Response]:
    """GET an address; the block reads the body.

    Args:
        client: a client made by :func:`new_client`.
        url: the address.
        timeout_seconds: maximum time until the response begins, or until the block ends.
        headers: headers of the request.
        whole: whether the timeout includes the block.

    Raises:
        AttemptError: the request or the block failed, or the status is in :data:`RETRIED_STATUSES`.
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
    except (httpx.TransportError, ssl.SSLError) as error:  # the latter if a stream is corrupted
        untrusted = certificate_problem(error)
        raise AttemptError(untrusted or reason(error), "certificate" if untrusted else "other") from None


def certificate_problem(error: BaseException) -> str | None:
    """The reason why a server's certificate was rejected, and the remedy; None for another failure."""
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
    """Seconds to wait before attempt number ``attempt + 1``: as requested by the server, else exponential with jitter.

    ``base_seconds * 2**attempt``, at most :data:`MAX_BACKOFF_SECONDS`, times a factor in [0.5, 1] that differs between
    addresses and processes, so that they do not retry at the same time.
    """
    if asked_seconds is not None:
        return asked_seconds
    factor = 0.5 + 0.5 * derive(os.getpid(), "backoff", url, attempt) / 2**63
    return min(base_seconds * 2.0 ** min(attempt, 32), MAX_BACKOFF_SECONDS) * factor


def retry_after(response: httpx.Response) -> float | None:
    """Seconds requested by a ``Retry-After`` header (RFC 9110 section 10.2.3), bounded; None if missing or invalid."""
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
    """The announced number of bytes of the body; None if missing, invalid, or if the body is chunked."""
    text = response.headers.get("content-length", "")
    if "transfer-encoding" in response.headers or not (text.isascii() and text.isdigit() and len(text) <= 18):
        return None
    return int(text)


def status_line(response: httpx.Response) -> str:
    """The status of a response, for messages."""
    return f"HTTP {response.status_code} {response.reason_phrase[:80]}".rstrip()


def reason(error: BaseException) -> str:
    """A short description of a transport error, also of one without text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
