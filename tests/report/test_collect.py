"""From the files of a run to the page, with the real tables, the real index and the real evaluation."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from PIL import Image, ImageDraw
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from sda_core import costs
from sda_core.alignment.check import Figures
from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, Workspace, write_json, write_text
from sda_core.data.amazon import LineCount
from sda_core.dropped_values import ValueCount
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ArtifactError
from sda_core.evaluation import compare_variants, score_positions, summarise
from sda_core.image_store import STATUSES, ImageRow, coverage_path, shard_path, write_shard
from sda_core.index import build_index, load_index
from sda_core.params import Params, load_params
from sda_core.report import collect, example_items, render
from sda_core.report.collect import read_curve
from sda_core.report.examples import spread_items, thumbnail
from stages.report import report
from tests.sections import seeded

ROOT = Path(__file__).resolve().parents[2]
NUM_USERS, NUM_ITEMS = 60, 30
FIGURES = {field.name: 0.25 for field in fields(Figures) if field.name != "items"}
CHECK = {
    "items": 96, "teacher_temperature": None,
    "before": {**FIGURES, "cosine_images": 0.5, "cosine_texts": 0.4},
    "after": {**FIGURES, "cosine_images": 0.6, "cosine_texts": 0.99},
}  # fmt: skip
LOSS_CURVE = """step\tloss\tteacher_targets\tretrieval
5\t3.0\t1.5\t0.25
10\t2.0\t9.0\t0.0
15\t2.5\t9.0\t0.0
20\t2.4\t2.0\t0.5
25\t2.2\t2.5\t0.25
"""


def png(colour: int) -> bytes:
    image = Image.new("RGB", (300, 200), (8 * colour % 256, 60, 120))
    ImageDraw.Draw(image).rectangle((20 + colour, 20, 200, 150), fill=(200, 8 * colour % 256, 40))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def params() -> Params:
    whole = load_params(ROOT / "params.yaml").model_dump(mode="json")
    whole["variants"] = ["id", "zero_shot", "sda"]
    whole["recommenders"] = ["pop", "bpr", "sasrec"]
    whole["report"] |= {"num_example_items": 3, "num_neighbors": 4, "cutoff": 10}
    whole["evaluate"] |= {"cutoffs": [5, 10], "bootstrap_samples": 100, "protocol": "fullrank"}
    whole["build_index"] |= {"factory": "Flat", "nprobe": None, "ef_search": None}
    return Params.model_validate_json(json.dumps(whole))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Workspace:
    """The files of a small finished run; only its numbers are made up."""
    workspace = Workspace(tmp_path_factory.mktemp("run"))
    random = np.random.default_rng(0)
    rows = []
    for user in range(1, NUM_USERS + 1):
        items = (
            random.choice(NUM_ITEMS, size=6, replace=False, p=np.arange(NUM_ITEMS, 0, -1) / np.arange(NUM_ITEMS, 0, -1).sum()) + 1
        )
        rows += [
            (user, int(item), 1000 + n, 5.0, "train" if n < 4 else "valid" if n < 5 else "test") for n, item in enumerate(items)
        ]
    rows.append((1, NUM_ITEMS, 900, 5.0, "train"))
    interactions = pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row")
    INTERACTIONS.write(interactions, workspace.interactions)
    ITEMS.write(
        pl.DataFrame(
            {
                "item_id": range(1, NUM_ITEMS + 1),
                "raw_item_id": [f"B{n:09d}" for n in range(1, NUM_ITEMS + 1)],
                "title": [f"Item <b>{n}</b>" for n in range(1, NUM_ITEMS + 1)],
                **dict.fromkeys(["brand", "price", "description"], ""),
                "categories": [["a"]] * NUM_ITEMS,
                "features": [[""]] * NUM_ITEMS,
                "image_references": [["x"]] * NUM_ITEMS,
                "has_metadata": True,
            },
            schema=dict(ITEMS.columns),
        ),
        workspace.items,
    )
    write_json(workspace.statistics, statistics(interactions))
    images = [
        ImageRow(n, f"B{n:09d}", "ok", png(n), 300, 200) if n % 5 else ImageRow(n, f"B{n:09d}", "missing_url", None, None, None)
        for n in range(1, NUM_ITEMS + 1)
    ]
    write_shard(shard_path(workspace.images, 0), images, [""] * NUM_ITEMS)
    counts = {f"num_{status}": sum(row.status == status for row in images) for status in STATUSES}
    write_json(coverage_path(workspace.images), {"num_items": NUM_ITEMS, "share_ok": 0.8, **counts})
    ids, raw = np.arange(1, NUM_ITEMS + 1), [row.raw_item_id for row in images]
    for number, variant in enumerate(params.variants):
        if variant != "id":
            vectors = random.normal(size=(3, NUM_ITEMS, 8)).astype(np.float32)
            has_image = np.array([row.status == "ok" for row in images])
            write_embeddings(workspace.embeddings(variant), ids, raw, *vectors, {}, has_image)
            build_index(vectors[2], None, params.build_index, workspace.index(variant))
        for recommender in params.recommenders:
            test = interactions.filter(pl.col("split") == "test")
            of_seeds = []
            for _ in range(2 if recommender != "pop" else 1):
                better = random.integers(0, 25 - 6 * number, NUM_USERS) if recommender != "pop" else np.arange(NUM_USERS) % 20
                placed = test.select("user_id", pl.col("item_id").alias("target_item_id")).with_columns(
                    pl.Series("num_better", better), pl.lit(0).alias("num_tied"), pl.lit(26).alias("candidates")
                )
                of_seeds.append(score_positions(placed, "pessimistic"))
            positions = seeded(*of_seeds, first=0 if recommender == "pop" else 1)
            SEED_POSITIONS.write(positions, workspace.positions(variant, recommender))
            chosen = {} if recommender == "pop" else {"valid_ndcg@10": 0.06 + 0.001 * number}
            write_json(workspace.metrics(variant, recommender), summarise(positions, interactions, params.evaluate) | chosen)
            history = "epoch\tloss\tvalid_ndcg_10\tnum_training\n" + (
                "1\t2.5\t\t2\n2\t2.0\t0.05\t2\n3\t1.9\t0.06\t1\n" if recommender != "pop" else ""
            )
            write_text(workspace.recommender(variant, recommender) / "history.tsv", history)
    write_text(workspace.adapter("sda") / "loss.tsv", LOSS_CURVE)
    write_json(workspace.adapter("sda") / "check.json", {"collapsed": 1.0})
    write_json(workspace.adapter("sda") / "check_details.json", CHECK)
    write_json(workspace.adapter("sda") / "adapter_config.json", {"modalities": ["image", "text"], "gate": "modality"})
    gate = {f"base_model.model.layers.0.q_proj.moda_{name}": random.normal(size=(2, 3)) for name in ("gate", "embedding")}
    save_file(gate, workspace.adapter("sda") / "adapter_model.safetensors")
    write_text(workspace.root / "experiments" / "sweep" / "table.tsv", "temperature\tndcg@10\n0.05\t<b>0.1</b>\n")
    return workspace


def statistics(interactions: pl.DataFrame) -> dict[str, float]:
    """What the filter stage writes; ``test_coverage`` has the real one."""
    dropped = dict.fromkeys((f"rows_dropped_{reason}" for reason in ("duplicate", "core", "no_metadata", "no_image")), 0)
    ends = ("mean", "min", "p10", "p50", "p90", "p99", "max")
    shares = ("metadata", "title", "brand", "price", "categories", "features", "description", "image_reference")
    parts = dict(interactions["split"].value_counts().iter_rows())
    return {
        "rows_read": len(interactions) + 5,
        "rows_bad": 2,
        "rows_dropped_rating": 3,
        **dropped,
        **dict.fromkeys(("rows_repaired", "metadata_rows_read", "metadata_rows_bad", "metadata_rows_repaired"), 0),
        **LineCount(units=Counter({"seconds": len(interactions) + 3})).time_statistics(2018),
        **dict.fromkeys(("ids_repaired", "metadata_ids_repaired"), 0),
        **ValueCount().statistics(),
        "num_users": NUM_USERS,
        "num_items": NUM_ITEMS,
        "num_interactions": len(interactions),
        **{f"num_{part}": parts.get(part, 0) for part in ("train", "valid", "test", "rest")},
        "num_users_without_target": 0,
        "density": 0.2,
        "first_time": 900,
        "last_time": 1005,
        **{f"{name}_{end}": 6.0 for name in ("history_length", "item_count") for end in ends},
        "share_interactions_top_20_percent": 0.4,
        **{f"share_items_with_{name}": 1.0 for name in shares},
        "mean_title_chars": 12.5,
        **{f"share_tied_{name}": 0.0 for name in ("pairs", "valid_targets", "test_targets")},
    }


def page(workspace: Workspace, params: Params) -> str:
    """What the report stage does."""
    positions = {(v, r): SEED_POSITIONS.read(workspace.positions(v, r)) for r in params.recommenders for v in params.variants}
    interactions = INTERACTIONS.read(workspace.interactions)
    comparisons = compare_variants(positions, ["zero_shot", "id"], interactions, params.evaluate, params.report.cutoff)
    shown, with_vectors = example_items(workspace, params.report), [variant for variant in params.variants if variant != "id"]
    neighbors = {v: load_index(workspace.index(v)).neighbor_lists(shown, params.report.num_neighbors) for v in with_vectors}
    return render(collect(workspace, params, comparisons, neighbors, commit=None, costs=()))


def test_a_finished_run_becomes_a_page(finished: Workspace, params: Params) -> None:
    html = page(finished, params)
    assert html == page(finished, params)
    assert html.count("<article") == 3
    assert html.count('<ol class="neighbors">') == 6
    assert html.count("Simulated shop.") == 1
    assert "Item &lt;b&gt;" in html
    assert html.count(">any</th>") == 2  # popularity and BPR look at no vectors: one row for all variants
    assert html.count("<figure>") == 9  # a ladder, the long tail, two validation charts, an adapter's loss, two maps, two gates
    assert html.count(">Pair ") == 6  # three of each kind
    assert "If one modality is missing" in html
    assert "&lt;b&gt;0.1&lt;/b&gt;" not in html  # of an experiment: they stand on the page of --experiments
    assert "items seen by each adapter" in html


def test_a_variant_of_one_vector_an_item_has_its_place_on_the_page(finished: Workspace, params: Params, tmp_path: Path) -> None:
    workspace = Workspace(Path(shutil.copytree(finished.root, tmp_path / "run")))
    for folder in ("models", "evaluation", "metrics", "indexes"):
        shutil.copytree(workspace.root / folder / "zero_shot", workspace.root / folder / "minilm")
    fused = np.random.default_rng(1).normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    ids, raw = np.arange(1, NUM_ITEMS + 1), [f"B{n:09d}" for n in range(1, NUM_ITEMS + 1)]
    write_embeddings(workspace.embeddings("minilm"), ids, raw, None, None, fused, {}, np.zeros(NUM_ITEMS, dtype=bool))
    whole = params.model_dump(mode="json")
    whole["import_embeddings"]["variants"] = {"minilm": {"path": "vectors.parquet"}}
    whole["variants"] = [*whole["variants"], "minilm"]
    whole["train_recommender"]["variants"] = [*whole["train_recommender"]["variants"], "minilm"]
    html = page(workspace, Params.model_validate_json(json.dumps(whole)))
    assert html.count('<ol class="neighbors">') == 9
    assert html.count(">Pair ") == 6  # found in our own vectors


def test_the_page_with_costs_stands_beside_and_leaves_the_other_as_it_is(
    finished: Workspace, params: Params, tmp_path: Path
) -> None:
    workspace = Workspace(Path(shutil.copytree(finished.root, tmp_path / "run")))
    YAML(typ="safe", pure=True).dump(params.model_dump(mode="json"), workspace.root / "params.yaml")
    report(workspace.root)
    first = workspace.report.read_bytes()
    assert b"sda report --costs" in first
    kept = workspace.costs.read_bytes()
    workspace.costs.unlink()
    with pytest.raises(typer.Exit):  # nothing to show
        report(workspace.root, costs=True)
    workspace.costs.write_bytes(kept)
    report(workspace.root, costs=True)
    with_costs = workspace.costs_page.read_text(encoding="utf-8")
    assert '<th scope="row">report</th>' in with_costs
    assert "sda report --costs" not in with_costs
    report(workspace.root)
    assert workspace.report.read_bytes() == first
    assert [run.stage for run in costs.read(workspace.costs)] == ["report"] * 2  # of the pipeline's page alone


def test_the_page_of_the_pipeline_does_not_depend_on_the_experiments(
    finished: Workspace, params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(Path(shutil.copytree(finished.root, tmp_path / "run")))
    YAML(typ="safe", pure=True).dump(params.model_dump(mode="json"), workspace.root / "params.yaml")
    report(workspace.root)
    first = workspace.report.read_bytes()
    assert b'id="experiments"' not in first
    report(workspace.root, experiments=True)
    page = workspace.experiments_page.read_text(encoding="utf-8")
    assert "<h3>sweep/table.tsv</h3>" in page
    assert "&lt;b&gt;0.1&lt;/b&gt;" in page
    write_text(workspace.experiments / "results" / "new" / "table.md", "# New\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    report(workspace.root)
    assert workspace.report.read_bytes() == first
    report(workspace.root, experiments=True)
    assert "<h3>new</h3>" in workspace.experiments_page.read_text(encoding="utf-8")
    shutil.rmtree(workspace.experiments)
    report(workspace.root)
    assert workspace.report.read_bytes() == first
    for flags, expected in (
        ({"experiments": True}, "contains no table and no plot; run one of `python -m experiments`"),
        ({"experiments": True, "costs": True}, "--costs and --experiments: each write a separate page; name one of them"),
    ):
        with pytest.raises(typer.Exit):
            report(workspace.root, **flags)
        assert expected in capsys.readouterr().err
    assert [run.stage for run in costs.read(workspace.costs)] == ["report"] * 3  # of the pipeline's page alone


def test_numbers_come_from_the_metrics_and_the_comparisons(finished: Workspace, params: Params) -> None:
    positions = {(v, "sasrec"): SEED_POSITIONS.read(finished.positions(v, "sasrec")) for v in params.variants}
    comparisons = compare_variants(positions, ["zero_shot", "id"], INTERACTIONS.read(finished.interactions), params.evaluate, 10)
    data = collect(finished, params, comparisons, {}, commit="abc", costs=())
    found = {(result.recommender, result.variant): result for result in data.results}
    assert set(found) == {("pop", "any"), ("bpr", "any"), ("sasrec", "id"), ("sasrec", "zero_shot"), ("sasrec", "sda")}
    metrics = json.loads(finished.metrics("sda", "sasrec").read_text(encoding="utf-8"))
    result = found["sasrec", "sda"]
    assert (result.ndcg.value, result.ndcg.low, result.ndcg.high) == tuple(
        metrics[f"ndcg@10{end}"] for end in ("", "_low", "_high")
    )
    assert result.num_users == NUM_USERS
    assert [change.baseline for change in result.changes] == ["zero_shot", "id"]
    zero_shot = found["sasrec", "zero_shot"]
    assert result.changes[0].difference == pytest.approx(result.ndcg.value - zero_shot.ndcg.value)
    assert [change.baseline for change in zero_shot.changes] == ["id"]
    assert found["sasrec", "id"].changes == ()
    assert data.validation_charts[0].curves[0].points == ((2.0, 0.05), (3.0, 0.06))  # epoch 1 was not evaluated
    assert data.adapter_charts[0].curves[0].points == ((5.0, 3.0), (10.0, 2.0), (15.0, 2.5), (20.0, 2.4), (25.0, 2.2))
    training = params.train_adapter.training
    (learning,) = data.learning
    assert (learning.variant, learning.num_steps, learning.batch_size) == ("sda", training.num_steps, training.batch_size)
    assert learning.found == pytest.approx((0.25, 0.375))  # of five the last two
    assert learning.targets == pytest.approx((1.5, 2.25))
    assert (learning.cosine_images, learning.cosine_texts, learning.collapsed) == ((0.5, 0.6), (0.4, 0.99), True)
    assert learning.num_sampled == 96
    assert ("Mean cosine of the texts of two items", 0.4, 0.99) in learning.figures
    assert len(learning.figures) == len(FIGURES), "every figure has a label"
    assert data.examples == ()
    train = INTERACTIONS.read(finished.interactions).filter(pl.col("split") == "train")
    popular = train["item_id"].value_counts()["count"].sort(descending=True)
    assert dict(data.coverage.long_tail)[0.2] == pytest.approx(popular[: NUM_ITEMS // 5].sum() / len(train))
    assert data.coverage.rows_read == 366
    assert (data.commit, data.is_simulation, data.costs) == ("abc", True, ())


def test_examples_have_images_and_spread_over_popularity(finished: Workspace, params: Params) -> None:
    chosen = example_items(finished, params.report)
    train = INTERACTIONS.read(finished.interactions).filter(pl.col("split") == "train")
    counts = np.bincount(train["item_id"].to_numpy(), minlength=NUM_ITEMS + 1)
    assert len(chosen) == 3
    assert all(item % 5 for item in chosen)  # every fifth has no image
    assert counts[chosen[0]] == max(counts[n] for n in range(1, NUM_ITEMS + 1) if n % 5)
    assert counts[chosen[0]] > counts[chosen[1]] > counts[chosen[2]]


def test_spread_items_by_hand() -> None:
    counts = {1: 5, 2: 9, 3: 1, 4: 5, 5: 0}
    assert spread_items(counts, 5) == [2, 1, 4, 3, 5]
    assert spread_items(counts, 2) == [2, 5]
    assert spread_items(counts, 1) == [2]
    assert spread_items(counts, 99) == [2, 1, 4, 3, 5]
    assert spread_items({}, 3) == []


def test_thumbnails_are_small_and_equal() -> None:
    first, second = thumbnail(png(3)), thumbnail(png(3))
    assert first == second
    assert first.media_type == "image/jpeg"
    with Image.open(io.BytesIO(first.data)) as opened:
        assert opened.size == (128, 85)


def test_curves_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_curve(tmp_path / "absent.tsv", "loss")
    path = tmp_path / "curve.tsv"
    path.write_text("epoch\tloss\n", encoding="utf-8")
    assert read_curve(path, "loss") == ()
    with pytest.raises(ArtifactError, match=r"no column valid.*epoch, loss"):
        read_curve(path, "valid")
    path.write_text("", encoding="utf-8")  # what is written where there is no record
    assert read_curve(path, "loss") == ()
    path.write_bytes(b"\x00\xff\xfe\n1\t2\t3\t4\n\n")
    with pytest.raises(ArtifactError):
        read_curve(path, "loss")
    path.write_text("epoch\tvalid_ndcg_10\n1\tNone\n2\tnan\n3\t0.5\n", encoding="utf-8")
    assert read_curve(path, "valid") == ((3.0, 0.5),)


def test_missing_files_are_one_line(finished: Workspace, params: Params) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        collect(Workspace(finished.root / "nowhere"), params, [], {}, commit=None, costs=())
    incomplete = params.model_copy(update={"report": params.report.model_copy(update={"cutoff": 20})})
    with pytest.raises(ArtifactError, match=r"no hit@20"):
        collect(finished, incomplete, [], {}, commit=None, costs=())
    with pytest.raises(ArtifactError, match="no item 31"):
        collect(finished, params, [], {"sda": {1: [(31, 0.5)]}}, commit=None, costs=())
