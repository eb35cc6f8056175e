"""`sda diff` against the seeds' noise: two machines, two settings, and a clone that has only the metrics."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from sda_core.artifacts import INTERACTIONS, POSITIONS, Workspace, write_json
from sda_core.cli.app import app
from sda_core.evaluation import noise_file, summarise
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.params import load_params

NUM_USERS = 400
SEEDS = (1, 2, 3, 4, 5, 6)
PIPELINE = """
stages:
  evaluate:
    cmd: "true"
    outs:
      - evaluation
      - data/filtered/interactions.parquet
      - metrics:
          cache: false
"""
Places = dict[tuple[str, str], np.ndarray]


def frame(places: np.ndarray) -> pl.DataFrame:
    columns = {
        "user_id": range(1, NUM_USERS + 1),
        "target_item_id": [1 + n % 10 for n in range(NUM_USERS)],
        "position": places.astype(float),
        "candidates": 50,
        "num_better": (places - 1).astype(int),
        "num_tied": 0,
    }
    return pl.DataFrame(columns, schema=dict(POSITIONS.columns))


def a_run(seed: int, shift: int = 0) -> Places:
    """Places of one run; another seed exchanges those of some users, and a shift makes every target come later."""
    random, common = np.random.default_rng(seed), np.random.default_rng(1000)
    places: Places = {}
    for variant in ("zero_shot", "sda"):
        base = common.integers(1, 40, NUM_USERS)
        moved = random.random(NUM_USERS) < 0.2
        places[variant, "sasrec"] = np.where(moved, random.integers(1, 40, NUM_USERS), base)
        places[variant, "pop"] = common.integers(1, 40, NUM_USERS)
    places["sda", "sasrec"] = places["sda", "sasrec"] + shift
    return places


def write_run(root: Path, places: Places) -> None:
    """What the stage evaluate leaves of a run."""
    workspace, params = Workspace(root), load_params(root / "params.yaml")
    interactions = INTERACTIONS.read(workspace.interactions)
    for folder in ("evaluation", "metrics"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for key, found in places.items():
        POSITIONS.write(frame(found), workspace.positions(*key))
        write_json(workspace.metrics(*key), summarise(frame(found), interactions, params.evaluate))


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path, tag: str) -> None:
    with Repo(str(root)) as repo:
        repo.commit(force=True)
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", tag)
    git(root, "tag", tag)


def set_params(root: Path, **changes: Any) -> None:
    """Change params by dotted names, with double underscores for dots."""
    yaml = YAML(typ="safe", pure=True)
    params: Any = yaml.load(root / "params.yaml")
    for name, value in changes.items():
        section = params
        *parents, last = name.split("__")
        for parent in parents:
            section = section[parent]
        section[last] = value
    yaml.dump(params, root / "params.yaml")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project whose run of seed 42 is committed, with the noise of six other seeds."""
    root = tmp_path_factory.mktemp("published")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    Repo.init(str(root)).close()
    shutil.copy(repository / "params.yaml", root)
    set_params(root, variants=["zero_shot", "sda"], recommenders=["pop", "sasrec"], evaluate__bootstrap_samples=200)
    (root / "dvc.yaml").write_text(PIPELINE)
    rows = [(user, item, user, 5.0, "train") for user in range(1, 11) for item in range(1, 6)]
    rows += [(1, item, 99, 5.0, "train") for item in range(6, 11)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), Workspace(root).interactions)
    write_run(root, a_run(42))
    (root / ".gitignore").write_text("/experiments\n")
    write_noise(root)
    commit(root, "v1")
    return root


def write_noise(root: Path) -> SeedNoise:
    params = load_params(root / "params.yaml")
    tree = YAML(typ="safe", pure=True).load(root / "params.yaml")
    settings: dict[str, str] = {}
    for key in a_run(1):
        settings |= noise_file.settings_hashes(tree, *key)
    runs = {seed: {key: frame(places) for key, places in a_run(seed).items()} for seed in SEEDS}
    interactions = INTERACTIONS.read(Workspace(root).interactions)
    found = noise_file.gather(runs, settings, interactions, params.evaluate.tail, (5, 10))
    noise_file.write(found, root / "seed_noise.json")
    return found


