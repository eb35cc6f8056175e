"""Code shared by the experiments: stored results of trained models, per-user metrics, intervals, tables, plots.

A model trained with one seed has three files in a folder: ``<seed>.parquet``, the positions of the test targets among all
items; ``<seed>.<protocol>.parquet``, those of the same model among sampled items; ``<seed>.tsv``, its validation curve.
Existing files are never computed again, so that an interrupted experiment resumes.

Dimensions: S seeds, U users, N items, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl

from sda_core import evaluation, ranking, recommenders
from sda_core.artifacts import (
    EMBEDDINGS,
    INTERACTIONS,
    ITEMS,
    POSITIONS,
    Workspace,
    read_json,
    write_json,
    write_parquet,
    write_text,
    write_tsv,
)
from sda_core.data.demo import ATTRIBUTES, world
from sda_core.errors import ArtifactError, ConfigError
from sda_core.evaluation.metrics import Metric, per_user
from sda_core.evaluation.protocols import Protocol
from sda_core.fingerprint import fingerprint
from sda_core.params import DemoDataset, EvaluateParams, Params, RecommenderParams
from sda_core.runtime import prepare_torch
from sda_core.seed import generator
from sda_core.traits import counts_test
from sda_core.unit_rows import unit_rows

mpl.use("Agg")
logger = logging.getLogger("experiments")

Interval = tuple[float, float, float]  # mean, low, high
Panels = dict[str, dict[str, Interval]]  # panels of a plot: by title of the panel, by name of the line
CUTOFF = 10  # cut-off in every table
PROTOCOLS: tuple[Protocol, ...] = ("fullrank", "uni100")  # for experiments that rank among all items and among sampled ones


# ------------------------------------------------------------------------------------------------- training
def positions_path(folder: Path, seed: int, protocol: str = "fullrank") -> Path:
    """Path of a seed's positions under a protocol."""
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
    """Train with one seed and rank the test targets, unless this was done; the best epoch is chosen on the validation targets.

    An interrupted run resumes from its last validation.

    Args:
        workspace: workspace with ``data/filtered``; its items are the catalogue, including items without interactions.
        params: its params, of which ``evaluate`` and ``runtime`` are used.
        section: settings of the recommender.
        seed: seed of the training.
        folder: see the module's docstring.
        vectors: ``(I + 1, D)`` item vectors, row 0 zero (by modality, if the recommender separates them); None: ids alone.
        protocols: protocols under which the trained model ranks the targets.
    """
    wanted: dict[Protocol, Path] = {protocol: positions_path(folder, seed, protocol) for protocol in protocols}
    if all(path.exists() for path in wanted.values()):
        return
    device = prepare_torch(params.runtime)
    interactions, num_items = INTERACTIONS.read(workspace.interactions), len(ITEMS.read(workspace.items))
    test = interactions.filter(pl.col("split") == "test")
    data = recommenders.training_data(
        interactions.filter(pl.col("split").is_in(["train", "valid"])),
        num_users=interactions["user_id"].n_unique(),
        num_items=num_items,
        leaked_test_items=test["item_id"].to_numpy() if counts_test(section) else None,
    )
    model = recommenders.build(section, data.num_users, data.num_items, vectors, seed=seed)
    scratch = folder / f".{seed}.checkpoint.safetensors"
    inputs = fingerprint(
        section, str(seed), workspace.interactions, "" if vectors is None else recommenders.hash_vectors(vectors)
    )
    records = model.fit(data, checkpoint=scratch, fingerprint=inputs, device=device)
    known = recommenders.evaluation_data(interactions, num_items=num_items)
    write_tsv(folder / f"{seed}.tsv", records)
    for protocol, path in wanted.items():
        candidates = evaluation.candidates(protocol, interactions, params.evaluate.negatives_seed, num_items)
        placed = ranking.place_targets(model, known, candidates, params.evaluate.batch_size, device)
        POSITIONS.write(evaluation.score_positions(placed, params.evaluate.ties), path)
    scratch.unlink(missing_ok=True)
    logger.info("%s/%s, seed %d: %d epochs", folder.parent.name, folder.name, seed, len(records))


