"""Write the three pages of a run: the pipeline's with paired comparisons, that with costs, and that with experiments."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from sda_core import costs as kept
from sda_core import evaluation
from sda_core import report as page
from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace, replace_directory, write_json, write_text
from sda_core.errors import ConfigError
from sda_core.evaluation import Comparison
from sda_core.index import load_index
from sda_core.params import Params
from sda_core.report.model import Experiment, ReportData
from sda_core.variants import controls, indexed_variants, reported


def write(workspace: Workspace, params: Params, *, with_costs: bool, with_experiments: bool) -> dict[str, object]:
    """Compare the variants user by user, and write one page: that of the pipeline, or a requested other one.

    Args:
        workspace: paths of a finished run.
        params: params of that run.
        with_costs: whether to write the page with seconds, memory and the commit.
        with_experiments: whether to write the page with the results of the scripts in ``experiments/``.

    Returns:
        The counts for the closing line of the stage.

    Raises:
        ConfigError: both other pages are requested.
        ArtifactError: a file of the run is missing or damaged.
    """
    if with_costs and with_experiments:
        raise ConfigError("--costs and --experiments", "each write a separate page", "name one of them")
    comparisons = _compare(workspace, params)
    if with_costs:
        spent = kept.read_latest(workspace.costs, params.variants, params.recommenders)
        data = _collect(workspace, params, comparisons, commit=commit_of(workspace.root), costs=spent)
        write_text(workspace.costs_page, page.render(data))
        return {"page": workspace.costs_page, "stages": len(spent)}
    if with_experiments:
        found = page.read_experiments(workspace.experiments)
        data = _collect(workspace, params, comparisons, commit=commit_of(workspace.root), experiments=found)
        write_text(workspace.experiments_page, page.render(data))
        return {"page": workspace.experiments_page, "experiments": len(found)}
    data = _collect(workspace, params, comparisons, commit=None)
    with replace_directory(workspace.report.parent) as folder:
        write_text(folder / workspace.report.name, page.render(data))
        write_json(folder / workspace.pairs.name, evaluation.flat_comparisons(comparisons))
    gains = evaluation.flat_gains(comparisons, reported(params), ("zero_shot", "id"))
    write_json(workspace.comparisons, gains)
    return {"page": workspace.report, "comparisons": len(comparisons)}


def _compare(workspace: Workspace, params: Params) -> Sequence[Comparison]:
    positions = {
        (variant, recommender): SEED_POSITIONS.read(workspace.positions(variant, recommender))
        for recommender in params.recommenders
        for variant in params.variants
    }
    evaluation.check_same_negatives(workspace.positions(*key) for key in positions)
    interactions, num_items = INTERACTIONS.read(workspace.interactions), ITEMS.count(workspace.items)
    cutoff = params.report.cutoff
    return evaluation.compare_variants(
        positions, evaluation.BASELINES, interactions, params.evaluate, cutoff, num_items, controls(params)
    )


def _collect(
    workspace: Workspace,
    params: Params,
    comparisons: Sequence[Comparison],
    *,
    commit: str | None,
    costs: Sequence[kept.Latest] = (),
    experiments: Sequence[Experiment] = (),
) -> ReportData:
    shown = page.example_items(workspace, params.report)
    neighbors = {
        variant: load_index(workspace.index(variant)).neighbor_lists(shown, params.report.num_neighbors)
        for variant in indexed_variants(params)
    }
    return page.collect(workspace, params, comparisons, neighbors, commit=commit, costs=costs, experiments=experiments)


def commit_of(root: Path) -> str | None:
    """The project's Git commit, and whether tracked files differ from it; None if Git does not track the project."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)  # noqa: S603
        except FileNotFoundError:  # Git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "params.yaml"):  # the folder is inside the checkout of another project
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit} with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else commit
