"""From the files of a run to :class:`ReportData`.  Opens files through ``artifacts`` and the picture store only."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never

import numpy as np
import polars as pl
from PIL import Image

from sda_core import __version__
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, read_json
from sda_core.costs import Latest
from sda_core.errors import ArtifactError
from sda_core.image_store import ImageStore
from sda_core.params import (
    CLIP,
    AmazonDataset,
    BackboneParams,
    Checkpoint,
    Cut,
    DemoDataset,
    FilterParams,
    LossParams,
    Nano,
    Params,
    PopParams,
    ReportParams,
    SigLIP,
    TailParams,
    TinyQwen25VL,
)
from sda_core.report.coverage import data_coverage
from sda_core.report.gates import gate_map
from sda_core.report.modality_drop import Fuse
from sda_core.report.model import (
    Change,
    Chart,
    Conflict,
    Curve,
    Example,
    Experiment,
    Fact,
    Item,
    Learning,
    Neighbor,
    NeighborList,
    Picture,
    ReportData,
    Result,
    Score,
    Size,
    Variant,
)
from sda_core.report.vectors import Findings, look
from sda_core.variants import indexed_variants

_NUM_PAIRS = 3  # conflicting items, of each kind
_LAST = 5  # logged steps at the end of a training, whose mean is less of a chance than one batch; of a short one the later half
_THUMBNAIL_SIDE = 128  # pixels; shown at 96, so it stays sharp on dense screens
_CONTENT_FREE = {"pop": "any", "bpr": "any"}  # recommenders that look at no vectors: one row stands for all variants


class ComparisonLike(Protocol):
    """What is needed of ``evaluation.significance.Comparison``."""

    @property
    def recommender(self) -> str: ...  # noqa: D102 (as there)
    @property
    def variant(self) -> str: ...  # noqa: D102
    @property
    def baseline(self) -> str: ...  # noqa: D102
    @property
    def group(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def cutoff(self) -> int: ...  # noqa: D102
    @property
    def difference(self) -> float: ...  # noqa: D102
    @property
    def relative(self) -> float | None: ...  # noqa: D102
    @property
    def low(self) -> float | None: ...  # noqa: D102
    @property
    def high(self) -> float | None: ...  # noqa: D102
    @property
    def p_adjusted(self) -> float | None: ...  # noqa: D102


Neighbors = Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]
"""By variant, by example item: (item id, cosine), nearest first."""


# ------------------------------------------------------------------------------------------- what was run
def describe_dataset(dataset: DemoDataset | AmazonDataset) -> str:
    """The data set in a few words."""
    match dataset:
        case DemoDataset():
            return f"the built-in shop {dataset.category}, written in the {dataset.edition} format"
        case AmazonDataset():
            return f"Amazon reviews {dataset.edition}, {dataset.category.replace('_', ' ')}"
        case _:
            assert_never(dataset)


def describe_backbone(backbone: BackboneParams) -> str:
    """The backbone in a few words."""
    match backbone:
        case TinyQwen25VL():
            size = f"{backbone.num_layers} layers of width {backbone.hidden_size}"
            return f"Qwen2.5-VL architecture, {size}, random weights (seed {backbone.seed})"
        case Nano():
            return "nano, a Qwen2.5-VL of 9 million parameters, pre-trained on icons, clip art and words"
        case Checkpoint():
            revision = "" if backbone.revision is None else f" at {backbone.revision}"
            return f"{backbone.name}{revision}, {backbone.dtype}"
        case _:
            assert_never(backbone)


def describe_pooling(backbone: BackboneParams) -> str:
    """How a backbone's states become one vector, in a few words."""
    if isinstance(backbone, CLIP | SigLIP):
        return "that of the two towers"
    return f"{backbone.pooling} over the last hidden states"


def describe_tail(tail: TailParams) -> str:
    """The definition of tail in a few words."""
    match tail.definition:
        case "train_lt_k":
            return f"items with fewer than {tail.max_count} training interactions"
        case "pareto":
            return f"the {100 * tail.share:g} % least popular items by training interactions"
        case "paper":
            return f"items with fewer than {tail.max_count} interactions over all splits"
        case _:
            assert_never(tail.definition)


