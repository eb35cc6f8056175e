"""Write the measured tables to the model card and the README.

Tables stand between comment markers.

python -m pretraining export --untrained --folder pretraining/work/untrained
python -m pretraining evaluate --folder pretraining/work/untrained --json pretraining/work/untrained.json
python -m pretraining evaluate --json pretraining/work/results.json
python -m pretraining card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from pretraining.common import CHECKPOINT, HERE, WORK

MEASURES = ("text to image R@10", "1-NN")
BAG, SPEARMAN = "bag of MiniLM's token vectors", "Spearman with MiniLM's cosines"
FILES = (CHECKPOINT / "MODEL_CARD.md", HERE / "README.md")


def results_table(trained: dict[str, dict[str, Any]], untrained: dict[str, dict[str, Any]]) -> str:
    """The markdown table of :mod:`pretraining.evaluate`: a row for each measure, with the untrained model for comparison."""
    lines = ["| what | nano | untrained | chance | MiniLM | other |", "|---|---|---|---|---|---|"]
    for name, scores in trained.items():
        before = untrained[name]
        for measure in MEASURES:
            if measure not in scores:
                continue
            retrieval = measure.endswith("R@10")
            chance = scores["chance R@10" if retrieval else "chance"]
            minilm = f"{scores['MiniLM']:.3f}" if "MiniLM" in scores else ""
            other = []
            if retrieval:
                other.append(f"title alone {scores['title alone to image R@10']:.3f}")
            if BAG in scores:
                other.append(f"{BAG} {scores[BAG]:.3f}")
                other.append(f"{SPEARMAN} {scores[SPEARMAN]:.3f} (untrained {before[SPEARMAN]:.3f})")
            label = "R@10, title and keywords -> image" if retrieval else "1-NN"
            figures = f"{scores[measure]:.3f} | {before[measure]:.3f} | {chance:.3f}"
            lines.append(f"| {name}: {label} | {figures} | {minilm} | {'; '.join(other)} |")
        if "skipped" in scores:
            lines.append(f"| {name} | {scores['skipped']} | | | | |")
    return "\n".join(lines)


def curve_table(file: Path) -> str:
    """The markdown table of the training curve at the steps with validation."""
    columns = ["step", "seconds", "loss", "contrastive", "text cosine", "image cosine"]
    columns += ["R@10 (validation)", "Spearman (validation titles)"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for step, seconds, _, loss, parts in pl.read_csv(file, separator="\t", quote_char=None).iter_rows():
        values = json.loads(parts)
        if "valid_recall_at_10" in values:
            cosines = (1 - values["text_cosine"], 1 - values["image_cosine"])
            cells = [
                str(step),
                str(seconds),
                f"{loss:.4f}",
                f"{values['contrastive']:.2f}",
                *(f"{value:.3f}" for value in cosines),
            ]
            cells += [f"{values[name]:.3f}" for name in ("valid_recall_at_10", "valid_spearman")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between_marks(text: str, mark: str, table: str) -> str:
    """Replace the part of a text between ``<!-- mark -->`` and ``<!-- end -->``.

    Raises:
        SystemExit: a mark is missing.
    """
    before, opening, rest = text.partition(f"<!-- {mark} -->\n")
    _, closing, after = rest.partition("\n<!-- end -->")
    if not opening or not closing:
        raise SystemExit(f"the text has no marks <!-- {mark} --> and <!-- end --> for the table")
    return before + opening + table + closing + after


def main() -> None:
    """Update both files."""
    trained, untrained = (json.loads((WORK / f"{name}.json").read_text(encoding="utf-8")) for name in ("results", "untrained"))
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        text = between_marks(text, "curve", curve_table(WORK / "curve.tsv"))
        text = between_marks(text, "results", results_table(trained, untrained))
        file.write_text(text, encoding="utf-8")
