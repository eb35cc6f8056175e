"""Image formats: the decoded ones, their file name extensions, and the detection of others.

* The decoded formats are those that Pillow opens, that have a registered file name extension, and that are not in
  :data:`NOT_DECODED`, which gives the reason.  So AVIF is decoded if Pillow was built with it.
* :func:`recognized` distinguishes a file of another kind (HEIC, SVG, an HTML page) from a damaged image by its first bytes.
"""

from __future__ import annotations

import json
import re

from PIL import Image, features
from PIL import __version__ as _pillow_version

_RUNS_A_PROGRAM = "its decoder runs another program or a part of the operating system"
_NO_DECODER = "Pillow recognizes it and has no decoder"
_NESTED = "it holds images of other formats, which are decoded before their size can be compared with the limit"
_NO_RANGE = "it holds measurements, and does not say which value is white"

NOT_DECODED = {
    "BLP": _NESTED,
    "BUFR": _NO_DECODER,
    "EPS": _RUNS_A_PROGRAM,
    "FITS": _NO_RANGE,
    "FPX": _NESTED,
    "GRIB": _NO_DECODER,
    "HDF5": _NO_DECODER,
    "ICNS": _NESTED,
    "ICO": _NESTED,
    "IPTC": _NESTED,
    "MIC": _NESTED,
    "MPEG": _NO_DECODER,
    "WMF": _RUNS_A_PROGRAM,
}
"""Formats that Pillow opens but this project does not, with the reason."""

_FIRST = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_LAST = ("TGA",)  # has no signature, so all other formats are tried first
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_PREFERRED_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_SUFFIXES = (
    ".ai", ".arw", ".bpg", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".nef", ".orf",
    ".pdf", ".raf", ".rw2", ".svg", ".svgz", ".wdp", ".xcf",
)  # fmt: skip
_MIN_PILLOW_FOR_TIFF = 13  # earlier versions read as many bytes as the tags of a TIFF file state in total


def _decoded() -> tuple[str, ...]:
    Image.init()
    named = set(Image.registered_extensions().values()) & set(Image.OPEN) - NOT_DECODED.keys()
    missing = {name for name, codec in _CODECS.items() if name in named and not features.check(codec)}
    if int(_pillow_version.partition(".")[0]) < _MIN_PILLOW_FOR_TIFF:
        missing.add("TIFF")
    rest = sorted(named - missing - {*_FIRST, *_LAST})
    return tuple(name for name in (*_FIRST, *rest, *_LAST) if name in named - missing)


FORMATS = _decoded()
"""Pillow's names of the decoded formats, in the order in which they are tried."""


def _suffixes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    decoded = {*FORMATS, "MPO"}  # Pillow opens MPO as JPEG but registers it as a separate format
    extensions = Image.registered_extensions()
    good = {suffix for suffix, name in extensions.items() if name in decoded}
    other = {suffix for suffix, name in extensions.items() if name in Image.OPEN} | set(_OTHER_SUFFIXES)
    first = tuple(suffix for suffix in _PREFERRED_SUFFIXES if suffix in good)
    return first + tuple(sorted(good.difference(first))), tuple(sorted(other - good))


SUFFIXES, OTHER_SUFFIXES = _suffixes()
"""File name extensions in lower case, best first: those of decoded formats, then those of other images."""

SUFFIX_ORDER = {suffix: place for place, suffix in enumerate(SUFFIXES + OTHER_SUFFIXES)}
"""Every extension of an image, with its rank in the order of preference."""


_SIGNATURES = {
    "WEBP": rb"RIFF.{4}WEBP",
    "TIFF": rb"II\*\0|MM\0\*",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "AVI video": rb"RIFF.{4}AVI ",
    "EMF": rb"\x01\0\0\0.{36} EMF",
    "PDF": rb"%PDF-",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG XR": rb"II\xbc",
    "BPG": rb"BPG\xfb",
    "FLIF": rb"FLIF",
    "DjVu": rb"AT&TFORM",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?RADIANCE|#\?RGBE",
    "XCF": rb"gimp xcf",
    "RAF": rb"FUJIFILMCCD-RAW",
    "ICO": rb"\0\0\x01\0",
    "ICNS": rb"icns",
    "BLP": rb"BLP[12]",
    "FITS": rb"SIMPLE  =",
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "GRIB": rb"GRIB",
    "BUFR": rb"BUFR",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "MPEG video": rb"\0\0\x01[\xba\xb3]",
    "Matroska video": rb"\x1aE\xdf\xa3",
    "Flash video": rb"FLV\x01",
    "Flash": rb"[FC]WS",
    "OLE document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "zip file": rb"PK\x03\x04",
    "gzip file": rb"\x1f\x8b\x08",
    "RAR file": rb"Rar!\x1a\x07",
    "7z file": rb"7z\xbc\xaf\x27\x1c",
    "AppleDouble file": rb"\0\x05\x16\x07",
    "AppleSingle file": rb"\0\x05\x16\0",
    "Git LFS pointer": rb"version https://git-lfs\.github\.com/",
    "git-annex pointer": rb"/annex/objects/",
}
"""Signatures as regular expressions, by the name of the format; some formats are decoded by some builds of Pillow."""

_HEADS = [(name, re.compile(pattern, re.DOTALL)) for name, pattern in _SIGNATURES.items()]
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_HEIF_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEAD_BYTES = 4_096
_MAX_JSON_BYTES = 1 << 20
_LEADING = re.compile(r"(?:\s|\ufeff|<\?.*?\?>|<!--.*?-->|<!doctype\s+svg[^\[>]*(?:\[.*?\]\s*)?>)*", re.DOTALL)


def recognized(data: bytes) -> str | None:
    """Recognize a file that has none of the :data:`FORMATS`, by its first bytes.

    Args:
        data: the whole file.

    Returns:
        The common name of the format ("HEIC", "SVG", "HTML page", "Git LFS pointer"), for messages and counts; None if it is
        not recognized.
    """
    if data[4:8] == b"ftyp":
        name = _iso_media(data)
    else:
        name = next((name for name, head in _HEADS if head.match(data)), None) or _text(data)
    return None if name in FORMATS else name  # a file of a decoded format must be damaged


def _iso_media(data: bytes) -> str | None:
    """The format by the brands of the first box (ISO/IEC 14496-12), the major one first; None if the file is too short."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    if len(data) < 12:  # too short for the first brand
        return None
    brands = [data[8:12], *(data[start : start + 4] for start in range(16, end - 3, 4))]
    for names, known in (("HEIC", _HEIC_BRANDS), ("AVIF", _AVIF_BRANDS), ("CR3", {b"crx "}), ("HEIF", _HEIF_BRANDS)):
        if known.intersection(brands):
            return names
    return "QuickTime video" if brands[0] == b"qt  " else "MP4 video"


def _text(data: bytes) -> str | None:
    head = data[:_HEAD_BYTES]
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = head.decode("utf-16" if utf16 else "utf-8", "replace").lower()
    declared = text.lstrip("\ufeff \t\r\n").startswith("<?xml")
    begin = text[_LEADING.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing at least
    if begin.startswith("<svg") or re.match(r"<[\w.]+:svg\b", begin):
        return "SVG"
    if begin.startswith(("<!doctype html", "<html", "<head", "<body", "<title", "<script", "<meta")):
        return "HTML page"
    if declared:
        return "XML"
    if begin.startswith("version https://git-lfs.github.com/spec/"):
        return "Git LFS pointer"
    if begin.startswith(("{", "[")) and len(data) <= _MAX_JSON_BYTES:
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return None
        return "JSON"
    return None
