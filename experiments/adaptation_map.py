"""Measure where adaptation pays on a grid of built-in shops.

A cell of the grid is a shop.  One axis is the share of the taste in attributes that image and text both show (--shared); the
rest is divided equally between attributes of the image alone and of the text alone.  The other axis is the completeness of the
texts (--completeness, which is dataset.text_completeness).  In each cell adapted vectors are compared with those of the
backbone without an adapter (zero_shot) and with its text vectors (text_only):

    python -m experiments adaptation_map --name nano2 --seeds 1,2,3
    python -m experiments adaptation_map --name nano_lvlm --backbone nano_lvlm=conf/backbone/nano_lvlm.yaml --max-minutes 120

==============  =====================================================================================================
sda, infonce    MoDA with soft targets (CMSA) and with hard targets
lora            LoRA with hard targets; lora_cmsa: with soft targets
X+base          adapted vectors X joined with those of zero_shot, as by export_embeddings.with_base
mismatched      the negative control: sda, trained on images with the texts of other items; only in the cell with the
                most shared taste and the least complete texts
==============  =====================================================================================================

Every cell also has id, oracle, zero_shot and text_only.  A cell is read only if the true attributes (oracle) are clear of
learned ids; otherwise the recommender cannot show a gain there.  Adaptation *pays* in a cell if adapted vectors are clear of
zero_shot and of text_only, by 95 % intervals over users and seeds.  A cell is one draw of a shop, and the intervals do not
include the variation between draws.

Seed s trains adapter s and recommender s.  Cells of one completeness have the same raw items and differ only in the purchases,
so they share their adapters: each adapter is trained once, on the items of the cell with the most shared taste.  (The k-core of
another cell may contain items that this cell drops; they are new to the adapter.)  --own-adapters trains adapters in each cell.

The first seed is trained in the whole grid before the next one.  The order of the cells is: the corner of most shared taste and
least complete texts, the opposite corner, the other corners, the centre, the rest.  Existing results are kept.  No training
starts after --max-minutes; 0 only writes the tables.  A comparison is in the tables once all --seeds are complete, and shown as
missing before.  `--seeds 1 --max-minutes 0` shows the results of the first seed.

The figures are known before an adapter is trained: the measurements of `sda check-adapter` on the backbone's vectors, text_only
minus zero_shot on the validation targets, the share of items without an image, and the length of the texts.  For each of them a
table shows Spearman's rank correlation with the gain over the cells.

The adapters are those of conf/adaptation/strong.yaml unless --compose changes them.  Projects and positions are kept below
experiments/runs/adaptation_map/NAME; tables and heat map are written to experiments/results/adaptation_map-NAME.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments import adaptation
from experiments.families import read_backbones
from experiments.options import THREE_SEEDS, Name, Recommenders, Root, Seeds
from experiments.oracles import Cell, Completeness, Shares, plot_maps, values_of
from experiments.study import (
    CUTOFF,
    Interval,
    best_validation,
    check_names,
    interval_cell,
    is_complete,
    markdown_table,
    mean_and_interval,
    minus,
    positions_path,
    rank_correlation,
    write_results,
)
from experiments.workspaces import BASE, VARIANTS, link
from sda_core.artifacts import Workspace, read_json
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.item_source import item_source
from sda_core.params import Params

GRID = Names(("0.2", "0.6", "1.0"))
IN_EVERY_CELL = ("id", "oracle", BASE, "text_only")
REFERENCES = (BASE, "text_only")
ROOM = (("oracle", "sda"), ("sda", "id"), (BASE, "id"), (BASE, "text_only"))
"""Pairs that say whether there is room for a gain over ``sda``, and what it is a gain over."""
CONTROL = adaptation.MISMATCHED
CHECKED = adaptation.CHECKED  # its check before step 0 gives the figures
ADAPTED = (*VARIANTS, *(f"{variant}+base" for variant in VARIANTS))
FEWEST_CELLS = 5  # for a rank correlation
MISSING = "missing"
AXES = ("shared taste", "completeness")

CHECK_FIGURES = {
    "image_cosine_before": "cosine of two images",
    "text_cosine_before": "of two texts",
    "own_pair_gap_before": "own pair minus others",
    "effective_targets_before": "effective targets",
    "retrieval@1_before": "retrieval@1 in a batch",
}
TEXTS_ALONE = f"text_only - {BASE}, validation"
WITHOUT_IMAGE = "items without image"
CHARACTERS = "characters of a text"
FIGURES = (*CHECK_FIGURES.values(), TEXTS_ALONE, WITHOUT_IMAGE, CHARACTERS)

Vectors = Annotated[
    Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="Adapted vectors, in the order of training.")
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME=FILE", help="Backbone; default: that of conf/config.yaml.", show_default=False),
]
OwnAdapters = Annotated[
    bool, typer.Option("--own-adapters/--shared-adapters", help="Train adapters in every cell, or once for each completeness.")
]


@dataclass(frozen=True)
class Place:
    """A cell of the map and its folder, which contains the shop and a project for each seed.

    Attributes:
        cell: the shop's place on the grid.
        folder: the folder of the cell.
        params: the params of all its projects.
        has_control: whether the negative control is trained in this cell.
        lender: the cell in which the adapters of this one are trained; None if this cell trains them.
    """

    cell: Cell
    folder: Path
    params: Params
    has_control: bool = False
    lender: Place | None = None

    @property
    def shop(self) -> Workspace:
        """The project with the data that all seeds share."""
        return Workspace(self.folder / "shop")

    @property
    def labels(self) -> list[str]:
        """The coordinates on the map: share of the taste, completeness of the texts."""
        return [f"{self.cell.shared:g}", f"{self.cell.completeness:g}"]

    def positions(self, recommender: str, vector: str) -> Path:
        """The folder with the positions of all seeds."""
        return adaptation.positions(self.folder, recommender, vector)

    def workspaces(self, seeds: Sequence[int]) -> list[Workspace]:
        """The seeds' projects with the adapters and embeddings, except those of the control."""
        return [Workspace(self.folder / f"seed-{seed}") for seed in seeds]


