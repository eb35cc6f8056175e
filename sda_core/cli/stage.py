"""What every stage shares: its options, logging, errors as one line, and the closing line of counts and seconds."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sda_core import costs, log
from sda_core.artifacts import Workspace
from sda_core.cli.process import STARTED
from sda_core.cli.project import check_version
from sda_core.errors import ConfigError, SDAError, StorageError, failed_path, storage_errno, storage_error
from sda_core.params import Params, load_params

if TYPE_CHECKING:
    from sda_core.fetch.download import Verdict

Root = Annotated[
    Path,
    typer.Option(
        "--root", help="The project folder; all paths of the pipeline are relative to it.", show_default="the current folder"
    ),
]
ParamsFile = Annotated[
    Path | None, typer.Option("--params", help="The params file.", show_default="params.yaml of the project folder")
]
Variant = Annotated[str, typer.Option("--variant", help="Variant, e.g. id, zero_shot, lora, sda.")]
Recommender = Annotated[str, typer.Option("--recommender", help="Which recommender, e.g. pop, sasrec, vbpr, bert4rec.")]
OneOrAllRecommenders = Annotated[
    str | None,
    typer.Option(
        "--recommender", help="Which recommender, e.g. pop, sasrec, vbpr, bert4rec.", show_default="all of params.recommenders"
    ),
]


SomeRecommenders = Annotated[
    str | None,
    typer.Option(
        "--recommender",
        help="Recommenders, e.g. sasrec, or sasrec,vbpr for one after the other.",
        show_default="all of params.recommenders",
    ),
]


_process_begin: costs.Beginning | None = None  # of a process that is one stage's own, until that stage takes it


@dataclass
class StageRun:
    """What a stage works with, and what it has to say at its end."""

    params: Params
    workspace: Workspace
    counts: dict[str, object] = field(default_factory=dict)


@contextmanager
def one_line_errors(name: str, root: Path | None = None) -> Generator[None]:
    """Show a mistake of the user, or a disk that fails, as one line and exit with 1; a bug keeps its traceback.

    Where every process of a launch has the same error, process 0 says it.

    Args:
        name: the command.
        root: the project folder of a command that needs one.
    """
    try:
        if root is not None:
            _check_project(root)
        yield
    except SDAError as error:
        if log.is_main_process() or not error.known_to_all:
            _say(name, error)
        raise typer.Exit(1) from None
    except OSError as error:
        if (failure := _failure_of_storage(error)) is None:
            raise
        _say(name, failure)
        raise typer.Exit(1) from None


def _check_project(root: Path) -> None:
    """See that a folder is a project.

    Raises:
        ConfigError: it is not.
    """
    folder, workspace = root if root != Path() else Path.cwd(), Workspace(root)
    where, problem = str(folder), "no such folder"
    if root.is_dir():
        if any(path.exists() for path in (root / "params.yaml", workspace.raw, workspace.filtered)):
            return
        where, problem = str(folder / "params.yaml"), f"no such file, so there is no SDA project in {folder}"
    error = ConfigError(where, problem, "cd to the project folder, or pass it with --root")
    error.known_to_all = _is_another_process()
    raise error


def check_variant(root: Path, variant: str, needed: Path) -> None:
    """See that a variant is one of the project's, where what a command needs of it is missing; ``dvc repro`` makes no other.

    Raises:
        ConfigError: it is not.
    """
    settings = root / "params.yaml"
    if needed.exists() or not settings.is_file():
        return
    known = load_params(settings).variants
    if variant not in known:
        raise ConfigError(
            "--variant", f"{variant!r} is not among the variants of params.yaml ({', '.join(known)})", "name one of them"
        )


def _failure_of_storage(error: OSError) -> StorageError | None:
    """The line for a path that no reader or writer has spoken about, or for an output that takes no more."""
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in str(error):  # what tempfile makes of a full disk
        return StorageError("temporary folder", "cannot be written", "free some space, or name another folder in TMPDIR")
    if error.filename is not None:
        return storage_error(error, failed_path(error) or ".", "used")
    if storage_errno(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # files are written through what names them
        with suppress(OSError, ValueError):  # what the output still holds back would fail once more at Python's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return storage_error(error, "standard output")
    return storage_error(error, "a file of this run", "used")


def _say(name: str, error: SDAError) -> None:
    with suppress(OSError):  # stderr itself may be full or closed
        typer.echo(f"sda {name}: error: {error}".replace("sda :", "sda:"), err=True)


def say_verdicts(name: str, verdicts: Iterable[Verdict]) -> NoReturn:
    """Show what a check found, problems as errors of a command, and exit: with 1 if there is a problem, else with 0."""
    found = list(verdicts)
    for verdict in found:
        typer.echo(verdict.line if verdict.ok else f"sda {name}: error: {verdict.line}", err=not verdict.ok)
    raise typer.Exit(0 if all(verdict.ok for verdict in found) else 1)


@contextmanager
def stage(
    name: str, root: Path, params: Path | None, *, keeps_cost: bool = True, check: Callable[[Params], None] | None = None
) -> Generator[StageRun]:
    """Run the body of a stage; where it ends well, say its counts and seconds and keep its cost (:mod:`sda_core.costs`).

    Args:
        name: the stage's name on the command line.
        root: the project folder.
        params: the params file, or None for ``params.yaml`` of the project folder.
        keeps_cost: False for what is not a run of the pipeline.
        check: what else the params must fulfil; its error is shown as theirs.
    """
    log.configure()
    begin = _take_begin()
    with one_line_errors(name, root if params is None else None):
        run = StageRun(_read(root, params or root / "params.yaml", check), Workspace(root))
        yield run
        measured = costs.measure(begin, name, run.counts)
        counts = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in run.counts.items()
        )
        logging.getLogger("stages").info("%s: %s (%.1f s)", name, counts, measured.seconds)
        if keeps_cost and log.is_main_process():
            costs.keep(measured, run.workspace.costs)


def for_each(
    name: str,
    root: Path,
    params: Path | None,
    whose: Iterable[str],
    run_one: Callable[[Workspace, Params, str], dict[str, object]],
) -> None:
    """Run a stage once for each of several names, in this process; one that fails stops no other.

    Args:
        name, root, params: see :func:`stage`.
        whose: the names.
        run_one: the body of the stage; returns its counts.

    Raises:
        typer.Exit: one of them failed, and has said why.
    """
    failed = False
    for one in whose:
        try:
            with stage(name, root, params) as run:
                run.counts = run_one(run.workspace, run.params, one)
        except typer.Exit:
            failed = True
    if failed:
        raise typer.Exit(1)


def _take_begin() -> costs.Beginning:
    global _process_begin
    begin, _process_begin = _process_begin or costs.beginning_now(), None
    return begin


def one_stage_a_process() -> None:
    """Say that this process is there for one stage alone: its start and its imports count as the stage's."""
    global _process_begin
    _process_begin = costs.beginning_at(STARTED)


def _read(root: Path, path: Path, check: Callable[[Params], None] | None) -> Params:
    """The params, checked; of a launch's processes on one machine, which read the same file, the first says what is wrong."""
    try:
        check_version(root)
        params = load_params(path)
        if check is not None:
            check(params)
        return params
    except SDAError as error:
        error.known_to_all = _is_another_process()
        raise


def _is_another_process() -> bool:
    """Whether the first process of a launch on this machine sees the same files and says what is wrong with them."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def run_as_script(command: Callable[..., None]) -> None:
    """Run one stage's command (``python -m stages.filter``)."""
    one_stage_a_process()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line whose output shows any text; a help page that cannot be written is one line as well."""
    log.buffer_output()
    log.show_any_text()
    try:
        app()
    except OSError as error:
        if (failure := _failure_of_storage(error)) is None:
            raise
        _say("", failure)
        raise SystemExit(1) from None
