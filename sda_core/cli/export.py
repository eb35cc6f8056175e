"""``sda export``: write the data and vectors of a finished run in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import Root, check_variant, one_line_errors
from sda_core.exchange import Format


def export(
    target: Annotated[Format, typer.Option("--format", help="Target format.")],
    to: Annotated[
        Path, typer.Option("--to", help="The folder to create; its name becomes the data set's name.", metavar="FOLDER")
    ],
    variant: Annotated[str, typer.Option("--variant", help="Variant whose vectors are exported; `id` exports none.")] = "sda",
    root: Root = Path(),
) -> None:
    """Write interactions with their split, items and one variant's vectors for MMRec, RecBole or Hugging Face datasets.

    An existing folder is replaced if this command made it; otherwise it is an error.
    """
    from sda_core.artifacts import Workspace
    from sda_core.exchange.export import export as write
    from sda_core.exchange.shop import Shop

    with one_line_errors("export", root):
        workspace = Workspace(root)
        check_variant(root, variant, workspace.embeddings(variant))
        written = write(Shop.read(workspace, variant), target, to)
        typer.echo(f"{to}: " + ", ".join(f"{name} {value}" for name, value in written.items()))
