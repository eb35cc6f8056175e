"""README fits one screenful of attention, and a changed sentence is a changed line."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.conftest import prose

WIDTH = 120
LATER = {"docs/log.md", "pretraining/README.md", "sda_core/backbones/nano/MODEL_CARD.md"}  # written by a program, or with one


def test_lines_have_at_most_120_columns(repository: Path, document: Path) -> None:
    """Tables and code apart."""
    if document.relative_to(repository).as_posix() in LATER:
        return
    lines = prose(document.read_text(encoding="utf-8"))
    wide = [f"{document}:{number}" for number, line in lines if len(line) > WIDTH and not line.lstrip().startswith("|")]
    assert not wide


def test_readme_is_short(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables[0].splitlines()) <= 2 + 6
    assert len(re.findall(r"!\[", text)) == 1


def test_readme_names_folders_that_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Folders")[2].partition("```text\n")[2].partition("```")[0]
    named = [name.strip() for line in block.splitlines() for name in re.split(r" {2,}", line)[0].split(",")]
    assert len(named) > 8
    assert not [name for name in named if not (repository / name).exists()]
