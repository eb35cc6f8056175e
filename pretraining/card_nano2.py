"""Write the tables of nano 2, and print which targets it reaches.

python -m pretraining export_nano2 --untrained
python -m pretraining evaluate --json pretraining/work/results.json
python -m pretraining evaluate --folder sda_core/backbones/nano2 --json pretraining/work/nano2/results.json
python -m pretraining evaluate --folder pretraining/work/nano2/untrained --json pretraining/work/nano2/untrained.json
python -m pretraining probes --json pretraining/work/nano2/probes.json --models "nano 2=sda_core/backbones/nano2:9408,\
nano=sda_core/backbones/nano,untrained=pretraining/work/nano2/untrained:9408"
python -m pretraining card_nano2
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

from pretraining.card import between_marks
from pretraining.common import HERE, WORK, Work

TEACHER, MINILM = "EfficientNet-lite0", "MiniLM"
RECALL, NEIGHBOUR, SPEARMAN = "text to image R@10", "1-NN", "Spearman with MiniLM's cosines"
MODELS = ("nano 2", "nano", "untrained")
NAMES = {"category": "type", "shape": "motif"}
"""Names in the tables of attributes of the built-in shop."""
FOREIGN = ("openmoji (style never seen)", "flat-color-icons (style never seen)")
CARD, README = HERE.parent / "sda_core" / "backbones" / "nano2" / "MODEL_CARD.md", HERE / "README.md"

Probes = Mapping[str, Mapping[str, float]]
Evaluations = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    Attributes:
        name: description of the measure.
        least: the smallest value that reaches the target.
        found: the measured value by model; a model that was not measured is absent.
    """

    name: str
    least: float
    found: Mapping[str, float]

    @property
    def is_reached(self) -> bool:
        """Whether nano 2 reaches the target."""
        return self.found["nano 2"] >= self.least


def targets(probes: Probes, evaluations: Evaluations) -> list[Target]:
    """The targets that were set before the training.

    Args:
        probes: the results of :mod:`pretraining.probes`, by model and row.
        evaluations: the results of :mod:`pretraining.evaluate`, by model, data and measure.
    """
    rows = []
    for attribute, least in (("category", 0.6), ("colour", 0.9), ("pattern", 0.4), ("shape", 0.4)):
        rows.append(probe_target(probes, f"shop: {attribute}, linear", least))
    for attribute in ("product type", "colour group", "pattern"):
        for reader in ("linear", "1-NN"):
            row = f"H&M: {attribute}, {reader}"
            if row in probes["nano 2"]:
                rows.append(probe_target(probes, row, 0.8 * probes[TEACHER][row]))
    pairs, beauty = (next(name for name in evaluations["nano 2"] if part in name) for part in ("held-out pairs", "Beauty titles"))
    rows.append(evaluation_target(evaluations, pairs, RECALL, 0.45))
    for foreign in FOREIGN:
        name = next(name for name in evaluations["nano 2"] if name.startswith(foreign))
        rows.append(evaluation_target(evaluations, name, RECALL, evaluations["nano"][name][RECALL]))
    if NEIGHBOUR in evaluations["nano 2"][beauty]:
        rows.append(evaluation_target(evaluations, beauty, NEIGHBOUR, 0.36))
        rows.append(evaluation_target(evaluations, beauty, SPEARMAN, 0.75))
    return rows


def probe_target(probes: Probes, row: str, least: float) -> Target:
    """A target on a probe; all models that were probed are compared."""
    return Target(named(row), least, {model: found[row] for model, found in probes.items() if row in found})


def evaluation_target(evaluations: Evaluations, data: str, measure: str, least: float) -> Target:
    """A target on held-out data, with MiniLM beside it where it was measured."""
    found = {model: float(results[data][measure]) for model, results in evaluations.items()}
    if measure == NEIGHBOUR and MINILM in evaluations["nano 2"][data]:
        found[MINILM] = float(evaluations["nano 2"][data][MINILM])
    return Target(f"{data}: {measure.removeprefix('text to image ')}", least, found)


def named(row: str) -> str:
    """A row of the probes with the names of the tables: type for category, motif for shape."""
    for name, shown in NAMES.items():
        row = row.replace(f": {name},", f": {shown},")
    return row


