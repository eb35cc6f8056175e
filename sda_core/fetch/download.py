"""Download raw files, each from the first source that works, and list them in a manifest.

* ``manifest.json`` is written last, so its existence means that the download is finished.  It holds no times.
* ``<name>.entry.json`` marks a finished file while others are missing, so that an interrupted run does not fetch it again.
  It is written before its file is moved into place, and is valid only if size and sha256 match.
* A file of the manifest is fetched again only if its contents, its expected hash or its list of sources changed, if the
  local file that it was copied from changed, or if a local file earlier in the list now exists.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, assert_never

import httpx
from pydantic import ValidationError

from sda_core.artifacts import write_json
from sda_core.errors import ArtifactError, DownloadError, StorageError
from sda_core.fetch.folders import locked_folder, remove
from sda_core.fetch.http import new_client, reason, run
from sda_core.fetch.manifest import RawFile, Role, check_file, manifest_path, read_manifest
from sda_core.fetch.transfer import (
    RejectedError,
    Wanted,
    check_contents,
    copy_file,
    discard_part,
    fetch_file,
    without_credentials,
)
from sda_core.fingerprint import sha256_file
from sda_core.local_files import base_name, inside, is_web, local_path, located
from sda_core.params import AmazonDataset, DemoDataset, DownloadParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """One file to fetch, with its sources."""

    role: Role
    sources: tuple[str, ...]
    sha256: str | None

    @property
    def setting(self) -> str:
        """The name of the setting with its sources in params.yaml."""
        return "dataset.image_archive" if self.role == "images" else f"dataset.{self.role}"

    def wanted(self, source: str, raw: Path) -> Wanted:
        """The file as given by this source; its target is ``raw`` itself if the source has no base name."""
        return Wanted(raw / base_name(source), self.role, self.sha256)


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`verify` for one file of the folder, as one line."""

    line: str
    ok: bool


# ------------------------------------------------------------------------------------------------- public
def download(dataset: AmazonDataset | DemoDataset, params: DownloadParams, raw: Path, root: Path) -> dict[str, Any]:
    """Download the raw files of a dataset to ``raw``.

    Afterwards ``raw`` holds exactly the reviews file, the metadata file, an archive of images if the dataset has one
    (``images.zip`` for the built-in shop), and the manifest.  Complete files are kept, and partial downloads are resumed.

    Args:
        dataset: section with the sources; each list of sources is tried in turn.
        params: timeouts, retries, limits.
        raw: the folder of raw files; kept between runs.
        root: the project folder; plain paths and ``local_folder`` are relative to it.

    Returns:
        The manifest: ``{"files": [{"role", "name", "source", "bytes", "sha256", "etag"}, ...]}``.

    Raises:
        DownloadError: all sources of a file failed (the message lists the reasons), or another run is writing to ``raw``.
        StorageError: ``raw`` cannot be written.
    """
    with locked_folder(raw):
        match dataset:
            case DemoDataset():
                files = _simulate(dataset, raw)
            case AmazonDataset():
                files = run(_fetch_all(dataset, params, raw, root))
            case _:
                assert_never(dataset)
        return _finish(files, raw)


def counts_of(manifest: dict[str, Any]) -> dict[str, object]:
    """Name and size of each raw file by role, for the closing line of the stage."""
    return {entry["role"]: f"{entry['name']} {entry['bytes']} bytes" for entry in manifest["files"]}


def verify(raw: Path, root: Path | None = None) -> list[Verdict]:
    """Compare a folder of raw files with its manifest, and check that every file can be decompressed; changes nothing.

    Args:
        raw: the folder of raw files.
        root: the project folder; if given, raw files are also compared with the local files from which they were copied.

    Returns:
        One verdict per file of the manifest, in its order, then one for each file that is not in the manifest.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    entries = read_manifest(raw)
    known = {entry.name for entry in entries} | {manifest_path(raw).name}
    return [_verdict(raw, entry, root) for entry in entries] + [
        Verdict(f"{raw}: {path.name!r} is not in the manifest; run `dvc repro download`, which removes it", ok=False)
        for path in sorted(raw.iterdir())
        if path.name not in known
    ]


def _verdict(raw: Path, entry: RawFile, root: Path | None) -> Verdict:
    path = raw / entry.name
    try:
        check_file(raw, entry)
        check_contents(path, Wanted(path, entry.role, entry.sha256))
        problem = None if root is None else changed_source(entry, root)
    except ArtifactError as error:
        return Verdict(str(error), ok=False)
    except RejectedError as error:
        problem = f"{error}; delete it and run `dvc repro download`"
    except OSError as error:
        problem = f"cannot be read ({reason(error)}); correct its permissions"
    if problem is not None:
        return Verdict(f"{path}: {problem}", ok=False)
    return Verdict(f"{entry.role} {entry.name} {entry.bytes} bytes sha256 {entry.sha256[:16]} ok", ok=True)


def changed_source(entry: RawFile, root: Path) -> str | None:
    """The difference between a raw file and the local file from which it was copied, and the remedy; None if equal.

    If the folder of the source does not exist either, the source is on another machine and cannot be compared.
    """
    if is_web(entry.source) or base_name(entry.source) != entry.name:  # the source of the built-in shop is not a path
        return None
    try:
        path = local_path(entry.source, root)
        if not path.exists():
            return f"its local source {path} is gone; restore it, or change `dataset`" if path.parent.is_dir() else None
        if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            return f"its local source {path} has changed since it was copied; run `dvc repro`, which takes it"
    except DownloadError:
        return None
    except (OSError, ValueError) as error:
        return f"its local source cannot be read ({type(error).__name__}: {error}); check its permissions"
    return None


def changed_sources(raw: Path, root: Path) -> list[str]:
    """One line for every raw file that differs from its local source (:func:`changed_source`).

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    found = ((entry.name, changed_source(entry, root)) for entry in read_manifest(raw))
    return [f"{name}: {problem}" for name, problem in found if problem is not None]


