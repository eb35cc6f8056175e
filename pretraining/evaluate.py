"""Evaluate nano on images, words and titles that training did not see.

All vectors are computed from the checkpoint folder by the project's loader and ``encode``.  MiniLM, a much larger model of
texts, is the comparison.  Categories are predicted by the nearest other vector (cosine); chance is the sum of the squared
shares of the categories.  No setting is chosen by these results.

    python -m pretraining evaluate [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import ast
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from PIL import Image

from pretraining.common import CHECKPOINT, HERE, WORK, generator, number, settings
from pretraining.teachers import TextTeacher
from pretraining.texts import synsets
from pretraining.train import spearman
from sda_core.backbones import Backbone, build
from sda_core.params import Qwen25VL

NUM_PAIRS = 500
NUM_TITLES = 1000


def loaded(folder: Path) -> Backbone:
    """Load a checkpoint folder like the pipeline."""
    params = Qwen25VL(
        kind="qwen2_5_vl", name=str(folder), revision=None, dtype="float32", attention="sdpa",
        min_pixels=784, max_pixels=12544, max_text_tokens=128, pooling="mean",
    )  # fmt: skip
    return build(params, torch.device("cpu"))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)


@torch.inference_mode()
def text_vectors(backbone: Backbone, texts: list[str]) -> np.ndarray:
    """``(texts, D)`` unit vectors of texts."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    vectors = np.zeros((len(texts), backbone.dim), np.float32)
    for start in range(0, len(order), 64):
        places = order[start : start + 64]
        vectors[places] = backbone.encode(backbone.model, backbone.text_inputs([texts[place] for place in places])).numpy()
    return unit(vectors)


@torch.inference_mode()
def image_vectors(backbone: Backbone, pixels: np.ndarray, light: np.ndarray, prompt: str) -> np.ndarray:
    """``(images, D)`` unit vectors of RGBA images on white; light ones on grey."""
    parts = []
    for start in range(0, len(pixels), 32):
        images = []
        for rgba, flag in zip(pixels[start : start + 32], light[start : start + 32], strict=True):
            ground = Image.new("RGBA", rgba.shape[:2], (128, 128, 128) if flag else (255, 255, 255))
            images.append(Image.alpha_composite(ground, Image.fromarray(np.asarray(rgba))).convert("RGB"))
        parts.append(backbone.encode(backbone.model, backbone.image_inputs(images, prompt)).numpy())
    return unit(np.concatenate(parts))


def recall_at_10(queries: np.ndarray, candidates: np.ndarray) -> float:
    """The share of queries whose candidate, the one of the same row, is among the ten nearest."""
    scores = queries @ candidates.T
    return float(((scores > np.diag(scores)[:, None]).sum(1) < 10).mean())


def neighbour_accuracy(vectors: np.ndarray, categories: list[str]) -> tuple[float, float]:
    """The share of rows whose nearest other row has the same category, and the same by chance."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    nearest = scores.argmax(1)
    hits = np.mean([categories[place] == categories[other] for place, other in enumerate(nearest)])
    shares = np.array(list(Counter(categories).values())) / len(categories)
    return float(hits), float((shares**2).sum())


def held_out_words(seed: int, share: float, count: int) -> tuple[list[str], list[str]]:
    """Nouns of held-out synsets, and their WordNet subject, such as food, animal or artifact."""
    found: dict[str, set[int]] = {}
    for synset in synsets():
        if synset.part == "noun":
            held_out = number(seed, "synset", synset.name) / 2**63 < share
            for word in synset.words:
                found.setdefault(word, set()).add(synset.subject if held_out else -1)
    clear = sorted(word for word, subjects in found.items() if len(subjects) == 1 and -1 not in subjects and word.islower())
    words = [clear[place] for place in generator(seed, "held-out words").permutation(len(clear))[:count]]
    return words, [str(next(iter(found[word]))) for word in words]


def one_per_concept(images: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Draw one image of each concept."""
    order = generator(seed, "one per concept").permutation(len(images))
    return images[order.tolist()].unique("concept", keep="first", maintain_order=True)


def retrieval(backbone: Backbone, chosen: pl.DataFrame, pixels: np.ndarray, prompt: str) -> tuple[dict[str, float], np.ndarray]:
    """Search images by their texts.

    Args:
        backbone: the model.
        chosen: rows of the images, with their captions and titles.
        pixels: all images.
        prompt: text beside an image.

    Returns:
        R@10 with title and keywords as the query, with the title alone, and by chance; and the images' unit vectors.
    """
    places = chosen["place"].to_numpy()
    images = image_vectors(backbone, pixels[places], chosen["light"].to_numpy(), prompt)
    results = {
        "text to image R@10": recall_at_10(text_vectors(backbone, chosen["caption"].to_list()), images),
        "title alone to image R@10": recall_at_10(text_vectors(backbone, chosen["title"].to_list()), images),
        "chance R@10": min(1.0, 10 / len(chosen)),
    }
    return results, images


