"""What every stage shares: its options, logging, errors as one line, and the closing line of counts and seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from sda_core import costs, log
from sda_core.artifacts import Workspace
from sda_core.errors import SDAError
from sda_core.params import Params, load_params
from stages import STARTED

Root = Annotated[
    Path,
    typer.Option("--root", help="The project folder: every path of the pipeline is below it.", show_default="the current folder"),
]
ParamsFile = Annotated[
    Path | None, typer.Option("--params", help="The params file.", show_default="params.yaml of the project folder")
]
Variant = Annotated[str, typer.Option("--variant", help="Which item vectors, e.g. id, zero_shot, lora, sda.")]
Recommender = Annotated[str, typer.Option("--recommender", help="Which recommender, e.g. pop, sasrec, vbpr, bert4rec.")]
OneOrAllRecommenders = Annotated[
    str | None,
    typer.Option(
        "--recommender", help="Which recommender, e.g. pop, sasrec, vbpr, bert4rec.", show_default="all of params.recommenders"
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
def one_line_errors(name: str) -> Iterator[None]:
    """Show an :class:`SDAError` as one line and exit with 1; a bug keeps its traceback.

    Where every process of a launch has the same error, process 0 says it.
    """
    try:
        yield
    except SDAError as error:
        if log.is_main_process() or not error.known_to_all:
            typer.echo(f"sda {name}: error: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def stage(name: str, root: Path, params: Path | None, *, keeps_cost: bool = True) -> Iterator[StageRun]:
    """Run the body of a stage; where it ends well, say its counts and seconds and keep its cost (:mod:`sda_core.costs`).

    Args:
        name: the stage's name on the command line.
        root: the project folder.
        params: the params file, or None for ``params.yaml`` of the project folder.
        keeps_cost: False for what is no run of the pipeline.
    """
    log.configure()
    begin = _take_begin()
    with one_line_errors(name):
        run = StageRun(_read(params or root / "params.yaml"), Workspace(root))
        yield run
        measured = costs.measure(begin, name, run.counts)
        counts = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in run.counts.items()
        )
        logging.getLogger("stages").info("%s: %s (%.1f s)", name, counts, measured.seconds)
        if keeps_cost and log.is_main_process():
            costs.keep(measured, run.workspace.costs)


def _take_begin() -> costs.Beginning:
    global _process_begin
    begin, _process_begin = _process_begin or costs.here(), None
    return begin


def one_stage_a_process() -> None:
    """Say that this process is there for one stage alone: its start and its imports count as the stage's."""
    global _process_begin
    _process_begin = costs.at_start(STARTED)


def _read(path: Path) -> Params:
    """The params; of a launch's processes on one machine, which all read the same file, the first one says what is wrong."""
    try:
        return load_params(path)
    except SDAError as error:
        error.known_to_all = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def run_as_script(command: Callable[..., None]) -> None:
    """Run one stage's command (``python -m stages.filter``)."""
    one_stage_a_process()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
