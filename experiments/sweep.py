"""Measure the effect of a setting: several values with several seeds, on the vectors and on recommenders that use them.

The input is a workspace whose data stages are done.  For every value and seed a separate workspace is made in
experiments/runs/NAME/VALUE, where one variant's adapter is trained, its vectors are exported (by the stages of the pipeline, in
separate processes), and the recommenders are trained on them.  Existing results are kept, so an interrupted run resumes.  The
results are table.md and plot.png in experiments/results/sweep-NAME, which `sda report --experiments` shows.

    python -m experiments sweep --name temperature --param train_adapter.loss.temperature --values 0.01,0.05,0.1,0.2
    python -m experiments sweep --name experts --param train_adapter.moda.num_experts --values 2,4,8
    python -m experiments sweep --name rank --param train_adapter.moda.r --values 4,8,16
    python -m experiments sweep --name steps --param train_adapter.training.num_steps --values 18,60,180
    python -m experiments sweep --name batch --param train_adapter.training.batch_size --values 8,16,32
    python -m experiments sweep --name teacher --param train_adapter.loss.teacher --values mean,image,text,agreement

With --corrupt text or --corrupt image the values are shares of the items whose texts or images are corrupted during the
training of the adapter (--how shuffle, blank, noise or absent).  The vectors are computed from the clean items:

    python -m experiments sweep --name noisy-text-sda --corrupt text --values 0,0.2,0.4,0.6
    python -m experiments sweep --name noisy-text-infonce --variant infonce --corrupt text --values 0,0.2,0.4,0.6

The row zero_shot is the backbone without adapter.  loss, retrieval and alignment are those of the last batch; retrieval@1 is
computed among all items.  Differences are relative to zero_shot, with intervals over users and seeds, paired by both.  To choose
a value, use the validation column.

The default of 36 steps is for a laptop; adapters learn little in it.  Add --set train_adapter.training.num_steps=100
--set train_adapter.training.learning_rate=0.001 (some minutes per run on two cores) to train them longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import typer

from experiments.corruption import How
from experiments.options import THREE_SEEDS, Changes, Name, Recommenders, Seeds, Source
from experiments.study import (
    CUTOFF,
    best_validation,
    check_names,
    difference,
    logger,
    markdown_table,
    mean_and_interval,
    read_gains,
    retrieval_at_1,
    write_results,
)
from experiments.workspaces import BASE, VARIANTS, Study, adapt, params_file, prepare, read_curve, train_on, train_on_corrupted
from sda_core.artifacts import INTERACTIONS, ITEMS
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.evaluation.groups import item_groups
from sda_core.params import Params, load_params


@dataclass(frozen=True)
class Sweep:
    """The varied quantity and its values: a param, or the share of items whose ``corrupted`` modality is corrupted."""

    study: Study
    variant: str
    values: Sequence[str]
    recommenders: Sequence[str]
    param: str | None
    corrupted: Literal["image", "text"] | None
    how: How

    @property
    def varied(self) -> str:
        """The name of the varied quantity."""
        return self.param or f"share of items with a corrupted {self.corrupted}"

    def gains(self, value: str, recommender: str) -> np.ndarray:
        """NDCG by seed and user ``(S, U)``."""
        return read_gains("ndcg", self.study.positions(value, recommender), self.study.seeds)

    def groups(self) -> tuple[Params, dict[str, np.ndarray]]:
        """Params of the first workspace, and its test users as masks: all, and those with a tail target."""
        workspace, params = self.study.workspace(self.values[0], self.study.seeds[0]), self.study.params(self.values[0])
        interactions = INTERACTIONS.read(workspace.interactions)
        targets = interactions.filter(pl.col("split") == "test").sort("user_id")["item_id"].to_numpy()
        tail = item_groups(interactions, params.evaluate.tail, ITEMS.count(workspace.items)).tail[targets]
        return params, {"all users": np.ones(len(tail), dtype=bool), "tail target": tail}


def main(
    name: Name,
    values: Annotated[
        Names, typer.Option(parser=names, metavar="A,B,...", help="Values of the setting, or shares of corrupted items.")
    ],
    source: Source = Path(),
    variant: Annotated[str, typer.Option(help=f"The trained variant: {', '.join(VARIANTS)}.")] = "sda",
    param: Annotated[
        str | None, typer.Option(help="The setting that is varied, e.g. train_adapter.moda.r.", show_default=False)
    ] = None,
    corrupted: Annotated[
        Literal["image", "text"] | None,
        typer.Option(
            "--corrupt", help="Vary the share of items with corrupted images or texts instead of a setting.", show_default=False
        ),
    ] = None,
    how: How = "shuffle",
    seeds: Seeds = THREE_SEEDS,
    recommenders: Recommenders = Names(("sasrec",)),
    changes: Changes = None,
) -> None:
    """Run what is missing, write table and plot."""
    check_names("--variant", [variant], VARIANTS)
    if (param is None) == (corrupted is None):
        raise ConfigError(
            "--param, --corrupt", "expected exactly one of them", "give the setting to vary, or the modality to corrupt"
        )
    params_file(source, "--source")
    study = Study(source.resolve(), Path("experiments") / "runs" / name, [variant], seeds, changes or [])
    sweep = Sweep(study, variant, values, recommenders, param, corrupted, how)
    for seed in seeds:
        for value in values:
            make_vectors(sweep, value, seed)
        for recommender in recommenders:
            for value in [BASE, *values]:
                workspace = study.workspace(values[0] if value == BASE else value, seed)
                params = load_params(workspace.root / "params.yaml")
                whose = BASE if value == BASE else variant
                train_on(workspace, params, whose, recommender, seed, study.positions(value, recommender))
    results = write_results("\n".join(table(sweep, recommender) for recommender in recommenders), "sweep", name)
    plot(sweep, results / "plot.png")
    logger.info("plot: %s", results / "plot.png")


def make_vectors(sweep: Sweep, value: str, seed: int) -> None:
    """Make adapter and vectors of one value and seed, unless they exist; zero_shot's vectors are computed once and linked."""
    study, variant = sweep.study, sweep.variant
    workspace = study.workspace(value, seed)
    changes = [*study.changes, *([] if sweep.param is None else [f"{sweep.param}={value}"])]
    prepare(workspace, study.source, study.folder / f"{BASE}.parquet", seed, study.variants, changes)
    if sweep.corrupted is not None:
        train_on_corrupted(workspace, variant, sweep.corrupted, sweep.how, float(value), seed)
    adapt(workspace, variant)


