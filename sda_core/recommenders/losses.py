"""Losses of next-item prediction, over scores: one row a target.

``positive_P`` is the score of each of P targets, ``negative_PN`` the scores of its N negatives; a negative that
happens to be the target itself carries ``-inf`` and then adds nothing.  All losses are means over the P targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(positive_P: Tensor, negative_PN: Tensor) -> Tensor:
    """Binary cross-entropy, ``-[log s(x+) + sum_n log(1 - s(x_n))] / (N + 1)`` (Kang & McAuley 2018, eq. 6, with N = 1)."""
    num_negatives = negative_PN.shape[1]
    return (F.softplus(-positive_P) + F.softplus(negative_PN).sum(dim=1)).mean() / (num_negatives + 1)


def gbce(positive_P: Tensor, negative_PN: Tensor, num_items: int, t: float) -> Tensor:
    """Generalised binary cross-entropy (Petrov & Macdonald 2023, eq. 10 and 15).

    ``-[beta log s(x+) + sum_n log(1 - s(x_n))] / (N + 1)`` with ``alpha = N / (I - 1)`` and
    ``beta = alpha (t (1 - 1/alpha) + 1/alpha)``: ``t = 0`` is BCE, ``t = 1`` undoes the overconfidence that comes of
    sampling few negatives.
    """
    num_negatives = negative_PN.shape[1]
    alpha = min(1.0, num_negatives / max(1, num_items - 1))
    beta = alpha * (t * (1.0 - 1.0 / alpha) + 1.0 / alpha)
    return (beta * F.softplus(-positive_P) + F.softplus(negative_PN).sum(dim=1)).mean() / (num_negatives + 1)


def sampled_softmax(positive_P: Tensor, negative_PN: Tensor) -> Tensor:
    """Cross-entropy of the target among itself and its negatives.

    The negatives are uniform, so the correction by the log of their sampling probability is one constant.
    """
    logits = torch.cat([positive_P[:, None], negative_PN], dim=1)
    return (torch.logsumexp(logits, dim=1) - positive_P).mean()


def softmax(score_PI: Tensor, target_P: Tensor) -> Tensor:
    """Cross-entropy of the target among all items; column 0 (padding) is no item.

    Args:
        score_PI: ``(P, I + 1)`` scores by item id.
        target_P: item ids, ``>= 1``.
    """
    return F.cross_entropy(score_PI[:, 1:], target_P - 1)


def bpr(positive_P: Tensor, negative_P: Tensor) -> Tensor:
    """Bayesian personalised ranking, ``-log s(x+ - x-)`` (Rendle et al. 2009)."""
    return F.softplus(negative_P - positive_P).mean()
