"""One picture: from bytes that a stranger made to a small RGB file of our own.

* Only the common web formats are tried (JPEG, PNG, WebP, GIF, BMP); no decoder that runs other programs.
* The number of pixels is taken from the header and compared before anything is decoded.
* A picture counts as good only when all of it could be decoded; the first frame of an animation is taken.
* Colour profiles are ignored (sRGB is assumed); transparency is laid on white; EXIF orientation is applied.  Nothing but
  the pixels is stored: no comments, profiles or positions.
* Losslessly coded pictures that need no reduction are stored as PNG, everything else as JPEG of quality 90 with full
  colour resolution.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_LOSSLESS = frozenset({"PNG", "GIF", "BMP"})
_JPEG_QUALITY = 90
_LARGE_PIXELS = 1 << 22  # beyond it one at a time is decoded, whatever the number of threads
_ORIENTATION_TAG = 0x0112
_MAX_EXIF_CHARS = 65_542  # as many as one segment of a JPEG file holds
_EXIF_SEGMENT = re.compile(rb"(\xff\xe1..)Exif\0\0", re.DOTALL)
_JPEG_MARK = b"\xff\xd8\xff"
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # its marker, length and number of components
_MAX_SCANS = 200  # of a progressive JPEG; encoders write about ten
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
_large = threading.Lock()


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


def prepare(data: bytes, max_pixels: int, stored_pixels: int) -> Picture:
    """Decode, check, reduce and encode again.

    Args:
        data: an encoded picture, or anything else.
        max_pixels: bound on width x height as the header states them (Pillow's own bound of about 179 million holds besides).
        stored_pixels: larger pictures are reduced to at most so many, width x height, in their own proportions.

    Returns:
        ``ok`` with the encoded RGB picture, ``corrupt`` or ``too_large``.
    """
    if data.startswith(_JPEG_MARK):
        if len(_SCAN.findall(data)) > _MAX_SCANS:  # each may cost a pass over all pixels for a dozen bytes
            return Picture("corrupt")
        data = _with_one_exif_segment(data)
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image, _large if image.width * image.height > _LARGE_PIXELS else nullcontext():
            if image.width * image.height > max_pixels:
                return Picture("too_large")
            size = stored_size(image.width, image.height, stored_pixels)
            lossless = image.format in _LOSSLESS and size == image.size
            image.draft(None, (2 * size[0], 2 * size[1]))  # JPEG only: decode at a half, quarter or eighth where that suffices
            image.load()
            rgb = _rgb(image)
            if rgb.size != size:
                rgb = rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            rgb = _upright(image, rgb)
    except (Image.DecompressionBombError, MemoryError):
        return Picture("too_large")
    except _DAMAGE:
        return Picture("corrupt")
    rgb.info = {}  # Pillow would write the comment and the profile of the source
    stream = io.BytesIO()
    if lossless:
        rgb.save(stream, "PNG")
    else:
        rgb.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return Picture("ok", stream.getvalue(), rgb.width, rgb.height)


def stored_size(width: int, height: int, stored_pixels: int) -> tuple[int, int]:
    """Width and height at which a picture is stored: its own, or reduced to an area of at most ``stored_pixels``.

    Both sides are multiplied by ``sqrt(stored_pixels / (width * height))`` and rounded down, but to no less than 1.
    """
    if width * height <= stored_pixels:
        return width, height
    shorter, longer = sorted((width, height))
    shorter_stored = max(1, math.isqrt(stored_pixels * shorter // longer))
    longer_stored = min(math.isqrt(stored_pixels * longer // shorter), stored_pixels)
    return (shorter_stored, longer_stored) if width <= height else (longer_stored, shorter_stored)


def _with_one_exif_segment(data: bytes) -> bytes:
    """The JPEG file with all but its first EXIF segment renamed.

    Pillow joins them, and before version 13 its reading of the joined block takes as many bytes as its tags state
    together: a few MB could ask for terabytes.
    """
    first = _EXIF_SEGMENT.search(data)
    if first is None or _EXIF_SEGMENT.search(data, first.end()) is None:
        return data
    return data[: first.end()] + _EXIF_SEGMENT.sub(rb"\1Else\0\0", data[first.end() :])


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, without transparency; the picture itself where it is so already."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    return image.convert("RGB")


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Apply the source's EXIF orientation; damaged EXIF says nothing about the picture itself."""
    if len(image.info.get("exif", b"")) + len(image.info.get("Raw profile type exif", "")) > _MAX_EXIF_CHARS:
        return rgb
    try:
        with _quiet():
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return rgb
    transposition = _TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    return rgb if transposition is None else rgb.transpose(transposition)
