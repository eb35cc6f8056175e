"""Raw files: fetched from the first source that gives them, and listed in a manifest.

* ``manifest.json`` is written last, so its existence means that the download is finished.  It holds no times.
* ``<name>.entry.json`` marks a file that is whole while others are still to come, so that a killed run does not fetch it
  again; it is written before its file is put in place, and believed only where size and sha256 agree.
* A file of the manifest is fetched again only where its contents, its expected hash or its list of sources changed, or
  where the local file that it was copied from did.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, assert_never
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx
from pydantic import ValidationError

from sda_core.artifacts import write_json
from sda_core.data.folders import kept_folder, remove
from sda_core.data.manifest import NAME_PATTERN, RawFile, Role, check, manifest_file, manifest_path, read_manifest
from sda_core.data.transfer import RefusedError, copy_file, discard_part, fetch_file, part_path, shown
from sda_core.data.web import new_client, reason, run
from sda_core.errors import ArtifactError, DownloadError
from sda_core.fingerprint import sha256_file
from sda_core.params import AmazonDataset, DemoDataset, DownloadParams

__all__ = ["check", "download", "manifest_file"]

_log = logging.getLogger(__name__)

_OWN_SUFFIXES = (".part", ".part.json", ".entry.json")


@dataclass(frozen=True)
class _Wanted:
    """One file to get."""

    role: Literal["reviews", "metadata"]
    sources: tuple[str, ...]
    sha256: str | None


# ------------------------------------------------------------------------------------------------- public
def download(dataset: AmazonDataset | DemoDataset, params: DownloadParams, raw: Path, root: Path) -> dict[str, Any]:
    """Bring the raw files of a dataset into ``raw``.

    Afterwards ``raw`` holds the reviews file, the metadata file, for the built-in shop ``images.zip``, and the
    manifest; nothing else.  What is there already and whole is kept, what is unfinished is gone on with.

    Args:
        dataset: where the files come from; each list of sources is tried in turn.
        params: timeouts, retries, bounds.
        raw: the folder of raw files; kept between runs.
        root: the project folder, to which plain paths and ``local_folder`` are relative.

    Returns:
        The manifest: ``{"files": [{"role", "name", "source", "bytes", "sha256", "etag"}, ...]}``.

    Raises:
        DownloadError: no source gave a file (each is named with its reason), another run is writing to ``raw``, or
            ``raw`` cannot be written.
    """
    with kept_folder(raw):
        match dataset:
            case DemoDataset():
                files = _simulate(dataset, raw)
            case AmazonDataset():
                files = run(_fetch_all(dataset, params, raw, root))
            case _:
                assert_never(dataset)
        return _finish(files, raw)


# ----------------------------------------------------------------------------------------------- manifest
def _known_entries(raw: Path) -> list[RawFile]:
    """Files that an earlier run finished, whether or not it lived to write the manifest."""
    entries: list[RawFile] = []
    if (manifest_path(raw)).exists():
        try:
            entries += read_manifest(raw)
        except ArtifactError as error:
            _log.warning("%s", error)
    for path in sorted(raw.glob("*.entry.json")):
        try:
            entries.append(RawFile.model_validate_json(path.read_bytes()))
        except (ValidationError, OSError) as error:
            _log.warning("%s cannot be used (%s)", path, reason(error)[:200])
    return entries


def _finish(files: list[RawFile], raw: Path) -> dict[str, Any]:
    """Remove what does not belong here, then write the manifest."""
    manifest: dict[str, Any] = {"files": [file.model_dump(mode="json") for file in files]}
    entries = {f"{file.name}.entry.json" for file in files}
    keep = {file.name for file in files} | entries | {manifest_path(raw).name}
    for path in sorted(raw.iterdir()):
        if path.name not in keep:
            remove(path)
    write_json(manifest_path(raw), manifest)
    for name in entries:
        (raw / name).unlink(missing_ok=True)
    return manifest


# --------------------------------------------------------------------------------------------------- shop
def _simulate(dataset: DemoDataset, raw: Path) -> list[RawFile]:
    """Write the built-in shop anew; it takes seconds, and its maker may have changed."""
    from sda_core.data.demo import file_names, write_shop

    folder = raw / ".shop.part"
    remove(folder)
    folder.mkdir()
    write_shop(dataset, folder)
    (manifest_path(raw)).unlink(missing_ok=True)
    files: list[RawFile] = []
    roles: tuple[Role, Role, Role] = ("reviews", "metadata", "images")
    for role, name in zip(roles, file_names(dataset), strict=True):
        path = raw / name
        (folder / name).replace(path)
        size = path.stat().st_size
        files.append(RawFile(role=role, name=name, source="demo", bytes=size, sha256=sha256_file(path), etag=None))
    return files


# ------------------------------------------------------------------------------------------------- amazon
async def _fetch_all(dataset: AmazonDataset, params: DownloadParams, raw: Path, root: Path) -> list[RawFile]:
    wanted = (
        _Wanted("reviews", _located(dataset.reviews, dataset.local_folder), dataset.reviews_sha256),
        _Wanted("metadata", _located(dataset.metadata, dataset.local_folder), dataset.metadata_sha256),
    )
    clash = {_name(source) for source in wanted[0].sources} & {_name(source) for source in wanted[1].sources} - {""}
    if clash:
        raise DownloadError(
            "params.yaml: dataset", f"reviews and metadata are both named {min(clash)}", "give two files with different names"
        )
    known = _known_entries(raw)
    kept = {file.role: entry for file in wanted if (entry := _whole(file, known, raw, root)) is not None}
    for entry in kept.values():  # so that they are still known when the manifest is gone and this run is killed
        write_json(raw / f"{entry.name}.entry.json", entry.model_dump(mode="json"))
    if len(kept) < len(wanted):
        (manifest_path(raw)).unlink(missing_ok=True)
    async with new_client(params.timeout_seconds, num_connections=2) as client:
        return [kept.get(file.role) or await _fetch_first(client, file, params, raw, root) for file in wanted]


def _located(sources: Sequence[str], local_folder: str | None) -> tuple[str, ...]:
    """The sources as they will be tried: with a local folder, its files of the same base names."""
    if local_folder is None:
        return tuple(sources)
    return tuple(dict.fromkeys(f"{local_folder.rstrip('/') or '/'}/{_name(source)}" for source in sources))


def _is_web(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _name(source: str) -> str:
    """Base name under which a source's file is stored; "" where it has none that could be used."""
    if _is_web(source) or source.lower().startswith("file:"):
        name = unquote(urlsplit(source).path.rsplit("/", 1)[-1])
    else:
        name = PureWindowsPath(source).name if os.name == "nt" else source.rstrip("/").rsplit("/", 1)[-1]
    reserved = name == manifest_path(Path()).name or name.endswith(_OWN_SUFFIXES)
    return name if re.fullmatch(NAME_PATTERN, name) and len(name.encode()) <= 200 and not reserved else ""


