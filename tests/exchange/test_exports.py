"""What is written for others is read back as they read it: by the rules of their documentation, and by themselves if at hand."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.data.filtering import filter_dataset
from sda_core.errors import ArtifactError, ConfigError, DataError
from sda_core.exchange import Format
from sda_core.exchange.export import export
from sda_core.exchange.own_folder import check_replaceable, describe
from sda_core.exchange.recbole import MAX_ITEM_LIST_LENGTH, token
from sda_core.exchange.shop import Shop
from sda_core.params import load_params

RAW_ITEMS = ["B01", "a b", 'say "so"', "NA", "100%", "tab\there", "Ünïcode"]


def table(path: Path) -> list[dict[str, str]]:
    """A tab-separated file as any reader of CSV sees it."""
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def config(path: Path) -> dict:
    return YAML(typ="safe", pure=True).load(path)


def vectors(shop: Shop, column: str) -> np.ndarray:
    return shop.vectors[column]


# ----------------------------------------------------------------------------------------------------- MMRec
def test_mmrec(workspace: Workspace, tmp_path: Path) -> None:
    shop = Shop.read(workspace, "sda")
    written = export(shop, Format.MMREC, tmp_path / "baby")
    folder = tmp_path / "baby"
    rows = table(folder / "baby.inter")
    assert list(rows[0]) == ["userID", "itemID", "rating", "timestamp", "x_label"]
    labels = {"train": 0, "valid": 1, "test": 2, "test_rest": 3}
    ours = INTERACTIONS.read(workspace.interactions)
    expected = [(u - 1, i - 1, labels[s]) for u, i, s in ours.select("user_id", "item_id", "split").iter_rows()]
    assert [(int(r["userID"]), int(r["itemID"]), int(r["x_label"])) for r in rows] == expected
    assert [(row["asin"], int(row["itemID"])) for row in table(folder / "i_id_mapping.csv")] == [
        (raw, place) for place, raw in enumerate(RAW_ITEMS)
    ]
    assert table(folder / "u_id_mapping.csv")[0] == {"user_id": "u 1", "userID": "0"}
    settings = config(folder / "baby.yaml")
    image = np.load(folder / settings["vision_feature_file"], allow_pickle=False)
    text = np.load(folder / settings["text_feature_file"], allow_pickle=False)
    # MMRec counts items by the largest id, and multiplies by the features as they lie.
    assert max(int(row["itemID"]) for row in rows) + 1 == len(image) == len(text) == len(RAW_ITEMS)
    np.testing.assert_array_equal(text, vectors(shop, "text_embedding"))
    np.testing.assert_allclose(image[2], np.delete(image, 2, axis=0).mean(axis=0), rtol=1e-6)  # the one without an image
    assert written["items_without_image_embedding"] == 1
    assert settings["inter_file_name"] == "baby.inter"
    assert settings["field_separator"] == "\t"


def test_mmrec_of_one_vector_an_item_and_of_none(workspace: Workspace, tmp_path: Path) -> None:
    frame = pl.read_parquet(workspace.embeddings("sda")).drop("image_embedding", "text_embedding")
    frame.write_parquet(workspace.embeddings("mine"))
    export(Shop.read(workspace, "mine"), Format.MMREC, tmp_path / "mine")
    settings = config(tmp_path / "mine" / "mine.yaml")
    found = np.load(tmp_path / "mine" / settings["text_feature_file"], allow_pickle=False)
    np.testing.assert_array_equal(found, frame["embedding"].to_numpy())
    assert not (tmp_path / "mine" / settings["vision_feature_file"]).exists()
    export(Shop.read(workspace, "id"), Format.MMREC, tmp_path / "ids")
    assert config(tmp_path / "ids" / "ids.yaml")["is_multimodal_model"] is False
    assert not list((tmp_path / "ids").glob("*.npy"))


# --------------------------------------------------------------------------------------------------- RecBole
def test_recbole(workspace: Workspace, tmp_path: Path) -> None:
    shop = Shop.read(workspace, "sda")
    written = export(shop, Format.RECBOLE, tmp_path / "shop")
    folder = tmp_path / "shop"
    ours = shop.interactions.join(shop.items.select("item_id", "raw_item_id"), on="item_id", maintain_order="left")
    ours = ours.join(shop.users, on="user_id", maintain_order="left")
    for split in ("train", "valid", "test"):
        rows = table(folder / f"shop.{split}.inter")
        assert list(rows[0]) == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
        found = [(unquote(row["user_id:token"]), unquote(row["item_id:token"])) for row in rows]
        assert found == ours.filter(pl.col("split") == split).select("raw_user_id", "raw_item_id").rows()
    assert len(table(folder / "shop.inter")) == len(ours)
    assert written["encoded_ids"] == 5 + 6  # items and users
    for row in table(folder / "shop.itememb"):
        place = RAW_ITEMS.index(unquote(row["iid:token"]))
        for header, column in (("image_emb", "image_embedding"), ("text_emb", "text_embedding"), ("item_emb", "embedding")):
            numbers = np.array(row[f"{header}:float_seq"].split(" "), dtype=np.float32)
            np.testing.assert_array_equal(numbers, vectors(shop, column)[place])
    first = table(folder / "shop.item")[0]
    assert first == {
        "item_id:token": "B01",
        "title:token_seq": "Title 1",
        "brand:token": "",
        "categories:token_seq": "Home Red_Mugs",
    }


def test_recbole_sequences_hold_what_came_before(workspace: Workspace, tmp_path: Path) -> None:
    shop = Shop.read(workspace, "sda")
    export(shop, Format.RECBOLE, tmp_path / "shop")
    raw = dict(shop.items.select("item_id", "raw_item_id").iter_rows())
    histories = {
        user: [token(raw[item]) for item in part["item_id"].to_list()]
        for (user,), part in shop.interactions.filter(pl.col("split") != "test_rest").group_by("user_id", maintain_order=True)
    }
    for split, places in (("train", (1, 2)), ("valid", (3,)), ("test", (4,))):
        rows = table(tmp_path / "shop" / f"shop.seq_{split}.inter")
        expected = [
            (f"u%20{user}", " ".join(history[:place]), history[place]) for user, history in histories.items() for place in places
        ]
        assert [(r["user_id:token"], r["item_id_list:token_seq"], r["item_id:token"]) for r in rows] == expected
    settings = config(tmp_path / "shop" / "shop_sequential.yaml")
    assert settings["benchmark_filename"] == ["seq_train", "seq_valid", "seq_test"]
    assert settings["alias_of_item_id"] == ["item_id_list", "iid"]
    assert config(tmp_path / "shop" / "shop.yaml")["benchmark_filename"] == ["train", "valid", "test"]


def test_recbole_histories_end_with_the_latest(workspace: Workspace, tmp_path: Path) -> None:
    rows = [(1, place % 7 + 1, place, 5.0, "train") for place in range(MAX_ITEM_LIST_LENGTH + 20)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    export(Shop.read(workspace, "id"), Format.RECBOLE, tmp_path / "shop")
    found = table(tmp_path / "shop" / "shop.seq_train.inter")
    assert len(found) == len(rows) - 1
    last = [token(RAW_ITEMS[place % 7]) for place in range(19, MAX_ITEM_LIST_LENGTH + 19)]
    assert found[-1]["item_id_list:token_seq"].split(" ") == last
    assert not (tmp_path / "shop" / "shop.itememb").exists()
    assert "preload_weight" not in config(tmp_path / "shop" / "shop.yaml")


@pytest.mark.parametrize("raw", [*RAW_ITEMS, "nan", "[PAD]", "None", "a\u00a0b", "%20", " ", "\n", "'", "x,y"])
def test_tokens_survive_readers_and_come_back(raw: str) -> None:
    made = token(raw)
    assert unquote(made) == raw
    assert not any(character.isspace() or character == '"' for character in made)
    assert made not in {"NA", "nan", "None", "[PAD]", "null", ""}
    assert token("B01") == "B01"


def test_an_empty_id_cannot_be_a_token() -> None:
    with pytest.raises(DataError, match="an id is empty"):
        token("")


# -------------------------------------------------------------------------------------------------- datasets
def header(folder: Path) -> dict:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(text.split("---\n")[1])


def test_datasets(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    export(Shop.read(workspace, "sda"), Format.DATASETS, folder)
    configs = {entry["config_name"]: entry for entry in header(folder)["configs"]}
    assert list(configs) == ["interactions", "items", "embeddings"]
    ours = INTERACTIONS.read(workspace.interactions)
    names = {"train": "train", "validation": "valid", "test": "test", "test_rest": "test_rest"}
    assert [entry["split"] for entry in configs["interactions"]["data_files"]] == list(names)
    for entry in configs["interactions"]["data_files"]:
        found = pl.read_parquet(folder / entry["path"])
        part = ours.filter(pl.col("split") == names[entry["split"]])
        assert found.select("user_id", "item_id", "timestamp", "rating").equals(part.drop("split"))
        assert found["raw_item_id"].to_list() == [RAW_ITEMS[item - 1] for item in found["item_id"]]
    assert pl.read_parquet(folder / configs["items"]["data_files"])["raw_item_id"].to_list() == RAW_ITEMS
    embeddings = folder / configs["embeddings"]["data_files"]
    assert embeddings.read_bytes() == workspace.embeddings("sda").read_bytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`image_embedding` is null for 1 items" in card
    assert "- fusion: concat" in card


def test_datasets_without_vectors(workspace: Workspace, tmp_path: Path) -> None:
    export(Shop.read(workspace, "id"), Format.DATASETS, tmp_path / "shop")
    assert [entry["config_name"] for entry in header(tmp_path / "shop")["configs"]] == ["interactions", "items"]
    assert not (tmp_path / "shop" / "embeddings.parquet").exists()


LOAD_DATASETS = """
import sys
from datasets import load_dataset
default, vectors = load_dataset(sys.argv[1]), load_dataset(sys.argv[1], "embeddings")["train"]
assert {split: len(rows) for split, rows in default.items()} == {"train": 18, "validation": 6, "test": 6, "test_rest": 1}
assert vectors["image_embedding"][2] is None and len(vectors["embedding"][0]) == 5
"""


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face datasets is not installed here")
def test_datasets_reads_it(workspace: Workspace, tmp_path: Path) -> None:
    export(Shop.read(workspace, "sda"), Format.DATASETS, tmp_path / "shop")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", LOAD_DATASETS, str(tmp_path / "shop")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LOAD_RECBOLE = """
