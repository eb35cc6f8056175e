"""The params file: every mistake is one line with its path; nothing is ignored, guessed or coerced."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Literal, get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from ruamel.yaml import YAML

from sda_core.adapters import MoDAConfig
from sda_core.errors import ConfigError
from sda_core.modalities import MODALITIES
from sda_core.params import (
    NUM_MODALITIES,
    AdapterParams,
    BackboneParams,
    LossParams,
    TrainAdapterParams,
    TrainedVariant,
    load_params,
    parse_params,
)
from sda_core.variants import adapter_of, indexed_variants, is_trained, passes_of

ROOT = Path(__file__).resolve().parents[1]


def data() -> dict:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))


RETRIEVAL = {"factory": "HNSW32", "nprobe": None, "ef_search": 200, "depth": 100, "num_queries": 10}


def problem(edit) -> str:
    tree = data()
    edit(tree)
    with pytest.raises(ConfigError) as caught:
        parse_params(tree, "params.yaml")
    text = str(caught.value)
    assert "\n" not in text
    return text


def put(path: str, value: object):
    def edit(tree: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            tree = tree[key]
        tree[last] = value

    return edit


def test_the_shipped_file_is_valid() -> None:
    load_params(ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("filter.min_user_interactions", "five", "filter.min_user_interactions: should be a valid integer (got 'five')"),
        ("filter.min_user_interactions", 0, "filter.min_user_interactions: should be greater than or equal to 1 (got 0)"),
        ("filter.min_user_interactions", True, "filter.min_user_interactions: should be a valid integer (got True)"),
        ("filter.typo", 1, "filter.typo: unknown parameter"),
        (
            "train_recommender.sasrec.seed",
            42,
            "train_recommender.sasrec.seed: is now the list train_recommender.seeds; `sda upgrade` moves",
        ),
        ("train_recommender.seeds", [1, 1], "train_recommender.seeds: should name each once"),
        ("dataset.edition", 2019, "dataset.edition: should be 2014, 2018 or 2023 (got 2019)"),
        ("dataset.source", "amazn", "dataset.source: should be one of "),
        ("train_adapter.training.learning_rate", "2e-4x", "train_adapter.training.learning_rate: should be a valid number"),
        ("train_adapter.moda.num_experts", 3, "train_adapter.moda: r (8) must be a multiple of num_experts (3)"),
        (
            "variants",
            ["id", "nope"],
            "variants: unknown nope; known are id, image_only, lora, oracle, random, sda, text_only, zero_shot",
        ),
        (
            "import_embeddings.variants",
            {"sda": {"path": "x"}},
            "import_embeddings.variants: sda is a reserved name (made by the pipeline itself); choose another",
        ),
        ("import_embeddings.variants", {"minilm": {}}, "import_embeddings.variants.minilm.path: missing"),
        ("import_embeddings.max_missing_share", 2.0, "import_embeddings.max_missing_share: should be less than or equal to 1"),
        ("filter.valid_from", 0.8, "filter: valid_from and test_from must be null with split 'leave_one_out'"),
        ("filter.split", "global_time", "split 'global_time' needs valid_from before test_from"),
        ("fetch_images.stored_pixels", 10_000, "backbone.max_pixels: 12544 is more than fetch_images.stored_pixels (10000)"),
        ("evaluate.retrieval", {"factory": "Flat"}, "evaluate.retrieval.depth: missing"),
        (
            "evaluate.retrieval",
            RETRIEVAL | {"depth": 19},
            "evaluate: retrieval.depth (19) should be at least the largest of cutoffs 20",
        ),
        ("evaluate.retrieval", RETRIEVAL | {"ef_search": None}, "evaluate.retrieval: ef_search should be set for HNSW32"),
        ("report.cutoff", 7, "report.cutoff: 7 is not among evaluate.cutoffs [5, 10, 20]"),
    ],
)
def test_a_mistake_is_named_with_its_path(path: str, value: object, expected: str) -> None:
    assert expected in problem(put(path, value))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("recommenders", [], "recommenders: should not be empty (got [])"),
        (
            "recommenders",
            ["id"],
            "recommenders.0: should be 'pop', 'nearest', 'bpr', 'vbpr', 'slmrec', 'sasrec' or 'bert4rec' (got 'id')",
        ),
        ("evaluate.cutoffs", [0], "evaluate.cutoffs.0: should be greater than or equal to 1 (got 0)"),
        ("report.title", "", "report.title: should not be empty (got '')"),
    ],
)
def test_an_empty_list_or_text_is_one_problem_and_a_wrong_entry_is_no_second_one(path: str, value: object, expected: str) -> None:
    text = problem(put(path, value))
    assert expected in text
    assert "after validation" not in text
    assert sum(line.startswith(path) for line in text.removeprefix("params.yaml: ").split(" | ")) == 1


def test_retrieval_is_for_full_rank_only() -> None:
    tree = data()
    tree["evaluate"] |= {"retrieval": RETRIEVAL}
    section = parse_params(tree, "params.yaml").evaluate.retrieval
    assert section is not None
    assert section.model_dump() == RETRIEVAL
    text = problem(lambda tree: tree["evaluate"].update(retrieval=RETRIEVAL, protocol="uni100"))
    assert "evaluate: retrieval searches all items, which is protocol 'fullrank' (got 'uni100'); set it to null" in text


@pytest.mark.parametrize(("section", "field"), [("backbone", "kind"), ("dataset", "source")])
def test_an_unknown_kind_of_section_names_its_field(section: str, field: str) -> None:
    known = problem(lambda tree: tree[section].update({field: "nosuch"})).removeprefix("params.yaml: ")
    assert re.fullmatch(rf"{section}\.{field}: should be one of ('\w+', )+'\w+' \(got 'nosuch'\)", known), known
    assert f"'{data()[section][field]}'" in known
    assert f"{section}.{field}: missing" in problem(lambda tree: tree[section].pop(field))
    assert f"{section}.{field}: " in problem(lambda tree: tree[section].update({field: 3}))


def test_the_path_of_a_mistake_is_the_path_in_the_file() -> None:
    """pydantic puts the chosen kind of a union into the path; users have no such level."""
    kinds = {section.model_fields["kind"].annotation.__args__[0] for section in get_args(get_args(BackboneParams)[0])}
    assert len(kinds) >= 10
    for kind in kinds:
        text = problem(lambda tree, kind=kind: tree.update(backbone={"kind": kind, "max_text_tokens": "many"}))
        assert "backbone.max_text_tokens: should be a valid integer (got 'many')" in text, text


def test_an_imported_variant_is_known_and_not_made_here() -> None:
    tree = data()
    tree["import_embeddings"]["variants"] = {"minilm": {"path": "minilm.parquet"}}
    tree["variants"].append("minilm")
    tree["train_recommender"]["variants"].append("minilm")
    params = parse_params(tree, "params.yaml")
    assert params.import_embeddings.of("minilm").path == "minilm.parquet"
    with pytest.raises(ConfigError, match="'minilm' is imported; use `sda import-embeddings`"):
        is_trained(params, "minilm")


def composed(*overrides: str) -> dict:
    """What `dvc exp run -S` makes of overrides."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    return YAML(typ="safe").load(OmegaConf.to_yaml(config))


