"""One picture: from bytes that a stranger made to a small RGB file of our own.

* Only the common web formats are tried (JPEG, PNG, WebP, GIF, BMP); no decoder that runs other programs.
* The number of pixels is taken from the header and compared before anything is decoded.
* A picture counts as good only when all of it could be decoded; the first frame of an animation is taken.
* Colour profiles are ignored (sRGB is assumed); transparency is laid on white; EXIF orientation is applied.
* Losslessly coded pictures that need no reduction are stored as PNG, everything else as JPEG of quality 90 with full
  colour resolution.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_LOSSLESS = frozenset({"PNG", "GIF", "BMP"})
_JPEG_QUALITY = 90
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged input."""

_filters = threading.Lock()


@contextmanager
def _quiet() -> Generator[None]:
    """Keep Pillow's remarks on strange headers off the terminal; warning filters are the process's, hence the lock."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Picture:
    """What became of one picture; the rest is None unless ``status`` is ``ok``."""

    status: str
    image: bytes | None = None
    width: int | None = None
    height: int | None = None


def prepare(data: bytes, max_pixels: int, max_side: int) -> Picture:
    """Decode, check, reduce and encode again.

    Args:
        data: an encoded picture, or anything else.
        max_pixels: bound on width x height as the header states them (Pillow's own bound of about 179 million holds besides).
        max_side: longer sides are reduced to it, in pixels.

    Returns:
        ``ok`` with the encoded RGB picture, ``corrupt`` or ``too_large``.
    """
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.width * image.height > max_pixels:
                return Picture("too_large")
            lossless = image.format in _LOSSLESS
            image.draft(None, (2 * max_side, 2 * max_side))  # JPEG only: decode at a half, quarter or eighth where that suffices
            image.load()
            rgb = _reduced(_upright(image, _rgb(image)), max_side)
            reduced = max(image.size) > max_side
    except (Image.DecompressionBombError, MemoryError):
        return Picture("too_large")
    except _DAMAGE:
        return Picture("corrupt")
    stream = io.BytesIO()
    if lossless and not reduced:
        rgb.save(stream, "PNG")
    else:
        rgb.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return Picture("ok", stream.getvalue(), rgb.width, rgb.height)


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, without transparency."""
    if image.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Apply the source's EXIF orientation; damaged EXIF says nothing about the picture itself."""
    try:
        with _quiet():
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return rgb
    transposition = _TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    return rgb if transposition is None else rgb.transpose(transposition)


def _reduced(rgb: Image.Image, max_side: int) -> Image.Image:
    """At most ``max_side`` pixels a side, at least one."""
    longest = max(rgb.size)
    if longest <= max_side:
        return rgb
    width, height = (max(1, round(side * max_side / longest)) for side in rgb.size)
    return rgb.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
