"""The H&M competition's files, made up with their real column names: what is written, and every mistake as one line."""

from __future__ import annotations

import datetime
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from sda_core.cli.app import app
from sda_core.data.filtering import filter_dataset
from sda_core.exchange.hm import Selection, import_hm
from sda_core.params import FilterParams

ARTICLE_COLUMNS = (
    "article_id", "product_code", "prod_name", "product_type_no", "product_type_name", "product_group_name",
    "graphical_appearance_no", "graphical_appearance_name", "colour_group_code", "colour_group_name",
    "perceived_colour_value_id", "perceived_colour_value_name", "perceived_colour_master_id",
    "perceived_colour_master_name", "department_no", "department_name", "index_code", "index_name", "index_group_no",
    "index_group_name", "section_no", "section_name", "garment_group_no", "garment_group_name", "detail_desc",
)  # fmt: skip
TEXT = 'Jersey top, with "narrow" straps.'
ARTICLES = {
    "0108775015": ("Strap top", "Black", TEXT),
    "0108775044": ("Strap top", "White", TEXT),
    "0111565001": ("20 den Stockings", "Black", ""),
    "0111565003": ("20 den Stockings", "Beige", ""),
}
ROWS = [
    ("2020-09-15", "c2", "0108775015"),
    ("2020-09-16", "c1", "0108775044"),
    ("2020-09-16", "c1", "0108775044"),  # two of them: one interaction
    ("2020-09-16", "c1", "0111565001"),
    ("2020-09-17", "c1", "0108775015"),
    ("2020-09-17", "c2", "0108775015"),
    ("2020-09-22", "c3", "0111565003"),
    ("2020-09-22", "c3", "0999999001"),  # an article that is not in articles.csv
]


def quoted(values: tuple[str, ...]) -> str:
    return ",".join('"' + value.replace('"', '""') + '"' if "," in value else value for value in values)


def write_articles(path: Path, articles: dict[str, tuple[str, str, str]]) -> None:
    lines = [",".join(ARTICLE_COLUMNS)]
    for article, (name, colour, text) in articles.items():
        row = dict.fromkeys(ARTICLE_COLUMNS, "1") | {
            "article_id": article, "product_code": article[1:7], "prod_name": name, "detail_desc": text,
            "index_group_name": "Ladieswear", "section_name": "Womens Basics", "product_group_name": "Garment Upper body",
            "product_type_name": "Vest top", "colour_group_name": colour, "graphical_appearance_name": "Solid",
            "garment_group_name": "Jersey Basic", "department_name": "Jersey", "index_name": "Ladieswear",
            "perceived_colour_master_name": colour, "perceived_colour_value_name": "Dark",
        }  # fmt: skip
        lines.append(quoted(tuple(row.values())))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_transactions(path: Path, rows: list[tuple[str, str, str]]) -> None:
    head = "t_dat,customer_id,article_id,price,sales_channel_id"
    path.write_text("\n".join([head, *(f"{','.join(row)},0.0508,2" for row in rows)]) + "\n", encoding="utf-8")


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    folder = tmp_path / "kaggle"
    folder.mkdir()
    write_articles(folder / "articles.csv", ARTICLES)
    write_transactions(folder / "transactions_train.csv", ROWS)
    for article in ("0108775015", "0111565003"):
        path = folder / "images" / article[:3] / f"{article}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 12), (int(article[-1]), 0, 0)).save(path)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def day(number: int) -> int:
    return int(datetime.datetime(2020, 9, number, tzinfo=datetime.UTC).timestamp()) * 1000


