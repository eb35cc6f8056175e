"""Evaluation from stored positions: metrics, item groups, protocols, significance.  No torch.

>>> from sda_core.evaluation import hit, ndcg
>>> hit([1, 3, 12], 10), ndcg([1, 3, 12], 10)
(0.6666666666666666, 0.5)
"""

from sda_core.evaluation.groups import ItemGroups, item_groups, training_counts
from sda_core.evaluation.metrics import Metric, Ties, hit, mrr, ndcg, positions_under
from sda_core.evaluation.negatives import Negatives, check_same_negatives, negatives_of, read_negatives, write_negatives
from sda_core.evaluation.protocols import candidates, candidates_hash, evaluated_users
from sda_core.evaluation.seeds import Stacked, stack
from sda_core.evaluation.significance import (
    BASELINES,
    Change,
    Comparison,
    Difference,
    benjamini_hochberg,
    compare,
    compare_metrics,
    compare_runs,
    compare_variants,
    excludes_zero,
    flat_comparisons,
    flat_gains,
    holm,
    interval,
    is_clear,
)
from sda_core.evaluation.summary import score_positions, summarise

__all__ = [
    "BASELINES",
    "Change",
    "Comparison",
    "Difference",
    "ItemGroups",
    "Metric",
    "Negatives",
    "Stacked",
    "Ties",
    "benjamini_hochberg",
    "candidates",
    "candidates_hash",
    "check_same_negatives",
    "compare",
    "compare_metrics",
    "compare_runs",
    "compare_variants",
    "evaluated_users",
    "excludes_zero",
    "flat_comparisons",
    "flat_gains",
    "hit",
    "holm",
    "interval",
    "is_clear",
    "item_groups",
    "mrr",
    "ndcg",
    "negatives_of",
    "positions_under",
    "read_negatives",
    "score_positions",
    "stack",
    "summarise",
    "training_counts",
    "write_negatives",
]
