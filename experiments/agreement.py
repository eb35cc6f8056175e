"""Compare VBPR of Cornac and SASRec of RecBole with ours, on our export.

The input is a project folder with data/filtered and the vectors of a variant.  The data is exported by
`sda export --format recbole` (docs/exchange.md).  The other library is trained by another Python, in which this project is not
installed, on one thread.  It returns a score of every item for every user.  These scores are evaluated like those of our
recommenders: all items except the history, the same rule for ties, the same intervals over users and seeds.  The library's own
metric of the same scores is shown, too.

==========  =========================================================================================================
ours        this project, with settings that the other library also has (MATCHED)
theirs      Cornac or RecBole
default     this project, with the settings of params.yaml
control     an error that has to show: our VBPR on the vectors of wrong items, our SASRec with BCE and one negative
==========  =========================================================================================================

Cornac's VBPR has no validation.  So our VBPR is trained once with SEARCH_SEED to find the epoch with the best NDCG@10 on the
validation targets.  Then both sides train for that number of epochs and keep the last weights.  Both SASRecs keep the weights
of their best validation.

--changes trains the other library again with some of our choices, one row for each change, to find the cause of a difference.
The changes are in experiments/agreement_sides.py (`sasrec:scaled+dropped` makes two of them together).

The two sides agree if the difference of their means is within the larger of their two ranges over seeds, or if the paired
interval of the difference contains 0 and is within 10 % of the level in both directions.

    python -m venv cornac && cornac/bin/pip install cornac
    python -m venv recbole && recbole/bin/pip install "recbole==1.2.1" "numpy<2" "pandas<3" "setuptools<80"
    python -m experiments agreement --cornac cornac/bin/python --recbole recbole/bin/python --variant zero_shot --seeds 1,2,3

Positions are kept below the project's experiments/positions/agreement, so a stopped run resumes.  Tables are written to
experiments/results/agreement; with --users N, to experiments/results/agreement-N.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from torch import Tensor

from experiments.options import THREE_SEEDS, Root, Seeds
from experiments.study import (
    CUTOFF,
    check_names,
    gains,
    interval,
    interval_cell,
    is_complete,
    keep_positions,
    logger,
    markdown_table,
    positions_path,
    read_positions,
    write_results,
)
from experiments.workspaces import link, project_params, vectors_of
from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import INTERACTIONS, ITEMS, POSITIONS, USERS, Workspace, read_json, write_json
from sda_core.cli.export import export
from sda_core.cli.scripts import Names, names
from sda_core.errors import ArtifactError, DataError
from sda_core.evaluation.metrics import Metric
from sda_core.exchange import Format
from sda_core.exchange.recbole import token
from sda_core.params import EvaluateParams, Params, RecommenderParams, SASRecParams, VBPRParams
from sda_core.recommenders.base import EpochRecord, Recommender
from sda_core.recommenders.batches import TrainingData
from sda_core.recommenders.pairs import INITIAL_STD

SIDES_FILE = Path(__file__).resolve().with_name("agreement_sides.py")
LIBRARY = {"vbpr": "cornac", "sasrec": "recbole"}
SEARCH_SEED = 0  # the training that finds VBPR's number of epochs; not a seed of the tables
WIDTH = 0.1  # as a share of the level; a wider interval decides nothing
TARGETS_PER_STEP = 1024  # in both SASRecs
MATCHED: dict[str, dict[str, Any]] = {
    # Cornac has one weight for E and beta', and no penalty of the projected items.
    "vbpr": {"content_item_regularization": 0.0, "content_bias_regularization": 1e-4, "content_regularization": 1e-4},
    # RecBole uses all items as negatives and pads each row to the longest; 99 % of a week's histories have at most 20 items.
    "sasrec": {"loss": "softmax", "max_length": 20},
}
CONTROL: dict[str, dict[str, Any]] = {"vbpr": {}, "sasrec": {"loss": "bce", "num_negatives": 1}}
CHANGES = {"vbpr": ("bias", "start"), "sasrec": ("scaled", "dropped", "unnormed", "ends")}
METRICS: tuple[Metric, ...] = ("ndcg", "hit")


def main(
    root: Root = Path(),
    cornac: Annotated[Path | None, typer.Option(help="Python interpreter with Cornac.", show_default=False)] = None,
    recbole: Annotated[Path | None, typer.Option(help="Python interpreter with RecBole.", show_default=False)] = None,
    variant: Annotated[str, typer.Option(help="Variant whose vectors VBPR uses.")] = "zero_shot",
    models: Annotated[Names, typer.Option(parser=names, metavar="A,B,...", help="Models to train.")] = Names(LIBRARY),
    seeds: Seeds = THREE_SEEDS,
    changes: Annotated[
        list[str] | None,
        typer.Option("--changes", help="MODEL:CHANGE, a change of the other library.  Repeat it for more.", show_default=False),
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="Use only this many users, the first ones, on both sides.", show_default=False)
    ] = None,
) -> None:
    """Export, train what is missing on both sides, write the tables; without an interpreter only our side is trained."""
    check_names("--models", models, LIBRARY)
    check_names("--changes", [change.partition(":")[0] for change in changes or []], LIBRARY)
    params = project_params(root)
    name = "agreement" if users is None else f"agreement-{users}"
    folder = root / "experiments" / "positions" / name
    workspace = Workspace(root) if users is None else first_users(Workspace(root), users, variant, folder / "project")
    exported = folder / "export" / "shop"
    if not exported.exists():
        exported.parent.mkdir(parents=True, exist_ok=True)
        export(Format.RECBOLE, exported, variant, workspace.root)
    pythons = {"vbpr": cornac, "sasrec": recbole}
    for model in models:
        train_ours(workspace, params, model, ("ours",), variant, seeds, folder / model)
        own_changes = ["", *(change.partition(":")[2] for change in changes or [] if change.startswith(f"{model}:"))]
        if (python := pythons[model]) is not None:
            for change in own_changes:
                train_theirs(workspace, params, model, change, seeds, folder / model, exported, python)
        train_ours(workspace, params, model, ("control", "default"), variant, seeds, folder / model)
    done = [model for model in LIBRARY if is_complete(folder / model / "theirs", seeds)]
    tables = [table(folder, done, seeds, params.evaluate), same_lists(folder, done, seeds)]
    write_results("\n".join(tables), "agreement", "" if users is None else str(users), root)


def first_users(source: Workspace, users: int, variant: str, folder: Path) -> Workspace:
    """Make a project with the first users of another project, all of its items and the vectors of a variant."""
    workspace = Workspace(folder)
    if not workspace.interactions.exists():
        link(workspace.root / "params.yaml", source.root / "params.yaml")
        link(workspace.embeddings(variant), source.embeddings(variant))
        link(workspace.items, source.items)
        USERS.write(USERS.read(source.users).filter(pl.col("user_id") <= users), workspace.users)
        INTERACTIONS.write(INTERACTIONS.read(source.interactions).filter(pl.col("user_id") <= users), workspace.interactions)
    return workspace


# ------------------------------------------------------------------------------------------------------------ trainings
def sections(params: Params, model: str, num_users: int, num_targets: int) -> dict[str, RecommenderParams]:
    """Our settings by row: ``ours``, ``default`` and ``control``.

    Args:
        params: the params of the project.
        model: ``vbpr`` or ``sasrec``.
        num_users: number of users with two or more items in training.
        num_targets: number of SASRec's targets in an epoch.  A row of our batches has all targets of a user, a row of
            RecBole's has one, so the batch size is scaled to the same number of targets for each step.
    """
    default = params.train_recommender.of(model)
    changes = dict(MATCHED[model])
    if model == "sasrec":
        changes["batch_size"] = round(TARGETS_PER_STEP * num_users / num_targets)
    ours = default.model_copy(update=changes)
    return {"ours": ours, "default": default, "control": ours.model_copy(update=CONTROL[model])}


def their_settings(section: RecommenderParams) -> dict[str, Any]:
    """Our settings as arguments of Cornac's VBPR or RecBole's SASRec.

    Cornac sums the loss over a batch and halves squared lengths, so a penalty of the mean loss is doubled for it.  The penalty
    of E is added once for each step, so it is also multiplied by the batch size.
    """
    if isinstance(section, VBPRParams):
        return {
            "k": section.factor_size, "k2": section.content_factor_size, "batch_size": section.batch_size,
            "learning_rate": section.learning_rate, "n_epochs": section.max_epochs,
            "lambda_w": 2 * section.embedding_regularization, "lambda_b": 2 * section.embedding_regularization,
            "lambda_e": 2 * section.batch_size * section.content_regularization,
        }  # fmt: skip
    assert isinstance(section, SASRecParams)
    return {
        "hidden_size": section.hidden_size, "inner_size": section.hidden_size, "n_layers": section.num_blocks,
        "n_heads": section.num_heads, "hidden_dropout_prob": section.dropout, "attn_dropout_prob": section.dropout,
        "hidden_act": "relu", "loss_type": "CE", "learning_rate": section.learning_rate,
        "MAX_ITEM_LIST_LENGTH": section.max_length,
        "train_batch_size": TARGETS_PER_STEP, "max_epochs": section.max_epochs, "eval_every": section.eval_every,
        "patience": section.patience,
    }  # fmt: skip


def fixed_epochs(section: RecommenderParams, curve: Path) -> RecommenderParams:
    """A section that trains for the best number of epochs of a validation curve and keeps the last weights."""
    records = pl.read_csv(curve, separator="\t", schema_overrides={"is_best": pl.Boolean})
    best = int(records.filter("is_best")["epoch"].max() or 0)  # type: ignore[arg-type]
    return section.model_copy(update={"max_epochs": best, "eval_every": best})


def all_sections(workspace: Workspace, params: Params, model: str, folder: Path) -> dict[str, RecommenderParams]:
    """:func:`sections` of a project's data; of VBPR with the number of epochs that ``search`` found, once it is there."""
    lengths = INTERACTIONS.read(workspace.interactions).filter(pl.col("split") == "train").group_by("user_id").len()["len"]
    of_row = sections(params, model, int((lengths > 1).sum()), int((lengths - 1).sum()))
    curve = folder / "search" / f"{SEARCH_SEED}.tsv"
    if model == "vbpr":
        of_row["search"] = of_row["ours"]
        if curve.exists():
            of_row |= {row: fixed_epochs(of_row[row], curve) for row in ("ours", "control")}
    return of_row


