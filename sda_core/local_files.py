"""The local files and folders that a run reads, so that DVC detects changes of them.

DVC watches the ``deps`` of a stage.  ``dvc.yaml`` takes the paths from the section ``local_files`` of ``params.yaml``, one
path per use; a use without a local file has :data:`NO_LOCAL_FILE`.  The section is determined by ``dataset`` and
``backbone``: Hydra computes it (``hydra_plugins/sda_local_files.py``), and the stages reject an edited section that does not
match (:func:`check`).

A dependency that does not exist would stop DVC before a stage can report the error.  So only existing paths are watched, and
of several local sources the first existing one, which is the one that is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, cast
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from sda_core.artifacts import FILE_NAME_PATTERN, MANIFEST_NAME
from sda_core.errors import ConfigError, DownloadError
from sda_core.params import Params

NO_LOCAL_FILE = "conf/no_local_file.txt"
"""A file of the project that is used in ``local_files`` if there is nothing to watch."""

OUTPUTS = (
    *("data/raw", "data/truth.parquet", "data/filtered", "data/images", "data/negatives"),
    *("adapters", "embeddings", "indexes", "models", "evaluation", "metrics", "report"),
)
"""Folders that the pipeline writes; a dependency that overlaps with one would make a cycle."""

RAW = ("reviews", "metadata", "image_archive")
IMAGES = ("local_folder", "local_images", "image_folder")
BACKBONE = ("backbone",)

_SETTINGS = {"local_images": "local_folder"}  # the settings of the uses that have another name

_OWN_SUFFIXES = (".part", ".part.json", ".entry.json")


# ------------------------------------------------------------------------------------------------ sources
def user_folder(text: str | None, root: Path, where: str) -> Path | None:
    """The path of a folder in a params file (:func:`local_path`); None for null."""
    return None if text is None else local_path(text, root, where)


def user_path(text: str, root: Path, where: str) -> Path:
    """The path of a file in a params file: relative to the project, ``~`` for the user's home.

    Raises:
        DownloadError: the home of an unknown user.
    """
    try:
        return root / Path(text).expanduser()
    except RuntimeError as error:
        raise DownloadError(where, f"{text!r} cannot be resolved ({error})", "give the folder's full path") from None


def is_web(source: str) -> bool:
    """Whether a source of raw files is an http or https address, and not a ``file:`` URL or a plain path."""
    return source.lower().startswith(("http://", "https://"))


def base_name(source: str) -> str:
    """Base name under which a source's file is stored; "" if it has no usable one."""
    if is_web(source) or source.lower().startswith("file:"):
        try:
            name = unquote(urlsplit(source).path.rsplit("/", 1)[-1])
        except ValueError:  # brackets without an IPv6 address
            return ""
    else:
        name = PureWindowsPath(source).name if os.name == "nt" else source.rstrip("/").rsplit("/", 1)[-1]
    reserved = name == MANIFEST_NAME or name.endswith(_OWN_SUFFIXES)
    return name if re.fullmatch(FILE_NAME_PATTERN, name) and len(name.encode()) <= 200 and not reserved else ""


def located(sources: Sequence[str], local_folder: str | None) -> tuple[str, ...]:
    """The sources that will be tried; with a local folder, its files with the same base names."""
    if local_folder is None:
        return tuple(sources)
    return tuple(dict.fromkeys(f"{local_folder.rstrip('/') or '/'}/{base_name(source)}" for source in sources))


def local_path(source: str, root: Path, where: str = "params.yaml: dataset") -> Path:
    """The path of a plain path or a ``file:`` URL.

    Raises:
        DownloadError: the URL is malformed or has another host, or the path has the home of an unknown user.
    """
    if not source.lower().startswith("file:"):
        return user_path(source, root, where)
    try:
        parts = urlsplit(source)
    except ValueError as error:  # brackets without an IPv6 address
        raise DownloadError(where, f"{source!r} is not a file: URL ({error})", "give the full path instead") from None
    if parts.netloc not in ("", "localhost"):
        raise DownloadError(where, f"a file: URL of another host ({parts.netloc})")
    return root / url2pathname(parts.path)


def inside(path: Path, folder: Path) -> bool:
    """Whether a path is inside a folder or equal to it, with links resolved."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a NUL in the path, which cannot exist
        return False


# ---------------------------------------------------------------------------------------------- what to watch
def watched(dataset: Mapping[str, Any], backbone: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Compute the section ``local_files`` from two other sections.

    Args:
        dataset: the section as plain data; it need not be valid, because the reader of ``params.yaml`` reports errors.
        backbone: likewise.
        root: the project folder, base of relative paths.

    Returns:
        The path to watch for each use: as in the params, with ``~`` expanded and a ``file:`` URL converted to a path.
    """
    return {use: next(iter(_existing(use, paths, root)), NO_LOCAL_FILE) for use, paths in _named(dataset, backbone).items()}


