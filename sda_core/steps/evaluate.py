"""The positions and metrics of one variant, recommender by recommender."""

from __future__ import annotations

from collections.abc import Iterable

from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, POSITIONS, Workspace, write_json
from sda_core.params import EvaluateParams, RuntimeParams
from sda_core.runtime import prepare_torch

_SHOWN = ("hit@10", "ndcg@10")


def evaluate(
    workspace: Workspace, variant: str, names: Iterable[str], params: EvaluateParams, runtime: RuntimeParams
) -> dict[str, object]:
    """Place each test user's target among the candidates, write the positions, and the metrics computed from them.

    Args:
        workspace: of the run.
        variant: its name.
        names: of its trained recommenders.
        params: protocol, ties, cut-offs.
        runtime: device and threads.

    Returns:
        The counts of the stage's last line.

    Raises:
        ArtifactError: an input is missing or damaged, or the negatives are those of other params.
        TrainingError: a recommender's scores are not finite.
    """
    device = prepare_torch(runtime)
    interactions = INTERACTIONS.read(workspace.interactions)
    num_items = EMBEDDINGS.count(workspace.embeddings(variant))  # the whole catalogue
    data = recommenders.evaluation_data(interactions, num_items=num_items)
    negatives = evaluation.read_negatives(workspace.negatives(params.protocol), interactions, params)
    counts: dict[str, object] = {"variant": variant, "num_users": len(data.users)}
    for name in names:
        folder = workspace.recommender(variant, name)
        vectors = recommenders.read_item_vectors(workspace.embeddings(variant), recommenders.saved_params(folder))
        model = recommenders.load(folder, vectors, device)
        placed, told = ranking.place(model, data, negatives.table_UN, params, device)
        positions = evaluation.score_positions(placed, params.ties)
        POSITIONS.write(positions, workspace.positions(variant, name), negatives.told)
        metrics = evaluation.summarise(positions, interactions, params, num_items)
        write_json(workspace.metrics(variant, name), metrics | told | negatives.told)
        counts |= {f"{name} {key}": metrics[key] for key in _SHOWN if key in metrics}
    return counts
