"""Read the files of a run at a Git revision or in a DVC experiment, through DVC's Python API."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import polars as pl
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace, read_json, storage
from sda_core.errors import ArtifactError, ConfigError, StorageError, failed_path, storage_error
from sda_core.evaluation import check_same_negatives
from sda_core.evaluation.seed_noise import Judged, Judgement

Positions = Mapping[tuple[str, str], pl.DataFrame]
"""SEED_POSITIONS tables by (variant, recommender)."""
Metrics = Mapping[tuple[str, str], Mapping[str, Any]]
"""Flat numbers by (variant, recommender)."""

PARAMS = "params.yaml"
_IN_GIT = (PARAMS, "metrics")
_IN_CACHE = ("evaluation", "data/filtered/interactions.parquet", "data/filtered/items.parquet")


@contextmanager
def workspace_at(root: Path, revision: str | None) -> Generator[Workspace]:
    """A workspace with the positions, interactions, metrics and params of a revision; the project folder itself for None.

    Files come from Git and from the DVC cache, or from a remote if they are not cached.  Files that the revision does not
    have are absent in the workspace.  Positions that are neither in the cache nor on a remote are also absent if Git has
    the revision's metrics, as in a clone on another machine.

    Args:
        root: the project folder, the one with ``dvc.yaml``.
        revision: a commit, branch, tag, or the name of a DVC experiment.

    Raises:
        ConfigError: no DVC project, or no such revision.
        ArtifactError: a file of the revision is neither in the cache nor on a remote, and Git has no metrics of it.
        StorageError: the disk is full or read-only, also for DVC's own database.
    """
    if revision is None:
        yield Workspace(root)
        return
    with TemporaryDirectory(prefix="sda-diff-") as folder:
        try:
            _copy(root, revision, Path(folder))
        except sqlite3.Error as error:  # DVC writes to its database of hashes even when it only reads files
            advice = "free some space, make the folder writable, or set `dvc config --local core.site_cache_dir`"
            raise StorageError("DVC's database", f"cannot be used ({error})", advice) from None
        yield Workspace(Path(folder))


def _copy(root: Path, revision: str, target: Path) -> None:
    from dvc.api import DVCFileSystem  # the import takes a second or two
    from dvc.exceptions import DvcException
    from dvc.scm import RevError
    from dvc_data.index import DataIndexError  # a whole folder is not in the cache
    from scmrepo.exceptions import SCMError

    if not revision.strip():
        raise ConfigError("revision", "is empty", "name a commit, branch, tag, or an experiment of `dvc exp list`")
    where = f"revision {revision}"
    try:
        files = DVCFileSystem(str(root.resolve()), rev=revision)
        _ = files.repo  # open it here, where its errors are not wrapped yet
    except RevError:
        advice = "name a commit, branch, tag, or an experiment of `dvc exp list`"
        raise ConfigError(where, "there is no such revision in Git or DVC", advice) from None
    except (DvcException, SCMError) as error:  # the latter: a repository without a commit
        advice = "run inside a DVC project with Git and a commit, or name it with --root"
        raise ConfigError(str(root), f"cannot be opened at {revision!r} by DVC ({error})", advice) from None
    for what in (*_IN_GIT, *_IN_CACHE):
        path, contents = what, dict[str, bytes]()
        try:
            for path in files.find(what) if files.exists(what) else ():
                known = files.info(path)
                # DVC lists all outputs in dvc.yaml, made or not
                was_made = bool(known.get("md5")) if known.get("dvc_info") else True
                if was_made and Path(path).suffix in (".parquet", ".yaml", ".json"):
                    contents[path.lstrip("/")] = cast("bytes", files.read_bytes(path))
        except (DvcException, DataIndexError, OSError) as error:
            if (failure := storage_error(error, failed_path(error) or path.lstrip("/"), "used")) is not None:
                raise failure from None  # not a missing file
            if what in _IN_CACHE and _metrics_files(Workspace(target)):
                for folder in ("evaluation", "data"):  # all or nothing: an incomplete copy would look like the whole run
                    shutil.rmtree(target / folder, ignore_errors=True)
                return
            problem = f"{path.lstrip('/')} is neither in the DVC cache nor on a remote ({type(error).__name__})"
            advice = "run `dvc pull` for that revision, or check it out and run `dvc repro`"
            raise ArtifactError(where, problem, advice) from None
        for path, content in contents.items():
            copy = target / path
            with storage(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)


def name_of(revision: str | None) -> str:
    """The name of a run in messages."""
    return "the workspace" if revision is None else f"revision {revision}"


def positions(workspace: Workspace, revision: str | None) -> Positions:
    """The positions of every evaluation of a workspace.

    Raises:
        ArtifactError: there is none, or a file is damaged.
    """
    paths = _positions_files(workspace)
    if not paths:
        raise ArtifactError(name_of(revision), "has no evaluation", "name one that was run, or run `dvc repro`")
    return {(path.parent.name, path.stem): SEED_POSITIONS.read(path) for path in paths}


def _positions_files(workspace: Workspace) -> list[Path]:
    return sorted(workspace.positions("", "").parent.glob("*/*.parquet"))


def _metrics_files(workspace: Workspace) -> list[Path]:
    return sorted(workspace.metrics("", "").parent.glob("*/*.json"))


def has_metrics_alone(workspace: Workspace, revision: str | None) -> bool:
    """Whether only the metrics of a revision are available, and not its positions.

    The metrics in the project folder may come from Git, so without positions they do not count as a run.
    """
    return revision is not None and not _positions_files(workspace) and bool(_metrics_files(workspace))


def metrics(workspace: Workspace, revision: str | None) -> Metrics:
    """The metrics of every evaluation of a workspace; in the project folder only those that also have positions.

    Raises:
        ArtifactError: there is none, or a file is damaged.
    """
    found = {(path.parent.name, path.stem): path for path in _metrics_files(workspace)}
    if revision is None:
        found = {key: path for key, path in found.items() if key in positions(workspace, revision)}
    if not found:
        raise ArtifactError(name_of(revision), "holds no metrics", "name one that was run, or run `dvc repro`")
    read = {key: read_json(path, "metrics") for key, path in found.items()}
    for key, content in read.items():
        if not isinstance(content, dict):
            raise ArtifactError(name_of(revision), f"metrics/{key[0]}/{key[1]}.json is not a mapping", "run `dvc repro`")
    return read


def interactions(*workspaces: Workspace) -> pl.DataFrame | None:
    """The interactions of the first workspace that has them."""
    return next((INTERACTIONS.read(found.interactions) for found in workspaces if found.interactions.is_file()), None)


def num_items(*workspaces: Workspace) -> int | None:
    """The number of items, from the first workspace that has interactions."""
    found = next((found for found in workspaces if found.interactions.is_file()), None)
    return ITEMS.count(found.items) if found is not None and found.items.is_file() else None


def check_same_protocol(*runs: tuple[Workspace, str | None]) -> None:
    """Check that two runs ranked their targets in the same way, as far as their params and positions show.

    Raises:
        ConfigError: the protocol, tie policy, seed of the negatives or retrieval of candidates differs.
        ArtifactError: the negatives differ in spite of equal seeds.
    """
    sections = [_evaluate_section(workspace) for workspace, _ in runs]
    for key in ("protocol", "ties", "negatives_seed"):
        first, second = (section.get(key) for section in sections)
        if key == "negatives_seed" and sections[0].get("protocol") == "fullrank":
            continue  # full rank draws nothing
        if None not in (first, second) and first != second:
            problem = f"{first} in {name_of(runs[0][1])}, {second} in {name_of(runs[1][1])}; such numbers cannot be compared"
            raise ConfigError(f"{PARAMS}: evaluate.{key}", problem, "evaluate both in the same way")
    first, second = (section.get("retrieval") for section in sections)  # older runs lack the key, which means null
    if all(sections) and first != second:
        problem = f"{first} in {name_of(runs[0][1])}, {second} in {name_of(runs[1][1])}; what it loses would look like a change"
        raise ConfigError(f"{PARAMS}: evaluate.retrieval", problem, "evaluate both in the same way")
    check_same_negatives(path for workspace, _ in runs for path in _positions_files(workspace))


def check_same_negatives_of(old: Metrics, new: Metrics) -> None:
    """As :func:`check_same_protocol`, from the hash of the negatives in the metrics.

    Raises:
        ArtifactError: the negatives differ.
    """
    told = {content["negatives_sha256"] for run in (old, new) for content in run.values() if content.get("negatives_sha256")}
    if len(told) > 1:
        raise ArtifactError("metrics", "targets were ranked among other negatives", "evaluate both runs with the same ones")


def params_of(workspace: Workspace, revision: str | None) -> Mapping[str, Any]:
    """The settings of a run, not validated, because another version may have other settings; empty if there are none.

    Raises:
        ConfigError: the file is not a YAML mapping.
    """
    path = workspace.root / PARAMS
    if not path.is_file():
        return {}
    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{PARAMS} of {name_of(revision)}", f"is not valid YAML ({error})") from None
    return data if isinstance(data, dict) else {}


def _evaluate_section(workspace: Workspace) -> dict[str, object]:
    section = params_of(workspace, None).get("evaluate")
    return section if isinstance(section, dict) else {}


def table(
    judgement: Judgement,
    equal: Sequence[tuple[str, str]],
    keys: tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]]],
    revisions: tuple[str | None, str | None],
    how: str,
    remarks: Sequence[str],
    *,
    by_positions: bool,
    with_noise: bool,
) -> Iterator[str]:
    """The lines of ``sda diff``: results of only one run, equal results, one row per metric of the others, the verdict.

    Args:
        judgement: the rows.
        equal: variants and recommenders with equal results in both runs, which have no row.
        keys: the variants and recommenders of each run.
        revisions: names of the runs.
        how: how the runs were compared.
        remarks: lines before the table.
        by_positions: whether positions were compared, or only metrics.
        with_noise: whether to show the limit of each row by the variation between seeds.

    Raises:
        ArtifactError: the two runs have nothing in common.
    """
    names = [name_of(revision) for revision in revisions]
    if not judgement.rows:
        raise ArtifactError(f"{names[0]} and {names[1]}", "have no variant and recommender in common", "compare others")
    num_users = max(row.change.num_users for row in judgement.rows)
    yield f"{names[0]} -> {names[1]}: {num_users:,} users, {how}"
    yield from remarks
    for one, other, name in ((*keys, names[0]), (*keys[::-1], names[1])):
        alone = [key for key in one if key not in other]
        if alone:
            yield f"only in {name}: {list_keys(alone)}"
    if equal:
        yield f"every {'position' if by_positions else 'metric'} equal: {list_keys(equal)}"
    shown = [row for row in judgement.rows if (row.change.variant, row.change.recommender) not in equal]
    if not shown:
        return
    head = f"{'variant':<12} {'recommender':<11} {'metric':<13} {'old':>7} {'new':>7} {'change':>8}  {'95 % interval':<18} clear"
    yield head + ("  limit    verdict" if with_noise else "")
    for row in shown:
        yield _line(row, with_noise)
    yield "clear: whether the interval excludes zero; about 1 row of 20 is clear by chance."


def _line(row: Judged, with_noise: bool) -> str:
    change = row.change
    has_interval = change.low is not None and change.high is not None
    interval = f"{change.low:+.4f} to {change.high:+.4f}" if has_interval else ""
    text = (
        f"{change.variant:<12} {change.recommender:<11} {change.name:<13} {change.baseline_value:7.4f} {change.value:7.4f} "
        f"{change.difference:+8.4f}  {interval:<18} {('yes' if change.is_clear else 'no') if has_interval else '-':<5}"
    )
    if not with_noise:
        return text.rstrip()
    noise = "-" if row.band is None else f"{row.band:.4f}"
    return f"{text}  {noise:<7}  {'not measured' if row.is_within is None else 'same' if row.is_within else 'larger'}"


def list_keys(keys: Sequence[tuple[str, str]]) -> str:
    """``variant/recommender`` of each, separated by commas."""
    return ", ".join(f"{variant}/{recommender}" for variant, recommender in keys)
