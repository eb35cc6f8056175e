"""Make the ``ItemSource`` of a run from its items table, image store and prompt params."""

from __future__ import annotations

import numpy as np

from sda_core.artifacts import ITEMS, Workspace
from sda_core.data.prompts import image_prompt, prompt_hash, prompt_of, text_pairs
from sda_core.image_store import ImageStore
from sda_core.items import ItemSource
from sda_core.params import ItemsParams


def item_source(workspace: Workspace, params: ItemsParams) -> ItemSource:
    """Prompts and images of every kept item."""
    items = ITEMS.read(workspace.items)
    described = [text_pairs(row, params) for row in items.iter_rows(named=True)]
    return ItemSource(
        item_ids=items["item_id"].to_numpy(),
        texts=[prompt_of(pairs, params) for pairs in described],
        image_prompt=image_prompt(params),
        prompt_hash=prompt_hash(params),
        store=ImageStore(workspace.images),
        missing_image=params.missing_image,
        has_text=np.array([bool(pairs) for pairs in described], dtype=bool),
        missing_text=params.missing_text,
    )
