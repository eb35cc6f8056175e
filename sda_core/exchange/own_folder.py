"""A folder that a command has written, and may replace: it has a description that lists the command's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sda_core.artifacts import read_json, write_json
from sda_core.errors import ArtifactError, ConfigError

_CONTENT = "content"
_ADVICE = "move them away, or name a new folder"


def check_replaceable(folder: Path, description: str) -> None:
    """Check that a folder may be replaced: it does not exist, is empty, or has nothing but what the command wrote.

    Args:
        folder: the folder.
        description: name of the description in it.

    Raises:
        ConfigError: it has other content, which would be lost.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / description).is_file():
        raise ConfigError("--to", f"{folder} already exists and was not made by this command", "name a new folder")
    known = _known(folder / description)
    for name, count in _content(folder, description).items():
        if name not in known:
            raise ConfigError("--to", f"{folder / name} was not made by this command and would be lost", _ADVICE)
        if count > known[name]:
            problem = f"{folder / name} has {count} files, {known[name]} of them from this command; the others would be lost"
            raise ConfigError("--to", problem, _ADVICE)


def describe(folder: Path, description: str, described: dict[str, Any]) -> None:
    """Write the description of a folder whose other files are complete.

    Args:
        folder: the folder.
        description: name of the description.
        described: the other fields of the description.
    """
    write_json(folder / description, described | {_CONTENT: _content(folder, description)})


def _known(path: Path) -> dict[str, int]:
    """The list of a description; empty if it has none."""
    try:
        found = read_json(path, "description")
    except ArtifactError:
        return {}
    content = found.get(_CONTENT) if isinstance(found, dict) else None
    return content if isinstance(content, dict) else {}


def _content(folder: Path, description: str) -> dict[str, int]:
    """The number of files by name in a folder without its description: 1 for a file or a link."""
    return {
        path.name: 1 if path.is_symlink() or not path.is_dir() else max(1, sum(not each.is_dir() for each in path.rglob("*")))
        for path in sorted(folder.iterdir())
        if path.name != description
    }
