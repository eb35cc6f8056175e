"""Fetch the raw files of the dataset, or let the built-in shop write them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.artifacts import Workspace
from sda_core.cli.stage import ParamsFile, Root, one_line_errors, run_as_script, stage

Check = Annotated[
    bool,
    typer.Option("--check", help="Only compare data/raw with its manifest and local sources; exit code 1 if they differ."),
]


def download(root: Root = Path(), params: ParamsFile = None, check: Check = False) -> None:
    """Fetch the raw reviews and metadata into data/raw, whole and checked (or write the built-in shop)."""
    from sda_core.fetch.download import download as fetch
    from sda_core.fetch.download import verify
    from sda_core.fetch.local_files import RAW, watches

    if check:
        with one_line_errors("download", root):
            verdicts = verify(Workspace(root).raw, root)
        for verdict in verdicts:
            typer.echo(verdict.line if verdict.ok else f"sda download: error: {verdict.line}", err=not verdict.ok)
        raise typer.Exit(0 if all(verdict.ok for verdict in verdicts) else 1)
    with stage("download", root, params, check=watches(root, RAW)) as run:
        manifest = fetch(run.params.dataset, run.params.download, run.workspace.raw, root)
        run.counts = {entry["role"]: f"{entry['name']} {entry['bytes']} bytes" for entry in manifest["files"]}


if __name__ == "__main__":
    run_as_script(download)
