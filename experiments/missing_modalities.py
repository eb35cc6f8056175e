"""Measure whether adaptation pays for items whose text or image is missing.

The data set is a preset of conf/dataset, with changes in the syntax of `dvc exp run -S`.  For each share some of the items that
have both modalities lose their text or their image, before adapters are trained and vectors are computed.  Interactions do not
change, so all users and targets stay the same.  One random order decides who loses what: with --modality both, half of the share
loses the text, the other half the image.  The items of a smaller share are among those of a larger one.

    python -m experiments missing_modalities --name demo --modality text --shares 0,0.3,0.6 --seeds 1,2,3
    python -m experiments missing_modalities --name hm --compose dataset=hm --compose dataset.local_folder=FOLDER

An item without a text has only an image vector, and an item without an image only a text vector (items.missing_text is
image_only and items.missing_image is text_only, unless --compose changes them).  In the fused vector the missing half is the
mean of the others.

==============  =====================================================================================================
zero_shot       the backbone without an adapter; always included, like id
oracle          the true attributes, always included on the built-in shop: the positive control
text_only       the text vectors of zero_shot; image_only: its image vectors
sda, infonce    MoDA with soft targets (CMSA) and with hard targets
lora            LoRA with hard targets; lora_cmsa: with soft targets
X+filled        vectors X; a missing vector is filled in from the item's other modality, which needs a shared space
mismatched      the negative control: sda, trained on images with the texts of other items
==============  =====================================================================================================

Other kinds are those of `python -m experiments adaptation`.  id, oracle and random do not depend on the share and are trained
once.  NDCG@10 is that of all targets, of targets without a text, of targets without an image, and of complete targets.

Adaptation *pays where a modality is missing* if sda - zero_shot on the targets without it is above 0, by the 95 % interval over
users and seeds, and larger than on complete targets.  A share is not read if the positive control is not clear: oracle above id,
or zero_shot above random on another data set.  A gain that mismatched also has says nothing about pairs.

Seed s trains adapter s and recommender s.  Which items lose a modality is one draw (--draw) for all seeds, and the intervals do
not include the variation between draws.  The first seed is trained at all shares before the next one.  A stopped run resumes.
The adapters are those of conf/adaptation/strong.yaml unless --compose changes them.  Projects and positions are kept below
experiments/runs/missing_modalities/NAME; tables and plot are written to experiments/results/missing_modalities-NAME-MODALITY.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import typer

from experiments import adaptation
from experiments.adaptation import FILLED, MIN_USERS, MISMATCHED
from experiments.corruption import draw, remove
from experiments.options import THREE_SEEDS, Name, Recommenders, Root, Seeds
from experiments.oracles import values_of
from experiments.study import (
    CUTOFF,
    Interval,
    Panels,
    gains,
    interval_cell,
    is_complete,
    markdown_table,
    mean_and_interval,
    minus,
    plot_intervals,
    positions_path,
    read_positions,
    write_results,
)
from experiments.workspaces import BASE, VARIANTS, link
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.params import DemoDataset, Params

Modality = Literal["text", "image", "both"]
ORACLE = "oracle"
SHARED = ("id", ORACLE, "random")
"""Vectors that do not depend on the share; they are trained without missing modalities."""
DEFAULT = Names(("random", "text_only", "image_only", "sda", "lora", MISMATCHED, f"{BASE}+filled", "sda+filled"))
DEFAULT_PARAMS = ("adaptation=strong", "items.missing_image=text_only", "items.missing_text=image_only")
GROUPS = ("all", "without text", "without image", "complete")
LACKING = GROUPS[1:3]
ADAPTED = "sda"  # the vectors of the rule
FEW = "few"
MISSING = "missing"

GivenShares = Annotated[
    Names, typer.Option("--shares", parser=names, metavar="0,0.3,...", help="Shares of the items that lose a modality.")
]
Vectors = Annotated[
    Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="The vectors, in the order of training.")
]
Lost = Annotated[
    Modality,
    typer.Option(
        "--modality", help="Modality that is removed from the items; both: half of these items lose the text, half the image."
    ),
]
Overlapping = Annotated[
    bool,
    typer.Option("--overlapping/--disjoint", help="With both: draw the two halves independently, so that some items lose both."),
]
Draw = Annotated[int, typer.Option("--draw", min=0, help="Seed of the random order in which items lose a modality.")]


@dataclass(frozen=True)
class Level:
    """A share and its folder, which contains the shop and a project for each seed.

    Attributes:
        share: share of the items that lost a modality.
        folder: the folder.
        params: the params of all its projects.
        whole: the level without missing modalities; None if this is the one.
    """

    share: float
    folder: Path
    params: Params
    whole: Level | None = None

    @property
    def shop(self) -> Workspace:
        """The project with the data that all seeds share."""
        return Workspace(self.folder / "shop")

    def home(self, vector: str) -> Level:
        """The level at which a kind of vectors is trained."""
        return self if self.whole is None or vector not in SHARED else self.whole

    def positions(self, recommender: str, vector: str) -> Path:
        """The folder with the positions of all seeds."""
        return adaptation.positions(self.home(vector).folder, recommender, vector)


@dataclass(frozen=True)
class Loss:
    """The loss of modalities in a shop.

    Attributes:
        modality: the modality; ``both``: half of the items lose the text, half the image.
        seed: seed of the draw.
        overlapping: whether the two halves are drawn independently.
    """

    modality: Modality
    seed: int
    overlapping: bool

    def name(self, share: float) -> str:
        """The name of the folder of a share."""
        draws = "" if self.seed == 1 else f"-draw-{self.seed}"
        return f"{self.modality}-{share:g}{'-overlapping' if self.overlapping else ''}{draws}" if share else "0"

    def draw(self, source: ItemSource, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the items that lose their text, and of those that lose their image; see :func:`experiments.corruption.draw`."""
        complete = source.item_ids[source.has_text & source.has_image]
        of_text = {"text": share, "image": 0.0, "both": share / 2}[self.modality]
        return draw(complete, of_text, share - of_text, self.seed, overlapping=self.overlapping)


