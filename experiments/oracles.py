"""Measure upper bounds: the true attributes of the built-in shop as item vectors.

The experiment answers two questions.

* Can a recommender use item vectors at all?  In the shop of the project's params.yaml `oracle` has to beat `id`; otherwise
  results with this recommender say nothing about vectors:

    python -m experiments oracles --name controls --recommenders sasrec,bert4rec,vbpr,slmrec --variants id,random,oracle

* Does every setting of the shop have the effect that it describes?  Each cell of the grid is one shop.  --shared is the share
  of the taste for attributes that both image and text show; the rest is divided equally between the attributes that only the
  image and only the text shows.  --completeness is dataset.text_completeness:

    python -m experiments oracles --name grid --shared 0.2,0.6,1.0 --completeness 0.2,0.6,1.0 --recommenders sasrec

One shop is one random draw of items, tastes and purchases.  --shop-seeds draws the shop several times, each with another
dataset.seed, and adds a row with the mean over the draws.  Its 95 % interval is Student's t over the draws' means, so it
includes the variation between draws, users and training seeds:

    python -m experiments oracles --name draws --shop-seeds 101,102,103,104,105 --recommenders slmrec --variants id,random,oracle

The experiment uses neither a backbone nor images.  Each cell is a project folder below experiments/runs/oracles/NAME with its
own raw and filtered data.  Positions are kept there, so a stopped run resumes.  The table and a heat map of the differences from
learned ids are written to experiments/results/oracles-NAME; `sda report --experiments` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer

from experiments.options import THREE_SEEDS, Changes, Name, Recommenders, Root, Seeds, Variants
from experiments.study import (
    CUTOFF,
    Interval,
    Panels,
    check_names,
    difference,
    gains,
    interval_cell,
    logger,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    read_positions,
    write_results,
)
from experiments.study import keep_positions as keep
from experiments.workspaces import NOTHING_TRAINED, own_params, padded, params_file
from sda_core.artifacts import INTERACTIONS, ITEMS, TRUTH, USERS, Workspace, replace_directory, write_json
from sda_core.cli.scripts import Names, Numbers, names, numbers
from sda_core.data.demo import truth_of
from sda_core.data.filtering import filter_dataset
from sda_core.embeddings import controls
from sda_core.errors import ConfigError
from sda_core.evaluation.groups import item_groups
from sda_core.fetch.download import download
from sda_core.fetch.manifest import manifest_file
from sda_core.params import DemoDataset, Oracle, Params, RecommenderParams
from sda_core.recommenders import ItemVectors
from sda_core.traits import takes_modalities

KNOWN = ("id", "random", *get_args(Oracle))
IMAGE_SIDE = 16  # pixels; small because the images are not used

Shares = Annotated[
    Names | None,
    typer.Option(
        "--shared",
        parser=names,
        metavar="0.2,0.6,...",
        help="Shares of the taste for attributes that image and text both show.",
        show_default=False,
    ),
]
Completeness = Annotated[
    Names | None,
    typer.Option(
        "--completeness", parser=names, metavar="0.2,0.6,...", help="Values of dataset.text_completeness.", show_default=False
    ),
]
ShopSeeds = Annotated[
    Numbers | None,
    typer.Option(
        "--shop-seeds",
        parser=numbers,
        metavar="101,102,...",
        help="Values of dataset.seed; the shop is drawn once for each.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Cell:
    """One shop of the grid.

    Attributes:
        shared: share of the taste for attributes that image and text both show; None uses the params.
        completeness: ``dataset.text_completeness``; None uses the params.
        seed: ``dataset.seed`` of a draw; None uses the params.
    """

    shared: float | None
    completeness: float | None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        grid = f"shared-{_plain(self.shared)}-complete-{_plain(self.completeness)}"
        return grid if self.seed is None else f"{grid}-seed-{self.seed}"

    def changes(self) -> list[str]:
        """The changes of the params for this shop, as ``PATH=VALUE``."""
        found: list[str] = []
        if self.shared is not None:
            rest = round((1.0 - self.shared) / 2.0, 6)
            found += [f"dataset.image_share={rest}", f"dataset.text_share={rest}"]
        if self.completeness is not None:
            found.append(f"dataset.text_completeness={self.completeness}")
        if self.seed is not None:
            found.append(f"dataset.seed={self.seed}")
        return found


def _plain(value: float | None) -> str:
    return "default" if value is None else f"{value:g}"


def main(
    name: Name,
    recommenders: Recommenders,
    variants: Variants = Names(KNOWN),
    root: Root = Path(),
    shared: Shares = None,
    completeness: Completeness = None,
    seeds: Seeds = THREE_SEEDS,
    changes: Changes = None,
    shop_seeds: ShopSeeds = None,
) -> None:
    """Train what is missing; write the table, and a heat map or a plot of the draws."""
    check_names("--variants", variants, KNOWN)
    names_ = Names(dict.fromkeys(["id", *variants]))
    folder = root / "experiments" / "runs" / "oracles" / name
    drawn: Sequence[int | None] = [None] if shop_seeds is None else different_draws(shop_seeds)
    grid = product(values_of("--shared", shared), values_of("--completeness", completeness), drawn)
    cells = [Cell(*values) for values in grid]
    common = [*(changes or []), f"dataset.image_side={IMAGE_SIDE}"]
    shops = {cell: prepare(params_file(root), folder / cell.name, [*common, *cell.changes()]) for cell in cells}
    for seed in seeds:  # finish one seed of the whole grid before the next
        for (workspace, params), recommender in product(shops.values(), recommenders):
            for variant in names_:
                train(workspace, params, variant, recommender, seed)
    tables: list[str] = []
    for recommender in recommenders:
        tables += [table(shops, names_, recommender, seeds, group) for group in ("all", "tail", "cold")]
    results = write_results("\n".join(tables), "oracles", name, root)
    if shop_seeds is not None:
        plot_draws(results / "plot.png", shops, names_[1:], recommenders, seeds)
        return
    for recommender in recommenders:
        measured = {variant: differences(shops, variant, recommender, seeds) for variant in names_[1:]}
        path = results / f"{'plot' if recommender == recommenders[0] else recommender}.png"
        plot_maps(path, measured, f"NDCG@{CUTOFF} minus ids, {recommender}")


def different_draws(shop_seeds: Sequence[int]) -> list[int]:
    """The seeds of the draws, each once.

    Raises:
        ConfigError: there are fewer than two.
    """
    draws = list(dict.fromkeys(shop_seeds))
    if len(draws) < 2:
        raise ConfigError("--shop-seeds", "an interval over draws needs two different seeds or more", "e.g. 101,102,103")
    return draws


def values_of(option: str, given: Sequence[str] | None) -> list[float | None]:
    """The values of one axis of the grid; None, which uses the params, if the option was not given.

    Raises:
        ConfigError: a value is not a number.
    """
    if given is None:
        return [None]
    try:
        return [float(text) for text in given]
    except ValueError:
        raise ConfigError(option, f"should be numbers from 0 to 1 with commas between them (got {','.join(given)})") from None


# ------------------------------------------------------------------------------------------------- shops
def prepare(source: Path, root: Path, changes: Sequence[str]) -> tuple[Workspace, Params]:
    """Make the project folder of a shop with its own raw and filtered data, unless it exists.

    Args:
        source: the params file to change.
        root: the project folder of the shop.
        changes: ``PATH=VALUE``.

    Returns:
        The workspace of the shop, and its params.

    Raises:
        ConfigError: the dataset is not the built-in shop, or the folder contains a shop with other params.
    """
    workspace, params = Workspace(root), own_params(source, root, [*changes, *NOTHING_TRAINED])
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError(
            "params.yaml: dataset.source", "the true attributes are known only for the built-in shop", "use dataset=demo"
        )
    make_shop(workspace, params)
    return workspace, params


def make_shop(workspace: Workspace, params: Params) -> None:
    """Write the raw and filtered data of a built-in shop and the true attributes of its items, unless they exist."""
    if workspace.statistics.exists() or not isinstance(params.dataset, DemoDataset):
        return
    logger.info("shop %s", workspace.root.name)
    download(params.dataset, params.download, workspace.raw, workspace.root)
    TRUTH.write(truth_of(params.dataset), workspace.truth)
    reviews, metadata = manifest_file(workspace.raw, "reviews"), manifest_file(workspace.raw, "metadata")
    data = filter_dataset(reviews, metadata, params.dataset.edition, params.filter)
    with replace_directory(workspace.filtered) as folder:
        INTERACTIONS.write(data.interactions, folder / workspace.interactions.name)
        ITEMS.write(data.items, folder / workspace.items.name)
        USERS.write(data.users, folder / workspace.users.name)
        write_json(folder / workspace.statistics.name, data.statistics)


def vectors(workspace: Workspace, params: Params, variant: str, section: RecommenderParams) -> ItemVectors | None:
    """The item vectors that a recommender gets.

    Args:
        workspace: the shop.
        params: its params.
        variant: ``id``, ``random`` or an oracle.
        section: settings of the recommender.

    Returns:
        None for ``id``.  For ``random``, random directions with the width of ``oracle``.  A matrix is ``(I + 1, D)`` with row 0
        zero; recommenders that take the modalities separately get one for ``image`` and one for ``text``.
    """
    if variant == "id":
        return None
    raw_item_ids = ITEMS.read(workspace.items).sort("item_id")["raw_item_id"].to_list()
    seed = params.control_embeddings.seed
    kind = cast("Oracle", "oracle" if variant == "random" else variant)
    made = controls.oracle(kind, workspace, raw_item_ids, seed)
    if variant == "random":
        made = controls.control("random", made, np.arange(1, len(raw_item_ids) + 1), params.export_embeddings, seed)
    if takes_modalities(section):
        return {"image": padded(made.image_ID), "text": padded(made.text_ID)}
    return padded(made.fused_IF)


def positions(workspace: Workspace, recommender: str, variant: str) -> Path:
    """The folder of a shop with the positions of one recommender and variant, for all seeds."""
    return workspace.root / "positions" / recommender / variant


def train(workspace: Workspace, params: Params, variant: str, recommender: str, seed: int) -> None:
    """Train one recommender on the vectors of one variant, unless its positions exist."""
    section = params.train_recommender.of(recommender)
    keep(
        workspace,
        params,
        section,
        seed,
        positions(workspace, recommender, variant),
        vectors=vectors(workspace, params, variant, section),
    )


# ------------------------------------------------------------------------------------------------- results
Shops = Mapping[Cell, tuple[Workspace, Params]]


def _gains(workspace: Workspace, params: Params, variant: str, recommender: str, seeds: Sequence[int], group: str) -> np.ndarray:
    """NDCG@10 ``(S, U)`` by seed and user of a group: ``all``, or the users with a ``tail`` or ``cold`` target."""
    frames = read_positions(positions(workspace, recommender, variant), seeds)
    items = item_groups(INTERACTIONS.read(workspace.interactions), params.evaluate.tail, ITEMS.count(workspace.items))
    target_U = frames[0]["target_item_id"].to_numpy()
    masks = {"all": np.ones(len(target_U), dtype=bool), "tail": items.tail[target_U], "cold": items.cold[target_U]}
    return gains("ndcg", frames, masks[group])


def table(shops: Shops, variants: Sequence[str], recommender: str, seeds: Sequence[int], group: str) -> str:
    """The markdown table of one recommender and group of users, with a row for each shop.

    A row has the NDCG@10 of learned ids, and that of each other variant with its difference from ids.  Several draws of one shop
    are followed by a row with their mean.
    """
    rows: list[list[str]] = []
    for cells in by_place(shops).values():
        measured: list[list[np.ndarray]] = []  # by shop that has such users, by variant
        for cell in cells:
            workspace, params = shops[cell]
            ids_SU, *others = [_gains(workspace, params, variant, recommender, seeds, group) for variant in variants]
            if not ids_SU.size:
                continue
            measured.append([ids_SU, *others])
            row = [*_labels(cell, params), str(ids_SU.shape[1]), f"{ids_SU.mean():.4f}"]
            row += [f"{own_SU.mean():.4f}, {difference(own_SU - ids_SU, params.evaluate, cell.name)}" for own_SU in others]
            rows.append(row)
        if len(measured) > 1:
            rows.append([*_labels(cells[0], shops[cells[0]][1])[:2], f"all {len(measured)}", *_all_draws(measured)])
    draw = ["draw"] if any(cell.seed is not None for cell in shops) else []
    heads = ["shared taste", "completeness", *draw, "users", "id", *(f"{variant}, minus id" for variant in variants[1:])]
    title = f"NDCG@{CUTOFF} of {recommender}, {'all users' if group == 'all' else f'{group} targets'}, {len(seeds)} seeds"
    return markdown_table(heads, rows, title)


def by_place(cells: Iterable[Cell]) -> dict[Cell, list[Cell]]:
    """Group shops by their place on the grid; the draws of one shop have the same place."""
    found: dict[Cell, list[Cell]] = {}
    for cell in cells:
        found.setdefault(replace(cell, seed=None), []).append(cell)
    return found


def _all_draws(measured: Sequence[Sequence[np.ndarray]]) -> list[str]:
    """The cells of a row over all draws of a shop: users, NDCG of ids, NDCG of each other variant and its difference from ids."""
    ids, *others = zip(*measured, strict=True)
    cells = [str(sum(ids_SU.shape[1] for ids_SU in ids)), f"{np.mean([ids_SU.mean() for ids_SU in ids]):.4f}"]
    for own in others:
        gain = over_draws([float((own_SU - ids_SU).mean()) for own_SU, ids_SU in zip(own, ids, strict=True)])
        cells.append(f"{np.mean([own_SU.mean() for own_SU in own]):.4f}, {interval_cell(gain)}")
    return cells


def _labels(cell: Cell, params: Params) -> list[str]:
    """The first cells of a row: the place of a shop on the grid, and the seed of its draw."""
    dataset = cast("DemoDataset", params.dataset)
    shares = [f"{1.0 - dataset.image_share - dataset.text_share:.2g}", f"{dataset.text_completeness:g}"]
    return shares if cell.seed is None else [*shares, str(cell.seed)]


def over_draws(means: Sequence[float]) -> Interval:
    """Mean over draws with its 95 % interval by Student's t.

    The interval is ``m +- t_{0.975, n - 1} * s / sqrt(n)``, with the mean ``m`` and the standard deviation ``s`` of ``n`` means.
    The draws are independent, so the interval includes all that varies between them.

    Args:
        means: one mean for each draw, at least two.

    Returns:
        Mean, lower end, upper end.
    """
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

    count, mean = len(means), float(np.mean(means))
    margin = float(stdtrit(count - 1, 0.975)) * float(np.std(means, ddof=1)) / math.sqrt(count)
    return mean, mean - margin, mean + margin


def plot_draws(path: Path, shops: Shops, variants: Sequence[str], recommenders: Sequence[str], seeds: Sequence[int]) -> None:
    """Plot the differences from ids in NDCG@10: a panel for each recommender and variant, a line for each draw."""
    panels: Panels = {}
    for recommender, variant in product(recommenders, variants):
        measured = differences(shops, variant, recommender, seeds)
        lines = {_line(cell): interval for cell, interval in measured.items()}
        for place, cells in by_place(measured).items():
            lines[_line(place)] = over_draws([measured[cell][0] for cell in cells])
        panels[f"{recommender}: {variant} - id"] = lines
    plot_intervals(path, panels, f"NDCG@{CUTOFF} minus ids", zero=True, columns=len(variants))


def _line(cell: Cell) -> str:
    place = "" if cell.shared is None and cell.completeness is None else f" ({_plain(cell.shared)}, {_plain(cell.completeness)})"
    return ("all draws" if cell.seed is None else f"draw {cell.seed}") + place


def differences(shops: Shops, variant: str, recommender: str, seeds: Sequence[int]) -> dict[Cell, Interval]:
    """The difference of a variant from ids in NDCG@10 over all users, with its interval, by cell."""
    found: dict[Cell, Interval] = {}
    for cell, (workspace, params) in shops.items():
        own_SU, ids_SU = (_gains(workspace, params, name, recommender, seeds, "all") for name in (variant, "id"))
        found[cell] = mean_and_interval(own_SU - ids_SU, params.evaluate, cell.name)
    return found


def plot_maps(
    path: Path,
    measured: Mapping[str, Mapping[Cell, Interval | None]],
    label: str,
    *,
    columns: int = 0,
    bracketed: Collection[Cell] = (),
) -> None:
    """Draw heat maps over the grid; a number is bold if its interval excludes 0.

    Args:
        path: the image file to write; not written if no map has a value.
        measured: the maps by title, all over one grid; None is shown as missing.
        label: label of the colour bar.
        columns: number of maps side by side; 0 for all.
        bracketed: cells whose numbers are shown in brackets.
    """
    from matplotlib import pyplot as plt

    means = [interval[0] for of_cell in measured.values() for interval in of_cell.values() if interval is not None]
    if not means:
        return
    largest = float(max(np.abs(means)))
    cells = list(next(iter(measured.values())))
    shares, complete = (list(dict.fromkeys(values)) for values in zip(*((c.shared, c.completeness) for c in cells), strict=True))
    across = columns or len(measured)
    down = -(-len(measured) // across)
    size = (1.1 * len(complete) * across + 1.6, (0.8 * len(shares) + 0.5) * down + 0.8)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(measured) :]:
        axis.set_visible(False)
    shown: Any = None
    for place, (axis, (title, of_cell)) in enumerate(zip(axes.flat, measured.items(), strict=False)):
        values = np.full((len(shares), len(complete)), np.nan)
        for row, column in np.ndindex(*values.shape):
            cell = Cell(shares[row], complete[column])
            text, colour, weight = "missing", "#888888", "normal"
            if (interval := of_cell[cell]) is not None:
                values[row, column], low, high = interval
                colour = "white" if abs(interval[0]) > 0.6 * largest else "black"
                weight = "bold" if low > 0 or high < 0 else "normal"
                text = f"({interval[0]:+.4f})" if cell in bracketed else f"{interval[0]:+.4f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour, fontweight=weight)
        shown = axis.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        is_first = place % across == 0
        axis.set_xticks(range(len(complete)), [_plain(value) for value in complete], fontsize=8)
        axis.set_yticks(range(len(shares)), [_plain(value) if is_first else "" for value in shares], fontsize=8)
        axis.set_xlabel("completeness of text", fontsize=8)
        axis.set_title(title, fontsize=9)
        if is_first:
            axis.set_ylabel("share of shared taste", fontsize=8)
    figure.colorbar(shown, ax=list(axes.flat), label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
