"""Choose settings of the fusion on validation targets of several shops.

The stored image and text vectors of finished runs of ``adaptation`` are fused again with each candidate, and recommenders rank
the validation targets by them: alone (``content``), and next to ids (``id+content``).  Test targets are not ranked, and no
backbone is run.

    python -m experiments fusion_settings --name center --try center=true \\
        --runs week=experiments/runs/adaptation/hm --runs shop=experiments/runs/adaptation/shop

A candidate changes settings of ``export_embeddings``; the settings of each run's params are the reference.  The kinds of
vectors are those of ``adaptation`` that it can scale evenly (``zero_shot``, ``text_only``, ``separate_models``, ...).  Results
are kept below each run's folder ``shop/validation``, so a stopped run resumes.

The first table has the NDCG@10 of the reference and of each candidate, and the difference with a 95 % interval over users and
seeds.  The second table has, for each candidate, recommender and use of ids, the mean over runs and kinds of vectors of the
relative difference, and the numbers of intervals above and below 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer

from experiments import adaptation
from experiments.adaptation import CAN_BE_EVEN, IDS
from experiments.nearest_items import Run, Runs
from experiments.options import THREE_SEEDS, Name, Recommenders, Seeds
from experiments.recommender_settings import changed, validated
from experiments.study import CUTOFF, check_names, interval_cell, markdown_table, mean_and_interval, write_results
from experiments.workspaces import BASE, padded
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.fingerprint import fingerprint
from sda_core.params import ExportParams, RecommenderParams
from sda_core.traits import seeds_of

FUSION = ("fusion", "fused_dim", "center", "normalize", "image_weight", "text_weight", "balance", "axis_scaling")
"""The settings of ``export_embeddings`` that a candidate may change."""
USES = {"content": "", "id+content": IDS}
"""The two ways in which vectors are used, and the prefix of the vectors' name in ``adaptation``."""

Candidates = Annotated[
    list[str],
    typer.Option(
        "--try",
        metavar="A=1,B=2",
        help="A candidate: the settings of export_embeddings that it changes.  Repeat it for more.",
    ),
]
Vectors = Annotated[Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="The vectors to fuse.")]


@dataclass(frozen=True)
class Cell:
    """A recommender with one kind of vectors in one run.

    Attributes:
        run: label of the run.
        vector: the kind of vectors.
        recommender: name of the recommender.
        use: ``content`` or ``id+content``.
    """

    run: str
    vector: str
    recommender: str
    use: str