def main(
    name: Name,
    recommenders: Recommenders = Names(("sasrec",)),
    vectors: Vectors = Names(("sda", "sda+base", "lora", "infonce", CONTROL)),
    backbone: Backbone = None,
    shared: Shares = GRID,
    completeness: Completeness = GRID,
    composed: adaptation.Composed = None,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    max_minutes: adaptation.MaxMinutes = None,
    own_adapters: OwnAdapters = False,
) -> None:
    """Train what is missing; write the tables and the heat map."""
    check_names("--vectors", vectors, [*ADAPTED, CONTROL])
    cells = [Cell(*values) for values in product(values_of("--shared", shared), values_of("--completeness", completeness))]
    order = in_order(cells)
    places = {cell: _place(root, name, cell, composed or [], backbone) for cell in cells}
    if not own_adapters:
        places = with_lenders(places)
    if CONTROL in vectors:
        places[order[0]] = replace(places[order[0]], has_control=True)
    adapted = [vector for vector in dict.fromkeys(vectors) if vector != CONTROL]
    for recommender in recommenders:
        adaptation.check_recommender(places[order[0]].params, recommender, adapted)
    train([places[cell] for cell in order], recommenders, [*IN_EVERY_CELL, *adapted], seeds, max_minutes)
    tables, maps = [alignment(list(places.values()), adapted, seeds)], {}
    for recommender in recommenders:
        on_map = {cell: measure(place, adapted, recommender, seeds) for cell, place in places.items()}
        maps[recommender] = list(on_map.values())
        title = f"{recommender}, {len(seeds)} seeds"
        tables += [levels(maps[recommender], adapted, title), gains(maps[recommender], adapted, title)]
        tables += [room(maps[recommender], title)]
        tables += [contrast([on_map[cell] for cell in order[:2]], adapted, title)]
        tables += [figures(maps[recommender], title), foretold(maps[recommender], adapted, title)]
    results = write_results("\n".join(filter(None, tables)), "adaptation_map", name, root)
    for recommender, measured in maps.items():
        plot(results / f"{'plot' if recommender == recommenders[0] else recommender}.png", measured, adapted, recommender)


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in the order of training.

    First the corner of most shared taste and least complete texts, then the opposite one, the other corners, the centre, and
    the rest as given.
    """
    shares, complete = (sorted(set(axis)) for axis in zip(*((_axis(cell)) for cell in cells), strict=True))
    middle = shares[len(shares) // 2], complete[len(complete) // 2]
    corners = [(shares[-1], complete[0]), (shares[0], complete[-1]), (shares[-1], complete[-1]), (shares[0], complete[0])]
    return list(dict.fromkeys([*(Cell(*values) for values in (*corners, middle)), *cells]))


def with_lenders(places: Mapping[Cell, Place]) -> dict[Cell, Place]:
    """The places; the one with the most shared taste lends its adapters to the others of its completeness."""
    most = max(_axis(cell)[0] for cell in places)
    lenders = {_axis(cell)[1]: place for cell, place in places.items() if _axis(cell)[0] == most}
    return {
        cell: place if _axis(cell)[0] == most else replace(place, lender=lenders[_axis(cell)[1]])
        for cell, place in places.items()
    }


def _axis(cell: Cell) -> tuple[float, float]:
    """The coordinates of a cell, which are always given in this experiment."""
    assert cell.shared is not None, cell
    assert cell.completeness is not None, cell
    return cell.shared, cell.completeness


def _place(root: Path, name: str, cell: Cell, composed: Sequence[str], backbone: str | None) -> Place:
    """A cell with its folder and params; only the params are written."""
    folder = root / "experiments" / "runs" / "adaptation_map" / name / cell.name
    given = [] if any(each.startswith("adaptation=") for each in composed) else ["adaptation=strong"]
    sections = {} if backbone is None else read_backbones([backbone])
    changes = [f"backbone={json.dumps(dict(section))}" for section in sections.values()]  # JSON is YAML
    wanted = [*given, *composed, *cell.changes()]
    params = adaptation.compose(Workspace(folder / "shop"), (root / "conf").resolve(), wanted, changes)
    return Place(cell, folder, params)


# ------------------------------------------------------------------------------------------------- training
def train(
    places: Sequence[Place],
    recommenders: Sequence[str],
    vectors: Sequence[str],
    seeds: Sequence[int],
    max_minutes: float | None,
) -> None:
    """Train what is missing: a seed in all cells before the next seed, in each cell one kind of vectors after the other.

    Args:
        places: the cells, in the order of training.
        recommenders: names; all are trained on a kind of vectors before the next kind.
        vectors: kinds of vectors, in the order of training.
        seeds: seeds of the adapters and recommenders.
        max_minutes: time after which no training starts; None for no limit.
    """
    adaptation.run_jobs(
        (
            (
                f"cell {place.cell.name}, seed {seed}",
                [job(place, vector, recommenders, seed) for vector in (*vectors, *([CONTROL] if place.has_control else []))],
            )
            for seed, place in product(seeds, places)
        ),
        max_minutes,
    )


def job(place: Place, vector: str, recommenders: Sequence[str], seed: int) -> adaptation.Job:
    """The training of the recommenders on one kind of vectors with one seed."""
    wanted = [positions_path(place.positions(recommender, vector), seed) for recommender in recommenders]
    return adaptation.Job(wanted, partial(train_vector, place, vector, recommenders, seed))


def train_vector(place: Place, vector: str, recommenders: Sequence[str], seed: int) -> None:
    """Make one kind of vectors with one seed, and train the recommenders on them."""
    adaptation.run_data_stages(place.shop)
    if place.lender is not None and vector != CONTROL:
        borrow(place, place.lender, adaptation.source_of(vector), seed)
    adaptation.train_vector(place.shop, place.folder, vector, recommenders, seed)


def borrow(place: Place, lender: Place, variant: str, seed: int) -> None:
    """Link the adapter of another cell with the same seed, which is trained there if it is missing.

    Vectors without an adapter are skipped.

    Raises:
        ConfigError: this cell has an adapter that was trained in it.
    """
    if variant in VARIANTS:
        adaptation.run_data_stages(lender.shop)
        trained = adaptation.workspace_of_seed(lender.shop, lender.folder, variant, seed).adapter(variant)
        own = Workspace(place.folder / f"seed-{seed}").adapter(variant)
        if own.exists() and not own.is_symlink():
            raise ConfigError("--name", f"{own} was trained with --own-adapters", "give --own-adapters again, or another name")
        link(own, trained)


# ------------------------------------------------------------------------------------------------- numbers
@dataclass(frozen=True)
class Measured:
    """The measurements of a cell.

    Attributes:
        place: the cell.
        levels: mean NDCG@10 over users and seeds, by kind of vectors; only those whose seeds are complete.
        differences: differences between pairs of these, with their 95 % intervals.
        num_users: number of users whose targets are ranked; 0 if nothing is complete.
        figures: values by name in :data:`FIGURES`; only those that are known.
    """

    place: Place
    levels: Mapping[str, float]
    differences: Mapping[tuple[str, str], Interval]
    num_users: int
    figures: Mapping[str, float]

    @property
    def is_read(self) -> bool | None:
        """Whether the true attributes are clear of learned ids; None if one of them is missing."""
        interval = self.differences.get(("oracle", "id"))
        return None if interval is None else interval[1] > 0.0

    def pays(self, vector: str) -> bool | None:
        """Whether vectors are clear of both references; None if a difference is missing."""
        intervals = [self.differences.get((vector, reference)) for reference in REFERENCES]
        known = [interval[1] > 0.0 for interval in intervals if interval is not None]
        return all(known) if len(known) == len(REFERENCES) else None

    def verdict(self, adapted: Sequence[str]) -> str:
        """The cell of a table that lists the vectors that pay."""
        if not self.is_read:
            return MISSING if self.is_read is None else "not read"
        found = {vector: self.pays(vector) for vector in adapted}
        paying = [vector for vector, pays in found.items() if pays]
        missing = [vector for vector, pays in found.items() if pays is None]
        return ", ".join(paying or ["none"]) + (f" ({', '.join(missing)} {MISSING})" if missing else "")


def measure(place: Place, adapted: Sequence[str], recommender: str, seeds: Sequence[int]) -> Measured:
    """Measure the vectors whose seeds are complete in a cell."""
    wanted = [*IN_EVERY_CELL, *adapted, CONTROL]
    done = [vector for vector in wanted if is_complete(place.positions(recommender, vector), seeds)]
    ndcg: dict[str, np.ndarray] = {}
    if done:
        groups = adaptation.measure(place.shop, place.params, place.folder, recommender, done, seeds)
        ndcg = {vector: ndcg_SU for vector, (ndcg_SU, _) in next(iter(groups.values())).items()}
    pairs = [("oracle", "id"), *ROOM, *product([*adapted, CONTROL], REFERENCES)]
    differences = {
        (one, other): mean_and_interval(ndcg[one] - ndcg[other], place.params.evaluate, f"{one} - {other}")
        for one, other in pairs
        if ndcg.keys() >= {one, other}
    }
    levels = {vector: float(ndcg_SU.mean()) for vector, ndcg_SU in ndcg.items()}
    num_users = next(iter(ndcg.values())).shape[1] if ndcg else 0
    return Measured(place, levels, differences, num_users, figures_of(place, recommender, done, seeds))


def figures_of(place: Place, recommender: str, done: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """The figures of a cell that are known.

    Those of the check are means over the seeds, because each seed draws a sample for it.

    Args:
        place: the cell.
        recommender: name of the recommender that ranks the validation targets.
        done: the kinds of vectors whose seeds are complete.
        seeds: seeds of the trainings.
    """
    found: dict[str, float] = {}
    paths = [workspace.adapter(CHECKED) / "check.json" for workspace in place.workspaces(seeds)]
    if all(path.exists() for path in paths):
        checks = [read_json(path, "the check of an adapter") for path in paths]
        found = {shown: float(np.mean([check[key] for check in checks])) for key, shown in CHECK_FIGURES.items()}
    if {*REFERENCES} <= {*done}:
        base, texts = (best_validation(place.positions(recommender, vector), seeds) for vector in REFERENCES)
        found[TEXTS_ALONE] = texts - base
    if place.shop.images.exists():
        source = item_source(place.shop, place.params.items)
        found[WITHOUT_IMAGE] = 1.0 - float(source.has_image.mean())
        found[CHARACTERS] = float(np.mean([len(text) for text in source.texts(np.arange(len(source)))]))
    return found


# ------------------------------------------------------------------------------------------------- results
def alignment(places: Sequence[Place], adapted: Sequence[str], seeds: Sequence[int]) -> str:
    """The table of retrieval@1 in each cell, which shows whether the adapters aligned image and text."""
    variants = [*dict.fromkeys(adaptation.source_of(vector) for vector in (BASE, *adapted)), CONTROL]
    rows: list[list[str]] = []
    for place in places:
        rows.append(list(place.labels))
        for variant in variants:
            rows[-1].append(adaptation.mean_alignment(place.folder, variant, seeds) or _missing(place, variant))
    title = f"Retrieval@1 of image and text without their means, at most 2,000 items, {len(seeds)} seeds"
    return markdown_table([*AXES, *variants], rows, title)


def _missing(place: Place, vector: str) -> str:
    """The text for a missing number; empty for the control, except in its one cell."""
    return "" if vector == CONTROL and not place.has_control else MISSING


def levels(on_map: Sequence[Measured], adapted: Sequence[str], title: str) -> str:
    """The table of NDCG@10: a row for each cell, with the gain of the true attributes over ids and the vectors that pay."""
    rows: list[list[str]] = []
    for one in on_map:
        oracle = one.differences.get(("oracle", "id"))
        shown = {vector: f"{value:.4f}" for vector, value in one.levels.items()}
        row = [*one.place.labels, str(one.num_users or MISSING), shown.get("id", MISSING)]
        row.append(MISSING if oracle is None else interval_cell(oracle))
        rows.append([*row, *(shown.get(vector, MISSING) for vector in (*REFERENCES, *adapted)), one.verdict(adapted)])
    heads = [*AXES, "users", "id", "oracle - id", *REFERENCES, *adapted, "adaptation pays"]
    return markdown_table(heads, rows, f"NDCG@{CUTOFF} of {title}")


def gains(on_map: Sequence[Measured], adapted: Sequence[str], title: str) -> str:
    """The table of gains: two rows for each cell, over zero_shot and over text_only."""
    vectors, rows = [*adapted, CONTROL], []
    for one, reference in product(on_map, REFERENCES):
        found = {vector: one.differences.get((vector, reference)) for vector in vectors}
        cells = [_missing(one.place, vector) if gain is None else interval_cell(gain) for vector, gain in found.items()]
        rows.append([*one.place.labels, reference, *cells])
    return markdown_table([*AXES, "minus", *vectors], rows, f"Gain in NDCG@{CUTOFF} [95 %], {title}")


def room(on_map: Sequence[Measured], title: str) -> str:
    """The table of :data:`ROOM`, one row for each cell."""
    rows = [
        [*one.place.labels, *(interval_cell(one.differences[pair]) if pair in one.differences else MISSING for pair in ROOM)]
        for one in on_map
    ]
    return markdown_table([*AXES, *map(" - ".join, ROOM)], rows, f"Room for a gain in NDCG@{CUTOFF} [95 %], {title}")


def contrast(ends: Sequence[Measured], adapted: Sequence[str], title: str) -> str:
    """The table of gains in two opposite corners of the map, and their difference.

    It answers whether the gain is larger if taste is shared and texts are incomplete.

    Args:
        ends: the two corners; a map of one cell has one, and the table is empty.
        adapted: the kinds of vectors.
        title: name of the recommender and number of seeds.
    """
    if len(ends) < 2:
        return ""
    first, last = ends
    rows: list[list[str]] = []
    for vector, reference in product(adapted, REFERENCES):
        pair = [end.differences.get((vector, reference)) for end in ends]
        known = [interval for interval in pair if interval is not None]
        cells = [MISSING if interval is None else interval_cell(interval) for interval in pair]
        rows.append([f"{vector} - {reference}", *cells, interval_cell(minus(*known)) if len(known) == 2 else MISSING])
    names_ = [f"shared {share}, completeness {text}" for share, text in (first.place.labels, last.place.labels)]
    return markdown_table(["gain", *names_, "difference"], rows, f"Two opposite corners, {title}")


def figures(on_map: Sequence[Measured], title: str) -> str:
    """The table of figures: a row for each cell, with the gain and the figures known before an adapter is trained."""
    pairs = [(CHECKED, reference) for reference in REFERENCES]
    rows: list[list[str]] = []
    for one in on_map:
        means = [one.differences[pair][0] if pair in one.differences else None for pair in pairs]
        rows.append([*one.place.labels, *(MISSING if mean is None else f"{mean:+.4f}" for mean in means)])
        rows[-1] += [f"{one.figures[name]:.4g}" if name in one.figures else MISSING for name in FIGURES]
    return markdown_table([*AXES, *map(" - ".join, pairs), *FIGURES], rows, f"Figures of each cell, {title}")


def foretold(on_map: Sequence[Measured], adapted: Sequence[str], title: str) -> str:
    """The table of Spearman's rank correlations between a figure and a gain, over the cells that are read."""
    pairs = list(product(adapted, REFERENCES))
    rows: list[list[str]] = []
    for name in FIGURES:
        rows.append([name])
        for pair in pairs:
            cells = [one for one in on_map if one.is_read and pair in one.differences and name in one.figures]
            if len(cells) < FEWEST_CELLS:
                rows[-1].append(f"{len(cells)} cells")
                continue
            rho, p = rank_correlation([one.figures[name] for one in cells], [one.differences[pair][0] for one in cells])
            rows[-1].append("all equal" if math.isnan(rho) else f"{rho:+.2f} (p {p:.3f}, {len(cells)} cells)")
    heads = ["figure", *map(" - ".join, pairs)]
    return markdown_table(heads, rows, f"Rank correlation of figure and gain over cells, {title}")


def plot(path: Path, on_map: Sequence[Measured], adapted: Sequence[str], recommender: str) -> None:
    """Plot a heat map for each gain, a row for each reference; cells that are not read are in brackets."""
    maps = {
        f"{vector} - {reference}": {one.place.cell: one.differences.get((vector, reference)) for one in on_map}
        for reference, vector in product(REFERENCES, adapted)
    }
    bracketed = [one.place.cell for one in on_map if one.is_read is False]
    plot_maps(path, maps, f"gain in NDCG@{CUTOFF}, {recommender}", columns=len(adapted), bracketed=bracketed)
