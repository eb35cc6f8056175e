"""Evaluate nano_lvlm on held-out data: captions, with the correct image and with another one, and questions.

The first product of each test scene has a pair of type and colour that does not occur in training.  Questions are answered by
greedy decoding; an answer is correct if all its tokens are.  Chance is the share of the most frequent answer.  No setting is
chosen by these results.

`sda check-adapter` measures its vectors of a shop's items.

    python -m pretraining evaluate_lvlm [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from pretraining.common import HERE, WORK, Work, generator, settings
from pretraining.generative import Reader
from pretraining.model import PATCH, ImageGrid
from pretraining.train_lvlm import Learner, Material, answered, caption_losses


def from_folder(folder: Path, sides: list[int]) -> Learner:
    """Load an exported checkpoint for images of the given sides in pixels."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    grids = {side: ImageGrid.of(model.model.visual, side // PATCH, side // PATCH) for side in sides}
    return Learner(model, Reader(PreTrainedTokenizerFast.from_pretrained(folder)), grids)


def captions_result(learner: Learner, material: Material, places: np.ndarray, side: int) -> dict[str, float]:
    """Nats per token with the correct image and with that of another scene, their difference, and its standard error."""
    right, other = (caption_losses(learner, material, places, side, shuffled=flag) for flag in (False, True))
    gap = other[:, 0] - right[:, 0]
    tokens = right[:, 1]
    mean = gap.sum() / tokens.sum()
    error = np.sqrt(((gap - mean * tokens) ** 2).sum()) / tokens.sum()
    return {
        "right image": right[:, 0].sum() / tokens.sum(), "other image": other[:, 0].sum() / tokens.sum(),
        "difference": mean, "standard error": error,
    }  # fmt: skip


def questions_result(learner: Learner, material: Material, places: np.ndarray, side: int) -> dict[str, dict[str, float]]:
    """By attribute: share of correct answers, chance, the share with the image of another scene, number of questions."""
    right, other = (answered(learner, material, places, side, shuffled=flag) for flag in (False, True))
    return {
        about: {
            "right": float(hits.mean()),
            "chance": Counter(wanted).most_common(1)[0][1] / len(wanted),
            "other image": float(other[about][0].mean()),
            "questions": len(hits),
        }
        for about, (hits, wanted) in right.items()
    }


def main(
    work: Work = WORK,
    folder: Path = HERE / "nano_lvlm",
    results_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    num_scenes: Annotated[int, typer.Option(help="Number of test scenes to use, at most all of them.")] = 400,
) -> None:
    """Evaluate a checkpoint folder and print the tables."""
    params = settings()
    sides = list(params["lvlm"]["side_shares"])
    learner, material = from_folder(folder, sides), Material.read(work, params)
    places = generator(params["seed"], "test order").permutation(material.places["test"])[:num_scenes]
    results: dict[str, Any] = {}
    for side in sides:
        results[f"captions, {side} pixels"] = captions_result(learner, material, places, side)
        for about, row in questions_result(learner, material, places, side).items():
            results[f"question: {about}, {side} pixels"] = row
    for title, row in results.items():
        print(f"{title:<48}" + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if results_file:
        results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
