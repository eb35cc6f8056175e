"""Item vectors: one pass a modality, fusion into one vector an item, and the parquet file that holds them.

* Items are encoded in blocks of ``shard_rows``; inside a block in batches of alike length.  A finished block is written
  whole and tied to the run's inputs, so an interrupted export goes on where it stopped, and because the batches of a
  block do not depend on what was there before, it ends with the same bytes as an undisturbed one.
* Results are put back by row; row r of every matrix is the r-th item.
* The principal components of ``late_concat_pca`` are computed exactly and in float64, from a covariance that is summed in
  chunks: a shop of 57,000 items and 7,168 columns is never held a third time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from sda_core.artifacts import replace_file
from sda_core.backbones import Backbone, BackboneInfo
from sda_core.checkpoint import load_checkpoint, save_checkpoint
from sda_core.errors import ConfigError, DataError
from sda_core.fingerprint import fingerprint as fingerprint_of
from sda_core.items import ItemSource
from sda_core.log import progress
from sda_core.params import ExportParams

_log = logging.getLogger(__name__)

Modality = Literal["image", "text"]
ModalityContext = Callable[[str], AbstractContextManager[object]]

_ROW_GROUP_ROWS = 8192
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class EmbeddedItems:
    """One vector a modality for every item; not normalised.

    Attributes:
        item_ids: ``(I,)`` int32, in the source's order.
        image_ID: ``(I, D)`` float32; zero where ``has_image`` is false.
        text_ID: ``(I, D)`` float32.
        has_image: ``(I,)`` bool, whether a picture (real or placeholder) was encoded.
    """

    item_ids: np.ndarray
    image_ID: np.ndarray
    text_ID: np.ndarray
    has_image: np.ndarray


# ---------------------------------------------------------------------------------------------- encoding
def embed_items(
    backbone: Backbone,
    model: nn.Module,
    source: ItemSource,
    params: ExportParams,
    resume: Path,
    fingerprint: str,
    device: torch.device,
    modality_context: ModalityContext,
) -> EmbeddedItems:
    """Encode every item, one modality after the other.

    Args:
        backbone: makes inputs and pools.
        model: ``backbone.model``, or the PEFT model around it; put into evaluation mode.
        source: the items.
        params: batch and block sizes.
        resume: folder of finished blocks; made where absent, and left to the caller to delete.
        fingerprint: of everything the vectors depend on besides these arguments (weights, adapter, prompts, pictures).
        device: where the model is.
        modality_context: what to enter around the passes of ``"image"`` and of ``"text"``, e.g. the adapter's modality.

    Raises:
        ArtifactError: a picture cannot be decoded.
        DataError: a vector is not finite.
        ConfigError: a batch does not fit into the device's memory.
    """
    model.eval()
    task = _Task(backbone, model, source, params, device, modality_context)
    image_ID = _embed_modality(task, "image", resume, fingerprint)
    text_ID = _embed_modality(task, "text", resume, fingerprint)
    return EmbeddedItems(source.item_ids.copy(), image_ID, text_ID, source.shows_image.copy())


@dataclass(frozen=True)
class _Task:
    """What the passes of both modalities share."""

    backbone: Backbone
    model: nn.Module
    source: ItemSource
    params: ExportParams
    device: torch.device
    modality_context: ModalityContext


def _embed_modality(task: _Task, modality: Modality, resume: Path, fingerprint: str) -> np.ndarray:
    """All vectors of one modality, ``(I, D)`` float32; rows without a picture stay zero."""
    source, params = task.source, task.params
    inputs_hash = fingerprint_of(
        fingerprint, repr(task.backbone.info), task.backbone.dim, modality, _hash_of(source), params.batch_size, params.shard_rows
    )
    vectors_ID = np.zeros((len(source), task.backbone.dim), dtype=np.float32)
    num_resumed, num_cut = 0, 0
    with (
        progress(len(source), f"embed {modality}", "items") as bar,
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="item-inputs") as worker,
    ):
        for number, start in enumerate(range(0, len(source), params.shard_rows)):
            block = np.arange(start, min(start + params.shard_rows, len(source)))
            rows = block if modality == "text" else block[source.shows_image[block]]
            path = resume / f"{modality}-{number:05d}.safetensors"
            stored = load_checkpoint(path, inputs_hash)
            if stored is not None:
                vectors_ID[rows] = stored[0]["vectors"].numpy()
                num_resumed += len(rows)
                num_cut += stored[1]["num_cut"]
            elif len(rows):
                vectors_BD, block_cut = _encode_block(task, modality, rows, worker)
                save_checkpoint(path, {"vectors": vectors_BD}, {"num_cut": block_cut}, inputs_hash)
                vectors_ID[rows] = vectors_BD.numpy()
                num_cut += block_cut
            bar.update(len(block))
    _log.info("%s: %d items, %d of them taken from an earlier run", modality, len(source), num_resumed)
    if modality == "text" and num_cut:
        _log.info("%d of %d texts fill backbone.max_text_tokens and were cut there", num_cut, len(source))
    return vectors_ID


def _encode_block(task: _Task, modality: Modality, rows: np.ndarray, worker: ThreadPoolExecutor) -> tuple[Tensor, int]:
    """Vectors of some rows, ``(B, D)`` float32 on the CPU, in their order; and how many sequences have full length.

    Reading, decoding and tokenising the next batch runs in ``worker`` while the model is busy with this one.
    """
    backbone, source, batch_size = task.backbone, task.source, task.params.batch_size

    def inputs_of(places: np.ndarray) -> dict[str, Tensor]:
        if modality == "text":
            return backbone.text_inputs(source.texts(rows[places]))
        images = [image for image in source.images(rows[places]) if image is not None]
        assert len(images) == len(places), "rows without a picture are left out before"
        return backbone.image_inputs(images, source.image_prompt)

    order = _by_length(modality, source, rows)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    encoded: list[Tensor] = []
    num_full = 0
    with torch.inference_mode(), task.modality_context(modality):
        for inputs in _ahead(worker, [lambda places=places: inputs_of(places) for places in batches]):
            num_full += int((inputs["attention_mask"].sum(1) >= backbone.info.max_text_tokens).sum())
            moved = {name: tensor.to(task.device, non_blocking=True) for name, tensor in inputs.items()}
            try:
                encoded.append(backbone.encode(task.model, moved))
            except torch.OutOfMemoryError:
                problem = f"{batch_size} items do not fit into the memory of {task.device}"
                raise ConfigError("params.yaml: export_embeddings.batch_size", problem, "lower it") from None
        sorted_BD = torch.cat(encoded).to("cpu", torch.float32)
    vectors_BD = torch.empty_like(sorted_BD)
    vectors_BD[torch.from_numpy(order)] = sorted_BD
    bad = rows[~torch.isfinite(vectors_BD).all(1).numpy()]
    if len(bad):
        ids = ", ".join(str(item_id) for item_id in source.item_ids[bad[:5]])
        raise DataError(
            f"{modality} vectors",
            f"should be finite (got NaN or infinity for {len(bad)} items, e.g. item_id {ids})",
            "use backbone.dtype bfloat16 or float32, and look at the adapter's loss curve",
        )
    return vectors_BD, num_full


def _by_length(modality: Modality, source: ItemSource, rows: np.ndarray) -> np.ndarray:
    """Order of the rows in which neighbours need about the same number of tokens; ties by place.

    Bytes stand for a text's tokens.  Pictures are brought to about one number of pixels by the backbone and keep their place.
    """
    if modality == "image":
        return np.arange(len(rows))
    return np.argsort([len(text.encode()) for text in source.texts(rows)], kind="stable")


def _ahead(
    worker: ThreadPoolExecutor, tasks: list[Callable[[], dict[str, Tensor]]], depth: int = 2
) -> Iterator[dict[str, Tensor]]:
    """Results of tasks in order, up to ``depth`` of them computed ahead."""
    waiting: list[Future[dict[str, Tensor]]] = [worker.submit(task) for task in tasks[:depth]]
    for place in range(len(tasks)):
        result = waiting.pop(0).result()
        if place + depth < len(tasks):
            waiting.append(worker.submit(tasks[place + depth]))
        yield result


def _hash_of(source: ItemSource) -> str:
    """Of the ids, of which items show a picture, and of the words."""
    digest = hashlib.sha256(source.item_ids.tobytes() + source.shows_image.tobytes() + source.has_image.tobytes())
    for text in [source.image_prompt, source.prompt_hash, *source.texts(np.arange(len(source)))]:
        digest.update(f"{len(text)}\x1f{text}".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ fusion
def fuse(
    image_ID: np.ndarray, text_ID: np.ndarray, has_image: np.ndarray, fit_ids: np.ndarray, params: ExportParams
) -> np.ndarray:
    """One vector an item from its two.

    With ``params.normalize`` each half is brought to unit length first, and the result last.  A row without a picture
    takes the mean image vector of the fitted items that have one (of all that have one, where none is fitted): the
    point that says nothing about the item.

    ===================  ====================================================================================
    ``late_concat_pca``  principal components of ``[image, text]``, fitted on ``fit_ids`` only, centred, not
                         whitened; ``min(fused_dim, 2 D, number of fitted items)`` of them; of each, the loading of
                         largest size is positive
    ``concat``           ``[image, text]``, 2 D wide
    ``mean``             ``(image + text) / 2``
    ``image``, ``text``  one of the two
    ===================  ====================================================================================

    Args:
        image_ID: ``(I, D)`` float32, row r belongs to item id r + 1.
        text_ID: ``(I, D)`` float32.
        has_image: ``(I,)`` bool, where a row of ``image_ID`` counts.
        fit_ids: item ids seen in training.
        params: fusion, ``fused_dim``, ``normalize``.

    Returns:
        ``(I, F)`` float32.

    Raises:
        DataError: nothing to fit on, an id out of range, or pictures alone are asked for and there are none.
    """
    fit_rows = np.unique(np.asarray(fit_ids, dtype=np.int64)) - 1
    if len(fit_rows) and (fit_rows[0] < 0 or fit_rows[-1] >= len(image_ID)):
        raise DataError(
            "item fusion", f"ids of training items should lie in 1..{len(image_ID)} (got {fit_rows[0] + 1}..{fit_rows[-1] + 1})"
        )
    match params.fusion:
        case "late_concat_pca":
            fused_IF = _principal_components(_joined(image_ID, text_ID, has_image, fit_rows, params), fit_rows, params.fused_dim)
        case "concat":
            fused_IF = _joined(image_ID, text_ID, has_image, fit_rows, params)
        case "mean":
            width = image_ID.shape[1]
            joined_IF = _joined(image_ID, text_ID, has_image, fit_rows, params)
            fused_IF = (joined_IF[:, :width] + joined_IF[:, width:]) / 2
        case "image":
            if not has_image.any():
                raise DataError("params.yaml: export_embeddings.fusion", "is 'image', but no item has a picture", "use 'text'")
            fused_IF = image_ID.astype(np.float32)
            _prepare_images(fused_IF, has_image, fit_rows, params)
        case "text":
            fused_IF = text_ID.astype(np.float32)
        case _:
            assert_never(params.fusion)
    if params.normalize:
        _scale_to_unit(fused_IF)
    return fused_IF


def _joined(
    image_ID: np.ndarray, text_ID: np.ndarray, has_image: np.ndarray, fit_rows: np.ndarray, params: ExportParams
) -> np.ndarray:
    """``[image, text]``, ``(I, 2 D)`` float32: the one further copy that a fusion makes."""
    joined_IF = np.concatenate([image_ID, text_ID], axis=1, dtype=np.float32)
    width = image_ID.shape[1]
    _prepare_images(joined_IF[:, :width], has_image, fit_rows, params)
    if params.normalize:
        _scale_to_unit(joined_IF[:, width:])
    return joined_IF


def _prepare_images(image_ID: np.ndarray, has_image: np.ndarray, fit_rows: np.ndarray, params: ExportParams) -> None:
    """In place: unit length if asked, and the mean vector in the rows that have no picture."""
    if params.normalize:
        _scale_to_unit(image_ID)
    if has_image.all():
        return
    fitted = np.zeros(len(has_image), dtype=bool)
    fitted[fit_rows] = True
    known = has_image & fitted if (has_image & fitted).any() else has_image
    image_ID[~has_image] = image_ID[known].mean(0, dtype=np.float64) if known.any() else 0.0


def _scale_to_unit(vectors_ID: np.ndarray) -> None:
    """In place: rows of length one; zero rows stay zero."""
    norms_I = np.sqrt(np.einsum("id,id->i", vectors_ID, vectors_ID))
    vectors_ID /= np.where(norms_I > 0, norms_I, 1.0)[:, None]


def _principal_components(vectors_IF: np.ndarray, fit_rows: np.ndarray, num_components: int) -> np.ndarray:
    """Centred projections on the principal axes of the fitted rows, ``(I, K)`` float32.

    The axes come from the covariance where there are at least as many rows as columns, else from the singular value
    decomposition of the rows: both exact.
    """
    width = vectors_IF.shape[1]
    if not len(fit_rows):
        raise DataError(
            "item fusion", "there is no training item to fit the principal components on", "look at the filter's statistics"
        )
    kept = min(num_components, width, len(fit_rows))
    if kept < num_components:
        _log.info(
            "late_concat_pca: %d components instead of %d (%d columns, %d fitted items)",
            kept,
            num_components,
            width,
            len(fit_rows),
        )
    mean_F = np.zeros(width, dtype=np.float64)
    for chunk in _chunks(fit_rows):
        mean_F += vectors_IF[chunk].sum(0, dtype=np.float64)
    mean_F /= len(fit_rows)
    if len(fit_rows) >= width:
        scatter_FF = np.zeros((width, width), dtype=np.float64)
        for chunk in _chunks(fit_rows):
            centred = vectors_IF[chunk] - mean_F
            scatter_FF += centred.T @ centred
        axes_FK = np.linalg.eigh(scatter_FF)[1][:, ::-1][:, :kept]
    else:
        axes_FK = np.linalg.svd(vectors_IF[fit_rows] - mean_F, full_matrices=False)[2][:kept].T
    signs_K = np.sign(axes_FK[np.abs(axes_FK).argmax(0), np.arange(kept)])
    axes_FK = axes_FK * signs_K
    projected_IK = np.empty((len(vectors_IF), kept), dtype=np.float32)
    for chunk in _chunks(np.arange(len(vectors_IF))):
        projected_IK[chunk] = (vectors_IF[chunk] - mean_F) @ axes_FK
    return projected_IK


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most ``_CHUNK_ROWS`` rows."""
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS]


