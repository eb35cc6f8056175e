"""Align frozen embeddings with linear heads and the losses of the project.

An adapter inside a small backbone cannot align what the backbone does not see.  Here the embeddings are frozen, so any embeddings
can be aligned in seconds: those of ``zero_shot``, or of ``separate_models`` (MiniLM and EfficientNet-lite0), which see photos
better.  Each modality is reduced to its first principal components and scaled to unit length, and one square matrix for each
modality, the identity at the start, is trained on the pairs of image and text of all items.  Interactions are not used.

``frozen`` is the same without training.  Its levels differ from those of ``nearest_items``, where the unit length comes before
the mean is removed.

==========  =========================================================================================================
losses      sda: CMSA as by default; soft: CMSA with the frozen embeddings as the teacher, at 4 effective targets;
            infonce: hard targets; mismatched: the negative control, sda on images with the texts of other items
parts       fused: both aligned modalities; mixed: the frozen texts and the aligned images; image and text: one of them
==========  =========================================================================================================

The recommender is ``nearest``, which is not trained: next to co-purchases (``id+``) after the last number of steps, and by
embeddings alone after each.  Principal axes are scaled towards equal variance (axis_scaling: even).  The input are runs of
``adaptation``, as for ``nearest_items``.

With ``--missing text`` or ``--missing image`` a share of the items that have both modalities loses one, drawn once.  Heads are
trained on items with both.  In the part ``filled`` the missing half of ``fused`` is filled in from the item's other half, which
needs a space that both modalities share; otherwise it is the mean.

    python -m experiments aligned_heads --name hm --runs H&M=experiments/runs/adaptation/hm --embeddings separate_models

Positions are kept below experiments/runs/aligned_heads/NAME, so a stopped run resumes.  Tables and a plot of the differences to
the frozen embeddings are written to experiments/results/aligned_heads-NAME.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
import typer
from torch import Tensor, nn

from experiments import adaptation
from experiments.adaptation import IDS, SEPARATE
from experiments.corruption import draw, partners
from experiments.nearest_items import Run, Runs, ranked
from experiments.options import THREE_SEEDS, Name, Seeds
from experiments.study import (
    CUTOFF,
    Interval,
    Panels,
    check_ascending,
    check_names,
    gains,
    interval_cell,
    keep_settings,
    logger,
    markdown_table,
    mean_and_interval,
    mean_with_range,
    mutual_retrieval_at_1,
    plot_intervals,
    positions_path,
    read_positions,
    write_results,
)
from experiments.workspaces import BASE, padded
from sda_core import losses
from sda_core.artifacts import INTERACTIONS, POSITIONS, Workspace, read_json, write_json
from sda_core.cli.scripts import Names, Numbers, names, numbers
from sda_core.embeddings.controls import Vectors
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.errors import ConfigError
from sda_core.fingerprint import sha256_file
from sda_core.params import LossParams, Params
from sda_core.principal_axes import principal_axes, project
from sda_core.seed import generator
from sda_core.unit_rows import unit_rows

WIDTH = 256  # principal components of each modality
BATCH = 256
RATE = 1e-3
MISMATCHED = "mismatched"
CMSA: dict[str, object] = {
    "variant": "paper",
    "teacher": "mean",
    "temperature": 0.05,
    "teacher_temperature": None,
    "teacher_targets": None,
    "teacher_source": "adapted",
    "center": "batch",
}
LOSSES: dict[str, dict[str, object]] = {
    "sda": CMSA,
    "soft": CMSA | {"teacher_source": "base", "teacher_targets": 4.0},
    "infonce": CMSA | {"teacher": "none"},
    MISMATCHED: CMSA,
}
"""Values of the section ``train_adapter.loss``, whatever the run's own are."""
PARTS = ("fused", "mixed", "image", "text")
FILLED = "filled"
NEXT_TO_IDS = ("fused", "mixed", FILLED)
SHARE = 0.6
DRAW = 1  # seed of the items that lose a modality
BATCHES_OF_CALIBRATION = 8


