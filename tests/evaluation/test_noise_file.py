"""The file of the variation between seeds: its content, invalid files, and the settings it applies to."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, POSITIONS
from sda_core.errors import ArtifactError, DataError
from sda_core.evaluation import hit, ndcg, noise_file
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.params import TailParams, parse_params
from sda_core.traits import seeds_of
from tests.sections import seeded

TAIL = TailParams(definition="train_lt_k", max_count=2, share=0.8)
SETTINGS = {"filter": "0123456789abcdef"}
# item 1 has two training interactions, items 2 and 3 have one or none: these are tail
INTERACTIONS_OF_FOUR = pl.DataFrame(
    [(1, 1, 1, 5.0, "train"), (2, 1, 1, 5.0, "train"), (3, 2, 1, 5.0, "train")]
    + [(user, item, 9, 5.0, "test") for user, item in ((1, 2), (2, 1), (3, 1), (4, 3))],
    schema=dict(INTERACTIONS.columns),
    orient="row",
)


def placed(places: list[float], targets: tuple[int, ...] = (2, 1, 1, 3)) -> pl.DataFrame:
    columns = {
        "user_id": [1, 2, 3, 4],
        "target_item_id": list(targets),
        "position": places,
        "candidates": [9] * 4,
        "num_better": [0] * 4,
        "num_tied": [0] * 4,
    }
    return pl.DataFrame(columns, schema=dict(POSITIONS.columns))


def noise(**changes: Any) -> SeedNoise:
    values = {"sda/sasrec/ndcg@10": (0.1, 0.2, 0.15), "id/pop/hit@10": (0.0, 0.0, 1.0)}
    return SeedNoise(**({"seeds": (1, 2, 3), "settings": SETTINGS, "targets": "f" * 16, "values": values} | changes))


@pytest.fixture
def params(repository: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(repository / "params.yaml")


# ------------------------------------------------------------------------------------------------- the file
def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "seed_noise.json"
    noise_file.write(noise(), path)
    assert noise_file.read(path) == noise()
    first = path.read_bytes()
    noise_file.write(noise_file.read(path), path)
    assert path.read_bytes() == first
    # a line for each name, so that Git shows which number changed
    lines = path.read_text().splitlines()
    assert '    "sda/sasrec/ndcg@10": [0.1, 0.2, 0.15],' in lines
    assert json.loads(path.read_text())["seeds"] == [1, 2, 3]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no seeds": (lambda data: data.pop("seeds"), "seeds: Field required"),
    "one seed": (lambda data: data.update(seeds=[1]), "seeds: "),
    "a seed twice": (lambda data: data.update(seeds=[1, 2, 2]), "a seed occurs twice"),
    "a seed that is text": (lambda data: data.update(seeds=[1, 2, "3"]), "seeds.2: "),
    "something else": (lambda data: data.update(comment="x"), "comment: "),
    "a hash that is none": (lambda data: data.update(targets="abc"), "targets: "),
    "settings that are a list": (lambda data: data.update(settings=[1]), "settings: "),
    "a number for a hash": (lambda data: data["settings"].update(filter=1), "settings.filter: "),
    "too few numbers": (lambda data: data["values"].update({"sda/sasrec/hit@10": [0.1]}), "'sda/sasrec/hit@10' has 1 numbers"),
    "another name": (lambda data: data["values"].update({"sda": [0.1, 0.1, 0.1]}), "'sda' has 3 numbers, expected VARIANT"),
    "no share": (lambda data: data["values"].update({"sda/sasrec/hit@10": [0.1, 1.5, 0.1]}), "values.sda/sasrec/hit@10.1: "),
    "text": (lambda data: data["values"].update({"sda/sasrec/hit@10": [0.1, "a", 0.1]}), "values.sda/sasrec/hit@10.1: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_another_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "seed_noise.json"
    noise_file.write(noise(), path)
    data = json.loads(path.read_text())
    damage, problem = DAMAGES[name]
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError) as caught:
        noise_file.read(path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "restore it (`git checkout -- seed_noise.json`)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"seeds": [1, 2], "targets": NaN}', b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "seed_noise.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="restore it"):
        noise_file.read(path)
    with pytest.raises(ArtifactError, match=r"does not exist; run `python -m experiments seed_noise`"):
        noise_file.read(tmp_path / "absent.json")


# ------------------------------------------------------------------------------------------------- from positions
def gathered(runs: dict[int, dict[tuple[str, str], pl.DataFrame]]) -> SeedNoise:
    return noise_file.gather(runs, SETTINGS, INTERACTIONS_OF_FOUR, TAIL, (5, 10))


def test_values_are_the_metrics_of_each_run_mean_over_its_seeds() -> None:
    places = {1: [1.0, 2.0, 30.0, 4.0], 2: [12.0, 2.0, 3.0, 40.0], 5: [1.0, 1.0, 1.0, 1.0]}
    worst = [40.0] * 4  # of a second seed of each run
    found = gathered({seed: {("sda", "sasrec"): seeded(placed(first), placed(worst))} for seed, first in places.items()})
    assert found.seeds == (1, 2, 5)
    for cutoff in (5, 10):
        for name, metric in (("hit", hit), ("ndcg", ndcg)):
            whole = [metric(places[seed], cutoff) / 2 for seed in (1, 2, 5)]
            tail = [metric(np.array(places[seed])[[0, 3]], cutoff) / 2 for seed in (1, 2, 5)]
            assert found.values[f"sda/sasrec/{name}@{cutoff}"] == pytest.approx(whole)
            assert found.values[f"sda/sasrec/tail_{name}@{cutoff}"] == pytest.approx(tail)
    spread = found.spread("sda", "sasrec", "hit@10")
    assert spread is not None
    assert spread.sd == pytest.approx(np.std([0.375, 0.25, 0.5], ddof=1))
    assert (spread.degrees, spread.num_runs) == (2, 1)
    assert found.spread("sda", "sasrec", "hit@7") is None


def test_runs_that_do_not_belong_together_are_refused() -> None:
    one = {("sda", "sasrec"): placed([1.0] * 4)}
    with pytest.raises(DataError, match="2 sets of targets"):
        gathered({1: one, 2: {("sda", "sasrec"): placed([1.0] * 4, targets=(2, 1, 1, 2))}})
    with pytest.raises(DataError, match="seeds 1 and 2 do not have the same variants and recommenders"):
        gathered({1: one, 2: one | {("sda", "bpr"): placed([1.0] * 4)}})


def test_the_hash_of_targets_knows_users_targets_and_candidates_and_not_places_or_order() -> None:
    base = placed([1.0, 2.0, 3.0, 4.0])
    expected = noise_file.targets_hash(base)
    assert noise_file.targets_hash(placed([4.0, 3.0, 2.0, 1.0])) == expected
    assert noise_file.targets_hash(base.reverse()) == expected
    others = [base.with_columns(pl.col(name) + 1) for name in ("user_id", "target_item_id", "candidates")]
    assert len({expected, noise_file.targets_hash(base.head(3)), *map(noise_file.targets_hash, others)}) == 5


# ------------------------------------------------------------------------------------------------- which settings
def changed(params: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(params)
    *parents, last = path.split(".")
    section = params
    for name in parents:
        section = section[name]
    assert last in section, path
    assert section[last] != value
    section[last] = value
    return params


MATTERS = {
    "dataset.num_users": ("all", "dataset"),
    "filter.min_user_interactions": ("all", "filter"),
    "evaluate.ties": ("all", "evaluate"),
    "evaluate.tail.max_count": ("all", "evaluate"),
    "backbone.pooling": ("vectors", "backbone"),
    "items.noun": ("vectors", "items"),
    "fetch_images.stored_pixels": ("vectors", "fetch_images.stored_pixels"),
    "export_embeddings.fused_dim": ("vectors", "export_embeddings"),
    "train_adapter.training.num_steps": ("sda lora", "train_adapter.training"),
    "train_adapter.loss.temperature": ("sda", "train_adapter.loss"),
    "train_adapter.moda.r": ("sda", "train_adapter.moda"),
    "train_adapter.lora.r": ("lora", "train_adapter.lora"),
    "train_recommender.sasrec.dropout": ("sasrec", "train_recommender.sasrec"),
    "train_recommender.seeds": ("all", "number of train_recommender.seeds"),
}
NO_MATTER = (
    "train_adapter.training.seed",
    "train_adapter.training.vision_cache",
    "train_adapter.training.check",
    "train_recommender.slmrec.dropout",
    "export_embeddings.batch_size",
    "evaluate.bootstrap_samples",
    "evaluate.batch_size",
    "evaluate.cutoffs",
    "evaluate.negatives_seed",  # full rank draws nothing
    "report.title",
    "runtime.num_threads",
    "runtime.device",
    "download.num_retries",
    "fetch_images.num_workers",
)
PAIRS = [(variant, name) for variant in ("id", "zero_shot", "lora", "sda") for name in ("pop", "sasrec")]


def measured_under(params: dict[str, Any]) -> SeedNoise:
    settings: dict[str, str] = {}
    for pair in PAIRS:
        settings |= noise_file.settings_hashes(params, *pair)
    return noise(settings=settings)


@pytest.mark.parametrize("path", MATTERS)
def test_a_setting_that_matters_is_named_for_what_follows_from_it(params: dict[str, Any], path: str) -> None:
    whom, section = MATTERS[path]
    base = measured_under(params)
    other = changed(params, path, {"evaluate.ties": "mean", "train_recommender.seeds": [1, 2]}.get(path, 12345))
    for variant, recommender in PAIRS:
        assert base.unlike(params, variant, recommender) == []
        concerned = whom == "all" or variant in whom.split() or recommender == whom or (whom == "vectors" and variant != "id")
        assert base.unlike(other, variant, recommender) == ([section] if concerned else []), (variant, recommender)


@pytest.mark.parametrize("path", NO_MATTER)
def test_seeds_speed_and_presentation_do_not_matter(params: dict[str, Any], path: str) -> None:
    base, other = measured_under(params), changed(params, path, 12345)
    assert all(base.unlike(other, *pair) == [] for pair in PAIRS)


def test_other_seeds_do_not_matter_if_there_are_as_many(params: dict[str, Any]) -> None:
    other = changed(params, "train_recommender.seeds", [7, 8, 9])
    assert all(measured_under(params).unlike(other, *pair) == [] for pair in PAIRS)


def test_negatives_that_are_drawn_matter_and_where_raw_files_lie_does_not(params: dict[str, Any], repository: Path) -> None:
    params = changed(params, "evaluate.protocol", "uni100")
    assert measured_under(params).unlike(changed(params, "evaluate.negatives_seed", 8), "id", "pop") == ["evaluate"]
    params["dataset"] = YAML(typ="safe", pure=True).load(repository / "conf" / "dataset" / "beauty.yaml")["dataset"]
    elsewhere = changed(params, "dataset.local_folder", "raw files")
    assert measured_under(params).unlike(elsewhere, "id", "pop") == []
    assert measured_under(params).unlike(changed(params, "dataset.category", "Other"), "id", "pop") == ["dataset"]


def test_controls_and_imports_follow_from_their_own_settings(params: dict[str, Any]) -> None:
    params["control_embeddings"] = {"variants": ["random"], "seed": 1}
    params["import_embeddings"]["variants"] = {"theirs": {"path": "theirs.parquet"}}
    params["joint_embeddings"]["variants"] = {"joint": {"of": "zero_shot"}, "sda_joint": {"of": "sda"}}
    adapted = noise_file.sections(params, "sda_joint", "sasrec")
    assert adapted.keys() - noise_file.sections(params, "sda", "sasrec").keys() == {"joint_embeddings.variants.sda_joint"}
    assert "train_adapter.loss" not in noise_file.sections(params, "joint", "sasrec")
    for variant, path, value in (
        ("random", "control_embeddings.seed", 2),
        ("theirs", "import_embeddings.variants.theirs.path", "others.parquet"),
        ("joint", "joint_embeddings.variants.joint.of", "lora"),
    ):
        names = {name for name in noise_file.sections(params, variant, "sasrec") if name.split(".")[0] == path.split(".")[0]}
        assert len(names) == 1
        hashes, others = (
            noise_file.settings_hashes(given, variant, "sasrec") for given in (params, changed(params, path, value))
        )
        assert {name for name in hashes if hashes[name] != others[name]} == names
        assert noise_file.settings_hashes(params, "zero_shot", "sasrec").keys() & names == set()


def test_params_of_another_version_are_read_as_they_stand() -> None:
    assert noise_file.sections({}, "sda", "sasrec")["filter"] is None
    assert noise_file.sections({"filter": 3, "train_adapter": None}, "sda", "sasrec")["filter"] == 3
    assert noise_file.has_seed({}, "sasrec")  # not known, so no exact match is asked for
    assert not noise_file.has_seed({"train_recommender": {"pop": {"kind": "pop"}}}, "pop")
    assert noise_file.has_seed({"train_recommender": {"bpr": {"kind": "bpr"}}}, "bpr")


def test_a_recommender_has_seeds_if_it_is_trained_with_several(params: dict[str, Any]) -> None:
    section = parse_params(params, "params.yaml").train_recommender
    for name in ("pop", "nearest", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec"):
        assert noise_file.has_seed(params, name) == (seeds_of(section.of(name), [1, 2]) == (1, 2)), name
