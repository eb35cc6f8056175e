"""Check that the packages of the command line are installed; ``pip install sda-rec`` installs only the library."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec

ADVICE = 'run `pip install "sda-rec[cpu]"` or, with CUDA, "sda-rec[gpu]"'


def missing() -> list[str]:
    """The packages of the extra ``pipeline`` that are not installed, and FAISS; none in a source tree that was not installed."""
    try:
        required = requires("sda-rec") or []
    except PackageNotFoundError:
        return []
    names = [name[0] for text in required if "extra == 'pipeline'" in text and (name := re.match(r"[\w.-]+", text))]
    lacking = [name for name in names if not _is_installed(name)]
    return lacking if find_spec("faiss") else [*lacking, "faiss"]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