def describe_filter(section: FilterParams) -> str:
    """Which rows and items the filter keeps, in a sentence."""
    method = "k-core" if section.method == "kcore" else "single pass"
    parts = [f"{method}, at least {section.min_user_interactions} per user, {section.min_item_interactions} per item"]
    if section.min_rating > 0.0:
        parts.append(f"ratings from {section.min_rating:g}")
    match section.duplicates:
        case "keep":
            parts.append("repeated purchases kept")
        case "first" | "last":
            parts.append(f"of repeated purchases the {section.duplicates}")
        case _:
            assert_never(section.duplicates)
    if section.time_resolution_seconds:
        parts.append(f"times rounded down to multiples of {section.time_resolution_seconds} seconds")
    order = f"random order (seed {section.ties_seed})" if section.ties == "random" else "the order of the raw file"
    parts.append(f"equal times in {order}")
    for what, policy in (("metadata", section.items_without_metadata), ("a picture's address", section.items_without_image)):
        parts.append(f"items without {what} {'dropped' if policy == 'drop' else 'kept'}")
    return "; ".join(parts)


def describe_split(section: FilterParams) -> str:
    """How training, validation and test are told apart, in a sentence."""

    def cut(value: Cut | None) -> str:
        return f"after {100 * value:g} % of the interactions" if isinstance(value, float) else f"on {value} (UTC)"

    match section.split:
        case "leave_one_out":
            return "leave one out: each user's last item is the test target, the one before it the validation target"
        case "global_time":
            return f"by time: validation begins {cut(section.valid_from)}, the test {cut(section.test_from)}"
        case _:
            assert_never(section.split)


def describe_ties(ties: Literal["pessimistic", "mean", "optimistic"]) -> str:
    """Where a target stands among items of its own score, in a few words."""
    match ties:
        case "pessimistic":
            return "pessimistic (items that score as the target does stand before it)"
        case "mean":
            return "mean (the target stands in the middle of the items that score as it does)"
        case "optimistic":
            return "optimistic (items that score as the target does stand behind it)"
        case _:
            assert_never(ties)


def _describe_loss(loss: LossParams) -> str:
    if loss.teacher == "none":
        return "InfoNCE"
    if loss.variant == "reference":
        return "CMSA as in the public code"
    return "CMSA" if loss.teacher_source == "adapted" else "CMSA, taught by the backbone's own vectors"


_CONTROL_TEXT = {
    "random": "Control: random directions instead of content vectors.",
    "shuffled": "Control: the vectors of zero_shot, each on a wrong item.",
    "image_only": "Control: the picture vectors of zero_shot alone.",
    "text_only": "Control: the text vectors of zero_shot alone.",
}


def describe_variants(params: Params) -> tuple[Variant, ...]:
    """What each rung of the ladder is."""
    made: list[Variant] = []
    for name in params.variants:
        if name == "id":
            text = "No content: the recommender learns a vector for each item id."
        elif name == "zero_shot":
            text = "Content vectors of the backbone as it is, without adaptation."
        elif name in params.control_embeddings.variants:
            text = _CONTROL_TEXT[name]
        elif name in params.import_embeddings.variants:
            text = "Content vectors that were made elsewhere and imported."
        else:
            section = params.train_adapter.variants[name]
            adapter, loss = params.train_adapter.of(name)
            experts = f"{adapter.num_experts} experts, {adapter.gate} gate" if adapter.num_experts > 1 else "one expert"
            kind = "LoRA" if section.adapter == "lora" else "MoDA"
            method = f"{kind} of total rank {adapter.r} ({experts}), trained with {_describe_loss(loss)}"
            text = f"Content vectors after adaptation: {method}."
        made.append(Variant(name, text))
    return tuple(made)


def _notes(params: Params) -> tuple[str, ...]:
    notes: list[str] = []
    if isinstance(params.backbone, TinyQwen25VL):
        notes.append(
            "The backbone has random weights: it has never seen a word or a picture. It stands in for a real one to try the "
            "pipeline, so differences between variants are no verdict on the method."
        )
    if isinstance(params.backbone, Nano):
        notes.append(
            "The backbone is a small model whose pictures were icons and clip art. What it shows need not hold for a large one."
        )
    if params.evaluate.protocol != "fullrank":
        notes.append(
            f"Targets were placed among {params.evaluate.protocol[3:]} sampled items only. Such numbers are far higher than "
            "full-rank ones and cannot be held against them."
        )
    if params.evaluate.retrieval is not None:
        notes.append(
            f"Targets were looked for among the {params.evaluate.retrieval.depth:,} best items that an index "
            f"({params.evaluate.retrieval.factory}) gives; one that is not among them counts as last. What the index misses "
            "stands in metrics/ as retrieval_recall@10."
        )
    return tuple(notes)


