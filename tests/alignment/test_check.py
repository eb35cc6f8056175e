"""The figures before step 0 and after, against NumPy; what is said about them, and when a training is stopped."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from sda_core.alignment.check import (
    Batch,
    Checked,
    Figures,
    Spread,
    check,
    collapsed,
    effective_rank,
    measure,
    problem,
    spreads,
    watch,
)
from sda_core.errors import TrainingError
from sda_core.losses import build
from sda_core.params import LossParams, TrainingParams
from tests.sections import SHIPPED, changed

LOSS = changed(SHIPPED.train_adapter.loss, center="none")
SECTION = "params.yaml: train_adapter.loss"


def training(**changes: Any) -> TrainingParams:
    return TrainingParams.model_construct(**{"batch_size": 32, "check": "stop", **changes})


def sample(common: float, num_batches: int = 3, rows: int = 32, width: int = 24) -> list[Batch]:
    """Vectors whose pairs belong together, and which share a direction of the given length."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_batches):
        content_BD = torch.randn(rows, width, generator=generator)
        image_BD, text_BD = (content_BD + 0.3 * torch.randn(rows, width, generator=generator) + common for _ in range(2))
        found.append(Batch(image_BD, text_BD, torch.arange(rows), (image_BD, text_BD)))
    return found


@pytest.mark.parametrize("common", [0.0, 5.0])
def test_the_figures_are_those_of_numpy(common: float) -> None:
    batches = sample(common)
    found = measure(batches, build(LOSS))
    image, text = (
        np.concatenate([of.double().numpy() for of in side])
        for side in ([batch.image_BD for batch in batches], [batch.text_BD for batch in batches])
    )
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    off = ~np.eye(len(image), dtype=bool)
    assert found.items == 96
    assert found.cosine_images == pytest.approx((image @ image.T)[off].mean(), abs=1e-5)
    assert found.cosine_texts == pytest.approx((text @ text.T)[off].mean(), abs=1e-5)
    assert found.cosine_other_pair == pytest.approx((image @ text.T)[off].mean(), abs=1e-5)
    assert found.cosine_own_pair == pytest.approx(np.diag(image @ text.T).mean(), abs=1e-5)
    for x, rank in ((image, found.rank_images), (text, found.rank_texts)):
        p = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        p = p / p.sum()
        assert rank == pytest.approx(math.exp(-(p * np.log(p + 1e-30)).sum()), rel=1e-4)
    entropies = []
    for place in range(0, 96, 32):
        v, t = image[place : place + 32], text[place : place + 32]
        e = np.exp((v @ v.T + t @ t.T) / 2 / 0.05)
        p = e / e.sum(1, keepdims=True)
        entropies.append(-(p * np.log(p)).sum(1).mean())
    assert found.teacher_targets == pytest.approx(math.exp(np.mean(entropies)), rel=1e-4)


def test_a_common_direction_is_stopped_and_the_advice_helps() -> None:
    batches = sample(5.0)
    criterion = build(LOSS)
    before = measure(batches, criterion)
    assert before.cosine_images > 0.9
    with pytest.raises(
        TrainingError, match=r"nearly uniform \(.* of 32 effective targets; .*\.center to batch and .*\.teacher_targets to 4"
    ) as e:
        check(before, criterion, LOSS, training(), SECTION, say=True)
    assert "\n" not in str(e.value)
    for changes in (
        {"center": "batch", "temperature": 0.2},
        {"center": "batch", "teacher_targets": 4.0},
        {"teacher_source": "base", "teacher_targets": 4.0},
    ):
        loss = LOSS.model_copy(update=changes)
        better = build(loss)
        better.calibrate([(batch.image_BD, batch.text_BD, batch.groups_B) for batch in batches])
        figures = measure(batches, better)
        assert 1.05 < figures.teacher_targets < 16
        check(figures, better, loss, training(), SECTION, say=True)


def described(before: Figures, loss: LossParams, batch_size: int = 32) -> tuple[str, str]:
    found = problem(before, batch_size, SECTION, loss)
    assert found is not None
    return found.what, found.advice


