"""Compare frozen embeddings of several backbones as item vectors.

The data is one shop, or several draws of the built-in shop.  No adapter is trained.  Each backbone encodes all items once, and
the recommenders rank the test targets by its vectors, alone and next to ids.  The first backbone is the reference:

    python -m experiments frozen_backbones --name hm --backbone nano=conf/backbone/nano.yaml \\
        --backbone nano2=conf/backbone/nano2.yaml --compose dataset=hm --compose dataset.local_folder=FOLDER

The data set is a preset of conf/dataset, with changes in the syntax of `dvc exp run -S`.  On one shop the intervals are over
users and seeds of the recommender.  --shop-seeds draws the built-in shop several times, each with another dataset.seed.  Then
the intervals are Student's t over the draws' means, so they include the variation between draws:

    python -m experiments frozen_backbones --name draws --backbone nano=conf/backbone/nano.yaml \\
        --backbone nano2=conf/backbone/nano2.yaml --shop-seeds 201,202,203,204

==================  =================================================================================================
id                  ids alone, which is the same for all backbones
zero_shot           image and text vectors, fused as by export_embeddings
text_only           the text vectors of zero_shot; image_only: its image vectors
other_images        control: the text vectors joined with the image vectors of other items
id+X                vectors X next to ids; see `python -m experiments adaptation --help`
==================  =================================================================================================

Projects and positions are kept below experiments/runs/frozen_backbones/NAME, so a stopped run resumes.  Tables and plot are
written to experiments/results/frozen_backbones-NAME.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from experiments import adaptation
from experiments.adaptation import CONTROLS, IDS, OTHER_IMAGES, Composed
from experiments.families import read_backbones
from experiments.options import THREE_SEEDS, Name, Recommenders, Root, Seeds
from experiments.oracles import ShopSeeds, different_draws, over_draws
from experiments.study import (
    CUTOFF,
    Interval,
    Panels,
    check_names,
    interval_cell,
    keep_positions,
    keep_settings,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    positions_path,
    read_gains,
    write_results,
)
from experiments.workspaces import BASE, prepare
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.params import DemoDataset, Params, load_params
from sda_core.traits import seeds_of

ID = "id"
FROZEN = (BASE, *CONTROLS, OTHER_IMAGES)
KNOWN = (ID, *FROZEN, *(f"{IDS}{vector}" for vector in FROZEN))
FIRST = Names((ID, BASE, "text_only", "image_only", OTHER_IMAGES, f"{IDS}{BASE}", f"{IDS}text_only", f"{IDS}{OTHER_IMAGES}"))

Vectors = Annotated[Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="Frozen vectors; id is always added.")]
Backbones = Annotated[
    list[str],
    typer.Option("--backbone", metavar="NAME=FILE", help="A backbone's section, as in conf/backbone.  Give two or more."),
]


@dataclass(frozen=True)
class Draw:
    """One shop.

    Attributes:
        label: its name in the tables.
        folder: the folder of its projects.
        params: the params of its data.
    """

    label: str
    folder: Path
    params: Params

    @property
    def shop(self) -> Workspace:
        """The project with the data that all backbones share."""
        return Workspace(self.folder / "shop")

    def project(self, backbone: str) -> Workspace:
        """The project with a backbone's embeddings."""
        return Workspace(self.folder / "backbones" / backbone)

    def positions(self, backbone: str, recommender: str, vector: str) -> Path:
        """The folder with the positions of all seeds; ``id`` does not depend on the backbone."""
        owner = self.shop.root if vector == ID else self.project(backbone).root
        return owner / "positions" / recommender / vector