def train_ours(
    workspace: Workspace, params: Params, model: str, rows: Sequence[str], variant: str, seeds: Sequence[int], folder: Path
) -> None:
    """Train our rows with every seed, unless their positions exist, and record the processor seconds."""
    vectors = vectors_of(workspace, params, variant) if model == "vbpr" else None
    if model == "vbpr":
        section = all_sections(workspace, params, model, folder)["search"]
        keep_timed(workspace, params, section, SEARCH_SEED, folder / "search", vectors)
    of_row = all_sections(workspace, params, model, folder)
    for row in rows:
        for seed in seeds:
            given = vectors
            if vectors is not None and row == "control":
                given = vectors.copy()
                given[1:] = np.random.default_rng(seed).permutation(vectors[1:])
            keep_timed(workspace, params, of_row[row], seed, folder / row, given)


def keep_timed(
    workspace: Workspace, params: Params, section: RecommenderParams, seed: int, folder: Path, vectors: np.ndarray | None
) -> None:
    """:func:`experiments.study.keep_positions`, with its processor seconds in ``<seed>.json``."""
    if positions_path(folder, seed).exists():
        return
    begin = time.process_time()
    keep_positions(workspace, params, section, seed, folder, vectors=vectors)
    write_json(folder / f"{seed}.json", {"seconds": time.process_time() - begin})


