"""Embeddings of two separate models: what the models get, and what is stored."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from experiments import adaptation, separate_models
from sda_core.artifacts import ITEMS, Workspace
from sda_core.embeddings.controls import read_table
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.errors import ArtifactError, ConfigError
from sda_core.exchange.vectors import read_vectors
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.params import Params, load_params


class OneImage:
    """A store with one wide image of a colour; item 2 has none."""

    def get(self, item_id: int) -> bytes | None:
        if item_id == 2:
            return None
        stream = io.BytesIO()
        Image.new("RGB", (40, 20), (127, 0, 255)).save(stream, "png")
        return stream.getvalue()

    def status(self, item_id: int) -> str:
        return "missing_url" if item_id == 2 else "ok"


class Mean(torch.nn.Module):
    """A network whose features are the means of the channels, repeated to the width of EfficientNet-lite0."""

    def extract_features(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        return pixels_B3SS.mean((2, 3), keepdim=True).repeat(1, 427, 1, 1)[:, :1280]


def test_an_image_is_padded_with_white_and_scaled_as_the_network_was_trained() -> None:
    source = ItemSource(np.array([1]), ["a"], "p", "h", OneImage(), "placeholder")
    made = separate_models.pixels(source, np.array([0]))
    assert made.shape == (1, 3, 224, 224)
    white = torch.tensor([(255 - 127) / 128] * 3)
    colour = torch.tensor([0.0, -127 / 128, 1.0])
    for row, expected in ((0, white), (50, white), (112, colour), (173, white), (223, white)):
        torch.testing.assert_close(made[0, :, row], expected[:, None].expand(3, 224))


def test_an_item_without_an_image_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate_models, "fetch_packages", lambda *names: None)
    monkeypatch.setattr("pretraining.teachers.image_network", Mean)
    monkeypatch.setattr(separate_models, "IMAGES_PER_BATCH", 2)
    source = ItemSource(np.arange(1, 6), list("abcde"), "p", "h", OneImage(), "placeholder")
    features = separate_models.image_embeddings(source)
    assert features.shape == (5, 1280)
    assert features.any(axis=1).tolist() == [True, False, True, True, True]
    np.testing.assert_allclose(features[0], features[4], rtol=1e-6)


def test_texts_are_values_without_a_prompt(shop: Workspace) -> None:
    params = load_params(shop.root / "params.yaml").items.model_copy(update={"fields": ["title", "brand"]})
    first = ITEMS.read(shop.items).sort("item_id").row(0, named=True)
    expected = ". ".join(value for value in (first["title"], first["brand"]) if value)
    assert separate_models.plain_texts(shop, params)[0] == expected


def test_the_table_is_written_once_and_fused_like_a_variant(on_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    calls: list[int] = []

    def texts(given: list[str], max_tokens: int = 0) -> np.ndarray:
        calls.append(len(given))
        return draws.normal(size=(len(given), 6)).astype(np.float32)

    def images(source: ItemSource) -> np.ndarray:
        return draws.normal(size=(len(source), 9)).astype(np.float32)

    monkeypatch.setattr(separate_models, "text_embeddings", texts)
    monkeypatch.setattr(separate_models, "image_embeddings", images)
    workspace, params = Workspace(on_tiny), load_params(on_tiny / "params.yaml")
    source = item_source(workspace, params.items)
    made: dict[str, Any] = {
        vector: adaptation.matrix(workspace, params, vector)
        for kind in ("separate_models", "separate_models:text", "separate_models:image", "id+separate_models")
        for vector in (kind, f"{kind}+even")
    }
    assert calls == [len(source)]
    own = read_table(on_tiny / "embeddings" / "separate_models.parquet")
    assert (own.image_ID.shape[1], own.text_ID.shape[1]) == (9, 6)
    np.testing.assert_array_equal(own.has_image, source.has_image)
    arguments = own.image_ID, own.text_ID, own.has_image, seen_items(workspace)
    for vector, changes in (
        ("separate_models", {}),
        ("separate_models+even", {"axis_scaling": "even"}),
        ("separate_models:text", {"image_weight": 0.0}),
        ("separate_models:image+even", {"text_weight": 0.0, "axis_scaling": "even"}),
    ):
        section = params.export_embeddings.model_copy(update=changes)
        np.testing.assert_allclose(made[vector][1:], fuse(*arguments, section, has_text=own.has_text), atol=1e-6)
    np.testing.assert_array_equal(made["id+separate_models+even"], made["separate_models+even"])
    adaptation.check_vectors(list(made))


def test_a_table_made_with_other_settings_is_rejected(on_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate_models, "text_embeddings", lambda texts: np.eye(len(texts), 6, dtype=np.float32))
    monkeypatch.setattr(separate_models, "image_embeddings", lambda source: np.eye(len(source), 9, dtype=np.float32))
    workspace, params, target = Workspace(on_tiny), load_params(on_tiny / "params.yaml"), tmp_path / "separate_models.parquet"

    def changed(section: str, **changes: object) -> Params:
        return params.model_copy(update={section: getattr(params, section).model_copy(update=changes)})

    separate_models.write(workspace, params, target)
    before = target.read_bytes()
    for section, changes, told in (
        ("export_embeddings", {"fused_dim": 4}, r"export_embeddings\.fused_dim 8 \(expected 4\)"),
        ("items", {"noun": "mug"}, r"items\.noun '\w+' \(expected 'mug'\)"),
    ):
        with pytest.raises(ConfigError, match=rf"separate_models\.parquet: was made with {told}; delete it to make it again"):
            separate_models.write(workspace, changed(section, **changes), target)
    separate_models.write(workspace, params, target)
    assert target.read_bytes() == before

    target.unlink()  # the record of a deleted table does not count
    separate_models.write(workspace, changed("export_embeddings", fused_dim=4), target)
    assert read_table(target).fused_IF.shape[1] == 4
    with pytest.raises(ConfigError, match=r"export_embeddings\.fused_dim 4 \(expected 8\)"):
        separate_models.write(workspace, params, target)
    target.with_suffix(".json").unlink()  # a table of an earlier version has no record
    separate_models.write(workspace, params, target)
    with pytest.raises(ConfigError, match=r"export_embeddings\.fused_dim 8 \(expected 4\)"):
        separate_models.write(workspace, changed("export_embeddings", fused_dim=4), target)


def test_the_command_writes_a_file_that_can_be_imported(on_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, params = Workspace(on_tiny), load_params(on_tiny / "params.yaml")
    source, raw = item_source(workspace, params.items), ITEMS.read(workspace.items).sort("item_id")["raw_item_id"].to_list()
    draws = np.random.default_rng(0)
    text_ID, image_ID = (draws.normal(size=(len(raw), width)).astype(np.float32) for width in (6, 9))
    monkeypatch.setattr(separate_models, "text_embeddings", lambda texts: text_ID)
    monkeypatch.setattr(separate_models, "image_embeddings", lambda source: image_ID)
    to = tmp_path / "separate.parquet"
    separate_models.main(on_tiny, to)
    assert pl.read_parquet(to)["image_embedding"].is_null().to_numpy().tolist() == (~source.has_image).tolist()
    found = read_vectors(to, raw, params.import_embeddings, normalize=True)
    assert (found.embedding, found.num_missing, found.num_other) == (None, 0, 0)
    np.testing.assert_array_equal(found.has_image, source.has_image)
    np.testing.assert_array_equal(found.has_text, source.has_text)
    np.testing.assert_array_equal(found.image[found.has_image], image_ID[source.has_image])
    np.testing.assert_array_equal(found.text[found.has_text], text_ID[source.has_text])


def test_mistakes_of_the_command_are_one_line(on_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to: expected a name that ends in \.parquet \(got 'vectors\.npy'\)"):
        separate_models.main(on_tiny, Path("vectors.npy"))
    with pytest.raises(ConfigError, match=r"--root: expected a project folder, with params\.yaml \(got /.*\); run"):
        separate_models.main(tmp_path, tmp_path / "separate.parquet")
    (tmp_path / "params.yaml").write_bytes((on_tiny / "params.yaml").read_bytes())
    with pytest.raises(ArtifactError, match=r"items\.parquet"):
        separate_models.main(tmp_path, tmp_path / "separate.parquet")
