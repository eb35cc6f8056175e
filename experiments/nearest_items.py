"""Compare item vectors in the recommender ``nearest``, which is not trained.

Items are ranked by their mean cosine to the items of the history, after the mean of the items in the training data is subtracted.
A trained recommender can learn which directions of the vectors matter.  Here the geometry of the vectors decides, as in search,
in `sda neighbors`, and in a shop without interactions to train on.  ``id`` is the similarity of items by the users they share
(item-kNN), and ``id+X`` the sum of it and of that by the vectors X, whose weight is chosen on the validation targets.

The vectors are those of finished runs of ``adaptation`` or of cells of ``adaptation_map``: folders with the projects ``shop`` and
``seed-N``.  Nothing is trained.

    python -m experiments nearest_items --name hm --runs H&M=experiments/runs/adaptation/hm
    python -m experiments nearest_items --name map --runs corner=experiments/runs/adaptation_map/nano/shared-1-complete-0.2 \\
        --runs opposite=experiments/runs/adaptation_map/nano/shared-0.2-complete-0.2

The kinds of vectors are those of ``adaptation``, and ``oracle`` on the built-in shop.  ``--beside sasrec/id`` adds a recommender
that the run has trained on learned ids.  The tables are written to experiments/results/nearest_items-NAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
import typer

from experiments import adaptation
from experiments.adaptation import CHECKED, EVEN, IDS, MISMATCHED, OTHER_IMAGES, SEPARATE, Measured
from experiments.options import THREE_SEEDS, Name, Seeds
from experiments.study import (
    gains,
    interval_cell,
    is_complete,
    logger,
    markdown_table,
    mean_and_interval,
    minus,
    read_positions,
    write_results,
)
from experiments.workspaces import BASE, VARIANTS, changed_section
from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.params import DemoDataset, Params, load_params

ORACLE = "oracle"
DEFAULT = Names(
    (
        *("random", ORACLE, BASE, "text_only", "image_only", OTHER_IMAGES, CHECKED, MISMATCHED),
        *(f"{vector}{EVEN}" for vector in (BASE, "text_only", OTHER_IMAGES, CHECKED, MISMATCHED)),
    )
)
WITH_USERS = (
    BASE,
    "text_only",
    "image_only",
    OTHER_IMAGES,
    CHECKED,
    MISMATCHED,
    "lora",
    "infonce",
    SEPARATE,
    f"{SEPARATE}:text",
    ORACLE,
)
PAIRS = (
    *((ORACLE, BASE), (BASE, "random"), (BASE, "text_only"), (BASE, OTHER_IMAGES)),
    *((CHECKED, BASE), (CHECKED, "text_only"), (CHECKED, "image_only"), (CHECKED, MISMATCHED), (MISMATCHED, BASE)),
    *((f"{BASE}{EVEN}", BASE), (f"{BASE}{EVEN}", f"text_only{EVEN}"), (f"{BASE}{EVEN}", f"{OTHER_IMAGES}{EVEN}")),
    *((CHECKED, f"{BASE}{EVEN}"), (f"{CHECKED}{EVEN}", f"{BASE}{EVEN}"), (f"{CHECKED}{EVEN}", f"{MISMATCHED}{EVEN}")),
    (CHECKED, "lora"),
    *((f"{CHECKED}:{part}{even}", f"{part}_only{even}") for part in ("text", "image") for even in ("", EVEN)),
    *((f"{ids}{CHECKED}+base", f"{ids}{BASE}") for ids in ("", IDS)),
    *((f"{IDS}{vector}{even}", "id") for vector in ("random", "shuffled", *WITH_USERS) for even in ("", EVEN)),
    *((f"{IDS}{CHECKED}{even}", f"{IDS}{other}{even}") for other in (BASE, "text_only", MISMATCHED) for even in ("", EVEN)),
    *((f"{IDS}{BASE}{even}", f"{IDS}{OTHER_IMAGES}{even}") for even in ("", EVEN)),
    *((f"{IDS}{BASE}{even}", f"{IDS}text_only{even}") for even in ("", EVEN)),
    *(
        (f"{ids}{one}{even}", f"{ids}{other}{even}")
        for one, other in (("infonce", BASE), ("lora", BASE), (CHECKED, "infonce"), ("infonce", "lora"))
        for ids in ("", IDS)
        for even in ("", EVEN)
    ),
    *(
        (f"{ids}{one}{even}", f"{ids}{SEPARATE}{part}{even}")
        for one, part in ((BASE, ""), ("text_only", ":text"), ("image_only", ":image"))
        for ids in ("", IDS)
        for even in ("", EVEN)
    ),
    *((f"{IDS}{SEPARATE}{even}", f"{IDS}{other}{even}") for other in (f"{SEPARATE}:text", "text_only") for even in ("", EVEN)),
)
"""The differences in the table: first minus second."""

Runs = Annotated[
    list[str],
    typer.Option("--runs", metavar="LABEL=FOLDER", help="A finished run: the folder with shop and seed-N.  Repeat it for more."),
]
Beside = Annotated[
    Names,
    typer.Option(
        "--beside",
        parser=names,
        metavar="A/B,...",
        help="Trained recommenders to compare with: RECOMMENDER/VECTORS, which the runs have trained.",
    ),
]
AxisScaling = Annotated[
    Literal["none", "even"],
    typer.Option(help="Scaling of the axes by the recommender itself, of all vectors (its default in params.yaml is even)."),
]
Vectors = Annotated[Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="The vectors to compare.")]


def main(
    name: Name,
    runs: Runs,
    vectors: Vectors = DEFAULT,
    beside: Beside = Names(()),
    seeds: Seeds = THREE_SEEDS,
    axis_scaling: AxisScaling = "none",
) -> None:
    """Rank the targets with every kind of vectors; write the tables."""
    more = (ORACLE, MISMATCHED, f"{MISMATCHED}{EVEN}")
    adaptation.check_vectors(vectors, (*more, *(f"{IDS}{vector}" for vector in more)))
    found = [Run.read(run) for run in runs]
    measured = {run.label: measure(run, vectors, beside, seeds, axis_scaling) for run in found}
    tables = []
    for run in found:
        of_run = measured[run.label]
        tables += [adaptation.absolute(of_run, f"{run.label}, nearest items, {len(seeds)} seeds")]
        tables += [differences(of_run, run, beside)]
    for one, other in combinations(found, 2):
        tables.append(contrast(one, measured[one.label], other, measured[other.label]))
    write_results("\n".join(filter(None, tables)), "nearest_items", name)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        label: its name in the tables.
        folder: folder with the projects ``shop`` and ``seed-N``.
        params: params of its shop.
    """

    label: str
    folder: Path
    params: Params

    @staticmethod
    def read(text: str) -> Run:
        """The run of an option ``LABEL=FOLDER``.

        Raises:
            ConfigError: the option has another form, or there is no such run.
        """
        label, separator, path = text.partition("=")
        folder = Path(path)
        if not (label and separator and path):
            raise ConfigError("--runs", f"should be LABEL=FOLDER (got {text!r})")
        if label in (".", "..") or {"/", "\\"} & {*label}:  # it may become a folder's name
            raise ConfigError("--runs", f"a label has no slash and is not . or .. (got {label!r})")
        if not (folder / "shop" / "params.yaml").exists():
            raise ConfigError(
                "--runs", f"{folder} has no shop/params.yaml", "give the folder of a run of adaptation, or of a cell"
            )
        return Run(label, folder, load_params(folder / "shop" / "params.yaml"))

    @property
    def shop(self) -> Workspace:
        """The project with the data."""
        return Workspace(self.folder / "shop")

    def workspace(self, vector: str, seed: int) -> Workspace | None:
        """The project with the embeddings from which these vectors are computed; None if they are missing."""
        kind = adaptation.source_of(vector)
        trained = CHECKED if kind == MISMATCHED else kind
        workspace = Workspace(adaptation.project(self.folder, kind) / f"seed-{seed}")
        needed = workspace.embeddings(trained if trained in VARIANTS else BASE)
        return workspace if needed.exists() else None


