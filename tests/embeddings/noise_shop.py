"""A shop of noise images and short texts, and its item embeddings."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from sda_core.embeddings.blocks import EmbeddedItems
from sda_core.embeddings.encoding import embed_items
from sda_core.items import ItemSource
from sda_core.params import ExportParams
from tests.sections import SHIPPED, changed, tiny_section
from tests.tolerances import up_to_rounding

MissingImage = Literal["placeholder", "text_only"]
CPU = torch.device("cpu")
TINY = tiny_section(hidden_size=32, num_layers=1, num_heads=2, vision_hidden_size=16, max_pixels=6272, max_text_tokens=160)


class NoiseImages:
    """An image store: every item but each fifth has one, of its own size and noise."""

    def get(self, item_id: int) -> bytes | None:
        if item_id % 5 == 0:
            return None
        random = np.random.default_rng(item_id)
        height, width = random.integers(1, 120, 2)
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def status(self, item_id: int) -> str:
        return "missing_url" if item_id % 5 == 0 else "ok"


class NoImages(NoiseImages):
    def status(self, item_id: int) -> str:
        return "missing_url"


def export_params(**changes: Any) -> ExportParams:
    small = {"num_workers": 2, "batch_size": 4, "shard_rows": 8, "merge": True, "fusion": "late_concat_pca", "fused_dim": 8}
    return changed(SHIPPED.export_embeddings, **(small | changes))


def shop(num_items: int, missing_image: MissingImage = "placeholder", order: np.ndarray | None = None) -> ItemSource:
    texts = [f"Item {place} " + "very " * (place * 7 % 13) + "good" for place in range(1, num_items + 1)]
    texts[2] = ""
    texts = texts if order is None else [texts[place] for place in order]
    return ItemSource(np.arange(1, num_items + 1), texts, "The picture shows a product.", "hash", NoiseImages(), missing_image)


def nothing(_modality: str):
    return nullcontext()


def encoded(source: ItemSource, backbone, resume: Path, fingerprint: str = "f", context=nothing, **changes) -> EmbeddedItems:
    result = embed_items(backbone, backbone.model, source, export_params(**changes), resume, fingerprint, CPU, context)
    assert result is not None
    return result


def assert_close(a: EmbeddedItems, b: EmbeddedItems) -> None:
    np.testing.assert_allclose(a.image_ID, b.image_ID, **up_to_rounding(b.image_ID))
    np.testing.assert_allclose(a.text_ID, b.text_ID, **up_to_rounding(b.text_ID))
    assert np.array_equal(a.item_ids, b.item_ids)


def assert_equal(a: EmbeddedItems, b: EmbeddedItems) -> None:
    assert a.image_ID.tobytes() == b.image_ID.tobytes()
    assert a.text_ID.tobytes() == b.text_ID.tobytes()
    assert np.array_equal(a.has_image, b.has_image)


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def random_halves(num_items: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(num_items, 3)) @ random.normal(size=(3, 2 * dim))
    both = (shared + 0.3 * random.normal(size=(num_items, 2 * dim)) + 2).astype(np.float32)
    return both[:, :dim].copy(), both[:, dim:].copy()
