"""Measure which attributes item vectors encode: linear probes of the true attributes of the built-in shop.

The modality of each attribute is known (sda_core.data.demo.latent): category and colour are in image and text, pattern and
shape in the image only, brand and style in the text only.  A ridge classifier on a variant's vectors predicts each attribute,
five-fold cross-validated over the items.  The table shows accuracy above chance, 1 being perfect:
(accuracy - largest class) / (1 - largest class).  An adapter that aligns image and text may gain in the first two and lose in
the others.

The input is the project folder of a run on the built-in shop; {seed} in --root is replaced by the seed, as in compare_vectors.
The table is written to experiments/results/attribute_probe, which `sda report --experiments` shows.

    python -m experiments attribute_probe --root 'experiments/runs/effect/seed-{seed}' --seeds 1,2,3 \\
        --variants zero_shot,lora,infonce,sda
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.options import SeedRoot, Seeds, Variants
from experiments.study import (
    Panels,
    markdown_table,
    mean_and_range,
    mean_with_range,
    plot_intervals,
    shop_attributes,
    write_results,
)
from experiments.workspaces import workspace_of
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Numbers
from sda_core.data.demo import ATTRIBUTES
from sda_core.embeddings.controls import read_table
from sda_core.errors import ConfigError
from sda_core.params import DemoDataset, Params

SHOWN_BY = {
    "category": "both", "colour": "both", "pattern": "image", "shape": "image", "brand": "text", "style": "text",
}  # fmt: skip
PENALTIES = np.logspace(-2, 4, 7)
NUM_FOLDS = 5
Accuracies = Mapping[tuple[str, str], Sequence[Mapping[str, float]]]  # by variant and column: for each seed, by attribute


def main(variants: Variants, root: SeedRoot = ".", seeds: Seeds = Numbers((1,))) -> None:
    """Probe the vectors, write table and plot."""
    measured: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for seed in seeds:
        workspace, params = workspace_of(root, seed)
        for variant in variants:
            for column, accuracies in probe(workspace, params, variant).items():
                measured.setdefault((variant, column), []).append(accuracies)
    results = write_results(table(measured, len(seeds)), "attribute_probe", root=root)
    plot_intervals(results / "plot.png", intervals(measured), "accuracy above chance, range over the seeds", zero=True)


def probe(workspace: Workspace, params: Params, variant: str) -> dict[str, dict[str, float]]:
    """Accuracy above chance of each attribute, by column of the embeddings table (items with an image only)."""
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError("params.yaml: dataset.source", "the truth is known of the built-in shop only", "use dataset=demo")
    attributes = shop_attributes(workspace, params.dataset)
    vectors = read_table(workspace.embeddings(variant))
    rows = np.flatnonzero(vectors.has_image & vectors.has_text)
    columns = {"fused": vectors.fused_IF, "image": vectors.image_ID, "text": vectors.text_ID}
    return {
        column: {name: above_chance(matrix[rows], values_I[rows]) for name, values_I in attributes.items()}
        for column, matrix in columns.items()
    }


def above_chance(vectors_ID: np.ndarray, values_I: np.ndarray) -> float:
    """``(accuracy - largest class) / (1 - largest class)`` of a cross-validated linear probe."""
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    accuracy = float(cross_val_score(classifier, vectors_ID, values_I, cv=folds).mean())
    chance = float(np.bincount(values_I).max() / len(values_I))
    return (accuracy - chance) / (1 - chance)


def table(measured: Accuracies, num_seeds: int) -> str:
    """A Markdown table: one row per variant and column, means over the seeds (with the range if there are several)."""
    rows = [
        [variant, column, *(mean_with_range([accuracies[name] for accuracies in of_seeds]) for name in ATTRIBUTES)]
        for (variant, column), of_seeds in measured.items()
    ]
    title = f"Linear probes of the shop's attributes, accuracy above chance, {num_seeds} seeds"
    return markdown_table(["variant", "vectors", *(f"{name} ({SHOWN_BY[name]})" for name in ATTRIBUTES)], rows, title)


def intervals(measured: Accuracies) -> Panels:
    """The numbers of :func:`table` for a plot: by attribute, by variant and column."""
    return {
        f"{name} ({SHOWN_BY[name]})": {
            f"{variant}, {column}": mean_and_range([accuracies[name] for accuracies in of_seeds])
            for (variant, column), of_seeds in measured.items()
        }
        for name in ATTRIBUTES
    }
