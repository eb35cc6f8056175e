"""Measure the variation between runs with other adapter seeds: an optional input of `sda diff`.

The seeds of a run (train_recommender.seeds) share one adapter, so the spread between them does not include that of the adapters.
This script measures it.  The input is a finished workspace with its params.yaml.  For every seed the stages train_adapter,
export_embeddings, train_recommender and evaluate of the pipeline are repeated for every variant with an adapter, with that seed
for the adapter and as many other seeds for each recommender as in the params.  Data are shared.  So each seed here is an
independent repetition of a whole run.  The result is seed_noise.json in the project folder: Hit and NDCG of each variant and
recommender by seed, each a mean over the recommender's seeds, with hashes of the settings and test targets for which they are
valid.  The rule based on it is in sda_core/evaluation/seed_noise.py.

    python -m experiments seed_noise                         # five seeds
    python -m experiments seed_noise --seeds 1,2,3,4,5,6,7   # more seeds, a more precise estimate; the five are kept

An interrupted run resumes: finished seeds are kept in experiments/runs/seed_noise/INPUTS, where INPUTS is a hash of settings,
data and code, so that results of other inputs are not reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import typer
from ruamel.yaml import YAML

import sda_core
from experiments.options import Root, Seeds
from experiments.study import logger, markdown_table, write_results
from experiments.workspaces import link, project_params, read_tree, run_stage, save_params, stage_failed
from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace
from sda_core.cli.scripts import Numbers
from sda_core.errors import ArtifactError, ConfigError
from sda_core.evaluation import noise_file, stack
from sda_core.evaluation.groups import item_groups
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.fingerprint import fingerprint
from sda_core.params import Params
from sda_core.traits import aligns_to_ids
from sda_core.variants import adapter_of
from stages.evaluate import evaluate
from stages.train_recommender import train_recommender

_CODE = (
    "adapters",
    "alignment",
    "backbones",
    "data/prompts.py",
    "embeddings",
    "evaluation",
    "items.py",
    "losses",
    "recommenders",
)
_FEWEST = 3


def main(root: Root = Path(), seeds: Seeds = Numbers((1, 2, 3, 4, 5))) -> None:
    """Run what is missing, write the file and its table."""
    measure(root, seeds)


def measure(root: Path, seeds: Sequence[int]) -> SeedNoise:
    """Run every seed that is missing, and write ``seed_noise.json``.

    Args:
        root: the project folder of a finished run.
        seeds: seeds of the adapters, one repetition each; without that of the run.

    Raises:
        ConfigError: too few seeds, a repeated seed, the seed of the run itself, or no variant has an adapter.
        ArtifactError: the run is not finished, or a stage failed.
    """
    workspace, params = Workspace(root), project_params(root)
    tree = YAML(typ="safe", pure=True).load(root / "params.yaml")
    _check_seeds(seeds, params)
    trained = [variant for variant in params.variants if _adapted(params, variant) is not None]
    recommenders = [name for name in params.recommenders if noise_file.has_seed(tree, name)]
    if not trained or not recommenders:
        problem = "no variant has an adapter" if not trained else "no recommender has a seed"
        raise ConfigError(str(root / "params.yaml"), problem, "the run's own seeds contain all of its variation: see `sda diff`")
    needed = [workspace.interactions, workspace.items, workspace.images]
    shared = ["zero_shot"] if params.export_embeddings.with_base else []
    if any(aligns_to_ids(params.train_recommender.of(name)) for name in recommenders):
        shared.append("id")
    needed += [workspace.embeddings(variant) for variant in shared]
    if params.evaluate.protocol != "fullrank":
        needed.append(workspace.negatives(params.evaluate.protocol))
    for path in needed:
        if not path.exists():
            raise ArtifactError(str(path), "does not exist", "run `dvc repro` first")
    pairs = [(variant, recommender) for variant in trained for recommender in recommenders]
    settings: dict[str, str] = {}
    for pair in pairs:
        settings |= noise_file.settings_hashes(tree, *pair)
    base = root / "experiments" / "runs" / "seed_noise" / _inputs(settings, needed)
    runs = {}
    for seed in seeds:
        run = Workspace(base / f"seed-{seed}")
        if not all(run.positions(*pair).exists() for pair in pairs):
            repeat(run, workspace, params, recommenders, trained, shared, seed)
        runs[seed] = {pair: SEED_POSITIONS.read(run.positions(*pair)) for pair in pairs}
    cutoffs = {*params.evaluate.cutoffs, params.report.cutoff}
    interactions, num_items = INTERACTIONS.read(workspace.interactions), ITEMS.count(workspace.items)
    noise = noise_file.gather(runs, settings, interactions, params.evaluate.tail, cutoffs, num_items)
    path = root / noise_file.NAME
    noise_file.write(noise, path)
    targets = stack(next(iter(runs[seeds[0]].values()))).target_U
    in_tail = item_groups(interactions, params.evaluate.tail, num_items).tail[targets]
    write_results(table(noise, pairs, params.report.cutoff, len(targets), int(in_tail.sum())), "seed_noise", root=root)
    logger.info("%s: %d seeds, %d variants and recommenders", path, len(seeds), len(pairs))
    return noise


def _check_seeds(seeds: Sequence[int], params: Params) -> None:
    if len(seeds) < _FEWEST or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            "--seeds", f"expected at least {_FEWEST} different ones, none below 0 (got {', '.join(map(str, seeds))})"
        )
    own = params.train_adapter.training.seed
    if own in seeds:
        problem = f"{own} is the adapter seed of the run itself, which the measurement must not contain"
        raise ConfigError("--seeds", problem, "choose others than that of params.yaml")


def _inputs(settings: Mapping[str, str], needed: Sequence[Path]) -> str:
    """A short hash of all inputs of the repetitions except their seeds."""
    package = Path(sda_core.__file__).parent
    code = [
        path for name in _CODE for path in ([package / name] if name.endswith(".py") else sorted((package / name).rglob("*.py")))
    ]
    text = ",".join(f"{name}={digest}" for name, digest in sorted(settings.items()))
    return fingerprint(text, *needed, *code)[:12]


def repeat(
    run: Workspace,
    source: Workspace,
    params: Params,
    recommenders: Sequence[str],
    trained: Sequence[str],
    shared: Sequence[str],
    seed: int,
) -> None:
    """Repeat the run with another adapter and other seeds of the recommenders; existing results are kept.

    Args:
        run: workspace of the repetition, created or completed.
        source: the finished run.
        params: its params.
        recommenders: recommenders to train.
        trained: variants with an adapter.
        shared: variants whose vectors are those of the run; ``id`` is trained first, because others may align to it.
        seed: seed of the adapters, from which those of the recommenders are derived.

    Raises:
        ArtifactError: a stage failed.
    """
    link(run.root / "data", source.root / "data")
    for variant in shared:
        link(run.embeddings(variant), source.embeddings(variant))
    write_params(source.root / "params.yaml", run.root / "params.yaml", recommenders, seed)
    if "id" in shared:
        repeat_stage("train_recommender", "id", run.root)
    for variant in trained:
        if not run.embeddings(variant).exists():
            adapter = _adapted(params, variant)
            if adapter is not None and not run.adapter(adapter).exists():
                repeat_stage("train_adapter", adapter, run.root)
            repeat_stage("export_embeddings", variant, run.root)
        if not all(run.positions(variant, recommender).exists() for recommender in recommenders):
            repeat_stage("train_recommender", variant, run.root)
            repeat_stage("evaluate", variant, run.root)


def _adapted(params: Params, variant: str) -> str | None:
    """The trained variant whose adapter a variant uses."""
    return None if variant in params.import_embeddings.variants else adapter_of(params, variant)


def write_params(source: Path, target: Path, recommenders: Sequence[str], seed: int) -> None:
    """Write the source's params with another adapter seed, as many other recommender seeds, and only these recommenders."""
    params = read_tree(source)
    params["recommenders"] = list(recommenders)
    params["train_adapter"]["training"]["seed"] = seed
    own = list(params["train_recommender"]["seeds"])
    params["train_recommender"]["seeds"] = [max(own) + seed * len(own) + place for place in range(1, len(own) + 1)]
    save_params(params, target)


