"""Choice of the fusion's settings: what is ranked, that nothing is chosen on test targets, that it resumes, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import adaptation, fusion_settings
from experiments.nearest_items import Run
from sda_core import recommenders
from sda_core.artifacts import INTERACTIONS
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.params import load_params
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

RECOMMENDERS = Names(("nearest", "sasrec"))
VECTORS = Names(("zero_shot", "text_only", "other_images"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run of the study of adaptation on a tiny shop."""
    with new_project(tmp_path_factory, repository) as root:
        adaptation.main("small", Names(("nearest",)), Names(("id", "zero_shot")), SMALL, root, Numbers((1,)))
    return root


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "adaptation" / "small"


def choose(project: Path, *candidates: str, vectors: Names = VECTORS, run: str | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        runs = [run or f"small={folder(project)}"]
        fusion_settings.main("small", runs, list(candidates), vectors, RECOMMENDERS, Numbers((1, 2)))
    return (project / "experiments" / "results" / "fusion_settings-small" / "table.md").read_text(encoding="utf-8")


def cells(text: str, start: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {start} |")]


def test_every_candidate_is_compared_with_the_settings_of_the_run(project: Path) -> None:
    center = not load_params(folder(project) / "shop" / "params.yaml").export_embeddings.center
    changed, same = f"center={str(center).lower()}", f"center={str(not center).lower()}"
    text = choose(project, changed, same)
    rows = cells(text, "small")
    assert {tuple(row[1:5]) for row in rows} == {
        (vector, recommender, use, candidate)
        for vector in VECTORS
        for recommender in RECOMMENDERS
        for use in ("content", "id+content")
        for candidate in (changed, same)
    }
    assert all(row[7] == "+0.0000 [+0.0000, +0.0000]" for row in rows if row[4] == same), "the reference against itself"
    assert any(row[5] != row[6] for row in rows if row[4] == changed)
    summary = cells(text, same)
    assert [row[1:3] for row in summary] == [[name, use] for name in RECOMMENDERS for use in ("content", "id+content")]
    assert all(row[3:] == ["+0.0%", "0", "0", "3"] for row in summary)


def test_results_are_kept_by_settings_vectors_and_seed(project: Path) -> None:
    choose(project, "axis_scaling=even", vectors=Names(("zero_shot",)))
    kept = {path: path.read_bytes() for path in (folder(project) / "shop" / "validation").rglob("*.json")}
    marked = next(iter(kept))
    marked.write_text(json.dumps(json.loads(marked.read_bytes()) | {"seconds": 77.0}))
    choose(project, "axis_scaling=even", vectors=Names(("zero_shot",)))
    after = {path: path.read_bytes() for path in (folder(project) / "shop" / "validation").rglob("*.json")}
    assert after.keys() == kept.keys()
    assert json.loads(after[marked])["seconds"] == 77.0, "what is complete is not computed again"


def test_test_interactions_are_not_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[int, int]]] = []
    make = recommenders.training_data

    def recorded(interactions: pl.DataFrame, **sizes: int) -> object:
        seen.append(set(interactions.select("user_id", "item_id").iter_rows()))
        return make(interactions, **sizes)

    monkeypatch.setattr(recommenders, "training_data", recorded)
    choose(project, "balance=equal_energy", vectors=Names(("zero_shot",)))
    every = INTERACTIONS.read(Run.read(f"small={folder(project)}").shop.interactions)
    known = set(every.filter(pl.col("split") != "test").select("user_id", "item_id").iter_rows())
    assert seen
    assert all(pairs == known for pairs in seen)


def test_the_mean_over_runs_is_relative_and_counts_clear_intervals(project: Path) -> None:
    run = Run.read(f"small={folder(project)}")
    base_SU = np.tile(np.linspace(0.1, 0.3, 60), (2, 1))
    measured = {
        fusion_settings.Cell("small", vector, "sasrec", "content"): {"": base_SU, "center=true": base_SU * factor}
        for vector, factor in {"zero_shot": 1.5, "text_only": 0.8}.items()
    }
    (row,) = cells(fusion_settings.summary(measured, {"small": run}), "center=true")
    assert row == ["center=true", "sasrec", "content", "+15.0%", "1", "1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["centre=true"]}, r"--try: expected NAME=VALUE, with NAME one of .*center.* \(got 'centre=true'\)"),
        ({"candidates": [""]}, r"--try: expected NAME=VALUE, with NAME one of fusion, .* \(got ''\)"),
        ({"candidates": ["batch_size=4"]}, r"--try: expected NAME=VALUE, with NAME one of fusion, .* \(got 'batch_size=4'\)"),
        ({"candidates": ["center=true,center=false"]}, "--try: changes center twice"),
        ({"candidates": ["image_weight=.inf"]}, "--try: Input should be a finite number"),
        ({"candidates": ["center=perhaps"]}, "--try: Input should be a valid boolean"),
        ({"candidates": ["center=true"], "vectors": Names(("sda:image",))}, "--vectors: small has no embeddings for sda:image"),
        ({"candidates": ["center=true"], "vectors": Names(("id",))}, "--vectors: expected some of zero_shot"),
        ({"candidates": ["center=true"], "run": "small=nowhere"}, "--runs: nowhere has no shop/params.yaml"),
        ({"candidates": ["center=true"], "run": "../a=nowhere"}, "--runs: a label has no slash"),
    ],
)
def test_mistakes_are_one_line(project: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(project, *options.pop("candidates"), **options)
    assert "\n" not in str(caught.value)
