"""Losses of next-item prediction, as functions of scores with one row per target.

``positive_P`` is the score of each of P targets, ``negative_PN`` the scores of its N negatives; a negative that equals the
target has the score ``-inf`` and no effect.  All losses are means over the P targets.
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
    ``beta = alpha (t (1 - 1/alpha) + 1/alpha)``: ``t = 0`` is BCE, ``t = 1`` removes the overconfidence due to few sampled
    negatives.
    """
    num_negatives = negative_PN.shape[1]
    alpha = min(1.0, num_negatives / max(1, num_items - 1))
    beta = alpha * (t * (1.0 - 1.0 / alpha) + 1.0 / alpha)
    return (beta * F.softplus(-positive_P) + F.softplus(negative_PN).sum(dim=1)).mean() / (num_negatives + 1)


def sampled_softmax(positive_P: Tensor, negative_PN: Tensor) -> Tensor:
    """Cross-entropy of the target among itself and its negatives.

    The negatives are uniform, so the correction by the log of their sampling probability is constant.
    """
    logits = torch.cat([positive_P[:, None], negative_PN], dim=1)
    return (torch.logsumexp(logits, dim=1) - positive_P).mean()


def softmax(score_PI: Tensor, target_P: Tensor) -> Tensor:
    """Cross-entropy of the target among all items, without column 0 (padding).

    Args:
        score_PI: ``(P, I + 1)`` scores by item id.
        target_P: item ids, ``>= 1``.
    """
    return F.cross_entropy(score_PI[:, 1:], target_P - 1)


def bpr(positive_P: Tensor, negative_P: Tensor) -> Tensor:
    """Bayesian personalised ranking, ``-log s(x+ - x-)`` (Rendle et al. 2009)."""
    return F.softplus(negative_P - positive_P).mean()


def in_batch_softmax(x_nD: Tensor, y_nD: Tensor, temperature: float) -> Tensor:
    """NCE in one direction by cosine: identify the ``y`` of each ``x``.

    ``-mean_i log (exp(cos(x_i, y_i) / temperature) / sum_j exp(cos(x_i, y_j) / temperature))``

    Args:
        x_nD, y_nD: two views of the same ``n`` users or items, row by row.
        temperature: temperature, positive.
    """
    logits_nn = F.normalize(x_nD, dim=1) @ F.normalize(y_nD, dim=1).T / temperature
    return F.cross_entropy(logits_nn, torch.arange(len(x_nD), device=x_nD.device))


def soft_target_contrast(x_nD: Tensor, y_nD: Tensor, count_n: Tensor, temperature: float) -> Tensor:
    """Alignment of two views of items with the similarities within both views as targets (LLMEmb, later SDA).

    Over all P positions of a batch, with ``t`` the temperature, without normalisation and without detaching:
    ``targets = softmax(t (X X' + Y Y') / 2)`` by row, ``logits = X Y' / t``; the loss is the mean over positions of half the
    cross-entropy of the rows of ``logits`` to those of ``targets`` and half that of their columns.

    An item occurs at many positions, so the ``n`` distinct items and their counts are used instead, which gives the same
    value from ``n x n`` numbers.

    Args:
        x_nD, y_nD: both views of the distinct items, row by row.
        count_n: number of positions of each item, ``P`` in total.
        temperature: positive; it multiplies in the targets and divides in the logits.
    """
    count_n = count_n.to(x_nD.dtype)
    log_count_n = count_n.log()
    logits_nn = x_nD @ y_nD.T / temperature
    similarity_nn = (x_nD @ x_nD.T + y_nD @ y_nD.T) * (temperature / 2)
    # of one position: the softmax sums over all positions
    target_nn = torch.exp(similarity_nn - torch.logsumexp(similarity_nn + log_count_n, dim=1, keepdim=True))
    by_row_nn = logits_nn - torch.logsumexp(logits_nn + log_count_n, dim=1, keepdim=True)
    by_column_nn = logits_nn - torch.logsumexp(logits_nn + log_count_n[:, None], dim=0, keepdim=True)
    pairs_nn = count_n[:, None] * count_n
    return -(pairs_nn * target_nn * (by_row_nn + by_column_nn)).sum() / (2 * count_n.sum())
