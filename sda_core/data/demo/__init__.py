"""The built-in shop: a simulation of a shop, written as raw files in the format of a real edition.

:func:`write_shop` writes reviews, metadata and product images; the ordinary stages read them and nothing downstream
knows that they were made.  :func:`world` gives the truth behind them (attributes, histories), for tests and diagnostics.
:func:`truth_of` gives the attributes as a table, for the control variants ``oracle``.  Neither is in the raw files.

* :mod:`~sda_core.data.demo.latent`: items, tastes, histories; what each knob turns.
* :mod:`~sda_core.data.demo.images`: draws category, colour, pattern and shape.
* :mod:`~sda_core.data.demo.words`: names category, colour, brand and style.
* :mod:`~sda_core.data.demo.writing`: the files of the three editions, with their defects in small doses.

It is a simulation: what a method gains here says that its code works, not how much it gains on real shops.
"""

from sda_core.data.demo.latent import ATTRIBUTES, World, world
from sda_core.data.demo.truth import truth_of
from sda_core.data.demo.writing import file_names, write_shop

__all__ = ["ATTRIBUTES", "World", "file_names", "truth_of", "world", "write_shop"]
