"""Do these item vectors help?  Variants against one another in several recommenders, over several seeds, with intervals.

Takes a finished workspace (``data/filtered`` and ``embeddings/``) and its ``params.yaml``; trains every recommender on every
variant's vectors with every seed, and places the test targets.  Positions are kept as parquet below the workspace's
``experiments/positions/<name>``, so that a run that was stopped goes on, and the table is made from them alone.
With ``--root 'experiments/runs/effect/seed-{seed}'`` every seed has a workspace of its own, hence adapters of its own
(``experiments/train_seeds.py`` makes them), and positions are kept beside these.

Besides the variants of the pipeline there are controls, made of ``embeddings/zero_shot.parquet``: ``random`` (random directions),
``shuffled`` (the right vectors on the wrong items), ``image_only`` and ``text_only``.

For each user the gain is averaged over the seeds first; the interval is a paired bootstrap over users of the difference between
two variants, and beside it stands the range of the difference over the single seeds.

    python experiments/compare_vectors.py --name signal --variants zero_shot random shuffled --baselines random shuffled \\
        --recommenders sasrec vbpr --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import polars as pl

from sda_core import evaluation, log, recommenders
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, POSITIONS, Workspace, read_vectors
from sda_core.evaluation.groups import item_groups
from sda_core.evaluation.metrics import per_user
from sda_core.evaluation.significance import bootstrap_interval
from sda_core.fingerprint import fingerprint
from sda_core.params import Params, load_params
from sda_core.runtime import prepare_torch
from sda_core.seed import generator

_log = logging.getLogger("experiments")


def main() -> None:
    """Read the options, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".", help="the project folder of the run; {seed} in it stands for the seed")
    parser.add_argument("--name", required=True, help="folder of the results below experiments/positions")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--baselines", nargs="+", required=True)
    parser.add_argument("--recommenders", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-epochs", type=int, help="instead of each recommender's own max_epochs")
    options = parser.parse_args()
    log.configure()
    common = Path(options.root)
    common = common.parent if "{seed}" in common.name else common
    folder = common / "experiments" / "positions" / options.name
    for seed in options.seeds:
        workspace, params = workspace_of(options.root, seed)
        for recommender in options.recommenders:
            for variant in dict.fromkeys([*options.variants, *options.baselines]):
                path = folder / recommender / variant / f"{seed}.parquet"
                if not path.exists():
                    POSITIONS.write(placed(workspace, params, variant, recommender, seed, options.max_epochs), path)
    for recommender in options.recommenders:
        workspace, params = workspace_of(options.root, options.seeds[0])
        print(table(workspace, params, folder / recommender, options.variants, options.baselines, options.seeds))


def workspace_of(root: str, seed: int) -> tuple[Workspace, Params]:
    """The workspace that a seed's vectors come from, and its params."""
    folder = Path(root.replace("{seed}", str(seed)))
    return Workspace(folder), load_params(folder / "params.yaml")


def vectors_of(workspace: Workspace, variant: str) -> np.ndarray | None:
    """Item vectors of a variant or a control, row number = item id, row 0 zero."""
    if variant not in ("random", "shuffled", "image_only", "text_only"):
        return read_vectors(workspace.embeddings(variant))
    path = workspace.embeddings("zero_shot")
    vectors = read_vectors(path)
    assert vectors is not None, "zero_shot has vectors"
    random = generator(0, "control vectors", variant)
    match variant:
        case "random":
            made = random.normal(size=(len(vectors) - 1, vectors.shape[1]))
            made /= np.linalg.norm(made, axis=1, keepdims=True)
        case "shuffled":
            circle = random.permutation(len(vectors) - 1)  # each item gets the next one's on a random circle: never its own
            made = np.empty_like(vectors[1:])
            made[circle] = vectors[1:][np.roll(circle, 1)]
        case _:
            frame = EMBEDDINGS.read(path).sort("item_id")
            column = frame["image_embedding" if variant == "image_only" else "text_embedding"]
            has_vector = column.is_not_null().to_numpy()
            made = np.zeros((len(frame), column.dtype.size), dtype=np.float32)  # pyright: ignore
            made[has_vector] = column.drop_nulls().to_numpy()
            made[~has_vector] = made[has_vector].mean(axis=0)
            made /= np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)
    return np.concatenate([np.zeros((1, made.shape[1])), made]).astype(np.float32)


