"""Item vectors: one pass per modality or one joint pass, one vector per item, and the parquet file that holds them.

* Items are encoded in blocks of ``shard_rows`` (:mod:`~sda_core.embeddings.blocks`), by one process, by several of one
  launch (:mod:`sda_core.processes`) or by the workers of a Ray cluster
  (:mod:`~sda_core.embeddings.ray_engine`).  A finished block is written whole and tied to the run's inputs, so an
  interrupted export resumes where it stopped.  The batches of a block depend neither on what was there before nor on who
  encodes it, so all of them end with the same rows.
* Results are put back by row; row r of every matrix is the r-th item.

What one calls: :func:`~sda_core.embeddings.encoding.embed`, :func:`~sda_core.embeddings.fusion.fuse`, and the writers of
:mod:`~sda_core.embeddings.table`.  Importing the package imports none of them, because a variant of ids alone needs no model.
"""