def test_a_fixed_uniform_teacher_is_said_to_teach_little() -> None:
    uniform, fixed_loss = figures(teacher_targets=32.0), changed(LOSS, teacher_source="base")
    (followed, advice), (fixed, fixed_advice) = (described(uniform, loss) for loss in (LOSS, fixed_loss))
    assert "may make all vectors alike" in followed
    assert "teach little" in fixed
    assert "alike" not in fixed
    assert "center to batch" in advice
    assert fixed_advice == "set train_adapter.loss.teacher_targets to 4"
    with pytest.raises(TrainingError, match="teach little"):
        check(uniform, build(fixed_loss), fixed_loss, training(), SECTION, say=True)


REFERENCE = changed(LOSS, variant="reference", detach_teacher=False, normalize=False, temperature=3.0, learn_temperature=True)


@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        (REFERENCE, "set train_adapter.loss.variant to paper, train_adapter.loss.detach_teacher to true, .*center to batch"),
        (
            changed(LOSS, detach_teacher=False),
            "set train_adapter.loss.detach_teacher to true, train_adapter.loss.center to batch",
        ),
    ],
)
def test_a_soft_teacher_with_a_gradient_is_stopped_however_few_its_targets(loss: LossParams, advice: str) -> None:
    for targets in (1.1, 4.0, 12.7, 31.0):
        with pytest.raises(TrainingError, match=rf"gradients pass through the teacher.*{targets:.3g} of 32.*{advice}"):
            check(figures(teacher_targets=targets), build(loss), loss, training(), SECTION, say=True)
    certain = figures(teacher_targets=1.0005 if loss.variant == "reference" else 1.01)  # its gradient is nearly zero
    check(certain, build(loss), loss, training(), SECTION, say=True)
    if loss.variant == "reference":  # collapsed in training, unlike the paper's formula
        with pytest.raises(TrainingError, match="gradients pass through the teacher"):
            check(figures(teacher_targets=1.03), build(loss), loss, training(), SECTION, say=True)
    for teaching in ({"center": "batch"}, {"detach_teacher": False, "teacher_source": "base"}):
        sound = changed(LOSS, **teaching)
        check(figures(teacher_targets=12.7), build(sound), sound, training(), SECTION, say=True)


@pytest.mark.parametrize("center", ["none", "running"])
def test_a_soft_teacher_of_vectors_that_are_not_centred_is_stopped(center: str) -> None:
    """Equal vectors make it uniform, and a uniform teacher makes vectors equal."""
    loss = changed(LOSS, center=center)
    for targets in (2.1, 4.0, 16.0):
        with pytest.raises(
            TrainingError, match=rf"from the trained vectors, and it is soft \({targets:.3g} of 32.*may make.*to base"
        ):
            check(figures(teacher_targets=targets), build(loss), loss, training(), SECTION, say=True)
    for targets, sound in ((1.9, loss), (15.9, changed(loss, center="batch")), (15.9, changed(loss, teacher_source="base"))):
        check(figures(teacher_targets=targets), build(sound), sound, training(), SECTION, say=True)


def test_a_uniform_teacher_of_centred_vectors_needs_other_targets() -> None:
    what, advice = described(figures(teacher_targets=31.0), changed(LOSS, center="batch"))
    assert "nearly uniform" in what
    assert advice == "set train_adapter.loss.teacher_targets to 4"


def test_a_soft_teacher_with_a_gradient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check(figures(teacher_targets=12.7), build(REFERENCE), REFERENCE, training(check="warn"), SECTION, say=True)
    assert "so training would make all vectors alike; set train_adapter.loss.variant to paper, " in caplog.text