def test_joint_passes_are_variants() -> None:
    params = parse_params(composed("ladder=joint"), "params.yaml")
    assert params.variants == ("id", "zero_shot", "joint", "sda", "sda_joint")
    assert indexed_variants(params) == params.variants[1:]
    assert [adapter_of(params, variant) for variant in params.variants] == [None, None, None, "sda", "sda"]
    assert [passes_of(params, variant) for variant in ("zero_shot", "sda", "joint", "sda_joint")] == [
        ("image", "text"), ("image", "text"), ("joint",), ("joint",),
    ]  # fmt: skip
    added = "+joint_embeddings.variants.lora_joint={of: lora}"
    lists = [f"{name}=[zero_shot,lora,lora_joint]" for name in ("variants", "train_recommender.variants")]
    assert adapter_of(parse_params(composed(added, *lists), "params.yaml"), "lora_joint") == "lora"
    with pytest.raises(ConfigError, match="unknown variant 'jont'; known are id, joint, sda, sda_joint, zero_shot"):
        adapter_of(params, "jont")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("export_embeddings.with_base", True),
        ("export_embeddings.center", True),
        ("export_embeddings.center", False),
        ("export_embeddings.image_weight", 0.5),
        ("export_embeddings.text_weight", 2.0),
        ("export_embeddings.balance", "equal_energy"),
        ("export_embeddings.axis_scaling", "even"),
        ("train_adapter.loss.keep_base", 0.5),
        ("train_adapter.loss.center", "batch"),
        ("train_adapter.loss.center", "running"),
        ("train_adapter.loss.teacher_targets", 4.0),
        ("train_adapter.loss.teacher_source", "base"),
    ],
)
def test_what_keeps_the_geometry_is_a_value_of_an_experiment(path: str, value: object) -> None:
    found = parse_params(composed(f"{path}={json.dumps(value)}"), "params.yaml")
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_all_problems_are_reported_at_once() -> None:
    def edit(tree: dict) -> None:
        tree["filter"]["min_rating"] = "low"
        del tree["build_index"]["factory"]
        tree["surprise"] = 1

    text = problem(edit)
    assert "filter.min_rating: should be a valid number (got 'low')" in text
    assert "build_index.factory: missing" in text
    assert "surprise: unknown parameter" in text


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "path",
    [
        "export_embeddings.image_weight", "train_recommender.nearest.shrinkage", "train_adapter.training.learning_rate",
        "download.timeout_seconds", "train_adapter.loss.temperature", "filter.min_rating",
    ],
)  # fmt: skip
def test_numbers_are_finite(path: str, value: float) -> None:
    def edit(tree: dict) -> None:
        *parents, last = path.split(".")
        for name in parents:
            tree = tree[name]
        tree[last] = value

    assert f"{path}: should be a finite number (got {value})" in problem(edit)


