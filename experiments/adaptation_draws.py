"""Compare adapted and frozen vectors over several draws of the built-in shop.

One shop is one random draw of items, tastes and purchases, and one adapter is one random draw as well.  Here each draw of the
shop has its own adapters, whose seed is that of the draw.  Items are ranked by the recommender ``nearest`` with the settings of
the project, by vectors alone and next to ids (``id+X``).  The intervals are Student's t over the draws' means, so they include
the variation between draws, users and adapters:

    python -m experiments adaptation_draws --name default --shop-seeds 301,302,303,304 --vectors sda,mismatched

==============  =====================================================================================================
sda, infonce    MoDA with soft targets (CMSA) and with hard targets
lora            LoRA with hard targets; lora_cmsa: with soft targets
mismatched      the negative control: sda, trained on images with the texts of other items
==============  =====================================================================================================

Every draw also has id, oracle and zero_shot.  Presets and settings are changed by --compose, in the syntax of
`dvc exp run -S`; without it they are those of the default run.  Projects are kept below
experiments/runs/adaptation_draws/NAME, so a stopped run resumes.  Tables and plot are written to
experiments/results/adaptation_draws-NAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments import adaptation, nearest_items
from experiments.adaptation import IDS, MISMATCHED, Composed
from experiments.nearest_items import ORACLE, Run
from experiments.options import Name, Root
from experiments.oracles import different_draws, over_draws
from experiments.study import CUTOFF, Panels, check_names, interval_cell, markdown_table, plot_intervals, write_results
from experiments.workspaces import BASE, VARIANTS, mean_retrieval
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers, names, numbers
from sda_core.errors import ConfigError
from sda_core.params import DemoDataset

ID = "id"
Ndcg = dict[str, list[np.ndarray]]  # by vectors: NDCG@10 (U,) of the users of each draw

Vectors = Annotated[Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="Adapted vectors to compare.")]
ShopSeeds = Annotated[
    Numbers,
    typer.Option("--shop-seeds", parser=numbers, metavar="301,302,...", help="Values of dataset.seed; one draw for each."),
]


def main(
    name: Name,
    shop_seeds: ShopSeeds,
    vectors: Vectors = Names(("sda", MISMATCHED)),
    composed: Composed = None,
    root: Root = Path(),
) -> None:
    """Train the adapters of every draw, rank the targets, and write tables and plot."""
    check_names("--vectors", vectors, [*VARIANTS, MISMATCHED])
    adapted = list(dict.fromkeys(vectors))
    draws = different_draws(shop_seeds)
    folder = root / "experiments" / "runs" / "adaptation_draws" / name
    runs = [train(folder, root, composed or [], adapted, draw) for draw in draws]
    of_draw = [rank(run, adapted, draw) for run, draw in zip(runs, draws, strict=True)]
    ndcg: Ndcg = {vector: [measured[vector] for measured in of_draw] for vector in of_draw[0]}
    tables = [learned(runs, draws, adapted), levels(ndcg, adapted), by_draw(ndcg, draws, adapted)]
    results = write_results("\n".join(tables), "adaptation_draws", name, root)
    plot_intervals(results / "plot.png", plotted(ndcg, adapted), f"difference in NDCG@{CUTOFF}", zero=True, columns=2)


def train(folder: Path, root: Path, composed: Sequence[str], adapted: Sequence[str], draw: int) -> Run:
    """Make the shop of a draw and its adapters, unless they exist.

    Raises:
        ConfigError: a value is wrong, the data is not the built-in shop, or the folder has other params.
        ArtifactError: a stage failed.
    """
    own = folder / f"draw-{draw}"
    shop, conf = Workspace(own / "shop"), (root / "conf").resolve()
    params = adaptation.compose(shop, conf, [*composed, f"dataset.seed={draw}"])
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError("--compose", "only the built-in shop can be drawn again", "use dataset=demo")
    adaptation.run_data_stages(shop)
    for vector in (BASE, *adapted):
        adaptation.train_vector(shop, own, vector, (), draw)
    return Run(str(draw), own, params)


def rank(run: Run, adapted: Sequence[str], draw: int) -> dict[str, np.ndarray]:
    """NDCG@10 ``(U,)`` of all users of a draw, by kind of vectors."""
    single = (BASE, *adapted, ORACLE)
    kinds = [ID, *single, *(f"{IDS}{vector}" for vector in single)]
    scaling = run.params.train_recommender.nearest.axis_scaling
    of_all = next(iter(nearest_items.measure(run, kinds, (), [draw], scaling).values()))
    return {kind: ndcg_SU[0] for kind, (ndcg_SU, _) in of_all.items()}


# ------------------------------------------------------------------------------------------------- results
def pairs(adapted: Sequence[str]) -> list[tuple[str, str]]:
    """The compared vectors, first minus second: next to ids, then alone."""
    found: list[tuple[str, str]] = []
    for ids in (IDS, ""):
        base = f"{ids}{BASE}"
        found += [(base, ID)] if ids else []
        found += [(f"{ids}{vector}", base) for vector in adapted]
        of_true_pairs = [vector for vector in adapted if vector != MISMATCHED]
        found += [(f"{ids}{first}", f"{ids}{second}") for first, second in combinations(of_true_pairs, 2)]
        found += [
            (f"{ids}{vector}", f"{ids}{MISMATCHED}") for vector in adapted if vector != MISMATCHED and MISMATCHED in adapted
        ]
        found += [(f"{ids}{ORACLE}", base)]
    return found


def means(ndcg: Ndcg, first: str, second: str) -> list[float]:
    """The mean difference of each draw."""
    return [float((one_U - other_U).mean()) for one_U, other_U in zip(ndcg[first], ndcg[second], strict=True)]


def learned(runs: Sequence[Run], draws: Sequence[int], adapted: Sequence[str]) -> str:
    """Markdown table: retrieval@1 of image and text before and after training, mean and range over the draws."""
    rows: list[list[str]] = []
    for vector in (BASE, *adapted):
        found = [
            mean_retrieval(adaptation.embeddings_of(run.folder, vector, [draw])) for run, draw in zip(runs, draws, strict=True)
        ]
        rows.append([vector, f"{np.mean(found):.4f}", f"{min(found):.4f} .. {max(found):.4f}"])
    return markdown_table(["vectors", "retrieval@1", "range over draws"], rows, f"Image and text, {len(draws)} draws")


def levels(ndcg: Ndcg, adapted: Sequence[str]) -> str:
    """Markdown table: the level of both kinds of vectors of each pair, their difference, and its relative size."""
    rows: list[list[str]] = []
    for first, second in pairs(adapted):
        one, other = (float(np.mean([draw_U.mean() for draw_U in ndcg[vector]])) for vector in (first, second))
        gain = over_draws(means(ndcg, first, second))
        rows.append([f"{first} - {second}", f"{one:.4f}", f"{other:.4f}", interval_cell(gain), f"{gain[0] / other:+.1%}"])
    users = sum(len(draw_U) for draw_U in ndcg[ID])
    heads = ["difference", "first", "second", f"NDCG@{CUTOFF} [95 % over draws]", "relative"]
    return markdown_table(heads, rows, f"Nearest items, {len(ndcg[ID])} draws, {users:,} users")


def by_draw(ndcg: Ndcg, draws: Sequence[int], adapted: Sequence[str]) -> str:
    """Markdown table: the mean difference of each pair in each draw."""
    compared = pairs(adapted)
    columns = [means(ndcg, *pair) for pair in compared]
    rows = [[str(draw), *(f"{column[place]:+.4f}" for column in columns)] for place, draw in enumerate(draws)]
    return markdown_table(["draw", *(f"{first} - {second}" for first, second in compared)], rows, "Mean difference by draw")


def plotted(ndcg: Ndcg, adapted: Sequence[str]) -> Panels:
    """The differences for a plot: a panel next to ids and one alone, a line for each pair."""
    panels: Panels = {"nearest items, next to ids": {}, "nearest items, vectors alone": {}}
    for first, second in pairs(adapted):
        panel = panels["nearest items, next to ids" if first.startswith(IDS) else "nearest items, vectors alone"]
        panel[f"{first} - {second}"] = over_draws(means(ndcg, first, second))
    return panels
