"""The state of a run: its checkpoint, and which parameters decay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import build
from sda_core.alignment import train_adapter
from tests.alignment.toy import (
    CPU,
    LORA,
    LOSS,
    MODA,
    TRAINING,
    Encoder,
    items,
    run,
    weights,
)
from tests.sections import changed


def test_a_checkpoint_of_other_inputs_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path)
    encoder = Encoder()
    model = build(encoder.model, MODA, ["image", "text"], "0|2", 2, seed=1)
    with caplog.at_level(logging.INFO):
        train_adapter(encoder, model, items(), TRAINING, LOSS, tmp_path / "checkpoint", "other inputs", CPU)
    assert "was made from other inputs and is ignored; training restarts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):  # the same fingerprint, but another adapter
        run(tmp_path, adapter=LORA)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path)
    assert "training restarts" in caplog.text


def test_weight_decay_spares_gate_and_temperature(tmp_path: Path) -> None:
    """With no gradient worth speaking of, only what decays moves."""
    training = changed(TRAINING, num_steps=3, weight_decay=0.5, learning_rate=1e-3)
    encoder = Encoder()
    start = weights(build(Encoder().model, MODA, ["image", "text"], "0|2", 2, seed=1))

    class Cut(Encoder):
        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            return super().encode(model, inputs) * 1e-30

    model, _ = run(tmp_path, training, changed(LOSS, normalize=False, learn_temperature=False), encoder=Cut())
    assert encoder is not None
    for name, value in weights(model).items():
        if "moda_gate" in name or "moda_embedding" in name:
            assert torch.equal(value, start[name]), name
        elif "moda_A" in name:
            assert value.norm() < start[name].norm(), name
