"""Export item vectors with a Ray Data batch-inference job on a Ray cluster.

The driver sends blocks of prompts and encoded images through Ray's object store, so the machines need no shared disk; Ray
spills objects that do not fit into memory.  Every worker is an actor that loads backbone and adapter once.  Ray schedules,
applies back-pressure, and reassigns the block of a lost worker.  Only the driver writes: each result becomes a finished block
in the resume folder, so a restarted driver repeats only the blocks in progress.

Every machine needs the same version of this package and access to the backbone: built in, in the hub's cache, downloadable, or
in a folder with the same path.  The adapter is sent with the job.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sda_core import backbones, errors
from sda_core.adapters.saving import load
from sda_core.backbones import BackboneInfo
from sda_core.embeddings.blocks import Block, BlockEncoder, BlockFolder, EmbeddedItems, EncodedBlock, blocks_of
from sda_core.errors import ArtifactError, ConfigError, SDAError
from sda_core.fingerprint import fingerprint as fingerprint_of
from sda_core.fingerprint import sha256_path
from sda_core.items import ItemSource
from sda_core.log import progress
from sda_core.modalities import Pass
from sda_core.params import BackboneParams, ExportParams


def embed_with_ray(
    backbone_params: BackboneParams,
    adapter: Path | None,
    source: ItemSource,
    params: ExportParams,
    resume: Path,
    fingerprint: str,
    device_type: str,
    passes: Sequence[Pass],
) -> EmbeddedItems:
    """Encode every item on a Ray cluster: the one at ``RAY_ADDRESS``, else a temporary one on this machine.

    Args:
        backbone_params: section of the backbone.
        adapter: folder of the adapter; None for the backbone alone.
        source: the items.
        params: number of workers, batch and block sizes, whether to merge and to compile.
        resume: folder of finished blocks, on the driver's disk.
        fingerprint: hash of everything on which the vectors depend besides these arguments.
        device_type: ``cuda`` assigns a GPU to every worker, ``cpu`` a core.
        passes: the kinds of pass.

    Returns:
        The vectors, equal to those of one process within float tolerance.

    Raises:
        ConfigError: Ray is not installed or not reachable, or a batch does not fit into a worker's memory.
        ArtifactError, DataError: errors of a worker.
        SDAError: the Ray job failed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        problem = f"is 'ray', and the module {error.name} is not installed"
        raise ConfigError("params.yaml: export_embeddings.engine", problem, "install the extra ray, or use 'local'") from None
    local_files = Path(getattr(backbone_params, "name", "")).expanduser()
    revision = sha256_path(local_files) if local_files.is_dir() and local_files.name else ""
    folder = BlockFolder(resume, fingerprint_of(fingerprint, backbone_params, revision, "ray"), source, params, passes)
    blocks = blocks_of(source, params.shard_rows, passes)
    unfinished = folder.unfinished(blocks)
    todo = [block for block, open_ in zip(blocks, unfinished, strict=True) if open_]
    if todo:
        by_place = {(block.name, block.number): block for block in todo}
        try:
            with _cluster(params.num_workers), progress(sum(len(block.rows) for block in todo), "embed", "items") as bar:
                job = ray.data.from_arrow([_packed(source, block) for block in todo]).map_batches(
                    _Worker,
                    fn_constructor_kwargs={
                        "backbone_params": backbone_params,
                        "adapter_files": _files_of(adapter),
                        "params": params,
                        "image_prompt": source.image_prompt,
                        "device_type": device_type,
                        "passes": passes,
                    },
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=min(params.num_workers, len(todo))),
                    num_cpus=1,
                    num_gpus=1 if device_type == "cuda" else 0,
                )
                for row in job.iter_rows():
                    _raise_original(row["error"])
                    block = by_place[row["name"], row["number"]]
                    vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(len(block.rows), -1)
                    info = BackboneInfo(**json.loads(row["info"]))
                    folder.save(block, EncodedBlock(torch.from_numpy(vectors.copy()), row["num_full"], info))
                    bar.update(len(block.rows))
        except RayError as error:
            reason = next((line for line in reversed(str(error).split("\n")) if line.strip()), type(error).__name__)
            advice = "check the cluster, and run the same command again: finished blocks are kept"
            raise SDAError("export on Ray", f"gave up ({reason.strip()[:200]})", advice) from None
    return folder.assemble(source, blocks, int((~unfinished).sum()))


@contextmanager
def _cluster(num_workers: int) -> Generator[None]:
    """Context with a connection to the cluster; a temporary cluster ends with it, an existing connection is kept."""
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # temporary cluster: one core per worker, and no dashboard, which would be another server
    own: dict[str, Any] = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ConfigError("RAY_ADDRESS", f"no Ray cluster answers at this address (got {address!r}: {first_line})") from None
    try:
        # Ray's progress bars and plan are for Ray developers; our progress bar and log suffice
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


