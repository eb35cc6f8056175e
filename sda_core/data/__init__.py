"""From raw review files to tables: download, readers, filter, split, pictures, prompts, and the built-in shop.

Nothing here imports torch.  Only what scripts of others use is exported, so that importing one module of the package
does not bring (and make a stage depend on) all the others: ``from sda_core.data.amazon import read_reviews``.
"""

from sda_core.data.kcore import k_core

__all__ = ["k_core"]
