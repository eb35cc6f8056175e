"""The loss that a params section describes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sda_core.errors import ConfigError
from sda_core.losses import build, cmsa, cmsa_reference, infonce
from sda_core.params import LossParams

PAPER: dict[str, Any] = {
    "variant": "paper",
    "teacher": "mean",
    "temperature": 0.05,
    "teacher_temperature": None,
    "learn_temperature": False,
    "detach_teacher": True,
    "normalize": True,
    "false_negatives": "keep",
}
PUBLIC_CODE = {"variant": "reference", "temperature": 3.0, "learn_temperature": True, "detach_teacher": False, "normalize": False}


def loss(**changes: Any) -> Any:
    return build(LossParams(**{**PAPER, **changes}))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


def test_values_choose_the_loss() -> None:
    image, text = pair()
    assert torch.equal(loss()(image, text), cmsa(image, text, 0.05))
    assert torch.equal(loss(teacher="none")(image, text), infonce(image, text, 0.05))
    assert torch.equal(loss(teacher="none", normalize=False)(image, text), infonce(image, text, 0.05, normalize=False))
    for changes in ({"teacher": "agreement"}, {"teacher_temperature": 0.3}, {"normalize": False}, {"temperature": 0.2}):
        options = {"temperature": 0.05, **changes}
        assert torch.equal(loss(**changes)(image, text), cmsa(image, text, **options)), changes
        assert not torch.equal(loss(**changes)(image, text), cmsa(image, text, 0.05)), changes
    image.requires_grad_()
    gradients = [torch.autograd.grad(loss(detach_teacher=value)(image, text), image)[0] for value in (True, False)]
    assert not torch.allclose(*gradients)
    assert list(loss().parameters()) == []


def test_learned_temperature() -> None:
    image, text = pair()
    criterion = loss(learn_temperature=True)
    (parameter,) = criterion.parameters()
    assert criterion.temperature.item() == pytest.approx(0.05)
    torch.testing.assert_close(criterion(image, text), cmsa(image, text, 0.05))
    criterion(image, text).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() != 0
    with torch.no_grad():
        parameter.fill_(math.log(1e-5))
    criterion(image, text).backward()
    assert criterion.temperature.item() == pytest.approx(0.01)  # no lower
    assert parameter.grad.item() != 0  # and it can rise again
    low = loss(learn_temperature=True, temperature=0.002)
    low(image, text)
    assert low.temperature.item() == pytest.approx(0.002)


def test_the_public_codes_variant() -> None:
    image, text = pair()
    criterion = loss(**PUBLIC_CODE)
    torch.testing.assert_close(criterion(image, text), cmsa_reference(image, text, 3.0))
    (parameter,) = criterion.parameters()
    assert parameter.item() == 3.0
    with pytest.raises(
        ConfigError, match=r"set detach_teacher: false, normalize: false; the public code also has temperature: 3\.0"
    ):
        loss(variant="reference")
    with pytest.raises(ConfigError, match="set teacher: mean, teacher_temperature: null"):
        loss(**{**PUBLIC_CODE, "teacher": "none", "teacher_temperature": 1.0})