@pytest.mark.parametrize(
    "path",
    ["train_recommender.nearest.max_length", "train_recommender.sasrec.max_length", "filter.time_resolution_seconds",
     "train_adapter.training.num_steps", "download.max_file_bytes"],
)  # fmt: skip
def test_whole_numbers_have_an_upper_limit(path: str) -> None:
    def edit(tree: dict) -> None:
        *parents, last = path.split(".")
        for name in parents:
            tree = tree[name]
        tree[last] = 10**18

    assert f"{path}: should be less than or equal to " in problem(edit)


def test_yaml_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    """YAML 1.2: `2e-3` is a number, `no` is a string."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert "learning_rate: 0.002" in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("learning_rate: 0.002", "learning_rate: 2e-3"), encoding="utf-8")
    assert load_params(path).train_adapter.training.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "params.yaml: no such file; restore it, or pass the project folder with --root"),
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n", "should be a mapping of sections (got a list); restore it, for example from Git"),
        (b"", "should be a mapping of sections (got an empty file); restore it, for example from Git"),
        (b"text", "should be a mapping of sections (got 'text'); restore it"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"when: 2020-01-01 10:00:00\n", "of a type that params do not have"),
        (b"a: 1\nb: 2\na: 3\n", 'is not valid YAML: line 3: found duplicate key "a"'),
        (b"a: &a [*a]\n", "holds a value that params cannot have"),
        (b"a: " + b"1" * 5000, "cannot be read as YAML"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "cannot be read as YAML"),
        (b'filter: {noun: ["\\ud800x"]}\n', "filter.noun.0: holds half of a surrogate pair"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_another_name_was_an_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.yaml: no such file; correct --params"):
        load_params(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("valid_from", "test_from", "fits"),
    [
        ("2013-06-30", "2014-01-31", True),
        (0.8, 0.9, True),
        ("2014-01-31", "2014-01-31", False),
        (0.9, 0.8, False),
        (0.8, "2014-01-31", False),
        (None, 0.9, False),
        ("2014-02-30", "2015-01-01", False),
        ("20140101", "2015-01-01", False),
        (0.0, 0.9, False),
        (1, 2, False),
    ],
)
def test_the_cuts_of_a_split_by_time(valid_from: object, test_from: object, fits: bool) -> None:
    tree = data()
    tree["filter"] |= {"split": "global_time", "valid_from": valid_from, "test_from": test_from}
    if fits:
        parse_params(tree, "params.yaml")
        return
    with pytest.raises(ConfigError, match="filter") as caught:
        parse_params(tree, "params.yaml")
    assert "\n" not in str(caught.value)


def test_a_day_needs_no_quotes(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("split: leave_one_out", "split: global_time")
    text = text.replace("valid_from: null", "valid_from: 2013-06-30").replace("test_from: null", "test_from: '2014-01-31'")
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    params = load_params(path).filter
    assert (params.valid_from, params.test_from) == ("2013-06-30", "2014-01-31")


def test_sections_cannot_be_changed() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.filter.min_rating = 3.0  # type: ignore[misc]


REFERENCE = {
    "variant": "reference", "teacher": "mean", "temperature": 3.0, "teacher_temperature": None, "learn_temperature": True,
    "teacher_source": "adapted", "detach_teacher": False, "normalize": False, "false_negatives": "keep",
    "teacher_targets": None, "center": "none", "keep_base": 0.0,
}  # fmt: skip
CHECKPOINT = {
    "kind": "qwen2_5_vl", "name": "owner/model", "revision": "0" * 40, "dtype": "bfloat16", "attention": "auto",
    "max_text_tokens": 128, "min_pixels": 784, "max_pixels": 12544, "pooling": "mean",
}  # fmt: skip
CLIP = {
    "kind": "clip", "name": "owner/model", "revision": "0" * 40, "dtype": "float32", "attention": "auto", "max_text_tokens": 77
}  # fmt: skip
TINY = {
    "kind": "tiny_qwen2_5_vl", "seed": 1, "hidden_size": 48, "num_layers": 1, "num_heads": 3, "vision_hidden_size": 32,
    "vision_depth": 1, "min_pixels": 784, "max_pixels": 784, "max_text_tokens": 64, "pooling": "mean",
}  # fmt: skip
AMAZON = {
    "source": "amazon", "edition": 2014, "category": "Beauty", "reviews": ["r"], "metadata": ["m"], "image_archive": None,
    "reviews_sha256": None, "metadata_sha256": None, "image_archive_sha256": "0" * 64, "image_folder": None, "local_folder": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # lists that name something twice
        ({"variants": ["id", "sda", "sda", "id"]}, "variants: should name each once (got id, sda more than once)"),
        ({"recommenders": ["pop", "pop"]}, "recommenders: should name each once (got pop more than once)"),
        ({"evaluate.cutoffs": [5, 10, 10]}, "evaluate.cutoffs: should name each once (got 10 more than once)"),
        ({"items.fields": ["title", "title"]}, "items.fields: should name each once (got title more than once)"),
        (
            {"control_embeddings.variants": ["random", "random"]},
            "control_embeddings.variants: should name each once (got random more than once)",
        ),
        (
            {"control_embeddings.variants": ["random", "oracle"], "dataset": AMAZON | {"image_archive": ["i"]}},
            "control_embeddings.variants: has oracle, for which only the built-in shop has the true attributes",
        ),
        (
            {"train_recommender.variants": ["zero_shot", "lora", "sda", "sda"]},
            "train_recommender.variants: should name each once (got sda more than once)",
        ),
        # names
        (
            {"train_adapter.variants.id": {"adapter": "lora", "loss": "loss"}},
            "train_adapter.variants: id is a reserved name (made without training); choose another",
        ),
        (
            {f"train_adapter.variants.{name}": {"adapter": "lora", "loss": "loss"} for name in ("random", "id")},
            "train_adapter.variants: id, random are reserved names (made without training); choose another",
        ),
        (
            {"joint_embeddings.variants": {"sda": {"of": "zero_shot"}}},
            "joint_embeddings.variants: sda is a reserved name (made without a joint pass); choose another",
        ),
        (
            {"joint_embeddings.variants": {"joint": {"of": "random"}}},
            "joint_embeddings.variants.joint.of: unknown variant random; known are lora, sda, zero_shot",
        ),
        ({"joint_embeddings.variants": {"joint": {}}}, "joint_embeddings.variants.joint.of: missing"),
        (
            {"joint_embeddings.variants": {"joint": {"of": "zero_shot"}}, "backbone": CLIP},
            "joint_embeddings.variants: a joint pass needs one decoder for image and text, and a backbone of the kind 'clip' has",
        ),
        (
            {"joint_embeddings.variants": {"j": {"of": "sda"}}, "train_adapter.moda.targets": "language_and_vision"},
            "the adapter of sda changes the vision tower by the modality; set train_adapter.moda.targets to language",
        ),
        (
            {
                "joint_embeddings.variants": {"j": {"of": "sda"}},
                "train_recommender.variants": ["zero_shot", "lora", "sda", "j"],
                "recommenders": ["slmrec"],
            },
            "recommenders: slmrec takes the embeddings of images and of texts, and j has one embedding per item",
        ),
        (
            {"train_recommender.variants": ["zero_shot", "lora"]},
            "train_recommender.variants: misses random, text_only, image_only, sda, oracle, which variants has",
        ),
        ({"recommenders": ["pop", "gru4rec"]}, "recommenders.1: should be 'pop', 'nearest', 'bpr', 'vbpr', 'slmrec'"),
        # adapters
        (
            {"train_adapter.moda.gate": "onehot", "train_adapter.moda.num_experts": 3, "train_adapter.moda.r": 9},
            "train_adapter.moda: num_experts (3) must be a multiple of 2, the number of modalities, when gate is 'onehot'",
        ),
        (
            {"train_adapter.lora.gate": "onehot"},
            "train_adapter.lora: num_experts (1) must be a multiple of 2, the number of modalities, when gate is 'onehot'",
        ),
        (
            {"train_adapter.training.micro_batch_size": 33},
            "train_adapter.training.micro_batch_size: should be at most batch_size (32) (got 33); lower it, or set it to null",
        ),
        (
            {"train_adapter.training.vision_cache": "always", "train_adapter.training.sharding": "fsdp"},
            "train_adapter.training.vision_cache: is 'always', but sharding is 'fsdp', which allows no cache; set it to auto",
        ),
        (
            {"train_adapter.training.vision_cache": "always", "train_adapter.moda.targets": "language_and_vision"},
            "vision_cache: is 'always', but variant sda adapts the vision tower (train_adapter.moda.targets); set it to auto",
        ),
        (
            {"train_adapter.training.vision_cache": "always", "backbone": CLIP},
            "vision_cache: is 'always', but a backbone of the kind 'clip' cannot run its vision tower by itself; set it to auto",
        ),
        # losses
        (
            {"train_adapter.loss": REFERENCE | {"normalize": True}},
            "loss.normalize: should be false with variant 'reference', which computes what the public code does (got true)",
        ),
        ({"train_adapter.loss.variant": "reference"}, "loss.detach_teacher: should be false with variant 'reference'"),
        (
            {"train_adapter.infonce.teacher_source": "base"},
            "train_adapter.infonce.teacher_source: is 'base', but teacher is 'none', which uses no vectors",
        ),
        # backbones
        ({"backbone.min_pixels": 12545}, "backbone.min_pixels: should be at most max_pixels (12544) (got 12545)"),
        ({"backbone": TINY | {"num_heads": 5}}, "backbone.num_heads: should divide hidden_size (48) into an even head width"),
        ({"backbone": TINY | {"num_heads": 16}}, "backbone.num_heads: should divide hidden_size (48) into an even head width"),
        ({"backbone": CHECKPOINT | {"revision": "main"}}, "backbone.revision: should pin a commit of owner/model"),
        (
            {"backbone": CHECKPOINT | {"attention": "flash_attention_2", "dtype": "float32"}},
            "backbone.attention: flash_attention_2 needs a half-precision dtype (got float32)",
        ),
        (
            {"backbone": CHECKPOINT | {"attention": "flash_attention_2"}, "runtime.device": "cpu"},
            "backbone.attention: flash_attention_2 needs a GPU, but runtime.device is 'cpu'; set it to auto",
        ),
        # data and items
        ({"items.image_prompt": "A {kind}"}, "items.image_prompt: has the unknown placeholder {kind}; only {noun} is filled in"),
        ({"items.text_opening": "The {}:"}, "items.text_opening: has the unknown placeholder {}; only {noun} is filled in"),
        ({"dataset.num_items": 20, "dataset.mean_history_length": 10.5}, "dataset.mean_history_length: should be at most half"),
        ({"dataset": AMAZON}, "dataset.image_archive_sha256: is set, but image_archive is null"),
        # indexes and recommenders
        (
            {"train_recommender.sasrec.representation": "id", "train_recommender.sasrec.new_item_cost": 0.01},
            "train_recommender.sasrec: new_item_cost needs content to tell new items apart (representation is id); set it to",
        ),
        (
            {"train_recommender.bert4rec.id_dropout": 0.2},
            "train_recommender.bert4rec: id_dropout needs representation id+content (got content); set it to 0.0",
        ),
        *(
            ({"build_index.factory": factory}, f"factory: has {part}, but the number in {zero} should be at least 1")
            for factory, part, zero in (
                ("HNSW0", "HNSW0", "W0"), ("IVF0,Flat", "IVF0", "F0"), ("PCA8,PQ0", "PQ0", "Q0"), ("IVF16,PQ00", "PQ00", "Q00"),
                ("PQ16x0", "PQ16x0", "x0"), ("OPQ16_0,PQ16", "OPQ16_0", "_0"), ("RQ0x8", "RQ0x8", "Q0"),
                ("LSQ0x4", "LSQ0x4", "Q0"),
            )
        ),
        ({"train_recommender.seeds": [1, 2**31]}, "train_recommender.seeds"),
        ({"build_index.nprobe": 4}, "build_index.nprobe: is 4, but an index of the kind 'Flat' has no such setting"),
        (
            {"build_index.factory": "IVF16,Flat", "build_index.ef_search": 4},
            "build_index.ef_search: is 4, but an index of the kind 'IVF16,Flat' has no such setting; set it to null",
        ),
        (
            {"evaluate.retrieval": RETRIEVAL | {"nprobe": 3}},
            "evaluate.retrieval.nprobe: is 3, but an index of the kind 'HNSW32' has no such setting; set it to null",
        ),
        (
            {"train_recommender.sasrec.num_heads": 3},
            "train_recommender.sasrec.hidden_size: should be a multiple of num_heads (3) (got 64)",
        ),
        (
            {"train_recommender.bert4rec.hidden_size": 63, "train_recommender.bert4rec.num_heads": 2},
            "train_recommender.bert4rec.hidden_size: should be a multiple of num_heads (2) (got 63)",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_named(changes: dict[str, object], expected: str) -> None:
    def edit(tree: dict) -> None:
        for path, value in changes.items():
            put(path, value)(tree)

    assert expected in problem(edit)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_adapter.moda.gate": "onehot"},
        {"train_adapter.moda.gate": "onehot", "train_adapter.moda.num_experts": 6, "train_adapter.moda.expert_rank": "full"},
        {"train_adapter.moda.num_experts": 3, "train_adapter.moda.expert_rank": "full"},
        {"train_adapter.training.micro_batch_size": 32},
        {"train_adapter.training.warmup_steps": 50},  # a rate that never reaches its height is no contradiction
        {"train_adapter.training.vision_cache": "always"},
        {"train_adapter.training.vision_cache": "always", "train_adapter.lora.targets": "language_and_vision",
         "train_adapter.variants": {"sda": {"adapter": "moda", "loss": "loss"}},
         "variants": ["id", "sda"], "train_recommender.variants": ["sda"]},
        {"train_adapter.loss": REFERENCE},
        {"train_adapter.loss.teacher_source": "base"},
        {"backbone.min_pixels": 12544},
        {"backbone": TINY | {"num_heads": 3}},
        {"backbone": CHECKPOINT},
        {"backbone": CHECKPOINT | {"name": "./folder", "revision": None}},
        {"backbone": CHECKPOINT | {"attention": "flash_attention_2"}},
        {"items.image_prompt": "{noun} {noun} {a b}"},
        {"dataset": AMAZON | {"image_archive": ["a.zip"]}, "variants": ["id", "zero_shot"],
         "train_recommender.variants": ["zero_shot"], "train_adapter.variants": {}, "control_embeddings.variants": []},
        {"build_index.factory": "IVF64_HNSW32,Flat", "build_index.nprobe": 4},
        {"build_index.factory": "IMI2x8,Flat", "build_index.nprobe": 4},
        {"train_recommender.sasrec.num_heads": 4},
    ],
)  # fmt: skip
def test_neighbours_of_those_that_fit_are_taken(changes: dict[str, object]) -> None:
    tree = data()
    for path, value in changes.items():
        put(path, value)(tree)
    parse_params(tree, "params.yaml")


def test_only_a_local_folder_needs_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset may leave the revision open, a run may not."""
    monkeypatch.chdir(tmp_path)
    tree = data()
    tree["backbone"] = CHECKPOINT | {"revision": None}
    parse_params(tree, "preset")
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    with pytest.raises(
        ConfigError, match=r"backbone.revision: should pin a commit of owner/model, 40 hexadecimal digits \(got None"
    ):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    load_params(tmp_path / "params.yaml")
    tree["backbone"]["revision"] = "main"  # not looked at
    parse_params(tree, "preset")


