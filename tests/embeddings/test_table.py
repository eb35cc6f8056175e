"""The parquet file of item embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sda_core.artifacts import EMBEDDINGS
from sda_core.embeddings.table import embedding_metadata, read_modalities, write_embeddings, write_ids_only
from sda_core.errors import ArtifactError
from sda_core.item_vectors import read_vectors
from tests.embeddings.noise_shop import (
    export_params,
    random_halves,
)


def write_small(path: Path, num_items: int = 20, has_image: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    image, text = random_halves(num_items, 4)
    fused = np.hstack([image, text])
    has_image = np.ones(num_items, dtype=bool) if has_image is None else has_image
    raw_ids = [f"B{place:04d}" for place in range(num_items)]
    write_embeddings(path, np.arange(1, num_items + 1), raw_ids, image, text, fused, {"b": "2", "a": "é"}, has_image)
    return image, text, fused


def test_file_is_read_back(tmp_path):
    image, text, fused = write_small(tmp_path / "e.parquet")
    frame = EMBEDDINGS.read(tmp_path / "e.parquet")
    assert dict(frame.schema) == {
        "item_id": pl.Int32,
        "raw_item_id": pl.String,
        "image_embedding": pl.Array(pl.Float32, 4),
        "text_embedding": pl.Array(pl.Float32, 4),
        "embedding": pl.Array(pl.Float32, 8),
    }
    assert frame["raw_item_id"][3] == "B0003"
    for column, matrix in (("image_embedding", image), ("text_embedding", text), ("embedding", fused)):
        vectors = read_vectors(tmp_path / "e.parquet", column)
        assert vectors is not None
        np.testing.assert_array_equal(vectors[1:], matrix)
        assert not vectors[0].any()


def test_file_says_what_it_is(tmp_path, backbone):
    write_small(tmp_path / "e.parquet")
    schema = pq.read_schema(tmp_path / "e.parquet")
    assert schema.metadata == {b"a": "é".encode(), b"b": b"2"}
    assert schema.field("embedding").type == pa.list_(pa.float32(), 8)
    described = embedding_metadata(backbone.info, export_params(), "prompt", "adapter", 32, 8)
    for key in (
        "backbone_name",
        "backbone_revision",
        "backbone_dtype",
        "backbone_pooling",
        "adapter_hash",
        "prompt_hash",
        "fusion",
    ):
        assert described[key]
    assert (described["normalized"], described["modality_dim"], described["embedding_dim"]) == ("true", "32", "8")


def test_missing_image_is_null(tmp_path):
    has_image = np.arange(20) != 7
    image, text, _ = write_small(tmp_path / "e.parquet", has_image=has_image)
    frame = pl.read_parquet(tmp_path / "e.parquet")
    assert frame["image_embedding"].is_null().to_list() == (~has_image).tolist()
    assert frame["text_embedding"].null_count() == frame["embedding"].null_count() == 0
    kept = frame.filter(pl.col("image_embedding").is_not_null())
    np.testing.assert_array_equal(kept["image_embedding"].to_numpy(), image[has_image])
    np.testing.assert_array_equal(frame["text_embedding"].to_numpy(), text)
    assert pq.read_table(tmp_path / "e.parquet")["image_embedding"].null_count == 1


def test_file_bytes_depend_on_the_content_only(tmp_path):
    write_small(tmp_path / "a.parquet")
    write_small(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    image, text = random_halves(20, 4)
    raw_ids = [f"B{place:04d}" for place in range(20)]
    strided = np.asfortranarray(image)
    write_embeddings(
        tmp_path / "c.parquet",
        np.arange(1, 21, dtype=np.int64),
        raw_ids,
        strided,
        text,
        np.hstack([image, text]),
        {"a": "é", "b": "2"},
        np.ones(20, bool),
    )
    assert (tmp_path / "c.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()


def test_row_groups_are_small(tmp_path):
    image, text = random_halves(20_000, 2)
    ids = np.arange(1, 20_001)
    write_embeddings(tmp_path / "e.parquet", ids, [str(i) for i in ids], image, text, text, {}, np.ones(20_000, dtype=bool))
    groups = pq.read_metadata(tmp_path / "e.parquet")
    assert [groups.row_group(place).num_rows for place in range(groups.num_row_groups)] == [8192, 8192, 3616]


def test_ids_only(tmp_path):
    write_ids_only(tmp_path / "id.parquet", np.arange(1, 4), ["x", "y", "z"], {"variant": "id"})
    assert read_vectors(tmp_path / "id.parquet") is None
    assert EMBEDDINGS.read(tmp_path / "id.parquet").rows() == [(1, "x"), (2, "y"), (3, "z")]
    assert pq.read_schema(tmp_path / "id.parquet").metadata == {b"variant": b"id"}


def test_the_modalities_are_read_back_with_zeros_where_there_is_none(tmp_path):
    has_image = np.ones(20, dtype=bool)
    has_image[3] = False
    image, text, _ = write_small(tmp_path / "e.parquet", has_image=has_image)
    found = read_modalities(tmp_path / "e.parquet")
    np.testing.assert_array_equal(found[0][has_image], image[has_image])
    assert not found[0][3].any()
    np.testing.assert_array_equal(found[1], text)
    write_ids_only(tmp_path / "ids.parquet", np.arange(1, 3), ["a", "b"], {})
    with pytest.raises(ArtifactError, match="has no column 'image_embedding'"):
        read_modalities(tmp_path / "ids.parquet")


def test_the_file_tells_what_of_its_fusion_is_not_neutral(tmp_path, backbone):
    plain = embedding_metadata(backbone.info, export_params(center=False), "p", "", 4, 8)
    fusion = {"with_base": True, "image_weight": 0.5, "axis_scaling": "even", "center": True}
    told = embedding_metadata(backbone.info, export_params(**fusion), "p", "", 4, 8)
    assert {name: told[name] for name in told.keys() - plain.keys()} == {
        "with_base": "true",
        "image_weight": "0.5",
        "axis_scaling": "even",
        "center": "true",
    }
