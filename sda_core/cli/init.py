"""``sda init`` and ``sda upgrade``: create a project folder, and upgrade it to another version of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core import __version__
from sda_core.cli import project
from sda_core.cli.stage import Root, one_line_errors

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The new project folder; an existing one must be empty.", show_default=False)
]


def init(folder: Folder) -> None:
    """Create a project in a new folder: stages, settings, dvc.yaml; initialises Git and DVC if needed.

    `dvc repro` in it runs the pipeline on the built-in shop.
    """
    with one_line_errors("init"):
        project.create(folder)
    typer.echo(f"{folder}: ready; go there and run `dvc repro`")


def upgrade(root: Root = Path()) -> None:
    """Upgrade a project of `sda init` to the installed version; files that you edited are kept.

    `dvc repro` then re-runs the stages whose code has changed.
    """
    with one_line_errors("upgrade", root):
        done = project.upgrade(root)
    typer.echo(f"from {done.version} to {__version__}: {len(done.replaced)} files written")
    if done.moved:
        typer.echo(f"{', '.join(done.moved)}: the seed of each recommender was moved to the list train_recommender.seeds")
    if done.kept:
        typer.echo(f"edited by you and kept: {', '.join(done.kept)}")
