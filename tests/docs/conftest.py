"""The documents of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/archive/*.md"),
    ROOT / "bench" / "README.md", ROOT / "pretraining" / "README.md",
    ROOT / "sda_core" / "backbones" / "nano" / "MODEL_CARD.md", ROOT / "sda_core" / "backbones" / "nano2" / "MODEL_CARD.md",
])  # fmt: skip


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def prose(text: str) -> list[tuple[int, str]]:
    """Number and text of each line outside code blocks."""
    found, is_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            found.append((number, line))
    return found
