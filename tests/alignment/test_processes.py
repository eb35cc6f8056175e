"""An adapter trained by several processes is the adapter that one trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sda_core.checkpoint import load_checkpoint
from sda_core.processes import ALONE
from tests.alignment import toy
from tests.tolerances import a_tenth_of_a_step

CHILD = Path(__file__).with_name("training_process.py")


def assert_close(first: Path, second: Path, tolerance: float = 1e-9) -> None:
    """The same curve, weights and moments."""
    (one, state), (two, other) = (load_checkpoint(path / "checkpoint", "inputs") for path in (first, second))  # type: ignore[misc]
    assert len(state["curve"]) == len(other["curve"]) > 1
    for record, expected in zip(state["curve"], other["curve"], strict=True):
        assert record == pytest.approx(expected, rel=1e-6, abs=tolerance)
    assert one.keys() == two.keys()
    assert any("exp_avg_sq" in name for name in one)
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it, undisturbed, in chunks and with dropout."""
    folder = tmp_path_factory.mktemp("alone")
    toy.run_shared(folder, ALONE, toy.Encoder())
    return folder


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(run_processes: Any, alone: Path, tmp_path: Path, count: int) -> None:
    assert run_processes(CHILD, count, "train", tmp_path, 0.0) == [0] * count
    assert_close(tmp_path, alone)


@pytest.mark.parametrize("center", ["none", "batch", "running"])
def test_without_chunks_and_dropout_they_equal_one_too(run_processes: Any, tmp_path: Path, center: str) -> None:
    """The means that are subtracted are those of the whole batch, running ones too, which the checkpoint holds."""
    assert run_processes(CHILD, 2, "whole", tmp_path / "shared", center) == [0, 0]
    toy.run_whole(tmp_path / "alone", ALONE, center)
    assert_close(tmp_path / "shared", tmp_path / "alone")
    tensors, _ = load_checkpoint(tmp_path / "shared" / "checkpoint", "inputs")  # type: ignore[misc]
    assert len([name for name in tensors if name.startswith("mean.")]) == (4 if center == "running" else 0)


def test_four_are_killed_and_two_go_on(run_processes: Any, start_processes: Any, alone: Path, tmp_path: Path) -> None:
    four = start_processes(CHILD, 4, "train", tmp_path, 0.2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint").exists() and all(one.is_alive() for one in four) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(one.is_alive() for one in four), "the run ended before it could be killed"
    for one in four:
        one.kill()
        one.join()
    cut = load_checkpoint(tmp_path / "checkpoint", "inputs")
    assert cut is not None
    assert cut[1]["curve"][-1]["step"] < 5
    assert run_processes(CHILD, 2, "train", tmp_path, 0.0) == [0, 0]
    assert_close(tmp_path, alone)


def test_a_mistake_of_one_is_everyones(run_processes: Any, tmp_path: Path) -> None:
    assert run_processes(CHILD, 2, "mistakes", tmp_path) == [0, 0]


def test_a_sharded_base_gives_the_same_adapter(run_processes: Any, tmp_path: Path) -> None:
    """With gradient checkpointing and without, in two processes against one."""
    assert run_processes(CHILD, 2, "sharded", tmp_path, address="127.0.0.2") == [0, 0]
    tolerance = a_tenth_of_a_step(toy.TRAINING.learning_rate)["atol"]
    model, _ = toy.run_tiny(tmp_path / "plain", micro_batch_size=2)
    toy.run_tiny(tmp_path / "base", micro_batch_size=2, teacher_source="base")
    for name, expected in (("False-adapted", "plain"), ("True-adapted", "plain"), ("True-base", "base")):
        assert_close(tmp_path / f"sharded-{name}", tmp_path / expected, tolerance=tolerance)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "base", tmp_path / "plain", tolerance=tolerance)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    trained = toy.weights(model)
    assert len(saved) == len(trained) == 2 * 7 * 4
    for name, value in saved.items():
        (expected,) = (one for key, one in trained.items() if key.replace(".default", "") == name)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