def _set_up(params: Params) -> tuple[Fact, ...]:
    protocols = {
        "fullrank": "full rank: every item the user has not seen",
        "uni100": "100 sampled items, uniform over the catalogue",
        "pop100": "100 sampled items, by training popularity",
    }
    training = params.train_adapter.training
    facts = [
        Fact("Data set", describe_dataset(params.dataset)),
        Fact("Filter", describe_filter(params.filter)),
        Fact("Split", describe_split(params.filter)),
        Fact("Backbone", describe_backbone(params.backbone)),
        Fact("Pooling", describe_pooling(params.backbone)),
        Fact("Adapter training", f"{training.num_steps:,} steps of {training.batch_size} items, seed {training.seed}"),
        Fact(
            "Item vectors",
            f"{params.export_embeddings.fusion.replace('_', ' ')}, at most {params.export_embeddings.fused_dim} wide",
        ),
        Fact("Protocol", protocols[params.evaluate.protocol]),
        Fact("Ties", describe_ties(params.evaluate.ties)),
        Fact("Tail", describe_tail(params.evaluate.tail)),
        Fact(
            "Uncertainty",
            f"{params.evaluate.bootstrap_samples:,} bootstrap resamples of the users, seed {params.evaluate.bootstrap_seed}",
        ),
    ]
    sections = [params.train_recommender.of(recommender) for recommender in params.recommenders]
    seeds = sorted({section.seed for section in sections if not isinstance(section, PopParams)})
    facts.append(Fact("Recommender seed", ", ".join(str(seed) for seed in seeds) or "none"))
    return tuple(facts)


# --------------------------------------------------------------------------------------- numbers and curves
def _score(metrics: Mapping[str, Any], name: str) -> Score | None:
    if name not in metrics:
        return None
    return Score(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def result_from(
    recommender: str, variant: str, metrics: Mapping[str, Any], comparisons: Sequence[ComparisonLike], cutoff: int, where: Path
) -> Result:
    """One line of the result table.

    Args:
        recommender: its name.
        variant: its name.
        metrics: the flat numbers of the evaluation.
        comparisons: of all variants; those of this one are picked.
        cutoff: of the headline.
        where: the metrics file, for messages.

    Raises:
        ArtifactError: the metrics hold no Hit or NDCG at this cut-off.
    """
    hit, ndcg = _score(metrics, f"hit@{cutoff}"), _score(metrics, f"ndcg@{cutoff}")
    if hit is None or ndcg is None:
        raise ArtifactError(str(where), f"holds no hit@{cutoff} and ndcg@{cutoff}", "run `dvc repro` to evaluate anew")
    own = [c for c in comparisons if (c.recommender, c.variant, c.metric, c.cutoff) == (recommender, variant, "ndcg", cutoff)]

    def changes(group: str) -> tuple[Change, ...]:
        return tuple(Change(c.baseline, c.difference, c.relative, c.low, c.high, c.p_adjusted) for c in own if c.group == group)

    return Result(
        recommender=recommender,
        variant=variant,
        num_users=int(metrics.get("num_users", 0)),
        hit=hit,
        ndcg=ndcg,
        tail_num_users=int(metrics.get("tail_num_users", 0)),
        tail_ndcg=_score(metrics, f"tail_ndcg@{cutoff}"),
        changes=changes("all"),
        tail_changes=changes("tail"),
    )


def _results(workspace: Workspace, params: Params, comparisons: Sequence[ComparisonLike]) -> tuple[Result, ...]:
    made: list[Result] = []
    for recommender in params.recommenders:
        for variant in params.variants:
            path = workspace.metrics(variant, recommender)
            metrics = read_json(path, f"metrics of {recommender} on {variant}")
            if recommender in _CONTENT_FREE:
                made.append(result_from(recommender, _CONTENT_FREE[recommender], metrics, [], params.report.cutoff, path))
                break
            made.append(result_from(recommender, variant, metrics, comparisons, params.report.cutoff, path))
    return tuple(made)


def read_curve(path: Path, y_prefix: str) -> tuple[tuple[float, float], ...]:
    """Points of a tab-separated curve: the first column against the first one whose name begins with ``y_prefix``.

    Rows without a y (an epoch that was not evaluated) are left out; an empty file has no points.

    Raises:
        ArtifactError: the file is missing or no such table.
    """
    try:
        frame = pl.read_csv(path, separator="\t", infer_schema_length=None, raise_if_empty=False)
    except FileNotFoundError:
        raise ArtifactError(str(path), "training curve is missing", "run `dvc repro` to make it") from None
    except pl.exceptions.PolarsError as error:
        raise ArtifactError(str(path), f"is no table of a training curve ({error})", "delete it and run `dvc repro`") from None
    if not frame.columns:  # a run without a single record
        return ()
    named = [column for column in frame.columns if column.startswith(y_prefix)]
    if not named:
        raise ArtifactError(
            str(path), f"has no column {y_prefix}... (got {', '.join(frame.columns)})", "run `dvc repro` to make it anew"
        )
    pairs = frame.select(pl.col(frame.columns[0]).cast(pl.Float64, strict=False), pl.col(named[0]).cast(pl.Float64, strict=False))
    return tuple((x, y) for x, y in pairs.drop_nulls().iter_rows() if np.isfinite(x) and np.isfinite(y))


def _validation_charts(workspace: Workspace, params: Params) -> tuple[Chart, ...]:
    charts: list[Chart] = []
    for recommender in params.recommenders:
        if isinstance(params.train_recommender.of(recommender), PopParams):
            continue
        variants = params.variants[:1] if recommender in _CONTENT_FREE else params.variants
        curves = tuple(Curve(v, read_curve(workspace.recommender(v, recommender) / "history.tsv", "valid")) for v in variants)
        charts.append(Chart(recommender, "epoch", "Validation NDCG@10", False, curves))
    return tuple(charts)


def _adapter_charts(workspace: Workspace, params: Params) -> tuple[Chart, ...]:
    trained = [variant for variant in params.variants if variant in params.train_adapter.variants]
    return tuple(
        Chart(
            variant, "step", "Training loss", True, (Curve(variant, read_curve(workspace.adapter(variant) / "loss.tsv", "loss")),)
        )
        for variant in trained
    )


def _learning(workspace: Workspace, params: Params) -> tuple[Learning, ...]:
    made: list[Learning] = []
    training = params.train_adapter.training
    for variant in params.variants:
        if variant not in params.train_adapter.variants:
            continue
        path = workspace.adapter(variant) / "loss.tsv"
        found, targets = read_curve(path, "retrieval"), read_curve(path, "teacher_targets")
        if found and targets:  # none of a training of no steps
            last = max(1, min(_LAST, len(found) // 2))
            ends = [(points[0][1], float(np.mean([y for _, y in points[-last:]]))) for points in (found, targets)]
            made.append(Learning(variant, training.num_steps, training.batch_size, *ends))
    return tuple(made)


# ------------------------------------------------------------------------------------------------ examples
def thumbnail(image: bytes) -> Picture:
    """A small JPEG of an encoded picture."""
    with Image.open(io.BytesIO(image)) as opened:
        small = opened.convert("RGB")
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=82, optimize=True)
    return Picture("image/jpeg", buffer.getvalue())


def spread_items(counts: Mapping[int, int], num_items: int) -> list[int]:
    """``num_items`` items evenly spread from the most to the least popular; equally popular ones by id.

    Args:
        counts: training interactions by item id.
        num_items: how many; fewer come where there are fewer.
    """
    ordered = sorted(counts, key=lambda item: (-counts[item], item))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(num_items, len(ordered))).round().astype(int)) if ordered else []
    return [ordered[place] for place in places]


