"""Three views of an item, on a tiny shop with a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import three_views
import torch

from sda_core.artifacts import ITEMS, Workspace


def test_every_rung_is_measured_before_and_after(
    on_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(on_tiny), "--name", "three", "--seeds", "1", "--num-held-out", "16"]
    monkeypatch.setattr("sys.argv", ["three_views.py", *arguments])
    three_views.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| lora", "| moda"))]
    assert len(rows) == 8
    folder = on_tiny / "experiments" / "views" / "three"
    found = pl.concat([pl.read_parquet(path) for path in folder.glob("*/*.parquet")])
    assert len(found) == 4 * 2 * 3
    before = found.filter(pl.col("when") == "before")
    assert before.filter(pl.col("rung").str.starts_with("lora"))["cosine"].is_between(-1, 1).all()
    # before training both sets of views start alike; training on another set ends elsewhere
    starts = {rung: before.filter(rung=rung)["cosine"].to_list() for rung in ("moda, 2 views", "moda, 3 views")}
    assert starts["moda, 2 views"] == pytest.approx(starts["moda, 3 views"])
    after = {rung: found.filter(rung=rung, when="after")["cosine"].to_list() for rung in starts}
    assert after["moda, 2 views"] != pytest.approx(after["moda, 3 views"], abs=1e-6)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}
    three_views.main()
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}


def test_words_and_attributes_share_no_field(on_tiny: Path) -> None:
    params = three_views.load_params(on_tiny / "params.yaml")
    views = three_views.Views(Workspace(on_tiny), params, None)  # type: ignore[arg-type]
    titles = ITEMS.read(Workspace(on_tiny).items)["title"]
    row = int(titles.str.len_chars().arg_max() or 0)
    assert titles[row] in views._texts["words"][row]
    assert titles[row] not in views._texts["attributes"][row]
    assert "categories" in views._texts["attributes"][row]


def test_retrieval() -> None:
    rows = torch.eye(4)
    assert three_views.retrieval(rows, rows) == 1.0
    assert three_views.retrieval(rows, rows[[1, 0, 2, 3]]) == 0.5
