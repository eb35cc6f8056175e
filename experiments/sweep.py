"""One setting at several values, over several seeds: what becomes of the vectors, and of a recommender on them.

Takes a workspace whose data stages are done.  For every value and seed it makes a workspace of its own below
``experiments/runs/<name>/<value>``, trains one variant's adapter there and exports its vectors (the pipeline's own stages, in
processes of their own), and trains the recommenders on them.  What is there already is kept, so a run that was stopped goes on.
Ends with ``table.md`` and ``plot.png`` in ``experiments/results/sweep-<name>``, which ``sda report --experiments`` shows.

    python experiments/sweep.py --name temperature --param train_adapter.loss.temperature --values 0.01 0.05 0.1 0.2
    python experiments/sweep.py --name experts --param train_adapter.moda.num_experts --values 2 4 8
    python experiments/sweep.py --name rank --param train_adapter.moda.r --values 4 8 16
    python experiments/sweep.py --name steps --param train_adapter.training.num_steps --values 18 60 180
    python experiments/sweep.py --name batch --param train_adapter.training.batch_size --values 8 16 32
    python experiments/sweep.py --name teacher --param train_adapter.loss.teacher --values mean image text agreement

With ``--corrupt text`` or ``--corrupt image`` the values are shares of the items whose words or pictures are spoilt *while the
adapter is trained* (``--how shuffle | blank | noise``); the vectors are computed from the clean items:

    python experiments/sweep.py --name noisy-text-sda --corrupt text --values 0 0.2 0.4 0.6
    python experiments/sweep.py --name noisy-text-infonce --variant infonce --corrupt text --values 0 0.2 0.4 0.6

The row ``zero_shot`` is the backbone as it is.  ``loss``, ``retrieval`` and ``alignment`` are those of the last batch,
``found`` is how often an item's picture finds its own words first among all items, and the words the picture.  Differences are
against ``zero_shot``, averaged over the seeds for each user first, with a paired bootstrap interval over users.  A value is
chosen, if at all, by the validation column.

The default of 36 steps is for a laptop, and teaches little: add ``--set train_adapter.training.num_steps=100
train_adapter.training.learning_rate=0.001`` (some minutes a run on two cores) for adapters that have learned more.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
from _corruption import corrupt
from _runs import CUTOFF, difference, found, gains, leave, reach, read_positions
from compare_vectors import train_on
from train_seeds import BASE, VARIANTS, adapt, prepare, run

from sda_core import log
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.evaluation.groups import item_groups
from sda_core.params import Params, load_params

mpl.use("Agg")
_log = logging.getLogger("experiments")


@dataclass(frozen=True)
class Options:
    """What is varied, and on what."""

    source: Path
    name: str
    variant: str
    param: str | None
    corrupted: str | None
    how: str
    values: list[str]
    seeds: list[int]
    recommenders: list[str]
    settings: list[str]

    @property
    def folder(self) -> Path:
        """Where everything of this sweep is kept."""
        return Path("experiments") / "runs" / self.name

    def workspace(self, value: str, seed: int) -> Workspace:
        """Of one value and seed."""
        return Workspace(self.folder / value / f"seed-{seed}")

    def positions(self, value: str, recommender: str) -> Path:
        """Where a value's positions are kept."""
        return self.folder / value / "positions" / recommender