def check(params: Params, root: Path, uses: Sequence[str]) -> None:
    """Reject a section ``local_files`` that does not match the other sections.

    Args:
        params: the content of ``params.yaml``.
        root: the project folder.
        uses: the keys of ``local_files`` that the current stage uses.

    Raises:
        ConfigError: a path of these uses is not in the params, an existing one is not watched, or any path is in the place of
            an output.
    """
    _check_apart(params, root)
    named = _named(params.dataset.model_dump(), params.backbone.model_dump())
    written = params.local_files.model_dump()
    problems: list[str] = []
    for use in uses:
        existing = _existing(use, named[use], root)
        if written[use] in named[use] or (written[use] == NO_LOCAL_FILE and not existing):
            continue
        problems.append(f"{use} should be {next(iter(existing), NO_LOCAL_FILE)!r} (got {written[use]!r})")
    if problems:
        raise ConfigError(
            "params.yaml: local_files",
            f"does not list the local files that the other params name, so DVC would not see them change: {', '.join(problems)}",
            "write this into params.yaml, or compose it again with `dvc exp run`",
        )


def _check_apart(params: Params, root: Path) -> None:
    """Reject the user's files in a folder that the pipeline writes: it would remove them, and DVC could not watch them."""
    named = _named(params.dataset.model_dump(), params.backbone.model_dump())
    for use in (*IMAGES, *RAW, *BACKBONE):  # a folder before the files in it
        where = f"params.yaml: {'backbone.name' if use in BACKBONE else f'dataset.{_SETTINGS.get(use, use)}'}"
        for text in named[use]:
            path = root / text
            if use in BACKBONE and not _is_folder(path):  # the name of a hub
                continue
            for output in OUTPUTS:
                if inside(path, root / output):
                    problem = f"{text} is inside {output}, which the pipeline writes, so its files could be removed"
                    raise ConfigError(where, problem, "move them to another folder, and give its path")
                if use not in (*RAW, "local_folder") and inside(root / output, path):
                    problem = f"{text} contains {output}, which the pipeline writes, so DVC cannot watch it"
                    raise ConfigError(where, problem, "move its files to another folder, and give its path")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for the file system, a NUL
        return False


def watches(root: Path, uses: Sequence[str]) -> Callable[[Params], None]:
    """:func:`check` for some uses, as an argument of a stage."""
    return partial(check, root=root, uses=uses)


def _named(dataset: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, list[str]]:
    """All local paths in the params for each use, best first, existing or not."""
    named = {"backbone": _texts(backbone.get("name"))}
    if dataset.get("source") == "amazon":
        named |= {use: _texts(dataset.get(use)) for use in (*RAW, "local_folder", "image_folder")}
        named["local_images"] = [f"{folder.rstrip('/')}/images" for folder in named["local_folder"]]
        for use in RAW:
            sources = located(named[use], next(iter(named["local_folder"]), None))
            named[use] = [source for source in sources if not is_web(source) and base_name(source)]
    return {use: _paths(named.get(use, [])) for use in (*RAW, *IMAGES, *BACKBONE)}


def _texts(value: Any) -> list[str]:
    """A single text, or the texts of a list; other values are skipped."""
    values = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else (value,)
    return [text for text in values if isinstance(text, str) and text]


def _paths(sources: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for source in sources:
        with suppress(DownloadError):  # the stage that reads it reports the error
            paths.append(local_path(source, Path()).as_posix())
    return paths


def _existing(use: str, paths: Sequence[str], root: Path) -> list[str]:
    """The paths that exist and can be watched."""
    return [text for text in paths if _can_be_watched(use, root / text, root)]


def _can_be_watched(use: str, path: Path, root: Path) -> bool:
    try:
        if not (path.is_file() if use in RAW else path.is_dir()):
            return False
    except (OSError, ValueError):  # a name too long for the file system, a NUL
        return False
    if any(inside(path, root / output) or inside(root / output, path) for output in OUTPUTS):
        return False
    if use == "local_images":  # part of local_folder, unless DVC cannot watch it there
        return path.is_symlink() or not _can_be_watched("local_folder", path.parent, root)
    return True
