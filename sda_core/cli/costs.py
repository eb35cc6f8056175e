"""``sda costs``: the costs of the last run of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, one_line_errors

AsJSON = Annotated[bool, typer.Option("--json", help="Print all recorded numbers as JSON.")]


def costs(root: Root = Path(), params: ParamsFile = None, as_json: AsJSON = False) -> None:
    """Show seconds, processor time, memory and speed of the last run of each stage, for the variants of params.yaml.

    Each run of a stage adds a line to costs/stages.jsonl, which Git and DVC ignore; results that DVC
    restored from its cache have no line. `sda report --costs` writes the report with these numbers.
    """
    from sda_core import costs as kept
    from sda_core.artifacts import Workspace
    from sda_core.params import load_params

    with one_line_errors("costs", root if params is None else None):
        settings = load_params(params or root / "params.yaml")
        rows = kept.read_latest(Workspace(root).costs, settings.variants, settings.recommenders)
        typer.echo(kept.as_json(rows) if as_json else "\n".join(kept.table(rows)))
