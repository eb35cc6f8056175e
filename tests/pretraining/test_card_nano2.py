"""nano 2's tables: targets, probes, held-out data and curve, from the files that the measurements write."""

from __future__ import annotations

import json

import pytest

from pretraining import card_nano2
from pretraining.card_nano2 import curve_table, evaluations_table, main, probes_table, targets, targets_table

PROBES = {
    "nano 2": {
        "shop: category, linear": 0.6,
        "shop: colour, linear": 0.95,
        "shop: pattern, linear": 0.3,
        "shop: shape, linear": 0.5,
        "H&M: product type, linear": 0.41,
        "H&M: product type, 1-NN": 0.39,
        "H&M: colour group, linear": 0.5,
        "H&M: colour group, 1-NN": 0.5,
        "H&M: pattern, linear": 0.5,
        "H&M: pattern, 1-NN": 0.5,
    },
    "nano": {"shop: category, linear": 0.1},
}
PROBES["EfficientNet-lite0"] = dict.fromkeys(PROBES["nano 2"], 0.5)


def evaluation(recall: float) -> dict[str, dict[str, float]]:
    retrieval = {"text to image R@10": recall, "chance R@10": 0.02}
    titles = {"1-NN": recall, "chance": 0.1, "MiniLM": 0.6, "Spearman with MiniLM's cosines": 0.76}
    return {
        "500 held-out pairs": retrieval,
        "openmoji (style never seen): 9 pairs": retrieval,
        "flat-color-icons (style never seen): 8 pairs": retrieval,
        "1000 Beauty titles, all leaves": titles,
    }


EVALUATIONS = {"nano 2": evaluation(0.4), "nano": evaluation(0.3), "untrained": evaluation(0.01)}


def test_a_target_is_reached_at_its_value_and_missed_below():
    rows = {row.name: row for row in targets(PROBES, EVALUATIONS)}
    assert rows["shop: type, linear"].is_reached
    assert not rows["shop: pattern, linear"].is_reached
    assert rows["H&M: product type, linear"].least == pytest.approx(0.4)  # 80 % of EfficientNet's
    assert rows["H&M: product type, linear"].is_reached
    assert not rows["H&M: product type, 1-NN"].is_reached
    assert not rows["500 held-out pairs: R@10"].is_reached
    assert rows["openmoji (style never seen): 9 pairs: R@10"].least == 0.3  # nano's
    assert rows["1000 Beauty titles, all leaves: 1-NN"].found["MiniLM"] == 0.6


def test_rows_of_the_tables():
    lines = targets_table(targets(PROBES, EVALUATIONS)).splitlines()
    assert lines[2] == "| shop: type, linear | 0.600 | 0.600 | 0.100 |  | 0.500 | **yes** |"
    assert "| 500 held-out pairs: R@10 | 0.450 | 0.400 | 0.300 | 0.010 |  | no |" in lines
    assert len({line.count("|") for line in lines}) == 1
    assert "| shop: motif, linear | 0.500 |  | 0.500 |" in probes_table(PROBES)
    found = evaluations_table(EVALUATIONS).splitlines()
    assert found[2] == "| 500 held-out pairs: R@10, title and keywords -> image | 0.400 | 0.300 | 0.010 | 0.020 |  |"
    assert found[-2] == "| 1000 Beauty titles, all leaves: 1-NN | 0.400 | 0.300 | 0.010 | 0.100 | 0.600 |"


def test_without_data_of_a_real_shop_its_rows_are_left_out():
    probes = {model: {row: value for row, value in found.items() if "H&M" not in row} for model, found in PROBES.items()}
    evaluations = {
        model: {**{name: value for name, value in found.items() if "Beauty" not in name}, "Beauty titles": {"skipped": "absent"}}
        for model, found in EVALUATIONS.items()
    }
    names = [row.name for row in targets(probes, evaluations)]
    assert len(names) == 4 + 3
    assert not any("H&M" in name or "Beauty" in name for name in names)
    assert "Beauty" not in evaluations_table(evaluations)


def test_both_files_are_written_between_their_marks(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "nano2"
    folder.mkdir()
    (folder / "probes.json").write_text(json.dumps(PROBES), encoding="utf-8")
    for name, model in (("nano2/results", "nano 2"), ("results", "nano"), ("nano2/untrained", "untrained")):
        (tmp_path / f"{name}.json").write_text(json.dumps(EVALUATIONS[model]), encoding="utf-8")
    heads = ("colour", "pattern", "motif", "type", "garment", "grocery")
    tower = {f"right_tokens_{head}": 0.25 for head in heads} | {"dense": 0.5, "token_heads": 5.0}
    joint = tower | {"vector_heads": 6.0} | {f"right_{head}": 0.75 for head in heads}
    validated = {"valid_recall_at_10": 0.1, "scenes_recall_at_10": 0.2, "valid_spearman": 0.8}
    rows = [(100, tower | validated), (110, tower), (200, joint | validated)]
    lines = [f"{step}\t9\t1.0\t2.5\t{json.dumps(values)}" for step, values in rows]
    (folder / "curve.tsv").write_text("\n".join(["step\tseconds\trate\tloss\tparts", *lines]) + "\n", encoding="utf-8")
    curve = curve_table(folder / "curve.tsv").splitlines()[2:]
    assert curve[0].startswith("| 100 | 2.50 | 0.500 | 5.000 |  | 0.250 |")
    assert curve[1].startswith("| 200 | 2.50 | 0.500 | 5.000 | 6.000 | 0.750 |")
    assert len(curve) == 2

    for name, marks in (("CARD", ("curve", "targets", "probes", "results")), ("README", ("nano2",))):
        file = tmp_path / f"{name}.md"
        file.write_text("".join(f"<!-- {mark} -->\nold\n<!-- end -->\n" for mark in marks), encoding="utf-8")
        monkeypatch.setattr(card_nano2, name, file)
    main(tmp_path, write=False)
    assert "old" in card_nano2.CARD.read_text(encoding="utf-8")
    main(tmp_path)
    assert "shop: type, linear" in capsys.readouterr().out
    for file in (card_nano2.CARD, card_nano2.README):
        assert "old" not in file.read_text(encoding="utf-8")


def test_the_shipped_files_have_the_marks():
    for file, marks in ((card_nano2.CARD, ("curve", "targets", "probes", "results")), (card_nano2.README, ("nano2",))):
        text = file.read_text(encoding="utf-8")
        for mark in marks:
            assert text.count(f"<!-- {mark} -->\n") == 1
