"""The parquet file of item vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sda_core.artifacts import EMBEDDINGS, replace_file
from sda_core.errors import ArtifactError
from sda_core.modalities import MODALITIES
from sda_core.params import ExportParams

if TYPE_CHECKING:
    from sda_core.backbones import BackboneInfo

_ROW_GROUP_ROWS = 8192


def embedding_metadata(
    info: BackboneInfo,
    params: ExportParams,
    prompt_hash: str,
    adapter_hash: str,
    dim: int,
    fused_dim: int,
    *,
    joint: bool = False,
) -> dict[str, str]:
    """The metadata of a file of vectors: backbone (name, revision, dtype, pooling, ...), adapter, prompts, fusion.

    Args:
        info: description of the backbone.
        params: section of the export.
        prompt_hash: hash of the prompts of the item source.
        adapter_hash: hash of the adapter's files; ``""`` without an adapter.
        dim: width of a modality's vectors, or of the joint ones.
        fused_dim: width of the fused vectors.
        joint: whether image and text went through the backbone in one sequence.
    """
    return {
        **info.metadata(),
        "adapter_hash": adapter_hash,
        "prompt_hash": prompt_hash,
        **({"pass": "joint"} if joint else {}),
        "fusion": params.fusion,
        **_non_default_fusion(params, joint),
        "normalized": str(params.normalize).lower(),
        "joint_dim" if joint else "modality_dim": str(dim),
        "embedding_dim": str(fused_dim),
    }


def _non_default_fusion(params: ExportParams, joint: bool) -> dict[str, str]:
    """The fusion settings that differ from the neutral ones, without those that a joint pass does not use."""
    neutral: dict[str, object] = {"center": False, "axis_scaling": "none"}
    if not joint:
        neutral |= {"image_weight": 1.0, "text_weight": 1.0, "balance": "none", "with_base": False}
    return {name: str(getattr(params, name)).lower() for name, value in neutral.items() if getattr(params, name) != value}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata given to :func:`write_embeddings`."""
    return {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}


def read_modalities(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and text vectors of a file, ``(I, D)`` each, in the order of the item ids; zeros for missing vectors.

    Raises:
        ArtifactError: the file is missing or damaged, or lacks one of the two columns.
    """
    frame = EMBEDDINGS.read(path).sort("item_id")
    found: list[np.ndarray] = []
    for name in MODALITIES:
        column = f"{name}_embedding"
        if column not in frame.columns:
            raise ArtifactError(str(path), f"has no column {column!r} (got {', '.join(frame.columns)})", "run `dvc repro`")
        vectors = frame[column].drop_nulls().to_numpy()
        matrix_ID = np.zeros((len(frame), vectors.shape[1]), dtype=np.float32)
        matrix_ID[frame[column].is_not_null().to_numpy()] = vectors
        found.append(matrix_ID)
    return found[0], found[1]


def write_embeddings(
    path: Path,
    item_ids: np.ndarray,
    raw_item_ids: list[str],
    image: np.ndarray | None,
    text: np.ndarray | None,
    fused: np.ndarray,
    metadata: Mapping[str, str],
    has_image: np.ndarray,
    has_text: np.ndarray | None = None,
) -> None:
    """Write ``item_id, raw_item_id, image_embedding, text_embedding, embedding`` as parquet.

    The matrices become ``fixed_size_list<float32>`` columns; ``image_embedding`` is null where ``has_image`` is false, and
    ``text_embedding`` where ``has_text`` is false (None: never).  Imported vectors may lack one or both of these columns.
    ``metadata`` is written to the Arrow schema, keys sorted.  Equal arguments and pyarrow versions give equal bytes.
    """
    columns = {
        "item_id": pa.array(np.asarray(item_ids, dtype=np.int32)),
        "raw_item_id": pa.array(raw_item_ids, pa.string()),
    }
    if image is not None:
        columns["image_embedding"] = _vector_column(image, ~np.asarray(has_image, dtype=bool))
    if text is not None:
        columns["text_embedding"] = _vector_column(text, None if has_text is None else ~np.asarray(has_text, dtype=bool))
    columns["embedding"] = _vector_column(fused)
    _write(path, pa.table(columns), metadata)


def write_ids_only(path: Path, item_ids: np.ndarray, raw_item_ids: list[str], metadata: Mapping[str, str]) -> None:
    """Write a table of ids without vectors, for the variant whose item vectors are learned from interactions only."""
    columns = {"item_id": pa.array(np.asarray(item_ids, dtype=np.int32)), "raw_item_id": pa.array(raw_item_ids, pa.string())}
    _write(path, pa.table(columns), metadata)


def _vector_column(matrix_ID: np.ndarray, null: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """A matrix as ``fixed_size_list<float32>[D]``, without a copy."""
    flat = pa.array(np.ascontiguousarray(matrix_ID, dtype=np.float32).reshape(-1))
    mask = pa.array(null) if null is not None and null.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, matrix_ID.shape[1], mask=mask)


def _write(path: Path, table: pa.Table, metadata: Mapping[str, str]) -> None:
    described = table.replace_schema_metadata(dict(sorted(metadata.items())))
    with replace_file(path) as temporary:
        pq.write_table(described, temporary, compression="zstd", row_group_size=_ROW_GROUP_ROWS, use_dictionary=False)