# -------------------------------------------------------------------------------------------------- file
def embedding_metadata(
    info: BackboneInfo, params: ExportParams, prompt_hash: str, adapter_hash: str, dim: int, fused_dim: int
) -> dict[str, str]:
    """What a file of vectors says about itself: backbone (name, revision, dtype, pooling, ...), adapter, prompts, fusion.

    Args:
        info: of the backbone.
        params: of the export.
        prompt_hash: of the item source.
        adapter_hash: of the adapter's files; ``""`` where there is none.
        dim: width of a modality's vectors.
        fused_dim: width of the fused vectors.
    """
    return {
        **info.metadata(),
        "adapter_hash": adapter_hash,
        "prompt_hash": prompt_hash,
        "fusion": params.fusion,
        "normalized": str(params.normalize).lower(),
        "modality_dim": str(dim),
        "embedding_dim": str(fused_dim),
    }


def write_embeddings(
    path: Path,
    item_ids: np.ndarray,
    raw_item_ids: list[str],
    image: np.ndarray,
    text: np.ndarray,
    fused: np.ndarray,
    metadata: Mapping[str, str],
    has_image: np.ndarray,
) -> None:
    """Write ``item_id, raw_item_id, image_embedding, text_embedding, embedding`` as parquet.

    The three matrices become ``fixed_size_list<float32>`` columns; ``image_embedding`` is null where ``has_image`` is false.
    ``metadata`` goes into the Arrow schema, keys sorted.  Equal arguments give equal bytes (and the same pyarrow version).
    """
    columns = {
        "item_id": pa.array(np.asarray(item_ids, dtype=np.int32)),
        "raw_item_id": pa.array(raw_item_ids, pa.string()),
        "image_embedding": _vector_column(image, ~np.asarray(has_image, dtype=bool)),
        "text_embedding": _vector_column(text),
        "embedding": _vector_column(fused),
    }
    _write(path, pa.table(columns), metadata)


def write_ids_only(path: Path, item_ids: np.ndarray, raw_item_ids: list[str], metadata: Mapping[str, str]) -> None:
    """Write a table of ids without vectors, for the variant that learns its item vectors from interactions alone."""
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
