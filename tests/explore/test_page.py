"""The page: its script under Streamlit's own harness, and served to a real browser."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from sda_core.cli.explore import command
from sda_core.explore.finished_run import FinishedRun
from tests.browser import Browser, opened_browser

testing = pytest.importorskip("streamlit.testing.v1", reason="the extra explore is not installed")

PAGE = Path(__file__).parents[2] / "sda_core" / "explore" / "page.py"


@pytest.fixture
def page(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, run once."""
    monkeypatch.setattr(sys, "argv", ["page.py", str(shop)])
    # Streamlit makes its page the module __main__; processes that later tests start would run the page first.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return testing.AppTest.from_file(str(PAGE), default_timeout=60).run()


def texts(page: Any) -> list[str]:
    assert not page.exception
    return [element.value for element in page.text if element.value != "no image"]


def test_it_begins_with_the_base_and_the_adapted_variant(page: Any) -> None:
    assert page.multiselect(key="variants").value == ["zero_shot", "sda"]
    assert not page.error
    assert texts(page) == []  # nothing was asked
    assert [info.value for info in page.info] == ["Type a text and press Enter. The nearest items of each variant appear here."]


def test_a_text_finds_items_in_each_variant(page: Any, run: FinishedRun) -> None:
    title = run.items[4].title
    page.text_input(key="text").set_value(title)
    page.slider(key="k").set_value(3).run()
    assert [heading.value for heading in page.header] == ["zero_shot", "sda"]
    shown = texts(page)
    assert len(shown) == 1 + 2 * 3 * 2  # how many are shared; variants, items, title and note
    assert shown[0].endswith("of 3 items are in both lists.")
    num_shared = int(shown[0].split()[0])
    assert sum("in this list only" in text for text in shown) == 2 * (3 - num_shared)
    assert shown.count(title) >= 2
    assert sum(text.startswith("Cosine 1.0000") for text in shown) >= 2


def test_an_item_and_its_nearest(page: Any, run: FinishedRun) -> None:
    page.radio(key="ask").set_value("Pick an item")
    page.slider(key="k").set_value(2).run()
    page.text_input(key="find").set_value(run.items[5].raw_item_id).run()
    assert page.selectbox(key="item").value == 5
    page.radio(key="which").set_value("text").run()
    shown = texts(page)
    assert shown[0] == run.items[5].title
    for number, variant in enumerate(("zero_shot", "sda")):
        expected = [run.items[item].title for item, _ in run.near_item(5, variant, "text", 2)]
        assert shown[3 + 4 * number : 7 + 4 * number : 2] == expected


def test_a_history_and_its_recommendations(page: Any, run: FinishedRun) -> None:
    page.radio(key="ask").set_value("Build a history")
    page.slider(key="k").set_value(4).run()
    page.multiselect(key="history").set_value([6, 2]).run()
    assert page.selectbox(key="recommender").value == "sasrec"
    shown = texts(page)
    for number, variant in enumerate(("zero_shot", "sda")):
        expected = [run.items[item].title for item, _ in run.recommend([6, 2], variant, "sasrec", 4)]
        assert shown[-16 + 8 * number :][:8:2] == expected
    page.text_input(key="find").set_value("no such item").run()
    assert page.multiselect(key="history").value == [6, 2]  # the list narrows, the choice stays


def test_a_variant_that_cannot_answer_says_so_in_its_column(page: Any) -> None:
    page.multiselect(key="variants").set_value(["sda", "random"])
    page.text_input(key="text").set_value("mug").run()
    assert [error.value for error in page.error] == [
        "--variant: no model of this project made the vectors of 'random', so a text cannot be embedded for them; "
        "name zero_shot or a variant with an adapter"
    ]
    assert len(texts(page)) == 2 * 10


# ------------------------------------------------------------------------------------------------- in a real browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(shop: Path) -> Iterator[str]:
    """Where the page is served."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = subprocess.Popen(command(shop, port), stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert served.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        served.kill()
        served.wait()


def test_the_page_works_and_asks_no_other_machine(browser: Browser, address: str, run: FinishedRun) -> None:
    browser.do("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)
    browser.open(address)
    browser.wait_for("!!document.querySelector('input[aria-label=Text]')")
    browser.value("document.querySelector('input[aria-label=Text]').focus()")
    browser.type(run.items[4].title)
    browser.wait_for("document.body.innerText.includes('Cosine 1.0000')", seconds=400)  # both models are loaded first
    browser.wait_for("document.querySelectorAll('[data-testid=stImage] img').length > 4")
    browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert {url.split("/")[2] for url in browser.requests()} == {address.split("/")[2]}
    sockets = [e["params"]["url"] for e in browser.events if e["method"] == "Network.webSocketCreated"]
    assert sockets
    assert all(url.startswith(address.replace("http", "ws")) for url in sockets)
    assert not [complaint for complaint in browser.complaints() if '"error"' in complaint]
    assert "Deploy" not in browser.value("document.body.innerText")
    assert browser.accessibility_problems() == []


def test_no_other_machine_can_open_it(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET) as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", port))
