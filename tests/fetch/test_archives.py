"""Zip and tar files of images: what is found in them, and that hostile ones do no harm."""

from __future__ import annotations

import io
import random
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath

import pytest

from sda_core.errors import ArtifactError
from sda_core.fetch.archives import ImageArchive, UnusableError, check_archive

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 100_000

Names = Mapping[str, bytes] | Collection[tuple[str, bytes]]


def pairs(files: Names) -> Collection[tuple[str, bytes]]:
    return list(files.items()) if isinstance(files, Mapping) else files


def make_zip(path: Path, files: Names, packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in pairs(files):
            archive.writestr(zipfile.ZipInfo(name), data, packing)
    return path


def make_stored_zip(path: Path, files: Names) -> Path:
    return make_zip(path, files, zipfile.ZIP_STORED)


def make_tar(path: Path, files: Names, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in pairs(files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_gnu_tar(path: Path, files: Names) -> Path:
    return make_tar(path, files, tarfile.GNU_FORMAT)


def make_ustar(path: Path, files: Names) -> Path:
    return make_tar(path, files, tarfile.USTAR_FORMAT)


Maker = Callable[[Path, Names], Path]
every_kind = pytest.mark.parametrize("make", [make_zip, make_stored_zip, make_tar, make_gnu_tar, make_ustar])


def at(archive: ImageArchive, path: str, limit: int = LIMIT) -> bytes | str | None:
    entry = archive.at(PurePosixPath(path))
    return None if entry is None else archive.read(entry, limit)


def of(archive: ImageArchive, item_id: str, limit: int = LIMIT) -> bytes | str | None:
    entry = archive.of(item_id)
    return None if entry is None else archive.read(entry, limit)


# ---------------------------------------------------------------------------------------------- the good
@every_kind
def test_by_path_and_by_name(tmp_path: Path, make: Maker) -> None:
    files = {
        "images/A.jpg": b"a" * 1_000,
        "./images/dotted.png": b"dotted",
        "deep/er/B.PNG": b"b",
        "C.webp": b"",
        "C.txt": b"text",
        "images/D.jpg.bak": b"not D",
        "._E.jpg": b"not E",
        "é/ü.png": b"accents",
        "x" * 90 + "/" + "y" * 90 + "/long.png": b"long",
    }
    long = "x" * 90 + "/" + "y" * 90 + "/long.png"
    wanted = ["images/A.jpg", "images/dotted.png", "é/ü.png", long, "none.png", "deep/er"]
    archive = ImageArchive(make(tmp_path / "x", files), wanted, ["A", "B", "C", "D", "E", "long"])
    assert at(archive, "images/A.jpg") == of(archive, "A") == b"a" * 1_000
    assert at(archive, "images/dotted.png") == b"dotted"
    assert at(archive, "é/ü.png") == b"accents"
    assert at(archive, long) == of(archive, "long") == b"long"
    assert (of(archive, "B"), of(archive, "C")) == (b"b", b"")
    assert (at(archive, "none.png"), at(archive, "deep/er"), at(archive, "C.webp")) == (None, None, None), "absent or not wanted"
    assert (of(archive, "D"), of(archive, "E"), of(archive, "F")) == (None, None, None)
    assert at(archive, "images/A.jpg", 999) == "too_large"
    assert at(archive, "images/A.jpg", 1_000) == b"a" * 1_000


@every_kind
def test_several_of_one_name(tmp_path: Path, make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "b/A.jpg": b"1",
        "a/A.png": b"2",
        "c/A.jpg": b"3",
        "a/B.jpg": b"4",
        "a/B.png": b"5",
        "C.jpg": b"6",
        "no/X.jpg": b"",
        "X.jpg": b"",
    }
    archive = ImageArchive(make(tmp_path / "x", files), ["b/A.jpg"], ["A", "B", "C"])
    assert (of(archive, "A"), of(archive, "B"), of(archive, "C"), at(archive, "b/A.jpg")) == (b"2", b"4", b"6", b"1")
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "2 items match several images; the first path is used (for A: a/A.png)"
    ]


@every_kind
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_later_of_two_entries_counts(tmp_path: Path, make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    files = [("a/A.jpg", b"old"), ("a/B.jpg", b"b"), ("a/A.jpg", b"new")]
    archive = ImageArchive(make(tmp_path / "x", files), ["a/A.jpg"], ["A"])
    assert at(archive, "a/A.jpg") == of(archive, "A") == b"new"
    assert not caplog.records


@every_kind
@pytest.mark.parametrize(
    "name",
    [
        "../A.jpg", "a/../../A.jpg", "/A.jpg", "C:/A.jpg", "a/" * 600 + "A.jpg",
        "..\\A.jpg", "a\\..\\..\\A.jpg", "\\A.jpg", "C:\\A.jpg", "\\\\host\\share\\A.jpg", "c:A.jpg",
    ],
)  # fmt: skip
def test_tricks_in_names(tmp_path: Path, make: Maker, name: str) -> None:
    if make is make_ustar and len(name) > 250:
        pytest.skip("the format knows no such names")
    archive = ImageArchive(make(tmp_path / "x", {name: b"x", "B.jpg": b"b"}), ["A.jpg", "a/A.jpg"], ["A", "B"])
    assert (of(archive, "A"), at(archive, "A.jpg"), at(archive, "a/A.jpg")) == (None, None, None)
    assert of(archive, "B") == b"b"
    assert archive.passed_over == {"unsafe_path": 1}
    assert archive.examples == {"unsafe_path": [name[:200]]}


@every_kind
def test_nothing_in_it(tmp_path: Path, make: Maker) -> None:
    assert of(ImageArchive(make(tmp_path / "x", {}), [], ["A"]), "A") is None


# ------------------------------------------------------------------------------------------- other systems
@every_kind
def test_an_archive_as_macos_packs_it(tmp_path: Path, make: Maker) -> None:
    """Accents as characters of their own, and a file of the system beside each image."""
    name = unicodedata.normalize("NFD", "Café")
    files = {
        f"shop/{name}.JPG": b"image",
        f"__MACOSX/shop/._{name}.JPG": b"system",
        f"shop/._{name}.jpg": b"system",
        "shop/.DS_Store": b"system",
        "__MACOSX/B.jpg": b"system",
    }
    archive = ImageArchive(make(tmp_path / "x", files), ["shop/Café.jpg"], ["Café", "B", "._Café"])
    assert of(archive, "Café") == at(archive, "shop/Café.jpg") == b"image"
    assert (of(archive, "B"), of(archive, "._Café")) == (None, None)
    assert archive.passed_over == {"no_image": 4}
    assert archive.num_files == 5


@every_kind
def test_backslashes_separate_folders(tmp_path: Path, make: Maker) -> None:
    files = {"shop\\": b"", "shop\\images\\A.JPG": b"a", ".\\shop\\images\\b\\B.png": b"b"}
    archive = ImageArchive(make(tmp_path / "x", files), ["images/A.JPG", "shop/images/b/B.png"], ["A", "B"])
    assert of(archive, "A") == at(archive, "images/A.JPG") == b"a"
    assert of(archive, "B") == at(archive, "shop/images/b/B.png") == b"b"


def raw_zip(path: Path, name: bytes, data: bytes, flags: int = 0, extra: bytes = b"") -> Path:
    """A zip file of one stored entry whose name is these very bytes."""
    sizes = struct.pack("<3L2H", zlib.crc32(data), len(data), len(data), len(name), len(extra))
    local = b"PK\x03\x04" + struct.pack("<5H", 20, flags, 0, 0, 0) + sizes + name + extra + data
    central = (
        b"PK\x01\x02" + struct.pack("<6H", 20, 20, flags, 0, 0, 0) + sizes + struct.pack("<3H2L", 0, 0, 0, 0, 0) + name + extra
    )
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


@pytest.mark.parametrize(
    ("item_id", "encoding"),
    [
        ("Größe-1", "cp437"), ("Größe-1", "cp850"), ("Größe-1", "cp1252"), ("Größe-1", "utf-8"), ("чашка", "cp866"),
        ("książka", "cp852"), ("książka", "cp1250"), ("kırmızı", "cp857"), ("kırmızı", "cp1254"), ("κόκκινο", "cp737"),
        ("κόκκινο", "cp1253"), ("ספל", "cp1255"), ("كوب", "cp1256"), ("puodelį", "cp1257"), ("ถ้วย", "cp874"),
        ("Größe-1", "mac_roman"),
        ("чашка", "cp1251"), ("红色杯子", "gbk"), ("赤いコップ", "cp932"), ("빨간컵", "cp949"), ("紅色杯子", "big5"),
        ("表", "cp932"),  # its second byte is a backslash
    ],
)  # fmt: skip
def test_names_in_the_code_pages_of_windows(tmp_path: Path, item_id: str, encoding: str) -> None:
    name = f"images\\{item_id}.JPG".encode(encoding)
    archive = ImageArchive(raw_zip(tmp_path / "a.zip", name, b"x"), [f"images/{item_id}.jpg"], [item_id, "other"])
    assert of(archive, item_id) == at(archive, f"images/{item_id}.jpg") == b"x"
    (tmp_path / "a.tar").write_bytes(tar_header(name, b"1") + b"x".ljust(512, b"\0") + bytes(1_024))
    archive = ImageArchive(tmp_path / "a.tar", [f"images/{item_id}.jpg"], [item_id, "other"])
    assert of(archive, item_id) == at(archive, f"images/{item_id}.jpg") == b"x"


def test_a_unicode_name_beside_another(tmp_path: Path) -> None:
    """Info-ZIP's extra field counts where its checksum is that of the name proper."""
    for checked, found in ((b"caf_.jpg", None), (b"caf\x82.jpg", b"x")):
        field = struct.pack("<BL", 1, zlib.crc32(checked)) + b"tea.jpg"
        extra = struct.pack("<HH", 0x7075, len(field)) + field
        archive = ImageArchive(raw_zip(tmp_path / "a.zip", b"caf\x82.jpg", b"x", extra=extra), [], ["tea"])
        assert of(archive, "tea") == found


@every_kind
def test_ids_that_are_no_file_names(tmp_path: Path, make: Maker) -> None:
    files = {
        "a%2Fb.jpg": b"slash",
        "9%25.png": b"percent",
        "50%25.png": b"encoded",
        "50%.jpg": b"plain",
        "sku 17.jpg": b"space",
        "sku:1.jpg": b"colon",
    }
    wanted = {"a/b": b"slash", "9%": b"percent", "50%": b"plain", "sku 17": b"space", "sku:1": b"colon", "b": None}
    archive = ImageArchive(make(tmp_path / "x", files), ["sku%3A1.jpg", "my/sku%2017.jpg"], list(wanted))
    assert {item_id: of(archive, item_id) for item_id in wanted} == wanted
    assert (at(archive, "sku%3A1.jpg"), at(archive, "my/sku%2017.jpg")) == (b"colon", None)


@every_kind
def test_ids_differ_by_case_and_extensions_do_not(tmp_path: Path, make: Maker) -> None:
    archive = ImageArchive(make(tmp_path / "x", {"ab.JPG": b"1", "AB.gif": b"2", "aB.TiFF": b"3"}), [], ["ab", "AB", "aB", "Ab"])
    assert [of(archive, item_id) for item_id in ("ab", "AB", "aB", "Ab")] == [b"1", b"2", b"3", None]


@every_kind
def test_formats_that_are_decoded_come_before_others(tmp_path: Path, make: Maker) -> None:
    archive = ImageArchive(make(tmp_path / "x", {"a/A.heic": b"1", "b/A.png": b"2", "a/B.svg": b"3"}), [], ["A", "B"])
    assert (of(archive, "A"), of(archive, "B")) == (b"2", b"3")


@every_kind
def test_folders_around_all_files_may_be_left_out(tmp_path: Path, make: Maker) -> None:
    wanted = ["images/a.jpg", "images/B.JPG", "b.jpg"]
    files = {"home/me/shop/images/a.jpg": b"a", "home/me/shop/images/b.jpg": b"b", "home/me/shop/x/c.jpg": b"c"}
    archive = ImageArchive(make(tmp_path / "x", files), wanted, [])
    assert [at(archive, path) for path in wanted] == [b"a", b"b", None], "images/ is not common to all"
    archive = ImageArchive(make(tmp_path / "y", {"z.jpg": b"z", **files}), wanted, [])
    assert [at(archive, path) for path in wanted] == [None, None, None], "no folder is"
    archive = ImageArchive(make(tmp_path / "z", {**files, "images/a.jpg": b"exact"}), wanted, [])
    assert [at(archive, path) for path in wanted] == [b"exact", None, None]


@every_kind
def test_the_exact_path_comes_before_one_in_another_case(tmp_path: Path, make: Maker) -> None:
    archive = ImageArchive(make(tmp_path / "x", {"i/a.jpg": b"1", "i/A.jpg": b"2", "I/a.JPG": b"3"}), ["i/A.jpg", "I/A.JPG"], [])
    assert (at(archive, "i/A.jpg"), at(archive, "I/A.JPG")) == (b"2", b"3")


@every_kind
def test_what_is_passed_over_is_counted(tmp_path: Path, make: Maker) -> None:
    files = {"images/": b"", "A.jpg": b"a", "B.jpg": b"b", "C.jpg": b"c", "notes.txt": b"", "../D.jpg": b"d"}
    archive = ImageArchive(make(tmp_path / "x", files), ["C.jpg"], ["A"])
    assert archive.passed_over == {"no_item": 1, "no_image": 1, "unsafe_path": 1}
    assert archive.examples == {"no_item": ["B.jpg"], "no_image": ["notes.txt"], "unsafe_path": ["../D.jpg"]}
    assert archive.num_files == 5


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("mode", "message"), [("w:gz", "unpack it to a plain .tar"), ("w:bz2", "unpack it"), ("w:xz", "unpack it")]
)
def test_compressed_tar(tmp_path: Path, mode: str, message: str) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("A.jpg"))
    with pytest.raises(ArtifactError, match=message) as caught:
        ImageArchive(tmp_path / "x.tar.gz", [], ["A"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK", b"<html>" * 200, bytes(range(256)) * 4, b"PK\x03\x04" + bytes(600), bytes(100)])
def test_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not a readable image archive"):
        ImageArchive(tmp_path / "x.zip", [], ["A"])


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a readable image archive"):
        ImageArchive(tmp_path / "x.zip", [], ["A"])


@every_kind
def test_a_whole_archive_passes_its_check(tmp_path: Path, make: Maker) -> None:
    check_archive(make(tmp_path / "x", {"images/": b"", "images/A.jpg": b"a" * 1_000, "x" * 90 + "/" + "y" * 90 + ".png": b""}))


@every_kind
@pytest.mark.parametrize("files", [{}, {"images/": b""}])
def test_an_archive_without_files_is_of_no_use(tmp_path: Path, make: Maker, files: Names) -> None:
    path = make(tmp_path / "x", files)
    with pytest.raises(UnusableError, match="it holds no files"):
        check_archive(path)


def test_a_zip_directory_that_leaves_out_the_begin(tmp_path: Path) -> None:
    """As that of an archive inside a truncated one may be."""
    path = make_zip(tmp_path / "a.zip", {"A.jpg": b"a", "B.jpg": b"b"})
    data = path.read_bytes()
    first, second = (place for place in range(len(data)) if data.startswith(b"PK\x01\x02", place))
    end = bytearray(data[data.index(b"PK\x05\x06") :])
    struct.pack_into("<LL", end, 12, len(data) - len(end) - second, first)
    path.write_bytes(data[:first] + data[second : -len(end)] + end)
    assert of(ImageArchive(path, [], ["B"]), "B") == b"b"
    with pytest.raises(UnusableError, match="does not begin at its first entry"):
        check_archive(path)


def test_a_zip_entry_beyond_the_directory(tmp_path: Path) -> None:
    path = make_stored_zip(tmp_path / "a.zip", {"A.jpg": b"x" * 1_000})
    patched(path, struct.pack("<II", 1_000, 1_000), struct.pack("<II", 1_010, 1_010))
    check_archive(path)  # within the file, so the checksum will tell
    patched(path, struct.pack("<II", 1_010, 1_010), struct.pack("<II", 1_100, 1_100))
    with pytest.raises(UnusableError, match="an entry lies outside"):
        check_archive(path)


@every_kind
def test_truncated(tmp_path: Path, make: Maker) -> None:
    """Cut anywhere, an archive is refused, or (in what pads its end) whole."""
    path = make(tmp_path / "x", {f"{number}.jpg": bytes([number]) * 700 for number in range(4)})
    data = path.read_bytes()
    whole = len(data.rstrip(b"\0"))
    for length in [*range(0, len(data), 97), *range(511, len(data), 512), *range(512, len(data), 512)]:
        path.write_bytes(data[:length])
        try:
            archive = ImageArchive(path, [], ["0", "3"])
        except ArtifactError:
            continue
        assert length > whole
        assert (of(archive, "0"), of(archive, "3")) == (b"\0" * 700, b"\3" * 700)


@every_kind
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, make: Maker) -> None:
    draw = random.Random(3)
    path = make(tmp_path / "x", {"a/" * 70 + f"{number}.jpg": draw.randbytes(300) for number in range(3)})
    data = path.read_bytes()
    results: set[str] = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 2, 10))):
            damaged[draw.randrange(len(data.rstrip(b"\0")))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            archive = ImageArchive(path, [], ["0", "1", "2"])
        except ArtifactError:
            results.add("refused")
            continue
        results |= {
            type(found).__name__ if not isinstance(found, str) else found for found in (of(archive, number) for number in "012")
        }
    assert {"refused", "bytes"} <= results <= {"refused", "bytes", "corrupt", "unsupported", "too_large", "NoneType"}


# -------------------------------------------------------------------------------------------------- lies
def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_zip_entries_that_lie_about_their_size(tmp_path: Path) -> None:
    bomb = make_zip(tmp_path / "a.zip", {"A.jpg": bytes(10_000_000)})
    for stated in (0, 100, LIMIT):
        path = tmp_path / f"{stated}.zip"
        path.write_bytes(bomb.read_bytes())
        archive = ImageArchive(patched(path, struct.pack("<I", 10_000_000), struct.pack("<I", stated)), [], ["A"])
        assert of(archive, "A") == "corrupt"
    assert of(ImageArchive(bomb, [], ["A"]), "A") == "too_large"
    packed = make_stored_zip(tmp_path / "c.zip", {"A.jpg": bytes(10_000_000)})
    data = bytearray(packed.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", 100)
    packed.write_bytes(data)
    assert of(ImageArchive(packed, [], ["A"]), "A") == "corrupt"
    short = make_zip(tmp_path / "b.zip", {"A.jpg": b"x" * 1_000})
    archive = ImageArchive(patched(short, struct.pack("<I", 1_000), struct.pack("<I", 1_001)), [], ["A"])
    assert of(archive, "A") == "corrupt"


def test_what_a_zip_entry_unpacks_to_is_never_held_beyond_its_bound(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A.jpg": bytes(10_000_000)})
    archive = ImageArchive(patched(path, struct.pack("<I", 10_000_000), struct.pack("<I", 100)), [], ["A"])
    tracemalloc.start()
    assert of(archive, "A") == "corrupt"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_odd_packings(tmp_path: Path, packing: int) -> None:
    archive = ImageArchive(make_zip(tmp_path / "a.zip", {"A.jpg": b"x" * 1_000}, packing), [], ["A"])
    assert of(archive, "A") == "unsupported"


def test_zip_flags_and_checksum(tmp_path: Path) -> None:
    path = make_stored_zip(tmp_path / "a.zip", {"A.jpg": b"contents", "B.jpg": b"b"})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"A.jpg"))
    data[place + 8] |= 1  # encrypted
    path.write_bytes(data)
    archive = ImageArchive(path, [], ["A", "B"])
    assert (of(archive, "A"), of(archive, "B")) == ("unsupported", b"b")
    data[place + 8] &= ~1
    path.write_bytes(data.replace(b"contents", b"contenTs"))
    assert of(ImageArchive(path, [], ["A"]), "A") == "corrupt"


def test_zip64(tmp_path: Path) -> None:
    """As written for files that may grow beyond 4 GiB, and with sizes that a 32-bit field cannot hold."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("A.jpg", "w", force_zip64=True) as stream:
        stream.write(b"large")
    assert of(ImageArchive(path, [], ["A"]), "A") == b"large"
    directory = b"PK\x01\x02" + struct.pack(
        "<6H3L5H2L", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 5, 28, 0, 0, 0, 0, 2**32 - 1
    )
    directory += b"A.jpg" + struct.pack("<HHQQQ", 1, 24, 2**40, 2**40, 2**50)
    end64 = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 1, 1, len(directory), 4)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 4 + len(directory), 1)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(b"PK\x03\x04" + directory + end64 + locator + end)
    archive64 = ImageArchive(path, [], ["A"])
    entry = archive64.of("A")
    assert entry is not None
    assert (entry.offset, entry.num_bytes) == (2**50, 2**40)
    assert of(archive64, "A") == "too_large"
    assert of(archive64, "A", 2**41) == "corrupt", "it lies beyond the end of the file"


def test_links_and_devices_in_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("5.jpg")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
        info = tarfile.TarInfo("6.jpg")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"good"))
    archive = ImageArchive(path, [f"{number}.jpg" for number in range(7)], [str(number) for number in range(7)])
    assert [of(archive, str(number)) for number in range(7)] == [None] * 6 + [b"good"]
    assert [at(archive, f"{number}.jpg") for number in range(7)] == [None] * 6 + [b"good"]
    assert archive.passed_over == {"no_file": 5}


def test_links_in_a_zip(tmp_path: Path) -> None:
    """Their contents are the path of the target, as Info-ZIP writes them."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("0.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        file = zipfile.ZipInfo("1.jpg")
        file.create_system, file.external_attr = 3, (stat.S_IFREG | 0o644) << 16
        archive.writestr(file, b"good")
    archive = ImageArchive(path, ["0.jpg", "1.jpg"], ["0", "1"])
    assert [of(archive, "0"), of(archive, "1")] == [None, b"good"]
    assert archive.passed_over == {"no_file": 1}


def tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    head = bytearray(512)
    head[: len(name)] = name
    head[124 : 124 + len(size)] = size
    head[156:157] = kind
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (tar_header(b"A.jpg", b"777777777777"), "unexpected end of data"),
        (tar_header(b"A.jpg", b"\x80" + b"\xff" * 11), "is truncated or damaged"),
        (tar_header(b"A.jpg", b"\xff" * 12), "has a size that is not a number"),  # a negative one
        (tar_header(b"A.jpg", b"-1"), "has a size that is not a number"),
        (tar_header(b"A.jpg", b"0"), "truncated: its end is cut off"),
        (tar_header(b"L", b"77777777777", b"L"), "a header in it has more than"),
        (tar_header(b"x", b"77777777777", b"x"), "a header in it has more than"),
        (tar_header(b"x", b"%o" % 512, b"x") + b"9" * 512, "is neither a zip nor a tar file"),
        (tar_header(b"x", b"5", b"x") + b"0 a=b".ljust(512, b"\0"), "is neither a zip nor a tar file"),
        (tar_header(b"x", b"13", b"x") + b"11 size=-1\n".ljust(512, b"\0") + tar_header(b"A.jpg", b"0"), "has a size that"),
        (tar_header(b"A.jpg", b"0") + b"x" * 512, "tar header at byte 512 is damaged"),
        # tarfile calls itself for each extended header
        ((tar_header(b"x", b"16", b"x") + b"14 path=A.jpg\n".ljust(512, b"\0")) * 5_000, "is neither a zip nor a tar"),
    ],
)  # fmt: skip
def test_hostile_tar(tmp_path: Path, blocks: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(blocks)
    with pytest.raises(ArtifactError, match=message):
        ImageArchive(tmp_path / "a.tar", [], ["A"])
    with pytest.raises(UnusableError, match=message):
        check_archive(tmp_path / "a.tar")


def test_a_sparse_file_in_a_tar(tmp_path: Path) -> None:
    data = tar_header(b"A.jpg", b"0", b"S") + tar_header(b"B.jpg", b"1") + b"b".ljust(512, b"\0") + bytes(1_024)
    (tmp_path / "a.tar").write_bytes(data)
    archive = ImageArchive(tmp_path / "a.tar", [], ["A", "B"])
    assert (of(archive, "A"), of(archive, "B")) == ("unsupported", b"b")


def test_the_size_of_a_link_says_nothing(tmp_path: Path) -> None:
    """Old writers note the size of what a hard link leads to."""
    data = tar_header(b"A.jpg", b"4000", b"1") + tar_header(b"B.jpg", b"1") + b"b".ljust(512, b"\0") + bytes(1_024)
    (tmp_path / "a.tar").write_bytes(data)
    archive = ImageArchive(tmp_path / "a.tar", [], ["A", "B"])
    assert (of(archive, "A"), of(archive, "B")) == (None, b"b")


def test_a_size_from_an_extended_header(tmp_path: Path) -> None:
    """It stands there where it is too large for the header proper, whose own size then says nothing."""
    pax = tar_header(b"x", b"%o" % 10, b"x") + b"10 size=3\n".ljust(512, b"\0")
    data = pax + tar_header(b"A.jpg", b"777") + b"abc".ljust(512, b"\0") + tar_header(b"B.jpg", b"1") + b"b".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(data + bytes(1_024))
    archive = ImageArchive(tmp_path / "a.tar", [], ["A", "B"])
    assert (of(archive, "A"), of(archive, "B")) == (b"abc", b"b")


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is read with the resource module")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_memory_of_many_entries(tmp_path: Path, kind: str) -> None:
    """60,000 of them, of which two are wanted, or none is."""
    num_entries = 60_000
    path = tmp_path / f"a.{kind}"
    with path.open("wb") as stream:
        if kind == "tar":
            for number in range(num_entries // 4):
                stream.write(tar_header(b"images/%09d.jpg" % number, b"0"))
            stream.write(bytes(1_024))
        else:
            stream.write(b"PK\x03\x04")
            for number in range(num_entries):
                stream.write(b"PK\x01\x02" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 20, 200, 0, 0, 0, 0, 0))
                stream.write(b"images/%09d.jpg" % number + bytes(200))
            size = stream.tell() - 4
            stream.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, size, 4, 0))
    code = f"""
        import resource
        from pathlib import Path
        from sda_core.fetch.archives import ImageArchive, check_archive
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        archive = ImageArchive(Path({str(path)!r}), ["images/000000007.jpg"], ["000000009"])
        assert archive.of("000000009") is not None
        check_archive(archive.path)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (1024 if {sys.platform != "darwin"} else 1 << 20))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= {"zip": 80, "tar": 8}[kind]


def test_a_zip_directory_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with path.open("wb") as stream:
        stream.write(b"PK\x03\x04")
        stream.seek(200 << 20)
        stream.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 150 << 20, 50 << 20, 0))
    with pytest.raises(ArtifactError, match="its directory or a header in it has more than the 1"):
        ImageArchive(path, [], ["A"])
