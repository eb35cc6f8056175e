"""A real HTTP server on the loopback interface, with faults that can be switched on."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import pytest


@dataclass
class Page:
    """What stands at one path.  ``faults`` are used up, one a request; then ``always``, if set; then plain service."""

    body: bytes
    etag: str | None = '"v1"'
    last_modified: str | None = None
    content_type: str = "application/octet-stream"
    ranges: bool = True
    announce_length: bool = True
    delay_seconds: float = 0.0
    faults: list[Callable[[Handler], None]] = field(default_factory=list)
    always: Callable[[Handler], None] | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shop: FaultyServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        shop = self.shop
        with shop.lock:
            shop.requests.append((self.path, dict(self.headers.items())))
            shop.in_flight += 1
            shop.most_in_flight = max(shop.most_in_flight, shop.in_flight)
            page = shop.pages.get(self.path)
            fault = None if page is None else page.faults.pop(0) if page.faults else page.always
        try:
            if page is None:
                self.answer(404, b"<html>nothing here</html>", {"Content-Type": "text/html"})
                return
            shop.stopped.wait(page.delay_seconds)
            if fault is not None:
                fault(self)
            else:
                self.plain()
        except OSError:
            self.close_connection = True
        finally:
            with shop.lock:
                shop.in_flight -= 1

    @property
    def page(self) -> Page:
        return self.shop.pages[self.path]

    def answer(self, code: int, body: bytes, headers: dict[str, str], length: int | None = -1) -> None:
        """Send headers and body; ``length`` None announces none and closes at the end."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def headers_of(self, page: Page) -> dict[str, str]:
        headers = {"Content-Type": page.content_type}
        if page.etag:
            headers["ETag"] = page.etag
        if page.last_modified:
            headers["Last-Modified"] = page.last_modified
        return headers

    def begin(self) -> tuple[int, int, dict[str, str]]:
        """Status, offset and headers of the answer that is due: RFC 9110's rules of Range and If-Range."""
        page, headers = self.page, self.headers_of(self.page)
        wanted = self.headers.get("Range")
        if not wanted or not page.ranges or self.headers.get("If-Range", page.etag) not in (page.etag, page.last_modified):
            return 200, 0, headers
        offset = int(wanted.removeprefix("bytes=").rstrip("-"))
        if offset >= len(page.body):
            return 416, 0, headers | {"Content-Range": f"bytes */{len(page.body)}"}
        return 206, offset, headers | {"Content-Range": f"bytes {offset}-{len(page.body) - 1}/{len(page.body)}"}

    def plain(self) -> None:
        code, offset, headers = self.begin()
        body = b"" if code == 416 else self.page.body[offset:]
        self.answer(code, body, headers, -1 if self.page.announce_length else None)

    def hang_up(self) -> None:
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


class FaultyServer(ThreadingHTTPServer):
    """Pages by path, and a record of what was asked."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.in_flight = 0
        self.most_in_flight = 0
        super().__init__(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"shop": self}))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""

    def put(self, path: str, body: bytes, **settings: object) -> str:
        self.pages[path] = Page(body, **settings)  # type: ignore[arg-type]
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def count(self) -> Counter[str]:
        return Counter(path for path, _ in self.requests)

    # ------------------------------------------------------------------------------------------- faults
    @staticmethod
    def drop(num_bytes: int) -> Callable[[Handler], None]:
        """Announce all of it, send the first bytes, hang up."""

        def fault(handler: Handler) -> None:
            code, offset, headers = handler.begin()
            rest = handler.page.body[offset:]
            handler.answer(code, rest[:num_bytes], headers, len(rest))
            handler.hang_up()

        return fault

    @staticmethod
    def status(code: int, **headers: str) -> Callable[[Handler], None]:
        return lambda handler: handler.answer(code, b"no", {name.replace("_", "-"): value for name, value in headers.items()})

    @staticmethod
    def html(text: bytes = b"<!DOCTYPE html><html><body>Sorry, try later</body></html>") -> Callable[[Handler], None]:
        return lambda handler: handler.answer(200, text, {"Content-Type": "text/html; charset=utf-8"})

    @staticmethod
    def announce(length: int) -> Callable[[Handler], None]:
        """Announce another length than what is sent, then hang up."""

        def fault(handler: Handler) -> None:
            handler.answer(200, handler.page.body, handler.headers_of(handler.page), length)
            handler.hang_up()

        return fault

    def drip(self, seconds: float = 0.02) -> Callable[[Handler], None]:
        """Send a byte at a time, for ever as far as a client can tell."""

        def fault(handler: Handler) -> None:
            code, offset, headers = handler.begin()
            handler.answer(code, b"", headers, len(handler.page.body) - offset)
            for byte in handler.page.body[offset:]:
                handler.wfile.write(bytes([byte]))
                if self.stopped.wait(seconds):
                    return

        return fault

    def drip_headers(self) -> Callable[[Handler], None]:
        def fault(handler: Handler) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not self.stopped.wait(0.02):
                handler.wfile.write(b"x")

        return fault

    def silence(self) -> Callable[[Handler], None]:
        return lambda handler: (self.stopped.wait(), handler.hang_up())[1]

    def endless(self, first: bytes = b"") -> Callable[[Handler], None]:
        """A chunked body without an end."""

        def fault(handler: Handler) -> None:
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            chunk = first + bytes(65_536 - len(first))
            while not self.stopped.is_set():
                handler.wfile.write(b"10000\r\n" + chunk + b"\r\n")

        return fault

    @staticmethod
    def replace(body: bytes, etag: str) -> Callable[[Handler], None]:
        """The file changes between two requests."""

        def fault(handler: Handler) -> None:
            handler.page.body, handler.page.etag = body, etag
            handler.plain()

        return fault

    @staticmethod
    def endless_redirect(location: str) -> Callable[[Handler], None]:
        """A redirect whose body has no end that a client should wait for."""

        def fault(handler: Handler) -> None:
            handler.send_response(302)
            handler.send_header("Location", location)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            chunk = bytes(65_536)
            for _ in range(1000):
                handler.wfile.write(b"10000\r\n" + chunk + b"\r\n")
            handler.hang_up()

        return fault

    def block(self, num_bytes: int) -> Callable[[Handler], None]:
        """Send the first bytes of what is due, then nothing more, with the connection open."""

        def fault(handler: Handler) -> None:
            code, offset, headers = handler.begin()
            rest = handler.page.body[offset:]
            handler.answer(code, rest[:num_bytes], headers, len(rest))
            handler.wfile.flush()
            self.stopped.wait()

        return fault


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shop = FaultyServer()
    thread = threading.Thread(target=shop.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield shop
    shop.stopped.set()
    shop.shutdown()
    shop.server_close()
    thread.join()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool], seconds: float = 600.0) -> None:  # a busy machine is slow, and that is no fault
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.01)

    return wait


# ------------------------------------------------------------------------------------------ TLS and proxies
@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own, and what a server needs that it vouches for."""

    certificate: Path
    server_chain: Path


