"""Own files that change: DVC notices by itself, in `dvc repro` and in `dvc exp run`, and runs what depends on them only."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from conftest import Project

pytestmark = pytest.mark.end_to_end

PRESET = {"interactions.jsonl": "r.jsonl", "items.jsonl": "m.jsonl", "category: My_Shop": "category: Mine"}
UP_TO_DATE = "Data and pipelines are up to date."


def write_reviews(folder: Path, num_users: int) -> None:
    rows = (
        {"user_id": f"u{user}", "parent_asin": f"i{item}", "rating": 5, "timestamp": 1700000000000 + item * 1000}
        for user in range(num_users)
        for item in range(6)
    )
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(path: Path, red: int) -> None:
    Image.new("RGB", (32, 32), (red, 0, 0)).save(path)


def new_shop(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    write_reviews(folder, 10)
    lines = (json.dumps({"parent_asin": f"i{item}", "title": f"Thing {item}"}) + "\n" for item in range(6))
    (folder / "m.jsonl").write_text("".join(lines))
    for item in range(3):
        write_image(folder / "images" / f"i{item}.png", 40 * item)
    return folder


@pytest.fixture(scope="module")
def own(new_project: Callable[[str], Project]) -> Project:
    """A project with a preset of its own, as docs/shop.md makes it."""
    project = new_project("own")
    text = (project.root / "conf" / "dataset" / "own.yaml").read_text()
    for old, new in PRESET.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (project.root / "conf" / "dataset" / "mine.yaml").write_text(text)
    project.run("git", "add", ".")
    project.run("git", "commit", "-q", "-m", "mine")
    return project


def num_users(project: Project) -> int:
    return pl.read_parquet(project.root / "data" / "filtered" / "interactions.parquet")["user_id"].n_unique()


def num_ok(project: Project) -> int:
    return json.loads((project.root / "data" / "images" / "coverage.json").read_text())["num_ok"]


def test_own_files_that_change(own: Project, tmp_path: Path) -> None:
    project, shop = own.copy(tmp_path / "project"), new_shop(tmp_path / "Möbel & mehr, neu")
    settings = ["-S", "dataset=mine", "-S", f"dataset.local_folder='{shop}'"]  # quoted, as docs/shop.md says
    experiment = ["exp", "run", *settings, "fetch_images"]
    every = {"download", "filter", "fetch_images"}
    assert project.stages_run(*experiment) == every
    assert (num_users(project), num_ok(project)) == (10, 3)

    assert project.stages_run(*experiment) == set()
    assert UP_TO_DATE in project.dvc("repro", "fetch_images").stdout
    for path in shop.rglob("*"):  # another time is no other content
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert UP_TO_DATE in project.dvc("repro", "fetch_images").stdout

    write_reviews(shop, 20)
    checked = project.run("sda", "download", "--check", check=False)
    assert checked.returncode == 1
    assert f"its local source {shop / 'r.jsonl'} has changed since it was copied" in checked.stderr
    assert project.stages_run("repro", "fetch_images") == every
    assert num_users(project) == 20
    write_reviews(shop, 15)
    assert project.stages_run(*experiment) == every
    assert num_users(project) == 15
    assert project.run("sda", "download", "--check").returncode == 0

    write_image(shop / "images" / "i0.png", 255)  # of the same size, perhaps
    verified = project.run("sda", "verify", check=False)
    assert verified.returncode == 1
    assert "1 images are not those of the local files and params now, e.g. of ['i0']" in verified.stdout
    assert project.stages_run("repro", "fetch_images") == {"fetch_images"}
    assert "6 items, 3 images, as in the local files" in project.run("sda", "verify").stdout
    write_image(shop / "images" / "i4.png", 9)
    assert project.stages_run(*experiment) == {"fetch_images"}
    assert num_ok(project) == 4
    (shop / "images" / "i1.png").unlink()
    assert project.stages_run("repro", "fetch_images") == {"fetch_images"}
    assert num_ok(project) == 3

    before = project.outputs()
    (shop / "notes.txt").write_text("of no concern")
    assert project.stages_run("repro", "fetch_images") <= {"fetch_images"}  # it looks, and finds nothing to do
    assert project.outputs() == before

    path = project.root / "params.yaml"
    edited = YAML(typ="safe").load(path.read_text())
    edited["dataset"]["local_folder"] = str(new_shop(tmp_path / "another"))
    with path.open("w") as handle:
        YAML().dump(edited, handle)
    refused = project.dvc("repro", "fetch_images", check=False)
    assert refused.returncode != 0
    assert f"reviews should be '{tmp_path / 'another' / 'r.jsonl'}' (got '{shop / 'r.jsonl'}')" in refused.stderr
    shutil.rmtree(shop)
    gone = project.dvc("exp", "run", *settings, "fetch_images", check=False)
    assert gone.returncode != 0
    assert f"there is no folder {shop}" in gone.stdout + gone.stderr


def test_an_archive_and_a_folder_of_images_without_a_local_folder(own: Project, tmp_path: Path) -> None:
    """Plain paths, file: URLs, a folder inside the project that Git ignores, links."""
    project = own.copy(tmp_path / "project")
    shop = new_shop(project.root / "datasets" / "shop")
    (tmp_path / "real images").mkdir()
    (project.root / "datasets" / "images").symlink_to(tmp_path / "real images")

    def pack(red: int) -> None:
        with zipfile.ZipFile(shop / "images.zip", "w") as archive:
            write_image(tmp_path / "i5.png", red)
            archive.write(tmp_path / "i5.png", "i5.png")

    pack(1)
    sources = {"reviews": "[datasets/shop/r.jsonl]", "metadata": f"['{(shop / 'm.jsonl').as_uri()}']"}
    sources |= {"image_archive": "[datasets/shop/images.zip]", "image_folder": "datasets/images"}
    settings = [part for name, value in sources.items() for part in ("-S", f"dataset.{name}={value}")]
    experiment = ["exp", "run", "-S", "dataset=mine", *settings, "fetch_images"]
    assert project.stages_run(*experiment) == {"download", "filter", "fetch_images"}
    assert num_ok(project) == 1
    assert UP_TO_DATE in project.dvc("repro", "fetch_images").stdout

    write_image(tmp_path / "real images" / "i0.png", 2)
    assert project.stages_run("repro", "fetch_images") == {"fetch_images"}
    assert num_ok(project) == 2
    images = project.outputs()["data/images"]
    pack(200)
    assert project.stages_run(*experiment) >= {"download", "fetch_images"}
    assert project.outputs()["data/images"] != images
    (shop / "m.jsonl").write_text((shop / "m.jsonl").read_text().replace("Thing 0", "Another thing"))
    assert project.stages_run("repro", "fetch_images") >= {"download", "filter"}
    assert "Another thing" in pl.read_parquet(project.root / "data" / "filtered" / "items.parquet")["title"].to_list()


def test_an_experiment_in_a_copy_of_the_project(own: Project, tmp_path: Path) -> None:
    """`--temp` runs as the queue does: params are composed here, the stages run elsewhere."""
    project, shop = own.copy(tmp_path / "project"), new_shop(tmp_path / "shop")
    settings = ["-S", "dataset=mine", "-S", f"dataset.local_folder={shop}", "fetch_images"]
    assert project.stages_run("exp", "run", "--temp", "--name", "first", *settings) == {"download", "filter", "fetch_images"}
    write_reviews(shop, 12)
    assert project.stages_run("exp", "run", "--temp", "--name", "second", *settings) >= {"download", "filter"}
    project.dvc("exp", "apply", "second", check=False)  # which misses the stages that were not asked for
    assert num_users(project) == 12


def test_a_local_backbone_whose_weights_change(own: Project, small_settings: list[str], tmp_path: Path) -> None:
    project, model = own.copy(tmp_path / "project"), tmp_path / "my model"
    shutil.copytree(project.root / "sda_core" / "backbones" / "nano", model)
    backbone = ["backbone=qwen2_5_vl_7b", f"backbone.name='{model}'", "backbone.revision=null", "backbone.dtype=float32"]
    backbone += ["backbone.min_pixels=784", "backbone.max_pixels=12544", "backbone.max_text_tokens=128"]
    settings = [setting for setting in small_settings if not setting.startswith("backbone")]
    experiment = ["exp", "run", *(part for each in (*settings, *backbone) for part in ("-S", each)), "export_base@zero_shot"]
    assert project.stages_run(*experiment) == {"download", "filter", "fetch_images", "export_base@zero_shot"}
    assert UP_TO_DATE in project.dvc("repro", "export_base@zero_shot").stdout
    before = project.outputs()["embeddings/zero_shot.parquet"]

    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] * 1.5}, model / "model.safetensors", metadata={"format": "pt"})
    verified = project.run("sda", "verify", check=False)
    assert verified.returncode == 1
    assert "embeddings/zero_shot.parquet" in next(line for line in verified.stdout.splitlines() if "backbone_revision is" in line)
    assert project.stages_run("repro", "export_base@zero_shot") == {"export_base@zero_shot"}
    assert project.outputs()["embeddings/zero_shot.parquet"] != before
    shutil.rmtree(model)
    gone = project.dvc("repro", "export_base@zero_shot", check=False)
    assert gone.returncode != 0
    assert str(model) in gone.stderr


def test_every_stage_that_loads_the_backbone_watches_its_folder(repository: Path) -> None:
    """A dependency that goes is no change to DVC, so the path is a param, too."""
    stages = YAML(typ="safe").load((repository / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in (stage.get("do", stage) for stage in stages.values()):
        watched = {dep.removeprefix("${").removesuffix("}") for dep in stage["deps"] if dep.startswith("${local_files.")}
        assert watched == {param for param in stage["params"] if param.startswith("local_files.")}
        assert ("local_files.backbone" in watched) == ("sda_core/backbones" in stage["deps"])
