"""`sda diff` and the variation between seeds: two machines, two settings, and a clone that has only the metrics."""

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

from sda_core.artifacts import INTERACTIONS, POSITIONS, SEED_POSITIONS, Workspace, write_json
from sda_core.cli.app import app
from sda_core.evaluation import noise_file, summarise
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.params import load_params
from tests.sections import seeded

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
"""By variant and recommender: of each seed and user, ``(S, U)``."""


def frame(place_SU: np.ndarray) -> pl.DataFrame:
    """Table SEED_POSITIONS."""
    return seeded(*map(of_seed, place_SU), first=int(len(place_SU) > 1))


def of_seed(places: np.ndarray) -> pl.DataFrame:
    columns = {
        "user_id": range(1, NUM_USERS + 1),
        "target_item_id": [1 + n % 10 for n in range(NUM_USERS)],
        "position": places.astype(float),
        "candidates": 50,
        "num_better": (places - 1).astype(int),
        "num_tied": 0,
    }
    return pl.DataFrame(columns, schema=dict(POSITIONS.columns))


def a_run(number: int, shift: int = 0) -> Places:
    """Places of one run of three seeds; other seeds exchange those of some users, and a shift makes every target come later."""
    random, common = np.random.default_rng(number), np.random.default_rng(1000)
    places: Places = {}
    for variant in ("zero_shot", "sda"):
        base_SU = np.tile(common.integers(1, 40, NUM_USERS), (3, 1))
        moved_SU = random.random((3, NUM_USERS)) < 0.2
        places[variant, "sasrec"] = np.where(moved_SU, random.integers(1, 40, (3, NUM_USERS)), base_SU)
        places[variant, "pop"] = common.integers(1, 40, (1, NUM_USERS))
    places["sda", "sasrec"] = places["sda", "sasrec"] + shift
    return places


def hits(number: int) -> np.ndarray:
    """Hit@10 of each seed of a run."""
    return (a_run(number)["sda", "sasrec"] <= 10).mean(axis=1)


