"""The loss that a params section describes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sda_core.errors import ConfigError, TrainingError
from sda_core.losses import build, cmsa, cmsa_reference, infonce
from tests.sections import SHIPPED, changed

PUBLIC_CODE = {"variant": "reference", "temperature": 3.0, "learn_temperature": True, "detach_teacher": False, "normalize": False}


def loss(**changes: Any) -> Any:
    return build(changed(SHIPPED.train_adapter.loss, **changes))


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


def test_the_backbones_own_vectors_can_teach() -> None:
    image, text = pair()
    base = image[[1, 0, 2, 3, 4, 5], :3], text[[1, 0, 2, 3, 4, 5], :3]
    criterion = loss(teacher_source="base", teacher_temperature=0.3)
    assert criterion.needs_base
    assert not loss().needs_base
    expected = cmsa(image, text, 0.05, teacher_temperature=0.3, taught_by=base)
    assert torch.equal(criterion(image, text, base=base), expected)
    assert torch.equal(loss(teacher_temperature=0.3)(image, text, base=base), cmsa(image, text, 0.05, teacher_temperature=0.3))
    for call in (criterion, criterion.diagnostics):
        with pytest.raises(TrainingError, match="needs the vectors of the backbone without its adapter"):
            call(image, text)
    taught, plain = criterion.diagnostics(image, text, base=base), loss(teacher_temperature=0.3).diagnostics(*base)
    for name in ("teacher_entropy", "teacher_targets", "agreement"):  # of the teacher
        assert taught[name] == plain[name]
    own = loss().diagnostics(image, text)
    for name in ("alignment", "uniformity_image", "uniformity_text", "retrieval"):  # of what is trained
        assert taught[name] == own[name]
    with pytest.raises(ConfigError, match="teacher_source: is 'base', but teacher is 'none'"):
        loss(teacher="none", teacher_source="base")
    with pytest.raises(ConfigError, match=r"teacher_source: should be \"adapted\" with variant 'reference'"):
        loss(**{**PUBLIC_CODE, "teacher_source": "base"})


@pytest.mark.parametrize("teacher", ["mean", "none"])
def test_false_negatives_are_a_value(teacher: str) -> None:
    image, text = pair()
    groups = torch.tensor([0, 0, 1, 2, 3, 3])
    plain = loss(teacher=teacher)(image, text)
    assert torch.equal(loss(teacher=teacher)(image, text, groups), plain)  # keep looks at no group
    found = {}
    for policy in ("mask", "share"):
        value = loss(teacher=teacher, false_negatives=policy)(image, text, groups)
        options = {"groups_B": groups, "false_negatives": policy}
        expected = cmsa(image, text, 0.05, **options) if teacher == "mean" else infonce(image, text, 0.05, **options)  # type: ignore[arg-type]
        assert torch.equal(value, expected)
        found[policy] = value.item()
        with pytest.raises(TrainingError, match=f"false_negatives is '{policy}', and the batch came without groups"):
            loss(teacher=teacher, false_negatives=policy)(image, text)
    assert len({plain.item(), *found.values()}) == 3


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
        ConfigError, match=r"detach_teacher: should be false with variant 'reference'.*; normalize: should be false"
    ):
        loss(variant="reference")
    with pytest.raises(ConfigError, match=r'false_negatives: should be "keep"'):
        loss(**{**PUBLIC_CODE, "false_negatives": "mask"})
    with pytest.raises(ConfigError, match=r'teacher: should be "mean".*; teacher_temperature: should be null'):
        loss(**{**PUBLIC_CODE, "teacher": "none", "teacher_temperature": 1.0})