def test_a_certain_teacher_is_said_to_be_infonce(caplog: pytest.LogCaptureFixture) -> None:
    loss = LOSS.model_copy(update={"temperature": 0.005})
    before = measure(sample(0.0), build(loss))
    assert before.teacher_targets < 1.05
    with caplog.at_level(logging.INFO):
        check(before, build(loss), loss, training(check="stop"), SECTION, say=True)  # it learns, so it is not stopped
    assert "so CMSA is InfoNCE" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "before training: 96 items, mean cosine of two items" in caplog.text
    caplog.clear()
    hard = LOSS.model_copy(update={"teacher": "none"})
    with caplog.at_level(logging.INFO):
        check(measure(sample(0.0), build(hard)), build(hard), hard, training(), SECTION, say=True)
        check(before, build(loss), loss, training(check="warn"), SECTION, say=False)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_running_mean_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Its figures before step 0 look sound."""
    for center, warned in (("running", True), ("batch", False)):
        loss = LOSS.model_copy(update={"center": center, "temperature": 0.2})
        criterion = build(loss)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            check(measure(sample(5.0), criterion), criterion, loss, training(check="warn"), SECTION, say=True)
        assert ("no gradient passes through a running mean" in caplog.text) == warned
        assert ("set train_adapter.loss.center to batch" in caplog.text) == warned


def figures(**changes: float) -> Figures:
    start = dict.fromkeys(("cosine_images", "cosine_texts", "cosine_own_pair", "cosine_other_pair", "retrieval"), 0.2)
    return Figures(**{"items": 96, "rank_images": 20.0, "rank_texts": 20.0, "teacher_targets": 4.0, **start, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({}, {}, []),
        ({}, {"cosine_texts": 0.998}, ["texts"]),
        ({"cosine_texts": 0.93}, {"cosine_texts": 0.998}, ["texts"]),
        ({"cosine_texts": 0.97}, {"cosine_texts": 0.96}, []),  # the backbone's own, and no worse
        ({}, {"rank_images": 1.5}, ["images"]),
        ({}, {"rank_images": 1.5, "cosine_texts": 0.999}, ["images", "texts"]),
    ],
)
def test_vectors_that_became_alike(before: dict[str, float], after: dict[str, float], found: list[str]) -> None:
    one, two = figures(**before), figures(**after)
    assert collapsed(one, two) == found
    checked = Checked(one, two, 0.07)
    metrics, details = checked.metrics(), checked.details()
    assert metrics["collapsed"] == float(bool(found))
    assert metrics["text_cosine_after"] == two.cosine_texts
    assert metrics["own_pair_gap_before"] == one.cosine_own_pair - one.cosine_other_pair
    assert len(metrics) == 11, "dvc exp show has a column for each"
    assert (details["items"], details["teacher_temperature"]) == (96, 0.07)
    assert {"items": 96, **details["after"]} == asdict(two)


@pytest.mark.parametrize("batch_size", [8, 9, 32, 4096])
def test_the_advice_is_a_number_that_can_be_had(batch_size: int) -> None:
    _, advice = described(figures(teacher_targets=float(batch_size)), changed(LOSS, center="batch"), batch_size)
    wanted = int(advice.rsplit(" ", 1)[1])
    assert 1 < wanted <= batch_size / 2


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_a_small_batch_needs_more_items(batch_size: int) -> None:
    for targets in (1.0, float(batch_size)):
        _, advice = described(figures(teacher_targets=targets), changed(LOSS, center="batch"), batch_size)
        assert "set train_adapter.training.batch_size to 8 or more" in advice


def test_the_error_of_the_calibration_stops_nothing() -> None:
    for targets, loss in ((2.0000002, LOSS), (16.000001, changed(LOSS, center="batch"))):
        assert problem(figures(teacher_targets=targets), 32, SECTION, loss) is None


@pytest.mark.parametrize("common", [0.0, 5.0])
@pytest.mark.parametrize(
    "loss",
    [
        REFERENCE,
        LOSS,
        changed(LOSS, detach_teacher=False),
        changed(LOSS, detach_teacher=False, temperature=0.5),
        changed(LOSS, teacher_temperature=0.4),
        changed(LOSS, teacher_temperature=0.004),
        changed(LOSS, center="batch", temperature=5.0),
        changed(LOSS, center="batch", temperature=0.001),
        changed(LOSS, center="running", temperature=0.5),
        changed(LOSS, teacher_source="base", teacher_temperature=5.0),
        changed(LOSS, teacher_source="base", temperature=0.001),
        changed(LOSS, teacher_source="base", center="batch", temperature=5.0),
    ],
)
def test_a_loss_that_follows_the_advice_passes(loss: LossParams, common: float) -> None:
    """Whatever is wrong, the changes of the advice are valid settings, and lead to a training that starts."""
    batches = sample(common)
    found = problem(measure(batches, build(loss)), 32, SECTION, loss)
    if found is None:
        return
    pairs = dict(re.findall(r"train_adapter\.loss\.(\w+) to ([\w.]+)", found.advice.split(", or ")[0]))
    assert pairs
    better = changed(loss, **{name: YAML(typ="safe").load(value) for name, value in pairs.items()})
    criterion = build(better)
    criterion.calibrate([(batch.image_BD, batch.text_BD, batch.groups_B) for batch in batches])
    after = problem(measure(batches, criterion), 32, SECTION, better)
    assert after is None or not after.stops
    if "teacher_targets" in pairs:
        assert after is None


def test_the_spread_of_a_batch() -> None:
    (batch,) = sample(1.0, num_batches=1)
    off = ~np.eye(32, dtype=bool)
    found = spreads(1000 * batch.image_BD.half(), batch.text_BD)
    for name, x_BD in (("images", batch.image_BD), ("texts", batch.text_BD)):
        x = x_BD.double().numpy()
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        p = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        p = p / p.sum()
        assert found[name].cosine == pytest.approx((x @ x.T)[off].mean(), abs=1e-3)
        assert found[name].rank == pytest.approx(math.exp(-(p * np.log(p + 1e-30)).sum()), rel=1e-2)


OPEN = Spread(0.2, 20.0)
BEFORE = {"images": OPEN, "texts": OPEN}


@pytest.mark.parametrize(
    ("images", "texts", "alike"),
    [
        (Spread(0.3, 20.0), Spread(0.9, 20.0), ""),
        (Spread(0.3, 20.0), Spread(0.925, 20.0), "texts"),
        (Spread(1.0, 20.0), Spread(0.9, 2.1), "images"),
        (OPEN, Spread(0.2, 1.9), "texts"),
        (Spread(0.99, 1.0), Spread(0.99, 1.0), "images and texts"),
    ],
)
def test_a_step_whose_vectors_have_collapsed(images: Spread, texts: Spread, alike: str) -> None:
    now = {"images": images, "texts": texts}
    warning = watch(BEFORE, now, 40, LOSS, training(check="warn"), SECTION)
    if not alike:
        assert warning is None
        assert watch(BEFORE, now, 40, LOSS, training(check="stop"), SECTION) is None
        return
    assert warning is not None
    for name in alike.split(" and "):
        distance = f"{1 - now[name].cosine:.2g}, 0.8 before"
        assert f"the embeddings of {name} have collapsed (mean of 1 - cosine of two items {distance}; effective rank" in warning
    assert warning.count("have collapsed") == len(alike.split(" and "))
    assert warning.startswith(f"{SECTION}: after 41 steps the embeddings")
    with pytest.raises(TrainingError, match=r"after 41 steps .* or set train_adapter\.training\.check to warn"):
        watch(BEFORE, now, 40, LOSS, training(check="stop"), SECTION)


def test_vectors_that_were_always_equal_have_not_collapsed() -> None:
    """All images are placeholders: their mean cosine is 1, up to rounding."""
    equal, same = Spread(1 - 1e-8, 0.0), Spread(1 + 1e-8, 0.0)
    assert watch({"images": equal, "texts": OPEN}, {"images": same, "texts": OPEN}, 0, LOSS, training(), SECTION) is None
    before, after = figures(cosine_images=1 - 1e-8, rank_images=0.0), figures(cosine_images=1 + 1e-8, rank_images=0.0)
    assert collapsed(before, after) == []


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ({}, "lower the learning rate, or set l.center to batch, or set l.teacher_source to base"),
        ({"center": "batch"}, "lower the learning rate, or set l.teacher_source to base"),
        ({"teacher": "none"}, "lower the learning rate, or set l.center to batch"),
        ({"center": "batch", "teacher_source": "base"}, "lower the learning rate"),
        (
            {"detach_teacher": False, "center": "batch"},
            "lower the learning rate, or set l.detach_teacher to true, or set l.teacher_source to base",
        ),
        (
            {"variant": "reference", "normalize": False, "detach_teacher": False},
            "lower the learning rate, or set l.variant to paper, l.detach_teacher to true, l.normalize to true and "
            "l.center to batch",
        ),
    ],
)
def test_the_remedies_are_settings_that_can_be_changed(changes: dict[str, Any], remedies: str) -> None:
    loss = LOSS.model_copy(update=changes)
    now = {"images": Spread(1.0, 20.0), "texts": OPEN}
    warning = watch(BEFORE, now, 3, loss, training(check="warn"), "params.yaml: l")
    assert warning is not None
    assert warning.rsplit("; ", 1)[1] == remedies


def test_rank_of_equal_rows_is_zero() -> None:
    assert effective_rank(torch.ones(5, 3)) == 0
    assert effective_rank(torch.eye(8)) == pytest.approx(7, rel=1e-6)
