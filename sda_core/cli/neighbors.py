"""``sda neighbors``: the nearest neighbours of an item."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.catalogue import ITEM_HELP, ByNumber, Catalogue, Top
from sda_core.cli.stage import Root, check_variant, one_line_errors


def neighbors(
    item: Annotated[str, typer.Argument(metavar="ITEM", help=ITEM_HELP)],
    variant: Annotated[str, typer.Option("--variant", help="Variant whose vectors are compared.")] = "sda",
    top: Top = 10,
    root: Root = Path(),
    by_number: ByNumber = False,
) -> None:
    """List an item's nearest neighbours, with their cosine and title."""
    from sda_core.artifacts import Workspace
    from sda_core.errors import ConfigError, DataError
    from sda_core.index import load_index
    from sda_core.item_vectors import read_vectors
    from sda_core.params import load_params

    with one_line_errors("neighbors", root):
        workspace = Workspace(root)
        catalogue = Catalogue.read(workspace)
        number = catalogue.number(item, by_number)
        if variant == "id":
            raise ConfigError("--variant", "id has no embeddings; its recommenders learn from interactions alone", "name another")
        check_variant(root, variant, workspace.index(variant))
        if not workspace.index(variant).exists() and variant in load_params(root / "params.yaml").control_embeddings.variants:
            raise ConfigError(
                "--variant", f"{variant} is in control_embeddings, whose variants have no index", "use e.g. zero_shot"
            )
        index = load_index(workspace.index(variant))
        if (vectors := read_vectors(workspace.embeddings(variant))) is not None:
            index.check_vectors(vectors[1:])
        if number not in index.item_ids:
            raise DataError(f"item {item!r}", f"has no vector in {variant}, so it has no neighbours", "choose another item")
        ids, cosines = index.neighbors(number, top)
        typer.echo(catalogue.line(number))
        for near, cosine in zip(ids.tolist(), cosines.tolist(), strict=True):
            typer.echo(f"{cosine:7.4f}  {catalogue.line(near)}")
