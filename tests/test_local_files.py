"""Which local paths DVC watches, what is refused, and what is told of sources that changed."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from ruamel.yaml import YAML

from sda_core.artifacts import ITEMS
from sda_core.errors import ConfigError, DownloadError
from sda_core.fetch.download import changed_sources, download, verify
from sda_core.fetch.images import changed_images, fetch_images, linked_folders
from sda_core.image_store import read_images
from sda_core.local_files import IMAGES, NO_LOCAL_FILE, OUTPUTS, RAW, check, user_folder, watched
from sda_core.params import AmazonDataset, DownloadParams, FetchImagesParams, parse_params
from tests.sections import short_ladder

USES = (*RAW, *IMAGES, "backbone")
NOTHING = dict.fromkeys(USES, NO_LOCAL_FILE)
SETTINGS = DownloadParams(timeout_seconds=5.0, num_retries=0, backoff_seconds=0.0, max_file_bytes=10_000_000)


def dataset(**changes: Any) -> dict[str, Any]:
    return {
        "source": "amazon",
        "edition": 2023,
        "category": "Mine",
        "reviews": ["https://example.org/r.jsonl"],
        "metadata": ["https://example.org/m.jsonl"],
        "image_archive": None,
        "reviews_sha256": None,
        "metadata_sha256": None,
        "image_archive_sha256": None,
        "image_folder": None,
        "local_folder": None,
        **changes,
    }


def amazon(**changes: Any) -> AmazonDataset:
    data = dataset(**changes)
    return AmazonDataset.model_validate(
        {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    )


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A shop's folder in a project folder, with what else may lie there."""
    folder = tmp_path / "datasets" / "Möbel & mehr, 1"
    (folder / "images").mkdir(parents=True)
    (folder / "r.jsonl").write_text('{"user_id": "u"}\n')
    (folder / "m.jsonl").write_text('{"parent_asin": "i"}\n')
    (folder / "images" / "i.jpg").write_bytes(b"image")
    (folder / "notes.txt").write_text("of no concern")
    return folder


def test_a_folder_as_the_params_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_folder(None, tmp_path, "here") is None
    assert user_folder("photos", tmp_path, "here") == tmp_path / "photos"
    assert user_folder("~/photos", tmp_path, "here") == tmp_path / "home" / "photos"
    assert user_folder(str(tmp_path / "a"), Path("root"), "here") == tmp_path / "a"
    with pytest.raises(DownloadError, match="here: '~nobody-at-all/x' cannot be resolved"):
        user_folder("~nobody-at-all/x", tmp_path, "here")


def test_addresses_and_the_built_in_shop_have_nothing_to_watch(tmp_path: Path) -> None:
    assert watched({"source": "demo"}, {"kind": "nano"}, tmp_path) == NOTHING
    assert watched(dataset(), {"kind": "qwen2_5_vl", "name": "Qwen/Qwen2.5-VL-7B-Instruct"}, tmp_path) == NOTHING


