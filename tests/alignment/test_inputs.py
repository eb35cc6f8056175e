"""Batches: every item once per epoch, in full batches."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from sda_core.alignment import batch_rows
from sda_core.items import ItemSource
from tests.alignment.toy import (
    TRAINING,
    Images,
    items,
    run,
)


def test_an_epoch_shows_every_item_once_and_batches_are_full() -> None:
    rows = np.array([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])
    batches = [batch_rows(rows, step, TRAINING) for step in range(4)]
    assert all(len(batch) == 6 for batch in batches)
    for epoch in (batches[:2], batches[2:]):
        shown = np.concatenate(epoch)
        assert len(set(shown)) == 12
        assert set(shown) <= set(rows)
    assert not np.array_equal(np.concatenate(batches[:2]), np.concatenate(batches[2:]))


@pytest.mark.parametrize(("missing_text", "shown"), [("image_only", False), ("placeholder", True)])
def test_items_without_a_text(tmp_path: Path, missing_text: Literal["placeholder", "image_only"], shown: bool) -> None:
    """Training skips a pair that lacks its text, and its image is not used either."""
    seen: dict[str, set[int]] = {"image": set(), "text": set()}

    class Watching(ItemSource):
        def images(self, rows: np.ndarray) -> list[Image.Image | None]:
            seen["image"].update(self.item_ids[rows].tolist())
            return super().images(rows)

        def texts(self, rows: np.ndarray) -> list[str]:
            seen["text"].update(self.item_ids[rows].tolist())
            return super().texts(rows)

    plain = items(missing_image="placeholder")
    texts, has_text = plain.texts(np.arange(20)), np.arange(20) != 3
    source = Watching(plain.item_ids, texts, "A picture.", "hash", Images(), "placeholder", has_text, missing_text)
    run(tmp_path, source=source)
    assert [4 in of for of in seen.values()] == [shown, shown]
    assert len(seen["image"]) >= 18


@pytest.mark.parametrize(("missing_image", "shown"), [("text_only", False), ("placeholder", True)])
def test_items_without_a_image(tmp_path: Path, missing_image: str, shown: bool) -> None:
    seen: set[int] = set()

    class Watching(ItemSource):
        def images(self, rows: np.ndarray) -> list[Image.Image | None]:
            seen.update(self.item_ids[rows].tolist())
            return super().images(rows)

    plain = items(missing_image=missing_image)
    source = Watching(plain.item_ids, plain.texts(np.arange(20)), "A picture.", "hash", Images(), missing_image)  # type: ignore[arg-type]
    run(tmp_path, source=source)
    assert (7 in seen) == shown
    assert len(seen) >= 18
