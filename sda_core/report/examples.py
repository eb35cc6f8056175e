"""Example items of the page: selection, titles, small images, and neighbours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from PIL import Image

from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.errors import ArtifactError
from sda_core.image_store import ImageStore
from sda_core.params import ReportParams
from sda_core.report.model import Conflict, EncodedImage, Example, Item, Neighbor, NeighborList
from sda_core.report.vectors import Findings

_THUMBNAIL_SIDE = 128  # pixels; shown at 96, so it stays sharp on dense screens

Neighbors = Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]
"""By variant, by example item: (item id, cosine), nearest first."""


def thumbnail(image: bytes) -> EncodedImage:
    """A small JPEG of an encoded image."""
    with Image.open(io.BytesIO(image)) as opened:
        small = opened.convert("RGB")
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=82, optimize=True)
    return EncodedImage("image/jpeg", buffer.getvalue())


def spread_items(counts: Mapping[int, int], num_items: int) -> list[int]:
    """``num_items`` items evenly spaced from the most to the least popular; equally popular ones sorted by id.

    Args:
        counts: number of training interactions by item id.
        num_items: number of items; fewer are returned if there are fewer.
    """
    ordered = sorted(counts, key=lambda item: (-counts[item], item))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(num_items, len(ordered))).round().astype(int)) if ordered else []
    return [ordered[place] for place in places]


def training_counts(workspace: Workspace) -> dict[int, int]:
    """Number of training interactions by item id, without items that have none."""
    counts = INTERACTIONS.query(
        workspace.interactions, lambda rows: rows.filter(pl.col("split") == "train").group_by("item_id").len()
    )
    return {int(item): int(count) for item, count in counts.iter_rows()}


def example_items(workspace: Workspace, params: ReportParams) -> list[int]:
    """The items shown with their neighbours: items with an image, from the most popular to the rarest.

    Raises:
        ArtifactError: a table is missing.
    """
    counts, store = training_counts(workspace), ImageStore(workspace.images)
    with_image = {int(item): counts.get(int(item), 0) for item in store.item_ids if store.status(int(item)) == "ok"}
    return spread_items(with_image, params.num_example_items)


def _shown(workspace: Workspace, ids: set[int]) -> dict[int, Item]:
    """Titles and small images, by id."""
    wanted = pl.col("item_id").is_in(sorted(ids))
    rows = ITEMS.query(workspace.items, lambda items: items.filter(wanted).select("item_id", "title"))
    titles, store = dict(rows.iter_rows()), ImageStore(workspace.images)
    items: dict[int, Item] = {}
    for item_id in sorted(ids):
        if item_id not in titles:
            raise ArtifactError(
                str(workspace.items), f"has no item {item_id}, which an index names", "run `dvc repro` to make the index again"
            )
        image = store.get(item_id)
        items[item_id] = Item(item_id, titles[item_id], None if image is None else thumbnail(image))
    return items


def examples(workspace: Workspace, neighbors: Neighbors) -> tuple[Example, ...]:
    """The example items with their neighbours under each variant.

    Raises:
        ArtifactError: a table is missing, or lacks an item of an index.
    """
    wanted = list(dict.fromkeys(item for found in neighbors.values() for item in found))
    if not wanted:
        return ()
    shown = {*wanted, *(near for found in neighbors.values() for pairs in found.values() for near, _ in pairs)}
    items, counts = _shown(workspace, shown), training_counts(workspace)
    return tuple(
        Example(
            items[item_id],
            f"{counts.get(item_id, 0):,} training interactions",
            tuple(
                NeighborList(variant, tuple(Neighbor(items[near], score) for near, score in found.get(item_id, ())))
                for variant, found in neighbors.items()
            ),
        )
        for item_id in wanted
    )


def conflicts(workspace: Workspace, looked: Findings) -> tuple[Conflict, ...]:
    """The conflicting pairs with titles and small images; raises as :func:`examples`."""
    items = _shown(workspace, {item for pair in looked.pairs for item in (pair.first, pair.second)})
    return tuple(
        Conflict(
            items[pair.first], items[pair.second], pair.alike_in, pair.image_cosine, pair.text_cosine, tuple(cosines.items())
        )
        for pair, cosines in zip(looked.pairs, looked.cosines, strict=True)
    )
