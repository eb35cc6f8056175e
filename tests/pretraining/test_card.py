"""The model card's tables come from measurements, and only what stands between the marks is rewritten."""

from __future__ import annotations

import json

import pytest

from pretraining.card import between_marks, curve_table, results_table
from pretraining.common import CHECKPOINT, HERE


def test_tables_say_what_was_measured(tmp_path):
    pairs = {"text to image R@10": 0.3, "title alone to image R@10": 0.2, "chance R@10": 0.02}
    trained = {"500 pairs": pairs, "words": {"1-NN": 0.5, "chance": 0.1, "MiniLM": 0.6}, "titles": {"skipped": "absent"}}
    untrained = {"500 pairs": pairs | {"text to image R@10": 0.01}, "words": {"1-NN": 0.4}, "titles": {"skipped": "absent"}}
    rows = results_table(trained, untrained).splitlines()
    assert rows[2] == "| 500 pairs: R@10, title and keywords -> image | 0.300 | 0.010 | 0.020 |  | title alone 0.200 |"
    assert rows[3] == "| words: 1-NN | 0.500 | 0.400 | 0.100 | 0.600 |  |"
    assert rows[4] == "| titles | absent | | | | |"
    file = tmp_path / "curve.tsv"
    parts = {"contrastive": 5.0, "text_cosine": 0.25, "image_cosine": 0.7}
    validated = parts | {"valid_recall_at_10": 0.25, "valid_spearman": 0.75}
    lines = [
        "step\tseconds\trate\tloss\tparts",
        f"10\t40\t1.0\t9.5\t{json.dumps(parts)}",
        f"20\t80\t1.0\t9.25\t{json.dumps(validated)}",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert curve_table(file).splitlines()[2:] == ["| 20 | 80 | 9.2500 | 5.00 | 0.750 | 0.300 | 0.250 | 0.750 |"]


def test_marks():
    text = "a\n<!-- curve -->\nold\n<!-- end -->\nb\n<!-- results -->\nold\n<!-- end -->\n"
    changed = between_marks(text, "results", "new")
    assert changed == text[: text.index("<!-- results")] + "<!-- results -->\nnew\n<!-- end -->\n"
    with pytest.raises(SystemExit, match="no marks"):
        between_marks(text, "absent", "new")


@pytest.mark.parametrize("file", [CHECKPOINT / "MODEL_CARD.md", HERE / "README.md"])
def test_the_pages_have_their_marks(file):
    text = file.read_text(encoding="utf-8")
    for mark in ("curve", "results"):
        assert between_marks(text, mark, "x") != text