def test_articles_of_some_days(kaggle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["import-hm", str(kaggle), "--to", str(tmp_path / "hm"), "--from-date", "2020-09-16", "--to-date", "2020-09-17"]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/hm: unknown_article 0, interactions 4, customers 2, items 3, images 1\n"
    assert read(tmp_path / "hm" / "interactions.jsonl.gz") == [
        {"user_id": "c1", "parent_asin": "0108775044", "rating": 5, "timestamp": day(16)},
        {"user_id": "c1", "parent_asin": "0111565001", "rating": 5, "timestamp": day(16)},
        {"user_id": "c1", "parent_asin": "0108775015", "rating": 5, "timestamp": day(17)},
        {"user_id": "c2", "parent_asin": "0108775015", "rating": 5, "timestamp": day(17)},
    ]
    first, _, last = read(tmp_path / "hm" / "items.jsonl.gz")
    assert first == {
        "parent_asin": "0108775015", "title": "Strap top", "store": "", "price": None,
        "categories": ["Ladieswear", "Womens Basics", "Garment Upper body", "Vest top"],
        "features": ["Black", "Solid", "Jersey Basic"], "description": [TEXT], "images": [],
        "details": {
            "article_id": "0108775015", "department_name": "Jersey", "index_name": "Ladieswear",
            "perceived_colour_master_name": "Black", "perceived_colour_value_name": "Dark",
        },
    }  # fmt: skip
    assert last["description"] == []
    (image,) = (tmp_path / "hm" / "images").iterdir()
    assert image.name == "0108775015.jpg"
    assert image.read_bytes() == (kaggle / "images" / "010" / "0108775015.jpg").read_bytes()


def test_products_are_described_by_the_colour_bought_most_and_shown_by_one_with_a_photo(kaggle: Path, tmp_path: Path) -> None:
    counts = import_hm(kaggle, tmp_path / "hm", Selection(products=True))
    assert counts == {"unknown_article": 1, "interactions": 6, "customers": 3, "items": 2, "images": 2}
    top, stockings = read(tmp_path / "hm" / "items.jsonl.gz")
    assert (top["parent_asin"], top["features"][0], top["details"]["article_id"]) == ("0108775", "Black", "0108775015")
    assert (stockings["parent_asin"], stockings["features"][0]) == ("0111565", "Beige")  # the black ones have no photo
    assert sorted(path.name for path in (tmp_path / "hm" / "images").iterdir()) == ["0108775.jpg", "0111565.jpg"]


def test_a_share_of_the_customers_is_the_same_every_time(kaggle: Path, tmp_path: Path) -> None:
    rows = [("2020-09-16", f"c{number}", "0108775015") for number in range(100)]
    chosen = []
    for name, order, seed in (("a", rows, 1), ("b", rows[::-1], 1), ("c", rows, 2)):
        write_transactions(kaggle / "transactions_train.csv", order)
        assert import_hm(kaggle, tmp_path / name, Selection(customer_share=0.2, seed=seed))["customers"] == 20
        chosen.append((tmp_path / name / "interactions.jsonl.gz").read_bytes())
    assert chosen[0] == chosen[1] != chosen[2]


def test_ids_whose_zero_was_lost_are_filled_up(kaggle: Path, tmp_path: Path) -> None:
    import_hm(kaggle, tmp_path / "a", Selection())
    write_articles(kaggle / "articles.csv", {article[1:]: value for article, value in ARTICLES.items()})
    write_transactions(kaggle / "transactions_train.csv", [(date, customer, article[1:]) for date, customer, article in ROWS])
    import_hm(kaggle, tmp_path / "b", Selection())
    for name in ("interactions.jsonl.gz", "items.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_older_import_is_replaced_and_the_presets_read_it(kaggle: Path, tmp_path: Path, repository: Path) -> None:
    write_articles(kaggle / "articles.csv", {f"0{number:09d}": ("Top", "Red", "") for number in range(5)})
    rows = [("2020-09-16", f"c{user}", f"0{number:09d}") for user in range(5) for number in range(5)]
    write_transactions(kaggle / "transactions_train.csv", rows)
    for _ in range(2):
        import_hm(kaggle, tmp_path / "hm", Selection())
    for name in ("hm", "hm_two_years"):
        preset = YAML(typ="safe", pure=True).load(repository / "conf" / "dataset" / f"{name}.yaml")
        dataset = preset["dataset"]
        files = (tmp_path / "hm" / dataset["reviews"][0], tmp_path / "hm" / dataset["metadata"][0])
        counts = filter_dataset(*files, dataset["edition"], FilterParams.model_validate(preset["filter"])).statistics
        assert (counts["num_users"], counts["num_items"], counts["num_interactions"], counts["rows_bad"]) == (5, 5, 25, 0)
        assert counts["share_tied_test_targets"] == 1.0


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def nothing(_: Path) -> None: ...


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (remove("articles.csv"), (), "articles.csv: no such file; name the folder into which the competition's archive was"),
        (remove("transactions_train.csv"), (), "transactions_train.csv: no such file; name the folder"),
        (remove("images"), (), "images: no such folder; unpack the competition's images there"),
        (
            replace("articles.csv", "prod_name", "name"),
            (),
            "articles.csv: has no column prod_name (got article_id, product_code,",
        ),
        (replace("transactions_train.csv", "t_dat", "date"), (), "transactions_train.csv: has no column t_dat (got date, "),
        (
            replace("transactions_train.csv", "2020-09-22", "22.9.20"),
            (),
            "transactions_train.csv: a row should be a day (2020-09",
        ),
        (
            replace("transactions_train.csv", ",c3,", ",,"),
            (),
            "a row should be a day (2020-09-22), a customer and an article",
        ),
        (replace("transactions_train.csv", "0999999001", "red mug"), (), "article_id should be 10 digits (got '000red mug')"),
        (replace("articles.csv", "0108775044", "0108775015"), (), "articles.csv: has article 0108775015 twice"),
        (replace("articles.csv", "01", "02"), (), "transactions_train.csv: none of its 8 rows is of an article in articles.csv"),
        (nothing, ("--from-date", "2021-01-01"), "has no row of these days (it goes from 2020-09-15 to 2020-09-22); change"),
        (nothing, ("--from-date", "September"), "--from-date: should be a day as 2020-09-22 (got 'September')"),
        (
            nothing,
            ("--from-date", "2020-09-22", "--to-date", "2020-09-21"),
            "--from-date: 2020-09-22 is after --to-date",
        ),
        (nothing, ("--customer-share", "0"), "--customer-share: should be above 0 and at most 1 (got 0)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    kaggle: Path, tmp_path: Path, change: Callable[[Path], None], options: tuple[str, ...], message: str
) -> None:
    change(kaggle)
    done = CliRunner().invoke(app, ["import-hm", str(kaggle), "--to", str(tmp_path / "hm"), *options])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sda import-hm: error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kaggle"]


def test_a_folder_of_something_else_is_left_alone(kaggle: Path, tmp_path: Path) -> None:
    (tmp_path / "hm").mkdir()
    (tmp_path / "hm" / "mine.txt").write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(app, ["import-hm", str(kaggle), "--to", str(tmp_path / "hm")])
    assert done.exit_code == 1
    assert "already exists and was not made by this command; name a new folder" in done.stderr
    assert [path.name for path in (tmp_path / "hm").iterdir()] == ["mine.txt"]


def test_an_older_import_is_replaced_unless_it_has_more_photos(kaggle: Path, tmp_path: Path) -> None:
    arguments = ["import-hm", str(kaggle), "--to", str(tmp_path / "hm")]
    for _ in range(2):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    (tmp_path / "hm" / "images" / "mine.jpg").write_bytes(b"mine")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "from this command; the others would be lost" in done.stderr
    assert (tmp_path / "hm" / "images" / "mine.jpg").exists()
