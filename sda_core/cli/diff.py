"""``sda diff``: changes between two runs, paired by user and seed, and whether they exceed the variation between seeds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, one_line_errors

Old = Annotated[str, typer.Argument(metavar="REV_A", help="The old run: a commit, branch, tag, or DVC experiment.")]
New = Annotated[
    str | None, typer.Argument(metavar="[REV_B]", help="The new run; by default the files of the workspace.", show_default=False)
]
Noise = Annotated[
    Path | None,
    typer.Option(
        "--noise",
        help="File with the variation between whole runs, adapters included, from `python -m experiments seed_noise`.",
        show_default="seed_noise.json of the project folder, if it exists",
    ),
]
Same = Annotated[
    bool, typer.Option("--same", help="Exit with code 1 unless the runs are the same within the variation between seeds.")
]


def diff(
    old: Old, new: New = None, noise: Noise = None, same: Same = False, root: Root = Path(), params: ParamsFile = None
) -> None:
    """Compare two runs: Hit and NDCG of every variant and recommender that both have, with paired 95 % intervals.

    Positions are read from the DVC cache (or a remote) as they were at each revision; rows are matched by user and
    target.
    If only the metrics of a revision are available, they are compared without intervals. To judge whether other seeds or
    another machine would change as much, each change is compared with the variation between the runs' seeds.
    Cut-off, tail definition and bootstrap are those of evaluate and report in params.yaml.
    """
    from sda_core.cli import noise as seeds
    from sda_core.cli.comparison import TwoRuns, hold_against_noise
    from sda_core.cli.revisions import workspace_at
    from sda_core.params import load_params

    with one_line_errors("diff", root if params is None else None), ExitStack() as opened:
        settings = load_params(params or root / "params.yaml")
        before, after = (opened.enter_context(workspace_at(root, revision)) for revision in (old, new))
        found = hold_against_noise(TwoRuns((before, after), (old, new), settings), noise, root)
        typer.echo("\n".join(found.lines))
        if same:
            seeds.check_same(found.judgement, found.keys, found.names)
