"""``sda search``: items near a text, embedded by the model that made the item vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sda_core.cli.catalogue import Top
from sda_core.cli.stage import Root, check_variant, one_line_errors


def search(
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Text to search for, e.g. striped blue shirt.")],
    variant: Annotated[
        str, typer.Option("--variant", help="Variant whose vectors are compared; its adapter embeds the text.")
    ] = "sda",
    against: Annotated[
        Literal["text", "image"], typer.Option("--against", help="Compare with the items' texts or with their images.")
    ] = "text",
    top: Top = 10,
    root: Root = Path(),
) -> None:
    """Show the items nearest to a text, with their cosine and title.

    The text takes the place of the title in the prompt, and the backbone embeds it with the variant's adapter.
    The page of `sda explore` does the same for several variants side by side.
    """
    from sda_core.explore.finished_run import FinishedRun

    with one_line_errors("search", root):
        run = FinishedRun(root)
        check_variant(root, variant, run.workspace.embeddings(variant))
        for item, cosine in run.near_text(" ".join(text), variant, against, top):
            shown = run.items[item]
            typer.echo(f"{cosine:7.4f}  {shown.raw_item_id}  {shown.title}")
