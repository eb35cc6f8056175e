"""Compute the positions of the test users' targets, and their metrics."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import OneOrAllRecommenders, ParamsFile, Root, Variant, run_as_script, stage


def evaluate(variant: Variant, recommender: OneOrAllRecommenders = None, root: Root = Path(), params: ParamsFile = None) -> None:
    """Rank each test user's target among the candidates, store the positions, and compute Hit, NDCG and MRR."""
    from sda_core.steps.evaluate import evaluate as place_and_score

    with stage("evaluate", root, params) as run:
        names = run.params.recommenders if recommender is None else (recommender,)
        sections = run.params.evaluate, run.params.train_recommender, run.params.runtime
        run.counts = place_and_score(run.workspace, variant, names, *sections)


if __name__ == "__main__":
    run_as_script(evaluate)
