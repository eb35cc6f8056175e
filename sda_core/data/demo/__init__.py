"""The built-in shop: a simulated shop, written as raw files in the format of a real edition.

:func:`write_shop` writes reviews, metadata and product images, which the ordinary stages read like real files.
:func:`world` returns the ground truth (attributes, histories), for tests and diagnostics.  :func:`truth_of` returns the
attributes as a table, for the control variants ``oracle``.  Neither is in the raw files.

* :mod:`~sda_core.data.demo.latent`: items, tastes, histories; the effect of each setting.
* :mod:`~sda_core.data.demo.images`: draws category, colour, pattern and shape.
* :mod:`~sda_core.data.demo.words`: writes texts with category, colour, brand and style.
* :mod:`~sda_core.data.demo.writing`: the files of the three editions, with their defects in small doses.

It is a simulation: a gain here shows that the code of a method works, not how much the method gains on real shops.
"""

from sda_core.data.demo.latent import ATTRIBUTES, World, world
from sda_core.data.demo.truth import truth_of
from sda_core.data.demo.writing import file_names, write_shop

__all__ = ["ATTRIBUTES", "World", "file_names", "truth_of", "world", "write_shop"]
