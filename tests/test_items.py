"""Items as batches of prompts and images."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from sda_core.errors import ArtifactError
from sda_core.image_store import ImageRow, ImageStore, coverage_path, shard_path, write_shard
from sda_core.items import ItemSource, placeholder_image

MissingImage = Literal["placeholder", "text_only"]


@dataclass
class MemoryStore:
    """An image store in memory."""

    images: dict[int, bytes]
    reads: list[int] = field(default_factory=list)

    def get(self, item_id: int) -> bytes | None:
        self.reads.append(item_id)
        return self.images.get(item_id)

    def status(self, item_id: int) -> str:
        return "ok" if item_id in self.images else "missing_url"


def encoded(colour: str, side: int = 20, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, kind)
    return buffer.getvalue()


def source_of(images: dict[int, bytes], num_items: int = 4, missing_image: MissingImage = "placeholder") -> ItemSource:
    texts = [f"item {place}" for place in range(1, num_items + 1)]
    return ItemSource(np.arange(1, num_items + 1), texts, "A picture.", "hash", MemoryStore(images), missing_image)


def test_batch_keeps_the_asked_order():
    source = source_of({2: encoded("red"), 4: encoded("blue")})
    batch = source.batch(np.array([3, 0, 1, 3]))
    assert batch.item_ids.tolist() == [4, 1, 2, 4]
    assert batch.item_ids.dtype == np.int32
    assert batch.texts == ["item 4", "item 1", "item 2", "item 4"]
    colours = [image.getpixel((0, 0)) for image in batch.images if image is not None]
    assert colours[0] == colours[3] == (0, 0, 255)
    assert colours[2] == (255, 0, 0)
    assert len(source) == 4


def test_placeholder_stands_in_but_is_no_image():
    source = source_of({2: encoded("red")})
    assert source.has_image.tolist() == [False, True, False, False]
    assert source.shows_image.all()
    shown = [image.tobytes() for image in source.images(np.arange(4)) if image is not None]
    assert len(shown) == 4
    assert shown[0] == shown[2] == placeholder_image().tobytes()
    assert shown[1] != shown[0]


def test_text_only_shows_nothing():
    source = source_of({2: encoded("red")}, missing_image="text_only")
    assert [image is None for image in source.images(np.arange(4))] == [True, False, True, True]
    assert source.has_image.tolist() == source.shows_image.tolist() == [False, True, False, False]


def test_image_only_shows_no_text_of_items_without_one():
    has_text = np.array([True, False, True])
    given = np.arange(1, 4), ["a", "unknown", "c"], "p", "h", MemoryStore({1: b""}), "placeholder"
    source = ItemSource(*given, has_text, "image_only")
    assert source.shows_text.tolist() == source.has_text.tolist() == [True, False, True]
    source = ItemSource(*given, has_text)
    assert source.shows_text.all()
    assert source.has_text.tolist() == [True, False, True]
    assert ItemSource(*given).has_text.all()
    with pytest.raises(ArtifactError, match=r"one flag per item \(got 2 for 3 items\)"):
        ItemSource(*given, has_text[:2])


def test_placeholder_is_fixed_grey_noise():
    image = placeholder_image()
    pixels = np.asarray(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert pixels.std() > 5, "noise"
    assert placeholder_image().tobytes() == image.tobytes()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("GIF", "P"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_every_image_becomes_rgb(kind, mode):
    colour = {"L": 128, "P": 3, "CMYK": (0, 0, 0, 0)}.get(mode, "red")
    image = source_of({1: encoded(colour, kind=kind, mode=mode)}).images(np.array([0]))[0]
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (20, 20))


def test_images_are_read_when_asked_for():
    store = MemoryStore({1: encoded("red"), 2: encoded("blue")})
    source = ItemSource(np.arange(1, 3), ["a", "b"], "p", "h", store, "placeholder")
    source.texts(np.arange(2))
    assert store.reads == []
    source.images(np.array([1]))
    assert store.reads == [2]


def test_the_stored_images(tmp_path):
    rows = [
        ImageRow(place, f"B{place}", "ok" if place != 2 else "http_404", encoded("red") if place != 2 else None, 20, 20)
        for place in (1, 2, 3)
    ]
    write_shard(shard_path(tmp_path, 0), rows, ["a", "b", "c"])
    coverage_path(tmp_path).write_text("{}")
    source = ItemSource(np.arange(1, 4), ["a", "b", "c"], "p", "h", ImageStore(tmp_path), "text_only")
    assert source.has_image.tolist() == [True, False, True]
    first, second, third = source.images(np.arange(3))
    assert second is None
    assert first is not None
    assert third is not None
    assert first.getpixel((0, 0)) == third.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("damaged", [b"", b"no image", encoded("red")[:40], encoded("red", kind="JPEG", side=200)[:300]])
def test_damaged_image_names_its_item(damaged):
    source = source_of({3: damaged})
    with pytest.raises(ArtifactError, match="image of item 3: cannot be decoded"):
        source.images(np.array([2]))


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ArtifactError, match="image of item 1"):
        source_of({1: encoded("red")}).images(np.array([0]))


def test_image_that_vanished():
    source = source_of({1: encoded("red")})
    source.store.images.clear()  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match="is not there"):
        source.images(np.array([0]))


@pytest.mark.parametrize("ids", [[0, 1], [2, 1], [1, 1], [-1, 2], [[1, 2]]])
def test_ids_that_are_not_ids(ids):
    with pytest.raises(ArtifactError, match="ascending"):
        ItemSource(np.array(ids), ["a", "b"], "p", "h", MemoryStore({}), "placeholder")


def test_one_text_an_item():
    with pytest.raises(ArtifactError, match="got 1 texts for 2 items"):
        ItemSource(np.array([1, 2]), ["a"], "p", "h", MemoryStore({}), "placeholder")


def test_no_items():
    source = ItemSource(np.zeros(0, dtype=np.int32), [], "p", "h", MemoryStore({}), "placeholder")
    assert len(source) == 0
    assert source.batch(np.zeros(0, dtype=int)).texts == []


def test_content_keys_tell_what_is_shown() -> None:
    class Store:
        images = {1: b"a", 2: b"a", 3: b"b", 5: b"at", 6: b"a"}  # noqa: RUF012 (a test's own)

        def get(self, item_id: int) -> bytes | None:
            return self.images.get(item_id)

        def status(self, item_id: int) -> str:
            return "ok" if item_id in self.images else "missing_url"

    texts = [
        "tea",
        "tea",
        "tea",
        "tea",
        "ea",
        "pot",
        "tea",
    ]  # image and text of the fifth are those of the first, cut elsewhere
    source = ItemSource(np.arange(1, 8), texts, "", "", Store(), "placeholder")
    keys = source.content_keys(np.arange(7))
    assert keys[0] == keys[1]
    assert keys[3] == keys[6]  # no image both
    assert len(set(keys.tolist())) == 5
    assert np.array_equal(source.content_keys(np.array([6, 0])), keys[[6, 0]])