def main(
    name: Name,
    modality: Lost = "text",
    shares: GivenShares = Names(("0", "0.3", "0.6")),
    recommenders: Recommenders = Names(("sasrec",)),
    vectors: Vectors = DEFAULT,
    composed: adaptation.Composed = None,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    max_minutes: adaptation.MaxMinutes = None,
    overlapping: Overlapping = False,
    seed_of_draw: Draw = 1,
) -> None:
    """Train what is missing; write the tables and the plot."""
    adaptation.check_vectors(vectors, [ORACLE, MISMATCHED])
    if overlapping and modality != "both":
        raise ConfigError("--overlapping", f"needs two modalities (got --modality {modality})", "give --modality both")
    loss = Loss(modality, seed_of_draw, overlapping)
    levels = make_levels(root, name, loss, _shares(shares), composed or [])
    params = levels[0].params
    is_built_in = isinstance(params.dataset, DemoDataset)
    if ORACLE in vectors and not is_built_in:
        raise ConfigError("--vectors", "oracle needs the true attributes of the built-in shop", "leave it out")
    kinds = list(dict.fromkeys(str(kind) for kind in ("id", *([ORACLE] if is_built_in else []), BASE, *vectors)))
    for recommender in recommenders:
        adaptation.check_recommender(params, recommender, kinds)
    train(levels, loss, recommenders, kinds, seeds, max_minutes)
    tables, panels = [counts(levels), alignment(levels, kinds, seeds)], {}
    for recommender in recommenders:
        measured = [measure(level, recommender, kinds, seeds) for level in levels]
        title = f"{recommender}, {len(seeds)} seeds"
        tables += [absolute(measured, kinds, title), gains_over_base(measured, kinds, title), verdicts(measured, title)]
        panels |= intervals(measured, kinds, recommender)
    results = write_results("\n".join(tables), "missing_modalities", f"{name}-{modality}", root)
    plot_intervals(results / "plot.png", panels, f"NDCG@{CUTOFF} minus {BASE}", zero=True, columns=2)