def main(
    name: Name,
    runs: Runs,
    candidates: Candidates,
    vectors: Vectors = Names((BASE,)),
    recommenders: Recommenders = Names(("nearest",)),
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Rank the validation targets with every fusion; write the tables."""
    check_names("--vectors", vectors, CAN_BE_EVEN)
    for candidate in candidates:
        check_candidate(candidate)
    found = [Run.read(run) for run in runs]
    for run in found:
        for recommender in recommenders:
            adaptation.check_recommender(run.params, recommender, [f"{IDS}{vectors[0]}"])
        for candidate in candidates:  # before anything is computed
            changed(run.params.export_embeddings, candidate)
    measured: dict[Cell, dict[str, np.ndarray]] = {}
    for run in found:
        for vector in vectors:
            for recommender in recommenders:
                for use in USES:
                    cell = Cell(run.label, vector, recommender, use)
                    measured[cell] = {
                        candidate: ndcg(run, candidate, vector, recommender, use, seeds) for candidate in ("", *candidates)
                    }
    by_label = {run.label: run for run in found}
    write_results(differences(measured, by_label) + "\n" + summary(measured, by_label), "fusion_settings", name)


def check_candidate(candidate: str) -> None:
    """Check that a candidate changes the fusion, and each setting once.

    Raises:
        ConfigError: it does not.
    """
    changes = [change.partition("=")[0] for change in candidate.split(",")]
    for change in changes:
        if change not in FUSION:
            raise ConfigError("--try", f"expected NAME=VALUE, with NAME one of {', '.join(FUSION)} (got {candidate!r})")
        if changes.count(change) > 1:
            raise ConfigError("--try", f"changes {change} twice (got {candidate!r})")


def ndcg(run: Run, candidate: str, vector: str, recommender: str, use: str, seeds: Sequence[int]) -> np.ndarray:
    """NDCG@10 of the validation targets, ``(S, U)``; one row for a recommender without a seed.

    Args:
        run: the finished run.
        candidate: the changes of ``export_embeddings``, as ``A=1,B=2``.
        vector: the kind of vectors.
        recommender: name of the recommender.
        use: a key of :data:`USES`.
        seeds: seeds of the recommender.

    Raises:
        ConfigError: the run has no embeddings of this kind.
    """
    workspace = run.workspace(vector, seeds[0])
    if workspace is None:
        raise ConfigError("--vectors", f"{run.label} has no embeddings for {vector}", "run experiments adaptation with it")
    settings = changed(run.params.export_embeddings, candidate)
    section = adaptation.as_in_the_pipeline(run.params.train_recommender.of(recommender), f"{USES[use]}{vector}")
    return np.array([_ndcg(run, workspace, settings, section, vector, seed) for seed in seeds_of(section, seeds)])


def _ndcg(
    run: Run, workspace: Workspace, settings: ExportParams, section: RecommenderParams, vector: str, seed: int
) -> list[float]:
    """NDCG@10 of the validation targets ``(U,)`` with one seed, from the file of an earlier call if there is one."""
    table = adaptation.table_path(workspace, run.params, _variant_of(vector))
    made_of = fingerprint(settings, section, table, str(seed))
    path = run.shop.root / "validation" / section.kind / vector / f"{made_of}.json"

    def vectors() -> np.ndarray:
        return padded(adaptation.fused_again(workspace, run.params, settings, vector))

    return validated(path, run.shop, run.params, section, vectors, seed)["ndcg"]


def _variant_of(vector: str) -> str:
    """The variant whose table has the image and text vectors of a kind."""
    return BASE if vector == adaptation.OTHER_IMAGES else adaptation.PARTS.get(vector, vector)


def differences(measured: Mapping[Cell, Mapping[str, np.ndarray]], runs: Mapping[str, Run]) -> str:
    """Markdown table: a row for each cell and candidate."""
    rows: list[list[str]] = []
    for cell, of_candidates in measured.items():
        reference_SU = of_candidates[""]
        for candidate, ndcg_SU in of_candidates.items():
            if not candidate:
                continue
            gain = mean_and_interval(ndcg_SU - reference_SU, runs[cell.run].params.evaluate, str(cell))
            row = [cell.run, cell.vector, cell.recommender, cell.use, candidate]
            rows.append([*row, f"{reference_SU.mean():.4f}", f"{ndcg_SU.mean():.4f}", interval_cell(gain)])
    heads = ["run", "vectors", "recommender", "use", "settings", "reference", "NDCG@10", "difference [95 %]"]
    return markdown_table(heads, rows, f"NDCG@{CUTOFF} of the validation targets")


def summary(measured: Mapping[Cell, Mapping[str, np.ndarray]], runs: Mapping[str, Run]) -> str:
    """Markdown table: a row for each candidate, recommender and use, over all runs and kinds of vectors."""
    rows: list[list[str]] = []
    candidates = [candidate for candidate in next(iter(measured.values())) if candidate]
    kinds = dict.fromkeys((cell.recommender, cell.use) for cell in measured)
    for candidate in candidates:
        for recommender, use in kinds:
            relative: list[float] = []
            above = below = 0
            for cell, of_candidates in measured.items():
                if (cell.recommender, cell.use) != (recommender, use):
                    continue
                gain_SU = of_candidates[candidate] - of_candidates[""]
                low, high = mean_and_interval(gain_SU, runs[cell.run].params.evaluate, str(cell))[1:]
                above, below = above + (low > 0), below + (high < 0)
                relative.append(float(gain_SU.mean() / of_candidates[""].mean()))
            row = [candidate, recommender, use, f"{np.mean(relative):+.1%}", str(above), str(below), str(len(relative))]
            rows.append(row)
    heads = ["settings", "recommender", "use", "relative difference, mean", "intervals above 0", "below 0", "of"]
    return markdown_table(heads, rows, "All runs and kinds of vectors")