def is_complete(folder: Path, seeds: Sequence[int]) -> bool:
    """Whether the positions of all seeds exist."""
    return all(positions_path(folder, seed).exists() for seed in seeds)


def kept_table(path: Path, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """Read the parquet table at ``path``; if it is missing, compute it with ``make`` and write it first."""
    if not path.exists():
        write_parquet(make(), path)
    return pl.read_parquet(path)


def keep_settings(path: Path, settings: Mapping[str, object], *, made: Path | None = None) -> None:
    """Record what the results in a folder were made with, and check it against a record of earlier results.

    Args:
        path: the file of the record.
        settings: values that can be written as JSON.
        made: the file that was made with them, if it is not the whole folder.

    Raises:
        ConfigError: the results were made with other values.
    """
    known = read_json(path, "settings of an experiment") if path.exists() else dict(settings)
    differ = [name for name, value in settings.items() if known.get(name) != value]
    if differ and made is not None:
        told = " and ".join(f"{name} {known.get(name)!r} (expected {settings[name]!r})" for name in differ)
        raise ConfigError(str(made), f"was made with {told}", "delete it to make it again, or change the settings back")
    if differ:
        problem = f"the results in {path.parent} were made with other {' and '.join(differ)}"
        raise ConfigError("--name", problem, "use another name, or delete the folder")
    write_json(path, known)


def epochs(folder: Path, seeds: Sequence[int]) -> str:
    """``best of all`` epochs by seed, from the validation curves; empty without training."""
    cells = []
    for seed in seeds:
        path = folder / f"{seed}.tsv"
        if path.exists() and path.stat().st_size:
            curve = pl.read_csv(path, separator="\t", schema_overrides={"is_best": pl.Boolean})
            cells.append(f"{curve.filter('is_best')['epoch'].max() or 0} of {len(curve)}")
    return ", ".join(cells)


def best_validation(folder: Path, seeds: Sequence[int]) -> float:
    """Validation NDCG@10 at the selected epoch, mean over the seeds; 0 of what was never validated."""
    best = []
    for seed in seeds:
        curve = pl.read_csv(folder / f"{seed}.tsv", separator="\t", schema_overrides={"valid_ndcg_10": pl.Float64})
        best.append(float(curve["valid_ndcg_10"].max() or 0.0))  # type: ignore[arg-type]
    return float(np.mean(best))


# ------------------------------------------------------------------------------------------------- numbers
def read_positions(folder: Path, seeds: Sequence[int], protocol: str = "fullrank") -> list[pl.DataFrame]:
    """Read the tables of :func:`keep_positions`, one per seed, sorted by user."""
    return [POSITIONS.read(positions_path(folder, seed, protocol)).sort("user_id") for seed in seeds]


def gains(metric: Metric, frames: Sequence[pl.DataFrame], mask: np.ndarray | None = None) -> np.ndarray:
    """The metric by seed and user ``(S, U)``, only for the users in ``mask`` if given."""
    chosen = slice(None) if mask is None else mask
    return np.array([per_user(metric, frame["position"].to_numpy()[chosen], CUTOFF) for frame in frames])


def read_gains(metric: Metric, folder: Path, seeds: Sequence[int]) -> np.ndarray:
    """The metric by seed and user ``(S, U)`` from the positions in a folder."""
    return gains(metric, read_positions(folder, seeds))


def interval(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> tuple[float, float]:
    """95 % interval of the mean over users and seeds; see :mod:`sda_core.evaluation.significance`.

    Args:
        gain_SU: ``(S, U)`` values; differences give a paired interval.
        params: number and seed of the draws.
        purpose: purpose of the draws, which determines them together with the seed.
    """
    return evaluation.interval(gain_SU, params.bootstrap_samples, generator(params.bootstrap_seed, purpose))


def mean_and_interval(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> Interval:
    """The mean of ``(S, U)``, and its :func:`interval`."""
    return float(gain_SU.mean()), *interval(gain_SU, params, purpose)


def minus(one: Interval, other: Interval) -> Interval:
    """The difference of two independent means, with an interval from theirs (Zou & Donner 2008)."""
    mean = one[0] - other[0]
    return mean, mean - math.hypot(one[0] - one[1], other[2] - other[0]), mean + math.hypot(one[2] - one[0], other[0] - other[1])


def mean_and_range(values: Sequence[float]) -> Interval:
    """Mean, minimum and maximum of one number per seed."""
    return float(np.mean(values)), float(min(values)), float(max(values))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation, and the share of random orders whose correlation is at least as far from 0.

    Args:
        one: a number for each case.
        other: likewise.

    Returns:
        The correlation, and a p-value from 10,000 orders; not numbers where all of one are equal.
    """
    from scipy.stats import rankdata  # pyright: ignore[reportMissingTypeStubs]

    first_N, second_N = (np.asarray(rankdata(values), dtype=np.float64) for values in (one, other))
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    scale = float(np.linalg.norm(first_N) * np.linalg.norm(second_N))
    if scale == 0.0:
        return float("nan"), float("nan")
    orders_RN = generator(0, "rank correlation").permuted(np.tile(second_N, (10_000, 1)), axis=1)
    far = np.abs(orders_RN @ first_N) >= abs(first_N @ second_N) - 1e-9
    return float(first_N @ second_N) / scale, float((1 + far.sum()) / (1 + len(far)))


def retrieval_at_1(path: Path, limit: int = 2000) -> float:
    """Retrieval@1 between images and texts of items, mean of both directions.

    The mean of each modality is subtracted first, as ``sda search`` and a loss with ``center: batch`` do.

    Args:
        path: path of an embeddings file.
        limit: maximum number of items, always the same ones; retrieval is harder among more items.

    Returns:
        0 to 1; the chance level is 1 / number of items.  Items without an image or a text are skipped; ties count as hits.

    Raises:
        ArtifactError: the file has no image or text embeddings, like that of a joint pass.
    """
    frame = EMBEDDINGS.read(path).sort("item_id")
    if missing := {"image_embedding", "text_embedding"} - {*frame.columns}:
        problem = f"has no {' and no '.join(sorted(missing))}, which retrieval@1 compares"
        raise ArtifactError(str(path), problem, "name a variant with a pass for each modality, e.g. zero_shot")
    frame = frame.drop_nulls(["image_embedding", "text_embedding"])
    rows = np.sort(generator(0, "found").permutation(len(frame))[:limit])
    vectors = (frame[name].to_numpy() for name in ("image_embedding", "text_embedding"))
    image_ND, text_ND = (unit_rows((all_ND - all_ND.mean(axis=0))[rows]) for all_ND in vectors)
    return mutual_retrieval_at_1(image_ND, text_ND)


def mutual_retrieval_at_1(image_ND: np.ndarray, text_ND: np.ndarray) -> float:
    """Retrieval@1 of unit rows ``(N, D)``, mean of both directions, row ``i`` with row ``i``; ties count as hits."""
    similarity_NN = image_ND @ text_ND.T
    own_N = similarity_NN.diagonal()
    return float(np.mean([(own_N >= similarity_NN.max(axis)).mean() for axis in (0, 1)]))


def shop_attributes(workspace: Workspace, dataset: DemoDataset) -> dict[str, np.ndarray]:
    """The true attributes of the built-in shop's items: their values by name, in the order of the item ids."""
    shop = world(dataset)
    place = {asin: item for item, asin in enumerate(shop.asins)}
    rows = np.array([place[raw_id] for raw_id in ITEMS.read(workspace.items).sort("item_id")["raw_item_id"]])
    return {name: shop.attributes[name][rows] for name in ATTRIBUTES}


# ------------------------------------------------------------------------------------------------- tables
def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    """A Markdown table, with a heading if a title is given."""
    lines = [f"### {title}", ""] if title else []
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def difference(gain_SU: np.ndarray, params: EvaluateParams, purpose: str) -> str:
    """A cell: the :func:`mean_and_interval` of differences ``(S, U)``."""
    return interval_cell(mean_and_interval(gain_SU, params, purpose))


def interval_cell(interval: Interval) -> str:
    """A cell: a difference and its interval."""
    mean, low, high = interval
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def range_over_seeds(gain_SU: np.ndarray) -> str:
    """A cell: minimum and maximum of the seeds' means."""
    of_seeds = gain_SU.mean(1)
    return f"{of_seeds.min():+.4f} .. {of_seeds.max():+.4f}"


def mean_with_range(values: Sequence[float], digits: int = 2) -> str:
    """A cell: the mean of one number per seed, followed by the range if they differ."""
    mean, low, high = mean_and_range(values)
    return f"{mean:.3f} ({low:.{digits}f} .. {high:.{digits}f})" if high > low else f"{mean:.3f}"


def check_ascending(option: str, given: Sequence[int]) -> None:
    """Check that the numbers of an option are ascending and at least 1.

    Raises:
        ConfigError: they are not.
    """
    if list(given) != sorted(set(given)) or min(given) < 1:
        raise ConfigError(option, f"should be ascending numbers from 1 (got {','.join(map(str, given))})")


def check_names(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check that all names of an option are known.

    Raises:
        ConfigError: a name is unknown.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(option, f"expected some of {', '.join(known)} (got {name!r})")


# ------------------------------------------------------------------------------------------------- results
def write_results(text: str, script: str, name: str = "", root: Path | str = "") -> Path:
    """Print the final tables of a script and write them to the folder that ``sda report --experiments`` reads.

    Args:
        text: Markdown; a heading is the caption of the tables below it.
        script: name of the script.
        name: name of the experiment, if the script has several.
        root: the project folder; if it contains ``{seed}``, the current folder is used.

    Returns:
        ``experiments/results/<script>-<name>``, which contains ``table.md``; a plot should be written there as ``plot.png``.
    """
    print(text)
    project = Path() if "{seed}" in str(root) else Path(root)
    folder = project / "experiments" / "results" / (script if name in ("", script) else f"{script}-{name}")
    write_text(folder / "table.md", text.rstrip("\n") + "\n")
    return folder


def plot_intervals(
    path: Path, panels: Mapping[str, Mapping[str, Interval]], label: str, *, zero: bool = False, columns: int = 3
) -> None:
    """Plot panels with one line per name: a dot at the mean, and a bar from low to high.

    Args:
        path: path of the image file.
        panels: panels by title; neighbouring panels share equal names.  Without panels nothing is drawn.
        label: label of the horizontal axes.
        zero: whether to draw a line at 0.
        columns: maximum number of panels side by side.
    """
    from matplotlib import pyplot as plt

    if not panels:
        return
    num_columns = min(columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    lines = max(len(rows) for rows in panels.values())
    size = (3.6 * num_columns + 1.6, (0.27 * lines + 1.0) * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for place, (axis, (title, rows)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        values = np.array(list(rows.values())).reshape(-1, 3)
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        heights = -np.arange(len(rows))
        axis.errorbar(values[:, 0], heights, xerr=errors, fmt="o", color="#1f5fa8", capsize=3)
        if zero:
            axis.axvline(0.0, color="#666666", linestyle="--", linewidth=1)
        is_repeated = place % num_columns > 0 and list(rows) == list(list(panels.values())[place - 1])
        axis.set_yticks(heights, [""] * len(rows) if is_repeated else list(rows), fontsize=8)
        axis.set_ylim(-len(rows) + 0.4, 0.6)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
