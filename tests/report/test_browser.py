"""The page in a real browser: no request, nothing on the console, no sideways scrolling on a phone.

Headless Chromium is driven by its own protocol over two pipes, so nothing has to be installed beside it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sda_core.report import ReportData, render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-extensions",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_SECONDS = 60.0


class Browser:
    """A page of headless Chromium.  ``events`` are all it has told about so far."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs, self._to = os.pipe()
        self._from, back = os.pipe()
        words = (program, *OPTIONS, f"--user-data-dir={profile}", "about:blank")
        self.process = subprocess.Popen(  # the protocol wants descriptors 3 and 4
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "bash", *words],
            pass_fds=(theirs, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self.events: list[dict[str, Any]] = []
        self._pending, self._number, self._session = b"", 0, ""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.events.clear()
        self.do("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        self.value("document.fonts.ready.then(() => 1)")

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, "the browser says nothing"
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        told = json.loads(message)
        if "method" in told:
            self.events.append(told)
        return told

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself and what stands in it left out."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "about:"))]

    def complaints(self) -> list[str]:
        """What stands on the console."""
        shown = [event for event in self.events if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
        shown += [event for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        return [json.dumps(event["params"]) for event in shown]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)})")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_the_eyes_see(browser: Browser, tmp_path: Path) -> None:
    """What the next test looks for is found where it is."""
    path = tmp_path / "page.html"
    path.write_text('<img src="http://127.0.0.1:9/a.png"><script>console.error("so")</script><p style="width:900px">wide</p>')
    browser.open(path)
    assert browser.requests() == ["http://127.0.0.1:9/a.png"]
    assert any('"so"' in complaint for complaint in browser.complaints())
    browser.do("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.value("document.documentElement.scrollWidth") > 390


def test_no_request_no_complaint_no_sideways_scrolling(browser: Browser, page_data: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(render(page_data), encoding="utf-8")
    for scheme, width in (("light", 1280), ("dark", 390)):
        browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.do("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        browser.open(path)
        assert browser.requests() == []
        assert browser.complaints() == []
        assert browser.value("document.documentElement.scrollWidth") <= width
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert browser.value("document.images.length") > 0
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
