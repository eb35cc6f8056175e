"""Measure how item vectors separate items similar in one modality only.

There are three kinds of pairs: similar in image and text (agreeing), similar in image and different in text, or similar in
text and different in image (conflicting).  In vectors that preserve both modalities, agreeing pairs are nearer than conflicting
ones.  The metric is the area under the ROC curve (AUC): the probability that the cosine of an agreeing pair is above that of a
conflicting one.  1 is perfect; at 0.5 the vectors do not separate them, because one modality dominates.

Similarity is defined in two ways:

base: by the vectors of the frozen backbone, as in the paper: similar means a cosine among the highest 2 % of all pairs, different
    means one below the median.  The choice uses the vectors of zero_shot, which therefore have an advantage.

truth: by the attributes of the built-in shop (only there).  The image shows category, colour, pattern and shape, the text
    category, colour, brand and style; similar means three or four of them in common, different means at most one.

The input is the project folder of a run; {seed} in --root is replaced by the seed, as in compare_vectors.

    python -m experiments conflicting_items --root 'experiments/runs/effect/seed-{seed}' --seeds 1,2,3 \\
        --variants zero_shot,lora,infonce,sda

Table and plot are written to experiments/results/conflicting_items, which `sda report --experiments` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.metrics import roc_auc_score

from experiments.attribute_probe import SHOWN_BY
from experiments.options import FusedDim, SeedRoot, Seeds, Variants
from experiments.study import markdown_table, mean_with_range, shop_attributes, write_results
from experiments.workspaces import BASE, fused_again, workspace_of
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Numbers
from sda_core.embeddings.controls import Vectors, read_table
from sda_core.params import DemoDataset, Params
from sda_core.unit_rows import unit_rows

AGREEING, IMAGE, TEXT = "similar in both", "similar in image only", "similar in text only"
KINDS = (AGREEING, IMAGE, TEXT)
SHARE_ALIKE = 0.02  # share of all pairs, in each modality
MAX_ITEMS = 2_000  # the first items; two million pairs
Pairs = Mapping[str, np.ndarray]  # by kind: mask of the pairs


Measured = Mapping[tuple[str, str], Sequence[Mapping[str, np.ndarray]]]  # by choice and variant: for each seed, cosines by kind


def main(
    variants: Variants,
    root: SeedRoot = ".",
    seeds: Seeds = Numbers((1,)),
    fused_dim: FusedDim = None,
    name: Annotated[str, typer.Option("--name", help="Suffix of the folder with the results.")] = "",
) -> None:
    """Compare the pairs, write table and plot."""
    measured: dict[tuple[str, str], list[Mapping[str, np.ndarray]]] = {}
    for seed in seeds:
        workspace, params = workspace_of(root, seed)
        base = read_table(workspace.embeddings(BASE))
        rows = np.flatnonzero(base.has_image & base.has_text)[:MAX_ITEMS]
        choices = {"base": chosen_by_base(base, rows)} | chosen_by_truth(workspace, params, rows)
        for variant in variants:
            vectors = fused_again(workspace, params, read_table(workspace.embeddings(variant)), fused_dim)
            cosines = pair_cosines(vectors.fused_IF[rows])
            for choice, pairs in choices.items():
                of_kinds = {kind: cosines[pairs[kind]] for kind in KINDS}
                measured.setdefault((choice, variant), []).append(of_kinds)
    plot(measured, write_results(table(measured, len(seeds)), "conflicting_items", name, root) / "plot.png")


def pair_cosines(vectors_ND: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows, row by row of the upper triangle."""
    unit_ND = unit_rows(vectors_ND)
    return (unit_ND @ unit_ND.T)[np.triu_indices(len(unit_ND), 1)]


def chosen_by_base(base: Vectors, rows: np.ndarray) -> Pairs:
    """Pairs by the cosines of the backbone's image and text vectors."""
    image, text = pair_cosines(base.image_ID[rows]), pair_cosines(base.text_ID[rows])
    alike_image, alike_text = (cosines > np.quantile(cosines, 1 - SHARE_ALIKE) for cosines in (image, text))
    return _kinds(alike_image, image < np.median(image), alike_text, text < np.median(text))


