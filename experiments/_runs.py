"""What the experiments share: a trained model, its targets placed and kept on disk, the gains of its users, where tables go.

Of a model that was trained with one seed three things are kept in a folder: ``<seed>.parquet``, the positions of the test targets
among all items; ``<seed>.<protocol>.parquet``, those of the same model among sampled ones; ``<seed>.tsv``, its validation curve.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from ruamel.yaml import YAML

from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, ITEMS, POSITIONS, Workspace, write_text, write_tsv
from sda_core.data.demo import ATTRIBUTES, world
from sda_core.evaluation.metrics import Metric, per_user
from sda_core.evaluation.protocols import Protocol
from sda_core.evaluation.significance import bootstrap_interval
from sda_core.fetch.local_files import watched
from sda_core.fingerprint import fingerprint
from sda_core.params import DemoDataset, EvaluateParams, FitParams, Params, RecommenderParams
from sda_core.runtime import prepare_torch
from sda_core.seed import generator
from sda_core.traits import counts_test

mpl.use("Agg")
_log = logging.getLogger("experiments")

Reach = tuple[float, float, float]  # a mean, and the two ends of what is said of it
CUTOFF = 10  # of every table


# ------------------------------------------------------------------------------------------------- training
def positions_path(folder: Path, seed: int, protocol: str = "fullrank") -> Path:
    """Where a seed's positions under a protocol are kept."""
    return folder / (f"{seed}.parquet" if protocol == "fullrank" else f"{seed}.{protocol}.parquet")


def keep_positions(
    workspace: Workspace,
    params: Params,
    section: RecommenderParams,
    seed: int,
    folder: Path,
    *,
    vectors: recommenders.ItemVectors | None = None,
    protocols: Sequence[Protocol] = ("fullrank",),
) -> None:
    """Train with one seed and place the test targets, unless both was done; the best epoch is chosen on the validation targets.

    A run that was stopped goes on from its last validation.

    Args:
        workspace: with ``data/filtered``; its items are the catalogue, whether anybody has met them or not.
        params: its params, of which ``evaluate`` and ``runtime`` are used.
        section: the recommender's settings, whose seed is replaced.
        seed: of the training.
        folder: see the module's docstring.
        vectors: ``(I + 1, D)`` item vectors, row 0 zero (of each modality, where the recommender takes these); None: ids alone.
        protocols: each places the targets of the same trained model.
    """
    wanted: dict[Protocol, Path] = {protocol: positions_path(folder, seed, protocol) for protocol in protocols}
    if all(path.exists() for path in wanted.values()):
        return
    if isinstance(section, FitParams):
        section = section.model_copy(update={"seed": seed})
    device = prepare_torch(params.runtime)
    interactions, num_items = INTERACTIONS.read(workspace.interactions), len(ITEMS.read(workspace.items))
    test = interactions.filter(pl.col("split") == "test")
    data = recommenders.training_data(
        interactions.filter(pl.col("split").is_in(["train", "valid"])),
        num_users=interactions["user_id"].n_unique(),
        num_items=num_items,
        leaked_test_items=test["item_id"].to_numpy() if counts_test(section) else None,
    )
    model = recommenders.build(section, data.num_users, data.num_items, vectors)
    scratch = folder / f".{seed}.checkpoint.safetensors"
    inputs = fingerprint(section, workspace.interactions, "" if vectors is None else recommenders.hash_vectors(vectors))
    records = model.fit(data, checkpoint=scratch, fingerprint=inputs, device=device)
    known = recommenders.evaluation_data(interactions, num_items=num_items)
    write_tsv(folder / f"{seed}.tsv", records)
    for protocol, path in wanted.items():
        candidates = evaluation.candidates(protocol, interactions, params.evaluate.negatives_seed, num_items)
        placed = ranking.place_targets(model, known, candidates, params.evaluate.batch_size, device)
        POSITIONS.write(evaluation.score_positions(placed, params.evaluate.ties), path)
    scratch.unlink(missing_ok=True)
    _log.info("%s/%s, seed %d: %d epochs", folder.parent.name, folder.name, seed, len(records))


def epochs(folder: Path, seeds: Sequence[int]) -> str:
    """``best of all`` epochs by seed, as the validation curves have it; empty where nothing was trained."""
    found = []
    for seed in seeds:
        path = folder / f"{seed}.tsv"
        if path.exists() and path.stat().st_size:
            curve = pl.read_csv(path, separator="\t", schema_overrides={"is_best": pl.Boolean})
            found.append(f"{curve.filter('is_best')['epoch'].max() or 0} of {len(curve)}")
    return ", ".join(found)


def save_params(params: Any, target: Path) -> None:
    """Write a tree of params that was changed, with the ``local_files`` that follow from it in the target's folder."""
    params["local_files"] = watched(params["dataset"], params["backbone"], target.parent)
    with target.open("w", encoding="utf-8") as stream:
        YAML().dump(params, stream)


# ------------------------------------------------------------------------------------------------- numbers
def read_positions(folder: Path, seeds: Sequence[int], protocol: str = "fullrank") -> list[pl.DataFrame]:
    """What :func:`keep_positions` kept, a table a seed, sorted by user."""
    return [POSITIONS.read(positions_path(folder, seed, protocol)).sort("user_id") for seed in seeds]


