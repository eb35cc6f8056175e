"""``sda verify``: check that the artifacts of a project are complete and consistent."""

from __future__ import annotations

from pathlib import Path

import typer

from sda_core.cli.stage import ParamsFile, Root, one_line_errors


def verify(root: Root = Path(), params: ParamsFile = None) -> None:
    """Check every artifact against its schema, hashes and invariants; one line for each, exit code 1 if there is a problem.

    An artifact that has not been made yet is reported as absent, which is not a problem. Changes nothing and needs no backbone.
    """
    from sda_core import verification
    from sda_core.artifacts import Workspace
    from sda_core.params import load_params

    with one_line_errors("verify", root if params is None else None):
        counts = dict.fromkeys(("ok", "absent", "skipped", "problem"), 0)
        for found in verification.verify(Workspace(root), load_params(params or root / "params.yaml")):
            counts[found.status] += 1
            typer.echo(f"{found.status:<8} {found.path:<38} {found.text}")
        typer.echo(", ".join(f"{number} {status}" for status, number in counts.items()))
        if counts["problem"]:
            raise typer.Exit(1)