def chosen_by_truth(workspace: Workspace, params: Params, rows: np.ndarray) -> dict[str, Pairs]:
    """Pairs by the attributes that the built-in shop's images and texts show; empty for another shop."""
    if not isinstance(params.dataset, DemoDataset):
        return {}
    first, second = np.triu_indices(len(rows), 1)
    counts = {modality: np.zeros(len(first), dtype=np.int32) for modality in ("image", "text")}
    for name, values_I in shop_attributes(workspace, params.dataset).items():
        modality, values = SHOWN_BY[name], values_I[rows]
        for counted in counts if modality == "both" else (modality,):
            counts[counted] += values[first] == values[second]
    image, text = counts["image"], counts["text"]
    return {"truth": _kinds(image >= 3, image <= 1, text >= 3, text <= 1)}


def _kinds(alike_image: np.ndarray, unlike_image: np.ndarray, alike_text: np.ndarray, unlike_text: np.ndarray) -> Pairs:
    return {AGREEING: alike_image & alike_text, IMAGE: alike_image & unlike_text, TEXT: alike_text & unlike_image}


def auc(agreeing: np.ndarray, conflicting: np.ndarray) -> float:
    """Probability that the cosine of an agreeing pair is above that of a conflicting one; ties count half; NaN without pairs."""
    if not (len(agreeing) and len(conflicting)):
        return float("nan")
    truth = np.concatenate([np.ones(len(agreeing)), np.zeros(len(conflicting))])
    return float(roc_auc_score(truth, np.concatenate([agreeing, conflicting])))


def table(measured: Measured, num_seeds: int) -> str:
    """A Markdown table: one row per choice of pairs and variant, means over the seeds with their range."""
    rows = []
    for choice, variant in sorted(measured, key=lambda key: key[0]):
        of_seeds = measured[choice, variant]
        cells = [choice, variant]
        for kind in KINDS:
            cosines = [cosines[kind].mean() if len(cosines[kind]) else float("nan") for cosines in of_seeds]
            cells.append(f"{len(of_seeds[0][kind]):,}, {np.mean(cosines):.3f}")
        for kind in (IMAGE, TEXT):
            cells.append(mean_with_range([auc(cosines[AGREEING], cosines[kind]) for cosines in of_seeds], digits=3))
        rows.append(cells)
    heads = ["pairs by", "vectors", *(f"{kind}: pairs, cosine" for kind in KINDS), "AUC, image only", "AUC, text only"]
    return markdown_table(heads, rows, f"Agreeing against conflicting pairs, cosines of the fused vectors, {num_seeds} seeds")


def plot(measured: Measured, path: Path) -> None:
    """Box plots (quartiles; whiskers at 5 and 95 %) of the cosines, one panel per choice of pairs; the first seed."""
    from matplotlib import pyplot as plt

    choices = list(dict.fromkeys(choice for choice, _ in measured))
    figure, axes = plt.subplots(1, len(choices), figsize=(6 * len(choices), 3.6), squeeze=False, layout="constrained")
    for axis, choice in zip(axes[0], choices, strict=True):
        variants = [variant for of_choice, variant in measured if of_choice == choice]
        for number, (kind, colour) in enumerate(zip(KINDS, ("#1f5fa8", "#c8641e", "#5b8c3a"), strict=True)):
            boxes = axis.boxplot(
                [measured[choice, variant][0][kind] for variant in variants],
                positions=np.arange(len(variants)) + (number - 1) * 0.25, widths=0.2, whis=(5, 95), showfliers=False,
                patch_artist=True, medianprops={"color": "white"},
            )  # fmt: skip
            for box in boxes["boxes"]:
                box.set(facecolor=colour, edgecolor=colour)
            axis.plot([], [], color=colour, linewidth=6, label=kind)
        axis.set_xticks(range(len(variants)), variants)
        axis.set_ylabel("cosine of the fused vectors")
        axis.set_title(f"pairs chosen by {choice}", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
