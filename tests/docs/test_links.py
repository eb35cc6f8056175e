"""No link of a document is broken: relative paths exist, and anchors are headings of the file they lead to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.conftest import DOCUMENTS, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs make of a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain.replace("`", "")).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {anchor(line.lstrip("#")) for _, line in prose(path.read_text(encoding="utf-8")) if re.match(r"#+ ", line)}


def broken(path: Path, text: str) -> list[str]:
    found = []
    for number, line in prose(text):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            name, _, fragment = target.partition("#")
            if "://" in name or name.startswith("mailto:"):
                continue
            file = path if not name else path.parent / name
            if not file.exists():
                found.append(f"{path}:{number}: {target} does not exist")
            elif fragment and fragment not in anchors(file):
                found.append(f"{path}:{number}: {file.name} has no heading {fragment}")
    return found


def test_no_link_is_broken(document: Path) -> None:
    assert not broken(document, document.read_text(encoding="utf-8"))


def test_the_check_finds_them(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One, `two`: three's\n", encoding="utf-8")
    lines = ["[a](a.md) [b](a.md#one-two-threes) [c](https://example.invalid/x) `[code](none.md)`", "[d](none.md)"]
    text = "\n".join([*lines, "[e](a.md#four)", "[f](#x)"])
    assert [line.rpartition(": ")[2] for line in broken(page, text)] == [
        "none.md does not exist",
        "a.md has no heading four",
        "a.md has no heading x",
    ]


def test_the_documents_link_to_each_other() -> None:
    assert len(DOCUMENTS) > 15
    assert sum(len(LINK.findall(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 80


@pytest.mark.parametrize(
    ("heading", "expected"),
    [("Does it depend on the backbone's family?", "does-it-depend-on-the-backbones-family"), ("A `b` c", "a-b-c")],
)
def test_anchor(heading: str, expected: str) -> None:
    assert anchor(heading) == expected
