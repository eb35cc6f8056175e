"""How far apart are runs that differ only in their seeds?  What `sda diff` judges a change by.

Takes a finished workspace and its params.yaml.  For every seed it repeats the pipeline's own stages train_adapter,
export_embeddings, train_recommender and evaluate for every variant and recommender of the params, with that seed in place of
every seed of a training.  Data and the vectors of untrained variants are shared.  So a seed is an independent repetition of a
whole run: its adapters, its recommenders.  The result is seed_noise.json in the project folder, to be kept in Git: Hit and NDCG
of each variant and recommender by seed, and hashes of the settings and test targets they hold for.  The rule that is made of it
is in sda_core/evaluation/seed_noise.py.

    python -m experiments seed_noise                         # five seeds
    python -m experiments seed_noise --seeds 1,2,3,4,5,6,7   # more: a narrower noise; the five are kept

A stopped run resumes: finished seeds are kept below experiments/runs/seed_noise/INPUTS, where INPUTS is a hash of settings,
data, shared vectors and code, so that nothing of other inputs is reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import typer
from ruamel.yaml import YAML

import sda_core
from experiments.options import Root, Seeds
from experiments.study import logger, markdown_table, write_results
from experiments.workspaces import link, read_tree, run_stage, save_params, stage_failed
from sda_core.artifacts import INTERACTIONS, ITEMS, POSITIONS, Workspace
from sda_core.cli.scripts import Numbers
from sda_core.errors import ArtifactError, ConfigError
from sda_core.evaluation import noise_file
from sda_core.evaluation.groups import item_groups
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.fingerprint import fingerprint
from sda_core.params import Params, load_params
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
        seeds: of the repetitions; not those of the run.

    Raises:
        ConfigError: too few seeds, one twice, or one that is the run's own.
        ArtifactError: the run is not finished, or a stage failed.
    """
    workspace, params = Workspace(root), load_params(root / "params.yaml")
    tree = YAML(typ="safe", pure=True).load(root / "params.yaml")
    _check_seeds(seeds, tree)
    shared = [variant for variant in params.variants if _adapted(params, variant) is None]
    needed = [workspace.interactions, workspace.items, *(workspace.embeddings(variant) for variant in shared)]
    if params.train_adapter.variants:
        needed.append(workspace.images)
    if params.evaluate.protocol != "fullrank":
        needed.append(workspace.negatives(params.evaluate.protocol))
    for path in needed:
        if not path.exists():
            raise ArtifactError(str(path), "does not exist", "run `dvc repro` first")
    pairs = [(variant, recommender) for variant in params.variants for recommender in params.recommenders]
    settings: dict[str, str] = {}
    for pair in pairs:
        settings |= noise_file.settings_hashes(tree, *pair)
    base = root / "experiments" / "runs" / "seed_noise" / _inputs(settings, needed)
    runs = {}
    for seed in seeds:
        run = Workspace(base / f"seed-{seed}")
        if not all(run.positions(*pair).exists() for pair in pairs):
            repeat(run, workspace, params, shared, seed)
        runs[seed] = {pair: POSITIONS.read(run.positions(*pair)) for pair in pairs}
    cutoffs = {*params.evaluate.cutoffs, params.report.cutoff}
    interactions, num_items = INTERACTIONS.read(workspace.interactions), ITEMS.count(workspace.items)
    noise = noise_file.gather(runs, settings, interactions, params.evaluate.tail, cutoffs, num_items)
    path = root / noise_file.NAME
    noise_file.write(noise, path)
    targets = next(iter(runs[seeds[0]].values()))["target_item_id"].to_numpy()
    in_tail = item_groups(interactions, params.evaluate.tail, num_items).tail[targets]
    seedless = {name for name in params.recommenders if not noise_file.has_seed(tree, name)}
    write_results(table(noise, pairs, seedless, params.report.cutoff, len(targets), int(in_tail.sum())), "seed_noise", root=root)
    logger.info("%s: %d seeds, %d variants and recommenders", path, len(seeds), len(pairs))
    return noise


def _check_seeds(seeds: Sequence[int], tree: Mapping[str, Any]) -> None:
    names = ("train_adapter.training", *(f"train_recommender.{name}" for name in tree["recommenders"]))
    own = {noise_file.at(tree, f"{name}.seed") for name in names}
    if len(seeds) < _FEWEST or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            "--seeds", f"expected at least {_FEWEST} different ones, none below 0 (got {', '.join(map(str, seeds))})"
        )
    if taken := sorted(own & set(seeds)):
        problem = f"{taken[0]} is a seed of the run itself, which the measurement must not contain"
        raise ConfigError("--seeds", problem, "choose others than those in params.yaml")


