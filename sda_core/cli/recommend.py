"""What a trained recommender makes of a history typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.catalogue import ITEM_HELP, ByNumber, Catalogue
from sda_core.cli.stage import Root, check_variant, one_line_errors


def recommend(
    items: Annotated[
        list[str],
        typer.Argument(metavar="ITEM...", help=f"The history, oldest first. {ITEM_HELP}"),
    ],
    variant: Annotated[str, typer.Option("--variant", help="Which item vectors.")] = "sda",
    recommender: Annotated[str, typer.Option("--recommender", help="sasrec, bert4rec or pop.")] = "sasrec",
    top: Annotated[int, typer.Option("--top", min=1, help="How many.")] = 10,
    root: Root = Path(),
    by_number: ByNumber = False,
) -> None:
    """Show what a trained recommender would show next to somebody with this history, with score and title.

    Items of the history are left out.  The recommender has to score a history alone, as sasrec, bert4rec and pop do.  Of several
    seeds the first of train_recommender.seeds is asked.
    """
    from sda_core import ranking, recommenders
    from sda_core.artifacts import Workspace
    from sda_core.errors import ConfigError
    from sda_core.params import load_params
    from sda_core.traits import scores_histories, seeds_of

    with one_line_errors("recommend", root):
        workspace = Workspace(root)
        catalogue = Catalogue.read(workspace)
        history = [catalogue.number(item, by_number) for item in items]
        check_variant(root, variant, workspace.recommender(variant, recommender))
        trained = load_params(root / "params.yaml").train_recommender
        folder = workspace.model(variant, recommender, seeds_of(trained.of(recommender), trained.seeds)[0])
        section = recommenders.saved_params(folder)
        if not scores_histories(section):
            problem = f"{recommender} learns a vector for each user of the training and has none for a history typed by hand"
            raise ConfigError("--recommender", problem, "use sasrec or bert4rec, which read histories, or pop")
        vectors = recommenders.read_item_vectors(workspace.embeddings(variant), section)
        found = ranking.recommend_after(folder, vectors, history, top)
        for number in history:
            typer.echo(f"history  {catalogue.line(number)}")
        for number, score in found:
            typer.echo(f"{score:7.4f}  {catalogue.line(number)}")