def main(
    name: Name,
    runs: Runs,
    embeddings: Annotated[Literal["zero_shot", "separate_models"], typer.Option(help="The frozen embeddings.")] = SEPARATE,
    losses_: Annotated[Names, typer.Option("--losses", parser=names, metavar="A,B,...", help="Losses to compare.")] = Names(
        tuple(LOSSES)
    ),
    num_steps: Annotated[
        Numbers, typer.Option("--num-steps", parser=numbers, metavar="100,300", help="Numbers of steps, ascending.")
    ] = Numbers((100, 300)),
    missing: Annotated[
        Literal["text", "image"] | None, typer.Option(help="Modality to remove from a share of the items.", show_default=False)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="With --missing: share of the items with both modalities that lose one.",
            show_default="0.6",
        ),
    ] = None,
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Train the heads, rank the targets; write the tables."""
    check_names("--losses", losses_, LOSSES)
    check_ascending("--num-steps", num_steps)
    if share is not None and missing is None:
        raise ConfigError("--share", "has no effect without --missing", "add --missing text or --missing image")
    share = SHARE if share is None else share
    tables: list[str] = []
    panels: Panels = {}
    for run in [Run.read(text) for text in runs]:
        folder = Path("experiments") / "runs" / "aligned_heads" / name / embeddings / run.label
        if missing is not None:
            folder = folder / f"{missing}-{share:g}"
        frozen = Frozen.read(run, embeddings, missing, share)
        keep_settings(folder / "settings.json", {"embeddings": frozen.source, "interactions": sha256_file(run.shop.interactions)})
        for loss in losses_:
            for seed in seeds:
                if not is_complete(folder, frozen.parts, loss, num_steps, seed):
                    train(run, frozen, folder, loss, num_steps, seed)
        given = folder, frozen.parts, losses_, num_steps, seeds
        compared = compare(run, groups_of(run, frozen), *given)
        tables += [retrieval(folder, losses_, num_steps, seeds, run.label), levels(run, *given), differences(run, compared)]
        panels |= intervals(run, compared, num_steps[-1])
    results = write_results("\n".join(tables), "aligned_heads", name)
    plot_intervals(results / "plot.png", panels, f"difference in NDCG@{CUTOFF} to frozen embeddings", zero=True, columns=2)


# ------------------------------------------------------------------------------------------------- the heads
@dataclass(frozen=True)
class Frozen:
    """The frozen embeddings of a run's items, reduced to principal components.

    Attributes:
        workspace: the project with the embeddings.
        params: its params.
        image_ID: ``(I, WIDTH)`` components of the unit image embeddings, centred; zero for an item without one.
        text_ID: the same of the texts.
        has_image: ``(I,)`` bool.
        has_text: ``(I,)`` bool.
        missing: the modality that items have lost; None for nothing.
        has_lost: ``(I,)`` bool, which items have lost it.
        source: hash of the table of the embeddings.
    """

    workspace: Workspace
    params: Params
    image_ID: np.ndarray
    text_ID: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray
    missing: str | None
    has_lost: np.ndarray
    source: str

    @staticmethod
    def read(run: Run, embeddings: str, missing: str | None = None, share: float = 0.0) -> Frozen:
        """The frozen embeddings of a run, of which a share of the items with both modalities loses one.

        Raises:
            ConfigError: no item would lose a modality, or fewer than two would be left to train on.
        """
        workspace = Workspace(run.folder / "seed-1")
        own: Vectors = adaptation.table_of(workspace, run.params, embeddings if embeddings == SEPARATE else BASE)
        complete = np.flatnonzero(own.has_image & own.has_text)
        shares = (share, 0.0) if missing == "text" else (0.0, share)
        has_lost = np.zeros(len(own.has_image), dtype=bool)
        if missing is not None:
            for lost in draw(complete, *shares, DRAW):
                has_lost[lost] = True
            num_lost, num_left = int(has_lost.sum()), len(complete) - int(has_lost.sum())
            if num_lost < 1 or num_left < 2:
                raise ConfigError(
                    "--share",
                    f"takes one modality from {num_lost} of {len(complete)} items with both, and leaves {num_left} to train on",
                    "take it from at least one, and leave at least two",
                )
        has_image = own.has_image & ~(has_lost & (missing == "image"))
        has_text = own.has_text & ~(has_lost & (missing == "text"))
        image_ID, text_ID = reduced(own.image_ID, has_image), reduced(own.text_ID, has_text)
        source = sha256_file(adaptation.table_path(workspace, run.params, embeddings))
        return Frozen(workspace, run.params, image_ID, text_ID, has_image, has_text, missing, has_lost, source)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are measured."""
        return PARTS if self.missing is None else (*PARTS, FILLED)

    def vectors(self, part: str, image_ID: np.ndarray, text_ID: np.ndarray) -> np.ndarray:
        """``(I + 1, F)`` item vectors of a part, row 0 zero.

        Args:
            part: see :data:`PARTS`.
            image_ID: aligned image embeddings.
            text_ID: aligned text embeddings.
        """
        weights = {"image": (1.0, 0.0), "text": (0.0, 1.0)}.get(part, (1.0, 1.0))
        even = {"fusion": "late_concat_pca", "axis_scaling": "even", "balance": "none"}
        section = self.params.export_embeddings.model_copy(update={**even, "image_weight": weights[0], "text_weight": weights[1]})
        text_ID = self.text_ID if part == "mixed" else text_ID
        has_image, has_text = self.has_image, self.has_text
        if part == FILLED:
            image_ID, text_ID, has_image, has_text = adaptation.fill_in(image_ID, text_ID, has_image, has_text, normalize=True)
        fused_IF = fuse(image_ID, text_ID, has_image, seen_items(self.workspace), section, has_text=has_text)
        return padded(fused_IF)


