"""What do item vectors know?  A linear probe for each attribute of the built-in shop, whose truth is known.

Of each attribute it is known which modality shows it (``sda_core.data.demo.latent``): category and colour are in picture and
words, pattern and shape in the picture only, brand and style in the words only.  A ridge classifier on a variant's vectors
predicts each of them, five-fold cross-validated over the items; the table shows accuracy above chance, 1 being perfect:
``(accuracy - largest class) / (1 - largest class)``.  An adapter that brings picture and words together may gain in the first
two and lose in the others.

Takes the project folder of a run on the built-in shop; ``{seed}`` in ``--root`` stands for the seed, as in
``compare_vectors.py``.  The table is left in ``experiments/results/attribute_probe``, which ``sda report --experiments`` shows.

    python experiments/attribute_probe.py --root 'experiments/runs/effect/seed-{seed}' --seeds 1 2 3 \\
        --variants zero_shot lora infonce sda
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from _runs import Reach, dots, leave, shop_attributes
from compare_vectors import workspace_of
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sda_core import log
from sda_core.artifacts import Workspace
from sda_core.data.demo import ATTRIBUTES
from sda_core.embeddings.controls import read_table
from sda_core.errors import ConfigError
from sda_core.params import DemoDataset, Params

SHOWN_BY = {
    "category": "both", "colour": "both", "pattern": "picture", "shape": "picture", "brand": "words", "style": "words",
}  # fmt: skip
PENALTIES = np.logspace(-2, 4, 7)
NUM_FOLDS = 5


def main() -> None:
    """Read the options, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".", help="the project folder of the run; {seed} in it stands for the seed")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    options = parser.parse_args()
    log.show_any_text()
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for seed in options.seeds:
        workspace, params = workspace_of(options.root, seed)
        for variant in options.variants:
            for column, accuracies in probed(workspace, params, variant).items():
                found.setdefault((variant, column), []).append(accuracies)
    place = leave(table(found, len(options.seeds)), "attribute_probe", root=options.root)
    dots(place / "plot.png", reaches(found), "accuracy above chance, range over the seeds", zero=True)


def probed(workspace: Workspace, params: Params, variant: str) -> dict[str, dict[str, float]]:
    """Accuracy above chance of each attribute, by column of the embeddings table (items with a picture only)."""
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError("params.yaml: dataset.source", "the truth is known of the built-in shop only", "use dataset=demo")
    attributes = shop_attributes(workspace, params.dataset)
    vectors = read_table(workspace.embeddings(variant))
    rows = np.flatnonzero(vectors.has_image)
    columns = {"fused": vectors.fused_IF, "picture": vectors.image_ID, "words": vectors.text_ID}
    return {
        column: {name: above_chance(matrix[rows], values_I[rows]) for name, values_I in attributes.items()}
        for column, matrix in columns.items()
    }


def above_chance(vectors_ID: np.ndarray, values_I: np.ndarray) -> float:
    """``(accuracy - largest class) / (1 - largest class)`` of a cross-validated linear probe."""
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    accuracy = float(cross_val_score(probe, vectors_ID, values_I, cv=folds).mean())
    chance = float(np.bincount(values_I).max() / len(values_I))
    return (accuracy - chance) / (1 - chance)


def table(found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], num_seeds: int) -> str:
    """A markdown table: a row for each variant and column, means over the seeds (range behind, where there are several)."""
    heads = [f"{name} ({SHOWN_BY[name]})" for name in ATTRIBUTES]
    lines = [
        f"### Linear probes of the shop's attributes, accuracy above chance, {num_seeds} seeds",
        "",
        "| variant | vectors | " + " | ".join(heads) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for (variant, column), of_seeds in found.items():
        cells = []
        for name in ATTRIBUTES:
            values = [accuracies[name] for accuracies in of_seeds]
            spread = f" ({min(values):.2f} .. {max(values):.2f})" if max(values) > min(values) else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {variant} | {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reaches(found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Reach]]:
    """The numbers of :func:`table` for a plot: by attribute, by variant and column."""
    panels: dict[str, dict[str, Reach]] = {}
    for name in ATTRIBUTES:
        rows = panels.setdefault(f"{name} ({SHOWN_BY[name]})", {})
        for (variant, column), of_seeds in found.items():
            values = [accuracies[name] for accuracies in of_seeds]
            rows[f"{variant}, {column}"] = float(np.mean(values)), min(values), max(values)
    return panels


if __name__ == "__main__":
    main()
