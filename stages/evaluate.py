"""Positions of the test users' targets, and the metrics made of them."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import OneOrAllRecommenders, ParamsFile, Root, Variant, run_as_script, stage


def evaluate(variant: Variant, recommender: OneOrAllRecommenders = None, root: Root = Path(), params: ParamsFile = None) -> None:
    """Place each test user's target among the candidates, store the positions, and compute Hit, NDCG and MRR from them."""
    from sda_core import evaluation, ranking, recommenders
    from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, POSITIONS, write_json
    from sda_core.runtime import prepare_torch

    with stage("evaluate", root, params) as run:
        section = run.params.evaluate
        device = prepare_torch(run.params.runtime)
        interactions = INTERACTIONS.read(run.workspace.interactions)
        num_items = EMBEDDINGS.count(run.workspace.embeddings(variant))  # the whole catalogue
        data = recommenders.evaluation_data(interactions, num_items=num_items)
        negatives = evaluation.read_negatives(run.workspace.negatives(section.protocol), interactions, section)
        run.counts = {"variant": variant, "num_users": len(data.users)}
        for name in run.params.recommenders if recommender is None else (recommender,):
            folder = run.workspace.recommender(variant, name)
            vectors = recommenders.read_item_vectors(run.workspace.embeddings(variant), recommenders.saved_params(folder))
            model = recommenders.load(folder, vectors, device)
            placed, told = ranking.place(model, data, negatives.table_UN, section, device)
            positions = evaluation.score_positions(placed, section.ties)
            POSITIONS.write(positions, run.workspace.positions(variant, name), negatives.told)
            metrics = evaluation.summarise(positions, interactions, section, num_items)
            write_json(run.workspace.metrics(variant, name), metrics | told | negatives.told)
            run.counts |= {f"{name} {key}": value for key, value in metrics.items() if key in ("hit@10", "ndcg@10")}


if __name__ == "__main__":
    run_as_script(evaluate)
