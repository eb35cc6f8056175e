"""Download the raw files of the dataset, or write those of the built-in shop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.artifacts import Workspace
from sda_core.cli.stage import ParamsFile, Root, one_line_errors, run_as_script, say_verdicts, stage

Check = Annotated[
    bool,
    typer.Option("--check", help="Only compare data/raw with its manifest and local sources; exit code 1 if they differ."),
]


def download(root: Root = Path(), params: ParamsFile = None, check: Check = False) -> None:
    """Download and check the raw reviews and metadata in data/raw, or write the built-in shop."""
    from sda_core.artifacts import TRUTH
    from sda_core.data.demo import truth_of
    from sda_core.fetch.download import counts_of, verify
    from sda_core.fetch.download import download as fetch
    from sda_core.local_files import RAW, watches

    if check:
        with one_line_errors("download", root):
            verdicts = verify(Workspace(root).raw, root)
        say_verdicts("download", verdicts)
    with stage("download", root, params, check=watches(root, RAW)) as run:
        run.counts = counts_of(fetch(run.params.dataset, run.params.download, run.workspace.raw, root))
        TRUTH.write(truth_of(run.params.dataset), run.workspace.truth)


if __name__ == "__main__":
    run_as_script(download)
