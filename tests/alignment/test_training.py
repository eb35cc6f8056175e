"""The training loop: it learns, repeats to the bit, resumes, and names what it rejects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import build, modality
from sda_core.alignment import batch_rows, learning_rate, train_adapter
from sda_core.checkpoint import load_checkpoint
from sda_core.errors import TrainingError
from sda_core.processes import ALONE
from tests.alignment.toy import (
    CPU,
    LORA,
    LOSS,
    MODA,
    TRAINING,
    Encoder,
    assert_bit_equal,
    assert_same_checkpoint,
    items,
    run,
    run_tiny,
    weights,
)
from tests.sections import changed
from tests.tolerances import a_tenth_of_a_step, assert_gradients_equal_up_to_rounding


def test_it_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    untouched = Encoder().model.state_dict()
    model, curve = run(
        tmp_path, changed(TRAINING, num_steps=150, log_every=10, warmup_steps=10), changed(LOSS, learn_temperature=False)
    )
    assert [record.step for record in curve] == [*range(0, 150, 10), 149]
    assert np.mean([record.loss for record in curve[-3:]]) < 0.5 * curve[0].loss
    assert all(np.isfinite([record.loss, record.grad_norm]).all() for record in curve)
    assert {record.temperature for record in curve} == {0.1}
    state = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}  # type: ignore[union-attr]
    assert all(torch.equal(state[name], value) for name, value in untouched.items())
    assert not model.training


def test_two_runs_are_one(tmp_path: Path) -> None:
    first, one = run(tmp_path / "a")
    torch.manual_seed(99)
    second, two = run(tmp_path / "b")
    assert one == two
    assert_bit_equal(first, second)
    assert_same_checkpoint(tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint")
    third, _ = run(tmp_path / "c", changed(TRAINING, seed=4))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(third).values(), strict=True))


def test_the_split_backward_gives_the_gradient_of_the_whole() -> None:
    """One backward call on one graph, by hand."""
    from sda_core import losses
    from sda_core.alignment.inputs import Chunks, InputMaker
    from sda_core.alignment.state import trained_parameters
    from sda_core.alignment.training import Run, Step

    encoder, source = Encoder(), items()
    model = build(encoder.model, changed(MODA, lora_dropout=0.0), ["image", "text"], "0|2", 2, seed=1)
    for parameter in weights(model).values():
        nn.init.normal_(parameter, std=0.3)
    criterion = losses.build(LOSS)
    rows = np.arange(6)
    maker = InputMaker(encoder, source, None)
    ready = list(maker.stream([("image", rows), ("text", rows)]))
    trained = trained_parameters(model, criterion)
    moved = {"image": False, "text": False}
    chunks = Chunks(((0, 6),), 0)
    run = Run(TRAINING, chunks, ALONE, encoder, model, maker, CPU)
    step = Step(0, run, criterion, iter(ready), None)
    value = step.backward(trained, moved)
    got = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    assert moved == {"image": True, "text": True}
    for parameter in trained.values():
        parameter.grad = None
    with modality(model, "image"):
        image_BD = encoder.encode(model, ready[0].inputs)
    with modality(model, "text"):
        text_BD = encoder.encode(model, ready[1].inputs)
    whole = criterion(image_BD, text_BD)
    whole.backward()
    assert value == pytest.approx(whole.item(), rel=1e-4)
    assert len(got) == 2 * 4 + 1
    assert_gradients_equal_up_to_rounding(got, {name: p.grad for name, p in trained.items() if p.grad is not None})


def test_a_base_that_teaches_does_not_move(tmp_path: Path) -> None:
    """Batches of all items: a teacher made of what is trained changes from step to step, the base's does not."""
    training = changed(TRAINING, batch_size=19, log_every=1)
    targets = {}
    for source in ("adapted", "base"):
        model, curve = run(tmp_path / source, training, changed(LOSS, teacher_source=source, learn_temperature=False))
        targets[source] = [record.teacher_targets for record in curve]
        assert not model.training
    assert targets["base"] == pytest.approx([targets["adapted"][0]] * training.num_steps, rel=1e-4)
    assert max(targets["adapted"]) - min(targets["adapted"]) > 0.1


@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_a_base_that_teaches_in_chunks(tmp_path: Path, micro_batch_size: int) -> None:
    loss, adapter = changed(LOSS, teacher_source="base"), changed(MODA, lora_dropout=0.0)
    runs = {
        size: run(tmp_path / str(size), changed(TRAINING, micro_batch_size=size), loss, adapter, dtype=torch.float64)
        for size in (None, micro_batch_size)
    }
    whole, chunks = (weights(model) for model, _ in runs.values())
    for name, value in whole.items():
        torch.testing.assert_close(chunks[name], value, rtol=0, atol=1e-9)
    own = weights(run(tmp_path / "own", adapter=adapter, dtype=torch.float64)[0])
    assert max((own[name] - value).abs().max().item() for name, value in whole.items()) > 1e-3


