"""Read the files of a run into :class:`ReportData`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sda_core import __version__
from sda_core.artifacts import Workspace, read_json
from sda_core.costs import Latest
from sda_core.errors import ArtifactError
from sda_core.evaluation import Comparison
from sda_core.params import DemoDataset, FitParams, Params
from sda_core.report import describe
from sda_core.report.coverage import data_coverage
from sda_core.report.examples import Neighbors, conflicts, examples, training_counts
from sda_core.report.gates import gate_map
from sda_core.report.model import Change, Chart, Curve, Experiment, Learning, ReportData, Result, Score, Size
from sda_core.report.vectors import examine
from sda_core.variants import adapter_of, controls, indexed_variants

_NUM_PAIRS = 3  # conflicting pairs of each kind
_LAST = 5  # last logged steps of a training (of a short one the second half), averaged to reduce noise
_FIGURES = {
    "retrieval": "Retrieval@1 within a batch: items whose other modality is the nearest",
    "teacher_targets": "Effective targets of the teacher",
    "cosine_own_pair": "Mean cosine of an item's image and text",
    "cosine_other_pair": "Mean cosine of an item's image and another item's text",
    "cosine_images": "Mean cosine of the images of two items",
    "cosine_texts": "Mean cosine of the texts of two items",
    "rank_images": "Effective number of directions in which the images differ",
    "rank_texts": "Effective number of directions in which the texts differ",
}
"""Labels of the figures in ``check_details.json``."""

_CONTENT_FREE = {"pop": "any", "bpr": "any"}  # recommenders without vectors: one row for all variants


def _score(metrics: Mapping[str, Any], name: str) -> Score | None:
    if name not in metrics:
        return None
    return Score(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def result_from(
    recommender: str, variant: str, metrics: Mapping[str, Any], comparisons: Sequence[Comparison], cutoff: int, where: Path
) -> Result:
    """One line of the result table.

    Args:
        recommender: name of the recommender.
        variant: name of the variant.
        metrics: the flat metrics of the evaluation.
        comparisons: comparisons of all variants; those of this variant are used.
        cutoff: cut-off of the headline.
        where: the metrics file, for messages.

    Raises:
        ArtifactError: the metrics have no Hit or NDCG at this cut-off.
    """
    hit, ndcg = _score(metrics, f"hit@{cutoff}"), _score(metrics, f"ndcg@{cutoff}")
    if hit is None or ndcg is None:
        raise ArtifactError(str(where), f"holds no hit@{cutoff} and ndcg@{cutoff}", "run `dvc repro` to evaluate again")
    own = [c for c in comparisons if (c.recommender, c.variant, c.metric, c.cutoff) == (recommender, variant, "ndcg", cutoff)]

    def changes(group: str) -> tuple[Change, ...]:
        return tuple(
            Change(c.baseline, c.difference, c.relative, c.low, c.high, c.p_adjusted, c.seed_margin)
            for c in own
            if c.group == group
        )

    return Result(
        recommender=recommender,
        variant=variant,
        num_users=int(metrics.get("num_users", 0)),
        hit=hit,
        ndcg=ndcg,
        tail_num_users=int(metrics.get("tail_num_users", 0)),
        tail_ndcg=_score(metrics, f"tail_ndcg@{cutoff}"),
        valid_ndcg=metrics.get("valid_ndcg@10"),
        changes=changes("all"),
        tail_changes=changes("tail"),
    )


def _results(workspace: Workspace, params: Params, comparisons: Sequence[Comparison]) -> tuple[Result, ...]:
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
    """Read the points of a tab-separated curve: x is the first column, y the first column with the prefix ``y_prefix``.

    Rows without y (an epoch that was not evaluated) are skipped; an empty file has no points.

    Raises:
        ArtifactError: the file is missing or has another format.
    """
    try:
        frame = pl.read_csv(path, separator="\t", infer_schema_length=None, raise_if_empty=False)
    except FileNotFoundError:
        raise ArtifactError(str(path), "training curve is missing", "run `dvc repro` to make it") from None
    except pl.exceptions.PolarsError as error:
        raise ArtifactError(str(path), f"is not a training curve ({error})", "delete it and run `dvc repro`") from None
    if not frame.columns:  # a run without records
        return ()
    named = [column for column in frame.columns if column.startswith(y_prefix)]
    if not named:
        raise ArtifactError(
            str(path), f"has no column {y_prefix}... (got {', '.join(frame.columns)})", "run `dvc repro` to make it again"
        )
    pairs = frame.select(pl.col(frame.columns[0]).cast(pl.Float64, strict=False), pl.col(named[0]).cast(pl.Float64, strict=False))
    return tuple((x, y) for x, y in pairs.drop_nulls().iter_rows() if np.isfinite(x) and np.isfinite(y))


def _validation_charts(workspace: Workspace, params: Params) -> tuple[Chart, ...]:
    charts: list[Chart] = []
    for recommender in params.recommenders:
        if not isinstance(params.train_recommender.of(recommender), FitParams):
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
        if found and targets:  # empty for a training without steps
            last = max(1, min(_LAST, len(found) // 2))
            ends = [(points[0][1], float(np.mean([y for _, y in points[-last:]]))) for points in (found, targets)]
            check = read_json(workspace.adapter(variant) / "check.json", "figures of the adapter's vectors")
            details = read_json(workspace.adapter(variant) / "check_details.json", "all figures of the adapter's vectors")
            before, after = details["before"], details["after"]
            images, texts = ((before[f"cosine_{name}"], after[f"cosine_{name}"]) for name in ("images", "texts"))
            figures = tuple((label, before[name], after[name]) for name, label in _FIGURES.items())
            counts = training.num_steps, training.batch_size
            collapsed, num_sampled = bool(check["collapsed"]), details["items"]
            made.append(Learning(variant, *counts, ends[0], ends[1], images, texts, collapsed, num_sampled, figures))
    return tuple(made)


def sizes(workspace: Workspace, params: Params) -> tuple[Size, ...]:
    """Sizes of the outputs on disk by stage, which are equal for equal runs, unlike seconds.

    Outputs of other variants, which an earlier run may have left, do not count.
    """
    training = params.train_adapter.training
    seen = f"{training.num_steps * training.batch_size:,} items seen by each adapter"
    variants = params.variants
    outputs = (
        ("filter", [workspace.filtered], ""),
        ("fetch_images", [workspace.images], ""),
        ("train_adapter", [workspace.adapter(variant) for variant in params.train_adapter.variants], seen),
        ("export_embeddings", [workspace.embeddings(variant) for variant in variants], ""),
        ("build_index", [workspace.index(variant) for variant in indexed_variants(params)], ""),
        ("train_recommender", [workspace.recommender(variant, "") for variant in variants], ""),
        ("evaluate", [workspace.positions(variant, "").parent for variant in variants], ""),
    )
    made: list[Size] = []
    for stage, paths, note in outputs:
        found = [file for path in paths for file in (path, *path.rglob("*"))]
        files = [path for path in found if path.is_file() and not path.name.startswith(".")]
        if files:
            made.append(Size(stage, len(files), sum(path.stat().st_size for path in files), note))
    return tuple(made)


def _has_adapter(params: Params, variant: str) -> bool:
    return variant not in params.import_embeddings.variants and adapter_of(params, variant) is not None


def collect(
    workspace: Workspace,
    params: Params,
    comparisons: Sequence[Comparison],
    neighbors: Neighbors,
    *,
    commit: str | None,
    costs: Sequence[Latest],
    experiments: Sequence[Experiment] = (),
) -> ReportData:
    """Read all data of the page.

    Args:
        workspace: paths of a finished run.
        params: params of that run.
        comparisons: the result of ``evaluation.compare_variants``.
        neighbors: by variant, by example item (see :func:`sda_core.report.example_items`); the lists of the other variants are
            compared with those of the first.
        commit: commit of the project; None if unknown, or for a page that is equal for equal runs.
        costs: costs of the stages from ``costs.latest``; empty for a page that is equal for equal runs.
        experiments: the result of ``report.experiments``; empty for the page of the pipeline, which does not depend on them.

    Raises:
        ArtifactError: a file of the run is missing or damaged.
    """
    results = _results(workspace, params, comparisons)
    # a joint pass gives one vector per item, and imported vectors may have a single kind
    one_vector = {*params.joint_embeddings.variants, *params.import_embeddings.variants}
    own = [variant for variant in indexed_variants(params) if variant not in one_vector]
    counts = training_counts(workspace)
    examined = examine(workspace, own, _NUM_PAIRS, params.export_embeddings, list(counts))
    gates = [gate_map(v, workspace.adapter(v)) for v in params.variants if v in params.train_adapter.variants]
    return ReportData(
        title=params.report.title,
        dataset=describe.dataset(params.dataset),
        is_simulation=isinstance(params.dataset, DemoDataset),
        shop_users=params.dataset.num_users if isinstance(params.dataset, DemoDataset) else None,
        notes=describe.notes(params),
        version=__version__,
        commit=commit,
        set_up=describe.set_up(params),
        variants=describe.variants(params),
        controls=controls(params),
        trained=tuple(variant for variant in params.variants if _has_adapter(params, variant)),
        num_seeds=len(params.train_recommender.seeds),
        coverage=data_coverage(workspace, params.filter, counts),
        cutoff=params.report.cutoff,
        ties=describe.ties(params.evaluate.ties),
        tail_definition=describe.tail(params.evaluate.tail),
        results=results,
        validation_charts=_validation_charts(workspace, params),
        adapter_charts=_adapter_charts(workspace, params),
        learning=_learning(workspace, params),
        examples=examples(workspace, neighbors),
        geometry=examined.geometry,
        modality_drops=examined.modality_drops,
        conflicts=conflicts(workspace, examined),
        maps=examined.maps,
        gates=tuple(gate for gate in gates if gate is not None),
        experiments=tuple(experiments),
        sizes=sizes(workspace, params),
        costs=tuple(costs),
    )