def main(
    name: Name,
    backbones: Backbones,
    recommenders: Recommenders = Names(("nearest",)),
    vectors: Vectors = FIRST,
    composed: Composed = None,
    shop_seeds: ShopSeeds = None,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Encode the items with every backbone, rank the targets, and write tables and plot."""
    check_names("--vectors", vectors, KNOWN)
    kinds = list(dict.fromkeys((ID, *vectors)))
    sections = read_backbones(backbones)
    if len(sections) < 2:
        raise ConfigError("--backbone", f"expected two different names or more (got {', '.join(sections)})", "repeat the option")
    drawn: list[int | None] = [None] if shop_seeds is None else [*different_draws(shop_seeds)]
    folder = root / "experiments" / "runs" / "frozen_backbones" / name
    presets = adaptation.compose(Workspace(folder / "presets"), (root / "conf").resolve(), composed or [])
    if shop_seeds is not None and not isinstance(presets.dataset, DemoDataset):
        raise ConfigError("--shop-seeds", "only the built-in shop can be drawn again", "leave it out, or use dataset=demo")
    draws = [make_draw(folder, root, composed or [], seed) for seed in drawn]
    for recommender in recommenders:
        adaptation.check_recommender(draws[0].params, recommender, [vector for vector in kinds if vector != ID])
    for draw in draws:
        for backbone, section in sections.items():
            encode(draw, backbone, section)
            for recommender in recommenders:
                for vector in kinds:
                    rank(draw, backbone, recommender, vector, seeds)
    tables, panels = [], {}
    for recommender in recommenders:
        measured = {vector: read(draws, list(sections), recommender, vector, seeds) for vector in kinds}
        tables += [levels(draws, measured, recommender), *([] if shop_seeds is None else [by_draw(draws, measured, recommender)])]
        panels |= plotted(draws, measured, recommender)
    results = write_results("\n".join(tables), "frozen_backbones", name, root)
    plot_intervals(results / "plot.png", panels, f"NDCG@{CUTOFF} minus that of the first backbone", zero=True)


def make_draw(folder: Path, root: Path, composed: Sequence[str], seed: int | None) -> Draw:
    """Run the data stages of a shop, unless this was done.

    Args:
        folder: the folder of the experiment.
        root: the project folder with ``conf``.
        composed: ``KEY=VALUE``, in the syntax of ``dvc exp run -S``.
        seed: ``dataset.seed``; None for the shop of the presets.

    Raises:
        ConfigError: a value is wrong, or the folder has other params.
        ArtifactError: a stage failed.
    """
    own = folder / ("shop" if seed is None else f"draw-{seed}")
    wanted = [*composed, *([] if seed is None else [f"dataset.seed={seed}"])]
    params = adaptation.make_shop(Workspace(own / "shop"), (root / "conf").resolve(), wanted)
    return Draw("the shop" if seed is None else str(seed), own, params)


def encode(draw: Draw, backbone: str, section: Mapping[str, Any]) -> None:
    """Make a backbone's project with the embeddings of all items, unless it exists.

    Raises:
        ConfigError: the project was made with another backbone.
    """
    project = draw.project(backbone)
    keep_settings(project.root / "settings.json", {"backbone": dict(section)})
    kept = project.root / "kept" / f"{BASE}.parquet"
    kept.parent.mkdir(parents=True, exist_ok=True)
    prepare(project, draw.shop.root.resolve(), kept, 0, [], [f"backbone={json.dumps(dict(section))}"])  # JSON is YAML


def rank(draw: Draw, backbone: str, recommender: str, vector: str, seeds: Sequence[int]) -> None:
    """Train a recommender with every seed on a backbone's vectors, as the pipeline uses it, unless its positions exist."""
    project = draw.project(backbone)
    params = load_params(project.root / "params.yaml")
    section = adaptation.as_in_the_pipeline(params.train_recommender.of(recommender), vector)
    place = draw.positions(backbone, recommender, vector)
    for seed in seeds_of(section, seeds):
        if not positions_path(place, seed).exists():
            keep_positions(project, params, section, seed, place, vectors=adaptation.matrix(project, params, vector))


# ------------------------------------------------------------------------------------------------- results
Measured = Mapping[str, Mapping[str, Sequence[np.ndarray]]]  # by vectors, by backbone: NDCG (S, U) of each draw


def read(
    draws: Sequence[Draw], backbones: Sequence[str], recommender: str, vector: str, seeds: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """NDCG@10 ``(S, U)`` by backbone and draw."""
    section = draws[0].params.train_recommender.of(recommender)
    return {
        backbone: [read_gains("ndcg", draw.positions(backbone, recommender, vector), seeds_of(section, seeds)) for draw in draws]
        for backbone in backbones
    }


def compared(draws: Sequence[Draw], one: Sequence[np.ndarray], other: Sequence[np.ndarray], purpose: str) -> Interval:
    """The mean difference with its interval: over draws, or over users and seeds if there is one draw."""
    gains = [one_SU - other_SU for one_SU, other_SU in zip(one, other, strict=True)]
    if len(draws) > 1:
        return over_draws([float(gain_SU.mean()) for gain_SU in gains])
    return mean_and_interval(gains[0], draws[0].params.evaluate, purpose)


def levels(draws: Sequence[Draw], measured: Measured, recommender: str) -> str:
    """Markdown table: a row for each kind of vectors and backbone, with the level, and its differences."""
    rows: list[list[str]] = []
    for vector, of_backbone in measured.items():
        first = next(iter(of_backbone))
        for backbone, ndcg in of_backbone.items():
            if vector == ID and backbone != first:
                continue
            row = [vector, "" if vector == ID else backbone, f"{np.mean([draw_SU.mean() for draw_SU in ndcg]):.4f}"]
            against_first = compared(draws, ndcg, of_backbone[first], f"{vector}, {backbone}")
            against_ids = compared(draws, ndcg, measured[ID][backbone], f"{vector}, {backbone}, {ID}")
            row += ["" if backbone == first else interval_cell(against_first), "" if vector == ID else interval_cell(against_ids)]
            rows.append(row)
    first = next(iter(measured[ID]))
    heads = ["vectors", "backbone", f"NDCG@{CUTOFF}", f"minus {first} [95 %]", f"minus {ID} [95 %]"]
    where = "one shop" if len(draws) == 1 else f"{len(draws)} draws"
    return markdown_table(heads, rows, f"{recommender}, full rank, {where}")


def by_draw(draws: Sequence[Draw], measured: Measured, recommender: str) -> str:
    """Markdown table: a row for each draw, with the difference from the first backbone of each kind of vectors."""
    others = [(vector, backbone) for vector, of in measured.items() if vector != ID for backbone in list(of)[1:]]
    rows: list[list[str]] = []
    for place, draw in enumerate(draws):
        row = [draw.label]
        for vector, backbone in others:
            ndcg = measured[vector]
            gain_SU = ndcg[backbone][place] - next(iter(ndcg.values()))[place]
            row.append(interval_cell(mean_and_interval(gain_SU, draw.params.evaluate, f"{vector}, {backbone}")))
        rows.append(row)
    first = next(iter(measured[ID]))
    heads = ["draw", *(f"{vector}: {backbone}" for vector, backbone in others)]
    return markdown_table(heads, rows, f"{recommender}, NDCG@{CUTOFF} minus {first} by draw, intervals over users and seeds")


def plotted(draws: Sequence[Draw], measured: Measured, recommender: str) -> Panels:
    """The differences from the first backbone: a panel for each recommender and backbone, a line for each kind of vectors."""
    panels: Panels = {}
    first, *others = next(iter(measured.values()))
    for backbone in others:
        panels[f"{recommender}: {backbone} - {first}"] = {
            vector: compared(draws, of[backbone], of[first], f"{vector}, {backbone}")
            for vector, of in measured.items()
            if vector != ID
        }
    return panels