def change_of(model: str, change: str) -> dict[str, Any]:
    """The settings that a row of --changes adds to those of the other library; none for the unchanged library.

    Raises:
        ConfigError: the change is unknown.
    """
    if not change:
        return {}
    check_names("--changes", change.split("+"), CHANGES[model])
    return {"changes": change.split("+")} | ({"initial_std": INITIAL_STD} if "start" in change.split("+") else {})


def train_theirs(
    workspace: Workspace,
    params: Params,
    model: str,
    change: str,
    seeds: Sequence[int],
    folder: Path,
    exported: Path,
    python: Path,
) -> None:
    """Train the other library, unchanged or with a change, with every seed, unless its positions exist.

    Raises:
        ArtifactError: the other library failed.
    """
    settings = their_settings(all_sections(workspace, params, model, folder)["ours"]) | change_of(model, change)
    for seed in seeds:
        keep_theirs(workspace, params, model, seed, folder / their_row(change), exported, python, settings)


def their_row(change: str) -> str:
    """The name of a row of the other library."""
    return f"theirs+{change}" if change else "theirs"


def keep_theirs(
    workspace: Workspace,
    params: Params,
    model: str,
    seed: int,
    folder: Path,
    exported: Path,
    python: Path,
    settings: Mapping[str, Any],
) -> None:
    """Train the other library once; write positions by our evaluation, and its own metrics to ``<seed>.json``.

    Raises:
        ArtifactError: the other library failed.
    """
    if positions_path(folder, seed).exists():
        return
    scratch = folder / f".{seed}"
    scratch.mkdir(parents=True, exist_ok=True)
    one_thread = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | one_thread
    request = {"side": LIBRARY[model], "seed": seed, "settings": settings}
    command = [str(python.absolute()), str(SIDES_FILE), str(exported.absolute()), str(scratch.absolute()), json.dumps(request)]
    done = subprocess.run(command, check=False, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, cwd=scratch)
    if done.returncode:
        raise ArtifactError(str(folder), f"{LIBRARY[model]} ended with {done.returncode}", "see the lines above")
    result = read_json(scratch / "result.json", "result of the other library")
    placed = place_scores(workspace, params, model, scratch / "scores.npy", result.pop("users"), result.pop("items"))
    write_json(folder / f"{seed}.json", result | {"settings": settings})
    POSITIONS.write(placed, positions_path(folder, seed))
    shutil.rmtree(scratch)
    logger.info("%s of %s, seed %d: %s", model, LIBRARY[model], seed, result["metrics"])


