"""One image: what is accepted, what it becomes, and that hostile ones do no harm."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sda_core.fetch import decoding
from sda_core.fetch.decoding import FORMATS, prepare, stored_size

MAX_PIXELS = 1_000_000
STORED_PIXELS = 64 * 64
ROOT = Path(__file__).resolve().parents[2]


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


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, chunks: bytes = b"") -> bytes:
    """A PNG that states a size and has next to nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + body + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    """A GIF of a few bytes; its first frame asks for a background to be laid below it."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6)
    control = b"!\xf9\x04\x08\0\0\0\0"
    return screen + control + b"," + struct.pack("<HHHHB", 0, 0, *(frame or (width, height)), 0) + b"\x02\x02\x44\x01\0;"


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """An extended WebP file whose canvas has this size."""
    body = b"VP8X" + struct.pack("<IB3x", 10, 0x02) + b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff_of_tiles(width: int, height: int) -> bytes:
    """A TIFF file of 10 x 10 pixels in one compressed tile of this size."""
    data = zlib.compress(bytes(100))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + data


SVG = b"""<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="50000" height="50000"><script>1</script></svg>"""


def sample(form: str) -> bytes:
    """A file of one format, 40 x 30; Pillow writes most of them, the others are put together here from its bytes."""
    image = noise(40, 30)
    match form:
        case "MSP" | "XBM":
            return encoded(image.convert("1"), form)
        case "CUR":
            body = encoded(image, "DIB")
            doubled = body[:8] + struct.pack("<i", 60) + body[12:] + bytes(8 * 30)  # a mask lies behind the image
            return struct.pack("<3H4B2HLL", 0, 2, 1, 40, 30, 0, 0, 0, 0, len(doubled), 22) + doubled
        case "DCX":
            return struct.pack("<3L", 0x3ADE68B1, 12, 0) + encoded(image, "PCX")
        case "FLI":
            levels = struct.pack("<LH", 6 + 1_200, 16) + image.convert("L").tobytes()
            frame = struct.pack("<LHH8x", 16 + len(levels), 0xF1FA, 1) + levels
            head = struct.pack("<LHHHHHHL", 128 + len(frame), 0xAF11, 1, 40, 30, 8, 3, 5)
            return head.ljust(128, b"\0") + frame
        case "FTEX":
            return b"FTEX" + struct.pack("<7i", 0, 40, 30, 1, 1, 1, 32) + struct.pack("<i", 3_600) + image.tobytes()
        case "GBR":
            return struct.pack(">5L", 20, 1, 40, 30, 1) + image.convert("L").tobytes()
        case "PCD":
            return bytes(2_048) + b"PCD_" + bytes(96 * 2_048 + 768 * 512 * 3 // 2)
        case "PIXAR":
            head = bytearray(1_024)
            head[:4] = b"\x80\xe8\0\0"
            head[416:420], head[424:428] = struct.pack("<HH", 30, 40), struct.pack("<HH", 14, 2)
            return bytes(head) + image.tobytes()
        case "PSD":
            planes = b"".join(channel.tobytes() for channel in image.split())
            return b"8BPS" + struct.pack(">H6xHLLHH3LH", 1, 3, 30, 40, 8, 3, 0, 0, 0, 0) + planes
        case "SUN":
            return struct.pack(">8L", 0x59A66A95, 40, 30, 24, 3_600, 3, 0, 0) + image.tobytes()
        case "XPM":
            rows = ",\n".join('"' + "ab" * 20 + '"' for _ in range(30))
            return f'/* XPM */\nstatic char *x[] = {{\n"40 30 2 1",\n"a c #FF0000",\n"b c #0000FF",\n{rows}\n}};\n'.encode()
        case _:
            return encoded(image, form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow's own, of writing IM
def test_every_format(form: str) -> None:
    made = prepare(sample(form), MAX_PIXELS, 1_000_000)
    assert made.status == "ok"
    image = opened(made.image)
    assert (image.mode, image.size) == ("RGB", (made.width, made.height))
    assert image.size == ((768, 512) if form == "PCD" else (40, 30))
    if form not in ("FLI", "FTEX", "GBR", "GIF", "MSP", "PCD", "XBM", "XPM"):
        lossy = form in ("JPEG", "WEBP", "AVIF", "JPEG2000")
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(noise(40, 30)).astype(int))
        assert difference.mean() <= (60 if lossy else 0)  # noise is what such a format cannot keep


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_lossless_stays_lossless(form: str) -> None:
    image = opened(prepare(encoded(noise(40, 30), form), MAX_PIXELS, STORED_PIXELS).image)
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), np.asarray(noise(40, 30)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 100), (128, 32)),
        ((100, 400), (32, 128)),
        ((500, 500), (64, 64)),
        ((64, 64), (64, 64)),
        ((128, 32), (128, 32)),
        ((4_096, 1), (4_096, 1)),
        ((1, 5_000), (1, 4_096)),
        ((3, 200_000), (1, 4_096)),
        ((1, 1), (1, 1)),
    ],
)
def test_reduced(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for form in ("PNG", "BMP") if max(size) > 65_500 else ("PNG", "JPEG"):
        made = prepare(encoded(noise(*size), form), MAX_PIXELS, STORED_PIXELS)
        assert (made.width, made.height) == expected
        assert opened(made.image).size == expected
        assert opened(made.image).format == ("PNG" if form == "PNG" and size == expected else "JPEG")


def test_stored_size_is_the_largest_that_fits() -> None:
    draw = random.Random(5)
    for _ in range(2_000):
        width, height = (int(10 ** draw.uniform(0, 4)) for _ in range(2))
        stored_pixels = int(10 ** draw.uniform(2.5, 6))
        stored = stored_size(width, height, stored_pixels)
        assert stored[0] * stored[1] <= stored_pixels
        assert 1 <= stored[0] <= width
        assert 1 <= stored[1] <= height
        assert stored_size(height, width, stored_pixels) == stored[::-1]
        if width * height <= stored_pixels:
            assert stored == (width, height)
        else:
            factor = (stored_pixels / (width * height)) ** 0.5
            if min(width, height) * factor >= 1:
                assert stored == pytest.approx((width * factor, height * factor), abs=1.0)
            else:
                assert stored[0] * stored[1] == stored_pixels


def test_large_jpegs_are_decoded_small_and_look_the_same() -> None:
    """Oracle: the image decoded whole, then reduced."""
    source = Image.fromarray(np.add.outer(np.arange(900) // 8, np.arange(1_000) // 8).astype(np.uint8)).convert("RGB")
    data = encoded(source, "JPEG", quality=95)
    made = opened(prepare(data, MAX_PIXELS, STORED_PIXELS).image)
    wanted = opened(data).resize(made.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted).astype(int)).max() <= 4


def test_reduction_keeps_the_image() -> None:
    image = Image.new("RGB", (800, 800), (200, 30, 30))
    image.paste((20, 40, 220), (400, 0, 800, 800))
    small = opened(prepare(encoded(image, "JPEG", quality=95), MAX_PIXELS, STORED_PIXELS).image)
    for place, colour in (((10, 30), (200, 30, 30)), ((50, 30), (20, 40, 220))):
        assert np.abs(np.array(small.getpixel(place)) - np.array(colour)).max() <= 6


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    palette = clear.convert("RGB").quantize(4)
    for data in (encoded(clear, "PNG"), encoded(palette, "PNG", transparency=palette.getpixel((4, 4)))):
        image = opened(prepare(data, MAX_PIXELS, STORED_PIXELS).image)
        assert image.getpixel((4, 4)) == (255, 255, 255)
    assert opened(prepare(encoded(clear, "PNG"), MAX_PIXELS, STORED_PIXELS).image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = Image.new("L", (8, 8), 200)
    if mode == "I;16":
        data = encoded(Image.fromarray(np.full((8, 8), 200 << 8, dtype=np.uint16)), "PNG")
    else:
        data = encoded(source.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    image = opened(prepare(data, MAX_PIXELS, STORED_PIXELS).image)
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
    made = opened(prepare(data, MAX_PIXELS, STORED_PIXELS).image)
    assert made.size == wanted.size
    assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted).astype(int)).mean() < 4


def test_damaged_exif_does_not_spoil_an_image() -> None:
    data = encoded(noise(20, 20), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1")
    assert prepare(data, MAX_PIXELS, STORED_PIXELS).status == "ok"


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))
    assert np.abs(np.array(opened(prepare(data, MAX_PIXELS, STORED_PIXELS).image).getpixel((4, 4))) - (255, 0, 0)).max() <= 2


def test_nothing_but_pixels_is_stored() -> None:
    """Comments, profiles, positions, and what hangs on behind an image (a polyglot) are not passed on."""
    script = b"<script>alert(1)</script>"
    exif = Image.Exif()
    exif[0x010E] = script.decode()
    for form, settings in (("JPEG", {"comment": script}), ("PNG", {}), ("WEBP", {}), ("GIF", {"comment": script})):
        data = encoded(noise(20, 20), form, exif=exif.tobytes(), icc_profile=script * 40, **settings) + script + b"PK\x03\x04"
        assert script in data
        made = prepare(data, MAX_PIXELS, STORED_PIXELS)
        assert made.image is not None
        assert b"script" not in made.image
        assert b"PK\x03\x04" not in made.image
        assert len(made.image) < 3_000
        assert opened(made.image).info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


@pytest.mark.parametrize(("split", "size"), [(False, (20, 40)), (True, (40, 20))])
def test_only_one_exif_segment_counts(split: bool, size: tuple[int, int]) -> None:
    """Pillow joins them, and many of them could then name terabytes: what stands in the second one is not seen."""
    tags = struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)  # turned by a quarter
    blocks = [b"MM\0*\0\0\0\x08", tags] if split else [b"MM\0*\0\0\0\x08" + tags, b"more"]
    segments = (b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block for block in blocks)
    plain = encoded(noise(40, 20), "JPEG")
    data = plain[:2] + b"".join(segments) + plain[2:]
    assert opened(data).getexif()[0x0112] == 6
    made = prepare(data, MAX_PIXELS, STORED_PIXELS)
    assert (made.status, (made.width, made.height)) == ("ok", size)


def test_exif_longer_than_any_writer_makes_is_not_read() -> None:
    tags = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    plain = encoded(noise(40, 20), "PNG")
    for num_bytes, width in ((1_000, 20), (70_000, 40)):
        data = plain[:33] + chunk(b"eXIf", tags + bytes(num_bytes)) + plain[33:]
        assert prepare(data, MAX_PIXELS, STORED_PIXELS).width == width


def scans(num_scans: int) -> bytes:
    """A progressive JPEG that repeats one scan."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * num_scans + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "corrupt"),
        (b"this is text, not an image", "corrupt"),
        (b"<!DOCTYPE html><html>", "unsupported"),
        (encoded(noise(100, 100), "JPEG")[:-500], "corrupt"),
        (encoded(noise(100, 100), "PNG")[:-500], "corrupt"),
        (encoded(noise(100, 100), "WEBP")[:-500], "corrupt"),
        (encoded(noise(8, 8), "TIFF")[:-100], "corrupt"),
        (encoded(noise(8, 8), "TIFF", compression="tiff_deflate")[:90], "corrupt"),
        (tiff_of_tiles(4_096, 4_096), "too_large"),  # a tile is decoded whole
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported"),
        (png_header(50_000, 50_000), "too_large"),
        (png_header(11_000, 11_000), "too_large"),  # where Pillow would only warn
        (png_header(1_001, 1_000), "too_large"),
        (png_header(900, 900), "corrupt"),
        (png_header(2**31 - 1, 2**31 - 1), "too_large"),
        (png_header(0, 10), "corrupt"),
        (gif(50_000, 50_000), "too_large"),
        (gif(10, 10, frame=(1_500, 1_500)), "too_large"),  # a frame larger than the screen
        (bmp(50_000, 50_000), "too_large"),
        (jpeg(50_000, 50_000), "too_large"),
        (webp(16_384, 16_384), "too_large"),  # the format knows no larger ones
        (SVG, "unsupported"),
        (b"\xef\xbb\xbf  <html><img src=x></html>", "unsupported"),
        (png_header(10, 10, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))), "corrupt"),
        (png_header(10, 10, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))), "corrupt"),
        (png_header(10, 10, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 80), "corrupt"),
        (scans(201), "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + encoded(noise(8, 8), "JPEG"), "corrupt"),
        (encoded(noise(8, 8), "JPEG")[:2], "corrupt"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_hostile(data: bytes, status: str) -> None:
    made = prepare(data, MAX_PIXELS, STORED_PIXELS)
    assert (made.status, made.image, made.width, made.height) == (status, None, None, None)


def test_many_scans_are_fine_up_to_a_bound() -> None:
    assert prepare(scans(190), MAX_PIXELS, STORED_PIXELS).status == "ok"


def test_a_motion_photo_is_no_image_of_many_scans() -> None:
    """Behind some images hangs a film, in which a scan's marker stands by chance."""
    film = random.Random(1).randbytes(1_000) + b"\xff\xda" * 500
    assert prepare(encoded(noise(20, 20), "JPEG") + film, MAX_PIXELS, STORED_PIXELS).status == "ok"


WORST = """
import io, resource, struct, sys, warnings, zlib
from PIL import Image
from sda_core.fetch.decoding import prepare

def encoded(image, form, **settings):
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()

def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

def tags(number, size):  # every one of them points at the same bytes
    entries = b"".join(struct.pack(">HHII", tag + 1, 7, size, 8) for tag in range(number))
    return b"MM\\0*\\0\\0\\0\\x08" + struct.pack(">H", number) + entries + bytes(size)

image = encoded(Image.new("RGB", (16, 16)), "JPEG")
body, segments = tags(5_000, 200_000), b""
for start in range(0, len(body), 60_000):
    part = body[start : start + 60_000]
    segments += b"\\xff\\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\\0\\0" + part
length, = struct.unpack(">H", image[4:6])
png = encoded(Image.new("RGB", (10, 10)), "PNG")
frames = [Image.new("P", (8, 8), number % 7) for number in range(10_000)]
text = chunk(b"zTXt", b"a\\0\\0" + zlib.compress(bytes(100_000_000), 1))
made = {
    "exif jpeg": (b"\\xff\\xd8" + segments + image[4 + length :], "ok"),
    "exif png": (png[:33] + chunk(b"eXIf", body) + png[33:], "ok"),
    "text": (png[:33] + text + png[33:], "corrupt"),
    "frames": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "ok"),
    "rgba": (encoded(Image.new("RGBA", (4_000, 4_000)), "PNG", compress_level=1), "ok"),
    "grey": (encoded(Image.new("I;16", (4_000, 4_000)), "PNG", compress_level=1), "ok"),
}
del frames, text
prepare(image, 10**9, 4_096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory_of_the_worst() -> None:
    """A process of its own each, forked from one that made the images: how much more memory the image took than it had."""
    code = WORST + textwrap.dedent("""
        import os

        def status_of(name):
            return int(next(line for line in open("/proc/self/status") if line.startswith(name + ":")).split()[1])

        for name, (data, status) in made.items():
            pid = os.fork()
            if pid == 0:
                open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
                before = status_of("VmRSS")
                found = prepare(data, 20_000_000, 4_096).status
                print(name, len(data), found, (status_of("VmHWM") - before) // 1024, sep="|", flush=True)
                os._exit(found != status)
            assert os.waitpid(pid, 0)[1] == 0, name
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    megabytes = {line.split("|")[0]: int(line.split("|")[3]) for line in done.stdout.splitlines()}
    assert megabytes.keys() == {"exif jpeg", "exif png", "text", "frames", "rgba", "grey"}
    assert max(megabytes[name] for name in ("exif jpeg", "exif png", "text", "frames")) <= 30, megabytes
    assert max(megabytes[name] for name in ("rgba", "grey")) <= 140, megabytes  # 16 million pixels


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one holds the place, a second large one waits, and a small one does not."""
    monkeypatch.setattr(decoding, "_LARGE_PIXELS", 10_000)
    large, small = encoded(noise(200, 100), "PNG"), encoded(noise(20, 10), "PNG")
    with ThreadPoolExecutor(2) as pool:
        with decoding._large:
            waiting = pool.submit(prepare, large, MAX_PIXELS, STORED_PIXELS)
            assert pool.submit(prepare, small, MAX_PIXELS, STORED_PIXELS).result(20).status == "ok"
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(20).status == "ok"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_bytes_never_raise(form: str) -> None:
    draw = random.Random(form)
    whole = sample(form)
    statuses = set()
    for _ in range(250 if form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") else 60):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(min(len(data), draw.choice((60, len(data)))))] = draw.randrange(256)
        made = prepare(bytes(data), MAX_PIXELS, 1_024)
        statuses.add(made.status)
        assert (made.status == "ok") == (made.image is not None)
    assert statuses <= {"ok", "corrupt", "too_large", "unsupported"}
    assert statuses & {"corrupt", "too_large", "unsupported"} or form in ("GBR", "FLI", "PCD", "XBM", "XPM")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_same_bytes_twice() -> None:
    for form in FORMATS:
        data = sample(form)
        assert prepare(data, MAX_PIXELS, STORED_PIXELS) == prepare(data, MAX_PIXELS, STORED_PIXELS)
