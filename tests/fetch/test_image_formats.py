"""Which formats are decoded, which file names they have, and what other files are called."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from sda_core.fetch import decoding, image_formats
from sda_core.fetch.decoding import PreparedImage, prepare
from sda_core.fetch.image_formats import FORMATS, NOT_DECODED, OTHER_SUFFIXES, SUFFIX_ORDER, SUFFIXES, recognized


def encoded(form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, form, **options)
    return stream.getvalue()


def status(data: bytes) -> tuple[str, str | None]:
    made = prepare(data, 1_000_000, 1_000_000)
    return made.status, made.reason


def test_every_extension_of_pillow_is_an_image_s() -> None:
    """And it is decoded, or there is a reason why not."""
    Image.init()
    for suffix, name in Image.registered_extensions().items():
        if name in Image.OPEN or name == "MPO":
            assert suffix in SUFFIX_ORDER
            assert (suffix in SUFFIXES) == (name not in NOT_DECODED)
    assert set(FORMATS).isdisjoint(NOT_DECODED)
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"} <= set(FORMATS)
    assert ("AVIF" in FORMATS) == bool(features.check("avif"))
    assert FORMATS[-1] == "TGA", "it has no signature, so it is tried last"
    assert SUFFIXES[:4] == (".jpg", ".jpeg", ".png", ".webp")
    assert {".gif", ".jfif", ".tif", ".tiff", ".mpo", ".bmp"} <= set(SUFFIXES)
    assert {".heic", ".jxl", ".svg", ".eps"} <= set(OTHER_SUFFIXES)
    assert [*SUFFIX_ORDER] == [*SUFFIXES, *OTHER_SUFFIXES]
    assert all(suffix == suffix.lower() for suffix in SUFFIX_ORDER)


def iso_media(*brands: bytes) -> bytes:
    return struct.pack(">L", 8 + 4 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:]) + bytes(100)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (iso_media(b"heic", b"mif1"), "HEIC"),
        (iso_media(b"mif1", b"mif1", b"heic"), "HEIC"),
        (iso_media(b"mif1", b"miaf"), "HEIF"),
        (iso_media(b"isom", b"mp41"), "MP4 video"),
        (iso_media(b"qt  "), "QuickTime video"),
        (iso_media(b"crx ", b"isom"), "CR3"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' 'x'>\n<svg/>", "SVG"),
        (b"<?xml version='1.0'?><ns0:svg xmlns:ns0='http://www.w3.org/2000/svg'/>", "SVG"),
        ("<?xml version='1.0' encoding='utf-16'?><svg/>".encode("utf-16"), "SVG"),
        (b"<!DOCTYPE html><html><body><svg></svg></body></html>", "HTML page"),
        (b"\n\n  <HTML><head><title>404</title>", "HTML page"),
        (b"<!-- a comment --><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
        (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC '-//W3C//DTD XHTML 1.0//EN' 'x'><html/>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "AppleDouble file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip file"),
        (b"PK\x03\x04" + bytes(30), "zip file"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI video"),
        (b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60), "EMF"),
        (encoded("ICO"), "ICO"),
        (encoded("ICNS"), "ICNS"),
        (encoded("EPS"), "EPS"),
        (encoded("PDF"), "PDF"),
    ],
)  # fmt: skip
def test_other_formats_are_named(data: bytes, name: str) -> None:
    assert recognized(data) == name
    assert status(data) == ("unsupported", name)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\xff", b"{", b"[1, 2", b"<", b"<?xml", b"some text", b"\xff\xfe<\0", bytes(1_000), b"[" * 100_000]
)
def test_what_says_nothing_is_damaged(data: bytes) -> None:
    assert status(data) in {("corrupt", None), ("unsupported", "XML")}
    assert (recognized(data) == "XML") == data.startswith(b"<?xml")


@pytest.mark.parametrize("form", ["AVIF", "TIFF", "JPEG2000", "WEBP", "GIF", "PNG", "JPEG", "BMP", "TGA", "PCX", "PPM"])
def test_a_damaged_file_of_a_known_format_is_no_unsupported_one(form: str) -> None:
    if form not in FORMATS:
        pytest.skip(f"Pillow without {form}")
    data = encoded(form)
    assert status(data) == ("ok", None)
    assert status(data[: len(data) * 2 // 3])[0] == "corrupt"


@pytest.mark.parametrize("form", ["AVIF", "TIFF", "JPEG2000", "WEBP"])
def test_a_format_that_this_pillow_cannot_decode_is_named(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a Pillow that was built without the codec."""
    if form not in FORMATS:
        pytest.skip(f"Pillow without {form}")
    data, fewer = encoded(form), tuple(name for name in FORMATS if name != form)
    monkeypatch.setattr(image_formats, "FORMATS", fewer)
    monkeypatch.setattr(decoding, "FORMATS", fewer)
    assert prepare(data, 1_000_000, 1_000_000) == PreparedImage("unsupported", reason=form)


def test_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(subprocess, "Popen", never)
    assert status(encoded("EPS")) == ("unsupported", "EPS")


@pytest.mark.parametrize("form", ["TIFF", "AVIF"])
def test_a_truncated_file_is_damaged_wherever_it_ends(form: str) -> None:
    if form not in FORMATS:
        pytest.skip(f"this Pillow does not decode {form}")
    kinds: list[dict[str, Any]] = [{}] if form == "AVIF" else [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}]
    for options in kinds:
        data = encoded(form, **options)
        assert status(data) == ("ok", None)
        for end in range(len(data) - 4):  # after it a TIFF file says whether there is another page
            if end < 300 or end > len(data) - 300:
                assert status(data[:end]) == ("corrupt", None), (options, end, len(data))
