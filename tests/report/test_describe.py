"""What was run, in words."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from sda_core.params import CLIP, Params, TailParams, load_params, parse_params
from sda_core.report import describe
from tests.sections import short_ladder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("preset", ["beauty", "movies", "gift_cards", "demo"])
def test_every_data_set_and_backbone_can_be_described(preset: str, params: Params) -> None:
    yaml, whole = YAML(typ="safe", pure=True), short_ladder(params.model_dump(mode="json"))
    folder = ROOT / "conf"
    preset_tree = yaml.load((folder / "dataset" / f"{preset}.yaml").read_text(encoding="utf-8"))
    preset_tree.pop("defaults", None)  # Hydra's
    whole |= preset_tree
    whole["backbone"] = yaml.load((folder / "backbone" / "qwen2_5_vl_7b.yaml").read_text(encoding="utf-8"))
    chosen = parse_params(whole, preset)
    texts = [describe.dataset(chosen.dataset), describe.backbone(chosen.backbone), describe.backbone(params.backbone)]
    definitions = get_args(TailParams.model_fields["definition"].annotation)
    texts += [describe.tail(params.evaluate.tail.model_copy(update={"definition": name})) for name in definitions]
    imported = parse_params(
        whole
        | {"import_embeddings": whole["import_embeddings"] | {"variants": {"minilm": {"path": "x"}}}, "variants": ["minilm"]}
        | {"train_recommender": whole["train_recommender"] | {"variants": ["minilm"]}},
        preset,
    )
    texts += [variant.description for variant in (*describe.variants(chosen), *describe.variants(imported))]
    assert len(set(texts)) == len(texts)
    assert all(texts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "CMSA"),
        ({"teacher_source": "base"}, "CMSA with the backbone's own vectors as the teacher"),
        ({"variant": "reference"}, "CMSA as in the public code"),
        ({"teacher": "none"}, "InfoNCE"),
    ],
)
def test_losses_in_words(changes: dict[str, str], said: str, params: Params) -> None:
    section = params.train_adapter
    section = section.model_copy(update={"loss": section.loss.model_copy(update=changes)})
    told = {one.name: one.description for one in describe.variants(params.model_copy(update={"train_adapter": section}))}
    assert told["sda"].endswith(f"trained with {said}.")


def test_fusion_in_words(params: Params) -> None:
    section = params.export_embeddings
    assert describe.fusion(section).startswith("image and text vectors side by side, reduced to ")
    kinds = ("late_concat_pca", "concat", "mean", "image", "text")
    assert len({describe.fusion(section.model_copy(update={"fusion": kind})) for kind in kinds}) == len(kinds)


def test_filter_and_split_in_words(params: Params) -> None:
    section = params.filter.model_copy(
        update={"method": "single_pass", "min_rating": 3.0, "duplicates": "last", "items_without_image": "drop"}
    )
    assert describe.filtering(section) == (
        "single pass, at least 5 per user, 1 per item; ratings from 3; of repeated purchases the last is kept; "
        "equal times in random order (seed 42); "
        "items without metadata dropped; items without an image's address dropped"
    )
    rounded = describe.filtering(section.model_copy(update={"ties": "file", "time_resolution_seconds": 86_400}))
    assert "times rounded down to multiples of 86400 seconds; equal times in the order of the raw file" in rounded
    assert describe.split(params.filter).startswith("leave one out")
    days = params.filter.model_copy(update={"split": "global_time", "valid_from": "2014-01-01", "test_from": "2014-05-01"})
    assert describe.split(days) == "by time: validation begins on 2014-01-01 (UTC), the test on 2014-05-01 (UTC)"
    shares = days.model_copy(update={"valid_from": 0.8, "test_from": 0.9})
    assert describe.split(shares) == (
        "by time: validation begins after 80 % of the interactions, the test after 90 % of the interactions"
    )
    assert len({describe.ties(ties) for ties in ("pessimistic", "mean", "optimistic")}) == 3


def test_backbones_in_words(params: Params) -> None:
    towers = CLIP(kind="clip", name="some/clip", revision="abc", dtype="float32", attention="auto", max_text_tokens=77)
    assert describe.backbone(towers) == "some/clip at abc, float32"
    assert describe.pooling(towers) == "that of the two towers"
    assert describe.pooling(params.backbone) == f"{params.backbone.model_dump()['pooling']} over the last hidden states"