# ----------------------------------------------------------------------------------------------- scores of another library
class GivenScores(Recommender):
    """A recommender with given scores, to evaluate the scores of another library like our own."""

    def __init__(self, params: RecommenderParams, score_UI: np.ndarray) -> None:
        super().__init__(params, score_UI.shape[0] - 1, score_UI.shape[1] - 1, None)
        self.score_UI = score_UI

    def fit(self, data: TrainingData, *, checkpoint: Path, fingerprint: str, device: torch.device) -> list[EpochRecord]:
        """Not implemented: the scores are given."""
        raise NotImplementedError

    def _score(self, user_ids_B: Tensor, history_BL: Tensor) -> Tensor:  # noqa: ARG002 (contract)
        return torch.from_numpy(self.score_UI[user_ids_B.numpy()])


def place_scores(
    workspace: Workspace, params: Params, model: str, scores: Path, users: Sequence[str], items: Sequence[str]
) -> pl.DataFrame:
    """Evaluate the scores of another library, by the tokens of an export, with our evaluation.

    Args:
        workspace: project with the exported interactions.
        params: params of the project; ``evaluate`` has the rule for ties.
        model: name of our recommender; messages use its section of the params.
        scores: file of a NumPy array ``(len(users), len(items))``; the scores of the history may be included.
        users, items: tokens of its rows and columns, in any order.

    Returns:
        POSITIONS table.

    Raises:
        DataError: the scores of an item or of a user with a test target are missing, or a token is unknown to the shop.
    """
    interactions = INTERACTIONS.read(workspace.interactions)
    raw_items, raw_users = ITEMS.read(workspace.items), USERS.read(workspace.users)
    item_of = {token(raw): item for item, raw in raw_items.select("item_id", "raw_item_id").iter_rows()}
    user_of = {token(raw): user for user, raw in raw_users.select("user_id", "raw_user_id").iter_rows()}
    needed = set(evaluation.evaluated_users(interactions).tolist())
    for kind, found, known, wanted in (
        ("item", items, item_of, set(item_of.values())),
        ("user", users, user_of, needed),
    ):
        if unknown := [name for name in found if name not in known]:
            raise DataError(
                str(scores), f"has scores of {len(unknown)} {kind}s that the shop does not have, such as {unknown[0]!r}"
            )
        if missing := wanted - {known[name] for name in found}:
            raise DataError(str(scores), f"has no scores of {len(missing)} {kind}s of the shop, such as number {min(missing)}")
    given = np.load(scores, mmap_mode="r", allow_pickle=False)
    if given.shape != (len(users), len(items)):
        raise DataError(str(scores), f"should have {len(users)} rows and {len(items)} columns (got shape {given.shape})")
    score_UI = np.full((len(user_of) + 1, len(item_of) + 1), -np.inf, dtype=given.dtype)
    columns = np.array([item_of[name] for name in items])
    for row, name in enumerate(users):
        score_UI[user_of[name], columns] = given[row]
    foreign = GivenScores(params.train_recommender.of(model), score_UI)
    known_data = recommenders.evaluation_data(interactions, num_users=len(user_of), num_items=len(item_of))
    placed = ranking.place_targets(foreign, known_data, None, params.evaluate.batch_size, torch.device("cpu"))
    return evaluation.score_positions(placed, params.evaluate.ties)