import sys
import numpy as np
np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_  # RecBole 1.2.1 wants names that NumPy 2 dropped
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
folder, model, settings = sys.argv[1:4]
sys.argv = sys.argv[:1]
given = {"data_path": folder, "use_gpu": False, "state": "ERROR"}
config = Config(model=model, dataset="shop", config_file_list=[f"{folder}/shop/{settings}"], config_dict=given)
dataset = create_dataset(config)
parts = data_preparation(config, dataset)
assert dataset.token2id("item_id", "a%20b") and dataset.token2id("item_id", "%4EA")
print([len(part.dataset) for part in parts], dataset.item_num, dataset.get_preload_weight("iid").shape)
"""


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="RecBole is not installed here")
@pytest.mark.parametrize(("model", "settings", "rows"), [("BPR", "shop.yaml", 18), ("SASRec", "shop_sequential.yaml", 12)])
def test_recbole_reads_it(workspace: Workspace, tmp_path: Path, model: str, settings: str, rows: int) -> None:
    export(Shop.read(workspace, "sda"), Format.RECBOLE, tmp_path / "shop")
    command = [sys.executable, "-W", "ignore", "-c", LOAD_RECBOLE, str(tmp_path), model, settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"[{rows}, 6, 6] 8 (8, 5)")


# -------------------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("target", list(Format))
def test_an_export_is_replaced_and_nothing_else_is(workspace: Workspace, tmp_path: Path, target: Format) -> None:
    shop, folder = Shop.read(workspace, "sda"), tmp_path / "shop"
    export(shop, target, folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    export(shop, target, folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert json.loads(before[Path("sda_export.json")])["format"] == target
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by this command"):
        export(shop, target, other)
    assert (other / "chapter.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shop", "thesis"]  # no half-written folder


def test_a_folder_that_is_no_name(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a valid name"):
        export(Shop.read(workspace, "sda"), Format.MMREC, tmp_path / "my shop")


def test_vectors_of_other_items_are_refused(workspace: Workspace) -> None:
    frame = pl.read_parquet(workspace.embeddings("sda"))
    frame.with_columns(pl.col("raw_item_id").reverse()).write_parquet(workspace.embeddings("sda"))
    with pytest.raises(ArtifactError, match="has other items"):
        Shop.read(workspace, "sda")


def test_rows_are_joined_by_id(workspace: Workspace) -> None:
    before = Shop.read(workspace, "sda")
    pl.read_parquet(workspace.embeddings("sda")).reverse().write_parquet(workspace.embeddings("sda"))
    after = Shop.read(workspace, "sda")
    for column, matrix in before.vectors.items():
        np.testing.assert_allclose(after.vectors[column], matrix, rtol=1e-6)
        np.testing.assert_array_equal(after.has_vector[column], before.has_vector[column])


# ----------------------------------------------------------------------------------------------- the way back
@pytest.mark.parametrize(
    ("source", "target", "folder"), [("RecBole", Format.RECBOLE, "dataset"), ("MMRec", Format.MMREC, "data")]
)
def test_the_guide_brings_interactions_back(
    workspace: Workspace,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    target: Format,
    folder: str,
) -> None:
    """The code that docs/exchange.md shows, on an export of ours, then the filter stage's own reader."""
    guide = (repository / "docs" / "exchange.md").read_text(encoding="utf-8")
    code = re.search(rf"<!-- code: from {source} -->\n```python\n(.+?)```", guide, re.S)
    assert code is not None
    shop = Shop.read(workspace, "id")
    export(shop, target, tmp_path / folder / "shop")
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], source, "exec"), {})
    section = load_params(repository / "params.yaml").filter
    changes = {"min_user_interactions": 1, "min_item_interactions": 1, "duplicates": "keep", "max_bad_line_share": 1.0}
    reviews, metadata = tmp_path / "mine" / "reviews.jsonl", tmp_path / "mine" / "meta.jsonl"
    made = filter_dataset(reviews, metadata, 2023, section.model_copy(update=changes))
    back = made.interactions.join(made.items.select("item_id", "raw_item_id"), on="item_id").join(made.users, on="user_id")
    found = {(user, item, time) for user, item, time in back.select("raw_user_id", "raw_item_id", "timestamp").iter_rows()}
    ours = shop.interactions.join(shop.items.select("item_id", "raw_item_id"), on="item_id").join(shop.users, on="user_id")
    ours = ours.filter(~pl.col("raw_item_id").str.contains("\t"))  # no id to the filter
    assert found == {*ours.select("raw_user_id", "raw_item_id", "timestamp").iter_rows()}


