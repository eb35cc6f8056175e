"""Losses against torch's own, and against their formulas."""

from __future__ import annotations

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
