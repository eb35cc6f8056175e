"""What a batch looks like, in numbers: cases worked out by hand, and NumPy for the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.losses import AlignmentLoss, build
from sda_core.losses.cmsa import agreement
from tests.sections import SHIPPED, changed

NAMES = ["teacher_entropy", "teacher_targets", "agreement", "alignment", "uniformity_image", "uniformity_text", "retrieval"]


def criterion(**changes: Any) -> AlignmentLoss:
    return build(changed(SHIPPED.train_adapter.loss, **({"temperature": 0.3, "center": "none"} | changes)))


def pair(num_rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    return image, image + torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)


def test_plain_numbers_of_numpy() -> None:
    image, text = (x.requires_grad_() for x in pair())
    found = criterion().diagnostics(image, text)
    assert list(found) == NAMES
    assert {type(value) for value in found.values()} == {float}
    v, t = (F.normalize(x.detach()).numpy() for x in (image, text))
    structure = (v @ v.T + t @ t.T) / 2 / 0.3
    p = np.exp(structure) / np.exp(structure).sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1).mean()
    assert found["teacher_entropy"] == pytest.approx(entropy, abs=1e-12)
    assert found["teacher_targets"] == pytest.approx(math.exp(entropy), abs=1e-12)
    weights = agreement([torch.from_numpy(x @ x.T) for x in (v, t)], 0.3)
    assert found["agreement"] == pytest.approx(weights.mean().item(), abs=1e-12)
    assert found["alignment"] == pytest.approx(((v - t) ** 2).sum(axis=1).mean(), abs=1e-12)
    for name, x in (("image", v), ("text", t)):
        squares = [((x[i] - x[j]) ** 2).sum() for i in range(6) for j in range(6) if i != j]
        assert found[f"uniformity_{name}"] == pytest.approx(math.log(np.exp(-2 * np.array(squares)).mean()), abs=1e-12)
    hits = [np.mean((v @ t.T).argmax(axis=axis) == np.arange(6)) for axis in (0, 1)]
    assert found["retrieval"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert 0 < found["retrieval"] < 1


def test_ends_of_the_scales() -> None:
    one = torch.eye(4, dtype=torch.float64)
    perfect = criterion(temperature=0.01).diagnostics(5 * one, 9 * one)  # lengths do not count
    expected = [0, 1, 1, 0, -4, -4, 1]  # orthogonal rows: squared distance 2, so log exp(-4)
    assert [perfect[name] for name in NAMES] == pytest.approx(expected, abs=1e-9)
    collapsed = criterion().diagnostics(torch.ones(4, 3), torch.ones(4, 3))
    assert [collapsed[name] for name in NAMES] == pytest.approx([math.log(4), 4, 1, 0, 0, 0, 0], abs=1e-5)
    opposed = criterion(temperature=0.01).diagnostics(one, -one)
    assert opposed["alignment"] == pytest.approx(4)
    assert opposed["retrieval"] == 0


def test_what_the_teacher_is() -> None:
    image, text = pair()
    entropies = {
        teacher: criterion(teacher=teacher, normalize=False).diagnostics(image, text)["teacher_entropy"]
        for teacher in ("mean", "agreement", "image", "text", "none")
    }
    assert entropies["none"] == 0
    assert entropies["mean"] == entropies["agreement"]
    for name, x in (("image", image), ("text", text)):
        p = torch.softmax(x @ x.T / 0.3, dim=-1)
        assert entropies[name] == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), abs=1e-12)
    sharper = criterion(teacher_temperature=0.1).diagnostics(image, text)
    assert sharper["teacher_entropy"] < criterion().diagnostics(image, text)["teacher_entropy"]
    learned = criterion(learn_temperature=True).diagnostics(image, text)
    assert learned == pytest.approx(criterion().diagnostics(image, text), abs=1e-5)  # the parameter is float32
    public = criterion(variant="reference", temperature=2.0, learn_temperature=True, detach_teacher=False, normalize=False)
    p = torch.softmax((image @ image.T + text @ text.T) / 2 * 2.0, dim=-1)  # the public code multiplies
    expected = torch.special.entr(p).sum(-1).mean().item()
    assert public.diagnostics(image, text)["teacher_entropy"] == pytest.approx(expected, abs=1e-5)


def test_groups() -> None:
    """Rows 0 and 1 are one product."""
    image = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]
    groups = torch.tensor([4, 4, 0, 1])
    assert criterion(teacher="none").diagnostics(image, image)["retrieval"] == 0.5  # a tie is a miss
    entropy = {}
    for policy in ("keep", "mask", "share"):
        found = criterion(teacher="none", false_negatives=policy).diagnostics(image, image, groups)
        assert found["retrieval"] == 1
        entropy[policy] = found["teacher_entropy"]
    assert entropy == pytest.approx({"keep": 0, "mask": 0, "share": math.log(2) / 2})
    with pytest.raises(TrainingError, match="the batch came without groups"):
        criterion(false_negatives="share").diagnostics(image, image)


def test_nothing_is_left_behind_and_half_precision_is_read() -> None:
    image, text = (x.to(torch.bfloat16).requires_grad_() for x in pair())
    loss = criterion(learn_temperature=True)
    found = loss.diagnostics(image, text)
    assert all(math.isfinite(value) for value in found.values())
    assert image.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())
    loss(image, text).backward()  # and the graph of the loss is its own
    assert image.grad is not None
    assert math.isnan(criterion().diagnostics(torch.ones(1, 3), torch.ones(1, 3))["uniformity_image"])
