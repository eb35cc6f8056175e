"""Joint passes as variants: from raw files to the page, verified and exported, beside the values that keep the base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from dvc.utils.hydra import compose_and_dump

from sda_core.artifacts import EMBEDDINGS, Workspace
from sda_core.embeddings.table import read_metadata
from sda_core.errors import ConfigError
from sda_core.exchange import Format
from sda_core.exchange.export import export
from sda_core.exchange.shop import Shop
from sda_core.params import Params, load_params
from sda_core.verification import verify
from stages.export_embeddings import export_embeddings
from tests.pipeline.conftest import SMALL
from tests.small_run import finished_run

VARIANTS = ("id", "zero_shot", "joint", "sda", "sda_joint")
OVERRIDES = [
    *(override for override in SMALL if "variants" not in override),
    "ladder=joint",
    "recommenders=[pop,vbpr]",
    "dataset.num_users=60",
    "dataset.num_items=30",
    "dataset.missing_image_share=0.2",
    "train_adapter.training.num_steps=2",
    "train_adapter.training.log_every=1",
    "train_recommender.vbpr.max_epochs=2",
    "train_adapter.loss.keep_base=0.5",
    "export_embeddings.with_base=true",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run of every stage."""
    return finished_run(tmp_path_factory.mktemp("joint"), repository, OVERRIDES, VARIANTS)


@pytest.fixture(scope="module")
def params(root: Path) -> Params:
    return load_params(root / "params.yaml")


def test_a_joint_variant_has_one_vector_an_item(root: Path, params: Params) -> None:
    workspace = Workspace(root)
    for variant, adapter in (("joint", ""), ("sda_joint", read_metadata(workspace.embeddings("sda"))["adapter_hash"])):
        table = EMBEDDINGS.read(workspace.embeddings(variant))
        assert table.columns == ["item_id", "raw_item_id", "embedding"]
        assert table["embedding"].null_count() == 0
        assert table["raw_item_id"].equals(EMBEDDINGS.read(workspace.embeddings("zero_shot"))["raw_item_id"])
        described = read_metadata(workspace.embeddings(variant))
        assert (described["pass"], described["adapter_hash"]) == ("joint", adapter)
        assert described["joint_dim"] == str(params.backbone.hidden_size)  # type: ignore[union-attr]
        assert "with_base" not in described
        assert "modality_dim" not in described
    assert "pass" not in read_metadata(workspace.embeddings("sda"))
    base, adapted = (EMBEDDINGS.read(workspace.embeddings(variant))["embedding"].to_numpy() for variant in ("joint", "sda_joint"))
    assert base.shape == adapted.shape
    assert not np.allclose(base, adapted, atol=1e-3), "the adapter is in one of them"


def test_the_base_is_fused_beside_the_adapted_vectors(root: Path) -> None:
    described = read_metadata(Workspace(root).embeddings("sda"))
    assert described["with_base"] == "true"
    assert "with_base" not in {name for name, value in described.items() if value == "false"}


def test_the_run_is_sound(root: Path, params: Params) -> None:
    found = list(verify(Workspace(root), params))
    assert not [finding for finding in found if finding.status == "problem"]
    checked = {finding.path: finding.text for finding in found}
    for variant in ("joint", "sda_joint"):
        assert "finite" in checked[f"embeddings/{variant}.parquet"]
        assert "items are their own nearest neighbours" in checked[f"indexes/{variant}"]


def test_a_wrong_file_in_its_place_is_seen(root: Path, params: Params, tmp_path: Path) -> None:
    workspace = Workspace(root)
    path = workspace.embeddings("joint")
    kept = path.read_bytes()
    try:
        for other, said in (("zero_shot", "pass is None"), ("sda_joint", "adapter_hash is '")):
            path.write_bytes(workspace.embeddings(other).read_bytes())
            found = {finding.path: finding for finding in verify(workspace, params)}["embeddings/joint.parquet"]
            assert found.status == "problem"
            assert said in found.text
    finally:
        path.write_bytes(kept)


def test_the_page_and_the_metrics_have_the_variant(root: Path) -> None:
    workspace = Workspace(root)
    page = workspace.report.read_text(encoding="utf-8")
    assert "Content vectors of one pass over image and text together, by the unchanged backbone." in page
    assert "Content vectors of one pass over image and text together, by the backbone with the adapter of sda." in page
    metrics = json.loads(workspace.metrics("joint", "vbpr").read_text(encoding="utf-8"))
    assert 0 <= metrics["ndcg@10"] <= 1


@pytest.mark.parametrize("target", Format)
def test_it_is_exported(root: Path, tmp_path: Path, target: Format) -> None:
    shop = Shop.read(Workspace(root), "sda_joint")
    assert set(shop.vectors) == {"embedding"}
    export(shop, target, tmp_path / "shop")
    assert any(path.is_file() and path.stat().st_size for path in (tmp_path / "shop").rglob("*"))
    if target is Format.MMREC:
        np.testing.assert_array_equal(np.load(tmp_path / "shop" / "item_feat.npy"), shop.vectors["embedding"])


def test_a_recommender_that_takes_the_modalities_apart_is_one_line(root: Path, repository: Path, tmp_path: Path) -> None:
    compose_and_dump(
        tmp_path / "params.yaml", str(repository / "conf"), None, "config", "", [*OVERRIDES, "recommenders=[pop,slmrec]"]
    )
    with pytest.raises(ConfigError, match="slmrec takes the embeddings of images and of texts, and joint, sda_joint") as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_a_second_export_writes_the_same_bytes(root: Path) -> None:
    path = Workspace(root).embeddings("sda_joint")
    before = path.read_bytes()
    export_embeddings("sda_joint", root=root)
    assert path.read_bytes() == before
    assert isinstance(pl.read_parquet(path)["item_id"][0], int)
