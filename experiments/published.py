"""Compare results on Amazon 2014 Beauty with published ones, on ids only.

The input is a workspace of the preset beauty (data/filtered and params.yaml).  The section train_recommender has the settings
of SASRec and BERT4Rec, except those that define a row (MODELS).  Each model is trained with every seed, and ranks the test
targets twice: among all items, and among 100 uniform ones.  Results are kept in the workspace's
experiments/positions/published, so that an interrupted run resumes, and the table is computed from them.  It is written to
experiments/results/published, which `sda report --experiments` shows.

    dvc exp run -S dataset=beauty -S recommender=strong -S filter.ties=file filter      # in a clone; or sda download, sda filter
    python -m experiments published --seeds 1,2,3

The published splits keep equal times in the order of the file (filter.ties=file); the preset beauty draws the order.

--models selects some of them.  Two processes with different models or seeds can run in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.options import THREE_SEEDS, Root, Seeds
from experiments.study import (
    CUTOFF,
    PROTOCOLS,
    Interval,
    Panels,
    check_names,
    epochs,
    gains,
    interval,
    keep_positions,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    positions_path,
    read_positions,
    write_results,
)
from experiments.workspaces import project_params
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, names
from sda_core.params import EvaluateParams


@dataclass(frozen=True)
class Model:
    """A row of the table: the section of the params, the changes in it, and the published results."""

    recommender: str
    changes: Mapping[str, Any]
    published: Mapping[str, tuple[float, float]]  # Hit@10 and NDCG@10 by protocol
    source: str

    @property
    def is_trained(self) -> bool:
        """Whether it has seeds."""
        return self.recommender != "pop"


MODELS = {
    "pop": Model("pop", {"counts": "train"}, {}, "training counts, the default"),
    "pop_leaking": Model("pop", {"counts": "all"}, {"fullrank": (0.0152, 0.0068)}, "S3-Rec's tables: counts over all splits"),
    "bert4rec": Model("bert4rec", {}, {"fullrank": (0.0347, 0.0170)}, "S3-Rec's table"),
    "sasrec_bce": Model("sasrec", {"loss": "bce", "num_negatives": 1}, {"fullrank": (0.0605, 0.0318)}, "S3-Rec's table"),
    "sasrec_softmax": Model(
        "sasrec", {}, {"fullrank": (0.0921, 0.0531), "uni100": (0.4696, 0.3156)}, "eSASRec; sampled: 99 uniform"
    ),
}


def main(
    root: Root = Path(),
    models: Annotated[Names, typer.Option(parser=names, metavar="A,B,...", help="Models to run.")] = Names(MODELS),
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Train what is missing, write table and plot."""
    check_names("--models", models, MODELS)
    workspace, params = Workspace(root), project_params(root)
    folder = root / "experiments" / "positions" / "published"
    for seed in seeds:
        for name in models:
            model = MODELS[name]
            section = params.train_recommender.of(model.recommender).model_copy(update=dict(model.changes))
            if model.is_trained or seed == seeds[0]:
                keep_positions(workspace, params, section, seed, folder / name, protocols=PROTOCOLS)
    shown = folder, models, seeds, params.evaluate
    results = write_results(table(*shown), "published", root=root)
    plot_intervals(results / "plot.png", intervals(*shown), f"NDCG@{CUTOFF}, 95 % interval", columns=2)


def table(folder: Path, models: Sequence[str], seeds: Sequence[int], params: EvaluateParams) -> str:
    """A Markdown table; each model has its finished seeds, and models without one are skipped."""
    rows = []
    for name in models:
        for protocol in PROTOCOLS:
            done = _done(folder / name, seeds, protocol)
            if not done:
                continue
            frames = read_positions(folder / name, done, protocol)
            published = MODELS[name].published.get(protocol)
            cells = [name, protocol, str(len(done)) if MODELS[name].is_trained else "-"]
            means = []
            for metric in ("hit", "ndcg"):
                gain_SU = gains(metric, frames)
                low, high = interval(gain_SU, params, metric)
                deviation = f" ({gain_SU.mean(1).std(ddof=1):.4f})" if len(done) > 1 else ""
                means.append(gain_SU.mean())
                cells.append(f"{gain_SU.mean():.4f}{deviation} [{low:.4f}, {high:.4f}]")
            cells.append("" if published is None else f"{published[0]:.4f} / {published[1]:.4f} ({MODELS[name].source})")
            cells.append(
                "" if published is None else " / ".join(f"{got / told:.3f}" for got, told in zip(means, published, strict=True))
            )
            rows.append([*cells, epochs(folder / name, done)])
    heads = ["model", "candidates", "seeds", f"Hit@{CUTOFF} (sd of the seeds) [95 %]", f"NDCG@{CUTOFF}", "published"]
    return markdown_table([*heads, "ours / published", "best epoch of all"], rows)


def intervals(folder: Path, models: Sequence[str], seeds: Sequence[int], params: EvaluateParams) -> Panels:
    """The NDCG of :func:`table` for a plot: by candidates, by model, with the published results."""
    panels: Panels = {}
    for protocol in PROTOCOLS:
        rows: dict[str, Interval] = {}
        for name in models:
            done = _done(folder / name, seeds, protocol)
            if done:
                rows[name] = mean_and_interval(gains("ndcg", read_positions(folder / name, done, protocol)), params, "ndcg")
                told = MODELS[name].published.get(protocol)
                if told is not None:
                    rows[f"{name}, published"] = (told[1], told[1], told[1])
        if rows:
            panels[protocol] = rows
    return panels


def _done(folder: Path, seeds: Sequence[int], protocol: str) -> list[int]:
    """Seeds whose positions exist."""
    return [seed for seed in seeds if positions_path(folder, seed, protocol).exists()]
