"""Losses against torch's own, and against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sda_core.recommenders import losses


@pytest.fixture
def scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Four targets, three negatives each."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(4, generator=generator), 2 * torch.randn(4, 3, generator=generator)


def test_bce_is_binary_cross_entropy(scores):
    positive, negative = scores
    expected = F.binary_cross_entropy_with_logits(
        torch.cat([positive[:, None], negative], dim=1), torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    )
    torch.testing.assert_close(losses.bce(positive, negative), expected)


def test_gbce_at_t_zero_is_bce(scores):
    torch.testing.assert_close(losses.gbce(*scores, num_items=50, t=0.0), losses.bce(*scores))


def test_gbce_is_its_formula(scores):
    positive, negative = scores
    alpha, t = 3 / 49, 0.75
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    expected = -((torch.sigmoid(positive) ** beta).log() + (1 - torch.sigmoid(negative)).log().sum(dim=1)) / 4
    torch.testing.assert_close(losses.gbce(positive, negative, num_items=50, t=t), expected.mean())


@pytest.mark.parametrize(("num_negatives", "num_items"), [(1, 12_102), (256, 12_102), (3, 50), (49, 50), (80, 50)])
@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_in_numpy(num_negatives, num_items, t):
    """Petrov & Macdonald's beta simplifies to 1 - t (1 - alpha); more negatives than items count as all of them."""
    random = np.random.default_rng(num_negatives)
    positive, negative = random.normal(scale=3, size=7), random.normal(scale=3, size=(7, num_negatives))
    alpha = min(1.0, num_negatives / (num_items - 1))
    beta = 1 - t * (1 - alpha)
    log_likelihood = beta * np.log(1 / (1 + np.exp(-positive))) + np.log(1 - 1 / (1 + np.exp(-negative))).sum(axis=1)
    found = losses.gbce(torch.from_numpy(positive), torch.from_numpy(negative), num_items, t)
    assert found.item() == pytest.approx(-log_likelihood.mean() / (num_negatives + 1), rel=1e-9)


@pytest.mark.parametrize(("t", "expected"), [(0.0, 0.5), (1.0, 0.05)])
def test_gbce_at_t_one_is_calibrated_and_bce_is_overconfident(t, expected):
    """An item that is the target in 5 % of the cases, and else among the negatives with the chance they are drawn with.

    BCE's best score for it is p / (p + alpha (1 - p)), one half here; with t = 1 it is p itself.
    """
    p, num_items, num_negatives = 0.05, 20, 1
    alpha = num_negatives / (num_items - 1)
    score = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    nothing = torch.full((1, num_negatives), -torch.inf, dtype=torch.float64)
    as_target = torch.stack([losses.gbce(s[None], nothing, num_items, t) for s in score])
    as_negative = torch.stack(
        [losses.gbce(torch.tensor([torch.inf], dtype=torch.float64), s[None, None], num_items, t) for s in score]
    )
    best = score[(p * as_target + (1 - p) * alpha * as_negative).argmin()]
    assert torch.sigmoid(best).item() == pytest.approx(expected, abs=2e-3)


def test_sampled_softmax_over_all_items_is_softmax():
    generator = torch.Generator().manual_seed(1)
    score_PI = torch.randn(5, 9, generator=generator)
    target_P = torch.tensor([1, 8, 3, 3, 5])
    others = torch.stack([torch.tensor([item for item in range(1, 9) if item != target]) for target in target_P])
    sampled = losses.sampled_softmax(score_PI.gather(1, target_P[:, None])[:, 0], score_PI.gather(1, others))
    torch.testing.assert_close(sampled, losses.softmax(score_PI, target_P))
    torch.testing.assert_close(sampled, F.cross_entropy(score_PI.index_fill(1, torch.tensor(0), -torch.inf), target_P))


def test_bpr_is_its_formula(scores):
    positive, negative = scores[0], scores[1][:, 0]
    torch.testing.assert_close(losses.bpr(positive, negative), -torch.sigmoid(positive - negative).log().mean())


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax"])
def test_a_negative_that_is_the_target_adds_nothing(loss, scores):
    positive, negative = scores
    function = {"bce": losses.bce, "gbce": lambda p, n: losses.gbce(p, n, 50, 0.5), "sampled_softmax": losses.sampled_softmax}[
        loss
    ]
    negative = negative.clone()
    negative[:, 1] = -torch.inf
    negative.requires_grad_(True)
    value = function(positive, negative)
    (gradient,) = torch.autograd.grad(value, negative)
    assert torch.isfinite(value)
    assert (gradient[:, 1] == 0).all()
    assert torch.isfinite(gradient).all()
    if loss == "sampled_softmax":
        torch.testing.assert_close(value.detach(), function(positive, negative.detach()[:, [0, 2]]))


def test_in_batch_softmax_is_its_formula():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    cosine = F.cosine_similarity(x[:, None], y[None], dim=2)
    expected = -(torch.exp(cosine.diagonal() / 0.2) / torch.exp(cosine / 0.2).sum(dim=1)).log().mean()
    torch.testing.assert_close(losses.in_batch_softmax(x, y, 0.2), expected)
    assert losses.in_batch_softmax(x, x, 0.01) < losses.in_batch_softmax(x, x.roll(1, 0), 0.01)


def test_the_alignment_over_distinct_items_is_the_one_over_all_positions():
    """Against the formula position by position, value and gradients."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    count = torch.tensor([1, 3, 2, 4])
    found = losses.soft_target_contrast(x, y, count, 2.0)
    position = torch.repeat_interleave(torch.arange(4), count)
    x_P, y_P = x[position], y[position]
    targets = torch.softmax(2.0 * (x_P @ x_P.T + y_P @ y_P.T) / 2, dim=1)
    logits = x_P @ y_P.T / 2.0
    by_row = -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1)
    by_column = -(targets.T * torch.log_softmax(logits.T, dim=1)).sum(dim=1)
    expected = ((by_row + by_column) / 2).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, y)[0] for value in (found, expected)))
