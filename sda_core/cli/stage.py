"""Code shared by all stages: options, logging, errors in one line, and the closing line with counts and seconds."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

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
Variant = Annotated[str, typer.Option("--variant", help="A variant of params.yaml that this stage makes or uses.")]
Recommender = Annotated[str, typer.Option("--recommender", help="Which recommender, e.g. pop, nearest, sasrec, vbpr.")]
OneOrAllRecommenders = Annotated[
    str | None,
    typer.Option(
        "--recommender", help="Which recommender, e.g. pop, nearest, sasrec, vbpr.", show_default="all of params.recommenders"
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


_process_begin: costs.Beginning | None = None  # set in a process for a single stage, until that stage uses it


@dataclass
class StageRun:
    """The inputs of a stage, and the counts it reports at its end."""

    params: Params
    workspace: Workspace
    counts: dict[str, object] = field(default_factory=dict)


@contextmanager
def one_line_errors(name: str, root: Path | None = None) -> Generator[None]:
    """Context that reports a user's mistake or a storage failure in one line and exits with 1; a bug keeps its traceback.

    If every process of a launch has the same error, only process 0 reports it.

    Args:
        name: name of the command.
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
        if (failure := _storage_failure(error)) is None:
            raise
        _say(name, failure)
        raise typer.Exit(1) from None


def _check_project(root: Path) -> None:
    """Check that a folder is a project.

    Raises:
        ConfigError: it is not a project.
    """
    folder, workspace = root if root != Path() else Path.cwd(), Workspace(root)
    where, problem = str(folder), "is a file, not a folder" if root.is_file() else "no such folder"
    if root.is_dir():
        if any(path.exists() for path in (root / "params.yaml", workspace.raw, workspace.filtered)):
            return
        where, problem = str(folder / "params.yaml"), f"no such file, so there is no SDA project in {folder}"
    error = ConfigError(where, problem, "cd to the project folder, or pass it with --root")
    error.known_to_all = _is_another_process()
    raise error


def check_variant(root: Path, variant: str, needed: Path, recommender: str | None = None) -> None:
    """Check that a variant is part of the project if its files are missing, because ``dvc repro`` makes no others.

    Args:
        root: the project folder.
        variant: the variant.
        needed: the file or folder that a command needs; if it exists, nothing is checked.
        recommender: the recommender that made it, which is checked, too; None if none did.

    Raises:
        ConfigError: the variant or the recommender is not in the project.
    """
    settings = root / "params.yaml"
    if needed.exists() or not settings.is_file():
        return
    params = load_params(settings)
    asked = {"variant": (variant, params.variants), "recommender": (recommender, params.recommenders)}
    for name, (value, known) in asked.items():
        if value is not None and value not in known:
            problem = f"{value!r} is not among the {name}s of params.yaml ({', '.join(known)})"
            raise ConfigError(f"--{name}", problem, "name one of them")


