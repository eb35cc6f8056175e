"""The list of raw files: what the download stage found, and what later stages may rely on.

Apart from the downloader, so that a change of the network code makes no later stage stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sda_core.errors import ArtifactError
from sda_core.fingerprint import sha256_file

Role = Literal["reviews", "metadata", "images"]

NAME_PATTERN = r"^[^/\\:\x00-\x1f\x7f.][^/\\:\x00-\x1f\x7f]*$"
"""A file name that stays in its folder (on Windows too, hence no colon) and is not hidden."""


class RawFile(BaseModel):
    """One entry of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Role
    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=255)]
    source: str  # as written in params.yaml, without a password
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    etag: str | None


class _Manifest(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    files: tuple[RawFile, ...]

    @model_validator(mode="after")
    def _each_once(self) -> _Manifest:
        for values in ([file.role for file in self.files], [file.name.casefold() for file in self.files]):
            if len(set(values)) < len(values):
                raise ValueError(f"names a role or a file twice: {', '.join(values)}")
        return self


def manifest_file(raw: Path, role: Role) -> Path:
    """The raw file of one role, present and of the recorded size (:func:`check` compares the contents as well).

    Raises:
        ArtifactError: there is no manifest, no such role, or the file is missing or of another size.
    """
    for entry in read_manifest(raw):
        if entry.role == role:
            _check_size(raw, entry)
            return raw / entry.name
    raise ArtifactError(str(manifest_path(raw)), f"names no {role} file", "run `dvc repro download`")


def check(raw: Path) -> None:
    """Compare every raw file with the manifest: presence, size, sha256.

    Raises:
        ArtifactError: at the first file that differs.
    """
    for entry in read_manifest(raw):
        check_file(raw, entry)


def check_file(raw: Path, entry: RawFile) -> None:
    """Compare one raw file with its entry: presence, size, sha256.

    Raises:
        ArtifactError: it differs.
    """
    _check_size(raw, entry)
    digest = sha256_file(raw / entry.name)
    if digest != entry.sha256:
        raise ArtifactError(
            str(raw / entry.name),
            f"sha256 is {digest} (the manifest says {entry.sha256})",
            "delete it and run `dvc repro download`",
        )


def manifest_path(raw: Path) -> Path:
    """Path of the manifest in a folder of raw files."""
    return raw / "manifest.json"


def read_manifest(raw: Path) -> list[RawFile]:
    """All entries.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    path = manifest_path(raw)
    advice = "delete it and run `dvc repro download`"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ArtifactError(str(path), "is no manifest (no regular file)", advice)
    try:
        return list(_Manifest.model_validate_json(path.read_bytes()).files)
    except FileNotFoundError:
        raise ArtifactError(str(path), "manifest of raw files is missing", "run `dvc repro download`") from None
    except OSError as error:
        raise ArtifactError(str(path), f"cannot be read ({type(error).__name__}: {error})", advice) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
        problem = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found["loc"] else found["msg"]
        raise ArtifactError(str(path), f"is no manifest ({problem[:200]})", advice) from None


def _check_size(raw: Path, entry: RawFile) -> None:
    path = raw / entry.name
    if not path.is_file():
        raise ArtifactError(str(path), "raw file is missing", "run `dvc repro download`")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(
            str(path), f"has {size} bytes (the manifest says {entry.bytes})", "delete it and run `dvc repro download`"
        )
