"""``sda recommend``: recommendations of a trained recommender for a given history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.catalogue import ITEM_HELP, ByNumber, Catalogue, Top
from sda_core.cli.stage import Root, check_variant, one_line_errors


def recommend(
    items: Annotated[
        list[str],
        typer.Argument(metavar="ITEM...", help=f"The history, oldest first. {ITEM_HELP}"),
    ],
    variant: Annotated[str, typer.Option("--variant", help="Variant that the recommender was trained on.")] = "sda",
    recommender: Annotated[str, typer.Option("--recommender", help="Recommender: sasrec, bert4rec, nearest or pop.")] = "sasrec",
    top: Top = 10,
    root: Root = Path(),
    by_number: ByNumber = False,
) -> None:
    """List the recommendations of a trained recommender for a history, with score and title.

    Items of the history are not recommended.  Only recommenders that do not need a known user can be used: sasrec, bert4rec,
    nearest, pop.  The one of the first seed in train_recommender.seeds is used.
    """
    from sda_core.artifacts import Workspace
    from sda_core.errors import ConfigError
    from sda_core.explore.finished_run import recommend as recommend_after

    with one_line_errors("recommend", root):
        workspace = Workspace(root)
        catalogue = Catalogue.read(workspace)
        history = [catalogue.number(item, by_number) for item in items]
        check_variant(root, variant, workspace.recommender(variant, recommender), recommender)
        if not set(catalogue.names) - {*history}:
            problem = f"the history has all {len(catalogue.names)} items, so none is left to recommend"
            raise ConfigError("ITEM", problem, "leave some out")
        found = recommend_after(workspace, history, variant, recommender, top)
        for number in history:
            typer.echo(f"history  {catalogue.line(number)}")
        for number, score in found:
            typer.echo(f"{score:7.4f}  {catalogue.line(number)}")