def _inputs(settings: Mapping[str, str], needed: Sequence[Path]) -> str:
    """A short hash of all inputs of the repetitions except their seeds."""
    package = Path(sda_core.__file__).parent
    code = [
        path for name in _CODE for path in ([package / name] if name.endswith(".py") else sorted((package / name).rglob("*.py")))
    ]
    text = ",".join(f"{name}={digest}" for name, digest in sorted(settings.items()))
    return fingerprint(text, *needed, *code)[:12]


def repeat(run: Workspace, source: Workspace, params: Params, shared: Sequence[str], seed: int) -> None:
    """The run once more with another seed; what exists is kept.

    Args:
        run: made, or completed.
        source: the finished run.
        params: its params.
        shared: variants whose vectors are taken from the run.
        seed: of every training.

    Raises:
        ArtifactError: a stage failed.
    """
    link(run.root / "data", source.root / "data")
    for variant in shared:
        link(run.embeddings(variant), source.embeddings(variant))
    write_params(source.root / "params.yaml", run.root / "params.yaml", seed)
    for variant in params.variants:
        trained = _adapted(params, variant)
        if trained is not None and not run.embeddings(variant).exists():
            if not run.adapter(trained).exists():
                repeat_stage("train_adapter", trained, run.root)
            repeat_stage("export_embeddings", variant, run.root)
    # id first: with align_weight the others follow from its item table
    for variant in sorted(params.variants, key=lambda variant: variant != "id"):
        if not all(run.positions(variant, recommender).exists() for recommender in params.recommenders):
            repeat_stage("train_recommender", variant, run.root)
            repeat_stage("evaluate", variant, run.root)


def _adapted(params: Params, variant: str) -> str | None:
    """The trained variant whose adapter a variant's vectors follow from."""
    return None if variant in params.import_embeddings.variants else adapter_of(params, variant)


def write_params(source: Path, target: Path, seed: int) -> None:
    """The source's params with a seed in place of every seed of a training."""
    params = read_tree(source)
    params["train_adapter"]["training"]["seed"] = seed
    for section in params["train_recommender"].values():
        if isinstance(section, dict) and "seed" in section:
            section["seed"] = seed
    save_params(params, target)


def repeat_stage(name: str, variant: str, root: Path) -> None:
    """One of the pipeline's stages; those that hold a backbone in a process of their own, which frees its memory."""
    if name in ("train_adapter", "export_embeddings"):
        run_stage(name, variant, root)
        return
    logger.info("%s %s in %s", name, variant, root)
    try:
        {"train_recommender": train_recommender, "evaluate": evaluate}[name](variant, root=root)
    except typer.Exit:
        raise stage_failed(name, variant, root) from None


def table(
    noise: SeedNoise, pairs: Sequence[tuple[str, str]], seedless: Set[str], cutoff: int, num_users: int, num_tail: int
) -> str:
    """Mean and standard deviation of each variant and recommender over the seeds, and the largest difference they explain.

    Args:
        noise: measured.
        pairs: variants and recommenders; a row for each metric.
        seedless: recommenders that draw nothing.
        cutoff: of the metrics.
        num_users: all of them.
        num_tail: those with a tail target.
    """
    rows = []
    for variant, recommender in pairs:
        for name, users in ((f"hit@{cutoff}", num_users), (f"ndcg@{cutoff}", num_users), (f"tail_ndcg@{cutoff}", num_tail)):
            spread = noise.spread(variant, recommender, name)
            if spread is None:
                continue
            low, high = spread.sd_interval()
            cells = [variant, recommender, name, f"{spread.mean:.4f}"]
            if recommender in seedless:
                rows.append([*cells, "0 (no seed)", "0"])
            else:
                rows.append([*cells, f"{spread.sd:.4f} [{low:.4f}, {high:.4f}]", f"{spread.band(users):.4f}"])
    heads = ["variant", "recommender", "metric", "mean", "standard deviation [95 %]", "two runs differ by at most (95 %)"]
    seeds = ", ".join(map(str, noise.seeds))
    title = f"The seeds' noise, {len(noise.seeds)} seeds ({seeds}), each with adapters and recommenders of its own"
    return markdown_table(heads, rows, title)
