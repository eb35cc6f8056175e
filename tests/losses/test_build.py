"""The loss that a params section describes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sda_core.errors import ConfigError, TrainingError
from sda_core.losses import build, cmsa, cmsa_reference, infonce, keep_structure
from tests.sections import SHIPPED, changed

PUBLIC_CODE = {"variant": "reference", "temperature": 3.0, "learn_temperature": True, "detach_teacher": False, "normalize": False}


def loss(**changes: Any) -> Any:
    """The paper's formula with changes."""
    return build(changed(SHIPPED.train_adapter.loss, **{"center": "none", **changes}))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


def test_the_shipped_losses_are_centred() -> None:
    image, text = pair()
    apart = [vectors - vectors.mean(dim=0) for vectors in (image + 7.0, text)]
    section = SHIPPED.train_adapter
    assert torch.allclose(build(section.loss)(image, text), cmsa(*apart, 0.05), atol=1e-6)
    assert torch.allclose(build(section.infonce)(image, text), infonce(*apart, 0.05), atol=1e-6)


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


# ------------------------------------------------------------------------------------ geometry: center, targets, keep_base
def anisotropic(rows: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that share one large direction, as the pooled states of a generative model do."""
    generator = torch.Generator().manual_seed(seed)
    direction = 10 * torch.ones(12)
    image, text = (torch.randn(rows, 12, generator=generator) + direction for _ in range(2))
    return image, text


@pytest.mark.parametrize("teacher", ["mean", "image", "text", "agreement", "none"])
def test_centring_comes_before_everything_else(teacher: str) -> None:
    image, text = anisotropic()
    apart = image - image.mean(0), text - text.mean(0)
    assert torch.equal(loss(teacher=teacher, center="batch")(image, text), loss(teacher=teacher)(*apart))
    assert torch.equal(loss(teacher=teacher, center="running")(image, text), loss(teacher=teacher)(*apart))  # the first batch
    assert loss(teacher=teacher, center="batch").diagnostics(image, text) == loss(teacher=teacher).diagnostics(*apart)
    assert not torch.allclose(loss(teacher=teacher, center="batch")(image, text), loss(teacher=teacher)(image, text))


def test_the_base_that_teaches_is_centred_by_its_own_mean() -> None:
    (image, text), (v, t) = anisotropic(), anisotropic(seed=1)
    apart = image - image.mean(0), text - text.mean(0)
    found = loss(teacher_source="base", center="batch")(image, text, base=(v, t))
    assert torch.equal(found, cmsa(*apart, 0.05, taught_by=(v - v.mean(0), t - t.mean(0))))


def test_a_running_mean_learns_from_steps_and_not_from_looks() -> None:
    first, second = anisotropic(), anisotropic(seed=1)
    criterion = loss(center="running")
    criterion(*first)
    means = criterion.center.state()[0]
    for _ in range(3):
        criterion.diagnostics(*second)
    assert criterion.center.state()[0].keys() == means.keys() == {"image", "text"}
    assert all(torch.equal(criterion.center.state()[0][name], means[name]) for name in means)
    criterion(*second)
    assert torch.allclose(criterion.center.state()[0]["image"], torch.cat([first[0], second[0]]).mean(0), atol=1e-5)


@pytest.mark.parametrize("teacher", ["mean", "image", "text", "agreement"])
@pytest.mark.parametrize("center", ["none", "batch", "running"])
def test_the_teacher_gets_the_targets_that_are_wanted(teacher: str, center: str) -> None:
    batches = [(*anisotropic(seed=seed), None) for seed in range(4)]
    criterion = loss(teacher=teacher, center=center, teacher_targets=4.0)
    with pytest.raises(TrainingError, match="needs calibrate"):
        criterion(*anisotropic())
    criterion.calibrate(batches)
    assert criterion.center.state() == ({}, {})
    entropies = [criterion.diagnostics(image, text)["teacher_entropy"] for image, text, _ in batches]
    # a running mean is not there yet in a look at a first batch: its mean is that of the batch
    assert math.exp(sum(entropies) / 4) == pytest.approx(4.0, rel=0.2 if center == "running" else 1e-3)
    image, text = anisotropic(seed=9)
    expected = loss(teacher=teacher, center=center, teacher_temperature=criterion.found_temperature)(image, text)
    assert torch.equal(criterion(image, text), expected)


def test_targets_that_cannot_be_had_are_one_line() -> None:
    with pytest.raises(TrainingError, match=r"teacher_targets: should be between .* and 16.* \(got 20\)"):
        loss(teacher_targets=20.0).calibrate([(*anisotropic(), None)])


def test_keeping_the_base_is_added() -> None:
    (image, text), base = anisotropic(), anisotropic(seed=1)
    criterion = loss(keep_base=0.5, center="batch", teacher_temperature=0.2)
    assert criterion.needs_base
    own = {"image": image - image.mean(0), "text": text - text.mean(0)}
    kept = keep_structure(own, {"image": base[0] - base[0].mean(0), "text": base[1] - base[1].mean(0)}, 0.2)
    expected = cmsa(*own.values(), 0.05, teacher_temperature=0.2) + 0.5 * kept
    assert torch.allclose(criterion(image, text, base=base), expected)
    hard = loss(teacher="none", keep_base=0.5)(image, text, base=base)
    assert float(hard) > float(loss(teacher="none")(image, text))
    with pytest.raises(TrainingError, match="keep_base needs the vectors of the backbone"):
        criterion(image, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "none", "teacher_targets": 4.0}, "teacher_targets: is set, but teacher is 'none'"),
        ({"teacher_temperature": 0.1, "teacher_targets": 4.0}, "teacher_temperature is 0.1; set one of them to null"),
        ({**PUBLIC_CODE, "center": "batch"}, "center: should be \"none\" with variant 'reference'"),
        ({**PUBLIC_CODE, "keep_base": 1.0}, "keep_base: should be 0.0 with variant 'reference'"),
        ({**PUBLIC_CODE, "teacher_targets": 4.0}, "teacher_targets: should be null with variant 'reference'"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        loss(**changes)
    assert message in str(error.value)