@pytest.mark.parametrize("form", ["absolute", "relative", "home", "slash at the end"])
def test_a_local_folder(tmp_path: Path, shop: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    relative = shop.relative_to(tmp_path).as_posix()
    text = {"absolute": str(shop), "relative": relative, "home": f"~/{relative}", "slash at the end": f"{shop}/"}[form]
    place = relative if form == "relative" else str(shop)
    assert watched(dataset(local_folder=text), {}, tmp_path) == NOTHING | {
        "reviews": f"{place}/r.jsonl",
        "metadata": f"{place}/m.jsonl",
        "local_folder": place,
    }


def test_paths_and_urls_without_a_local_folder(tmp_path: Path, shop: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    found = watched(
        dataset(
            reviews=["https://example.org/r.jsonl", "nowhere/r.jsonl", (shop / "r.jsonl").as_uri(), "other.jsonl"],
            metadata=[str(shop / "m.jsonl"), "https://example.org/m.jsonl"],
            image_archive=["images.zip"],
            image_folder=str(shop / "images"),
        ),
        {"name": str(shop)},
        tmp_path,
    )
    assert found == {
        "reviews": str(shop / "r.jsonl"),
        "metadata": str(shop / "m.jsonl"),
        "image_archive": "images.zip",
        "local_folder": NO_LOCAL_FILE,
        "local_images": NO_LOCAL_FILE,
        "image_folder": str(shop / "images"),
        "backbone": str(shop),
    }


def test_a_file_or_folder_that_is_not_there_is_left_to_the_stage_to_tell(tmp_path: Path, shop: Path) -> None:
    (shop / "m.jsonl").unlink()
    assert watched(dataset(local_folder=str(shop)), {}, tmp_path)["metadata"] == NO_LOCAL_FILE
    assert watched(dataset(local_folder="/no/such/folder", image_folder="~nobody-at-all/x"), {}, tmp_path) == NOTHING
    assert watched(dataset(local_folder="a\0b", reviews=["file://host/r.jsonl", "x" * 5000]), {}, tmp_path) == NOTHING


@pytest.mark.parametrize("broken", [{"reviews": 3, "local_folder": 7}, {"reviews": [None, {}]}, {"source": None}, {}])
def test_invalid_params_are_left_to_their_reader(tmp_path: Path, broken: dict[str, Any]) -> None:
    assert watched(broken, {"name": 3}, tmp_path) == NOTHING


def test_linked_images_are_watched_by_themselves_since_dvc_looks_behind_no_inner_link(tmp_path: Path, shop: Path) -> None:
    (shop / "images").rename(tmp_path / "elsewhere")
    (shop / "images").symlink_to(tmp_path / "elsewhere")
    found = watched(dataset(local_folder=str(shop)), {}, tmp_path)
    assert (found["local_folder"], found["local_images"]) == (str(shop), str(shop / "images"))
    assert linked_folders(shop) == [shop / "images"]


@pytest.mark.parametrize("folder", [".", "..", "datasets/.."])
def test_a_folder_that_holds_the_pipeline_s_own_outputs_would_be_a_cycle(tmp_path: Path, folder: str) -> None:
    project = tmp_path / "project"
    for name in ("data/raw", "images", "datasets"):
        (project / name).mkdir(parents=True)
    found = watched(dataset(local_folder=folder), {}, project)
    assert found["local_folder"] == NO_LOCAL_FILE
    assert found["local_images"] == ("images" if folder == "." else "datasets/../images" if folder != ".." else NO_LOCAL_FILE)


def test_the_outputs_are_those_of_the_pipeline(repository: Path) -> None:
    text = (repository / "dvc.yaml").read_text(encoding="utf-8")
    stages = YAML(typ="safe").load(text)["stages"]
    outs = [out for stage in stages.values() for out in stage.get("do", stage)["outs"]]
    folders = {(out if isinstance(out, str) else next(iter(out))).split("/$")[0] for out in outs}
    assert all(f"{folder}/".startswith(tuple(f"{output}/" for output in OUTPUTS)) for folder in folders - {"comparisons.json"})
    assert all(any(f"{folder}/".startswith(f"{output}/") for folder in folders) for output in OUTPUTS)


def test_hydra_fills_the_section_in(repository: Path, shop: Path) -> None:
    folder = str(shop)
    quoted = [f"dataset.local_folder='{folder}'", 'dataset.reviews=["x/r.jsonl"]', "dataset.metadata=[m.jsonl]"]
    with initialize_config_dir(str(repository / "conf"), version_base=None):
        config = compose("config", overrides=["dataset=movies", *quoted])
    OmegaConf.resolve(config)
    assert dict(config.local_files) == NOTHING | {
        "reviews": f"{folder}/r.jsonl",
        "metadata": f"{folder}/m.jsonl",
        "local_folder": folder,
    }


def test_a_section_that_does_not_fit_is_refused_in_one_line(repository: Path, shop: Path) -> None:
    data = short_ladder(YAML(typ="safe").load((repository / "params.yaml").read_text(encoding="utf-8")))
    check(parse_params(data, "params.yaml"), repository, USES)
    data["dataset"] = dataset(local_folder=str(shop))
    with pytest.raises(ConfigError, match="local_files") as refused:
        check(parse_params(data, "params.yaml"), repository, USES)
    for use, path in (("reviews", shop / "r.jsonl"), ("metadata", shop / "m.jsonl"), ("local_folder", shop)):
        assert f"{use} should be '{path}' (got '{NO_LOCAL_FILE}')" in str(refused.value)
    assert "dvc exp run" in str(refused.value)
    data["local_files"] = watched(data["dataset"], {}, repository)
    check(parse_params(data, "params.yaml"), repository, USES)
    data["dataset"] = dataset()
    check(parse_params(data, "params.yaml"), repository, ["backbone"])
    with pytest.raises(ConfigError, match=f"reviews should be '{NO_LOCAL_FILE}'"):
        check(parse_params(data, "params.yaml"), repository, RAW)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"local_folder": "data"}, "dataset.local_folder: data/images is inside data/images"),
        ({"local_folder": "data/raw"}, "dataset.local_folder: data/raw is inside data/raw"),
        ({"local_folder": "link"}, "dataset.local_folder: link is inside data/images"),
        ({"image_folder": "data/images"}, "dataset.image_folder: data/images is inside data/images"),
        ({"image_folder": "metrics/x"}, "dataset.image_folder: metrics/x is inside metrics"),
        ({"image_folder": "."}, "dataset.image_folder: . contains data/raw"),
        ({"reviews": ["data/filtered/r.jsonl"]}, "dataset.reviews: data/filtered/r.jsonl is inside data/filtered"),
    ],
)
def test_files_of_the_user_in_an_output_are_rejected_before_they_are_removed(
    repository: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    for name in OUTPUTS:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("data/images")
    data = short_ladder(YAML(typ="safe").load((repository / "params.yaml").read_text(encoding="utf-8")))
    data["dataset"] = dataset(**changes)
    data["local_files"] = watched(data["dataset"], {}, tmp_path)
    for uses in (RAW, IMAGES, ["backbone"]):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            check(parse_params(data, "params.yaml"), tmp_path, uses)


def test_a_shop_in_the_project_folder_itself_is_accepted(repository: Path, tmp_path: Path) -> None:
    data = short_ladder(YAML(typ="safe").load((repository / "params.yaml").read_text(encoding="utf-8")))
    data["dataset"] = dataset(local_folder=".")
    data["local_files"] = watched(data["dataset"], {}, tmp_path)
    check(parse_params(data, "params.yaml"), tmp_path, USES)


def test_a_backbone_in_an_output_is_rejected_and_the_name_of_a_hub_is_not(repository: Path, tmp_path: Path) -> None:
    data = short_ladder(YAML(typ="safe").load((repository / "params.yaml").read_text(encoding="utf-8")))
    backbone = YAML(typ="safe").load((repository / "conf/backbone/qwen2_5_vl_7b.yaml").read_text(encoding="utf-8"))
    data["backbone"] = {**backbone, "name": "models/mine"}
    check(parse_params(data, "params.yaml"), tmp_path, ["backbone"])
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"backbone\.name: models/mine is inside models"):
        check(parse_params(data, "params.yaml"), tmp_path, ["backbone"])