# ------------------------------------------------------------------------------------------------- numbers
def table(sweep: Sweep, recommender: str) -> str:
    """A Markdown table of one recommender with one row per value."""
    params, groups = sweep.groups()
    base_SU = sweep.gains(BASE, recommender)
    rows = []
    for value in [BASE, *sweep.values]:
        ndcg_SU = sweep.gains(value, recommender)
        cells = [value, *training_cells(sweep, value), f"{validation(sweep, value, recommender):.4f}"]
        for mask in groups.values():
            if not mask.any():
                cells += ["", ""]
                continue
            gain_SU = (ndcg_SU - base_SU)[:, mask]
            cells.append(f"{ndcg_SU[:, mask].mean():.4f}")
            cells.append("" if value == BASE else difference(gain_SU, params.evaluate, value))
        rows.append(cells)
    heads = ["value", "loss", "retrieval", "alignment", "retrieval@1", f"valid NDCG@{CUTOFF}", f"NDCG@{CUTOFF}"]
    heads += [f"- {BASE} [95 %]", f"tail NDCG@{CUTOFF} ({groups['tail target'].sum()} users)", f"- {BASE} [95 %]"]
    varied = sweep.varied + ("" if sweep.corrupted is None else f" ({sweep.how})")
    title = f"{sweep.variant} in {recommender} by `{varied}`, {len(sweep.study.seeds)} seeds"
    return markdown_table(heads, rows, title)


def training_cells(sweep: Sweep, value: str) -> list[str]:
    """Last loss, retrieval and alignment of adapter training, and R@1 of the vectors; means over the seeds."""
    study, variant = sweep.study, sweep.variant
    if value == BASE:
        return ["", "", "", f"{retrieval_at_1(study.folder / f'{BASE}.parquet'):.3f}"]
    curves = [read_curve(study.workspace(value, seed), variant) for seed in study.seeds]
    last = [np.mean([curve[name][-1] for curve in curves]) for name in ("loss", "retrieval", "alignment")]
    return [f"{number:.3f}" for number in (*last, study.retrieval(value, variant))]


def validation(sweep: Sweep, value: str, recommender: str) -> float:
    """Best validation NDCG@10, mean over the seeds."""
    return best_validation(sweep.study.positions(value, recommender), sweep.study.seeds)


def plot(sweep: Sweep, path: Path) -> None:
    """Plot NDCG@10 by value, one panel per recommender, all users and tail, with lines at zero_shot."""
    from matplotlib import pyplot as plt

    params, groups = sweep.groups()
    groups = {name: mask for name, mask in groups.items() if mask.any()}
    size = (5 * len(groups), 3.4 * len(sweep.recommenders))
    figure, axes = plt.subplots(len(sweep.recommenders), len(groups), figsize=size, squeeze=False, layout="constrained")
    for line, recommender in zip(axes, sweep.recommenders, strict=True):
        base_SU = sweep.gains(BASE, recommender)
        for axis, (name, mask) in zip(line, groups.items(), strict=True):
            points = list(_points(sweep, recommender, base_SU, mask, params))
            centres, errors = [centre for centre, _ in points], np.maximum(np.array([error for _, error in points]).T, 0.0)
            axis.errorbar(range(len(points)), centres, yerr=errors, fmt="o-", color="#1f5fa8", capsize=3, label=sweep.variant)
            axis.axhline(base_SU[:, mask].mean(), color="#666666", linestyle="--", linewidth=1, label=BASE)
            axis.set_xticks(range(len(points)), sweep.values)
            axis.set_xlabel(sweep.varied)
            axis.set_ylabel(f"NDCG@{CUTOFF}")
            axis.set_title(f"{recommender}, {name} ({mask.sum()})", fontsize=10)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(
    sweep: Sweep, recommender: str, base_SU: np.ndarray, mask: np.ndarray, params: Params
) -> Iterator[tuple[float, tuple[float, float]]]:
    """For each value the mean, and the distances to the lower and upper end of the paired interval."""
    for value in sweep.values:
        ndcg_SU = sweep.gains(value, recommender)
        mean, low, high = mean_and_interval((ndcg_SU - base_SU)[:, mask], params.evaluate, value)
        yield float(ndcg_SU[:, mask].mean()), (mean - low, high - mean)
