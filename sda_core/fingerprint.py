"""Hashes of inputs, so that an unfinished stage is resumed only with the inputs with which it began."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """Hex SHA-256 of a file, or of a folder's relative names and contents in sorted order."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\x1f{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def fingerprint(*parts: BaseModel | Path | str | int | float | None) -> str:
    """Hex SHA-256 over params sections, files or folders, and plain values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        text: Any
        if isinstance(part, BaseModel):
            text = json.dumps(part.model_dump(mode="json"), sort_keys=True)
        elif isinstance(part, Path):
            text = sha256_path(part)
        else:
            text = repr(part)
        digest.update(f"{type(part).__name__}\x1f{text}\n".encode())
    return digest.hexdigest()
