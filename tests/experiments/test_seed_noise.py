"""The variation between seeds in a small shop: its trainings, its file, resumed runs, and rejected input."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from typer.testing import CliRunner

from experiments import seed_noise
from sda_core.artifacts import SEED_POSITIONS, Workspace
from sda_core.cli.app import app
from sda_core.cli.scripts import Numbers
from sda_core.errors import ArtifactError, ConfigError
from sda_core.evaluation import noise_file
from sda_core.params import load_params
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.train_adapter import train_adapter
from stages.train_recommender import train_recommender

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def finished(on_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A project folder with two variants, two recommenders and two seeds, as far as the measurement needs it."""
    root = tmp_path_factory.mktemp("finished")
    yaml = YAML(typ="safe", pure=True)
    params: dict[str, Any] = yaml.load(on_tiny / "params.yaml")
    params |= {"variants": ["zero_shot", "sda"], "recommenders": ["pop", "sasrec"]}
    params["train_recommender"] |= {"variants": ["zero_shot", "sda"], "seeds": [1, 2]}
    yaml.dump(params, root / "params.yaml")
    (root / "data").symlink_to(on_tiny / "data")
    export_embeddings("zero_shot", root=root)
    return Workspace(root)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was run; in this process, because a new one takes seconds to import torch."""
    ran: list[tuple[str, str, str]] = []

    def run(name: str, variant: str, root: Path) -> None:
        ran.append((root.name, name, variant))
        if name == "train_recommender":
            for recommender in load_params(root / "params.yaml").recommenders:
                train_recommender(variant, recommender, root)
        else:
            {"train_adapter": train_adapter, "export_embeddings": export_embeddings, "evaluate": evaluate}[name](
                variant, root=root
            )

    monkeypatch.setattr(seed_noise, "repeat_stage", run)
    return ran


def test_every_seed_is_a_whole_run_and_finished_ones_are_kept(
    finished: Workspace, stages: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    noise = seed_noise.measure(finished.root, SEEDS)
    of_a_seed = [("train_adapter", "sda"), ("export_embeddings", "sda"), ("train_recommender", "sda"), ("evaluate", "sda")]
    assert stages == [(f"seed-{seed}", *stage) for seed in SEEDS for stage in of_a_seed]
    # the file says what the positions say
    (base,) = (finished.root / "experiments" / "runs" / "seed_noise").iterdir()
    assert noise == noise_file.read(finished.root / "seed_noise.json")
    runs = [SEED_POSITIONS.read(Workspace(base / f"seed-{seed}").positions("sda", "sasrec")) for seed in SEEDS]
    assert noise.values["sda/sasrec/hit@10"] == pytest.approx([(run["position"] <= 10).mean() for run in runs])
    assert {name.split("/")[:2] == ["sda", "sasrec"] for name in noise.values} == {True}
    # each run has seeds of its own, for its adapter and its recommenders
    assert [run["seed"].unique(maintain_order=True).to_list() for run in runs] == [[5, 6], [7, 8], [9, 10]]
    vectors = [Workspace(base / f"seed-{seed}").embeddings("sda").read_bytes() for seed in SEEDS]
    assert len(set(vectors)) == len(SEEDS)
    # the table
    table = (finished.root / "experiments" / "results" / "seed_noise" / "table.md").read_text()
    assert table in capsys.readouterr().out
    (row,) = (line for line in table.splitlines() if line.startswith("| sda | sasrec | hit@10 |"))
    sd = np.std(noise.values["sda/sasrec/hit@10"], ddof=1)
    assert row.split("|")[5].split()[0] == f"{sd:.4f}"
    # nothing is run twice; what a stopped run lacks is run
    stages.clear()
    assert seed_noise.measure(finished.root, SEEDS) == noise
    assert stages == []
    Workspace(base / "seed-2").positions("sda", "sasrec").unlink()
    assert seed_noise.measure(finished.root, SEEDS) == noise
    assert stages == [("seed-2", "train_recommender", "sda"), ("seed-2", "evaluate", "sda")]


def test_other_settings_reuse_nothing(finished: Workspace, stages: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """A measurement of other settings starts from nothing, beside the first."""
    seed_noise.measure(finished.root, SEEDS)
    stages.clear()
    root = tmp_path / "other"
    shutil.copytree(finished.root, root, symlinks=True)
    before = {path.name for path in (root / "experiments" / "runs" / "seed_noise").iterdir()}
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    params["train_recommender"]["sasrec"]["dropout"] = 0.3
    yaml.dump(params, root / "params.yaml")
    old = noise_file.read(root / "seed_noise.json")
    new = seed_noise.measure(root, SEEDS)
    assert len(stages) == 3 * 4
    assert len({path.name for path in (root / "experiments" / "runs" / "seed_noise").iterdir()} - before) == 1
    assert {name for name in new.settings if new.settings[name] != old.settings[name]} == {"train_recommender.sasrec"}
    assert new.targets == old.targets


def run_all(root: Path) -> None:
    """The stages that follow from seeds, as `dvc repro` runs them."""
    train_adapter("sda", root=root)
    export_embeddings("sda", root=root)
    for variant in ("zero_shot", "sda"):
        for recommender in ("pop", "sasrec"):
            train_recommender(variant, recommender, root)
        evaluate(variant, root=root)


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=root, check=True, capture_output=True)


def test_real_runs_of_a_small_shop_are_judged_by_what_was_measured(
    finished: Workspace, stages: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    """Measured, trained and committed; then the same commit with other seeds, and with places that no seed explains."""
    root = tmp_path / "project"
    shutil.copytree(finished.root, root, symlinks=True, ignore=shutil.ignore_patterns("positions", "results"))
    (root / "data").unlink()
    shutil.copytree(finished.root / "data", root / "data")
    seed_noise.measure(root, SEEDS)
    run_all(root)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    Repo.init(str(root)).close()
    outs = ["evaluation", "data/filtered", {"metrics": {"cache": False}}]
    YAML().dump({"stages": {"evaluate": {"cmd": "true", "outs": outs}}}, root / "dvc.yaml")
    (root / ".gitignore").write_text("/experiments\n/models\n/adapters\n/embeddings\n/data/images\n/data/raw\n/.resume\n/costs\n")
    with Repo(str(root)) as repo:
        repo.commit(force=True)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "run")
    equal = CliRunner().invoke(app, ["diff", "HEAD", "--same", "--root", str(root)])
    assert equal.exit_code == 0, equal.output
    assert equal.stdout.splitlines()[-1] == "verdict: equal"
    # other seeds: real trainings, whose difference the measurement explains
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    params["train_adapter"]["training"]["seed"], params["train_recommender"]["seeds"] = 43, [43, 44]
    yaml.dump(params, root / "params.yaml")
    shutil.rmtree(root / "adapters")
    run_all(root)
    other = CliRunner().invoke(app, ["diff", "HEAD", "--same", "--root", str(root)])
    assert "  for sda/sasrec: measured over the 3 runs in seed_noise.json, each with its own adapters\n" in other.stdout
    assert "seeds differ: train_adapter.training.seed 42 -> 43, train_recommender.seeds [1, 2] -> [43, 44]" in other.stdout
    assert "every position equal: sda/pop, zero_shot/pop" in other.stdout
    assert "settings differ" not in other.stdout
    assert other.exit_code == 0, other.output
    assert "verdict: same within the variation between seeds" in other.stdout
    # targets that all come first are no matter of seeds
    path = Workspace(root).positions("sda", "sasrec")
    SEED_POSITIONS.write(SEED_POSITIONS.read(path).with_columns(position=pl.lit(1.0)), path)
    first = CliRunner().invoke(app, ["diff", "HEAD", "--same", "--root", str(root)])
    assert first.exit_code == 1
    assert "--same: not the same" in first.stderr


@pytest.mark.parametrize(
    ("seeds", "problem"),
    [
        ((1, 2), "--seeds: expected at least 3 different ones"),
        ((1, 2, 2), "--seeds: expected at least 3 different ones"),
        ((1, 2, -3), "--seeds: expected at least 3 different ones"),
        ((1, 2, 42), "--seeds: 42 is the adapter seed of the run itself"),
    ],
)
def test_seeds_that_measure_nothing_are_refused(finished: Workspace, seeds: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        seed_noise.main(finished.root, Numbers(seeds))


def test_an_unfinished_run_and_one_without_adapters_are_refused(finished: Workspace, tmp_path: Path) -> None:
    shutil.copy(finished.root / "params.yaml", tmp_path)
    with pytest.raises(ArtifactError, match=r"interactions\.parquet: does not exist; run `dvc repro` first"):
        seed_noise.main(tmp_path)
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(tmp_path / "params.yaml")
    params["variants"] = ["zero_shot"]
    yaml.dump(params, tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match="no variant has an adapter; the run's own seeds contain all of its variation"):
        seed_noise.main(tmp_path)


def test_a_stage_that_fails_stops_the_measurement_in_one_line(finished: Workspace, tmp_path: Path) -> None:
    """The stages run as they are here: one in a process of its own, one in this process."""
    shutil.copy(finished.root / "params.yaml", tmp_path)
    for name in ("export_embeddings", "evaluate"):
        with pytest.raises(ArtifactError, match=f"stage {name} of zero_shot failed; see the lines above"):
            seed_noise.repeat_stage(name, "zero_shot", tmp_path)


def test_every_seed_of_a_training_is_replaced(repository: Path, tmp_path: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    seed_noise.write_params(repository / "params.yaml", tmp_path / "params.yaml", ["sasrec"], 7)
    before, after = yaml.load(repository / "params.yaml"), yaml.load(tmp_path / "params.yaml")
    assert after["train_adapter"]["training"].pop("seed") == 7
    assert after["train_recommender"].pop("seeds") == [25, 26, 27]
    assert after.pop("recommenders") == ["sasrec"]
    before["train_adapter"]["training"].pop("seed")
    assert not {25, 26, 27} & set(before["train_recommender"].pop("seeds"))
    before.pop("recommenders")
    assert json.dumps(after) == json.dumps(before)
