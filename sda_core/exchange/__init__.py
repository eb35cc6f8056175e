"""Import and export in the formats of other libraries.

* :mod:`~sda_core.exchange.vectors` reads item vectors from a file, joined by the shop's ids.
* :mod:`~sda_core.exchange.export` writes a shop (interactions with our split, items, one variant's vectors) for MMRec,
  RecBole or Hugging Face ``datasets``; each format has its own module, which documents the requirements of its reader.

No format uses pickle.  Nothing here needs torch or the target libraries.  Importing the package imports none of its modules,
so that the command line can list the names of the formats quickly.
"""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The export formats."""

    MMREC = "mmrec"
    RECBOLE = "recbole"
    DATASETS = "datasets"
