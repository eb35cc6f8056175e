"""``ItemSource``: the prompts and images of items, in batches for a backbone.

Rows are positions 0..I-1 in ``item_ids``; results of a batch are joined by its ``item_ids``.  Images are decoded when a batch
needs them, so memory does not grow with the shop.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import numpy as np
from PIL import Image

from sda_core.errors import ArtifactError
from sda_core.seed import generator

_PLACEHOLDER_SIDE = 56  # pixels: two by two merged patches


class EncodedImages(Protocol):
    """Interface of a store of encoded images, such as :class:`sda_core.image_store.ImageStore`."""

    def get(self, item_id: int) -> bytes | None:
        """The encoded image, or None if the item has none."""
        ...

    def status(self, item_id: int) -> str:
        """The status; ``"ok"`` if and only if :meth:`get` returns an image."""
        ...


@dataclass(frozen=True)
class ItemBatch:
    """Some items, row by row.

    Attributes:
        item_ids: ``(B,)`` int32.
        texts: B text prompts.
        images: B RGB images; None for a missing image without a placeholder.
    """

    item_ids: np.ndarray
    texts: list[str]
    images: list[Image.Image | None]


class ItemSource:
    """All items of a dataset as prompts and images.

    Args:
        item_ids: ``(I,)`` distinct ids, ascending.
        texts: I text prompts, in the order of ``item_ids``.
        image_prompt: the text beside every image.
        prompt_hash: hash of the prompts' template and wording, for the embeddings' metadata.
        store: the images.
        missing_image: ``placeholder`` uses a fixed grey noise image for an item without one; ``text_only`` uses none.
        has_text: ``(I,)`` bool, whether an item has a text of its own; None if all have.
        missing_text: ``placeholder`` uses the unchanged prompt of an item without a text; ``image_only`` uses none.

    Attributes:
        item_ids: ``(I,)`` int32.
        store: the encoded images.
        has_image: ``(I,)`` bool, whether an item has a real image.
        shows_image: ``(I,)`` bool, whether a batch contains an image of the item, real or placeholder.
        has_text: ``(I,)`` bool, whether an item has a text of its own.
        shows_text: ``(I,)`` bool, whether the item gets a text embedding, of its own text or of a placeholder.

    Raises:
        ArtifactError: ids are not ascending and positive, or the number of texts or flags differs.
    """

    def __init__(
        self,
        item_ids: np.ndarray,
        texts: Sequence[str],
        image_prompt: str,
        prompt_hash: str,
        store: EncodedImages,
        missing_image: Literal["placeholder", "text_only"],
        has_text: np.ndarray | None = None,
        missing_text: Literal["placeholder", "image_only"] = "placeholder",
    ) -> None:
        ids = np.asarray(item_ids, dtype=np.int32)
        if ids.ndim != 1 or (len(ids) and (ids[0] < 1 or (np.diff(ids) <= 0).any())):
            raise ArtifactError(
                "items table", "item ids should be positive and ascending, each once", "run `dvc repro` to make it again"
            )
        if len(texts) != len(ids):
            raise ArtifactError("items table", f"should have one text per item (got {len(texts)} texts for {len(ids)} items)")
        self.has_text = np.ones(len(ids), dtype=bool) if has_text is None else np.asarray(has_text, dtype=bool)
        if len(self.has_text) != len(ids):
            raise ArtifactError("items table", f"should have one flag per item (got {len(self.has_text)} for {len(ids)} items)")
        self.item_ids = ids
        self.image_prompt = image_prompt
        self.prompt_hash = prompt_hash
        self.has_image = np.array([store.status(int(item_id)) == "ok" for item_id in ids], dtype=bool)
        self._texts = list(texts)
        self.store = store
        self._keys = np.full(len(ids), -1, dtype=np.int64)  # cached content_keys; -1: not computed yet
        match missing_image:
            case "placeholder":
                self._placeholder = placeholder_image()
                self.shows_image = np.ones(len(ids), dtype=bool)
            case "text_only":
                self._placeholder = None
                self.shows_image = self.has_image.copy()
            case _:
                assert_never(missing_image)
        match missing_text:
            case "placeholder":
                self.shows_text = np.ones(len(ids), dtype=bool)
            case "image_only":
                self.shows_text = self.has_text.copy()
            case _:
                assert_never(missing_text)

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, rows: np.ndarray) -> list[str]:
        """Text prompts of some rows, without reading images."""
        return [self._texts[row] for row in rows]

    def images(self, rows: np.ndarray) -> list[Image.Image | None]:
        """Images of some rows.

        Raises:
            ArtifactError: a stored image cannot be decoded.
        """
        return [self._image(int(row)) for row in rows]

    def batch(self, rows: np.ndarray) -> ItemBatch:
        """Prompts and images of some rows, in their order; raises as :meth:`images`."""
        return ItemBatch(self.item_ids[rows], self.texts(rows), self.images(rows))

    def content_keys(self, rows: np.ndarray) -> np.ndarray:
        """Hashes of the items' contents: ``(B,)`` int64, equal if text prompt and image are equal byte for byte.

        The first 63 bits of a SHA-256; the probability of any collision among a million items is below 1e-7.
        """
        for row in rows[self._keys[rows] < 0]:
            image = (self.store.get(int(self.item_ids[row])) or b"") if self.has_image[row] else b""
            digest = hashlib.sha256(f"{len(image)}\x1f".encode() + image + self._texts[row].encode()).digest()
            self._keys[row] = int.from_bytes(digest[:8], "little") >> 1
        return self._keys[rows]

    def _image(self, row: int) -> Image.Image | None:
        if not self.has_image[row]:
            return self._placeholder
        item_id = int(self.item_ids[row])
        encoded = self.store.get(item_id)
        if encoded is None:
            raise ArtifactError(
                f"image of item {item_id}", "is marked ok, but is not there", "run `dvc repro` to fetch the images again"
            )
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ArtifactError(
                f"image of item {item_id}", f"cannot be decoded ({error})", "run `dvc repro` to fetch the images again"
            ) from None


def placeholder_image() -> Image.Image:
    """The placeholder of a missing image: grey noise with fixed bytes."""
    grey = generator(0, "placeholder image").integers(96, 160, size=(_PLACEHOLDER_SIDE, _PLACEHOLDER_SIDE), dtype=np.uint8)
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))