def _shares(given: Sequence[str]) -> list[float]:
    """The shares, ascending."""
    shares = [share for share in values_of("--shares", given) if share is not None]
    if not shares or not all(0.0 <= share <= 1.0 for share in shares):
        raise ConfigError("--shares", f"should be numbers from 0 to 1 with commas between them (got {','.join(given)})")
    return sorted(set(shares))


# ------------------------------------------------------------------------------------------------- data
def make_levels(root: Path, name: str, loss: Loss, shares: Sequence[float], composed: Sequence[str]) -> list[Level]:
    """The levels with their params, which are the same at each of them; only the params are written.

    Raises:
        ConfigError: a value is wrong, or a folder was made with other params.
    """
    given = {each.partition("=")[0] for each in composed}
    wanted = [*(each for each in DEFAULT_PARAMS if each.partition("=")[0] not in given), *composed]
    folder = root / "experiments" / "runs" / "missing_modalities" / name

    def made(share: float, whole: Level | None) -> Level:
        own = folder / loss.name(share)
        return Level(share, own, adaptation.compose(Workspace(own / "shop"), (root / "conf").resolve(), wanted), whole)

    whole = made(0.0, None)
    return [made(share, whole) if share else whole for share in shares]


def make_data(level: Level, loss: Loss) -> None:
    """Make the data of a level, unless it exists: that of the whole shop, without the modalities that its items lose.

    Raises:
        ArtifactError: a stage failed.
    """
    if level.whole is None:
        adaptation.run_data_stages(level.shop)
        return
    data = level.shop.root / "data"
    if data.exists():
        return
    whole = level.whole.shop
    adaptation.run_data_stages(whole)
    unfinished = Workspace(level.folder / "unfinished")  # renamed when it is complete, so an interrupted run is repeated
    remove(whole, unfinished, *loss.draw(item_source(whole, level.params.items), level.share))
    for path in (whole.raw, whole.truth):
        if path.exists():
            link(unfinished.root / path.relative_to(whole.root), path)
    (unfinished.root / "data").rename(data)
    unfinished.root.rmdir()


# ------------------------------------------------------------------------------------------------- training
def train(
    levels: Sequence[Level],
    loss: Loss,
    recommenders: Sequence[str],
    vectors: Sequence[str],
    seeds: Sequence[int],
    max_minutes: float | None,
) -> None:
    """Train what is missing: a seed at all shares before the next seed, at each share one kind of vectors after the other."""

    def job(level: Level, vector: str, seed: int) -> adaptation.Job:
        home = level.home(vector)
        wanted = [positions_path(home.positions(recommender, vector), seed) for recommender in recommenders]
        return adaptation.Job(wanted, partial(train_vector, home, loss, vector, recommenders, seed))

    groups = (
        (f"share {level.share:g}, seed {seed}", [job(level, vector, seed) for vector in vectors])
        for seed, level in product(seeds, levels)
    )
    adaptation.run_jobs(groups, max_minutes)


def train_vector(level: Level, loss: Loss, vector: str, recommenders: Sequence[str], seed: int) -> None:
    """Make one kind of vectors with one seed, and train the recommenders on them."""
    make_data(level, loss)
    adaptation.train_vector(level.shop, level.folder, vector, recommenders, seed)


# ------------------------------------------------------------------------------------------------- numbers
def targets(level: Level) -> dict[str, np.ndarray]:
    """Whether each test user's target is in a group, ``(U,)`` bool by name in :data:`GROUPS`; empty without data."""
    if not level.shop.images.exists():
        return {}
    source = item_source(level.shop, level.params.items)
    test = INTERACTIONS.read(level.shop.interactions).filter(pl.col("split") == "test").sort("user_id")
    rows = test["item_id"].to_numpy() - 1  # item ids are 1..I
    has_text, has_image = source.has_text[rows], source.has_image[rows]
    return dict(zip(GROUPS, (np.ones(len(rows), dtype=bool), ~has_text, ~has_image, has_text & has_image), strict=True))


