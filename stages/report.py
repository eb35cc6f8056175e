"""Write the report page and its paired comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, run_as_script, stage

WithCosts = Annotated[bool, typer.Option("--costs", help="Write costs/report.html, with time and memory, instead.")]
WithExperiments = Annotated[
    bool,
    typer.Option(
        "--experiments", help="Write the page with the tables of experiments/ to experiments/results/report.html instead."
    ),
]


def report(
    root: Root = Path(), params: ParamsFile = None, costs: WithCosts = False, experiments: WithExperiments = False
) -> None:
    """Compare the variants user by user, and write report/index.html with tables, curves and neighbours.

    Equal runs give the same page.  Time, memory and the commit, which differ between equal runs, are on the page of --costs.
    The results of the scripts in experiments/, which are not part of the pipeline, are on the page of --experiments.
    """
    from sda_core.steps.report import write

    with stage("report", root, params, keeps_cost=not (costs or experiments)) as run:
        run.counts = write(run.workspace, run.params, with_costs=costs, with_experiments=experiments)


if __name__ == "__main__":
    run_as_script(report)
