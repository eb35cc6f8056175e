"""Phase two: train one or all recommenders on frozen item vectors, several in parallel."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, SomeRecommenders, Variant, for_each, run_as_script, stage


def train_recommender(
    variant: Variant, recommender: SomeRecommenders = None, root: Root = Path(), params: ParamsFile = None
) -> None:
    """Train recommenders on one variant's item vectors, with every seed; they never see the test split.

    Without --recommender it trains all of params.recommenders in runtime.num_trainings processes, and skips those whose
    inputs, settings and code are unchanged.
    """
    from sda_core.steps import train_recommender as step

    name = "train-recommender"
    if recommender is not None:
        for_each(name, root, params, recommender.split(","), partial(step.train_one, variant=variant))
        return
    with stage(name, root, params) as run:
        section, runtime = run.params.train_recommender, run.params.runtime
        command = step.command(__spec__.name, variant, root, params)
        run.counts = step.train_all(run.workspace, variant, run.params.recommenders, section, runtime, command)


if __name__ == "__main__":
    run_as_script(train_recommender)
