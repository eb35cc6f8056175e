"""Where an item's image is looked for, and in which order."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from sda_core.fetch.archives import Entry
from sda_core.fetch.image_names import ItemNames
from sda_core.fetch.image_sources import Address, Finder, Item, LocalFile, Nothing, open_archive
from sda_core.params import FetchImagesParams

PARAMS = FetchImagesParams(
    num_workers=1,
    max_per_host=1,
    timeout_seconds=1.0,
    num_retries=0,
    backoff_seconds=0.0,
    max_bytes=1_000,
    max_pixels=1_000,
    stored_pixels=1_000,
    shard_rows=1,
)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A local folder, a folder of images and an archive, each with an image named after A and one at photos/A.png."""
    local, images = tmp_path / "local", tmp_path / "images"
    for folder in (local / "images", local / "photos", images / "photos"):
        folder.mkdir(parents=True)
    for path in (local / "images" / "A.jpg", local / "photos" / "A.png", images / "A.webp", images / "photos" / "A.png"):
        path.write_bytes(str(path).encode())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("photos/A.png", b"by path")
        archive.writestr("0/A.jpg", b"by name")
    return local, images, tmp_path / "x.zip"


def finder(item: Item, local: Path | None, images: Path | None, archive: Path | None) -> Finder:
    opened = None if archive is None else open_archive(archive, [item])
    return Finder(local, images, opened, PARAMS, ItemNames([item.raw_item_id]))


ITEM = Item(1, "A", ("http://h/A.jpg", "photos/A.png", "none.png", "//h/B.jpg", "http://h/A.jpg", "../x.png", ""))


def test_order(places: tuple[Path, Path, Path]) -> None:
    local, images, archive = places
    addresses = [Address("http://h/A.jpg"), Address("https://h/B.jpg")]
    nothing = [Nothing("missing_file"), Nothing("missing_url")]
    assert finder(ITEM, None, None, None).sources(ITEM) == [*nothing, *addresses]
    assert finder(ITEM, None, images, None).sources(ITEM) == [
        LocalFile(images / "A.webp"),
        LocalFile(images / "photos" / "A.png"),
        *nothing,
        *addresses,
    ]
    assert finder(ITEM, local, images, None).sources(ITEM) == [
        LocalFile(local / "images" / "A.jpg"),
        LocalFile(images / "A.webp"),
        LocalFile(local / "photos" / "A.png"),
        *nothing,
    ], "with a local folder nothing is fetched"
    found = finder(ITEM, None, None, archive)
    by_path, *between, by_name, _, _ = found.sources(ITEM)
    assert isinstance(by_path, Entry)
    assert isinstance(by_name, Entry)
    assert (found.read(by_path), found.read(by_name), between) == (b"by path", b"by name", nothing)
    (images / "photos" / "A.png").unlink()
    both = finder(ITEM, None, images, archive).sources(ITEM)
    assert (both[0], both[1]) == (LocalFile(images / "A.webp"), by_path), "what the folder does not have, the archive may"


@pytest.mark.parametrize("raw_id", ["../A", "a/A", "", ".", "..", "A\0", "A\n", "C:A", "x" * 300])
def test_odd_ids_name_nothing(places: tuple[Path, Path, Path], raw_id: str) -> None:
    local, images, archive = places
    (images / "a").mkdir()
    (images / "a" / "A.jpg").write_bytes(b"x")
    (images.parent / "A.jpg").write_bytes(b"x")
    item = Item(1, raw_id, ())
    assert finder(item, local, images, archive).sources(item) == []


def test_what_an_image_depends_on(places: tuple[Path, Path, Path]) -> None:
    """Its contents wherever they lie, not where they lie; and nothing that has no influence on it."""
    local, images, archive = places
    item = Item(1, "A", ())
    keys: list[str] = []

    def key(local: Path | None, images: Path | None, archive: Path | None, params: FetchImagesParams = PARAMS) -> str:
        opened = None if archive is None else open_archive(archive, [item])
        found = Finder(local, images, opened, params, ItemNames(["A"]))
        keys.append(found.key(item, found.sources(item)))
        return keys[-1]

    before = key(None, images, None)
    assert key(None, images, None, PARAMS.model_copy(update={"num_workers": 9, "timeout_seconds": 9.0})) == before
    assert key(None, images, None, PARAMS.model_copy(update={"stored_pixels": 999})) != before
    (images / "A.webp").write_bytes(b"other")
    assert key(None, images, None) != before
    (images / "A.webp").rename(images / "A.png")
    assert key(None, images, None) == keys[-2]
    assert key(local, images, None) != before
    with zipfile.ZipFile(archive) as old:
        contents = old.read("0/A.jpg")
    zipped = key(None, None, archive)
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr("more/B.jpg", b"more")
        new.writestr("1/A.jpg", contents)
    assert key(None, None, archive) == zipped, "the archive changed, the image did not"
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr("1/A.jpg", contents.upper())
    assert key(None, None, archive) != zipped


def test_what_an_image_in_a_tar_depends_on(tmp_path: Path) -> None:
    import tarfile

    item = Item(1, "A", ())
    keys: list[str] = []
    for before, contents in ((b"", b"one"), (b"x" * 700, b"one"), (b"", b"two")):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name, data in (("before", before), ("A.jpg", contents)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        found = finder(item, None, None, tmp_path / "x.tar")
        keys.append(found.key(item, found.sources(item)))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("names", "owners"),
    [
        (["a%2Fb.jpg"], {"a%2Fb": "a%2Fb.jpg", "a/b": None}),
        (["a%2Fb.jpg", "a%252Fb.jpg"], {"a%2Fb": "a%2Fb.jpg", "a/b": None}),
        (["50%25.jpg"], {"50%25": "50%25.jpg", "50%": None}),
        (["\u00e9.jpg"], {"\u00e9": "\u00e9.jpg", "e\u0301": None}),
        (["e\u0301.png", "\u00e9.jpg"], {"\u00e9": "\u00e9.jpg", "e\u0301": "e\u0301.png"}),
        (["ABC.jpg"], {"ABC": "ABC.jpg", "abc": None}),
        (["a%2Fb.jpg"], {"a/b": "a%2Fb.jpg", "b": None}),
    ],
)
def test_one_image_file_is_one_item_s_in_folders_and_in_archives(
    names: list[str], owners: dict[str, str | None], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            (folder / name).write_bytes(b"x")
            archive.writestr(name, b"x")
    items = [Item(number, raw_id, ()) for number, raw_id in enumerate(owners, 1)]
    ids = ItemNames(owners)
    for item in items:
        owned = owners[item.raw_item_id]
        expected = [] if owned is None else [LocalFile(folder / owned)]
        assert Finder(tmp_path, None, None, PARAMS, ids).sources(item) == expected
        assert Finder(None, folder, None, PARAMS, ids).sources(item) == expected
        assert len(Finder(None, None, open_archive(tmp_path / "x.zip", items), PARAMS, ids).sources(item)) == len(expected)