@dataclass(frozen=True)
class Measured:
    """The measurements of a share.

    Attributes:
        level: the share.
        ndcg: NDCG@10 by seed and user ``(S, U)``, by kind of vectors; only those whose seeds are complete.
        groups: the users of each group.
    """

    level: Level
    ndcg: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]

    def difference(self, one: str, other: str, group: str) -> Interval | None:
        """The difference of two kinds of vectors on a group, with its interval.

        None if a kind is missing or the group has fewer than :data:`~experiments.adaptation.MIN_USERS` users.
        """
        if not self.is_large(group) or not self.ndcg.keys() >= {one, other}:
            return None
        paired_SU = (self.ndcg[one] - self.ndcg[other])[:, self.groups[group]]
        return mean_and_interval(paired_SU, self.level.params.evaluate, f"{one} - {other}")

    def is_large(self, group: str) -> bool:
        """Whether a group has enough users."""
        return group in self.groups and bool(self.groups[group].sum() >= MIN_USERS)

    def more_than_complete(self, vector: str, group: str) -> Interval | None:
        """The gain over zero_shot on a group, minus that on complete targets.

        The groups have no user in common, but the seeds' adapters, so the interval is rather too wide than too narrow.
        """
        found = [self.difference(vector, BASE, of) for of in (group, "complete")]
        known = [interval for interval in found if interval is not None]
        return minus(*known) if len(known) == 2 else None

    @property
    def control(self) -> tuple[str, str]:
        """The vectors of the positive control: the first should be clear of the second."""
        return (ORACLE, "id") if isinstance(self.level.params.dataset, DemoDataset) else (BASE, "random")

    def verdict(self, group: str) -> str:
        """Whether adaptation pays on the targets that lack a modality."""
        positive, gain = self.difference(*self.control, "all"), self.difference(ADAPTED, BASE, group)
        more, negative = self.more_than_complete(ADAPTED, group), self.difference(MISMATCHED, BASE, group)
        if positive is None or gain is None or more is None:
            return FEW if self.ndcg and not (self.is_large(group) and self.is_large("complete")) else MISSING
        if positive[1] <= 0.0:
            return f"not read: {self.control[0]} is not clear of {self.control[1]}"
        if gain[1] <= 0.0 or more[0] <= 0.0:
            return "no"
        if negative is None:
            return f"open: {MISMATCHED} is {MISSING}"
        if negative[1] > 0.0:
            return f"no: {MISMATCHED} gains too"
        return "pays, clearly more than on complete targets" if more[1] > 0.0 else "pays"


def measure(level: Level, recommender: str, vectors: Sequence[str], seeds: Sequence[int]) -> Measured:
    """Measure the vectors whose seeds are complete at a share."""
    places = {vector: level.positions(recommender, vector) for vector in vectors}
    done = {vector: place for vector, place in places.items() if is_complete(place, seeds)}
    ndcg = {vector: gains("ndcg", read_positions(place, seeds)) for vector, place in done.items()}
    return Measured(level, ndcg, targets(level))


# ------------------------------------------------------------------------------------------------- results
def counts(levels: Sequence[Level]) -> str:
    """The table of items and targets of each group."""
    rows: list[list[str]] = []
    for level in levels:
        groups = targets(level)
        if not groups:
            rows.append([f"{level.share:g}", *[MISSING] * 2 * len(GROUPS)])
            continue
        source = item_source(level.shop, level.params.items)
        lost = ~source.has_text, ~source.has_image, source.has_text & source.has_image
        items = [ITEMS.count(level.shop.items), *(int(of.sum()) for of in lost)]
        rows.append([f"{level.share:g}", *(f"{number:,}" for number in (*items, *(int(of.sum()) for of in groups.values())))])
    heads = [f"{kind}: {group}" for kind in ("items", "targets") for group in GROUPS]
    return markdown_table(["share", *heads], rows, "Items and targets that lack a modality")


