"""The true attributes of the built-in shop's items, used by controls only, not by any model or other stage."""

from __future__ import annotations

import polars as pl

from sda_core.artifacts import TRUTH
from sda_core.data.demo.latent import ATTRIBUTES, BLOCKS, world
from sda_core.params import AmazonDataset, DemoDataset

SHOWN_BY = {"both": "both", "image": "image", "words": "text"}


def truth_of(dataset: DemoDataset | AmazonDataset) -> pl.DataFrame:
    """The table ``TRUTH`` of a dataset: the attributes of the built-in shop's items, empty for any other dataset.

    Raises:
        ConfigError: see :func:`~sda_core.data.demo.latent.world`.
    """
    if not isinstance(dataset, DemoDataset):
        return pl.DataFrame(schema=dict(TRUTH.columns))
    shop = world(dataset)
    block_of = {name: block for block, names in BLOCKS.items() for name in names}
    rows = [
        (asin, name, shop.value(name, item), SHOWN_BY[block_of[name]], bool(shop.is_named[name][item]))
        for item, asin in enumerate(shop.asins)
        for name in ATTRIBUTES
    ]
    return pl.DataFrame(rows, schema=dict(TRUTH.columns), orient="row")