@pytest.fixture
def machine(published: Path, tmp_path: Path) -> Path:
    """A copy of the project with its DVC cache: the workspace is to be changed."""
    root = tmp_path / "machine"
    shutil.copytree(published, root)
    return root


@pytest.fixture
def clone(published: Path, tmp_path: Path) -> Iterator[Path]:
    """A fresh clone: what Git has, no DVC cache and no remote."""
    root = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(published), str(root)], check=True)
    return root


def diff(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["diff", *arguments, "--root", str(root)])


def told(done: Result) -> str:
    assert done.exit_code == 0, done.output
    return done.stdout


def mistake(done: Result) -> str:
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("sda diff: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def row(output: str, start: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if " ".join(line.split()).startswith(start))
    return line.split()


def verdict(output: str) -> str:
    return output.splitlines()[-1]


def test_another_seed_is_the_same_to_within_the_noise(machine: Path) -> None:
    write_run(machine, a_run(7))
    found = diff(machine, "v1", "--same")
    output = told(found)
    assert "seeds' noise: seed_noise.json, 6 seeds" in output
    assert "settings differ" not in output
    assert "every position equal: sda/pop, zero_shot/pop" in output
    hits = [float((a_run(seed)["sda", "sasrec"] <= 10).mean()) for seed in SEEDS]
    cells = row(output, "sda sasrec hit@10")
    assert float(cells[-2]) == pytest.approx(2.5706 * np.std(hits, ddof=1) * np.sqrt(2), abs=5e-5)
    change = (a_run(7)["sda", "sasrec"] <= 10).mean() - (a_run(42)["sda", "sasrec"] <= 10).mean()
    assert float(cells[5]) == pytest.approx(change, abs=5e-5)
    assert (cells[-1] == "same") == (abs(change) <= float(cells[-2]))
    assert "of 6 rows; by chance alone about 0.3 would be" in output
    assert verdict(output).startswith("verdict: same to within the seeds' noise")


def test_equal_runs_are_equal(machine: Path) -> None:
    output = told(diff(machine, "v1", "--same"))
    assert verdict(output) == "verdict: equal"


def test_what_is_larger_than_the_noise_is_named_and_fails_when_asked_for(machine: Path) -> None:
    write_run(machine, a_run(42, shift=9))
    output = told(diff(machine, "v1"))
    assert row(output, "sda sasrec ndcg@10")[-1] == "larger"
    assert verdict(output).startswith(
        "verdict: not the same; larger than the seeds' noise (adjusted p < 0.05): sda/sasrec hit@10 -"
    )
    line = mistake(diff(machine, "v1", "--same"))
    assert "--same: not the same" in line
    assert "zero_shot" not in line
    # the other way round the sign changes and the verdict does not
    commit(machine, "v2")
    assert "sda/sasrec hit@10 +" in verdict(told(diff(machine, "v2", "v1")))


def test_a_recommender_that_draws_nothing_must_be_equal(machine: Path) -> None:
    places = a_run(42)
    places["sda", "pop"][places["sda", "pop"].argmin()] = 30  # one user of 400
    write_run(machine, places)
    assert "sda/pop hit@10 -0.0025 (noise 0.0000)" in mistake(diff(machine, "v1", "--same"))


def test_without_a_measurement_the_verdict_is_not_known(machine: Path) -> None:
    (machine / "seed_noise.json").unlink()
    assert verdict(told(diff(machine, "v1", "--same"))) == "verdict: equal"  # which needs none
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1"))
    assert "seeds' noise: not measured here (no seed_noise.json); `python -m experiments seed_noise` measures it" in output
    assert len(row(output, "sda sasrec ndcg@10")) == 10
    assert verdict(output).startswith("verdict: not known; no noise was measured for")
    line = mistake(diff(machine, "v1", "--same"))
    assert "sda/sasrec" in line
    assert "run `python -m experiments seed_noise`" in line


def test_settings_that_differ_are_told(machine: Path) -> None:
    """Within the noise does not mean equal settings; the noise is that of the settings it was measured under."""
    set_params(machine, train_adapter__loss__temperature=0.1, train_recommender__sasrec__seed=8, runtime__num_threads=3)
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1", "--same"))
    assert "settings differ: train_adapter.loss.temperature 0.05 -> 0.1\n" in output
    assert "seeds differ: train_recommender.sasrec.seed 42 -> 8\n" in output
    assert "measured under the settings of revision v1 (taken to hold for both runs)" in output
    # a second run with the new settings: the noise of neither, but for what does not follow from them
    commit(machine, "warm")
    write_run(machine, a_run(8))
    output = told(diff(machine, "warm"))
    assert "  not measured with these train_adapter.loss: sda/sasrec\n" in output
    assert row(output, "sda sasrec ndcg@10")[-2:] == ["not", "measured"]
    assert row(output, "zero_shot sasrec ndcg@10")[-1] in ("same", "larger")
    assert "verdict: not known; nothing else is larger than the seeds' noise; no noise was measured for sda/sasrec" in output
    mistake(diff(machine, "warm", "--same"))


def test_a_run_that_is_among_the_measured_ones_is_told(machine: Path) -> None:
    set_params(machine, train_adapter__training__seed=3)
    write_run(machine, a_run(3))
    line = "  seed 3 of the workspace is among the measured ones: the noise may contain the run it is held against\n"
    assert line in told(diff(machine, "v1"))


def test_a_cut_off_that_was_not_measured_is_told(machine: Path) -> None:
    set_params(machine, evaluate__cutoffs=[7], report__cutoff=7)
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1"))
    assert "  not measured: sda/sasrec hit@7, sda/sasrec ndcg@7, sda/sasrec tail_ndcg@7, zero_shot/sasrec hit@7" in output
    assert verdict(output).startswith("verdict: not known; no noise was measured for sda/sasrec, zero_shot/sasrec")


def test_a_recommender_that_was_not_measured_is_told(machine: Path) -> None:
    places = a_run(42) | {("sda", "bpr"): a_run(42)["sda", "sasrec"]}
    write_run(machine, places)
    commit(machine, "with-bpr")
    places["sda", "bpr"] = a_run(7)["sda", "sasrec"]
    write_run(machine, places)
    output = told(diff(machine, "HEAD"))
    assert "  not measured with these train_recommender.bpr: sda/bpr\n" in output
    assert (
        verdict(output) == "verdict: not known; nothing else is larger than the seeds' noise; no noise was measured for sda/bpr"
    )


def test_noise_of_other_data_is_not_used(machine: Path) -> None:
    path = machine / "seed_noise.json"
    targets = noise_file.read(path).targets
    path.write_text(path.read_text().replace(targets, targets[::-1]))
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1"))
    assert "measured on other test targets: not used" in output
    assert verdict(output).startswith("verdict: not known")


def test_a_clone_without_the_cache_compares_metrics(clone: Path) -> None:
    """On another machine Git has the metrics of the published run, and nobody has its positions."""
    line = mistake(diff(clone, "v1"))  # the metrics that Git brought are no run
    assert "the workspace: holds no evaluation" in line
    shutil.copytree(clone / "metrics", clone / "before")
    workspace = Workspace(clone)
    rows = [(1, item, 1, 5.0, "train") for item in range(1, 11)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    write_run(clone, a_run(7))
    shutil.rmtree(clone / "metrics")
    shutil.copytree(clone / "before", clone / "metrics")
    assert verdict(told(diff(clone, "v1", "--same"))) == "verdict: equal"


def test_a_clone_that_was_run_gets_a_verdict(clone: Path, published: Path) -> None:
    Workspace(clone).interactions.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Workspace(published).interactions, Workspace(clone).interactions)
    write_run(clone, a_run(7))
    output = told(diff(clone, "v1", "--same"))
    assert "400 users, by their metrics" in output
    assert "positions of revision v1 are not in the DVC cache, and no remote gave them: no intervals over users" in output
    assert "every metric equal: sda/pop, zero_shot/pop" in output
    cells = row(output, "sda sasrec hit@10")
    old, new = ((a_run(seed)["sda", "sasrec"] <= 10).mean() for seed in (42, 7))
    assert [float(cell) for cell in cells[3:6]] == pytest.approx([old, new, new - old], abs=5e-5)
    assert cells[6] == "-"
    assert verdict(output).startswith("verdict: same to within the seeds' noise")
    write_run(clone, a_run(42, shift=9))
    assert "--same: not the same" in mistake(diff(clone, "v1", "--same"))
    # two revisions, of which neither has its positions here
    git(clone, "add", "-A", "metrics")
    git(clone, "commit", "-qm", "v2")
    output = told(diff(clone, "v1", "HEAD"))
    assert "positions of revision v1 and revision HEAD are not in the DVC cache" in output
    assert verdict(output).startswith("verdict: not the same")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text.replace('"num_users": 400', '"num_users": 399'), "num_users of sda/sasrec is 400 and 399"),
        (lambda text: text.replace('"ndcg@10":', '"ndcg@11":'), "sda/sasrec has no ndcg@10"),
        (lambda text: "[]", "metrics/sda/sasrec.json is no mapping"),
        (lambda text: text[:-9], "metrics is no valid JSON"),
        (lambda text: text.replace("{", '{"negatives_sha256": "1",', 1), ""),
    ],
)
def test_metrics_that_cannot_be_compared_are_refused(
    clone: Path, published: Path, spoil: Callable[[str], str], problem: str
) -> None:
    Workspace(clone).interactions.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Workspace(published).interactions, Workspace(clone).interactions)
    write_run(clone, a_run(7))
    path = Workspace(clone).metrics("sda", "sasrec")
    path.write_text(spoil(path.read_text()))
    if problem:
        assert problem in mistake(diff(clone, "v1"))
    else:  # the first run does not tell its negatives
        told(diff(clone, "v1"))
        other = Workspace(clone).metrics("zero_shot", "sasrec")
        other.write_text(other.read_text().replace("{", '{"negatives_sha256": "2",', 1))
        assert "other negatives" in mistake(diff(clone, "v1"))