def test_a_run_that_was_cut_ends_as_if_it_was_not(tmp_path: Path) -> None:
    whole, curve = run(tmp_path / "whole")

    class Stop(BaseException):
        pass

    class Stopping(Encoder):
        calls = 0

        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            Stopping.calls += torch.is_grad_enabled()  # the steps, not the looks before and after
            if Stopping.calls == 2 * 7 + 1:  # in step 7
                raise Stop
            return super().encode(model, inputs)

    with pytest.raises(Stop):
        run(tmp_path / "cut", encoder=Stopping())
    loaded = load_checkpoint(tmp_path / "cut" / "checkpoint", "inputs")
    assert loaded is not None
    assert loaded[1]["curve"][-1]["step"] == 4
    resumed, resumed_curve = run(tmp_path / "cut")
    assert resumed_curve == curve
    assert_bit_equal(resumed, whole)
    again, again_curve = run(tmp_path / "cut")  # nothing is left to do
    assert again_curve == curve
    assert_bit_equal(again, whole)


def test_sigkill_and_again(tmp_path: Path, repository: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint = tmp_path / "killed" / "checkpoint"
    whole, curve = run(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=repository, env=environment)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    loaded = load_checkpoint(checkpoint, "inputs")
    assert loaded is not None
    assert loaded[1]["curve"][-1]["step"] < 11
    resumed, resumed_curve = run(tmp_path / "killed")
    torch.set_num_threads(threads)
    assert resumed_curve == curve
    assert_bit_equal(resumed, whole)
    assert_same_checkpoint(checkpoint, tmp_path / "whole" / "checkpoint")


def test_learning_rate_rises_and_stays() -> None:
    assert [learning_rate(step, TRAINING) for step in range(5)] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01])
    assert learning_rate(0, changed(TRAINING, warmup_steps=0)) == 0.01


def test_too_few_items(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch_size: should be at most 19, .*with an image \(got 20\)"):
        run(tmp_path, changed(TRAINING, batch_size=20))


def test_nothing_to_train(tmp_path: Path) -> None:
    encoder = Encoder()
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        train_adapter(encoder, encoder.model, items(), TRAINING, LOSS, tmp_path / "checkpoint", "inputs", CPU)


def test_a_loss_that_is_not_finite_names_step_and_items(tmp_path: Path) -> None:
    class Broken(Encoder):
        calls = 0

        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            Broken.calls += torch.is_grad_enabled()
            return super().encode(model, inputs) * (torch.nan if Broken.calls == 2 * 3 + 2 else 1.0)

    expected = ", ".join(str(i) for i in items().item_ids[batch_rows(np.flatnonzero(items().shows_image), 3, TRAINING)])
    with pytest.raises(TrainingError, match=rf"train_adapter, step 3: loss nan .* \(items {expected}\)"):
        run(tmp_path, encoder=Broken())


def test_no_steps(tmp_path: Path) -> None:
    model, curve = run(tmp_path, changed(TRAINING, num_steps=0))
    assert curve == []
    assert not any(parameter.any() for name, parameter in weights(model).items() if "moda_B" in name)


def test_plain_lora_trains_too(tmp_path: Path) -> None:
    model, curve = run(tmp_path, adapter=LORA, loss=changed(LOSS, teacher="none"))
    assert len(curve) == 4
    assert any(parameter.any() for name, parameter in weights(model).items() if "moda_B" in name)


def test_gradient_checkpointing_needs_a_model_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gradient_checkpointing: is true, but a .* does not support gradient checkpointing"):
        run(tmp_path, changed(TRAINING, gradient_checkpointing=True))


def test_a_real_backbone_with_and_without_gradient_checkpointing(tmp_path: Path) -> None:
    """A Qwen2.5-VL architecture, images and words through its own inputs; recomputing changes nothing but time."""
    plain_model, curve = run_tiny(tmp_path / "plain")
    again_model, recomputed_curve = run_tiny(tmp_path / "recomputed", gradient_checkpointing=True)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again_model.modules())
    assert [record.loss for record in recomputed_curve] == pytest.approx([record.loss for record in curve], rel=1e-3)
    plain, recomputed = weights(plain_model), weights(again_model)
    assert len(plain) == 2 * 7 * 4
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, **a_tenth_of_a_step(TRAINING.learning_rate))
        assert value.any(), name
