"""Project folders outside this repository: create one with ``sda init``, upgrade it with ``sda upgrade``.

In the repository the ``deps`` of a stage list the modules that it needs.  A project elsewhere cannot list files of an
installed package, so its ``package.yaml`` has a hash of these files for each stage, and the stage depends on this value.
Stages do not run if another version is installed than the one in ``package.yaml``; ``sda upgrade`` renews the hashes, and
``dvc repro`` then re-runs only the stages whose code has changed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sda_core import __version__
from sda_core.artifacts import storage
from sda_core.errors import ArtifactError, ConfigError

PACKAGE = "package.yaml"
_SDA_CORE = Path(__file__).resolve().parents[1]
_WIDE = 1000  # columns; lines are never wrapped

_COMMENT = "# Written by `sda init` and `sda upgrade`; a stage runs again when its hash of the installed code changes.\n"
_DVC_COMMENT = (
    "# The pipeline.  One stage = one file in stages/ = one section of params.yaml.\n"
    f"# The hashes of {PACKAGE} represent the installed code that a stage depends on.\n"
)
_IGNORED = "__pycache__/\n.venv/\nvenv/\n.resume/\n*.tmp\n/costs\n/report\n/dvc_plots\n/datasets/\n"
_README = """# {name}

Item embeddings and recommenders, made with SDA (`sda-rec`).

```bash
dvc repro        # the whole pipeline, on the built-in shop; ends with report/index.html
sda --help       # single stages, neighbors and recommendations of an item, comparisons of two runs
```

- `conf/` holds the settings, and `params.yaml` is what Hydra composes from them.
  `dvc exp run -S dataset=beauty` takes another preset; edit `conf/` for a lasting change.
- Your own shop needs two files of JSON lines, `interactions.jsonl` and `items.jsonl`:
  `dvc exp run -S dataset=own -S dataset.local_folder=FOLDER`; `conf/dataset/own.yaml` explains the settings.
- `dvc exp run` needs a first commit: `git add . && git commit -m "Start"`.
- After an upgrade of `sda-rec` run `sda upgrade`.
  It replaces the files that you have not edited; `dvc repro` then re-runs the stages whose code has changed.
"""


@dataclass(frozen=True)
class Upgrade:
    """The result of :func:`upgrade`: the previous version, the files replaced or added, and those kept because of edits.

    ``moved`` lists the kept files in which the recommenders' ``seed`` became ``train_recommender.seeds``.
    """

    version: str
    replaced: tuple[str, ...]
    kept: tuple[str, ...]
    moved: tuple[str, ...]


def create(folder: Path) -> None:
    """Write a project into a new or empty folder; a folder with nothing but ``.git`` counts as empty.

    Git and DVC are initialised if needed; without the command ``git``, DVC is initialised without Git.

    Raises:
        ConfigError: the folder is not empty, or Git or DVC rejects it.
        StorageError: the disk is full or read-only, or a permission is missing.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir() if path.name != ".git")
    if found:
        raise ConfigError(str(folder), f"is not empty ({found[0]})", "name a new folder")
    _initialise(folder)
    files = _files(folder.resolve().name)
    for name, content in files.items():
        _write(folder / name, content)
    _write(folder / PACKAGE, _package(files))


def upgrade(root: Path) -> Upgrade:
    """Upgrade a project to the installed version: replace ``package.yaml`` and every file that was not edited.

    In the repository, which has no ``package.yaml``, only settings are moved.

    Raises:
        ConfigError: the folder has no ``package.yaml`` and no setting to move.
        ArtifactError: ``package.yaml`` cannot be read.
        StorageError: the disk is full or read-only, or a permission is missing.
    """
    if not (root / PACKAGE).is_file():
        if moved := _move_seeds(root):
            return Upgrade(__version__, (), (), moved)
        raise ConfigError(str(root / PACKAGE), "no such file, so `sda init` did not make this project", "nothing to upgrade")
    before = _read(root)
    files = _files(root.resolve().name)
    replaced, kept = list[str](), list[str]()
    for name, content in files.items():
        path = root / name
        current = path.read_bytes() if path.is_file() else None
        if current == content:
            continue
        if current is not None and _sha256(current) != before["files"].get(name):
            kept.append(name)
            continue
        _write(path, content)
        replaced.append(name)
    moved = _move_seeds(root)
    _write(root / PACKAGE, _package(files))
    return Upgrade(str(before["version"]), tuple(replaced), tuple(kept), moved)


def _move_seeds(root: Path) -> tuple[str, ...]:
    """Replace the ``seed`` of each recommender by the list ``train_recommender.seeds`` in edited settings.

    Returns:
        The changed files.
    """
    moved: list[str] = []
    for name in ("params.yaml", "conf/config.yaml"):
        path = root / name
        if not path.is_file():
            continue
        yaml = YAML()
        yaml.width, yaml.preserve_quotes = _WIDE, True
        try:
            data = yaml.load(path.read_text(encoding="utf-8"))
        except (YAMLError, UnicodeDecodeError):
            continue  # the next command that reads it reports the error
        section: Any = data.get("train_recommender") if isinstance(data, dict) else None
        parts = section.values() if isinstance(section, dict) else ()
        old = [part.pop("seed") for part in parts if isinstance(part, dict) and "seed" in part]
        if not old:
            continue
        section.setdefault("seeds", list(dict.fromkeys(old)))
        written = io.StringIO()
        yaml.dump(data, written)
        _write(path, written.getvalue().encode())
        moved.append(name)
    return tuple(moved)


