"""Evaluate nano_lvlm: held-out captions with the right and another image, held-out questions, cosines of its vectors.

The first product of each test scene has a type and a colour that never occur together in training.
Questions are answered by greedy decoding; an answer is right if every token is.
Chance is the share of the most frequent answer.
Nothing is chosen by these figures.

The cosines are of the vectors that the pipeline computes for items of the built-in shop.

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

from pretraining.common import HERE, WORK, generator, settings
from pretraining.evaluate import loaded, text_vectors, unit
from pretraining.generative import Reader
from pretraining.model import PATCH, ImageGrid
from pretraining.train_lvlm import Learner, Material, answered, caption_losses
from sda_core.backbones import Backbone
from sda_core.data.demo.images import draw_item
from sda_core.data.demo.latent import world
from sda_core.data.demo.words import describe
from sda_core.data.prompts import image_prompt, text_prompt
from sda_core.params import DemoDataset, Params, load_params

NUM_ITEMS = 300


def from_folder(folder: Path, sides: list[int]) -> Learner:
    """An exported checkpoint, ready to be asked."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    grids = {side: ImageGrid.of(model.model.visual, side // PATCH, side // PATCH) for side in sides}
    return Learner(model, Reader(PreTrainedTokenizerFast.from_pretrained(folder)), grids)


def captions_result(learner: Learner, material: Material, places: np.ndarray, side: int) -> dict[str, float]:
    """Nats a token with the right image and with another scene's, their difference, and its standard error over scenes."""
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
    """By attribute: share answered rightly, chance, share answered rightly from another scene's image, number of questions."""
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


def shop_vectors(backbone: Backbone, params: Params, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The pipeline's unit vectors of the built-in shop's first ``count`` items: images and texts."""
    dataset = params.dataset
    assert isinstance(dataset, DemoDataset)
    shop = world(dataset)
    texts = []
    for _, words in zip(range(count), describe(shop, dataset.seed, "Shop", dataset.text_noise), strict=False):
        row = {
            "title": words.title, "brand": words.brand, "price": f"{words.price_cents / 100:.2f}",
            "categories": list(words.path), "features": list(words.features), "description": words.description,
        }  # fmt: skip
        texts.append(text_prompt(row, params.items))
    prompt, found = image_prompt(params.items), []
    with torch.inference_mode():
        for start in range(0, count, 50):
            images = [draw_item(shop, item, dataset.seed, dataset.image_side) for item in range(start, min(start + 50, count))]
            found.append(backbone.encode(backbone.model, backbone.image_inputs(images, prompt)).numpy())
    return unit(np.concatenate(found)), text_vectors(backbone, texts)


def likeness(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Mean cosine of two different items' vectors, within and across modalities, and of an item's own two."""
    apart = ~np.eye(len(images), dtype=bool)
    return {
        "two images": float((images @ images.T)[apart].mean()),
        "two texts": float((texts @ texts.T)[apart].mean()),
        "image and another's text": float((images @ texts.T)[apart].mean()),
        "image and own text": float((images * texts).sum(1).mean()),
    }


def main(
    work: Path = WORK,
    folder: Path = HERE / "nano_lvlm",
    results_file: Annotated[Path | None, typer.Option("--json", help="Write the results there as well.")] = None,
    num_scenes: Annotated[int, typer.Option(help="How many test scenes to use, at most all of them.")] = 400,
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
    images, texts = shop_vectors(loaded(folder), load_params(HERE.parent / "params.yaml"), NUM_ITEMS)
    results[f"cosines of {NUM_ITEMS} items of the built-in shop"] = likeness(images, texts)
    for title, row in results.items():
        print(f"{title:<48}" + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if results_file:
        results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
