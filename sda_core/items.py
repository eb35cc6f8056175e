"""``ItemSource``: items as a backbone is shown them, prompts and images by batch, whatever run or test they come from.

Rows are positions 0..I-1 in ``item_ids``; whatever is computed from a batch is joined back by its ``item_ids``.  Images
are decoded when a batch asks for them, so memory does not grow with the shop.
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
    """Where images come from: what is asked of :class:`sda_core.image_store.ImageStore`."""

    def get(self, item_id: int) -> bytes | None:
        """The encoded image, or None where the item has none."""
        ...

    def status(self, item_id: int) -> str:
        """``"ok"`` exactly where :meth:`get` gives an image."""
        ...


@dataclass(frozen=True)
class ItemBatch:
    """Some items, row by row.

    Attributes:
        item_ids: ``(B,)`` int32.
        texts: B text prompts.
        images: B RGB images; None where there is none and nothing stands in for it.
    """

    item_ids: np.ndarray
    texts: list[str]
    images: list[Image.Image | None]


class ItemSource:
    """All items of a data set as prompts and images.

    Args:
        item_ids: ``(I,)`` ids, ascending, each once.
        texts: I text prompts, in the order of ``item_ids``.
        image_prompt: the text beside every image.
        prompt_hash: of the prompts' template and wording; goes into the embeddings' metadata.
        store: the images.
        missing_image: ``placeholder`` shows one fixed grey noise image for an item without one; ``text_only`` shows none.

    Attributes:
        item_ids: ``(I,)`` int32.
        store: the images, encoded.
        has_image: ``(I,)`` bool, true only where there is a real image.
        shows_image: ``(I,)`` bool, true where a batch holds an image, real or placeholder.

    Raises:
        ArtifactError: ids are not ascending and positive, or the number of texts differs.
    """

    def __init__(
        self,
        item_ids: np.ndarray,
        texts: Sequence[str],
        image_prompt: str,
        prompt_hash: str,
        store: EncodedImages,
        missing_image: Literal["placeholder", "text_only"],
    ) -> None:
        ids = np.asarray(item_ids, dtype=np.int32)
        if ids.ndim != 1 or (len(ids) and (ids[0] < 1 or (np.diff(ids) <= 0).any())):
            raise ArtifactError(
                "items table", "item ids should be positive and ascending, each once", "run `dvc repro` to make it again"
            )
        if len(texts) != len(ids):
            raise ArtifactError("items table", f"should have one text an item (got {len(texts)} texts for {len(ids)} items)")
        self.item_ids = ids
        self.image_prompt = image_prompt
        self.prompt_hash = prompt_hash
        self.has_image = np.array([store.status(int(item_id)) == "ok" for item_id in ids], dtype=bool)
        self._texts = list(texts)
        self.store = store
        self._keys = np.full(len(ids), -1, dtype=np.int64)  # content_keys, as far as they are known
        match missing_image:
            case "placeholder":
                self._placeholder = placeholder_image()
                self.shows_image = np.ones(len(ids), dtype=bool)
            case "text_only":
                self._placeholder = None
                self.shows_image = self.has_image.copy()
            case _:
                assert_never(missing_image)

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, rows: np.ndarray) -> list[str]:
        """Text prompts of some rows, without touching an image."""
        return [self._texts[row] for row in rows]

    def images(self, rows: np.ndarray) -> list[Image.Image | None]:
        """Images of some rows, without touching a text.

        Raises:
            ArtifactError: a stored image cannot be decoded.
        """
        return [self._image(int(row)) for row in rows]

    def batch(self, rows: np.ndarray) -> ItemBatch:
        """Prompts and images of some rows, in their order; raises as :meth:`images`."""
        return ItemBatch(self.item_ids[rows], self.texts(rows), self.images(rows))

    def content_keys(self, rows: np.ndarray) -> np.ndarray:
        """What an item shows, as a number: ``(B,)`` int64, equal where text prompt and image are equal byte for byte.

        The first 63 bits of a SHA-256; that any two of a million items share one by chance has a probability below 1e-7.
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
    """Fixed grey noise that stands in for a missing image: the same bytes everywhere and always."""
    grey = generator(0, "placeholder image").integers(96, 160, size=(_PLACEHOLDER_SIDE, _PLACEHOLDER_SIDE), dtype=np.uint8)
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))
