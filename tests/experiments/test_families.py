"""Nano's relatives, and the table over backbones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from experiments import families
from experiments.workspaces import Study
from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.backbones import Backbone, build
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ConfigError
from sda_core.params import BackboneParams

TEXTS = ["a red cotton shirt", "Tea pot, price 12"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    sections = families.relatives(tmp_path_factory.mktemp("relatives"))
    adapter = TypeAdapter(BackboneParams)
    return {name: build(adapter.validate_python(dict(section)), torch.device("cpu")) for name, section in sections.items()}


def test_relatives_read_as_nano_does_and_see_otherwise(backbones: dict[str, Backbone]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 112, 3), dtype=np.uint8)
    pixels = [Image.fromarray(image) for image in noise]
    texts, images = {}, {}
    for name, backbone in backbones.items():
        with torch.inference_mode():
            texts[name] = backbone.encode(backbone.model, backbone.text_inputs(TEXTS))
            images[name] = backbone.encode(backbone.model, backbone.image_inputs(pixels, "The picture shows a product."))
    for name in families.RELATIVES:
        torch.testing.assert_close(texts[name], texts["nano"])
        assert not torch.allclose(images[name], images["nano"], atol=1e-2)
        assert not torch.allclose(images[name][0], images[name][1], atol=1e-2), "images are told apart"
        assert backbones[name].num_adapter_layers("language") == 28


def test_a_relative_is_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        families.write_relative(families.qwen2_vl, tmp_path / folder)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_table_has_the_difference_to_the_same_backbone(shop: Workspace, tmp_path: Path, keep: Callable[..., None]) -> None:
    interactions = INTERACTIONS.read(shop.interactions)
    study = Study(shop.root, tmp_path, ["sda"], [1, 2])
    for seed, place in ((1, 1.0), (2, 3.0)):
        root = study.workspace("nano", seed).root
        curve = study.workspace("nano", seed).adapter("sda") / "loss.tsv"
        curve.parent.mkdir(parents=True)
        (root / "params.yaml").write_bytes((shop.root / "params.yaml").read_bytes())
        curve.write_text("step\tretrieval\n1\t0.125\n2\t0.25\n")
        keep(study.positions("nano", "zero_shot") / f"{seed}.parquet", interactions, 100.0)
        keep(study.positions("nano", "sda") / f"{seed}.parquet", interactions, place)
        texts = {"zero_shot": np.eye(4, dtype=np.float32)[[1, 0, 2, 3]], "sda": np.eye(4, dtype=np.float32)}
        for variant, text in texts.items():
            path = study.workspace("nano", seed).embeddings(variant)
            path.parent.mkdir(exist_ok=True)
            write_embeddings(path, np.arange(1, 5), list("abcd"), np.eye(4, dtype=np.float32), text, text, {}, np.ones(4, bool))
    table = families.table(study, ["nano"], "sasrec")
    base, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[-2:])
    assert base[3] == "0.500"
    assert row[2:] == ["0.125, 0.250", "1.000", "0.7500", "+0.7500 [-1.6548, +3.1548]", "+0.5000 .. +1.0000"]
    families.plot(study, ["nano"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_backbone_without_a_file() -> None:
    with pytest.raises(ConfigError, match="NAME=FILE"):
        families.read_backbones(["qwen3_vl"])
