"""Headless Chromium, driven by its own protocol over two pipes, so nothing has to be installed beside it."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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

    def open(self, page: Path | str) -> None:
        """Load a file, or an address, and wait until it is there."""
        self.events.clear()
        self.do("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        self.value("document.fonts.ready.then(() => 1)")

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}; the page says {self.value('document.body.innerText')!r}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        """Type into what has the focus, and press Enter."""
        self.do("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def screenshot(self, path: Path) -> None:
        """Write what is visible as a PNG file."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    def accessibility_problems(self) -> list[str]:
        """What axe-core finds wrong with the page, with the first element of each kind; skips the test without axe-core."""
        files = importlib.util.find_spec("axe_core_python")
        if files is None or files.origin is None:
            pytest.skip("axe-core-python of the extra dev is not installed")
        self.value((Path(files.origin).parent / "axe.min.js").read_text(encoding="utf-8") + ";1")
        found = json.loads(self.value("axe.run({resultTypes: ['violations']}).then(r => JSON.stringify(r.violations))"))
        return [f"{each['id']} ({each['impact']}): {each['help']}: {each['nodes'][0]['html'][:200]}" for each in found]

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


@contextmanager
def opened_browser(profile: Path) -> Iterator[Browser]:
    """A browser for the tests of a module; they are skipped where there is no Chromium."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)})")
    browser = Browser(program, profile)
    try:
        yield browser
    finally:
        browser.close()