def _storage_failure(error: OSError) -> StorageError | None:
    """The error for a path that no reader or writer has reported, or for an output stream that cannot be written."""
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in str(error):  # tempfile's error on a full disk
        return StorageError("temporary folder", "cannot be written", "free some space, or name another folder in TMPDIR")
    if error.filename is not None:
        return storage_error(error, failed_path(error) or ".", "used")
    if storage_errno(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # no path: an output stream
        with suppress(OSError, ValueError):  # the buffered output would fail again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return storage_error(error, "standard output")
    return storage_error(error, "a file of this run", "used")


def _say(name: str, error: SDAError) -> None:
    with suppress(OSError):  # stderr itself may be full or closed
        typer.echo(f"sda {name}: error: {error}".replace("sda :", "sda:"), err=True)


def say_verdicts(name: str, verdicts: Iterable[Verdict]) -> NoReturn:
    """Print the results of a check, problems as errors of a command, and exit with 1 if there is a problem, else 0."""
    found = list(verdicts)
    for verdict in found:
        typer.echo(verdict.line if verdict.ok else f"sda {name}: error: {verdict.line}", err=not verdict.ok)
    raise typer.Exit(0 if all(verdict.ok for verdict in found) else 1)


@contextmanager
def stage(
    name: str, root: Path, params: Path | None, *, keeps_cost: bool = True, check: Callable[[Params], None] | None = None
) -> Generator[StageRun]:
    """Context for the body of a stage; on success it logs counts and seconds and records the cost (:mod:`sda_core.costs`).

    Args:
        name: the stage's name on the command line.
        root: the project folder.
        params: the params file; None: ``params.yaml`` of the project folder.
        keeps_cost: False for commands that are not stages of the pipeline.
        check: additional check of the params; its error is reported like those of the params.
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
    """Run a stage for each of several names, in this process; a failure does not stop the others.

    Args:
        name, root, params: see :func:`stage`.
        whose: the names.
        run_one: the body of the stage; returns its counts.

    Raises:
        typer.Exit: at least one run failed and has reported its error.
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
    """Declare that this process runs a single stage, so that its start and imports count as cost of the stage."""
    global _process_begin
    _process_begin = costs.beginning_at(STARTED)


def _read(root: Path, path: Path, check: Callable[[Params], None] | None) -> Params:
    """Read and check the params; among the processes of a launch on one machine, only the first reports an error."""
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
    """Whether another process of this launch on this machine reads the same files and reports their errors."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def run_as_script(command: Callable[..., None]) -> None:
    """Run one stage's command (``python -m stages.filter``)."""
    one_stage_a_process()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command line whose output may contain any text; an unwritable help page is also reported in one line."""
    log.buffer_output()
    log.show_any_text()
    try:
        run_arguments(app)
    except OSError as error:
        if (failure := _storage_failure(error)) is None:
            raise
        _say("", failure)
        raise SystemExit(1) from None


# ------------------------------------------------------------------------------------- mistakes in options and arguments
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The base class of the mistakes that typer finds; it is in click or, in newer releases, in a private copy of click."""


def run_arguments(app: typer.Typer, arguments: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
    """Run a command line; a mistake in its options or arguments is reported in one line, with exit status 1.

    Args:
        app: the commands.
        arguments: the arguments after the program's name; None: those of this process.
        program: the program's name in messages; None: as it was started.

    Raises:
        SystemExit: always.
    """
    try:
        status = app(arguments, prog_name=program, standalone_mode=False)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help of a program that was started without a command
            error.show()  # pyright: ignore[reportAttributeAccessIssue]
            raise SystemExit(error.exit_code) from None  # pyright: ignore[reportAttributeAccessIssue]
        if not _is_another_process():
            words = sys.argv[1:] if arguments is None else arguments
            with suppress(OSError):  # stderr itself may be full or closed
                typer.echo(usage_message(error, app, words, program), err=True)
        raise SystemExit(1) from None
    except typer.Abort:
        typer.echo("Aborted!", err=True)
        raise SystemExit(1) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def usage_message(error: Any, app: typer.Typer, words: Sequence[str], program: str | None = None) -> str:
    """The line for a mistake in options or arguments: which one, what was given, what is expected, whose help explains it.

    Args:
        error: a :data:`UsageError`.
        app, words, program: see :func:`run_arguments`.
    """
    command, path = getattr(error.ctx, "command", None), getattr(error.ctx, "command_path", None)
    if error.ctx is None:  # typer does not say of which command an option without its value is
        command, path = typer.main.get_command(app), program or _program()
        names = getattr(command, "commands", {})
        if (name := next((word for word in words if word in names), None)) is not None:
            command, path = names[name], f"{path} {name}"
    text = " ".join(f"{path}: error: {_mistake(error, command)}; see `{path} --help`".split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _program() -> str:
    """The name of the running program, as in its help."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {module.name.removesuffix('.__main__')}" if module is not None else Path(sys.argv[0]).name


def _mistake(error: Any, command: Any) -> str:
    """The place of a mistake, what was given, and what is expected."""
    message = error.format_message().removesuffix(".")
    parameters = list(getattr(command, "params", ()))
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        near = f" (similar are {', '.join(sorted(error.possibilities))})" if error.possibilities else ""
        return f"{option}: is not an option of this command{near}"
    if option is not None:
        meant = next((parameter for parameter in parameters if option in parameter.opts), None)
        return f"{option}: takes no value" if "not take" in message else f"{option}: has no value{_meaning(meant, error.ctx)}"
    parameter = getattr(error, "param", None)
    if parameter is None:
        return _misplaced_word(message, parameters)
    where = max(parameter.opts, key=len) if parameter.param_type_name == "option" else _argument(parameter)
    if message.startswith("Missing "):
        return f"{where}: is missing{_meaning(parameter, error.ctx)}"
    problem = error.message.removeprefix("Value error, ").removeprefix("Input ").removesuffix(".").split(", unable to parse")[0]
    found = getattr(error.__cause__, "errors", list)()  # of pydantic, which reads the values in newer releases of typer
    given = repr(found[0]["input"]) if found else ""
    return f"{where}: {problem}" + (f" (got {given})" if given and given not in problem else "")


def _misplaced_word(message: str, parameters: Iterable[Any]) -> str:
    """The problem of a word that is neither a command nor an argument."""
    if (unknown := re.fullmatch(r"No such command (.+?)\.?(?: Did you mean (.*)\?)?", message, re.DOTALL)) is not None:
        near = f" (similar are {unknown[2]})" if unknown[2] else ""
        return f"COMMAND: {unknown[1]} is not a command{near}"
    if (extra := re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)", message, re.DOTALL)) is not None:
        names = [_argument(parameter) for parameter in parameters if parameter.param_type_name == "argument"]
        return f"{extra[1]!r} is not expected; this command takes {' '.join(names) or 'options only'}"
    return message


def _argument(parameter: Any) -> str:
    return (parameter.metavar or parameter.name).upper()


def _meaning(parameter: Any, context: Any) -> str:
    """The meaning of the value of an option or argument: its choices, or else the first sentence of its help."""
    name_choices = getattr(parameter, "get_missing_message", None)  # absent in the releases of typer on top of click
    choices = (name_choices(ctx=context) or "") if name_choices is not None else ""
    text = choices.removeprefix("Choose from:") or getattr(parameter, "help", None) or ""
    first = re.split(r"\. (?=[A-Z])", " ".join(text.split()))[0].removesuffix(".")
    return f", expected: {'one of ' if choices else ''}{first[:1].lower()}{first[1:]}" if first else ""