def reduced(vectors_ID: np.ndarray, has_vector: np.ndarray) -> np.ndarray:
    """The :func:`components` of the unit vectors ``(I, WIDTH)``, fitted on the rows that have one; zero for the other rows."""
    found_IK = components(unit_rows(vectors_ID.astype(np.float32)), np.flatnonzero(has_vector))
    found_IK[~has_vector] = 0.0
    return found_IK


def components(vectors_ND: np.ndarray, fit_rows: np.ndarray) -> np.ndarray:
    """The first :data:`WIDTH` principal components ``(N, WIDTH)``, centred; columns of zeros if there are fewer.

    Args:
        vectors_ND: the vectors.
        fit_rows: the rows that determine the mean and the principal axes.
    """
    mean_D, axes_DK = principal_axes(vectors_ND, fit_rows, WIDTH, even=False)
    found_NK = np.zeros((len(vectors_ND), WIDTH), dtype=np.float32)
    found_NK[:, : axes_DK.shape[1]] = project(vectors_ND, mean_D, axes_DK)
    return found_NK


def section_of(params: Params, loss: str) -> LossParams:
    """The section of a loss, validated."""
    return LossParams.model_validate(params.train_adapter.loss.model_dump() | LOSSES[loss])


def train(run: Run, frozen: Frozen, folder: Path, loss: str, num_steps: Sequence[int], seed: int) -> None:
    """Train a pair of heads, and rank the targets before training and after each number of steps."""
    rows = np.flatnonzero(frozen.has_image & frozen.has_text)
    section = section_of(frozen.params, loss)
    for step, heads in trained(frozen.image_ID, frozen.text_ID, rows, section, loss, num_steps, seed, run.label):
        measure(run, frozen, folder, loss, step, seed, heads, next_to_ids=step in (0, num_steps[-1]))


