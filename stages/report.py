"""One page that a reader understands in a minute, and the paired comparisons behind it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, run_as_script, stage

BASELINES = ("id", "zero_shot", "lora")

WithCosts = Annotated[bool, typer.Option("--costs", help="Write the page with what the run cost to costs/report.html instead.")]
WithExperiments = Annotated[
    bool,
    typer.Option(
        "--experiments", help="Write the page with the tables of experiments/ to experiments/results/report.html instead."
    ),
]


def report(
    root: Root = Path(), params: ParamsFile = None, costs: WithCosts = False, experiments: WithExperiments = False
) -> None:
    """Compare the variants user by user, gather tables, curves and neighbours, and write report/index.html.

    The page of the pipeline is the same for equal runs.  Seconds, memory and the commit, which differ between equal runs, are
    on the page of --costs; the results of the scripts in experiments/, which are not part of the pipeline, are on the page of
    --experiments.
    """
    from sda_core import costs as kept
    from sda_core import evaluation
    from sda_core import report as page
    from sda_core.artifacts import INTERACTIONS, ITEMS, POSITIONS, replace_directory, write_json, write_text
    from sda_core.errors import ConfigError
    from sda_core.index import load_index
    from sda_core.variants import indexed_variants

    with stage("report", root, params, keeps_cost=not (costs or experiments)) as run:
        if costs and experiments:
            raise ConfigError("--costs and --experiments", "each write a page of their own", "name one of them")
        workspace, section, variants = run.workspace, run.params.report, run.params.variants
        positions = {
            (variant, recommender): POSITIONS.read(workspace.positions(variant, recommender))
            for recommender in run.params.recommenders
            for variant in variants
        }
        evaluation.check_same_negatives(workspace.positions(*key) for key in positions)
        interactions = INTERACTIONS.read(workspace.interactions)
        comparisons = evaluation.compare_variants(
            positions, BASELINES, interactions, run.params.evaluate, section.cutoff, ITEMS.count(workspace.items)
        )
        shown = page.example_items(workspace, section)
        neighbors = {
            variant: load_index(workspace.index(variant)).neighbor_lists(shown, section.num_neighbors)
            for variant in indexed_variants(run.params)
        }
        spent = kept.read_latest(workspace.costs, variants, run.params.recommenders) if costs else ()
        found = page.read_experiments(workspace.experiments) if experiments else ()
        commit = _commit(root) if costs or experiments else None
        data = page.collect(workspace, run.params, comparisons, neighbors, commit=commit, costs=spent, experiments=found)
        if costs:
            write_text(workspace.costs_page, page.render(data))
            run.counts = {"page": workspace.costs_page, "stages": len(spent)}
            return
        if experiments:
            write_text(workspace.experiments_page, page.render(data))
            run.counts = {"page": workspace.experiments_page, "experiments": len(found)}
            return
        with replace_directory(workspace.report.parent) as folder:
            write_text(folder / workspace.report.name, page.render(data))
            write_json(folder / workspace.pairs.name, evaluation.flat_comparisons(comparisons))
        gains = evaluation.flat_gains(comparisons, tuple(run.params.train_adapter.variants), ("zero_shot", "id"))
        write_json(workspace.comparisons, gains)
        run.counts = {"page": workspace.report, "comparisons": len(comparisons)}


def _commit(root: Path) -> str | None:
    """The project's Git commit, and whether tracked files differ from it; None where Git does not track the project."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)  # noqa: S603
        except FileNotFoundError:  # no Git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "params.yaml"):  # a folder inside somebody's checkout of something else is not that project
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit} with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else commit


if __name__ == "__main__":
    run_as_script(report)
