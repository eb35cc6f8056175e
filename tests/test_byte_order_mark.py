"""A byte order mark, which editors and spreadsheets on Windows write, changes nothing in any text file that is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sda_core.artifacts import read_json
from sda_core.data.amazon import LineCount, read_metadata, read_reviews
from sda_core.exchange.vectors import read_vectors
from sda_core.params import ImportEmbeddingsParams, load_params
from sda_core.report.experiments import experiments

ROOT = Path(__file__).resolve().parents[1]
MARK = b"\xef\xbb\xbf"


def marked(path: Path) -> Path:
    path.write_bytes(MARK + path.read_bytes())
    return path


def test_params(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert load_params(marked(tmp_path / "params.yaml")) == load_params(ROOT / "params.yaml")


def test_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": "\u00e9"}), encoding="utf-8")
    assert read_json(marked(tmp_path / "x.json"), "x") == {"a": "\u00e9"}


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
def test_raw_files(tmp_path: Path, edition: int) -> None:
    new = edition == 2023
    review = {"user_id" if new else "reviewerID": "u", "parent_asin" if new else "asin": "i"}
    review |= {"rating" if new else "overall": 5, "timestamp" if new else "unixReviewTime": 1_700_000_000 * (1000 if new else 1)}
    (tmp_path / "r").write_text(json.dumps(review) + "\n")
    lines = LineCount()
    (frame,) = read_reviews(marked(tmp_path / "r"), edition, max_bad_line_share=0.0, lines=lines)
    assert frame.row(0) == ("u", "i", 5.0, 1_700_000_000, 0)
    item = {"parent_asin" if new else "asin": "i", "title": "Red mug"}
    (tmp_path / "m").write_text((repr if edition == 2014 else json.dumps)(item) + "\n")
    assert read_metadata(marked(tmp_path / "m"), edition, max_bad_line_share=0.0)["title"].to_list() == ["Red mug"]
    assert not lines.repaired


@pytest.mark.parametrize("form", ["ids.txt", "i_id_mapping.csv"])
def test_ids_of_vectors_made_elsewhere(tmp_path: Path, form: str) -> None:
    is_list = form == "ids.txt"
    np.save(tmp_path / ("embedding.npy" if is_list else "image_feat.npy"), np.eye(2, dtype=np.float32))
    (tmp_path / form).write_text("B1\nB0\n" if is_list else "itemID\tasin\n0\tB1\n1\tB0\n")
    marked(tmp_path / form)
    columns = {"item_column": "asin", "image_column": "image", "text_column": "text", "embedding_column": "embedding"}
    params = ImportEmbeddingsParams.model_validate({"variants": {}, **columns, "max_missing_share": 0.0})
    found = read_vectors(tmp_path, ["B0", "B1"], params, False)
    matrix = found.embedding if is_list else found.image
    assert matrix is not None
    np.testing.assert_array_equal(matrix, np.eye(2, dtype=np.float32)[[1, 0]])


def test_tables_of_experiments(tmp_path: Path) -> None:
    contents = {"a.md": "| x | y |\n|---|---|\n| 1 | 2 |\n", "b.tsv": "x\ty\n1\t2\n", "c.csv": "x,y\n1,2\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        marked(tmp_path / name)
    found = experiments(tmp_path)
    assert [table.columns for each in found for table in each.tables] == [("x", "y")] * 3
    assert [table.rows for each in found for table in each.tables] == [(("1", "2"),)] * 3