# --------------------------------------------------------------------------------------------------------------- tables
def agree(ours_SU: np.ndarray, theirs_SU: np.ndarray, low: float, high: float) -> str:
    """The verdict by the rule in the module's docstring.

    Args:
        ours_SU, theirs_SU: a metric by seed and user.
        low, high: paired interval of ours minus theirs.
    """
    difference = abs(ours_SU.mean() - theirs_SU.mean())
    spread = max(float(np.ptp(values.mean(1))) for values in (ours_SU, theirs_SU))
    bound = WIDTH * theirs_SU.mean()
    if difference <= spread:
        return "yes: within the range over seeds"
    if -bound < low <= 0.0 <= high < bound:
        return "yes: the interval contains 0"
    return "no" if not low <= 0.0 <= high else "open: the interval is wide"


def table(folder: Path, models: Sequence[str], seeds: Sequence[int], params: EvaluateParams) -> str:
    """The markdown table of all rows: level, difference between ours and the other library, verdict, seconds.

    Our rows are compared with the unchanged library, and a changed library with our matched row.
    """
    lines = []
    for model in models:
        theirs = read_positions(folder / model / "theirs", seeds)
        for row in ("theirs", *rows_of(folder / model, seeds)):
            frames = read_positions(folder / model / row, seeds)
            cells = [model, row.replace("theirs", LIBRARY[model])]
            cells += [with_range(gains(metric, frames)) for metric in METRICS]
            if row == "theirs":
                cells += ["", ""]
            else:
                pair = (read_positions(folder / model / "ours", seeds), frames) if row.startswith("theirs") else (frames, theirs)
                ours_SU, theirs_SU = (gains("ndcg", part) for part in pair)
                low, high = interval(ours_SU - theirs_SU, params, "agreement")
                cells.append(interval_cell((float((ours_SU - theirs_SU).mean()), low, high)))
                cells.append(verdict_of(row, agree(ours_SU, theirs_SU, low, high)))
            spent = [read_json(folder / model / row / f"{seed}.json", "result")["seconds"] for seed in seeds]
            lines.append([*cells, f"{np.mean(spent):.0f}"])
    heads = ["model", "row", *(f"{name}@{CUTOFF} (range over seeds)" for name in ("NDCG", "Hit"))]
    heads += [f"NDCG@{CUTOFF}, ours minus the library's [95 %]", "agrees", "processor seconds per training"]
    return markdown_table(heads, lines, "Our results and those of the other library")


def verdict_of(row: str, verdict: str) -> str:
    """The cell of a row; if the control does not differ, agreement of the other rows says little."""
    return f"{verdict}; the control should differ: use more users" if row == "control" and verdict != "no" else verdict


def rows_of(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The complete rows except ``theirs``, in order."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in ("ours", "theirs", "search"))
    return [row for row in ("ours", *found) if is_complete(folder / row, seeds)]


def with_range(gain_SU: np.ndarray) -> str:
    """A cell of the table: the mean over seeds and users, and the smallest and the largest mean of a seed."""
    of_seeds = gain_SU.mean(1)
    return f"{gain_SU.mean():.4f} ({of_seeds.min():.4f} .. {of_seeds.max():.4f})"


def same_lists(folder: Path, models: Sequence[str], seeds: Sequence[int]) -> str:
    """The markdown table that compares the other library's own metrics with ours, for the same scores."""
    lines = []
    for model in models:
        for seed, frame in zip(seeds, read_positions(folder / model / "theirs", seeds), strict=True):
            own = read_json(folder / model / "theirs" / f"{seed}.json", "result")["metrics"]
            cells = [model, LIBRARY[model], str(seed)]
            for metric in METRICS:
                ours = float(gains(metric, [frame]).mean())
                cells += [f"{ours:.6f}", f"{own[metric]:.6f}", f"{abs(ours - own[metric]):.1e}"]
            kept = own.get("ndcg_with_history")
            lines.append([*cells, str(int((frame["num_tied"] > 0).sum())), "" if kept is None else f"{kept:.6f}"])
    heads = ["model", "library", "seed"]
    heads += [f"{name}@{CUTOFF}, {what}" for name in ("NDCG", "Hit") for what in ("ours", "the library's", "difference")]
    heads += ["tied targets", "the library's NDCG with the history in the list"]
    return markdown_table(heads, lines, "The same scores, evaluated by us and by the library")