def gains(metric: Metric, frames: Sequence[pl.DataFrame], mask: np.ndarray | None = None) -> np.ndarray:
    """The metric of each user ``(S, U)``, a row a seed; of the users in ``mask`` only, where one is given."""
    chosen = slice(None) if mask is None else mask
    return np.array([per_user(metric, frame["position"].to_numpy()[chosen], CUTOFF) for frame in frames])


def interval(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> tuple[float, float]:
    """95 % bootstrap interval over users of the mean over seeds and users.

    Args:
        gain_SU: ``(S, U)``; differences give a paired interval.
        params: number and seed of the resamples.
        purpose: what the draws are for; equal words give equal draws.
    """
    return bootstrap_interval(gain_SU.mean(0), params.bootstrap_samples, generator(params.bootstrap_seed, purpose))


def reach(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> Reach:
    """The mean of ``(S, U)``, and its :func:`interval`."""
    return float(gain_SU.mean()), *interval(gain_SU, params, purpose)


def difference(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> str:
    """The cell of a table: the :func:`reach` of differences ``(S, U)``."""
    mean, low, high = reach(gain_SU, params, purpose)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def over_seeds(gain_SU: np.ndarray) -> str:
    """The cell of a table: the least and the largest mean of a seed."""
    of_seeds = gain_SU.mean(1)
    return f"{of_seeds.min():+.4f} .. {of_seeds.max():+.4f}"


# ------------------------------------------------------------------------------------------------- items
def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """The rows at length 1; zero stays zero."""
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)


def found(path: Path, limit: int = 2000) -> float:
    """How often an item's picture and words find each other first: the share over both directions.

    Args:
        path: an embeddings file.
        limit: items are drawn down to so many, always the same ones; among more of them it is harder to be first.

    Returns:
        0 to 1; 1 / number of items by chance.  Items without a picture do not take part, equally near ones count as found.
    """
    frame = EMBEDDINGS.read(path).filter(pl.col("image_embedding").is_not_null()).sort("item_id")
    rows = np.sort(generator(0, "found").permutation(len(frame))[:limit])
    image_ND, text_ND = (unit(frame[name].to_numpy()[rows]) for name in ("image_embedding", "text_embedding"))
    similarity_NN = image_ND @ text_ND.T
    own_N = similarity_NN.diagonal()
    return float(np.mean([(own_N >= similarity_NN.max(axis)).mean() for axis in (0, 1)]))


def shop_attributes(workspace: Workspace, dataset: DemoDataset) -> dict[str, np.ndarray]:
    """What is true of the built-in shop's items: the values of each attribute, in the order of the item ids."""
    shop = world(dataset)
    place = {asin: item for item, asin in enumerate(shop.asins)}
    rows = np.array([place[raw_id] for raw_id in ITEMS.read(workspace.items).sort("item_id")["raw_item_id"]])
    return {name: shop.attributes[name][rows] for name in ATTRIBUTES}


# ------------------------------------------------------------------------------------------------- results
def leave(text: str, script: str, name: str = "", root: Path | str = "") -> Path:
    """Print a script's final tables and leave them where ``sda report --experiments`` finds them.

    Args:
        text: markdown; a heading is the caption of the tables under it.
        script: its name.
        name: of the experiment, where the script has several.
        root: the project folder; one with ``{seed}`` in it stands for many, and the current folder is taken.

    Returns:
        ``experiments/results/<script>-<name>``, which has ``table.md`` now; a plot goes beside it as ``plot.png``.
    """
    print(text)
    project = Path() if "{seed}" in str(root) else Path(root)
    folder = project / "experiments" / "results" / (script if name in ("", script) else f"{script}-{name}")
    write_text(folder / "table.md", text.rstrip("\n") + "\n")
    return folder


def dots(path: Path, panels: Mapping[str, Mapping[str, Reach]], label: str, *, zero: bool = False, columns: int = 3) -> None:
    """A plot: in each panel a line for each name, with a dot at the mean and a bar over its reach.

    Args:
        path: of the picture.
        panels: by title; panels of a row of the plot share their names where these are the same.  Without any nothing is drawn.
        label: of the horizontal axes.
        zero: draw where nothing changes.
        columns: panels side by side, at most.
    """
    from matplotlib import pyplot as plt

    if not panels:
        return
    wide = min(columns, len(panels))
    high = -(-len(panels) // wide)
    lines = max(len(rows) for rows in panels.values())
    size = (3.6 * wide + 1.6, (0.27 * lines + 1.0) * high)
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for place, (axis, (title, rows)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        values = np.array(list(rows.values())).reshape(-1, 3)
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        heights = -np.arange(len(rows))
        axis.errorbar(values[:, 0], heights, xerr=errors, fmt="o", color="#1f5fa8", capsize=3)
        if zero:
            axis.axvline(0.0, color="#666666", linestyle="--", linewidth=1)
        beside = place % wide > 0 and list(rows) == list(list(panels.values())[place - 1])
        axis.set_yticks(heights, [""] * len(rows) if beside else list(rows), fontsize=8)
        axis.set_ylim(-len(rows) + 0.4, 0.6)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
