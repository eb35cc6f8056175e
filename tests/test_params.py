"""The params file: every mistake is one line with its path; nothing is ignored, guessed or coerced."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from sda_core.errors import ConfigError
from sda_core.params import BackboneParams, load_params, parse_params
from sda_core.variants import is_trained

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
        ("dataset.edition", 2019, "dataset.edition: should be 2014, 2018 or 2023 (got 2019)"),
        ("dataset.source", "amazn", "dataset: "),
        ("train_adapter.training.learning_rate", "2e-4x", "train_adapter.training.learning_rate: should be a valid number"),
        ("train_adapter.moda.num_experts", 3, "train_adapter.moda: r (8) must be a multiple of num_experts (3)"),
        ("variants", ["id", "nope"], "variants: unknown nope; known are id, lora, sda, zero_shot"),
        ("import_embeddings.variants", {"sda": {"path": "x"}}, "import_embeddings.variants: sda are names of variants made here"),
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


def test_retrieval_is_for_full_rank_only() -> None:
    tree = data()
    tree["evaluate"] |= {"retrieval": RETRIEVAL}
    section = parse_params(tree, "params.yaml").evaluate.retrieval
    assert section is not None
    assert section.model_dump() == RETRIEVAL
    text = problem(lambda tree: tree["evaluate"].update(retrieval=RETRIEVAL, protocol="uni100"))
    assert "evaluate: retrieval searches all items, which is protocol 'fullrank' (got 'uni100'); set it to null" in text


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
    with pytest.raises(ConfigError, match="'minilm' is made elsewhere; use `sda import-embeddings`"):
        is_trained(params, "minilm")


def test_all_problems_are_reported_at_once() -> None:
    def edit(tree: dict) -> None:
        tree["filter"]["min_rating"] = "low"
        del tree["build_index"]["factory"]
        tree["surprise"] = 1

    text = problem(edit)
    assert "filter.min_rating: should be a valid number (got 'low')" in text
    assert "build_index.factory: missing" in text
    assert "surprise: unknown parameter" in text


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
        (None, "no such file"),
        (b"a: [1", "is no valid YAML"),
        (b"- 1\n", "should be a mapping of sections (got list)"),
        (b"", "should be a mapping of sections (got NoneType)"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"when: 2020-01-01 10:00:00\n", "of a type that params do not have"),
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