def test_what_only_one_run_has_is_not_the_same(machine: Path) -> None:
    places = a_run(42)
    del places["zero_shot", "sasrec"]
    write_run(machine, places)
    assert "--same: zero_shot/sasrec is only in revision v1" in mistake(diff(machine, "v1", "--same"))
    told(diff(machine, "v1"))


def test_noise_from_the_positions_of_an_experiment(machine: Path) -> None:
    """The same seeds as positions give the same numbers as the file."""
    folder = machine / "experiments" / "positions" / "effect"
    for seed in SEEDS:
        for (variant, recommender), places in a_run(seed).items():
            POSITIONS.write(frame(places), folder / recommender / variant / f"{seed}.parquet")
    write_run(machine, a_run(7))
    of_file = told(diff(machine, "v1"))
    (machine / "seed_noise.json").unlink()
    of_folder = told(diff(machine, "v1", "--noise", str(folder)))
    assert f"seeds' noise: {folder}, 6 seeds, whose settings are not recorded" in of_folder
    of_file, of_folder = (output[output.index("\nvariant") :] for output in (of_file, of_folder))
    assert of_file == of_folder


def test_noise_that_is_none_is_refused_in_one_line(machine: Path, tmp_path: Path) -> None:
    assert "does not exist; run `python -m experiments seed_noise`" in mistake(diff(machine, "v1", "--noise", "nosuch.json"))
    (machine / "seed_noise.json").write_text("{}")
    assert "seed_noise.json: seeds: Field required" in mistake(diff(machine, "v1"))
    (tmp_path / "empty").mkdir()
    assert "has positions of 0 seeds" in mistake(diff(machine, "v1", "--noise", str(tmp_path / "empty")))


def test_more_differing_settings_than_fit_a_line_are_counted(machine: Path) -> None:
    names = ("hidden_size", "num_blocks", "max_length", "num_negatives", "patience", "max_epochs", "eval_every", "batch_size")
    set_params(machine, **{f"train_recommender__sasrec__{name}": 32 for name in names}, train_adapter__training__num_steps=99)
    (line,) = (line for line in told(diff(machine, "v1")).splitlines() if line.startswith("settings differ"))
    assert line.endswith(", and 1 more")
    assert line.count("->") == 8
