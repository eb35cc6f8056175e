"""The files of a run as they were at a Git revision or in a DVC experiment, through DVC's Python API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, POSITIONS, Workspace
from sda_core.errors import ArtifactError, ConfigError
from sda_core.evaluation import Change, check_same_negatives

Positions = Mapping[tuple[str, str], pl.DataFrame]
"""POSITIONS tables by (variant, recommender)."""

PARAMS = "params.yaml"
_WHAT = ("evaluation", "data/filtered/interactions.parquet", "data/filtered/items.parquet", PARAMS)


@contextmanager
def workspace_at(root: Path, revision: str | None) -> Iterator[Workspace]:
    """A workspace with the positions, interactions and params of a revision; the project folder itself for None.

    Files come from Git and from the DVC cache, or from a remote where the cache lacks them.  What the revision has not
    is absent in the workspace, too.

    Args:
        root: the project folder, the one with ``dvc.yaml``.
        revision: anything that Git or ``dvc exp`` knows: a commit, branch, tag, or the name of an experiment.

    Raises:
        ConfigError: no DVC project, or no such revision.
        ArtifactError: a file of the revision is neither in the cache nor on a remote.
    """
    if revision is None:
        yield Workspace(root)
        return
    with TemporaryDirectory(prefix="sda-diff-") as folder:
        _copy(root, revision, Path(folder))
        yield Workspace(Path(folder))


def _copy(root: Path, revision: str, target: Path) -> None:
    from dvc.api import DVCFileSystem  # a second or two for the import
    from dvc.exceptions import DvcException
    from dvc.scm import RevError

    where = f"revision {revision}"
    try:
        files = DVCFileSystem(str(root.resolve()), rev=revision)
        _ = files.repo  # opened here, where its errors are still what they are
        found = [path for what in _WHAT if files.exists(what) for path in files.find(what)]
    except RevError:
        advice = "name a commit, branch, tag, or an experiment of `dvc exp list`"
        raise ConfigError(where, "Git and DVC know no such revision", advice) from None
    except DvcException as error:
        advice = "run inside a DVC project with Git, or name it with --root"
        raise ConfigError(str(root), f"cannot be opened at {revision!r} by DVC ({error})", advice) from None
    for path in found:
        known = files.info(path)
        was_made = bool(known.get("md5")) if known.get("dvc_info") else True  # DVC lists what dvc.yaml names, made or not
        if not was_made or Path(path).suffix not in (".parquet", ".yaml"):
            continue
        copy = target / path.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy.write_bytes(files.read_bytes(path))
        except (DvcException, OSError) as error:
            problem = f"{path.lstrip('/')} is neither in the DVC cache nor on a remote ({type(error).__name__})"
            advice = "run `dvc pull` for that revision, or check it out and run `dvc repro`"
            raise ArtifactError(where, problem, advice) from None


def _name(revision: str | None) -> str:
    return "the workspace" if revision is None else f"revision {revision}"


def positions(workspace: Workspace, revision: str | None) -> Positions:
    """Every evaluation of a workspace.

    Raises:
        ArtifactError: there is none, or a file is damaged.
    """
    paths = _positions_files(workspace)
    if not paths:
        raise ArtifactError(_name(revision), "holds no evaluation", "name one that was run, or run `dvc repro`")
    return {(path.parent.name, path.stem): POSITIONS.read(path) for path in paths}


def _positions_files(workspace: Workspace) -> list[Path]:
    return sorted(workspace.positions("", "").parent.glob("*/*.parquet"))


def interactions(*workspaces: Workspace) -> pl.DataFrame | None:
    """The first workspace's interactions that are there."""
    return next((INTERACTIONS.read(found.interactions) for found in workspaces if found.interactions.is_file()), None)


def num_items(*workspaces: Workspace) -> int | None:
    """The size of the catalogue, by the first workspace whose interactions are there."""
    found = next((found for found in workspaces if found.interactions.is_file()), None)
    return ITEMS.count(found.items) if found is not None and found.items.is_file() else None


def check_same_protocol(*runs: tuple[Workspace, str | None]) -> None:
    """See that two runs placed their targets in the same way, as far as their params and positions tell.

    Raises:
        ConfigError: another protocol, tie policy, seed of the negatives or way to retrieve candidates.
        ArtifactError: other negatives, whatever the seed.
    """
    sections = [_evaluate_section(workspace) for workspace, _ in runs]
    for key in ("protocol", "ties", "negatives_seed"):
        first, second = (section.get(key) for section in sections)
        if key == "negatives_seed" and sections[0].get("protocol") == "fullrank":
            continue  # nothing is drawn
        if None not in (first, second) and first != second:
            problem = f"{first} in {_name(runs[0][1])}, {second} in {_name(runs[1][1])}; such numbers cannot be compared"
            raise ConfigError(f"{PARAMS}: evaluate.{key}", problem, "evaluate both in the same way")
    first, second = (section.get("retrieval") for section in sections)  # runs from before there was one have none, as null has
    if all(sections) and first != second:
        problem = f"{first} in {_name(runs[0][1])}, {second} in {_name(runs[1][1])}; what it loses would look like a change"
        raise ConfigError(f"{PARAMS}: evaluate.retrieval", problem, "evaluate both in the same way")
    check_same_negatives(path for workspace, _ in runs for path in _positions_files(workspace))


def _evaluate_section(workspace: Workspace) -> dict[str, object]:
    """Section ``evaluate`` as it stands, not checked: another version may know other settings."""
    path = workspace.root / PARAMS
    data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else None
    section = data.get("evaluate") if isinstance(data, dict) else None
    return section if isinstance(section, dict) else {}


def table(
    changes: Sequence[Change], old: Positions, new: Positions, revisions: tuple[str | None, str | None], num_samples: int
) -> Iterator[str]:
    """The lines of ``sda diff``: what only one run has, what is equal in both, and a row a metric of the others.

    Raises:
        ArtifactError: the two runs have nothing in common.
    """
    names = [_name(revision) for revision in revisions]
    if not changes:
        raise ArtifactError(f"{names[0]} and {names[1]}", "have no variant and recommender in common", "compare others")
    num_users = max(change.num_users for change in changes)
    yield f"{names[0]} -> {names[1]}: {num_users:,} users, paired bootstrap over users ({num_samples:,} samples)"
    for one, other, name in ((old, new, names[0]), (new, old, names[1])):
        alone = [key for key in one if key not in other]
        if alone:
            yield f"only in {name}: {_keys(alone)}"
    shared = dict.fromkeys((change.variant, change.recommender) for change in changes)
    equal = [key for key in shared if new[key]["position"].equals(old[key]["position"])]
    if equal:
        yield f"every position equal: {_keys(equal)}"
    if len(equal) == len(shared):
        return
    yield f"{'variant':<12} {'recommender':<11} {'metric':<13} {'old':>7} {'new':>7} {'change':>8}  {'95 % interval':<18} clear"
    for change in changes:
        if (change.variant, change.recommender) in equal:
            continue
        interval = "" if change.low is None or change.high is None else f"{change.low:+.4f} to {change.high:+.4f}"
        yield (
            f"{change.variant:<12} {change.recommender:<11} {change.name:<13} {change.baseline_value:7.4f} {change.value:7.4f} "
            f"{change.difference:+8.4f}  {interval:<18} {'yes' if change.is_clear else 'no'}"
        )
    yield "clear: the interval excludes zero; by luck alone 1 row of 20 does. It knows of users, not of the spread between seeds."


def _keys(keys: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{variant}/{recommender}" for variant, recommender in keys)