def make_authority(folder: Path) -> Authority:
    """An authority, and a certificate of it for 127.0.0.1 and shop.test."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key_ids = {key: x509.SubjectKeyIdentifier.from_public_key(key.public_key()) for key in (authority_key, server_key)}

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("our authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(key_ids[key], critical=False)
        )

    others = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment"]
    others += ["key_agreement", "encipher_only", "decipher_only"]
    usage = x509.KeyUsage(**dict.fromkeys(others, False), key_cert_sign=True, crl_sign=True)
    authority = (
        builder("our authority", authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = [x509.DNSName("shop.test"), x509.IPAddress(ip_address("127.0.0.1"))]
    certificate = (
        builder("shop.test", server_key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_ids[authority_key]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "authority.pem").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(key + certificate.public_bytes(pem))
    return Authority(folder / "authority.pem", folder / "server.pem")


class TLSServer(FaultyServer):
    """The same pages, over TLS."""

    def __init__(self, authority: Authority) -> None:
        super().__init__()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.server_chain)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def url(self, path: str) -> str:
        return super().url(path).replace("http://", "https://", 1)


class ProxyHandler(BaseHTTPRequestHandler):
    """Forwards to 127.0.0.1 whatever host is asked for, so that only what came this way can arrive at all."""

    proxy: Proxy

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.proxy.seen.append(f"GET {parts.netloc}{parts.path}")
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", parts.port)) as connection:
            connection.request("GET", parts.path, headers=headers | {"Connection": "close"})
            with connection.getresponse() as answer:
                body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        self.proxy.seen.append(f"CONNECT {self.path}")
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            self.pump(upstream)
        self.close_connection = True

    def pump(self, upstream: socket.socket) -> None:
        num_bytes = 0
        while True:
            for end in select.select([self.connection, upstream], [], [])[0]:
                try:
                    data = end.recv(65_536)
                except OSError:
                    data = b""
                if not data:
                    return
                if end is upstream:
                    num_bytes += len(data)
                    if self.proxy.garble_after is not None and num_bytes > self.proxy.garble_after:
                        data, self.proxy.garble_after = bytes(len(data)), None
                (self.connection if end is upstream else upstream).sendall(data)


class Proxy(ThreadingHTTPServer):
    """A proxy for http and, by CONNECT, https; keeps a list of what went through it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.garble_after: int | None = None  # bytes of a tunnel after which one piece of it is spoilt, once
        super().__init__(("127.0.0.1", 0), type("BoundProxyHandler", (ProxyHandler,), {"proxy": self}))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        if isinstance(server, FaultyServer):
            server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    pytest.importorskip("cryptography")
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no certificate authorities from outside."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tls_server(authority: Authority, bare_environment: None) -> Iterator[TLSServer]:
    shop = TLSServer(authority)
    with serving(shop):
        yield shop


@pytest.fixture
def proxy(bare_environment: None) -> Iterator[Proxy]:
    server = Proxy()
    with serving(server):
        yield server