def main() -> None:
    """Read the options, run what is missing, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(), help="the project folder whose data is used")
    parser.add_argument("--name", required=True, help="folder of the sweep below experiments/runs")
    parser.add_argument("--variant", choices=list(VARIANTS), default="sda")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--param", help="path of the param that is varied")
    what.add_argument("--corrupt", choices=["image", "text"], help="vary the share of spoilt items instead")
    parser.add_argument("--how", choices=["shuffle", "blank", "noise"], default="shuffle")
    parser.add_argument("--values", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--recommenders", nargs="+", default=["sasrec"])
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE", help="changed params, as YAML, for all values")
    given = parser.parse_args()
    log.configure()
    options = Options(
        given.source.resolve(), given.name, given.variant, given.param, given.corrupt, given.how, given.values, given.seeds,
        given.recommenders, given.set,
    )  # fmt: skip
    for seed in options.seeds:
        for value in options.values:
            make_vectors(options, value, seed)
        for recommender in options.recommenders:
            for value in [BASE, *options.values]:
                workspace = options.workspace(options.values[0] if value == BASE else value, seed)
                params = load_params(workspace.root / "params.yaml")
                variant = BASE if value == BASE else options.variant
                train_on(workspace, params, variant, recommender, seed, options.positions(value, recommender), {})
    text = "\n".join(table(options, recommender) for recommender in options.recommenders)
    place = leave(text, "sweep", options.name) / "plot.png"
    plot(options, place)
    _log.info("plot: %s", place)


def make_vectors(options: Options, value: str, seed: int) -> None:
    """Adapter and vectors of one value and seed, unless they are there; zero_shot's vectors are computed once and linked."""
    workspace = options.workspace(value, seed)
    root = workspace.root
    changes = options.settings + ([] if options.param is None else [f"{options.param}={value}"])
    prepare(workspace, options.source, options.folder / "zero_shot.parquet", seed, [options.variant], changes)
    if not workspace.adapter(options.variant).exists():
        trained_in = root
        if options.corrupted is not None:  # trained on spoilt items, in a workspace beside
            trained_in = root / "spoilt"
            trained_in.mkdir(exist_ok=True)
            (trained_in / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
            corrupt(workspace, Workspace(trained_in), options.corrupted, options.how, float(value), seed)  # type: ignore[arg-type]
        run("train_adapter", options.variant, trained_in)
        if trained_in != root:
            workspace.adapter(options.variant).parent.mkdir(exist_ok=True)
            Workspace(trained_in).adapter(options.variant).rename(workspace.adapter(options.variant))
    adapt(workspace, options.variant)


# ------------------------------------------------------------------------------------------------- numbers
def table(options: Options, recommender: str) -> str:
    """A markdown table of one recommender: a row a value."""
    workspace, params = _first(options)
    tail = _has_tail_target(workspace, params)
    varied = options.param or f"share of items with a spoilt {options.corrupted} ({options.how})"
    lines = [
        f"### {options.variant} in {recommender} by `{varied}`, {len(options.seeds)} seeds",
        "",
        f"| value | loss | retrieval | alignment | found | valid NDCG@{CUTOFF} | NDCG@{CUTOFF} | - {BASE} [95 %]"
        f" | tail NDCG@{CUTOFF} ({tail.sum()} users) | - {BASE} [95 %] |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base_SU = gains("ndcg", read_positions(options.positions(BASE, recommender), options.seeds))
    for value in [BASE, *options.values]:
        ndcg_SU = gains("ndcg", read_positions(options.positions(value, recommender), options.seeds))
        cells = [
            value,
            *_training(options, value),
            f"{_found(options, value):.3f}",
            f"{_validation(options, value, recommender):.4f}",
        ]
        for mask in (np.ones(ndcg_SU.shape[1], dtype=bool), tail):
            if not mask.any():
                cells += ["", ""]
                continue
            cells.append(f"{ndcg_SU[:, mask].mean():.4f}")
            gain_SU = (ndcg_SU - base_SU)[:, mask]
            cells.append("" if value == BASE else difference(gain_SU, params.evaluate, value))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _first(options: Options) -> tuple[Workspace, Params]:
    workspace = options.workspace(options.values[0], options.seeds[0])
    return workspace, load_params(workspace.root / "params.yaml")


def _has_tail_target(workspace: Workspace, params: Params) -> np.ndarray:
    """Whether each test user's target is a tail item."""
    interactions = INTERACTIONS.read(workspace.interactions)
    targets = interactions.filter(pl.col("split") == "test").sort("user_id")["item_id"].to_numpy()
    return item_groups(interactions, params.evaluate.tail, ITEMS.count(workspace.items)).tail[targets]


def _training(options: Options, value: str) -> list[str]:
    """Last loss, retrieval and alignment of the adapters' training, means over the seeds."""
    if value == BASE:
        return ["", "", ""]
    curves = [
        pl.read_csv(options.workspace(value, seed).adapter(options.variant) / "loss.tsv", separator="\t")
        for seed in options.seeds
    ]
    return [f"{np.mean([curve[name][-1] for curve in curves]):.3f}" for name in ("loss", "retrieval", "alignment")]


def _found(options: Options, value: str) -> float:
    """How often an item's picture and words find each other first, mean over the seeds; see :func:`_runs.found`."""
    if value == BASE:
        return found(options.folder / f"{BASE}.parquet")
    return float(np.mean([found(options.workspace(value, seed).embeddings(options.variant)) for seed in options.seeds]))


def _validation(options: Options, value: str, recommender: str) -> float:
    """Best validation NDCG@10, mean over the seeds."""
    best = []
    for seed in options.seeds:
        path = options.positions(value, recommender) / f"{seed}.tsv"
        curve = pl.read_csv(path, separator="\t", schema_overrides={"valid_ndcg_10": pl.Float64})
        best.append(float(curve["valid_ndcg_10"].max() or 0.0))  # type: ignore[arg-type]
    return float(np.mean(best))


def plot(options: Options, path: Path) -> None:
    """NDCG@10 by value, a panel a recommender, all users and tail; lines at zero_shot."""
    from matplotlib import pyplot as plt

    workspace, params = _first(options)
    tail = _has_tail_target(workspace, params)
    groups: Mapping[str, np.ndarray] = {"all users": np.ones(len(tail), dtype=bool), "tail target": tail}
    groups = {name: mask for name, mask in groups.items() if mask.any()}
    figure, axes = plt.subplots(
        len(options.recommenders), len(groups), figsize=(5 * len(groups), 3.4 * len(options.recommenders)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, recommender in zip(axes, options.recommenders, strict=True):
        base_SU = gains("ndcg", read_positions(options.positions(BASE, recommender), options.seeds))
        for axis, (name, mask) in zip(line, groups.items(), strict=True):
            centres, errors = _points(options, recommender, base_SU, mask, params)
            base = base_SU[:, mask].mean()
            axis.errorbar(range(len(centres)), centres, yerr=errors, fmt="o-", color="#1f5fa8", capsize=3, label=options.variant)
            axis.axhline(base, color="#666666", linestyle="--", linewidth=1, label=BASE)
            axis.set_xticks(range(len(centres)), options.values)
            axis.set_xlabel(options.param or f"share of items with a spoilt {options.corrupted}")
            axis.set_ylabel(f"NDCG@{CUTOFF}")
            axis.set_title(f"{recommender}, {name} ({mask.sum()})", fontsize=10)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(
    options: Options, recommender: str, base_SU: np.ndarray, mask: np.ndarray, params: Params
) -> tuple[Sequence[float], np.ndarray]:
    """Means, and the reach of the paired interval below and above, ``(2, values)``."""
    centres, errors = [], []
    for value in options.values:
        ndcg_SU = gains("ndcg", read_positions(options.positions(value, recommender), options.seeds))
        gain_SU = (ndcg_SU - base_SU)[:, mask]
        mean, low, high = reach(gain_SU, params.evaluate, value)
        centres.append(float(ndcg_SU[:, mask].mean()))
        errors.append((mean - low, high - mean))
    return centres, np.maximum(np.array(errors).T, 0.0)


if __name__ == "__main__":
    main()