def trained(
    image_ID: np.ndarray,
    text_ID: np.ndarray,
    rows: np.ndarray,
    section: LossParams,
    loss: str,
    num_steps: Sequence[int],
    seed: int,
    label: str = "",
) -> Iterator[tuple[int, list[nn.Linear]]]:
    """Train one square matrix for each modality, the identity at the start.

    Args:
        image_ID: ``(I, D)`` frozen image embeddings.
        text_ID: ``(I, D)`` frozen text embeddings.
        rows: the items to train on.
        section: settings of the loss.
        loss: its name; with ``mismatched`` each image gets the text of another item.
        num_steps: numbers of steps, ascending.
        seed: seed of the batches.
        label: name of the data in the log.

    Yields:
        0 and each number of steps, with the two matrices at that time: of images, of texts.
    """
    criterion = losses.build(section)
    texts = rows if loss != MISMATCHED else exchanged(rows, seed)
    image_ND, text_ND = torch.from_numpy(image_ID[rows]), torch.from_numpy(text_ID[texts])
    order = generator(seed, "aligned heads")
    size, width = min(BATCH, len(rows)), image_ID.shape[1]
    drawn = [torch.from_numpy(order.choice(len(rows), size, replace=False)) for _ in range(BATCHES_OF_CALIBRATION)]
    criterion.calibrate([(image_ND[batch], text_ND[batch], None) for batch in drawn])
    heads = [nn.Linear(width, width, bias=False) for _ in range(2)]
    for head in heads:
        nn.init.eye_(head.weight)
    optimizer = torch.optim.Adam([parameter for head in heads for parameter in head.parameters()], lr=RATE)
    yield 0, heads
    for step in range(1, num_steps[-1] + 1):
        batch = torch.from_numpy(order.choice(len(rows), size, replace=False))
        pair = image_ND[batch], text_ND[batch]
        value: Tensor = criterion(heads[0](pair[0]), heads[1](pair[1]), None, pair if criterion.needs_base else None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step in num_steps:
            logger.info("%s: %s, seed %d, step %d, loss %.4f", label, loss, seed, step, value.item())
            yield step, heads


def exchanged(rows: np.ndarray, seed: int) -> np.ndarray:
    """The rows, each moved by one position along a seeded cycle, so that none keeps its own text."""
    return rows[partners(generator(seed, "aligned heads", MISMATCHED), len(rows))]


@torch.no_grad()
def aligned(heads: Sequence[nn.Module], image_ID: np.ndarray, text_ID: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings, multiplied by the heads."""
    return heads[0](torch.from_numpy(image_ID)).numpy(), heads[1](torch.from_numpy(text_ID)).numpy()


def measure(
    run: Run,
    frozen: Frozen,
    folder: Path,
    loss: str,
    step: int,
    seed: int,
    heads: Sequence[nn.Module],
    *,
    next_to_ids: bool,
) -> None:
    """Rank the targets with every part, and measure retrieval@1 among all items that have both modalities."""
    image_ID, text_ID = aligned(heads, frozen.image_ID, frozen.text_ID)
    both = frozen.has_image & frozen.has_text
    found = [unit_rows(given[both] - given[both].mean(axis=0)) for given in (image_ID, text_ID)]
    place = place_of(folder, loss, step)
    for part in frozen.parts:
        kinds = (part, IDS + part) if next_to_ids and part in NEXT_TO_IDS else (part,)
        paths = {kind: positions_path(place / kind, seed_of(step, seed)) for kind in kinds}
        missing = {kind: path for kind, path in paths.items() if not path.exists()}
        made = frozen.vectors(part, image_ID, text_ID) if missing else None
        for kind, path in missing.items():
            POSITIONS.write(ranked(run, kind, made), path)
    path = place / f"{seed_of(step, seed)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"retrieval_at_1": mutual_retrieval_at_1(*found)})


# ------------------------------------------------------------------------------------------------- tables
def place_of(folder: Path, loss: str, step: int) -> Path:
    """The folder of a loss after a number of steps; the frozen embeddings are shared."""
    return folder / ("frozen" if step == 0 else f"{loss}-{step}")


def seed_of(step: int, seed: int) -> int:
    """The seed in the names of files: frozen embeddings do not depend on it, so they are ranked once."""
    return seed if step else 0


def is_complete(folder: Path, parts: Sequence[str], loss: str, num_steps: Sequence[int], seed: int) -> bool:
    """Whether a training was measured after all steps."""

    def files(step: int) -> list[Path]:
        place = place_of(folder, loss, step)
        known = seed_of(step, seed)
        return [place / f"{known}.json", *(positions_path(place / kind, known) for kind in kinds_of(parts, step, num_steps))]

    return all(path.exists() for step in (0, *num_steps) for path in files(step))


def rows_of(losses_: Sequence[str], num_steps: Sequence[int]) -> list[tuple[str, int]]:
    """Loss and steps of each row of the tables; the frozen embeddings first."""
    return [(losses_[0], 0), *((loss, step) for loss in losses_ for step in num_steps)]


def label(loss: str, step: int) -> str:
    """The name of a row."""
    return "frozen" if step == 0 else f"{loss}, {step} steps"


def retrieval(folder: Path, losses_: Sequence[str], num_steps: Sequence[int], seeds: Sequence[int], title: str) -> str:
    """The Markdown table of retrieval@1 among all items with both modalities."""
    rows = []
    for loss, step in rows_of(losses_, num_steps):
        place = place_of(folder, loss, step)
        found = [read_json(place / f"{seed_of(step, seed)}.json", "retrieval")["retrieval_at_1"] for seed in seeds]
        rows.append([label(loss, step), mean_with_range(found, 3)])
    return markdown_table(["embeddings", "retrieval@1"], rows, f"{title}, image and text of an item")


def kinds_of(parts: Sequence[str], step: int, num_steps: Sequence[int]) -> tuple[str, ...]:
    """The kinds of scores that are measured after a number of steps."""
    next_to_ids = tuple(IDS + part for part in NEXT_TO_IDS if part in parts)
    return (*parts, *next_to_ids) if step in (0, num_steps[-1]) else tuple(parts)


def groups_of(run: Run, frozen: Frozen) -> dict[str, np.ndarray]:
    """Masks ``(U,)`` of test users: those of :mod:`experiments.adaptation`, or by what the target has lost."""
    if frozen.missing is None:
        return adaptation.target_groups(run.shop, run.params)
    test = INTERACTIONS.read(run.shop.interactions).filter(pl.col("split") == "test").sort("user_id")
    lacks = frozen.has_lost[test["item_id"].to_numpy() - 1]
    groups = {"all": np.ones(len(lacks), dtype=bool), f"without {frozen.missing}": lacks, "others": ~lacks}
    return {f"{name} ({mask.sum():,})": mask for name, mask in groups.items()}


def levels(
    run: Run, folder: Path, parts: Sequence[str], losses_: Sequence[str], num_steps: Sequence[int], seeds: Sequence[int]
) -> str:
    """The Markdown table of NDCG@10 of all users, by kind of scores."""
    kinds = kinds_of(parts, 0, num_steps)
    rows = []
    for loss, step in rows_of(losses_, num_steps):
        known = kinds_of(parts, step, num_steps)
        cells = [f"{ndcg(folder, loss, step, kind, seeds).mean():.4f}" if kind in known else "" for kind in kinds]
        rows.append([label(loss, step), *cells])
    return markdown_table(["embeddings", *kinds], rows, f"{run.label}, NDCG@{CUTOFF} in nearest items, {len(seeds)} seeds")


@dataclass(frozen=True)
class Compared:
    """A difference in NDCG@10 between two rows of the tables.

    Attributes:
        one: loss and number of steps of the first row.
        other: those of the second row; 0 steps are the frozen embeddings.
        kind: the kind of scores of the first row.
        against: the kind of scores of the second row.
        of_groups: mean and 95 % interval by group of users; the first group is all users.
    """

    one: tuple[str, int]
    other: tuple[str, int]
    kind: str
    against: str
    of_groups: Mapping[str, Interval]


def compare(
    run: Run,
    groups: Mapping[str, np.ndarray],
    folder: Path,
    parts: Sequence[str],
    losses_: Sequence[str],
    num_steps: Sequence[int],
    seeds: Sequence[int],
) -> list[Compared]:
    """The differences to the frozen embeddings, and between losses after the last step.

    What is filled in is compared with the frozen ``fused``, because frozen embeddings of two modalities share no space.
    """
    last, frozen = num_steps[-1], (losses_[0], 0)
    pairs = [((loss, step), frozen) for loss, step in rows_of(losses_, num_steps)[1:]]
    wanted = (("sda", MISMATCHED), ("sda", "infonce"), ("soft", "infonce"), ("soft", MISMATCHED), ("infonce", MISMATCHED))
    pairs += [((one, last), (other, last)) for one, other in wanted if {one, other} <= {*losses_}]
    found = []
    for one, other in pairs:
        for kind in kinds_of(parts, one[1], num_steps):
            against = kind.replace(FILLED, "fused") if other == frozen else kind
            paired_SU = ndcg(folder, *one, kind, seeds) - ndcg(folder, *other, against, seeds)
            purpose = f"{label(*one)} - {label(*other)} {kind}"
            of_groups = {
                group: mean_and_interval(paired_SU[:, mask], run.params.evaluate, purpose) for group, mask in groups.items()
            }
            found.append(Compared(one, other, kind, against, of_groups))
    return found


def differences(run: Run, compared: Sequence[Compared]) -> str:
    """The Markdown table of the differences, with a row for each and a column for each group of users."""
    rows = []
    for each in compared:
        scores = each.kind if each.kind == each.against else f"{each.kind} - {each.against}"
        rows.append([f"{label(*each.one)} - {label(*each.other)}", scores, *map(interval_cell, each.of_groups.values())])
    heads = ["difference", "scores", *compared[0].of_groups]
    return markdown_table(heads, rows, f"{run.label}, differences in NDCG@{CUTOFF} [95 %]")


def intervals(run: Run, compared: Sequence[Compared], last: int) -> Panels:
    """The differences between the losses after the last step and the frozen embeddings, of all users, for a plot.

    It has a panel for each kind of scores and a line for each loss.
    """
    panels: Panels = {}
    for each in compared:
        (loss, step), (_, step_of_other) = each.one, each.other
        if (step, step_of_other) == (last, 0):
            panels.setdefault(f"{run.label}, {each.kind}", {})[loss] = next(iter(each.of_groups.values()))
    return panels


def ndcg(folder: Path, loss: str, step: int, kind: str, seeds: Sequence[int]) -> np.ndarray:
    """NDCG@10 by seed and user ``(S, U)``."""
    return gains("ndcg", read_positions(place_of(folder, loss, step) / kind, [seed_of(step, seed) for seed in seeds]))