# ------------------------------------------------------------------------------------------ what travels
def _packed(source: ItemSource, block: Block) -> pa.Table:
    """A block as one row: ids, and the texts or the encoded images (null for a placeholder)."""
    ids = source.item_ids[block.rows]
    images = [source.store.get(int(item_id)) for item_id in ids] if block.name != "text" else []
    for item_id, expected, image in zip(ids, source.has_image[block.rows], images, strict=False):
        if expected and image is None:  # a worker could not distinguish it from an item without an image
            problem, advice = "is marked ok, but is not there", "run `dvc repro` to fetch the images again"
            raise ArtifactError(f"image of item {item_id}", problem, advice)
    texts = source.texts(block.rows) if block.name != "image" else []
    return pa.table(
        {
            "name": pa.array([block.name]),
            "number": pa.array([block.number], pa.int64()),
            "item_ids": pa.array([ids.tolist()], pa.list_(pa.int32())),
            "texts": pa.array([texts], pa.list_(pa.string())),
            "images": pa.array([images], pa.list_(pa.large_binary())),
        }
    )


def _files_of(adapter: Path | None) -> dict[str, bytes] | None:
    """The contents of an adapter's two files, small enough to send."""
    if adapter is None:
        return None
    return {path.name: path.read_bytes() for path in sorted(adapter.glob("adapter_*")) if path.is_file()}


class _SentImages:
    """The images of one block, on the worker."""

    def __init__(self, images: dict[int, bytes | None]) -> None:
        self._images = images

    def get(self, item_id: int) -> bytes | None:
        """See :class:`sda_core.items.EncodedImages`."""
        return self._images.get(item_id)

    def status(self, item_id: int) -> str:
        """See :class:`sda_core.items.EncodedImages`."""
        return "ok" if self._images.get(item_id) is not None else "not sent"


class _Worker:
    """An actor of the job: loads the model once, then encodes a block per call.

    A user's mistake is returned as a row, because Ray would treat an exception as a lost worker and retry forever.
    """

    def __init__(
        self,
        backbone_params: BackboneParams,
        adapter_files: dict[str, bytes] | None,
        params: ExportParams,
        image_prompt: str,
        device_type: str,
        passes: Sequence[Pass],
    ) -> None:
        self._image_prompt = image_prompt
        self._entered: Pass | None = None
        self._around = ExitStack()
        self._error: SDAError | None = None
        device = torch.device(device_type)
        try:
            backbone = backbones.build(backbone_params, device)
            with tempfile.TemporaryDirectory() as temporary:
                for name, content in (adapter_files or {}).items():
                    (Path(temporary) / name).write_bytes(content)
                model, self._context = load(
                    backbone.model, Path(temporary) if adapter_files is not None else None, merge=params.merge
                )
            self._encoder = BlockEncoder(backbone, model.eval(), params, device)
            self._encoder.check(passes)
            self._encoder.prepare()
        except SDAError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a packed block."""
        (row,) = batch.to_pylist()
        error, vectors, num_full, info = self._error, b"", 0, "{}"
        if error is None:
            try:
                encoded = self._encode(row)
                vectors, num_full = encoded.vectors_BD.numpy().tobytes(), encoded.num_full
                info = json.dumps(asdict(encoded.info))
            except SDAError as found:
                error = found
        described = json.dumps([type(error).__name__, error.where, error.problem, error.advice]) if error else ""
        return pa.table(
            {
                "name": [row["name"]],
                "number": [row["number"]],
                "vectors": pa.array([vectors], pa.large_binary()),
                "num_full": [num_full],
                "info": [info],
                "error": [described],
            }
        )

    def _encode(self, row: dict[str, Any]) -> EncodedBlock:
        name: Pass = row["name"]
        ids = np.array(row["item_ids"], dtype=np.int32)
        texts = row["texts"] or [""] * len(ids)
        images: dict[int, bytes | None] = dict(zip(ids.tolist(), row["images"] or [None] * len(ids), strict=True))
        block = ItemSource(ids, texts, self._image_prompt, "", _SentImages(images), "placeholder")
        if name != self._entered:  # the driver sends all images first, so a worker merges about twice
            self._around.close()
            self._entered = None
            self._around.enter_context(self._encoder.around(name, self._context))
            self._entered = name
        return self._encoder.encode(block, name, np.arange(len(ids)))


def _raise_original(described: str) -> None:
    """Raise the error that a worker sent, with its original type."""
    if described:
        kind, where, problem, advice = json.loads(described)
        raise getattr(errors, kind)(where, problem, advice)
