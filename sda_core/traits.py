"""What a recommender's params imply: which item vectors it takes, whether it aligns to ids, whether it scores histories.

Functions of a params section, without torch.  They decide what a recommender is trained on, so they stand here and not in
``params``: stages that use them list this file among their ``deps``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sda_core.params import PopParams, RecommenderParams, SequentialParams, SLMRecParams


def counts_test(params: RecommenderParams) -> bool:
    """Whether the test interactions are handed to it, as in published tables that leaked them; only ``pop`` can ask for them."""
    return isinstance(params, PopParams) and params.counts == "all"


def seeds_of(params: RecommenderParams, seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds that a recommender is trained with: those given, or 0 alone where its training draws nothing (``pop``)."""
    return (0,) if isinstance(params, PopParams) else tuple(seeds)


def takes_modalities(params: RecommenderParams) -> bool:
    """Whether it takes the image vectors and the text vectors apart, instead of the fused ones."""
    return isinstance(params, SLMRecParams)


def aligns_to_ids(params: RecommenderParams) -> bool:
    """Whether training takes the item table of the same recommender trained on ids alone.

    Without vectors to project (``representation: id``) there is nothing to align.
    """
    return isinstance(params, SequentialParams) and params.align_weight > 0.0 and params.representation != "id"


def scores_histories(params: RecommenderParams) -> bool:
    """Whether a history alone is enough to score items; other recommenders need a user who was there in training."""
    return isinstance(params, PopParams | SequentialParams)
