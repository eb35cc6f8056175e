"""What changed between two runs, user by user: the intervals that `dvc metrics diff` does not have."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from stages._stage import ParamsFile, Root, one_line_errors

Old = Annotated[str, typer.Argument(metavar="REV_A", help="Before: a commit, branch, tag, or a DVC experiment.")]
New = Annotated[
    str | None, typer.Argument(metavar="[REV_B]", help="After; left out: the files of the workspace.", show_default=False)
]


def diff(old: Old, new: New = None, root: Root = Path(), params: ParamsFile = None) -> None:
    """Compare two runs: Hit and NDCG of every variant and recommender that both have, with paired 95 % intervals.

    Positions are read from the DVC cache (or a remote) as they were at each revision; users are joined by user and target.
    The settings of evaluate and report in params.yaml say how: cut-off, definition of tail, bootstrap.
    """
    from sda_core import evaluation
    from sda_core.params import load_params
    from stages import _revisions as revisions

    with one_line_errors("diff"), ExitStack() as opened:
        settings = load_params(params or root / "params.yaml")
        before, after = (opened.enter_context(revisions.workspace_at(root, revision)) for revision in (old, new))
        first, second = revisions.positions(before, old), revisions.positions(after, new)
        revisions.check_same_protocol((before, old), (after, new))
        interactions = revisions.interactions(after, before)
        changes = evaluation.compare_runs(
            first, second, interactions, settings.evaluate, settings.report.cutoff, revisions.num_items(after, before)
        )
        typer.echo("\n".join(revisions.table(changes, first, second, (old, new), settings.evaluate.bootstrap_samples)))