# ----------------------------------------------------------------------------------------------- manifest
def _known_entries(raw: Path) -> list[RawFile]:
    """Files that an earlier run finished, even if it was interrupted before writing the manifest."""
    entries: list[RawFile] = []
    if manifest_path(raw).exists():
        try:
            entries += read_manifest(raw)
        except ArtifactError as error:
            _log.warning("%s", error)
    for path in sorted(raw.glob("*.entry.json")):
        if not path.is_file():
            continue
        try:
            entries.append(RawFile.model_validate_json(path.read_bytes()))
        except (ValidationError, OSError) as error:
            _log.warning("%s cannot be used (%s)", path, reason(error)[:200])
    return entries


def _mark(entry: RawFile, raw: Path) -> None:
    """Mark a file as complete; a later run accepts it if size and sha256 match."""
    write_json(raw / f"{entry.name}.entry.json", entry.model_dump(mode="json"))


def _finish(files: list[RawFile], raw: Path) -> dict[str, Any]:
    """Remove all other files, then write the manifest."""
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
    """Write the built-in shop, always again: it takes seconds, and its code may have changed."""
    from sda_core.data.demo import file_names, write_shop

    folder = raw / ".shop.part"
    remove(folder)
    folder.mkdir()
    try:
        write_shop(dataset, folder)
    except StorageError:
        remove(folder)
        raise
    remove(manifest_path(raw))
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
    wanted = [
        _File("reviews", located(dataset.reviews, dataset.local_folder), dataset.reviews_sha256),
        _File("metadata", located(dataset.metadata, dataset.local_folder), dataset.metadata_sha256),
    ]
    if dataset.image_archive is not None:
        sources = located(dataset.image_archive, dataset.local_folder)
        wanted.append(_File("images", sources, dataset.image_archive_sha256))
    _check_apart(wanted)
    _check_folders(dataset, raw, root)
    known = _known_entries(raw)
    kept = {file.role: entry for file in wanted if (entry := _whole(file, known, raw, root)) is not None}
    for entry in kept.values():  # keep their marks, because the manifest is removed before this run has finished
        _mark(entry, raw)
    missing = [file for file in wanted if file.role not in kept]
    if missing:
        _check_local_folder(dataset, root)
        remove(manifest_path(raw))
    web = any(is_web(source) for file in missing for source in file.sources)
    # without a web address the network settings are not used
    async with new_client(params.timeout_seconds, num_connections=2) if web else nullcontext() as client:
        return [kept.get(file.role) or await _fetch_first(client, file, params, raw, root) for file in wanted]


def _check_apart(wanted: Sequence[_File]) -> None:
    """Reject files with equal names, because all are in one folder and its file system may ignore case."""
    for first, second in combinations(wanted, 2):
        names = {base_name(source).casefold(): base_name(source) for source in first.sources}
        clash = sorted(names.keys() & {base_name(source).casefold() for source in second.sources} - {""})
        if clash:
            raise DownloadError(
                "params.yaml: dataset",
                f"{first.setting.removeprefix('dataset.')} and {second.setting.removeprefix('dataset.')} are both named "
                f"{names[clash[0]]}",
                "give files with different names",
            )


def _check_folders(dataset: AmazonDataset, raw: Path, root: Path) -> None:
    """Reject folders of the user inside the raw folder, where files outside of the manifest are removed."""
    for name, folder in (("local_folder", dataset.local_folder), ("image_folder", dataset.image_folder)):
        if folder is None:
            continue
        where, advice = f"params.yaml: dataset.{name}", "name another folder"
        try:
            clash = inside(local_path(folder, root), raw)
        except DownloadError as error:
            raise DownloadError(where, error.problem, advice) from None
        if clash:
            raise DownloadError(where, f"{folder} is in {raw}, which this stage clears of everything else", advice)


