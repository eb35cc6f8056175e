"""Which stages DVC runs again after a file was edited: real DVC, the real dvc.yaml, outputs of a few bytes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.embeddings.table import write_embeddings

if TYPE_CHECKING:
    from conftest import Project

MAKE_OUTPUTS = """
from pathlib import Path
from dvc.repo import Repo
with Repo() as repo:
    for stage in repo.index.stages:
        for out in stage.outs:
            path = Path(out.fs_path)
            file = path if path.suffix in {".parquet", ".json"} else path / "content"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(stage.addressing + " " + path.name)
    for path in (Path(dep.fs_path) for stage in repo.index.stages for dep in stage.deps):
        if not path.exists():  # a file in a stage's folder
            path.write_text(path.name)
"""
VARIANTS = ("id", "zero_shot", "sda")
TRAINING = {"train_recommender_id", *(f"train_recommender@{variant}" for variant in VARIANTS[1:])}
EVALUATION = {f"evaluate@{variant}" for variant in VARIANTS}
EXPORT = {"export_base@id", "export_base@zero_shot", "export_embeddings@sda"}
INDEX = {"build_index_base", "build_index@sda"}


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    """A project in which every stage is up to date."""
    project = new_project("borders")
    project.run(sys.executable, "-c", MAKE_OUTPUTS)
    project.dvc("commit", "--force", "--quiet")
    assert stale(project) == set()
    return project


@pytest.fixture
def edited(project: Project) -> Iterator[Callable[..., set[str]]]:
    """Add a line to files (or make them), and ask DVC which stages it would run for that; undone after the test."""
    before: dict[Path, bytes | None] = {}

    def edit(*names: str) -> set[str]:
        for name in names:
            path = project.root / name
            before.setdefault(path, path.read_bytes() if path.is_file() else None)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((before[path] or b"") + b"\n# edited\n")
        return stale(project)

    yield edit
    for path, content in before.items():
        path.unlink() if content is None else path.write_bytes(content)


def stale(project: Project) -> set[str]:
    """The stages whose own dependencies changed; those that follow from their outputs are not among them."""
    return set(json.loads(project.dvc("status", "--json").stdout))


def test_what_cannot_change_a_result_runs_nothing(edited: Callable[..., set[str]]) -> None:
    assert edited("experiments/sweep.py", "experiments/results/sweep-t/table.tsv", "experiments/notes.md") == set()
    assert edited("costs/stages.jsonl", "README.md", "sda_core/cli/verify.py", "sda_core/cli/app.py") == set()
    kernel = (
        "_peft_hook",
        "artifacts",
        "cli/__init__",
        "cli/process",
        "cli/project",
        "cli/stage",
        "costs",
        "errors",
        "log",
        "params",
    )
    assert edited(*(f"sda_core/{name}.py" for name in kernel), "sda_core/__init__.py") == set()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sda_core/ranking/retrieval.py", "sda_core/ranking/places.py", "sda_core/ranking/__init__.py"], EVALUATION),
        (["sda_core/evaluation/metrics.py"], {*EVALUATION, "draw_negatives", "report"}),
        (["sda_core/index.py"], {*EVALUATION, *INDEX, "report"}),
        (["sda_core/report/page.py", "sda_core/report/experiments.py", "stages/report.py"], {"report"}),
        (["sda_core/report/template.html.j2", "sda_core/report/style.css"], {"report"}),
        (["stages/evaluate.py"], EVALUATION),
    ],
)
def test_an_evaluator_or_the_page_re_trains_nothing(
    edited: Callable[..., set[str]], names: list[str], expected: set[str]
) -> None:
    assert edited(*names) == expected
    assert not expected & {*TRAINING, *EXPORT, "train_adapter@sda"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sda_core/item_vectors.py"], {*TRAINING, *EVALUATION, *INDEX, "report"}),  # what an item without a vector takes
        (["sda_core/traits.py"], {*TRAINING, *EVALUATION}),
        (["sda_core/recommenders/position.py"], {*TRAINING, *EVALUATION}),  # the validation stops the training
        (["sda_core/recommenders/slmrec.py"], {*TRAINING, *EVALUATION}),
        (["sda_core/embeddings/fusion.py"], {*EXPORT, "report"}),
        (["sda_core/variants.py"], {*EXPORT, "report"}),
        (["sda_core/runtime.py"], {*TRAINING, *EVALUATION, *EXPORT, "train_adapter@sda"}),
        (["sda_core/checkpoint.py"], {*TRAINING, *EVALUATION, *EXPORT, "train_adapter@sda"}),
        (["sda_core/sources.py"], {*TRAINING, *EXPORT, "train_adapter@sda"}),  # an interrupted one is not resumed with other code
        (["sda_core/backbones/nano/config.json"], {*EXPORT, "train_adapter@sda"}),
    ],
)
def test_what_changes_a_training_re_trains(edited: Callable[..., set[str]], names: list[str], expected: set[str]) -> None:
    assert edited(*names) == expected


def test_the_random_streams_are_behind_every_draw(edited: Callable[..., set[str]]) -> None:
    assert edited("sda_core/seed.py") >= {*TRAINING, *EXPORT, "train_adapter@sda", "download", "draw_negatives", "report"}


def test_a_joint_pass_is_added_and_no_other_variant_runs_again(
    project: Project, small_settings: list[str], tmp_path: Path
) -> None:
    """With the adapter of sda, which it follows from by that variant's vectors, whose file holds the adapter's hash.

    The training stages look again, because the list of variants is one of their params, and keep what they have.
    """
    added = project.copy(tmp_path / "joint")
    lists = (f"{name}=[{first}zero_shot,sda,j]" for name, first in (("variants", "id,"), ("train_recommender.variants", "")))
    added.set_params(*small_settings, "+joint_embeddings.variants.j={of: sda}", *lists)
    assert stale(added) == {"export_joint@j", "build_index_joint@j", "train_recommender@j", "evaluate@j", "report", *TRAINING}
    (added.root / "embeddings" / "sda.parquet").write_text("of another adapter")
    assert stale(added) >= {"export_joint@j", "build_index@sda"}


def test_a_dry_run_agrees_with_the_status(project: Project, edited: Callable[..., set[str]]) -> None:
    found = edited("sda_core/ranking/retrieval.py")
    shown = project.dvc("repro", "--dry").stdout
    ran = set(re.findall(r"Running stage '([^']+)'", shown))
    assert found <= ran <= found | {"report"}
    edited("sda_core/item_vectors.py")
    assert set(re.findall(r"Running stage '([^']+)'", project.dvc("repro", "--dry").stdout)) >= TRAINING


# ------------------------------------------------------------------------------ one recommender trained again, or kept
@pytest.fixture(scope="module")
def code(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code that a test may edit."""
    root = tmp_path_factory.mktemp("code")
    for folder in ("sda_core", "stages"):
        shutil.copytree(repository / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def shop(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Twelve users and eight items, two of which have no image."""
    workspace = Workspace(tmp_path_factory.mktemp("shop"))
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 1}
    params["recommenders"] = ["pop", "bpr", "slmrec"]
    for name in ("bpr", "slmrec"):
        params["train_recommender"][name] |= {"max_epochs": 1, "eval_every": 1}
    YAML(typ="safe", pure=True).dump(params, workspace.root / "params.yaml")
    rows = [
        (user, (user + place) % 8 + 1, place, 5.0, {3: "valid", 4: "test"}.get(place, "train"))
        for user in range(1, 13)
        for place in range(5)
    ]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    ids, raw_ids = np.arange(1, 9), [f"i{item}" for item in range(8)]
    image, text = (np.random.default_rng(seed).normal(size=(8, width)) for seed, width in ((0, 3), (1, 4)))
    write_embeddings(workspace.embeddings("zero_shot"), ids, raw_ids, image, text, text, {}, ids > 2)
    return workspace


def test_a_training_is_kept_until_what_it_is_made_of_changes(code: Path, shop: Workspace, project: Project) -> None:
    def trained() -> set[str]:
        """The recommenders whose folder the stage wrote again."""
        paths = [shop.recommender("zero_shot", name) / "history.tsv" for name in ("pop", "bpr", "slmrec")]
        before = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
        command = [sys.executable, "-m", "stages.train_recommender", "--variant", "zero_shot", "--root", str(shop.root)]
        done = subprocess.run(
            command, cwd=code, env=project.environment() | {"PYTHONPATH": str(code)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return {path.parent.name for path in paths if before.get(path) != path.stat().st_mtime_ns}

    def replace(name: str, old: str, new: str) -> None:
        path = code / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def weights(name: str) -> bytes:
        return (shop.model("zero_shot", name, 1) / "model.safetensors").read_bytes()

    everything = {"pop", "bpr", "slmrec"}
    assert trained() == everything
    before = {name: weights(name) for name in ("bpr", "slmrec")}
    replace("sda_core/ranking/retrieval.py", "RECALL = ", "EDITED = 1\nRECALL = ")
    replace("sda_core/report/page.py", "from __future__", "# edited\nfrom __future__")
    replace("sda_core/params.py", "from __future__", "# edited\nfrom __future__")
    assert trained() == set()
    replace("sda_core/recommenders/slmrec.py", "from __future__", "# edited\nfrom __future__")
    assert trained() == {"slmrec"}
    # an imputation rule: the median of the others instead of their mean; only SLMRec takes the image vectors
    replace("sda_core/item_vectors.py", "rows.mean(axis=0)", "np.median(rows, axis=0)")
    assert trained() == everything
    assert weights("slmrec") != before["slmrec"]
    assert weights("bpr") == before["bpr"]
    replace("sda_core/steps/train_recommender.py", "from __future__", "# edited\nfrom __future__")
    assert trained() == everything
