"""Sweeps over settings and over corrupted items, on a tiny shop with a tiny backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments import sweep
from experiments.corruption import corrupt
from experiments.study import retrieval_at_1
from sda_core.artifacts import ITEMS, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.image_store import ImageStore


@pytest.mark.parametrize("how", ["shuffle", "blank", "noise"])
def test_texts_of_a_share_are_corrupted_and_nothing_else(with_images: Workspace, tmp_path: Path, how: Any) -> None:
    target = Workspace(tmp_path)
    spoilt = corrupt(with_images, target, "text", how, 0.4, seed=1)
    before, after = ITEMS.read(with_images.items), ITEMS.read(target.items)
    assert len(spoilt) == round(0.4 * len(before))
    changed = before["item_id"].filter(before["title"] != after["title"]).to_list()
    assert set(changed) <= set(spoilt)
    assert len(changed) > 0.8 * len(spoilt)  # two items may share their title
    if how == "shuffle":
        assert sorted(before["title"]) == sorted(after["title"])
    for name in ("item_id", "raw_item_id", "image_references"):
        assert before[name].equals(after[name])
    some = int(spoilt[0])
    assert ImageStore(target.images).get(some) == ImageStore(with_images.images).get(some)


@pytest.mark.parametrize("how", ["shuffle", "blank", "noise"])
def test_images_of_a_share_are_corrupted_and_nothing_else(with_images: Workspace, tmp_path: Path, how: Any) -> None:
    target = Workspace(tmp_path)
    spoilt = set(corrupt(with_images, target, "image", how, 0.5, seed=1).tolist())
    assert set(corrupt(with_images, target, "image", how, 0.5, seed=1).tolist()) == spoilt  # a second time, over the first
    before, after = ImageStore(with_images.images), ImageStore(target.images)
    ids = ITEMS.read(with_images.items)["item_id"].to_list()
    changed = {item for item in ids if before.get(item) != after.get(item)}
    assert changed <= spoilt
    assert len(changed) > 0.8 * len(spoilt)
    if how == "shuffle":
        assert sorted(before.get(item) or b"" for item in ids) == sorted(after.get(item) or b"" for item in ids)
    assert ITEMS.read(target.items).equals(ITEMS.read(with_images.items))


def test_a_sweep_over_corrupted_texts(
    on_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    asked = {"source": on_tiny, "corrupted": "text", "seeds": Numbers((1,))}
    sweep.main("noisy", Names(("0.5",)), **asked)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| zero_shot", "| 0.5"))]
    assert [row.split("|")[1].strip() for row in rows] == ["zero_shot", "0.5"]
    folder = tmp_path / "experiments" / "runs" / "noisy"
    left = tmp_path / "experiments" / "results" / "sweep-noisy"
    assert (left / "plot.png").stat().st_size > 5000
    assert rows[1] in (left / "table.md").read_text(encoding="utf-8").splitlines()
    workspace = Workspace(folder / "0.5" / "seed-1")
    spoilt = pl.read_parquet(Workspace(workspace.root / "spoilt").items)["title"]
    assert (spoilt != pl.read_parquet(workspace.items)["title"]).mean() == pytest.approx(0.5, abs=0.1)
    vectors = {variant: workspace.embeddings(variant).read_bytes() for variant in ("zero_shot", "sda")}
    assert vectors["zero_shot"] != vectors["sda"]
    written = workspace.adapter("sda").stat().st_mtime_ns
    sweep.main("noisy", Names(("0.5",)), **asked)  # nothing is done again
    assert workspace.adapter("sda").stat().st_mtime_ns == written
    assert np.isfinite(float(rows[1].split("|")[7]))
    shares = [float(row.split("|")[5]) for row in rows]
    expected = [retrieval_at_1(workspace.embeddings(variant)) for variant in ("zero_shot", "sda")]
    assert shares == pytest.approx(expected, abs=5e-4)
