"""Convert the bytes of an untrusted image to a small RGB file.

* The formats in ``image_formats.FORMATS`` are tried, without decoders that run other programs.
* A file of another image format (HEIC, SVG), or of another kind (an HTML page), is ``unsupported``, with the name of the
  format; a damaged one is ``corrupt``.
* The number of pixels is read from the header and checked before anything is decoded.
* An image is valid only if it can be decoded completely; the first frame of an animation is used.
* Colour profiles are ignored (sRGB is assumed); transparency is blended with white; EXIF orientation is applied.  Only
  pixels are stored: no comments, profiles or locations.
* For 16-bit channels the upper eight bits are used.  32-bit integers and floating-point values have no defined white: it is
  the smallest of 1 (floating-point only), 255, 65,535 and the largest integer that no pixel exceeds.
* Losslessly compressed images that are not reduced are stored as PNG, all others as JPEG of quality 90 with full colour
  resolution.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, ImageOps, TiffImagePlugin, features

from sda_core.fetch.image_formats import FORMATS, recognized

_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"})
_JPEG_QUALITY = 90
_LARGE_PIXELS = 1 << 22  # larger images are decoded one at a time, for any number of threads
_ORIENTATION_TAG = 0x0112
_MAX_EXIF_CHARS = 65_542  # capacity of one segment of a JPEG file
_EXIF_SEGMENT = re.compile(rb"(\xff\xe1..)Exif\0\0", re.DOTALL)
_JPEG_MARK = b"\xff\xd8\xff"
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # marker, length and number of components of a scan
_MAX_SCANS = 200  # of a progressive JPEG; encoders write about ten
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError,
    AttributeError, struct.error, zlib.error, ImageCms.PyCMSError,
)  # fmt: skip
"""Exceptions of Pillow's decoders on damaged input."""

_ROWS_AT_ONCE = 1 << 20  # grey pixels scaled at once
_TIFF_BITS, _TIFF_WHITE_IS_ZERO, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
_GREY_KEY_SCALE = {"L;2": 85, "L;4": 17}  # a PNG file gives its transparent grey before levels are scaled to 0..255

_filters = threading.Lock()
_large = threading.Lock()