def placed(
    workspace: Workspace, params: Params, variant: str, recommender: str, seed: int, max_epochs: int | None
) -> pl.DataFrame:
    """Positions of the test targets after training with one seed; the best epoch is chosen on the validation targets."""
    changes = {"seed": seed} | ({} if max_epochs is None else {"max_epochs": max_epochs})
    section = params.train_recommender.of(recommender).model_copy(update=changes)
    device = prepare_torch(params.runtime)
    interactions = INTERACTIONS.read(workspace.interactions)
    vectors = vectors_of(workspace, variant)
    data = recommenders.training_data(
        interactions.filter(pl.col("split").is_in(["train", "valid"])),
        num_users=interactions["user_id"].n_unique(),
        num_items=interactions["item_id"].n_unique(),
    )
    model = recommenders.build(section, data.num_users, data.num_items, vectors)
    scratch = workspace.resume("experiments", variant, recommender) / "checkpoint.safetensors"
    inputs = fingerprint(section, workspace.interactions, "" if vectors is None else recommenders.hash_vectors(vectors))
    records = model.fit(data, checkpoint=scratch, fingerprint=inputs, device=device)
    scratch.unlink(missing_ok=True)
    known = recommenders.evaluation_data(interactions)
    found = recommenders.place_targets(model, known, None, params.evaluate.batch_size, device)
    _log.info("%s %s seed %d: %d epochs", recommender, variant, seed, len(records))
    return evaluation.score_positions(found, params.evaluate.ties)


def table(workspace: Workspace, params: Params, folder: Path, variants: list[str], baselines: list[str], seeds: list[int]) -> str:
    """A markdown table of one recommender."""
    interactions = INTERACTIONS.read(workspace.interactions)
    tail = item_groups(interactions, params.evaluate.tail).tail
    names = list(dict.fromkeys([*variants, *baselines]))
    read = {name: [POSITIONS.read(folder / name / f"{seed}.parquet").sort("user_id") for seed in seeds] for name in names}
    targets = read[names[0]][0]["target_item_id"].to_numpy()
    groups = {"all": np.ones(len(targets), dtype=bool), "tail": tail[targets]}
    lines = [
        f"### {folder.name}, full rank, {len(seeds)} seeds",
        "",
        "| group (users) | variant | Hit@10 | NDCG@10 | against | NDCG@10 difference [95 %] | over seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, mask in groups.items():
        gains = {
            metric: {
                name: np.array([per_user(metric, frame["position"].to_numpy()[mask], 10) for frame in frames])
                for name, frames in read.items()
            }
            for metric in ("hit", "ndcg")
        }
        for name in names:
            first = f"| {group} ({mask.sum()}) | {name} | {gains['hit'][name].mean():.4f} | {gains['ndcg'][name].mean():.4f} |"
            rivals = [rival for rival in baselines if rival != name] if name in variants else []
            for rival in rivals or [""]:
                if not rival:
                    lines.append(f"{first} | | |")
                    continue
                difference_SU = gains["ndcg"][name] - gains["ndcg"][rival]
                low, high = bootstrap_interval(
                    difference_SU.mean(0), params.evaluate.bootstrap_samples, generator(params.evaluate.bootstrap_seed, rival)
                )
                of_seeds = difference_SU.mean(1)
                lines.append(
                    f"{first} {rival} | {difference_SU.mean():+.4f} [{low:+.4f}, {high:+.4f}] |"
                    f" {of_seeds.min():+.4f} .. {of_seeds.max():+.4f} |"
                )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
