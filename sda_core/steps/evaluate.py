"""Compute the positions and metrics of one variant for every recommender and seed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl

from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, SEED_POSITIONS, Workspace, write_json
from sda_core.params import EvaluateParams, RuntimeParams, TrainRecommenderParams
from sda_core.recommenders.history import validation_metrics
from sda_core.runtime import prepare_torch
from sda_core.traits import seeds_of

_SHOWN = ("hit@10", "ndcg@10")


def evaluate(
    workspace: Workspace,
    variant: str,
    names: Iterable[str],
    params: EvaluateParams,
    trained: TrainRecommenderParams,
    runtime: RuntimeParams,
) -> dict[str, object]:
    """Rank each test user's target among the candidates, and write the positions and their metrics.

    Args:
        workspace: paths of the run.
        variant: name of the variant.
        names: names of its trained recommenders.
        params: protocol, ties, cut-offs.
        trained: section with the seeds of the recommenders.
        runtime: device and threads.

    Returns:
        The counts for the closing line of the stage.

    Raises:
        ArtifactError: an input is missing or damaged, or the negatives were drawn with other params.
        TrainingError: a recommender's scores are not finite.
    """
    device = prepare_torch(runtime)
    interactions = INTERACTIONS.read(workspace.interactions)
    num_items = EMBEDDINGS.count(workspace.embeddings(variant))  # the whole catalogue
    data = recommenders.evaluation_data(interactions, num_items=num_items)
    negatives = evaluation.read_negatives(workspace.negatives(params.protocol), interactions, params)
    counts: dict[str, object] = {"variant": variant, "num_users": len(data.users)}
    for name in names:
        vectors = recommenders.read_item_vectors(workspace.embeddings(variant), trained.of(name))
        seeds = seeds_of(trained.of(name), trained.seeds)
        tables: list[pl.DataFrame] = []
        told: list[dict[str, float]] = []
        for seed in seeds:
            model = recommenders.load(workspace.model(variant, name, seed), vectors, device)
            placed, retrieved = ranking.place(model, data, negatives.table_UN, params, device)
            scored = evaluation.score_positions(placed, params.ties)
            tables.append(scored.select(pl.lit(seed, pl.Int32).alias("seed"), pl.all()))
            told.append(retrieved)
        positions = pl.concat(tables)
        SEED_POSITIONS.write(positions, workspace.positions(variant, name), negatives.metadata)
        metrics = evaluation.summarise(positions, interactions, params, num_items)
        metrics |= validation_metrics(workspace, variant, name, seeds)
        metrics |= {key: float(np.mean([of_seed[key] for of_seed in told])) for key in told[0]}
        write_json(workspace.metrics(variant, name), metrics | negatives.metadata)
        counts |= {f"{name} {key}": metrics[key] for key in _SHOWN if key in metrics}
    return counts