def repeat_stage(name: str, variant: str, root: Path) -> None:
    """Run a stage of the pipeline; a stage with a backbone runs in a separate process, to free its memory."""
    if name in ("train_adapter", "export_embeddings"):
        run_stage(name, variant, root)
        return
    logger.info("%s %s in %s", name, variant, root)
    try:
        {"train_recommender": train_recommender, "evaluate": evaluate}[name](variant, root=root)
    except typer.Exit:
        raise stage_failed(name, variant, root) from None


def table(noise: SeedNoise, pairs: Sequence[tuple[str, str]], cutoff: int, num_users: int, num_tail: int) -> str:
    """The table of mean, standard deviation and largest explained difference of each variant and recommender over the runs.

    Args:
        noise: the measured values.
        pairs: variants and recommenders, one row per metric.
        cutoff: cut-off of the metrics.
        num_users: number of users.
        num_tail: number of users with a tail target.
    """
    rows = []
    for variant, recommender in pairs:
        for name, users in ((f"hit@{cutoff}", num_users), (f"ndcg@{cutoff}", num_users), (f"tail_ndcg@{cutoff}", num_tail)):
            spread = noise.spread(variant, recommender, name)
            if spread is None:
                continue
            low, high = spread.sd_interval()
            mean = float(np.mean(noise.values[f"{variant}/{recommender}/{name}"]))
            of_sd = f"{spread.sd:.4f} [{low:.4f}, {high:.4f}]"
            rows.append([variant, recommender, name, f"{mean:.4f}", of_sd, f"{spread.band(users):.4f}"])
    heads = ["variant", "recommender", "metric", "mean", "standard deviation [95 %]", "two runs differ by at most (95 %)"]
    seeds = ", ".join(map(str, noise.seeds))
    title = f"Variation between whole runs, {len(noise.seeds)} seeds ({seeds}), each with its own adapters and recommenders"
    return markdown_table(heads, rows, title)
