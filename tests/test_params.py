"""The params file: every mistake is one line with its path; nothing is ignored, guessed or coerced."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sda_core.errors import ConfigError
from sda_core.params import load_params, parse_params

ROOT = Path(__file__).resolve().parents[1]


def data() -> dict:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))


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
        ("report.cutoff", 7, "report.cutoff: 7 is not among evaluate.cutoffs [5, 10, 20]"),
    ],
)
def test_a_mistake_is_named_with_its_path(path: str, value: object, expected: str) -> None:
    assert expected in problem(put(path, value))


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
    """YAML 1.2: `2e-4` is a number, `no` is a string."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert "learning_rate: 0.0002" in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("learning_rate: 0.0002", "learning_rate: 2e-4"), encoding="utf-8")
    assert load_params(path).train_adapter.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"a: [1", "is no valid YAML"),
        (b"- 1\n", "should be a mapping of sections (got list)"),
        (b"", "should be a mapping of sections (got NoneType)"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"when: 2020-01-01\n", "of a type that params do not have"),
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


def test_sections_cannot_be_changed() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.filter.min_rating = 3.0  # type: ignore[misc]