# ------------------------------------------------------------------------------------------------- the recommender
def ranked(run: Run, vector: str, item_vectors: np.ndarray | None, axis_scaling: str = "none") -> pl.DataFrame:
    """Rank the test targets of a run with these vectors.

    Args:
        run: the run, with its interactions.
        vector: the kind of vectors; it decides between similarity by users, by vectors, and both.
        item_vectors: ``(I + 1, D)``, row 0 zero; None for similarity by users alone.
        axis_scaling: see :class:`sda_core.params.NearestParams`.

    Returns:
        POSITIONS table.
    """
    interactions, num_items = INTERACTIONS.read(run.shop.interactions), ITEMS.count(run.shop.items)
    training = recommenders.training_data(interactions, num_items=num_items)
    section = adaptation.with_representation(run.params.train_recommender.nearest, vector)
    section = changed_section(section, {"axis_scaling": axis_scaling})
    model = recommenders.build(section, training.num_users, num_items, item_vectors, seed=0)
    device = torch.device("cpu")
    model.fit(training, checkpoint=run.folder / "unused", fingerprint="", device=device)
    data = recommenders.evaluation_data(interactions, num_items=num_items)
    placed = ranking.place_targets(model, data, None, run.params.evaluate.batch_size, device)
    return evaluation.score_positions(placed, run.params.evaluate.ties)