def write_run(root: Path, places: Places) -> None:
    """What the stage evaluate leaves of a run."""
    workspace, params = Workspace(root), load_params(root / "params.yaml")
    interactions = INTERACTIONS.read(workspace.interactions)
    for folder in ("evaluation", "metrics"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for key, found in places.items():
        SEED_POSITIONS.write(frame(found), workspace.positions(*key))
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
    """A project whose run 42 is committed."""
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
    commit(root, "v1")
    return root


MEASURED = [("sda", "sasrec")]  # what has an adapter and seeds


def write_noise(root: Path) -> SeedNoise:
    """What experiments/seed_noise.py leaves."""
    params = load_params(root / "params.yaml")
    tree = YAML(typ="safe", pure=True).load(root / "params.yaml")
    settings: dict[str, str] = {}
    for key in MEASURED:
        settings |= noise_file.settings_hashes(tree, *key)
    runs = {seed: {key: frame(a_run(seed)[key]) for key in MEASURED} for seed in SEEDS}
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


def test_other_seeds_are_the_same_to_within_the_noise(machine: Path) -> None:
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1", "--same"))
    assert "400 users, paired intervals over users and seeds (200 draws)" in output
    assert "variation between seeds: measured over the 3 recommender seeds of each run\n" in output
    assert "  not included: other seeds of the adapters; measure them with `python -m experiments seed_noise`\n" in output
    assert "settings differ" not in output
    assert "every position equal: sda/pop, zero_shot/pop" in output
    cells = row(output, "sda sasrec hit@10")
    pooled = np.sqrt((hits(7).var(ddof=1) + hits(42).var(ddof=1)) / 2)
    assert float(cells[-2]) == pytest.approx(2.7764 * pooled * np.sqrt(2 / 3), abs=5e-5)
    change = hits(7).mean() - hits(42).mean()
    assert float(cells[5]) == pytest.approx(change, abs=5e-5)
    assert (cells[-1] == "same") == (abs(change) <= float(cells[-2]))
    assert "of 6 rows; about 0.3 are expected by chance" in output
    assert verdict(output).startswith("verdict: same within the variation between seeds")


def test_whole_runs_that_were_measured_are_the_noise_of_what_has_an_adapter(machine: Path) -> None:
    write_noise(machine)
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1"))
    assert "  for sda/sasrec: measured over the 6 runs in seed_noise.json, each with its own adapters\n" in output
    means = [hits(seed).mean() for seed in SEEDS]
    assert float(row(output, "sda sasrec hit@10")[-2]) == pytest.approx(2.5706 * np.std(means, ddof=1) * np.sqrt(2), abs=5e-5)
    (machine / "seed_noise.json").rename(machine / "other.json")
    without = told(diff(machine, "v1"))
    assert row(without, "zero_shot sasrec hit@10") == row(output, "zero_shot sasrec hit@10")
    assert row(without, "sda sasrec hit@10") != row(output, "sda sasrec hit@10")
    named = told(diff(machine, "v1", "--noise", str(machine / "other.json")))
    assert named[named.index("\nvariant") :] == output[output.index("\nvariant") :]


def test_equal_runs_are_equal(machine: Path) -> None:
    output = told(diff(machine, "v1", "--same"))
    assert verdict(output) == "verdict: equal"


def test_what_is_larger_than_the_noise_is_named_and_fails_when_asked_for(machine: Path) -> None:
    write_run(machine, a_run(42, shift=9))
    output = told(diff(machine, "v1"))
    assert row(output, "sda sasrec ndcg@10")[-1] == "larger"
    assert verdict(output).startswith(
        "verdict: not the same; changes larger than the variation between seeds (adjusted p < 0.05): sda/sasrec hit@10 -"
    )
    line = mistake(diff(machine, "v1", "--same"))
    assert "--same: not the same" in line
    assert "zero_shot" not in line
    # the other way round the sign changes and the verdict does not
    commit(machine, "v2")
    assert "sda/sasrec hit@10 +" in verdict(told(diff(machine, "v2", "v1")))


def test_a_recommender_that_draws_nothing_must_be_equal(machine: Path) -> None:
    places = a_run(42)
    places["sda", "pop"][0, places["sda", "pop"].argmin()] = 30  # one user of 400
    write_run(machine, places)
    assert "sda/pop hit@10 -0.0025 (limit 0.0000)" in mistake(diff(machine, "v1", "--same"))


def test_with_one_seed_the_verdict_is_not_known(machine: Path) -> None:
    def of_one_seed(number: int) -> Places:
        return {key: places[:1] for key, places in a_run(number).items()}

    set_params(machine, train_recommender__seeds=[1])
    write_run(machine, of_one_seed(42))
    assert "the two evaluations have 1 and 3 seeds; train both with as many" in mistake(diff(machine, "v1"))
    commit(machine, "one")
    assert verdict(told(diff(machine, "one", "--same"))) == "verdict: equal"  # which needs none
    write_run(machine, of_one_seed(7))
    output = told(diff(machine, "one"))
    assert "variation between seeds: not known, because each run has one seed; set several train_recommender.seeds" in output
    assert len(row(output, "sda sasrec ndcg@10")) == 10
    assert verdict(output).startswith("verdict: not known; the variation was not measured for")
    line = mistake(diff(machine, "one", "--same"))
    assert "sda/sasrec" in line
    assert "train both with several train_recommender.seeds" in line


def test_settings_that_differ_are_told(machine: Path) -> None:
    """Within the noise does not mean equal settings; a measurement is that of the settings it was made under."""
    write_noise(machine)
    set_params(machine, train_adapter__loss__temperature=0.1, train_recommender__seeds=[7, 8, 9], runtime__num_threads=3)
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1", "--same"))
    assert "settings differ: train_adapter.loss.temperature 0.05 -> 0.1\n" in output
    assert "seeds differ: train_recommender.seeds [1, 2, 3] -> [7, 8, 9]\n" in output
    # measured with the settings of one of the two runs
    assert "  for sda/sasrec: measured over the 6 runs in seed_noise.json" in output
    commit(machine, "warm")
    write_run(machine, a_run(8))
    output = told(diff(machine, "warm"))
    assert "  not used for sda/sasrec: seed_noise.json, which was measured with other settings in train_adapter.loss\n" in output
    assert row(output, "sda sasrec ndcg@10")[-1] in ("same", "larger")  # by the runs' own seeds


def test_a_run_that_is_among_the_measured_ones_is_told(machine: Path) -> None:
    write_noise(machine)
    set_params(machine, train_adapter__training__seed=3)
    write_run(machine, a_run(3))
    line = "  the adapter seed of the workspace is one of those in seed_noise.json, which may therefore include this run itself\n"
    assert line in told(diff(machine, "v1"))


def test_noise_of_other_data_is_not_used(machine: Path) -> None:
    write_noise(machine)
    path = machine / "seed_noise.json"
    targets = noise_file.read(path).targets
    path.write_text(path.read_text().replace(targets, targets[::-1]))
    write_run(machine, a_run(7))
    output = told(diff(machine, "v1"))
    assert "not used: seed_noise.json, which was measured on other test targets" in output
    assert verdict(output).startswith("verdict: same")


def test_a_clone_without_the_cache_compares_metrics(clone: Path) -> None:
    """On another machine Git has the metrics of the published run, and nobody has its positions."""
    line = mistake(diff(clone, "v1"))  # the metrics that Git brought are no run
    assert "the workspace: has no evaluation" in line
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
    assert "positions of revision v1 are neither in the DVC cache nor on a remote, so there are no intervals" in output
    assert "every metric equal: sda/pop, zero_shot/pop" in output
    cells = row(output, "sda sasrec hit@10")
    old, new = (hits(number).mean() for number in (42, 7))
    assert [float(cell) for cell in cells[3:6]] == pytest.approx([old, new, new - old], abs=5e-5)
    assert cells[6] == "-"
    pooled = np.sqrt((hits(7).var(ddof=1) + hits(42).var(ddof=1)) / 2)
    assert float(cells[7]) == pytest.approx(2.7764 * pooled * np.sqrt(2 / 3), abs=5e-5)
    assert verdict(output).startswith("verdict: same within the variation between seeds")
    write_run(clone, a_run(42, shift=9))
    assert "--same: not the same" in mistake(diff(clone, "v1", "--same"))
    # two revisions, of which neither has its positions here
    git(clone, "add", "-A", "metrics")
    git(clone, "commit", "-qm", "v2")
    output = told(diff(clone, "v1", "HEAD"))
    assert "positions of revision v1 and revision HEAD are neither in the DVC cache" in output
    assert verdict(output).startswith("verdict: not the same")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text.replace('"num_users": 400', '"num_users": 399'), "num_users of sda/sasrec is 400 and 399"),
        (lambda text: text.replace('"num_seeds": 3', '"num_seeds": 1'), "sda/sasrec has 3 and 1 seeds"),
        (lambda text: text.replace('"ndcg@10":', '"ndcg@11":'), "sda/sasrec has no ndcg@10"),
        (lambda text: "[]", "metrics/sda/sasrec.json is not a mapping"),
        (lambda text: text[:-9], "metrics is not valid JSON"),
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


def test_noise_that_is_none_is_refused_in_one_line(machine: Path) -> None:
    assert "does not exist; run `python -m experiments seed_noise`" in mistake(diff(machine, "v1", "--noise", "nosuch.json"))
    assert "is a folder, not a file" in mistake(diff(machine, "v1", "--noise", "."))
    (machine / "seed_noise.json").write_text("{}")
    assert "seed_noise.json: seeds: Field required" in mistake(diff(machine, "v1"))


def test_more_differing_settings_than_fit_a_line_are_counted(machine: Path) -> None:
    names = ("hidden_size", "num_blocks", "max_length", "num_negatives", "patience", "max_epochs", "eval_every", "batch_size")
    set_params(machine, **{f"train_recommender__sasrec__{name}": 32 for name in names}, train_adapter__training__num_steps=99)
    (line,) = (line for line in told(diff(machine, "v1")).splitlines() if line.startswith("settings differ"))
    assert line.endswith(", and 1 more")
    assert line.count("->") == 8
