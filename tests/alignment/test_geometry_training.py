"""Training on vectors that share one large direction, as a generative backbone's do: which loss learns there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sda_core.alignment import check
from sda_core.alignment import training as training_loop
from sda_core.alignment.check import Checked, Spread
from sda_core.errors import TrainingError
from tests.alignment.toy import LOSS, MODA, TRAINING, Encoder, run
from tests.sections import changed

PAPER = changed(LOSS, learn_temperature=False, temperature=0.05)
LONG = changed(TRAINING, num_steps=80, batch_size=16, learning_rate=0.01, check="warn")


class Anisotropic(Encoder):
    """The toy encoder, whose vectors have a common part ten times as long as their differences."""

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = super().encode(model, inputs)
        return found + 10 * torch.ones_like(found)


def trained(folder: Path, seed: int, **changes: Any) -> Checked:
    training = changed(LONG, seed=seed)
    _, curve = run(folder / str(seed), training, changed(PAPER, **changes), MODA, encoder=Anisotropic())
    return curve.check  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_literal_formula_has_nothing_to_teach_and_the_check_stops_it(tmp_path: Path, seed: int) -> None:
    found = trained(tmp_path, seed)
    assert found.before.teacher_targets > 8
    assert found.after.teacher_targets > 8
    with pytest.raises(TrainingError, match="nearly uniform"):
        run(tmp_path / "stopped", changed(LONG, seed=seed, check="stop"), PAPER, MODA, encoder=Anisotropic())
    assert not (tmp_path / "stopped" / "checkpoint").exists(), "no step was paid for"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_centred_vectors_learn_and_do_not_collapse(tmp_path: Path, seed: int) -> None:
    literal, centred = trained(tmp_path / "literal", seed), trained(tmp_path / "centred", seed, center="batch")
    assert centred.before.teacher_targets < 8
    assert not centred.metrics()["collapsed"]
    assert centred.after.retrieval > centred.before.retrieval
    assert centred.after.retrieval > literal.after.retrieval


def test_a_running_mean_lags_behind_and_lets_all_vectors_move_one_way(tmp_path: Path) -> None:
    """No gradient passes through it, so a step may move all vectors alike; on unrelated images and texts they collapse."""
    found = trained(tmp_path, 1, center="running")
    assert found.before.teacher_targets < 8
    assert found.metrics()["collapsed"]


def test_a_collapse_that_the_figures_did_not_foresee_is_stopped_during_training(tmp_path: Path) -> None:
    """The figures before step 0 look sound, so the training starts; no more steps are paid for than needed to see it."""
    training = changed(LONG, seed=1, check="stop")
    with pytest.raises(TrainingError, match=r"after \d+ steps the embeddings of (images|texts) have collapsed") as caught:
        run(tmp_path, training, changed(PAPER, center="running"), MODA, encoder=Anisotropic())
    step = int(re.search(r"after (\d+) steps", str(caught.value))[1])  # type: ignore[index]
    assert 0 < step < training.num_steps
    assert "set train_adapter.training.check to warn" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=rf"after {step} steps "):  # resumed from the checkpoint before it
        run(tmp_path, training, changed(PAPER, center="running"), MODA, encoder=Anisotropic())


def test_a_collapse_during_training_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, 1, center="running")
    seen = [record.getMessage() for record in caplog.records if ": after " in record.getMessage()]
    assert len(seen) == 1
    assert "have collapsed" in seen[0]
    caplog.clear()
    trained(tmp_path / "centred", 1, center="batch")
    assert "have collapsed" not in caplog.text


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "wanted"),
    [(2, None, 18), (8, 2, 16), (16, None, 16), (16, 3, 16)],
)
def test_watched_items_fill_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, micro_batch_size: int | None, wanted: int
) -> None:
    """There are 19 items; the base's vectors are those of the watched items."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(image_BD: Tensor, text_BD: Tensor) -> dict[str, Spread]:
        seen.append((image_BD.clone(), text_BD.clone()))
        return {"images": Spread(0.5, 3.0), "texts": Spread(0.5, 3.0)}

    monkeypatch.setattr(check, "spreads", spy)
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    run(tmp_path, changed(LONG, num_steps=1, learning_rate=1e-9, checkpoint_every=1, **sizes), LOSS, MODA)
    before, after = seen
    assert len(before[0]) == wanted
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_few_items_are_watched_in_a_large_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training_loop, "WATCHED", 5)
    seen: list[int] = []
    monkeypatch.setattr(check, "spreads", lambda image_BD, _: seen.append(len(image_BD)) or {})
    run(tmp_path, changed(LONG, num_steps=1), LOSS, MODA)
    assert seen == [5, 5]
