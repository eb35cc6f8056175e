"""One picture: what is accepted, what it becomes, and that hostile ones do no harm."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sda_core.data.pictures import FORMATS, prepare

MAX_PIXELS = 1_000_000


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and has next to nothing behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form: str) -> None:
    made = prepare(encoded(noise(40, 30), form), MAX_PIXELS, 64)
    image = opened(made.image)
    assert (made.status, made.width, made.height) == ("ok", 40, 30)
    assert (image.mode, image.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_lossless_stays_lossless(form: str) -> None:
    image = opened(prepare(encoded(noise(40, 30), form), MAX_PIXELS, 64).image)
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), np.asarray(noise(40, 30)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 200), (64, 32)), ((200, 400), (32, 64)), ((64, 64), (64, 64)), ((1, 5000), (1, 64)), ((1, 1), (1, 1))],
)
def test_reduced(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for form in ("PNG", "JPEG"):
        made = prepare(encoded(noise(*size), form), MAX_PIXELS, 64)
        assert (made.width, made.height) == expected
        assert opened(made.image).size == expected
        assert opened(made.image).format == ("PNG" if form == "PNG" and size == expected else "JPEG")


def test_reduction_keeps_the_picture() -> None:
    image = Image.new("RGB", (800, 800), (200, 30, 30))
    image.paste((20, 40, 220), (400, 0, 800, 800))
    small = opened(prepare(encoded(image, "JPEG", quality=95), MAX_PIXELS, 64).image)
    for place, colour in (((10, 30), (200, 30, 30)), ((50, 30), (20, 40, 220))):
        assert np.abs(np.array(small.getpixel(place)) - np.array(colour)).max() <= 6


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    palette = clear.convert("RGB").quantize(4)
    for data in (encoded(clear, "PNG"), encoded(palette, "PNG", transparency=palette.getpixel((4, 4)))):
        image = opened(prepare(data, MAX_PIXELS, 64).image)
        assert image.getpixel((4, 4)) == (255, 255, 255)
    assert opened(prepare(encoded(clear, "PNG"), MAX_PIXELS, 64).image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = Image.new("L", (8, 8), 200)
    if mode == "I;16":
        data = encoded(Image.fromarray(np.full((8, 8), 200 << 8, dtype=np.uint16)), "PNG")
    else:
        data = encoded(source.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    image = opened(prepare(data, MAX_PIXELS, 64).image)
    assert image.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(image).astype(int) - 200).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """Oracle: Pillow's own transposition."""
    from PIL import ImageOps

    source = Image.new("RGB", (60, 30), "black")
    source.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(source, "JPEG", exif=exif.tobytes(), quality=95)
    wanted = ImageOps.exif_transpose(opened(data)).convert("RGB")
    made = opened(prepare(data, MAX_PIXELS, 64).image)
    assert made.size == wanted.size
    assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted).astype(int)).mean() < 4


def test_damaged_exif_does_not_spoil_a_picture() -> None:
    data = encoded(noise(20, 20), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1")
    assert prepare(data, MAX_PIXELS, 64).status == "ok"


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(prepare(data, MAX_PIXELS, 64).image).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "corrupt"),
        (b"this is text, not a picture", "corrupt"),
        (b"<!DOCTYPE html><html>", "corrupt"),
        (encoded(noise(100, 100), "JPEG")[:-500], "corrupt"),
        (encoded(noise(100, 100), "PNG")[:-500], "corrupt"),
        (encoded(noise(100, 100), "WEBP")[:-500], "corrupt"),
        (encoded(noise(8, 8), "TIFF"), "corrupt"),  # not one of the formats
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt"),
        (png_header(50_000, 50_000), "too_large"),
        (png_header(11_000, 11_000), "too_large"),  # where Pillow would only warn
        (png_header(1_001, 1_000), "too_large"),
        (png_header(900, 900), "corrupt"),
        (png_header(2**31 - 1, 2**31 - 1), "too_large"),
        (png_header(0, 10), "corrupt"),
    ],
)
def test_hostile(data: bytes, status: str) -> None:
    made = prepare(data, MAX_PIXELS, 64)
    assert (made.status, made.image, made.width, made.height) == (status, None, None, None)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_bytes_never_raise(form: str) -> None:
    draw = random.Random(form)
    whole = encoded(noise(40, 30), form)
    statuses = set()
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(min(len(data), draw.choice((60, len(data)))))] = draw.randrange(256)
        made = prepare(bytes(data), MAX_PIXELS, 32)
        statuses.add(made.status)
        assert (made.status == "ok") == (made.image is not None)
    assert statuses <= {"ok", "corrupt", "too_large"}
    assert "corrupt" in statuses


def test_same_bytes_twice() -> None:
    for form in FORMATS:
        data = encoded(noise(100, 80), form)
        assert prepare(data, MAX_PIXELS, 64) == prepare(data, MAX_PIXELS, 64)
