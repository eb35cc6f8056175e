"""The manifest: the list of raw files, written by the download stage and checked by later stages.

It is separate from the downloader, so that a change of the network code does not make later stages stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sda_core.artifacts import FILE_NAME_PATTERN, MANIFEST_NAME
from sda_core.errors import ArtifactError
from sda_core.fingerprint import sha256_file

Role = Literal["reviews", "metadata", "images"]

_DOWNLOAD = "run `dvc repro download`"
_AGAIN = f"delete it and {_DOWNLOAD}"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RawFile(_Record):
    """One entry of the manifest."""

    role: Role
    name: Annotated[str, Field(pattern=FILE_NAME_PATTERN, max_length=255)]
    source: str  # as written in params.yaml, without a password
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    etag: str | None


class _Manifest(_Record):
    """Schema of the file."""

    files: tuple[RawFile, ...]

    @model_validator(mode="after")
    def _each_once(self) -> _Manifest:
        for values in ([file.role for file in self.files], [file.name.casefold() for file in self.files]):
            if len(set(values)) < len(values):
                raise ValueError(f"lists a role or a file twice: {', '.join(values)}")
        return self


def manifest_file(raw: Path, role: Role) -> Path:
    """The raw file with a role, checked for presence and size (:func:`check` also compares the contents).

    Raises:
        ArtifactError: there is no manifest or no such role, or the file is missing or has another size.
    """
    for entry in read_manifest(raw):
        if entry.role == role:
            return check_file(raw, entry, contents=False)
    raise ArtifactError(str(manifest_path(raw)), f"lists no {role} file", _DOWNLOAD)


def check(raw: Path) -> None:
    """Compare every raw file with the manifest: presence, size, sha256.

    Raises:
        ArtifactError: at the first file that differs.
    """
    for entry in read_manifest(raw):
        check_file(raw, entry)


def check_file(raw: Path, entry: RawFile, contents: bool = True) -> Path:
    """Compare one raw file with its entry: presence, size, and with ``contents`` sha256; returns its path.

    Raises:
        ArtifactError: the file differs.
    """
    path = raw / entry.name
    if not path.is_file():
        raise ArtifactError(str(path), "raw file is missing", _DOWNLOAD)
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(str(path), f"has {size} bytes (the manifest says {entry.bytes})", _AGAIN)
    if contents and (digest := sha256_file(path)) != entry.sha256:
        raise ArtifactError(str(path), f"sha256 is {digest} (the manifest says {entry.sha256})", _AGAIN)
    return path


def manifest_path(raw: Path) -> Path:
    """Path of the manifest in a folder of raw files."""
    return raw / MANIFEST_NAME


def read_manifest(raw: Path) -> list[RawFile]:
    """Read all entries.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    path = manifest_path(raw)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ArtifactError(str(path), "is not a manifest (not a regular file)", _AGAIN)
        return list(_Manifest.model_validate_json(path.read_bytes()).files)
    except FileNotFoundError:
        raise ArtifactError(str(path), "manifest of raw files is missing", _DOWNLOAD) from None
    except OSError as error:
        raise ArtifactError(str(path), f"cannot be read ({type(error).__name__}: {error})", _AGAIN) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
        problem = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found["loc"] else found["msg"]
        raise ArtifactError(str(path), f"is not a manifest ({problem[:200]})", _AGAIN) from None
