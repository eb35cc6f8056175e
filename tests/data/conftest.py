"""A real HTTP server on the loopback interface, with faults that can be switched on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
    def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.01)

    return wait
