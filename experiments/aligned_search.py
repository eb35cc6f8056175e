"""Measure search across modalities with linear heads on held-out items.

A share of the items with an image and a text is held out.  One matrix for each modality is trained on the pairs of the others, as
in ``aligned_heads``: seconds on frozen embeddings, of ``zero_shot`` or of ``separate_models`` (MiniLM and EfficientNet-lite0,
which have nothing in common before).  Then the text of each held-out item is the query for its image among those of all held-out
items, and the reverse, with the metrics of ``cross_modal_search``: R@1, R@10 and MRR.

``zero_shot`` in the tables are the frozen embeddings.  Those of separate models have no common space, so theirs are at chance.
With ``--by-title`` items of the same title, such as the colours of a product, are held out together: otherwise a held-out item
may have nearly the same text as a known one.  ``mismatched`` is the negative control: the heads of ``sda``, trained on images
with the texts of other items.

    python -m experiments aligned_search --name hm --runs H&M=experiments/runs/adaptation/hm --embeddings separate_models

The input are runs of ``adaptation``, as for ``nearest_items``.  Positions are kept below experiments/runs/aligned_search/NAME, so
a stopped run resumes.  The tables are written to experiments/results/aligned_search-NAME.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
import typer

from experiments import adaptation, cross_modal_search
from experiments.adaptation import SEPARATE
from experiments.aligned_heads import LOSSES, MISMATCHED, aligned, components, section_of, trained
from experiments.nearest_items import Run, Runs
from experiments.options import THREE_SEEDS, Name, Seeds
from experiments.study import check_names, keep_settings, kept_table, write_results
from experiments.workspaces import BASE
from sda_core.artifacts import ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.embeddings.controls import Vectors
from sda_core.fingerprint import sha256_file
from sda_core.unit_rows import unit_rows

Modalities = tuple[np.ndarray, np.ndarray]
"""Embeddings of images and of texts, ``(I, D)`` each."""


def main(
    name: Name,
    runs: Runs,
    embeddings: Annotated[Literal["zero_shot", "separate_models"], typer.Option(help="The frozen embeddings.")] = SEPARATE,
    losses_: Annotated[Names, typer.Option("--losses", parser=names, metavar="A,B,...", help="Losses to compare.")] = Names(
        ("sda", "infonce", MISMATCHED)
    ),
    num_steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 300,
    share: Annotated[float, typer.Option(help="Share of the items with both modalities to hold out.")] = 0.25,
    by_title: Annotated[
        bool, typer.Option("--by-title", help="Hold out all items of a title together, such as the colours of a product.")
    ] = False,
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Train the heads, rank the held-out items; write the tables."""
    check_names("--losses", losses_, LOSSES)
    root = Path("experiments") / "runs" / "aligned_search" / name / embeddings
    tables = []
    for run in [Run.read(text) for text in runs]:
        folder = root / run.label / f"{num_steps}-steps{'-by-title' if by_title else ''}"
        table = adaptation.table_path(Workspace(run.folder / "seed-1"), run.params, embeddings)
        keep_settings(folder / "settings.json", {"share": share, "embeddings": sha256_file(table)})
        placed: dict[str, list[pl.DataFrame]] = {}
        for kind in (BASE, *losses_):
            for seed in seeds:
                path = folder / kind / f"{0 if kind == BASE else seed}.parquet"
                given = run, embeddings, kind, num_steps, share, by_title, seed
                made = kept_table(path, lambda given=given: place(*given))
                placed.setdefault(kind, []).append(made)
        tables += [f"# {run.label}, {embeddings}\n", cross_modal_search.table(placed, run.params)]
    write_results("\n".join(tables), "aligned_search", name)


def place(run: Run, embeddings: str, kind: str, num_steps: int, share: float, by_title: bool, seed: int) -> pl.DataFrame:
    """The positions of the held-out items, in the table of :func:`experiments.cross_modal_search.places`.

    Args:
        run: the run with the embeddings.
        embeddings: ``zero_shot`` or ``separate_models``.
        kind: a loss, or ``zero_shot`` for the frozen embeddings.
        num_steps: number of steps.
        share: share of the items with both modalities to hold out.
        by_title: whether items of the same title are held out together.
        seed: seed of the training.

    Raises:
        TrainingError: no item would be held out, or fewer than two would be left.
    """
    workspace = Workspace(run.folder / "seed-1")
    own = adaptation.table_of(workspace, run.params, embeddings)
    titles = ITEMS.read(run.shop.items).sort("item_id")["title"].to_list() if by_title else None
    known, held_out = cross_modal_search.draw(own.has_image & own.has_text, share, 2, "an image and a text", titles)
    found = prepared(own, known)
    if kind != BASE:
        steps = trained(*found, known, section_of(run.params, kind), kind, [num_steps], seed, run.label)
        *_, (_, heads) = steps
        found = aligned(heads, *found)
    image_ND, text_ND = (each[held_out] for each in found)
    return cross_modal_search.places({"image": image_ND, "text": text_ND}, held_out + 1)


def prepared(own: Vectors, known: np.ndarray) -> Modalities:
    """The frozen embeddings as the heads get them: at most ``WIDTH`` components of the centred unit embeddings.

    Means and principal axes are those of the known items.  Embeddings of equal width are in one space, so images and texts get
    the same axes, and their cosines do not change if the width is at most ``WIDTH``.

    Args:
        own: the embeddings.
        known: rows of the items to train on.
    """
    centred = [_centred(vectors_ID, known) for vectors_ID in (own.image_ID, own.text_ID)]
    if centred[0].shape[1] == centred[1].shape[1]:
        both = np.concatenate(centred)
        halves = np.split(components(both, np.concatenate([known, known + len(centred[0])])), 2)
        return halves[0], halves[1]
    first, second = (components(each, known) for each in centred)
    return first, second


def _centred(vectors_ID: np.ndarray, known: np.ndarray) -> np.ndarray:
    unit_ID = unit_rows(vectors_ID.astype(np.float32))
    return unit_ID - unit_ID[known].mean(axis=0, dtype=np.float64).astype(np.float32)