def _local_path(source: str, root: Path) -> Path:
    """Where a plain path or a ``file:`` URL points."""
    if not source.lower().startswith("file:"):
        return root / Path(source).expanduser()
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise RefusedError(f"a file: URL of another host ({parts.netloc})")
    return root / url2pathname(parts.path)


def _whole(file: _Wanted, known: Sequence[RawFile], raw: Path, root: Path) -> RawFile | None:
    """The entry of a file that is there already and need not be fetched."""
    sources = {shown(source): source for source in file.sources}
    for entry in known:
        path = raw / entry.name
        if entry.role != file.role or entry.source not in sources or entry.name != _name(sources[entry.source]):
            continue
        if file.sha256 not in (None, entry.sha256) or not path.is_file() or path.stat().st_size != entry.bytes:
            continue
        if sha256_file(path) == entry.sha256 and not _outdated(entry, sources[entry.source], root):
            _log.info("%s is whole, kept", path)
            return entry
    return None


def _outdated(entry: RawFile, source: str, root: Path) -> bool:
    """Whether the local file that an entry was copied from has another content now."""
    if _is_web(source):
        return False
    path = _local_path(source, root)
    return path.is_file() and (path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256)


async def _fetch_first(client: httpx.AsyncClient, file: _Wanted, params: DownloadParams, raw: Path, root: Path) -> RawFile:
    """Try the sources of one file in turn."""
    problems: list[str] = []
    for source in file.sources:
        target = raw / _name(source)
        try:
            if target == raw:
                raise RefusedError("has no base name that a file could be stored under")
            if _is_web(source):
                digest, etag = await fetch_file(client, source, target, file.sha256, params)
            else:
                digest, etag = copy_file(_local_path(source, root), target, file.sha256, params), None
        except RefusedError as problem:
            _log.warning("%s: %s: %s", file.role, shown(source), problem)
            problems.append(f"{shown(source)}: {problem}")
            continue
        part = part_path(target)
        size = part.stat().st_size
        entry = RawFile(role=file.role, name=target.name, source=shown(source), bytes=size, sha256=digest, etag=etag)
        write_json(raw / f"{target.name}.entry.json", entry.model_dump(mode="json"))
        part.replace(target)
        discard_part(part)
        _log.info("%s: %s, %d bytes", file.role, entry.source, entry.bytes)
        return entry
    raise DownloadError(
        f"params.yaml: dataset.{file.role}",
        f"no source gave the file [{' | '.join(problems)}]",
        "mend the addresses, or name a folder with the files in dataset.local_folder",
    )