@contextmanager
def _quiet() -> Generator[None]:
    """Suppress Pillow's warnings about unusual headers; warning filters are global to the process, hence the lock."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class PreparedImage:
    """The result of preparing an image; the fields are None unless ``status`` is ``ok``."""

    status: str
    image: bytes | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None  # for unsupported: the name of the format


def prepare(data: bytes, max_pixels: int, stored_pixels: int) -> PreparedImage:
    """Decode, check, reduce and re-encode an image.

    Args:
        data: an encoded image, or any other bytes.
        max_pixels: maximum of width x height according to the header (in addition to Pillow's bound of about 179 million).
        stored_pixels: larger images are reduced to at most this width x height, with unchanged aspect ratio.

    Returns:
        ``ok`` with the encoded RGB image, ``corrupt``, ``too_large``, or ``unsupported`` with the format's name.
    """
    if data.startswith(_JPEG_MARK):
        if len(_SCAN.findall(data)) > _MAX_SCANS:  # a scan of a dozen bytes may cost a pass over all pixels
            return PreparedImage("corrupt")
        data = _with_one_exif_segment(data)
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image, _large if image.width * image.height > _LARGE_PIXELS else nullcontext():
            if image.width * image.height > max_pixels or _tile_pixels(image) > max_pixels:
                return PreparedImage("too_large")
            size = stored_size(image.width, image.height, stored_pixels)
            lossless = image.format not in _LOSSY and size == image.size
            image.draft(None, (2 * size[0], 2 * size[1]))  # JPEG only: decode at a half, quarter or eighth if that suffices
            key_is_wide = _prepare_key(image)
            with _quiet():
                image.load()
            rgb = _without_key(image, data) if key_is_wide else _rgb(image)
            if rgb.size != size:
                rgb = rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            orientation = _orientation(image)
    except (Image.DecompressionBombError, MemoryError):
        return PreparedImage("too_large")
    except Image.UnidentifiedImageError:
        name = recognized(data) or _tiff_variant(data)
        return PreparedImage("corrupt") if name is None else PreparedImage("unsupported", reason=name)
    except _UnsupportedError as error:
        return PreparedImage("unsupported", reason=str(error))
    except NotImplementedError:  # raised by Pillow for texture formats that it does not decode
        return PreparedImage("unsupported", reason="DDS variant" if data.startswith(b"DDS ") else "texture variant")
    except _DAMAGE:
        return PreparedImage("corrupt")
    rgb.info = {}  # else Pillow writes the comment and the profile of the source
    rgb.getexif()[_ORIENTATION_TAG] = orientation
    rgb = ImageOps.exif_transpose(rgb)
    stream = io.BytesIO()
    if lossless:
        rgb.save(stream, "PNG")
    else:
        rgb.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return PreparedImage("ok", stream.getvalue(), rgb.width, rgb.height)


def stored_size(width: int, height: int, stored_pixels: int) -> tuple[int, int]:
    """Width and height at which an image is stored: unchanged, or reduced to an area of at most ``stored_pixels``.

    Both sides are multiplied by ``sqrt(stored_pixels / (width * height))`` and rounded down, but to at least 1.
    """
    if width * height <= stored_pixels:
        return width, height
    shorter, longer = sorted((width, height))
    shorter_stored = max(1, math.isqrt(stored_pixels * shorter // longer))
    longer_stored = min(math.isqrt(stored_pixels * longer // shorter), stored_pixels)
    return (shorter_stored, longer_stored) if width <= height else (longer_stored, shorter_stored)


def _with_one_exif_segment(data: bytes) -> bytes:
    """The JPEG file with all EXIF segments except the first renamed.

    Pillow joins the segments, and versions before 13 allocate as many bytes as the tags of the joined block state in total:
    a few MB could request terabytes.
    """
    first = _EXIF_SEGMENT.search(data)
    if first is None or _EXIF_SEGMENT.search(data, first.end()) is None:
        return data
    return data[: first.end()] + _EXIF_SEGMENT.sub(rb"\1Else\0\0", data[first.end() :])


class _UnsupportedError(Exception):
    """The image is complete but cannot be decoded here; the text names its format."""


def _tiff_variant(data: bytes) -> str | None:
    """The name of a TIFF variant for which Pillow has no mode, such as five channels."""
    if "TIFF" not in FORMATS or not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return None
    with _filters, warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            TiffImagePlugin.TiffImageFile(io.BytesIO(data)).close()
        except SyntaxError as error:
            is_unknown = "unknown" in str(error)
        except _DAMAGE:
            return None
        else:
            return None
    # Pillow omits the tags that a truncated file lacks, and the others may describe pixels that it does not support.
    is_damaged = any(re.search("corrupt|truncated", str(remark.message), re.IGNORECASE) for remark in remarks)
    return "TIFF variant" if is_unknown and not is_damaged else None


def _tile_pixels(image: Image.Image) -> int:
    """Number of pixels of a tile of a TIFF file, which is decoded as a whole even if the image is smaller."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    sides = [image.tag_v2.get(tag, 0) for tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT)]
    return math.prod(side if isinstance(side, int) else 0 for side in sides)


def _prepare_key(image: Image.Image) -> bool:
    """Convert the transparent colour of a PNG file to the levels of Pillow's decoded image.

    Returns:
        Whether the colour has 16 bits per channel, of which Pillow would decode (and compare) only the upper eight.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return False
    raw_mode = image.tile[0][3]
    if isinstance(key, int) and raw_mode in _GREY_KEY_SCALE:
        image.info["transparency"] = key * _GREY_KEY_SCALE[raw_mode] & 255
    elif isinstance(key, int) and raw_mode == "L":
        image.info["transparency"] = key & 255  # two bytes are given, of which the lower one is used
    elif isinstance(key, tuple) and raw_mode == "RGB":
        levels: tuple[int, ...] = image.info["transparency"]
        image.info["transparency"] = tuple(level & 255 for level in levels)
    return isinstance(key, tuple) and raw_mode == "RGB;16B"


def _without_key(image: Image.Image, data: bytes) -> Image.Image:
    """A decoded PNG image with 16 bits per channel, white where all 48 bits equal its transparent colour."""
    key: tuple[int, ...] = image.info["transparency"]
    lower = Image.open(io.BytesIO(data), formats=("PNG",))
    with lower:
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # the other byte order: the lower byte of each pair
        lower.load()
        mask = Image.new("L", image.size, 255)
        for part, levels in ((image, [level >> 8 for level in key]), (lower, [level & 255 for level in key])):
            for channel, level in zip(part.split(), levels, strict=True):
                same = channel.point([255 if value == level else 0 for value in range(256)])
                mask = ImageChops.multiply(mask, same)
    rgb = image.copy()
    rgb.paste("white", mask=mask)
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to eight bits per channel without transparency; returns the image itself if it already is."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    return image.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    if not features.check("littlecms2"):
        raise _UnsupportedError(f"{image.format} in CIELAB")
    cms: Any = ImageCms  # it has no type annotations for profiles
    rgb: Image.Image = cms.profileToProfile(image, cms.createProfile("LAB"), cms.createProfile("sRGB"), outputMode="RGB")
    return rgb


def _grey(image: Image.Image) -> Image.Image:
    """Convert an image with one channel of 12, 16 or 32 bits, or of floating-point values, to mode ``L``."""
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    values = np.asarray(image)
    if values.dtype == np.int32 and tags and tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 1:  # unsigned
        values = values.view(np.uint32)
    white, key = _white(image, values, tags), image.info.get("transparency")
    levels = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _ROWS_AT_ONCE // max(1, image.width))
    for start in range(0, image.height, rows):
        part = values[start : start + rows]
        if part.dtype.kind == "f":
            part = np.nan_to_num(part.astype(np.float64), nan=0.0, posinf=white, neginf=0.0)
        if white == 65_535:
            eight = part.clip(0, white).astype(np.uint16) >> 8
        else:
            eight = (part.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)
        levels[start : start + rows] = eight
        if isinstance(key, int):
            levels[start : start + rows][part == key] = 255
    if tags.get(_TIFF_WHITE_IS_ZERO) == 0:
        levels = 255 - levels
    return Image.fromarray(levels)


def _white(image: Image.Image, values: np.ndarray, tags: Mapping[int, Any]) -> int | float:
    """The value of white."""
    if image.mode.startswith("I;16"):
        return 4_095 if tags.get(_TIFF_BITS) == (12,) else 65_535
    if image.format == "PPM" and image.mode == "I":  # Pillow scales its levels to 0..65,535
        return 65_535
    finite = values if values.dtype.kind != "f" else values[np.isfinite(values)]
    largest = finite.max(initial=0)
    return next((white for white in (*((1,) if image.mode == "F" else ()), 255, 65_535) if largest <= white), max(largest, 1))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, or 1 (upright); damaged EXIF data does not make the image invalid."""
    if len(image.info.get("exif", b"")) + len(image.info.get("Raw profile type exif", "")) > _MAX_EXIF_CHARS:
        return 1
    try:
        with _quiet():
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return 1
    return orientation if isinstance(orientation, int) else 1