# ------------------------------------------------------------------------------------------------ the copies
@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_local_folder_that_is_not_there_is_named_itself(tmp_path: Path, kind: str) -> None:
    """Not each file in it, and not the addresses, which are not tried."""
    folder, raw = tmp_path / "shop", tmp_path / "data" / "raw"
    if kind == "file":
        folder.write_text("")
    mine = amazon(reviews=["https://shop.example/r.jsonl"], metadata=["m.jsonl"], local_folder="shop")
    problem = "is not a folder" if kind == "file" else "there is no such folder"
    with pytest.raises(
        DownloadError, match=re.escape(f"dataset.local_folder: {problem} ({folder}); correct the path, or set it")
    ):
        download(mine, SETTINGS, raw, tmp_path)


def test_a_changed_source_is_told_and_taken(tmp_path: Path, shop: Path) -> None:
    raw, mine = tmp_path / "data" / "raw", amazon(reviews=["r.jsonl"], metadata=["m.jsonl"], local_folder=str(shop))
    download(mine, SETTINGS, raw, tmp_path)
    assert changed_sources(raw, tmp_path) == []
    os.utime(shop / "r.jsonl", (1, 1))
    assert changed_sources(raw, tmp_path) == []
    for text in ('{"user_id": "v"}\n', '{"user_id": "v"}\n{"user_id": "w"}\n'):  # of the same length, and longer
        (shop / "r.jsonl").write_text(text)
        problem = f"its local source {shop / 'r.jsonl'} has changed since it was copied; run `dvc repro`, which takes it"
        assert changed_sources(raw, tmp_path) == [f"r.jsonl: {problem}"]
        assert [verdict.ok for verdict in verify(raw, tmp_path)] == [False, True]
        assert all(verdict.ok for verdict in verify(raw))
        download(mine, SETTINGS, raw, tmp_path)
        assert (raw / "r.jsonl").read_text() == text
        assert all(verdict.ok for verdict in verify(raw, tmp_path))
    (shop / "m.jsonl").unlink()
    gone = f"its local source {shop / 'm.jsonl'} is gone; restore it, or change `dataset`"  # `dvc repro` would not help
    assert changed_sources(raw, tmp_path) == [f"m.jsonl: {gone}"]
    assert [verdict.line for verdict in verify(raw, tmp_path) if not verdict.ok] == [f"{raw / 'm.jsonl'}: {gone}"]
    with pytest.raises(DownloadError, match=r"params.yaml: dataset.metadata: no source has the file .*there is no such file"):
        download(mine, SETTINGS, raw, tmp_path)
    (shop / "m.jsonl").write_text('{"parent_asin": "i"}\n')
    kept = download(mine, SETTINGS, raw, tmp_path)
    shop.rename(tmp_path / "away")  # as on another machine
    assert changed_sources(raw, tmp_path) == []
    assert download(mine, SETTINGS, raw, tmp_path) == kept


