"""Probe image vectors for attributes on which no model was trained: in the built-in shop, and in H&M if its data exists.

For each model the table has linear probes (``experiments.attribute_probe``) of the shop's category, colour, pattern and shape
(its motif), and of H&M's product type, colour group and pattern.  For H&M it also has the class of the nearest neighbour.  All
values are accuracy above chance, ``(accuracy - largest class) / (1 - largest class)``.  The pooled features of
EfficientNet-lite0 are the comparison.  ``--shop`` is a project folder in which the stages up to ``fetch_images`` ran with
``dataset=demo``.

    python -m pretraining probes --shop . --models nano=sda_core/backbones/nano,nano2=sda_core/backbones/nano2:9408 --json FILE
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from PIL import Image

from experiments.attribute_probe import above_chance
from pretraining.common import HERE, generator, settings
from pretraining.evaluate import unit
from pretraining.seen_teachers import maps, network
from sda_core.backbones import build
from sda_core.params import Qwen25VL

SHOP_ATTRIBUTES = ("category", "colour", "pattern", "shape")
HM_ATTRIBUTES = ("product type", "colour group", "pattern")
HM = HERE.parents[1] / "shared" / "data" / "hm_week"
NUM_HM, LEAST_IN_CLASS, LONG_SIDE = 2000, 20, 120


def shop_images(shop: Path) -> tuple[list[Image.Image], dict[str, list[str]]]:
    """The images of the shop, and the true values of their attributes by name."""
    shards = pl.concat([pl.read_parquet(file) for file in sorted((shop / "data" / "images").glob("shard-*.parquet"))])
    shards = shards.filter(pl.col("image").bin.size() > 0).sort("item_id")
    truth = pl.read_parquet(shop / "data" / "truth.parquet").filter(pl.col("attribute").is_in(SHOP_ATTRIBUTES))
    values = truth.pivot("attribute", index="raw_item_id", values="value")
    table = shards.select("raw_item_id").join(values, on="raw_item_id", how="left", maintain_order="left")
    return [opened(content) for content in shards["image"]], {name: table[name].to_list() for name in SHOP_ATTRIBUTES}


def opened(content: bytes) -> Image.Image:
    """Decode the content of an image file to RGB."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def hm_images(folder: Path, count: int, seed: int) -> tuple[list[Image.Image], dict[str, list[str]]]:
    """A random sample of H&M's photographs, and the values of their attributes by name."""
    with gzip.open(folder / "items.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [rows[place] for place in np.sort(generator(seed, "hm").permutation(len(rows))[:count])]
    images = [opened((folder / "images" / f"{row['parent_asin']}.jpg").read_bytes()) for row in rows]
    return images, {
        "product type": [row["categories"][-1] for row in rows],
        "colour group": [row["features"][0] for row in rows],
        "pattern": [row["features"][1] for row in rows],
    }


@torch.inference_mode()
def model_vectors(folder: Path, min_pixels: int, images: list[Image.Image], prompt: str) -> np.ndarray:
    """``(images, D)`` vectors of images, by the pipeline's own loader.

    Args:
        folder: the checkpoint.
        min_pixels: smallest number of pixels to which an image is scaled.
        images: the images.
        prompt: text beside each image.
    """
    params = Qwen25VL(
        kind="qwen2_5_vl", name=str(folder), revision=None, dtype="float32", attention="sdpa",
        min_pixels=min_pixels, max_pixels=12544, max_text_tokens=128, pooling="mean",
    )  # fmt: skip
    backbone = build(params, torch.device("cpu"))
    parts = [
        backbone.encode(backbone.model, backbone.image_inputs(images[start : start + 32], prompt)).numpy()
        for start in range(0, len(images), 32)
    ]
    return np.concatenate(parts)


@torch.inference_mode()
def teacher_vectors(images: list[Image.Image]) -> np.ndarray:
    """Pooled features of EfficientNet-lite0 before its classifier, at 224 px; bfloat16, as for the teacher of nano 2."""
    teacher, found = network().to(torch.bfloat16), []
    for start in range(0, len(images), 32):
        rgb = torch.from_numpy(
            np.stack([np.asarray(image.resize((LONG_SIDE, LONG_SIDE))) for image in images[start : start + 32]])
        )
        end = maps(teacher, rgb.permute(0, 3, 1, 2).float())[..., 112:].permute(0, 3, 1, 2).to(torch.bfloat16)
        found.append(teacher._swish(teacher._bn1(teacher._conv_head(end))).float().mean((2, 3)).numpy())
    return np.concatenate(found)


def scores(vectors: np.ndarray, values: dict[str, list[str]], *, neighbours: bool) -> dict[str, float]:
    """Accuracy above chance of each attribute, by a linear probe and, with ``neighbours``, by the nearest neighbour."""
    found = {}
    for name, labels in values.items():
        counts = Counter(labels)
        rows = np.array([place for place, label in enumerate(labels) if counts[label] >= LEAST_IN_CLASS])
        _, classes = np.unique([labels[place] for place in rows], return_inverse=True)
        found[f"{name}, linear"] = above_chance(vectors[rows], classes)
        if neighbours:
            cosines = unit(vectors[rows]) @ unit(vectors[rows]).T
            np.fill_diagonal(cosines, -np.inf)
            chance = np.bincount(classes).max() / len(classes)
            found[f"{name}, 1-NN"] = float(((classes[cosines.argmax(1)] == classes).mean() - chance) / (1 - chance))
    return found


def main(
    models: Annotated[str, typer.Option(help="Models as name=folder or name=folder:min_pixels, separated by commas.")] = "",
    shop: Annotated[Path, typer.Option(help="A project folder with the built-in shop's data.")] = Path(),
    teacher: Annotated[bool, typer.Option(help="Compare with EfficientNet-lite0.")] = True,
    results_file: Annotated[Path | None, typer.Option("--json", help="Add the results to this file.")] = None,
) -> None:
    """Probe all models and print one table."""
    params = settings()
    torch.set_num_threads(params["train"]["num_threads"])
    prompt = params["train"]["image_prompts"][0]
    sets: dict[str, Any] = {"shop": shop_images(shop)}
    if HM.is_dir():
        sets["H&M"] = hm_images(HM, NUM_HM, params["seed"])
    else:
        print("H&M: skipped, ../shared/data/hm_week does not exist")
    results: dict[str, dict[str, float]] = {}
    if results_file and results_file.is_file():
        results = json.loads(results_file.read_text(encoding="utf-8"))
    named = [entry.split("=") for entry in models.split(",") if entry]
    for name, where in [*named, *([["EfficientNet-lite0", ""]] if teacher else [])]:
        folder, _, pixels = where.partition(":")
        results[name] = {}
        for title, (images, values) in sets.items():
            vectors = model_vectors(Path(folder), int(pixels or 784), images, prompt) if where else teacher_vectors(images)
            found = scores(vectors, values, neighbours=title == "H&M")
            results[name] |= {f"{title}: {measure}": value for measure, value in found.items()}
        if results_file:
            results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    rows = list(dict.fromkeys(row for found in results.values() for row in found))
    print(f"| accuracy above chance | {' | '.join(results)} |")
    print("|---" * (len(results) + 1) + "|")
    for row in rows:
        print(f"| {row} | {' | '.join(f'{found[row]:.3f}' if row in found else '' for found in results.values())} |")