def _check_local_folder(dataset: AmazonDataset, root: Path) -> None:
    """Reject a missing folder with one error, instead of one for each of its files."""
    folder = dataset.local_folder
    if folder is None or (path := local_path(folder, root)).is_dir():
        return
    problem = "is not a folder" if path.exists() else "there is no such folder"
    raise DownloadError("params.yaml: dataset.local_folder", f"{problem} ({path})", "correct the path, or set it to null")


def _whole(file: _File, known: Sequence[RawFile], raw: Path, root: Path) -> RawFile | None:
    """The entry of an existing file that need not be fetched, or None."""
    sources = {without_credentials(source): source for source in file.sources}
    for entry in known:
        if entry.role != file.role or entry.source not in sources or entry.name != base_name(sources[entry.source]):
            continue
        if file.sha256 not in (None, entry.sha256) or _outdated(entry, sources[entry.source], file, raw, root):
            continue
        wanted = file.wanted(sources[entry.source], raw)
        if _is_content(wanted.target, entry):
            _log.info("%s is complete and is kept", wanted.target)
            return entry
        if not wanted.part.is_symlink() and _is_content(wanted.part, entry):  # interrupted between check and rename
            _put_in_place(wanted)
            _log.info("%s was complete and is moved into place", wanted.target)
            return entry
    return None


def _is_content(path: Path, entry: RawFile) -> bool:
    """Whether a file has the size and hash in its entry."""
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256


def _put_in_place(wanted: Wanted) -> None:
    if wanted.target.is_dir():
        remove(wanted.target)
    wanted.part.replace(wanted.target)
    discard_part(wanted.part)


def _outdated(entry: RawFile, source: str, file: _File, raw: Path, root: Path) -> bool:
    """Whether a copy is outdated: the first usable local file has other contents.

    The sources before that of the copy are checked.  If that source no longer exists, the others are checked, too; if its
    whole folder does not exist, as on another machine, the copy is kept unless another local file can be used.
    """
    gone = not is_web(source) and _existing_file(source, root) is None
    for tried in file.sources if gone else file.sources[: file.sources.index(source) + 1]:
        path = _existing_file(tried, root)
        if path is None or inside(path, raw) or (not gone and _is_content(path, entry)):
            continue
        if tried == source or (base_name(tried) and _can_be_used(path, file.wanted(tried, raw))):
            return True
    if gone and changed_source(entry, root) is None:
        _log.warning("%s: %s is not on this machine; its copy in %s is kept", file.role, entry.source, raw)
        return False
    return gone


def _existing_file(source: str, root: Path) -> Path | None:
    """The local file of a source if it exists, else None."""
    try:
        path = local_path(source, root)
        return path if not is_web(source) and path.is_file() else None
    except (DownloadError, OSError, ValueError):
        return None


def _can_be_used(path: Path, wanted: Wanted) -> bool:
    try:
        check_contents(path, wanted)
    except (RejectedError, OSError):
        return False
    return wanted.sha256 in (None, sha256_file(path))


async def _fetch_first(client: httpx.AsyncClient | None, file: _File, params: DownloadParams, raw: Path, root: Path) -> RawFile:
    """Try the sources of one file in turn; ``client`` is given if one of them is a web address."""
    problems: list[str] = []
    refused: str | None = None  # the first existing local file
    for source in file.sources:
        wanted = file.wanted(source, raw)
        try:
            if wanted.target == raw:
                raise RejectedError("has no base name that a file could be stored under")
            if client is not None and is_web(source):
                digest, etag = await fetch_file(client, source, wanted, params)
            elif inside(path := local_path(source, root), raw):
                raise RejectedError(f"is in {raw}, which this stage writes to")
            else:
                digest, etag = await copy_file(path, wanted, params), None
        except (RejectedError, DownloadError) as error:
            problem = error.problem if isinstance(error, DownloadError) else error
            _log.warning("%s: %s: %s", file.role, without_credentials(source), problem)
            problems.append(f"{without_credentials(source)}: {problem}")
            if refused is None and _existing_file(source, root) is not None:
                refused = source
            continue
        if refused is not None and not is_web(source):
            _log.warning(
                "%s: DVC watches %s, which was rejected, so it will not see a change of %s; remove the former from %s",
                *(file.role, without_credentials(refused), without_credentials(source), file.setting),
            )
        name, size = wanted.target.name, wanted.part.stat().st_size
        entry = RawFile(role=file.role, name=name, source=without_credentials(source), bytes=size, sha256=digest, etag=etag)
        _mark(entry, raw)
        _put_in_place(wanted)
        _log.info("%s: %s, %d bytes", file.role, entry.source, entry.bytes)
        return entry
    raise DownloadError(
        f"params.yaml: {file.setting}",
        f"no source has the file [{' | '.join(problems)}]",
        "correct the addresses, or name a folder with the files in dataset.local_folder",
    )
