"""Consequences of a recommender's params: the vectors it uses, the alignment to ids, the scoring of histories.

These are functions of a params section, without torch.  They affect the inputs of trainings, so they are here and not in
``params``: stages that use them list this file in their ``deps``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sda_core.params import NearestParams, PopParams, RecommenderParams, SequentialParams, SLMRecParams

WITHOUT_SEED = frozenset({"pop", "nearest"})
"""Kinds of recommenders whose training draws no random numbers."""


def counts_test(params: RecommenderParams) -> bool:
    """Whether it uses the test interactions, as in published tables with leakage; only ``pop`` has this setting."""
    return isinstance(params, PopParams) and params.counts == "all"


def seeds_of(params: RecommenderParams, seeds: Sequence[int]) -> tuple[int, ...]:
    """The training seeds of a recommender: the given ones, or only 0 if nothing in it is random."""
    return (0,) if params.kind in WITHOUT_SEED else tuple(seeds)


def takes_modalities(params: RecommenderParams) -> bool:
    """Whether it uses separate image and text vectors instead of the fused ones."""
    return isinstance(params, SLMRecParams)


def aligns_to_ids(params: RecommenderParams) -> bool:
    """Whether training uses the item table of the same recommender trained on ids alone.

    It does not without vectors to project (``representation: id``).
    """
    return isinstance(params, SequentialParams) and params.align_weight > 0.0 and params.representation != "id"


def scores_histories(params: RecommenderParams) -> bool:
    """Whether it can score items for a history alone; other recommenders need a user from training."""
    return isinstance(params, PopParams | NearestParams | SequentialParams)
