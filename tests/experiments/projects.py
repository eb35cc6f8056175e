"""Projects in which experiments make everything themselves."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def new_project(factory: pytest.TempPathFactory, repository: Path) -> Generator[Path]:
    """A project folder with conf/ alone; meanwhile the repository is the current folder, from which stages are run."""
    root = factory.mktemp("project")
    (root / "conf").symlink_to(repository / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        yield root
