"""Warnings about a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import build
from sda_core.alignment.check import Batch
from tests.alignment.toy import (
    LOSS,
    MODA,
    TRAINING,
    Encoder,
    run,
)
from tests.sections import changed


def test_runs_that_changed_nothing_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Deaf(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            vectors = super().encode(model, inputs)
            return vectors.detach() if float(inputs["x"].max()) > 1 else vectors  # letter counts exceed 1, grey values do not

    caplog.set_level("WARNING", "sda_core")
    run(tmp_path / "deaf", encoder=Deaf())
    assert "the text pass never produced a gradient" in caplog.text
    assert "image pass" not in caplog.text
    assert "still zero" not in caplog.text
    caplog.clear()

    class Cut(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            return super().encode(model, inputs).detach()

    run(tmp_path / "cut", encoder=Cut())
    assert "the adapter is still zero" in caplog.text
    assert "image pass" in caplog.text
    caplog.clear()
    run(tmp_path / "good", loss=changed(LOSS, center="batch", teacher_targets=2.0))
    assert caplog.text == ""


def test_vectors_that_become_alike_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Narrow(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            found = super().encode(model, inputs)
            adapted = any(parameter.requires_grad for parameter in model.parameters()) and not model.training
            off = any(getattr(module, "_disable_adapters", False) for module in model.modules())
            return found * (1.0 if off or not adapted else 1e-3) + (0.0 if off or not adapted else 1.0)

    run(tmp_path, encoder=Narrow())
    assert "the embeddings of images have collapsed" in caplog.text
    assert "the embeddings of texts have collapsed" in caplog.text


@pytest.mark.parametrize(
    ("first", "last", "vague"), [(1.3, 26.8, True), (1.3, 15.0, False), (21.9, 31.0, False), (1.0, 1.0, False)]
)
def test_a_teacher_that_grows_vague_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: float, last: float, vague: bool
) -> None:
    from sda_core.alignment import health

    model, _ = run(tmp_path)
    sample = [Batch(torch.eye(3), torch.eye(3), torch.arange(3), (torch.eye(3), torch.eye(3)))]
    caplog.clear()
    health.warn(model, {"image": True, "text": True}, health.GateWatch(), sample, (first, last), 32)
    assert ("teacher_source to base" in caplog.text) == vague
    assert (f"{last:.3g} of 32 effective targets, {first:.2g} in the first step" in caplog.text) == vague


def test_images_and_words_that_do_not_belong_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Noise has no words: a teacher made of the trained vectors ends at naming everything, the base's does not."""
    training = changed(TRAINING, num_steps=100, batch_size=19, learning_rate=0.02)
    ends = {}
    for teacher_source in ("adapted", "base"):
        caplog.clear()
        loss = changed(LOSS, learn_temperature=False, temperature=0.01, teacher_temperature=0.02, teacher_source=teacher_source)
        _, curve = run(tmp_path / teacher_source, training, loss)
        ends[teacher_source] = curve[0].teacher_targets, curve[-1].teacher_targets
        assert ("set the loss's teacher_source to base" in caplog.text) == (teacher_source == "adapted")
    assert ends["adapted"][0] == pytest.approx(ends["base"][0], rel=1e-4)
    assert ends["adapted"] == pytest.approx((1.0, 19.0), abs=0.5)
    assert ends["base"][1] == pytest.approx(ends["base"][0], rel=1e-4)


def test_gates_that_swing_are_counted() -> None:
    from sda_core.alignment.health import GateWatch

    model = build(Encoder().model, MODA, ["image", "text"], "0|2", 2, seed=1)
    watch = GateWatch()
    embedding = next(parameter for name, parameter in model.named_parameters() if "moda_embedding" in name)
    start = embedding.detach().clone()
    for sign in (1.0, -1.0, 1.0, -1.0):
        with torch.no_grad():
            embedding.copy_(20 * sign * start)
        watch.record(model)
    assert list(watch.swings.values()) == [2, 0]
