"""The site builds without a warning, has every page, and asks no other machine for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.browser import Browser, opened_browser

pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")


PAGES = ["index.html", "results.html", "archive/effect.html", "settings.html", "api/losses.html"]
THEME = ("aria-hidden-focus", "color-contrast", "landmark-unique", "scrollable-region-focusable")
"""What axe-core finds in Material's own parts: hidden switches, colours and buttons of code blocks."""


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with every warning as an error: broken links, pages without a place, objects that are not found."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(repository), "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page(site: Path, repository: Path) -> None:
    expected = {path.relative_to(repository / "docs").with_suffix(".html") for path in (repository / "docs").rglob("*.md")}
    expected |= {Path(f"{name}.html") for name in ("index", "contributing", "changelog", "bench", "pretraining", "nano", "nano2")}
    assert not [path for path in expected if not (site / path).is_file()]
    assert not list(site.rglob("*.py"))


def test_docstrings_are_shown_as_text(site: Path) -> None:
    """The formula of the loss, a signature; no role, no table of equals signs."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")}
    assert "cmsa_many" in pages["losses"]
    assert "num_experts" in pages["adapters"]
    for name, text in pages.items():
        shown = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r":(func|class|mod|meth|attr|data):", shown), name
        assert not re.search(r"^=+ +=+", re.sub(r"<pre.*?</pre>", "", text, flags=re.S), re.M), name


def leaves(content: dict[str, Any], path: str = "params.yaml") -> Iterator[tuple[str, str]]:
    """Section and setting of every value."""
    for name, value in content.items():
        if isinstance(value, dict) and name != "variants":
            yield from leaves(value, name if path == "params.yaml" else f"{path}.{name}")
        else:
            yield path, name


def test_every_setting_is_in_the_reference(site: Path, repository: Path) -> None:
    text = (site / "settings.html").read_text(encoding="utf-8")
    sections = {title.strip() for title in re.findall(r"<h2[^>]*>([^<(]+)", text)}
    settings = list(leaves(YAML(typ="safe", pure=True).load((repository / "params.yaml").read_text(encoding="utf-8"))))
    assert len(settings) > 150
    rows = set(re.findall(r"<td><code>(\w+)</code></td>", text))
    assert not [f"{at}.{name}" for at, name in settings if name not in rows and f"{at}.{name}" not in sections]  # null: a section
    assert not [section for section, _ in settings if section not in sections]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("page", PAGES)
def test_no_page_asks_another_machine(browser: Browser, site: Path, page: str) -> None:
    browser.open(site / page)
    assert browser.requests() == []
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("page", PAGES)
def test_everybody_can_read_it(browser: Browser, site: Path, page: str) -> None:
    """Alternative texts, the order of headings, names of links, headers of tables."""
    browser.open(site / page)
    assert [problem for problem in browser.accessibility_problems() if not problem.startswith(THEME)] == []