def test_the_repository_s_weights_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sda init` writes this preset into projects that do not have the weights: the error says where they are."""
    monkeypatch.chdir(tmp_path)
    tree = data()
    tree["backbone"] = YAML(typ="safe").load((ROOT / "conf" / "backbone" / "nano_lvlm.yaml").read_text(encoding="utf-8"))
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    with pytest.raises(ConfigError) as caught:
        load_params(tmp_path / "params.yaml")
    assert "params.yaml: backbone.name: there is no folder pretraining/nano_lvlm here, and the package" in str(caught.value)
    assert "get it from the repository of sda-rec (its pretraining/README.md says how)" in str(caught.value)
    assert "commit" not in str(caught.value)
    (tmp_path / "pretraining" / "nano_lvlm").mkdir(parents=True)
    load_params(tmp_path / "params.yaml")


def test_contradictions_are_reported_beside_all_other_problems() -> None:
    def edit(tree: dict) -> None:
        tree["train_adapter"]["loss"]["variant"] = "reference"
        tree["train_adapter"]["moda"] |= {"gate": "onehot", "num_experts": 3}
        tree["train_recommender"]["sasrec"]["num_heads"] = 3
        tree["build_index"]["nprobe"] = 2
        tree["recommenders"] = ["pop", "pop"]
        tree["surprise"] = 1

    text = problem(edit)
    for expected in (
        "train_adapter.loss.normalize: should be false with variant 'reference'",
        "train_adapter.loss.detach_teacher: should be false with variant 'reference'",
        "train_adapter.moda: r (8) must be a multiple of num_experts (3)",
        "train_adapter.moda: num_experts (3) must be a multiple of 2",
        "train_recommender.sasrec.hidden_size: should be a multiple of num_heads (3) (got 64)",
        "build_index.nprobe: is 2",
        "recommenders: should name each once",
        "surprise: unknown parameter",
    ):
        assert text.count(expected) == 1, expected


def test_several_contradictions_between_sections_are_reported_at_once() -> None:
    def edit(tree: dict) -> None:
        tree["variants"].append("nope")
        tree["report"]["cutoff"] = 7
        tree["fetch_images"]["stored_pixels"] = 10_000
        tree["items"]["image_prompt"] = "A {kind}"

    text = problem(edit)
    for expected in ("variants: unknown nope", "report.cutoff: 7", "backbone.max_pixels: 12544", "items.image_prompt: has"):
        assert text.count(expected) == 1, expected


def test_the_number_of_modalities_is_that_of_their_names() -> None:
    """The params stand below every computing module, so they cannot import the names."""
    assert len(MODALITIES) == NUM_MODALITIES


def test_the_params_and_moda_refuse_the_same_experts() -> None:
    tree = load_params(ROOT / "params.yaml").train_adapter.moda.model_dump(mode="json")
    for r, num_experts, gate, rank in itertools.product(
        (4, 6, 9), (1, 2, 3, 4), ("modality", "onehot", "uniform"), ("split", "full")
    ):
        chosen = {"r": r, "num_experts": num_experts, "gate": gate, "expert_rank": rank}
        verdicts = []
        for make in (lambda c: AdapterParams.model_validate_json(json.dumps(tree | c)), lambda c: MoDAConfig(**c)):
            try:
                make(chosen)
                verdicts.append(True)
            except (ConfigError, ValueError):
                verdicts.append(False)
        assert verdicts[0] == verdicts[1], chosen


def test_the_guide_s_way_to_compare_two_losses_is_taken() -> None:
    """docs/extending.md: the command's -S, composed by Hydra as DVC does."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- command: two losses -->\n```bash\n(.+?)```", text, re.S)
    assert block is not None
    words = shlex.split(block[1].replace("\\\n", " "))
    overrides = [value for flag, value in itertools.pairwise(words) if flag == "-S"]
    assert len(overrides) == 6
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        tree = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
    params = parse_params(tree, "composed")
    losses = {name: params.train_adapter.of(name)[1] for name in params.train_adapter.variants}
    assert {name: loss.teacher for name, loss in losses.items()} == {"sda": "mean", "agreement": "agreement"}
    assert losses["sda"] is params.train_adapter.loss
    assert "agreement" in params.variants
    assert "agreement" in params.train_recommender.variants


def test_a_section_that_params_do_not_know_is_refused() -> None:
    assert "train_adapter.third: unknown parameter" in problem(put("train_adapter.third", data()["train_adapter"]["loss"]))


def test_a_third_loss_section_is_a_field_and_its_name() -> None:
    """What docs/extending.md says has to be written for it."""

    class Variant(TrainedVariant):
        loss: Literal["infonce", "loss", "third"]  # type: ignore[assignment]

    class Sections(TrainAdapterParams):
        variants: dict[str, Variant]  # type: ignore[assignment]
        third: LossParams

    tree = data()["train_adapter"]
    tree["third"] = tree["loss"] | {"teacher": "image"}
    tree["variants"]["other"] = {"adapter": "lora", "loss": "third"}
    adapter, loss = Sections.model_validate_json(json.dumps(tree)).of("other")
    assert (adapter.num_experts, loss.teacher) == (1, "image")
