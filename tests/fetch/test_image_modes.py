"""Images of every kind of pixels come out as the right RGB; the oracles are NumPy's arithmetic on what was encoded."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, features

from sda_core.fetch.decoding import PreparedImage, prepare

Levels = np.ndarray


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def made(data: bytes) -> Levels:
    """What is stored of an image, as levels ``(H,W,3)``."""
    made = prepare(data, 1_000_000, 1_000_000)
    assert made.status == "ok"
    assert made.image is not None
    image = Image.open(io.BytesIO(made.image))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(levels: Levels, colour_type: int, depth: int, key: bytes = b"") -> bytes:
    """A PNG file written here: samples ``(H,W,C)``, whole bytes each, colour type and depth as in its specification."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape[:2]
    if depth < 8:
        bits = np.unpackbits(levels.astype(np.uint8).reshape(height, width, 1), axis=2)[:, :, 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    else:
        rows = [row.astype(">u2" if depth == 16 else "u1").tobytes() for row in levels]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    keys = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + keys + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def ramp(channels: int, top: int = 65_535) -> Levels:
    """Levels ``(16,16,C)`` over the whole range, other ones in each channel."""
    return np.random.default_rng(channels).integers(0, top + 1, (16, 16, channels))


def on_white(colour: Levels, alpha: Levels, top: int) -> Levels:
    return (colour / top * alpha / top * 255 + 255 * (1 - alpha / top)).round().astype(int)


# ------------------------------------------------------------------------------------------------ 16 bits
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(channels: int) -> None:
    levels = ramp(channels)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    colours = levels[:, :, : 1 if channels < 3 else 3]
    wanted = colours / 257 if channels in (1, 3) else on_white(colours, levels[:, :, -1:], 65_535)
    assert np.abs(made(png(levels, colour_type, 16)) - wanted).max() <= 2  # colour and alpha are each cut to 8 bits


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_16_bits_with_a_transparent_colour(channels: int) -> None:
    """All 16 bits count: a neighbour of the transparent colour in the lower byte stays as it is."""
    levels = ramp(channels)
    key = levels[3, 4].copy()
    levels[3, 5], levels[0, 0], levels[7] = key ^ 1, key, key
    found = made(png(levels, 0 if channels == 1 else 2, 16, key.astype(">u2").tobytes()))
    clear = (levels == key).all(axis=2)
    assert clear.sum() == 18
    assert (found[clear] == 255).all()
    assert np.abs(found[~clear] - levels[~clear] / 257).max() <= 1


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_png_of_grey_with_a_transparent_level(depth: int, level: int, seed: int) -> None:
    top = 2**depth - 1
    levels = np.random.default_rng(seed).integers(0, top + 1, (5, 9, 1))
    key = level & top
    wanted = np.where(levels == key, 255, levels * 255 // top)
    assert (made(png(levels, 0, depth, struct.pack(">H", key))) == wanted).all()


def test_png_of_8_bits_with_a_transparent_colour() -> None:
    levels = ramp(3, 255)
    levels[7] = levels[3, 4]
    wanted = np.where((levels == levels[3, 4]).all(axis=2, keepdims=True), 255, levels)
    for high_byte in (0, 1):  # the upper byte of each pair says nothing at this depth
        key = struct.pack(">3H", *(int(level) + 256 * high_byte for level in levels[3, 4]))
        assert (made(png(levels, 2, 8, key)) == wanted).all()


# --------------------------------------------------------------------------------------- other kinds of grey
Kind = Literal["u1", "u2", "u4", "i4", "f4"]


def tiff(levels: Levels, kind: Kind, white_is_zero: bool, order: str = "<") -> bytes:
    """A TIFF file of one channel in one strip."""
    data = levels.astype(order + kind).tobytes()
    sample_format = {"u": 1, "i": 2, "f": 3}[kind[0]]
    height, width = levels.shape
    tags = {
        256: width, 257: height, 258: 8 * int(kind[1]), 259: 1, 262: 0 if white_is_zero else 1, 273: 0, 277: 1, 278: height,
        279: len(data), 339: sample_format,
    }  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    short = {258, 259, 262, 277, 339}
    entries = b"".join(
        struct.pack(order + ("HHLHxx" if tag in short else "HHLL"), tag, 3 if tag in short else 4, 1, value)
        for tag, value in tags.items()
    )
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize(
    ("kind", "order", "top", "white"),
    [
        ("u2", "<", 65_535, 65_535),
        ("u2", "<", 200, 65_535),  # two bytes state their range: a dark image stays dark
        ("u2", ">", 65_535, 65_535),
        ("u4", "<", 2**32 - 1, 2**32 - 1),
        ("i4", "<", 255, 255),
        ("i4", ">", 60_000, 65_535),
        ("f4", "<", 1, 1),
        ("f4", ">", 1, 1),
        ("f4", "<", 250, 255),
        ("f4", "<", 65_000, 65_535),
    ],
)
def test_grey_tiff(kind: Kind, order: str, top: int, white: int, white_is_zero: bool) -> None:
    levels = np.random.default_rng(1).random((16, 16)) * top
    levels.flat[:2] = 0, top
    levels = levels if kind == "f4" else levels.round()
    data = tiff(levels, kind, white_is_zero, order)
    if white_is_zero and (kind, order) not in {("u2", "<"), ("f4", "<"), ("f4", ">")}:
        assert prepare(data, 10_000, 10_000) == PreparedImage("unsupported", reason="TIFF variant"), "Pillow has no mode for it"
        return
    wanted = levels * (255 / white)
    assert np.abs(made(data) - (255 - wanted if white_is_zero else wanted)[:, :, None]).max() <= 1


def test_tiff_of_12_bits() -> None:
    levels = np.arange(16 * 16).reshape(16, 16) * 16 + 7
    bits = np.unpackbits(levels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    data = bytearray(tiff(np.frombuffer(np.packbits(bits).tobytes(), np.uint8).reshape(16, 24), "u1", False))
    for tag, value in ((256, 16), (258, 12)):
        place = data.index(struct.pack("<H", tag), 10)
        data[place + 8 : place + 10] = struct.pack("<H", value)
    assert np.abs(made(bytes(data))[:, :, 0] - levels * 255 / 4_095).max() <= 1


def test_numbers_that_are_none_are_black_or_white() -> None:
    levels = np.array([[0.0, 0.5, np.nan], [np.inf, -np.inf, -3.0]])
    assert made(tiff(levels, "f4", False))[:, :, 0].tolist() in ([[0, 128, 0], [255, 0, 0]], [[0, 127, 0], [255, 0, 0]])
    assert (made(tiff(np.full((2, 2), np.nan), "f4", False)) == 0).all()
    assert (made(tiff(np.zeros((2, 2)), "f4", False)) == 0).all()


@pytest.mark.parametrize("top", [300, 4_095, 65_535])
def test_netpbm_of_more_than_8_bits(top: int) -> None:
    levels = ramp(1, top)[:, :, 0]
    data = b"P5 16 16 %d\n" % top + levels.astype(">u2").tobytes()
    assert np.abs(made(data)[:, :, 0] - levels * 255 / top).max() <= 1
    dark = np.minimum(levels, top // 300)
    assert np.abs(made(b"P5 16 16 %d\n" % top + dark.astype(">u2").tobytes())[:, :, 0] - dark * 255 / top).max() <= 1


# -------------------------------------------------------------------------------------------- other modes
def test_alpha_of_every_kind() -> None:
    rng = np.random.default_rng(7)
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    grey = rng.integers(0, 256, (16, 16, 2), dtype=np.uint8)
    wanted, wanted_grey = on_white(rgba[:, :, :3], rgba[:, :, 3:], 255), on_white(grey[:, :, :1], grey[:, :, 1:], 255)
    colour, light = Image.fromarray(rgba), Image.fromarray(grey)
    for form in ("PNG", "TIFF", "TGA", "QOI"):
        assert np.abs(made(encoded(colour, form)) - wanted).max() <= 1, form
    for form in ("PNG", "TIFF", "TGA"):
        assert np.abs(made(encoded(light, form)) - wanted_grey).max() <= 1, form
    exact = encoded(colour, "WEBP", lossless=True, exact=True)
    assert np.abs(made(exact) - wanted).mean() <= 8, "it is stored as JPEG"


def test_palettes_with_transparency() -> None:
    colours = np.random.default_rng(2).integers(0, 256, (8, 3))
    index = np.arange(64).reshape(8, 8) % 8
    image = Image.fromarray(index.astype(np.uint8), "L").convert("P")
    image.putdata(index.reshape(-1).tolist())
    image.putpalette(colours.reshape(-1).tolist())
    alpha = np.arange(8) * 36
    wanted = on_white(colours[index], alpha[index][:, :, None], 255)
    assert np.abs(made(encoded(image, "PNG", transparency=bytes(alpha.tolist()))) - wanted).max() <= 1
    one = np.where((index == 3)[:, :, None], 255, colours[index])
    for form in ("PNG", "GIF"):
        assert (made(encoded(image, form, transparency=3)) == one).all()


def test_cmyk_as_photoshop_and_others_write_it() -> None:
    cmyk = np.zeros((16, 16, 4), dtype=np.uint8)
    cmyk[:8] = (0, 255, 255, 0)  # red
    cmyk[8:] = (255, 255, 0, 0)  # blue
    image = Image.fromarray(cmyk, "CMYK")
    for data in (encoded(image, "JPEG", quality=95), encoded(image, "TIFF")):
        found = made(data)
        assert np.abs(found[2:6] - (255, 0, 0)).max() <= 12
        assert np.abs(found[10:14] - (0, 0, 255)).max() <= 12


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without LittleCMS")
def test_lab() -> None:
    """Oracle: the formulas of CIELAB with white D50 are those of LittleCMS; grey stays grey, and red is red."""
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    cms: Any = ImageCms
    lab = cms.profileToProfile(red, cms.createProfile("sRGB"), cms.createProfile("LAB"), outputMode="LAB")
    assert np.abs(made(encoded(lab, "TIFF")) - (255, 0, 0)).max() <= 6
    grey = Image.merge("LAB", [Image.new("L", (8, 8), level) for level in (136, 128, 128)])  # L* 53.3: 18 % of the light
    found = made(encoded(grey, "TIFF"))
    assert np.ptp(found, axis=2).max() <= 4
    assert np.abs(found - 127).max() <= 4


# ------------------------------------------------------------------------------------ frames and orientation
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_the_first_frame_counts(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    found = made(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert np.abs(found - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("AVIF", {"quality": 95}),
        ("MPO", {"quality": 95}),
    ],
)
def test_orientation_is_applied_once(form: str, options: dict[str, Any], orientation: int) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    source = Image.new("RGB", (64, 32), "black")
    source.paste("white", (0, 0, 24, 12))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif_option = exif if form == "TIFF" else exif.tobytes()
    found = made(encoded(source, form, exif=exif_option, **options))
    tagged = source.copy()
    tagged.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(tagged)).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 6