def _training_counts(workspace: Workspace) -> dict[int, int]:
    train = INTERACTIONS.scan(workspace.interactions).filter(pl.col("split") == "train")
    frame = train.group_by("item_id").len().collect()
    return {int(item): int(count) for item, count in frame.iter_rows()}


def example_items(workspace: Workspace, params: ReportParams) -> list[int]:
    """The items whose neighbours the page shows: with a picture, from the most popular to the rarest.

    Raises:
        ArtifactError: a table is missing.
    """
    counts, store = _training_counts(workspace), ImageStore(workspace.images)
    pictured = {int(item): counts.get(int(item), 0) for item in store.item_ids if store.status(int(item)) == "ok"}
    return spread_items(pictured, params.num_example_items)


def _shown(workspace: Workspace, ids: set[int]) -> dict[int, Item]:
    """Titles and small pictures, by id."""
    rows = ITEMS.scan(workspace.items).filter(pl.col("item_id").is_in(sorted(ids))).select("item_id", "title").collect()
    titles, store = dict(rows.iter_rows()), ImageStore(workspace.images)
    items: dict[int, Item] = {}
    for item_id in sorted(ids):
        if item_id not in titles:
            raise ArtifactError(
                str(workspace.items), f"has no item {item_id}, which an index names", "run `dvc repro` to make the index anew"
            )
        image = store.get(item_id)
        items[item_id] = Item(item_id, titles[item_id], None if image is None else thumbnail(image))
    return items


