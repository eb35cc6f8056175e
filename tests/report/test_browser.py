"""The page in a real browser: no request, nothing on the console, no sideways scrolling on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sda_core.report import ReportData, render
from tests.browser import Browser, opened_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(browser: Browser, page_data: ReportData, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "index.html"
    path.write_text(render(page_data), encoding="utf-8")
    browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(path)
    assert browser.accessibility_problems() == []


def test_no_text_of_a_chart_is_cut_off(browser: Browser, page_data: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(render(page_data), encoding="utf-8")
    browser.do("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
    browser.open(path)
    outside = """[...document.querySelectorAll("svg.chart text")].filter(text => {
        const [a, b] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent)"""
    assert browser.value(outside) == []
    browser.value('document.querySelector("svg.chart text").setAttribute("x", "350")')
    assert len(browser.value(outside)) == 1