def alignment(levels: Sequence[Level], vectors: Sequence[str], seeds: Sequence[int]) -> str:
    """The table of retrieval@1 of each share, which shows whether the adapters aligned image and text."""
    sources = dict.fromkeys(vector if vector == MISMATCHED else adaptation.source_of(vector) for vector in (BASE, *vectors))
    variants = [variant for variant in sources if variant in (BASE, MISMATCHED, *VARIANTS)]
    rows = [
        [f"{level.share:g}", *(adaptation.mean_alignment(level.folder, variant, seeds) or MISSING for variant in variants)]
        for level in levels
    ]
    title = f"Retrieval@1 of image and text without their means, at most 2,000 complete items, {len(seeds)} seeds"
    return markdown_table(["share", *variants], rows, title)


def absolute(measured: Sequence[Measured], vectors: Sequence[str], title: str) -> str:
    """The table of NDCG@10 of each group: a row for each share and kind of vectors."""
    rows: list[list[str]] = []
    for one, vector in product(measured, vectors):
        rows.append([f"{one.level.share:g}", vector])
        for group in GROUPS:
            is_known = vector in one.ndcg
            mean = f"{one.ndcg[vector][:, one.groups[group]].mean():.4f}" if is_known and one.is_large(group) else ""
            rows[-1].append(mean or (FEW if is_known else MISSING))
    return markdown_table(["share", "vectors", *GROUPS], rows, f"NDCG@{CUTOFF} of {title}")


def gains_over_base(measured: Sequence[Measured], vectors: Sequence[str], title: str) -> str:
    """The table of gains over zero_shot on each group, and of how much larger they are than on complete targets.

    Its first row for a share is the positive control.
    """
    rows: list[list[str]] = []
    for one, (first, second) in ((at, pair) for at in measured for pair in pairs(at, vectors)):
        rows.append([f"{one.level.share:g}", f"{first} - {second}"])
        found = [one.difference(first, second, group) for group in GROUPS]
        found += [one.more_than_complete(first, group) for group in LACKING] if second == BASE else []
        absent = FEW if one.ndcg.keys() >= {first, second} else MISSING
        rows[-1] += [absent if interval is None else interval_cell(interval) for interval in found]
        rows[-1] += [""] * (len(GROUPS) + len(LACKING) - len(found))
    heads = ["share", "difference", *GROUPS, *(f"{group} minus complete" for group in LACKING)]
    return markdown_table(heads, rows, f"Difference in NDCG@{CUTOFF} [95 %], {title}")


def pairs(one: Measured, vectors: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of kinds that are compared: the positive control, each kind with zero_shot, and filled ones with those not.

    Vectors beside ids are compared with those of zero_shot beside ids, or with ids.
    """
    found, base_beside_ids, filled_base = [one.control], f"{adaptation.IDS}{BASE}", f"{BASE}+filled"
    for vector in vectors:
        if vector.startswith(adaptation.IDS):
            found.append((vector, base_beside_ids if base_beside_ids in vectors and vector != base_beside_ids else "id"))
        elif vector not in (BASE, "id", ORACLE):
            found.append((vector, BASE))
        if vector in FILLED and vector != filled_base:
            found += [(vector, other) for other in (adaptation.source_of(vector), filled_base) if other in vectors]
    return list(dict.fromkeys(found))


def verdicts(measured: Sequence[Measured], title: str) -> str:
    """The table that says, for each share and modality, whether adaptation pays where it is missing."""
    rows = [[f"{one.level.share:g}", *(one.verdict(group) for group in LACKING)] for one in measured]
    return markdown_table(["share", *LACKING], rows, f"Does {ADAPTED} pay where a modality is missing?  {title}")


def intervals(measured: Sequence[Measured], vectors: Sequence[str], recommender: str) -> Panels:
    """The gains over zero_shot for a plot: a panel for each group, a line for each share and kind of vectors."""
    panels: Panels = {}
    for group in GROUPS:
        lines: dict[str, Interval] = {}
        for vector, one in product(vectors, measured):
            interval = None if vector in (BASE, *SHARED) else one.difference(vector, BASE, group)
            if interval is not None:
                lines[f"{vector}, share {one.level.share:g}"] = interval
        if lines:
            panels[f"{recommender}, targets: {group}"] = lines
    return panels
