"""Files of images are found by the id of their item or by a path, as the systems of different makers write names."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sda_core.fetch.image_formats import SUFFIX_ORDER
from sda_core.fetch.image_names import ImageFolder, ItemNames, is_system_file, split_name
from sda_core.fetch.image_sources import Finder, Item, LocalFile, Nothing, open_archive
from sda_core.params import FetchImagesParams

PARAMS = FetchImagesParams(
    num_workers=1, max_per_host=1, timeout_seconds=1.0, num_retries=0, backoff_seconds=0.0, max_bytes=1_000, max_pixels=1_000,
    stored_pixels=1_000, shard_rows=1,
)  # fmt: skip
NFC, NFD = (unicodedata.normalize(form, "Café Größe") for form in ("NFC", "NFD"))


def has_case(folder: Path) -> bool:
    """Whether the file system tells upper from lower case."""
    (folder / "case").write_bytes(b"")
    return not (folder / "CASE").exists()


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def found(finder: Finder, item_id: str, *references: str) -> list[str]:
    """Contents of the local files of an item, best first; the name of a status for a reference that leads nowhere."""
    contents: list[str] = []
    for source in finder.sources(Item(1, item_id, references)):
        match source:
            case LocalFile(path):
                contents.append(path.read_text(encoding="utf-8"))
            case Nothing(status):
                contents.append(status)
            case _:
                raise AssertionError(source)
    return contents


@pytest.mark.parametrize("suffix", SUFFIX_ORDER)
def test_every_extension_in_any_case(tmp_path: Path, suffix: str) -> None:
    for number, spelled in enumerate((suffix, suffix.upper(), suffix.title())):
        folder = put(tmp_path / str(number), f"images/sku-17{spelled}", f"sku-17{spelled}")
        assert found(Finder(folder, None, None, PARAMS, ItemNames(["sku-17"])), "sku-17") == [f"images/sku-17{spelled}"]
        assert found(Finder(None, folder, None, PARAMS, ItemNames(["sku-17"])), "sku-17") == [f"sku-17{spelled}"]


@pytest.mark.parametrize(
    "other", ["sku-17", "sku-17.txt", "sku-17.jpg.bak", "SKU-17.jpg", "sku-170.jpg", "._sku-17.jpg", "sku-17.jpgx"]
)
def test_what_is_another_file(tmp_path: Path, other: str) -> None:
    assert found(Finder(None, put(tmp_path, other), None, PARAMS, ItemNames(["sku-17"])), "sku-17") == []


@pytest.mark.parametrize(
    ("item_id", "name"),
    [
        ("sku 17", "sku 17.jpg"), ("sku 17", "sku%2017.jpg"), ("a/b", "a%2Fb.jpg"), ("a/b", "a%2fb.jpg"), ("50%", "50%.jpg"),
        ("50%", "50%25.jpg"), ("a%2Fb", "a%2Fb.jpg"), ("..", "...jpg"), ("a.b", "a.b.jpg"), ("x.jpg", "x.jpg.jpg"),
        ("#1 (new) & 'old'", "#1 (new) & 'old'.jpg"), (NFC, f"{NFD}.jpg"), (NFD, f"{NFC}.jpg"), (NFC, f"{NFC}.jpg"),
        ("é/ü", "%C3%A9%2F%C3%BC.jpg"), ("x" * 200, "x" * 200 + ".jpg"), ("a?b*c", "a%3Fb%2Ac.jpg"), (".", "%2E.jpg"),
    ],
)  # fmt: skip
def test_ids_of_every_kind(tmp_path: Path, item_id: str, name: str) -> None:
    if sys.platform == "win32" and name == "...jpg":
        pytest.skip("no file name there")
    assert found(Finder(None, put(tmp_path, name), None, PARAMS, ItemNames([item_id])), item_id) == [name]


def test_of_several_files_the_same_one_counts_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = ["A.jpg", "A.JPG", "A.Jpg", "A.jpeg", "A.png", "A.webp", "A.bmp", "A.gif", "A.tiff", "A.heic", "A.svg"]
    for number in range(len(order)):
        names = order[number:]
        folder = put(tmp_path / str(number), *names)
        if len({name.lower() for name in names}) == len(names) or has_case(tmp_path):
            best = min(names[:2]) if names[0] == "A.JPG" else names[0]
            assert found(Finder(None, folder, None, PARAMS, ItemNames(["A"])), "A") == [best]
    finder = Finder(None, tmp_path / "3", None, PARAMS, ItemNames(["A"]))
    finder.sources(Item(1, "A", ()))
    assert finder.passed_over() == {"num_folder_no_item": 0, "num_folder_no_image": 0}
    assert "1 items match several images" in caplog.text
    assert "for A: A.jpeg" in caplog.text


def test_the_exact_id_comes_before_other_spellings(tmp_path: Path) -> None:
    folder = put(tmp_path, "50%25.jpg", "50%.heic", f"{NFD}.png", f"{NFC}.gif")
    finder = Finder(None, folder, None, PARAMS, ItemNames(["50%", NFC, NFD]))
    assert found(finder, "50%") == ["50%.heic"]
    if len({path.name for path in folder.iterdir()}) == 4:  # some file systems take both forms for one name
        assert (found(finder, NFC), found(finder, NFD)) == ([f"{NFC}.gif"], [f"{NFD}.png"])


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("images/a.jpg", "images/a.jpg"), ("./images/a.jpg", "images/a.jpg"), ("images//a.jpg", "images/a.jpg"),
        ("images/A.JPG", "images/a.jpg"), ("Images/a.Jpg", "images/a.jpg"), ("images\\a.jpg", "images/a.jpg"),
        (" images/a.jpg ", "images/a.jpg"), ("images/my%20mug.jpg", "images/my mug.jpg"),
        ("images/my mug.jpg", "images/my mug.jpg"), ("images/50%.jpg", "images/50%.jpg"), (f"p/{NFC}.jpg", f"p/{NFD}.jpg"),
        (f"p/{NFD}.jpg", f"p/{NFC}.JPG"), ("deep/er/b/x.png", "Deep/er/B/X.PNG"), ("x.png", "x.png"), ("red:b.jpg", "red:b.jpg"),
    ],
)  # fmt: skip
def test_references(tmp_path: Path, reference: str, name: str) -> None:
    if sys.platform == "win32" and ":" in name:
        pytest.skip("no file name there")
    folder = put(tmp_path, name, "images/other.jpg")
    for finder in (Finder(folder, None, None, PARAMS, ItemNames([])), Finder(None, folder, None, PARAMS, ItemNames([]))):
        assert found(finder, "no-such", reference) == [name]


def test_a_reference_may_begin_with_the_folder_s_own_name(tmp_path: Path) -> None:
    folder = put(tmp_path / "Images", "a.jpg", "images/b.jpg", "b.jpg")
    finder = Finder(None, folder, None, PARAMS, ItemNames(["x"]))
    assert found(finder, "x", "images/a.jpg", "images/b.jpg", "a.jpg") == ["a.jpg", "images/b.jpg"]


def test_the_exact_reference_comes_before_others(tmp_path: Path) -> None:
    folder = put(tmp_path, "i/a.jpg", "i/A.jpg", "i/x%20y.jpg", "i/x y.jpg")
    finder = Finder(folder, None, None, PARAMS, ItemNames(["x"]))
    if has_case(tmp_path):
        assert found(finder, "x", "i/a.jpg", "i/A.jpg", "i/A.JPG") == ["i/a.jpg", "i/A.jpg"]
    assert found(finder, "x", "i/x%20y.jpg") == ["i/x%20y.jpg"]


@pytest.mark.parametrize(
    "reference",
    ["../secret.jpg", "images/../../secret.jpg", "..\\secret.jpg", "/secret.jpg", "%2e%2e/secret.jpg", "images", "..", "C:\\x"],
)
def test_nothing_outside_is_found(tmp_path: Path, reference: str) -> None:
    put(tmp_path, "secret.jpg", "local/images/a.jpg")
    assert found(Finder(tmp_path / "local", None, None, PARAMS, ItemNames(["../secret"])), "../secret", reference) == [
        "missing_file"
    ]
    assert found(Finder(None, tmp_path / "local", None, PARAMS, ItemNames(["../secret"])), "../secret", reference) == [
        "missing_file"
    ]


def test_the_folder_images_in_any_case(tmp_path: Path) -> None:
    assert found(Finder(put(tmp_path, "Images/A.jpg"), None, None, PARAMS, ItemNames(["A"])), "A") == ["Images/A.jpg"]


def test_links_to_files_count_and_broken_ones_do_not(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("links need a right there")
    put(tmp_path, "store/A.jpg")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "A.jpg").symlink_to(tmp_path / "store" / "A.jpg")
    (folder / "B.jpg").symlink_to(tmp_path / "none")
    (folder / "C.jpg").symlink_to(folder / "C.jpg")
    (folder / "D.jpg").mkdir()
    finder = Finder(None, folder, None, PARAMS, ItemNames("ABCD"))
    assert [found(finder, item_id) for item_id in "ABCD"] == [["store/A.jpg"], [], [], []]


def test_files_that_no_item_uses_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    put(
        tmp_path,
        *(f"images/{name}" for name in ("A.jpg", "B.JPG", "C.png", "D.png", "E.heic", "._A.jpg", ".DS_Store", "list.txt")),
    )
    put(tmp_path, "other/x.jpg", "items.jsonl")
    finder = Finder(tmp_path, None, None, PARAMS, ItemNames("AYZ"))
    for item_id, reference in (("A", ""), ("Z", "images/b.jpg"), ("Y", "other/x.jpg")):
        finder.sources(Item(1, item_id, (reference,)))
    assert finder.passed_over() == {"num_folder_no_item": 3, "num_folder_no_image": 3}
    assert "3 files do not match a kept item" in caplog.text
    assert "C.png, D.png, E.heic" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_folder_in_which_nothing_is_found_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finder = Finder(None, put(tmp_path, "a.jpg", "b.jpg"), None, PARAMS, ItemNames("A"))
    assert found(finder, "A") == []
    finder.passed_over()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 files do not match a kept item" in caplog.text


def test_an_archive_is_counted_beside_a_folder(tmp_path: Path) -> None:
    import zipfile

    item = Item(1, "A", ())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a/A.jpg", "a/B.jpg", "a/.DS_Store", "../C.jpg"):
            archive.writestr(name, b"x")
    archive = open_archive(tmp_path / "x.zip", [item])
    finder = Finder(None, put(tmp_path / "images", "B.jpg"), archive, PARAMS, ItemNames("A"))
    finder.sources(item)
    assert finder.passed_over() == {
        "num_folder_no_item": 1,
        "num_folder_no_image": 0,
        "num_archive_no_item": 1,
        "num_archive_no_image": 1,
        "num_archive_unsafe_path": 1,
        "num_archive_no_file": 0,
    }


def test_each_directory_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    put(tmp_path, *(f"images/{number}.jpg" for number in range(50)), "other/x.jpg")
    listed: list[str] = []
    scandir = os.scandir

    def counting(path: Path) -> object:
        listed.append(str(path))
        return scandir(path)

    def never(*_: object) -> None:
        raise AssertionError("a file was looked at by itself")

    monkeypatch.setattr(os, "scandir", counting)
    monkeypatch.setattr(Path, "is_file", never)
    finder = Finder(tmp_path, None, None, PARAMS, ItemNames([str(number) for number in range(100)]))
    for number in range(100):
        finder.sources(Item(number + 1, str(number), (f"images/{number}.JPG", "other/x.jpg")))
    assert sorted(listed) == sorted(map(str, (tmp_path, tmp_path / "images", tmp_path / "other")))


@given(st.text(min_size=1, max_size=8), st.sampled_from(sorted(SUFFIX_ORDER)))
def test_an_id_is_found_by_its_own_name_and_by_its_encoded_one(item_id: str, suffix: str) -> None:
    from urllib.parse import quote

    names = ItemNames([item_id, "other"])
    assert names.of(item_id) == (item_id, 0)
    try:
        encoded = quote(item_id, safe="")
    except UnicodeEncodeError:  # half a character
        return
    found_id = names.of(encoded)
    assert found_id is not None
    assert found_id[0] == item_id
    assert split_name(encoded + suffix.upper()) == (encoded, suffix.upper())


def test_files_of_the_system() -> None:
    for path in ("._a.jpg", "x/._a.jpg", "__MACOSX/a.jpg", "x/__MACOSX/y/a.jpg", ".DS_Store", "x/Thumbs.db", "x/DESKTOP.INI"):
        assert is_system_file(path)
    for path in ("a.jpg", "_.a.jpg", "__MACOSX.jpg", "x/.a.jpg", "thumbs.db.jpg"):
        assert not is_system_file(path)


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert ImageFolder(tmp_path, "", ItemNames("A")).of("A") is None
    assert "cannot be listed (Permission denied)" in caplog.text
