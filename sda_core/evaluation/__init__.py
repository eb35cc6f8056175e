"""Evaluation from stored positions: metrics, item groups, protocols, significance.  No torch.

>>> from sda_core.evaluation import hit, ndcg
>>> hit([1, 3, 12], 10), ndcg([1, 3, 12], 10)
(0.6666666666666666, 0.5)
"""

from sda_core.evaluation.groups import ItemGroups, item_groups, training_counts
from sda_core.evaluation.metrics import Metric, Ties, hit, mrr, ndcg, positions_under
from sda_core.evaluation.protocols import candidates, candidates_hash, evaluated_users
from sda_core.evaluation.significance import (
    Comparison,
    Difference,
    bootstrap_interval,
    compare,
    compare_variants,
    flat_comparisons,
    holm,
    sign_flip_p_value,
)
from sda_core.evaluation.summary import score_positions, summarise

__all__ = [
    "Comparison",
    "Difference",
    "ItemGroups",
    "Metric",
    "Ties",
    "bootstrap_interval",
    "candidates",
    "candidates_hash",
    "compare",
    "compare_variants",
    "evaluated_users",
    "flat_comparisons",
    "hit",
    "holm",
    "item_groups",
    "mrr",
    "ndcg",
    "positions_under",
    "score_positions",
    "sign_flip_p_value",
    "summarise",
    "training_counts",
]
