"""The experiment's arithmetic: what is joined, averaged and shown; and which items are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments import gradient_conflict
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import TrainingError


def products(cosine: float, when: str = "after", **changes: Any) -> list[dict[str, Any]]:
    """Two blocks with a q_proj and an up_proj each; gradients of the lengths 2 and 3."""
    rows = []
    for place, layer in enumerate(["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj"]):
        for matrix in "AB":
            values = {"image_image": 4.0, "image_text": 6.0 * cosine, "text_text": 9.0, "gate_similarity": 0.5, "batch": 0}
            row = {"when": when, "place": place, "layer": layer, "matrix": matrix, "kind": layer.rpartition(".")[2]}
            rows.append({**row, **values, **changes})
    return rows


def test_weights_are_joined_before_batches_are_averaged() -> None:
    # batch 0: cosine 1 with products of 4 and 9; batch 1: cosine -1, ten times as strong; a batch without gradient
    strong = {"image_image": 40.0, "image_text": -60.0, "text_text": 90.0, "batch": 1}
    nothing = {"image_image": 0.0, "image_text": 0.0, "text_text": 0.0, "batch": 2}
    frame = pl.DataFrame(products(1.0) + products(0.0, **strong) + products(0.0, **nothing))
    assert gradient_conflict.cosines(frame, ["when"])["cosine"].to_list() == pytest.approx([0.0])
    mixed = pl.DataFrame(products(0.5)).with_columns(
        image_text=pl.when(pl.col("kind") == "q_proj").then(-6.0).otherwise(pl.col("image_text"))
    )
    assert gradient_conflict.joint_cosine(mixed) == pytest.approx((4 * -6 + 4 * 3) / (8 * 6))
    assert gradient_conflict.cosines(mixed, ["layer"])["cosine"].to_list() == pytest.approx([-1, 0.5, -1, 0.5])
    assert gradient_conflict.joint_cosine(pl.DataFrame(products(0.0, **nothing))) is None


def test_table_and_plot(tmp_path: Path) -> None:
    lora, moda = gradient_conflict.Arm("lora", "cmsa"), gradient_conflict.Arm("moda", "cmsa")
    before = products(0.0, "before")
    for row in before:
        row["image_image"] *= row["matrix"] == "B"  # a new adapter: no gradient in A
        row["text_text"] *= row["matrix"] == "B"
    results = {
        lora: [pl.DataFrame(before + products(value)) for value in (-0.2, -0.1)],
        moda: [pl.DataFrame(products(value)) for value in (0.4, 0.5)],
    }
    lines = gradient_conflict.table(results).splitlines()
    row = next(line for line in lines if line.startswith("| lora+cmsa, after |"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:3] == ["-0.150 (-0.20 .. -0.10)"] * 3
    assert cells[3:] == [
        "-0.150 (-0.20 .. -0.10)",
        "+1.000 (+1.00 .. +1.00)",
        "+0.667 (+0.67 .. +0.67)",
        "+0.500 (+0.50 .. +0.50)",
    ]
    new = next(line for line in lines if line.startswith("| lora+cmsa, before |"))
    assert new.split("|")[3].strip() == "-"
    assert sum(line.startswith("| moda+cmsa, before |") for line in lines) == 0
    gradient_conflict.plot(results, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert drawn.count('id="axes_') == 2


def test_trainings_that_are_left_out_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    (tmp_path / "params.yaml").write_bytes((repository / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    measured = []

    def measure(_: object, __: object, arm: Any, seed: int, *___: object) -> pl.DataFrame:
        measured.append((arm.name, seed))
        return pl.DataFrame(products(0.1))

    monkeypatch.setattr(gradient_conflict, "measure", measure)
    for _ in range(2):  # the second time from what is kept
        gradient_conflict.main("x", seeds=Numbers((1, 2)), trainings=Names(("moda+cmsa", "lora+infonce")))
        assert sorted(measured) == [("lora+infonce", 1), ("lora+infonce", 2), ("moda+cmsa", 1), ("moda+cmsa", 2)]
        shown = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "after |" in line]
        assert sorted(set(shown)) == ["| lora+infonce", "| moda+cmsa"]


def test_held_out_items_have_images_and_come_once() -> None:
    class Source:
        has_image = np.array([True] * 9 + [False] * 3 + [True] * 9)

    first = gradient_conflict.draw(Source(), 1, 2, 4)
    assert first.shape == (2, 4)
    assert len(set(first.ravel())) == 8
    assert Source.has_image[first].all()
    assert not np.array_equal(first, gradient_conflict.draw(Source(), 2, 2, 4))
    np.testing.assert_array_equal(first, gradient_conflict.draw(Source(), 1, 2, 4))
    with pytest.raises(TrainingError, match="20 items are to be held out and 4 are needed for a training batch, but 18 have"):
        gradient_conflict.draw(Source(), 1, 5, 4)