def check_version(root: Path) -> None:
    """Check that the installed version is the one in the project's ``package.yaml``.

    Raises:
        ConfigError: another version is installed.
        ArtifactError: ``package.yaml`` cannot be read.
    """
    if not (root / PACKAGE).is_file():  # the repository, whose stages depend on the files themselves
        return
    version = str(_read(root)["version"])
    if version != __version__:
        raise ConfigError(
            str(root / PACKAGE),
            f"the project was made with sda-rec {version}, and {__version__} is installed",
            f"run `sda upgrade` and `dvc repro`, or install sda-rec {version}",
        )


def _read(root: Path) -> dict[str, Any]:
    path = root / PACKAGE
    try:
        with storage(path, "read"):
            data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        if not isinstance(data["version"], str) or not isinstance(data["files"], dict):
            raise TypeError
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise ArtifactError(str(path), "has no version and no files", "restore it from Git") from None
    return data


def _write(path: Path, content: bytes) -> None:
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- Git and DVC
def _initialise(folder: Path) -> None:
    from dvc.exceptions import DvcException  # the import takes a second or two
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # `sda init` prints its own messages
    has_git = shutil.which("git") is not None
    top = _git(folder, "rev-parse", "--show-toplevel") if has_git else None
    if has_git and top is None and _git(folder, "init", "-q") is None:
        raise ConfigError(str(folder), "`git init` failed", "run it there and read its message")
    is_inside = top is not None and Path(top).resolve() != folder.resolve()
    try:
        with Repo.init(str(folder), no_scm=not has_git, subdir=is_inside) as repo, repo.config.edit("repo") as config:
            sections: Any = config
            sections["hydra"]["enabled"] = True
            sections["core"]["analytics"] = False
    except DvcException as error:
        raise ConfigError(str(folder), f"DVC cannot be initialised ({error})", "name another folder") from None


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a Git command; None if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)  # noqa: S603 (no shell)
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------- the files
def _template() -> tuple[Path, Path]:
    """The folders of the project files and of the stages: in the package from a wheel, beside it in the repository."""
    inside = _SDA_CORE / "template"
    return (inside, _SDA_CORE / "stages") if inside.is_dir() else (_SDA_CORE.parent, _SDA_CORE.parent / "stages")


def _files(name: str) -> dict[str, bytes]:
    """Every file of a project except ``package.yaml``, by its path in the project folder."""
    template, stages = _template()
    paths = [template / ".dvcignore", template / "params.yaml", *_below(template / "conf"), *_below(template / ".dvc" / "plots")]
    files = {path.relative_to(template).as_posix(): path.read_bytes() for path in paths}
    files |= {f"stages/{path.name}": path.read_bytes() for path in sorted(stages.glob("*.py"))}
    files["dvc.yaml"] = _pipeline(_stages(template), (template / "dvc.yaml").read_text(encoding="utf-8")).encode()
    files[".gitignore"] = _IGNORED.encode()
    files |= {f"{folder}/.gitkeep": b"" for folder in _FOLDERS}
    files["README.md"] = _README.format(name=name).encode()
    return files


_FOLDERS = ("adapters", "embeddings", "indexes", "models", "evaluation")
"""Folders that the report depends on; without an adapter, for example, no stage makes the first."""


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _stages(template: Path) -> Mapping[str, Any]:
    return YAML(typ="safe").load((template / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def _is_code(dep: str) -> bool:
    return dep.startswith("sda_core/")


def _pipeline(stages: Iterable[str], text: str) -> str:
    """``dvc.yaml``, with a value in ``package.yaml`` in place of the files of ``sda_core`` that each stage lists."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = _WIDE, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(text[text.index("stages:") :])
    for name in stages:
        stage = data["stages"][name].get("do", data["stages"][name])
        for dep in [dep for dep in stage["deps"] if _is_code(dep)]:
            stage["deps"].remove(dep)
        stage["params"].append({PACKAGE: [f"code.{name}"]})
    written = io.StringIO()
    yaml.dump(data, written)
    return _DVC_COMMENT + written.getvalue()


def _package(files: Mapping[str, bytes]) -> bytes:
    """``package.yaml``: the version, a hash of the installed code of each stage, a hash of each written file."""
    template, _ = _template()
    code = {
        name: _sha256_of_code([dep for dep in stage.get("do", stage)["deps"] if _is_code(dep)])
        for name, stage in _stages(template).items()
    }
    data = {"version": __version__, "code": code, "files": {name: _sha256(content) for name, content in files.items()}}
    written = io.StringIO()
    yaml = YAML()
    yaml.width = _WIDE
    yaml.dump(data, written)
    return (_COMMENT + written.getvalue()).encode()


def _sha256_of_code(deps: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for dep in sorted(deps):
        path = _SDA_CORE.parent / dep
        for file in _below(path) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(_SDA_CORE.parent).as_posix()} {_sha256(file.read_bytes())}\n".encode())
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