# ------------------------------------------------------------------------------------------- an existing folder
@pytest.mark.parametrize("target", list(Format), ids=lambda target: target.value)
def test_an_older_export_is_replaced_by_another_variant(workspace: Workspace, tmp_path: Path, target: Format) -> None:
    folder = tmp_path / "shop"
    export(Shop.read(workspace, "sda"), target, folder)
    export(Shop.read(workspace, "sda"), target, folder)
    export(Shop.read(workspace, "id"), target, folder)
    assert json.loads((folder / "sda_export.json").read_text(encoding="utf-8"))["variant"] == "id"


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/model.bin", "empty/"])
@pytest.mark.parametrize("listed", [True, False], ids=["", "export-of-an-earlier-version"])
def test_files_of_the_user_in_an_older_export_are_kept(workspace: Workspace, tmp_path: Path, name: str, listed: bool) -> None:
    folder = tmp_path / "shop"
    export(Shop.read(workspace, "sda"), Format.MMREC, folder)
    if not listed:
        (folder / "sda_export.json").write_text("{}", encoding="utf-8")
    mine = folder / name
    mine.parent.mkdir(exist_ok=True)
    mine.mkdir() if name.endswith("/") else mine.write_text("mine", encoding="utf-8")
    before = {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}
    with pytest.raises(ConfigError, match=r"--to: .* was not made by this command and would be lost; move them away"):
        export(Shop.read(workspace, "id"), Format.MMREC, folder)
    assert {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))} == before


def test_more_files_in_a_folder_of_an_older_export(tmp_path: Path) -> None:
    """As in the images of `sda import-hm`."""
    (tmp_path / "to" / "images").mkdir(parents=True)
    (tmp_path / "to" / "images" / "1.jpg").write_bytes(b"one")
    describe(tmp_path / "to", "made.json", {})
    check_replaceable(tmp_path / "to", "made.json")
    (tmp_path / "to" / "images" / "mine.jpg").write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"--to: .*images has 2 files, 1 of them from this command; the others would be lost"):
        check_replaceable(tmp_path / "to", "made.json")
