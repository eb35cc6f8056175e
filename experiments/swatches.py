"""Simple items for a random backbone: swatches of one colour with a short code as text.

The vectors of a random Qwen2.5-VL contain little of the built-in shop's images, so no loss can align them with those of the
texts.  A swatch is one square of 28 x 28 pixels, so one image token.  Its colour has six levels each of red, green and blue,
which gives 216 different swatches.  The text encodes the three levels by letters of separate alphabets.  In addition, only the
image shows one of four stripes, and only the text has one of four marks; both are random, to measure whether information of a
single modality is forgotten.
"""

from __future__ import annotations

import io
from itertools import product

import numpy as np
from PIL import Image

from sda_core.items import ItemSource
from sda_core.seed import generator

COLOURS = ("red", "green", "blue")
LEVELS = 6
MARKS = 4
SHOWN_BY = {"red": "both", "green": "both", "blue": "both", "stripe": "image", "mark": "text"}
LETTERS = {"red": "ABCDEF", "green": "GHIJKL", "blue": "MNOPQR", "mark": "WXYZ"}

_SIDE = 28  # two by two patches of 14 pixels, merged to one token
_REPEATED = 3  # repetitions of the code in the text, so that it has more weight relative to the chat template


class _Store:
    """Encoded images by item id, from 1."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images

    def get(self, item_id: int) -> bytes:
        """See :class:`sda_core.items.EncodedImages`."""
        return self._images[item_id - 1]

    def status(self, item_id: int) -> str:
        """See :class:`sda_core.items.EncodedImages`."""
        return "ok" if 1 <= item_id <= len(self._images) else "missing_url"


def attributes() -> dict[str, np.ndarray]:
    """The true attributes: ``(216,)`` values from 0 by attribute, in the order of the item ids."""
    colours_IC = np.array(list(product(range(LEVELS), repeat=len(COLOURS))))
    rng = generator(0, "swatches")
    drawn = {name: rng.integers(MARKS, size=len(colours_IC)) for name in ("stripe", "mark")}
    return {name: colours_IC[:, place] for place, name in enumerate(COLOURS)} | drawn


def source() -> ItemSource:
    """The swatches as items."""
    truth = attributes()
    num_items = len(truth["red"])
    codes = ["".join(LETTERS[name][truth[name][item]] for name in LETTERS) for item in range(num_items)]
    colours_IC = np.stack([truth[name] for name in COLOURS], axis=1)
    images = [_image(levels_C, stripe) for levels_C, stripe in zip(colours_IC, truth["stripe"], strict=True)]
    ids = np.arange(1, num_items + 1)
    return ItemSource(ids, [code * _REPEATED for code in codes], "", "swatches", _Store(images), "text_only")


def _image(levels_C: np.ndarray, stripe: int) -> bytes:
    """A swatch as PNG; its stripes are dark columns, one in four, starting at column ``stripe``."""
    pixels_HWC = np.empty((_SIDE, _SIDE, 3), dtype=np.uint8)
    pixels_HWC[:] = levels_C * 255 // (LEVELS - 1)
    pixels_HWC[:, stripe::MARKS] //= 2
    encoded = io.BytesIO()
    Image.fromarray(pixels_HWC).save(encoded, format="PNG")
    return encoded.getvalue()
