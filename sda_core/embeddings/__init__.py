"""Item vectors: one pass per modality or one joint pass, one vector per item, and the parquet file that stores them.

* Items are encoded in blocks of ``shard_rows`` (:mod:`~sda_core.embeddings.blocks`), by one process, by the processes of a
  launch (:mod:`sda_core.processes`) or by the workers of a Ray cluster (:mod:`~sda_core.embeddings.ray_engine`).  A finished
  block is written atomically with a fingerprint of the run's inputs, so an interrupted export resumes.  The batches of a
  block depend neither on existing blocks nor on the process that encodes it, so the results are the same.
* Results are ordered by row: row r of every matrix is the r-th item.

The main functions are :func:`~sda_core.embeddings.encoding.embed`, :func:`~sda_core.embeddings.fusion.fuse`, and the writers
in :mod:`~sda_core.embeddings.table`.  Importing the package imports none of them, because a variant with ids only needs no
model.
"""