def beauty_titles(file: Path) -> list[tuple[str, str]]:
    """Titles of the Beauty data set, with their leaf category."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [ast.literal_eval(line) for line in lines]
    return [
        (record["title"], record["categories"][0][-1]) for record in records if record.get("title") and record.get("categories")
    ]


def title_scores(backbone: Backbone, teacher: TextTeacher, titles: list[tuple[str, str]]) -> dict[str, float]:
    """Prediction of the leaf category by the nearest title, and the rank correlation of cosines with those of MiniLM."""
    names, leaves = [name for name, _ in titles], [leaf for _, leaf in titles]
    own, reference = text_vectors(backbone, names), teacher.encode(names)
    upper = np.triu_indices(len(names), 1)
    accuracy, chance = neighbour_accuracy(own, leaves)
    return {
        "1-NN": accuracy,
        "chance": chance,
        "MiniLM": neighbour_accuracy(reference, leaves)[0],
        "bag of MiniLM's token vectors": neighbour_accuracy(bag_of_tokens(teacher, names), leaves)[0],
        "Spearman with MiniLM's cosines": spearman((own @ own.T)[upper], (reference @ reference.T)[upper]),
    }


def main(
    folder: Path = CHECKPOINT,
    results_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Evaluate a checkpoint folder and print the table."""
    params = settings()
    seed, prompt = params["seed"], params["train"]["image_prompts"][0]
    backbone = loaded(folder)
    teacher = TextTeacher(params["teachers"]["max_text_tokens"], half=False)
    results: dict[str, dict[str, Any]] = {}

    pixels = np.load(WORK / "images.npy", mmap_mode="r")
    texts = pl.read_parquet(WORK / "texts.parquet")["text"]
    captions = pl.read_parquet(WORK / "captions.parquet").group_by("image").agg(pl.col("text").last())
    caption_of = dict(zip(captions["image"].to_list(), texts.gather(captions["text"]).to_list(), strict=True))
    images = pl.read_parquet(WORK / "images.parquet").with_row_index("place")
    images = images.with_columns(pl.col("place").replace_strict(caption_of, return_dtype=pl.String).alias("caption"))
    test = images.filter((pl.col("split") == "test") & (pl.col("kind") != "glyph"))

    pairs = one_per_concept(test.filter(~pl.col("foreign")), seed)
    pairs = pairs[generator(seed, "pairs").permutation(len(pairs))[:NUM_PAIRS].tolist()]
    results[f"{len(pairs)} held-out pairs"], vectors = retrieval(backbone, pairs, pixels, prompt)
    named = (pairs["category"] != "").to_numpy()
    categories = pairs.filter(pl.col("category") != "")["category"].to_list()
    accuracy, chance = neighbour_accuracy(vectors[named], categories)
    results[f"{named.sum()} held-out images, category"] = {"1-NN": accuracy, "chance": chance}
    labels = pairs.filter(pl.col("category") != "")["title"].to_list()
    accuracy, chance = neighbour_accuracy(text_vectors(backbone, labels), categories)
    minilm, _ = neighbour_accuracy(teacher.encode(labels), categories)
    results[f"{named.sum()} held-out titles of images, category"] = {"1-NN": accuracy, "chance": chance, "MiniLM": minilm}
    emoji = pairs.filter(pl.col("kind") == "emoji")
    words, subjects = held_out_words(seed, params["texts"]["share_synsets_test"], 1000)
    accuracy, chance = neighbour_accuracy(text_vectors(backbone, words), subjects)
    minilm, _ = neighbour_accuracy(teacher.encode(words), subjects)
    results[f"{len(words)} held-out WordNet nouns, subject"] = {"1-NN": accuracy, "chance": chance, "MiniLM": minilm}
    emoji_words = emoji["title"].to_list()
    accuracy, chance = neighbour_accuracy(text_vectors(backbone, emoji_words), emoji["category"].to_list())
    minilm, _ = neighbour_accuracy(teacher.encode(emoji_words), emoji["category"].to_list())
    results[f"{len(emoji_words)} held-out emoji names, group"] = {"1-NN": accuracy, "chance": chance, "MiniLM": minilm}

    foreign = images.filter(pl.col("foreign"))
    for source in sorted(foreign["source"].unique().to_list()):
        own = one_per_concept(foreign.filter(pl.col("source") == source), seed)
        for name, chosen in (
            (f"{source} (style never seen)", own),
            (f"{source} (style and concept never seen)", own.filter(pl.col("split") == "test")),
        ):
            scores, vectors = retrieval(backbone, chosen, pixels, prompt)
            if chosen["category"].n_unique() > 1:
                scores["1-NN"], scores["chance"] = neighbour_accuracy(vectors, chosen["category"].to_list())
            results[f"{name}: {len(chosen)} pairs"] = scores

    file = HERE.parents[1] / "shared" / "data" / "beauty_2014_sequences" / "meta_Beauty.json.gz"
    if file.is_file():
        titles = beauty_titles(file)
        largest = {leaf for leaf, _ in Counter(leaf for _, leaf in titles).most_common(20)}
        for name, usable in (("all leaves", titles), ("20 largest leaves", [title for title in titles if title[1] in largest])):
            places = generator(seed, "beauty").permutation(len(usable))[:NUM_TITLES]
            results[f"{NUM_TITLES} Beauty titles, {name}"] = title_scores(backbone, teacher, [usable[place] for place in places])
    else:
        results["Beauty titles"] = {"skipped": "../shared/data/beauty_2014_sequences is absent"}
    for title, row in results.items():
        print(title)
        for name, value in row.items():
            print(f"    {name:<36}{value if isinstance(value, str) else f'{value:.3f}'}")
    if results_file:
        results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def bag_of_tokens(teacher: TextTeacher, texts: list[str]) -> np.ndarray:
    """``(texts, 384)`` unit vectors: the mean of MiniLM's input token vectors, a baseline without a model."""
    table = teacher.model.embeddings.word_embeddings.weight.detach().float().numpy()
    return unit(
        np.stack([table[encoding.ids].mean(0) for encoding in teacher.tokenizer.encode_batch(texts, add_special_tokens=False)])
    )
