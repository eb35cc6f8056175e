"""To and from the formats of others.

* :mod:`~sda_core.exchange.vectors` reads item vectors that were made elsewhere, joined by the shop's own ids.
* :mod:`~sda_core.exchange.export` writes a shop (interactions with our split, items, one variant's vectors) for MMRec,
  RecBole or Hugging Face ``datasets``; each format has a module of its own, which says what its reader expects.

No format is written or read with pickle.  Nothing here needs torch, or the libraries that the files are for.  Importing the
package imports none of its modules, because the command line wants the names of the formats at once.
"""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The formats that are written."""

    MMREC = "mmrec"
    RECBOLE = "recbole"
    DATASETS = "datasets"
