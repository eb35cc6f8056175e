"""Phase two: an ordinary recommender over frozen item vectors, or all of them, several at once."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import OneOrAllRecommenders, ParamsFile, Root, Variant, run_as_script, stage


def train_recommender(
    variant: Variant, recommender: OneOrAllRecommenders = None, root: Root = Path(), params: ParamsFile = None
) -> None:
    """Train recommenders on one variant's item vectors; they never see the test split.

    Without --recommender it trains those of params.recommenders, each in a process of its own, runtime.num_trainings at a
    time, and keeps those that were made of the very inputs, settings and code there are now.
    """
    from sda_core.steps import train_recommender as step

    with stage("train-recommender", root, params) as run:
        section, runtime = run.params.train_recommender, run.params.runtime
        if recommender is None:
            command = step.command(__spec__.name, variant, root, params)
            run.counts = step.train_all(run.workspace, variant, run.params.recommenders, section, runtime, command)
        else:
            run.counts = step.train(run.workspace, variant, recommender, section, runtime)


if __name__ == "__main__":
    run_as_script(train_recommender)
