"""The backbone's own vectors, computed once a run: those that the backbone gives, resumed, and shared between processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sda_core.adapters import base_model, build, modality
from sda_core.alignment.base_vectors import BaseVectors
from sda_core.alignment.inputs import InputMaker
from sda_core.processes import ALONE
from tests.alignment.toy import LOSS, MODA, TRAINING, Encoder, assert_bit_equal, items, run
from tests.sections import changed

BASE = changed(LOSS, teacher_source="base", learn_temperature=False)


class Counting(Encoder):
    """Counts the passes without the adapter, and of how many rows."""

    rows = 0

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        if any(getattr(module, "_disable_adapters", False) for module in model.modules()):
            self.rows += len(inputs["x"])
        return super().encode(model, inputs)


def test_they_are_those_of_the_backbone(tmp_path: Path) -> None:
    encoder, source = Encoder(), items()
    model = build(encoder.model, MODA, ["image", "text"], "0|2", 2, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moda_B" in name:
                parameter.normal_()
    maker = InputMaker(encoder, source, None)
    rows = np.flatnonzero(source.shows_image)
    vectors = BaseVectors(encoder, model, maker, rows, tmp_path, "inputs")
    vectors.fill(4, ALONE, sharded=False)
    asked = rows[[7, 0, 7, 3]]
    for name in ("image", "text"):
        with modality(model, name), base_model(model):
            expected = encoder.encode(model, maker.make(name, asked).inputs)
        torch.testing.assert_close(vectors.of(name, asked), expected)
        with modality(model, name), torch.no_grad():
            assert not torch.allclose(encoder.encode(model, maker.make(name, asked).inputs), expected)


def test_a_run_computes_them_once_and_resumes_them(tmp_path: Path) -> None:
    num_items = len(np.flatnonzero(items().shows_image))
    encoder = Counting()
    whole, curve = run(tmp_path / "whole", loss=BASE, encoder=encoder)
    assert encoder.rows == 2 * num_items, "the look before step 0 reads them as well"
    (block,) = (tmp_path / "whole").glob("base-*.safetensors")
    kept = block.read_bytes()

    again = Counting()
    (tmp_path / "whole" / "checkpoint").unlink()
    model, again_curve = run(tmp_path / "whole", loss=BASE, encoder=again)
    assert again.rows == 0
    assert again_curve == curve
    assert_bit_equal(model, whole)

    (tmp_path / "whole" / "checkpoint").unlink()
    block.write_bytes(kept[: len(kept) // 2])
    run(tmp_path / "whole", changed(TRAINING, num_steps=1), BASE, encoder=Counting())
    assert len(block.read_bytes()) <= len(kept)


@pytest.mark.parametrize(
    "loss", [BASE, changed(LOSS, keep_base=0.5), changed(LOSS, center="running", teacher_targets=3.0, keep_base=0.1)]
)
def test_a_run_that_was_cut_ends_as_if_it_was_not(tmp_path: Path, loss: Any) -> None:
    """Running means, the temperature that was found and the base's vectors belong to an unfinished run."""
    whole, curve = run(tmp_path / "whole", loss=loss)

    class Stop(BaseException):
        pass

    class Stopping(Encoder):
        calls = 0

        def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            self.calls += torch.is_grad_enabled()
            if self.calls == 2 * 7 + 1:
                raise Stop
            return super().encode(model, inputs)

    with pytest.raises(Stop):
        run(tmp_path / "cut", loss=loss, encoder=Stopping())
    resumed, resumed_curve = run(tmp_path / "cut", loss=loss)
    assert resumed_curve == curve
    assert resumed_curve.check == curve.check  # type: ignore[attr-defined]
    assert_bit_equal(resumed, whole)


@pytest.mark.parametrize("micro_batch_size", [2, 3])
@pytest.mark.parametrize("center", ["batch", "running"])
def test_chunks_are_the_whole_batch(tmp_path: Path, center: str, micro_batch_size: int) -> None:
    loss = changed(LOSS, center=center, teacher_targets=3.0, keep_base=0.3, learn_temperature=False)
    adapter = changed(MODA, lora_dropout=0.0)
    losses = {}
    for size in (None, micro_batch_size):
        training = changed(TRAINING, micro_batch_size=size, log_every=1)
        _, curve = run(tmp_path / str(size), training, loss, adapter, dtype=torch.float64)
        losses[size] = [record.loss for record in curve]
    assert losses[micro_batch_size] == pytest.approx(losses[None], rel=1e-6)