def test_the_first_local_file_that_can_be_used_is_taken_whatever_was_taken_before(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "raw"
    (tmp_path / "m.jsonl").write_text("{}\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "r.jsonl").write_text('{"from": "b"}\n')
    mine = amazon(reviews=["a/r.jsonl", "b/r.jsonl"], metadata=["m.jsonl"])

    def taken() -> str:
        assert watched(mine.model_dump(), {}, tmp_path)["reviews"] in {"a/r.jsonl", "b/r.jsonl"}
        return download(mine, SETTINGS, raw, tmp_path)["files"][0]["source"]

    assert taken() == "b/r.jsonl"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "r.jsonl").write_text("<html>not yet</html>")
    assert taken() == "b/r.jsonl"
    (tmp_path / "a" / "r.jsonl").write_text('{"from": "a"}\n')
    assert taken() == "a/r.jsonl"
    (tmp_path / "a" / "r.jsonl").unlink()
    assert taken() == "b/r.jsonl"


def test_a_refused_local_file_before_the_one_that_is_taken_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (("a/r.jsonl", "<html>"), ("b/r.jsonl", "{}\n"), ("m.jsonl", "{}\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    download(amazon(reviews=["a/r.jsonl", "b/r.jsonl"], metadata=["m.jsonl"]), SETTINGS, tmp_path / "data" / "raw", tmp_path)
    assert "DVC watches a/r.jsonl, which was rejected, so it will not see a change of b/r.jsonl" in caplog.text


# ---------------------------------------------------------------------------------------------------- images
FETCH = FetchImagesParams(
    num_workers=2,
    max_per_host=1,
    timeout_seconds=5.0,
    num_retries=0,
    backoff_seconds=0.0,
    max_bytes=200_000,
    max_pixels=1_000_000,
    stored_pixels=4096,
    shard_rows=2,
)


def items(references: dict[str, list[str]]) -> pl.DataFrame:
    empty: dict[str, Any] = dict.fromkeys(ITEMS.columns, None)
    rows = (
        {"item_id": number, "raw_item_id": name, "image_references": found, "title": "", "has_metadata": True}
        for number, (name, found) in enumerate(references.items(), 1)
    )
    return pl.DataFrame([empty | row for row in rows], schema=dict(ITEMS.columns))


def write_image(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (red, 0, 0)).save(path)


def write_manifest(raw: Path) -> None:
    raw.mkdir(parents=True)
    (raw / "manifest.json").write_text('{"files": []}')


def test_images_that_changed_came_or_went_are_told_and_read_again(tmp_path: Path) -> None:
    raw, shop, other, out = (tmp_path / name for name in ("raw", "shop", "other", "out"))
    write_manifest(raw)
    for number in range(4):
        write_image(shop / "images" / f"i{number}.png", number)
    write_image(other / "deep" / "i5.png", 5)
    table = items({f"i{number}": ["deep/i5.png"] if number == 5 else [] for number in range(7)})
    places = (table, raw, shop, other, FETCH, out)
    assert fetch_images(*places)["num_ok"] == 5
    assert changed_images(*places) == []
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}

    before = (shop / "images" / "i0.png").stat()
    write_image(shop / "images" / "i0.png", 200)
    os.utime(shop / "images" / "i0.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # by its time it is the old one
    (shop / "images" / "i1.png").unlink()
    write_image(shop / "images" / "i4.png", 4)
    write_image(other / "deep" / "i5.png", 55)
    os.utime(shop / "images" / "i2.png", (1, 1))
    assert changed_images(*places) == ["i0", "i1", "i4", "i5"]
    assert fetch_images(*places)["num_ok"] == 5
    assert changed_images(*places) == []
    kept = {path.name for path in out.glob("*.parquet") if shards.get(path.name) == path.stat().st_mtime_ns}
    assert kept == {"shard-00001.parquet", "shard-00003.parquet"}  # of i2, i3 and of i6
    stored = {row["raw_item_id"]: row for frame in read_images(out) for row in frame.iter_rows(named=True)}
    assert Image.open(io.BytesIO(stored["i0"]["image"])).getpixel((16, 16)) == pytest.approx((200, 0, 0), abs=6)
    assert stored["i1"]["status"] == "missing_url"


def test_an_image_behind_a_link_inside_the_folder_is_refused(tmp_path: Path) -> None:
    raw, shop, out = tmp_path / "raw", tmp_path / "shop", tmp_path / "out"
    write_manifest(raw)
    for name in ("images", "photos", "unrelated"):
        write_image(tmp_path / "elsewhere" / name / "i0.png", 1)
    shop.mkdir()
    for name in ("images", "unrelated"):
        (shop / name).symlink_to(tmp_path / "elsewhere" / name)
    assert fetch_images(items({"i0": []}), raw, shop, None, FETCH, out)["num_ok"] == 1
    (shop / "photos").symlink_to(tmp_path / "elsewhere" / "photos")
    with pytest.raises(DownloadError, match=r"photos: is a link to a folder, behind which DVC does not see .*image_folder"):
        fetch_images(items({"i0": [], "i1": ["photos/i0.png"]}), raw, shop, None, FETCH, out)
    assert fetch_images(items({"i0": [], "i1": ["i0.png"]}), raw, shop, shop / "photos", FETCH, out)["num_ok"] == 2
