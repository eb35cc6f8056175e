"""Item vectors: one pass a modality, fusion into one vector an item, and the parquet file that holds them.

* Items are encoded in blocks of ``shard_rows`` (:mod:`~sda_core.embeddings.blocks`), by one process, by several of one
  launch (:mod:`sda_core.processes`) or by the workers of a Ray cluster
  (:mod:`~sda_core.embeddings.ray_engine`).  A finished block is written whole and tied to the run's inputs, so an
  interrupted export goes on where it stopped.  The batches of a block depend neither on what was there before nor on who
  encodes it, so all of them end with the same rows.
* Results are put back by row; row r of every matrix is the r-th item.
"""

from __future__ import annotations

from sda_core.embeddings.blocks import EmbeddedItems, Modality, ModalityContext
from sda_core.embeddings.encoding import embed, embed_items
from sda_core.embeddings.fusion import fuse
from sda_core.embeddings.table import embedding_metadata, write_embeddings, write_ids_only
from sda_core.processes import Processes, processes

__all__ = [
    "EmbeddedItems",
    "Modality",
    "ModalityContext",
    "Processes",
    "embed",
    "embed_items",
    "embedding_metadata",
    "fuse",
    "processes",
    "write_embeddings",
    "write_ids_only",
]