def _examples(workspace: Workspace, neighbors: Neighbors) -> tuple[Example, ...]:
    wanted = list(dict.fromkeys(item for found in neighbors.values() for item in found))
    if not wanted:
        return ()
    shown = {*wanted, *(near for found in neighbors.values() for pairs in found.values() for near, _ in pairs)}
    items, counts = _shown(workspace, shown), _training_counts(workspace)
    return tuple(
        Example(
            items[item_id],
            f"{counts.get(item_id, 0):,} training interactions",
            tuple(
                NeighborList(variant, tuple(Neighbor(items[near], score) for near, score in found.get(item_id, ())))
                for variant, found in neighbors.items()
            ),
        )
        for item_id in wanted
    )


def _conflicts(workspace: Workspace, looked: Findings) -> tuple[Conflict, ...]:
    items = _shown(workspace, {item for pair in looked.pairs for item in (pair.first, pair.second)})
    return tuple(
        Conflict(
            items[pair.first], items[pair.second], pair.alike_in, pair.image_cosine, pair.text_cosine, tuple(cosines.items())
        )
        for pair, cosines in zip(looked.pairs, looked.cosines, strict=True)
    )


def sizes(workspace: Workspace, params: Params) -> tuple[Size, ...]:
    """What the run left on disk, by stage; equal for equal runs, unlike seconds."""
    training = params.train_adapter.training
    seen = f"{training.num_steps * training.batch_size:,} items seen by each adapter"
    paths = (
        ("filter", workspace.filtered, ""),
        ("fetch_images", workspace.images, ""),
        ("train_adapter", workspace.adapter(""), seen),
        ("export_embeddings", workspace.embeddings("").parent, ""),
        ("build_index", workspace.index(""), ""),
        ("train_recommender", workspace.recommender("", ""), ""),
        ("evaluate", workspace.positions("", "").parent, ""),
    )
    made: list[Size] = []
    for stage, folder, note in paths:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        if files:
            made.append(Size(stage, len(files), sum(path.stat().st_size for path in files), note))
    return tuple(made)


# ---------------------------------------------------------------------------------------------------- whole
def collect(
    workspace: Workspace,
    params: Params,
    comparisons: Sequence[ComparisonLike],
    neighbors: Neighbors,
    *,
    fuse: Fuse,
    commit: str | None,
    costs: Sequence[Latest],
    experiments: Sequence[Experiment] = (),
) -> ReportData:
    """Read everything the page shows.

    Args:
        workspace: of a finished run.
        params: of that run.
        comparisons: from ``evaluation.compare_variants``.
        neighbors: by variant, by example item (see :func:`example_items`); the first variant's lists are what the
            others are held against.
        fuse: ``embeddings.fusion.fuse``, to make item vectors anew without one of their modalities.
        commit: of the project; None for a page that is the same for equal runs, or where there is none.
        costs: of the stages, from ``costs.latest``; none for a page that is the same for equal runs.
        experiments: from ``report.experiments``; none for the page of the pipeline, which does not depend on them.

    Raises:
        ArtifactError: a file of the run is missing or damaged.
    """
    results = _results(workspace, params, comparisons)
    # vectors made elsewhere may be one kind alone, and nothing was adapted in them
    own = [variant for variant in indexed_variants(params) if variant not in params.import_embeddings.variants]
    counts = _training_counts(workspace)
    looked = look(workspace, own, _NUM_PAIRS, params.export_embeddings, list(counts), fuse)
    gates = [gate_map(v, workspace.adapter(v)) for v in params.variants if v in params.train_adapter.variants]
    return ReportData(
        title=params.report.title,
        dataset=describe_dataset(params.dataset),
        is_simulation=isinstance(params.dataset, DemoDataset),
        notes=_notes(params),
        version=__version__,
        commit=commit,
        set_up=_set_up(params),
        variants=describe_variants(params),
        coverage=data_coverage(workspace, params.filter, counts),
        cutoff=params.report.cutoff,
        ties=describe_ties(params.evaluate.ties),
        tail_definition=describe_tail(params.evaluate.tail),
        results=results,
        validation_charts=_validation_charts(workspace, params),
        adapter_charts=_adapter_charts(workspace, params),
        learning=_learning(workspace, params),
        examples=_examples(workspace, neighbors),
        geometry=looked.geometry,
        modality_drops=looked.modality_drops,
        conflicts=_conflicts(workspace, looked),
        maps=looked.maps,
        gates=tuple(gate for gate in gates if gate is not None),
        experiments=tuple(experiments),
        sizes=sizes(workspace, params),
        costs=tuple(costs),
    )