def targets_table(rows: list[Target]) -> str:
    """The markdown table of the targets."""
    lines = [
        f"| what | target | {' | '.join(MODELS)} | {TEACHER} or {MINILM} | reached |",
        "|---" * (len(MODELS) + 4) + "|",
    ]
    for row in rows:
        figures = [f"{row.found[model]:.3f}" if model in row.found else "" for model in MODELS]
        teacher = next((f"{row.found[name]:.3f}" for name in (TEACHER, MINILM) if name in row.found), "")
        reached = "**yes**" if row.is_reached else "no"
        lines.append(f"| {row.name} | {row.least:.3f} | {' | '.join(figures)} | {teacher} | {reached} |")
    return "\n".join(lines)


def probes_table(probes: Probes) -> str:
    """The markdown table of the probes: one column for each model."""
    lines = [f"| accuracy above chance | {' | '.join(probes)} |", "|---" * (len(probes) + 1) + "|"]
    for row in dict.fromkeys(row for found in probes.values() for row in found):
        figures = [f"{found[row]:.3f}" if row in found else "" for found in probes.values()]
        lines.append(f"| {named(row)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def evaluations_table(evaluations: Evaluations) -> str:
    """The markdown table of the held-out data: a row for each measure."""
    lines = [f"| what | {' | '.join(MODELS)} | chance | {MINILM} |", "|---" * (len(MODELS) + 3) + "|"]
    for data, scores in evaluations["nano 2"].items():
        for measure, chance in ((RECALL, "chance R@10"), (NEIGHBOUR, "chance"), (SPEARMAN, "")):
            if measure in scores:
                figures = [f"{evaluations[model][data][measure]:.3f}" for model in MODELS]
                guess = f"{scores[chance]:.3f}" if chance else ""
                minilm = f"{scores[MINILM]:.3f}" if measure == NEIGHBOUR and MINILM in scores else ""
                name = measure.replace("text to image R@10", "R@10, title and keywords -> image")
                lines.append(f"| {data}: {name} | {' | '.join(figures)} | {guess} | {minilm} |")
    return "\n".join(lines)


def curve_table(file: Path) -> str:
    """The markdown table of the training curve at the steps with validation."""
    losses = {"dense": "dense", "token_heads": "heads, tokens", "vector_heads": "heads, vector"}
    heads = ("colour", "pattern", "motif", "type", "garment", "grocery")
    measures = {
        "valid_recall_at_10": "R@10, nano's images",
        "scenes_recall_at_10": "R@10, scenes",
        "valid_spearman": "Spearman, titles",
    }
    lines = [f"| step | loss | {' | '.join([*losses.values(), *heads, *measures.values()])} |"]
    lines.append("|---" * (2 + len(losses) + len(heads) + len(measures)) + "|")
    for step, _, _, loss, parts in pl.read_csv(file, separator="\t", quote_char=None).iter_rows():
        values = json.loads(parts)
        if "valid_recall_at_10" not in values:
            continue
        prefix = "right_" if "vector_heads" in values else "right_tokens_"
        names = [*losses, *(prefix + head for head in heads), *measures]
        cells = [f"{values[name]:.3f}" if name in values else "" for name in names]
        lines.append(f"| {step} | {loss:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def main(
    work: Work = WORK,
    write: Annotated[bool, typer.Option(help="Replace the tables of the model card and of the README.")] = True,
) -> None:
    """Print the table of the targets; update both files."""
    folder = work / "nano2"
    probes = read(folder / "probes.json")
    evaluations = {
        "nano 2": read(folder / "results.json"),
        "nano": read(work / "results.json"),
        "untrained": read(folder / "untrained.json"),
    }
    reached = targets_table(targets(probes, evaluations))
    print(reached)
    if write:
        tables = {
            CARD: {
                "curve": curve_table(folder / "curve.tsv"),
                "targets": reached,
                "probes": probes_table(probes),
                "results": evaluations_table(evaluations),
            },
            README: {"nano2": reached},
        }
        for file, own in tables.items():
            text = file.read_text(encoding="utf-8")
            for mark, table in own.items():
                text = between_marks(text, mark, table)
            file.write_text(text, encoding="utf-8")