def matrix(workspace: Workspace, vector: str) -> np.ndarray | None:
    """The item vectors ``(I + 1, D)`` of a project, row 0 zero; None for ``id``."""
    stored = vector.replace(MISMATCHED, CHECKED)
    return adaptation.matrix(workspace, load_params(workspace.root / "params.yaml"), stored)


# ------------------------------------------------------------------------------------------------- numbers
def measure(
    run: Run, vectors: Sequence[str], beside: Sequence[str], seeds: Sequence[int], axis_scaling: str = "none"
) -> Measured:
    """NDCG and Hit ``(S, U)`` by group of users and kind of vectors.

    Kinds whose embeddings are missing for a seed are left out, with a warning.

    Args:
        run: the finished run.
        vectors: kinds of vectors.
        beside: trained recommenders, ``RECOMMENDER/VECTORS``.
        seeds: seeds of the adapters and of the trained recommenders.
        axis_scaling: see :class:`sda_core.params.NearestParams`.
    """
    groups = adaptation.target_groups(run.shop, run.params)
    measured: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {group: {} for group in groups}
    for vector in vectors:
        if vector.removeprefix(IDS) == ORACLE and not isinstance(run.params.dataset, DemoDataset):
            continue
        workspaces = [run.workspace(vector, seed) for seed in seeds]
        known = [workspace for workspace in workspaces if workspace is not None]
        if len(known) < len(seeds):
            logger.warning("%s: %s has no embeddings of every seed and is left out", run.label, vector)
            continue
        frames = [ranked(run, vector, matrix(workspace, vector), axis_scaling) for workspace in known]
        for group, mask in groups.items():
            measured[group][vector] = gains("ndcg", frames, mask), gains("hit", frames, mask)
    for trained in beside:
        recommender, _, vector = trained.partition("/")
        place = adaptation.positions(run.folder, recommender, vector)
        if not is_complete(place, seeds):
            logger.warning("%s: %s has no positions of every seed and is left out", run.label, trained)
            continue
        frames = read_positions(place, seeds)
        for group, mask in groups.items():
            measured[group][trained] = gains("ndcg", frames, mask), gains("hit", frames, mask)
    return measured


def differences(measured: Measured, run: Run, beside: Sequence[str]) -> str:
    """The Markdown table of the measured :data:`PAIRS`, with intervals over users and adapter seeds.

    Frozen vectors and ``sda``, with axes of more even variance, are also compared with the trained recommenders.
    """
    kinds = next(iter(measured.values())).keys()
    rows = []
    of_frozen = f"{BASE}{EVEN}", f"text_only{EVEN}"
    against = product(("id", *of_frozen, f"{CHECKED}{EVEN}", *(f"{IDS}{vector}" for vector in of_frozen)), beside)
    for first, second in (*PAIRS, *against):
        if kinds >= {first, second}:
            rows.append([f"{first} - {second}", *adaptation.difference_cells(measured, run.params, first, second)])
    heads = ["difference", *adaptation.difference_heads(measured)]
    return markdown_table(heads, rows, f"{run.label}, nearest items, differences") if rows else ""


def contrast(one: Run, of_one: Measured, other: Run, of_other: Measured) -> str:
    """The Markdown table of gains over zero_shot in two runs, and their difference; empty if there are no adapted vectors."""
    rows = []
    first, second = next(iter(of_one.values())), next(iter(of_other.values()))  # all users
    for vector in (*VARIANTS, MISMATCHED):
        if all(of.keys() >= {vector, BASE} for of in (first, second)):
            pair = [
                mean_and_interval(of[vector][0] - of[BASE][0], run.params.evaluate, f"{vector} - {BASE}")
                for of, run in ((first, one), (second, other))
            ]
            rows.append([f"{vector} - {BASE}", *map(interval_cell, pair), interval_cell(minus(*pair))])
    title = f"Gains in {one.label} and {other.label}, nearest items"
    return markdown_table(["gain", one.label, other.label, "difference"], rows, title) if rows else ""
