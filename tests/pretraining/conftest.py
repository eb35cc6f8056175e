"""A made-up corpus of nano's form, for the trainings of nano and of nano 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pretraining.tokenizer import train_tokenizer
from sda_core.backbones.qwen2_5_vl import SPECIAL_TOKENS

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve coloured squares with captions, and a few words; tests copy the folder and leave it as it is."""
    work = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    names = [f"{colour} {noun}" for colour in COLOURS for noun in ("cup", "hat", "shoe")]
    pixels = np.zeros((12, 60, 60, 4), np.uint8)
    for place, name in enumerate(names):
        pixels[place, 10:50, 10:50] = (*COLOURS[name.split()[0]], 255)
    np.save(work / "images.npy", pixels)
    pl.DataFrame({
        "source": ["noto"] * 12, "kind": ["emoji"] * 12, "title": names, "keywords": [[]] * 12, "category": ["x"] * 12,
        "light": [False] * 12, "concept": names, "split": ["train"] * 10 + ["valid"] * 2, "foreign": [False] * 12,
    }, schema_overrides={"keywords": pl.List(pl.String)}).write_parquet(work / "images.parquet")  # fmt: skip
    texts = [*names, *[f"word {letter}" for letter in "abcdefgh"], "a gloss of one", "a gloss of two", "a title of three"]
    kinds, splits = ["caption"] * 12 + ["word"] * 8 + ["gloss", "gloss", "title"], ["train"] * 20 + ["valid"] * 3
    pl.DataFrame({"text": texts, "kind": kinds, "split": splits}).write_parquet(work / "texts.parquet")
    pl.DataFrame({"image": range(12), "text": range(12)}).write_parquet(work / "captions.parquet")
    tokenizer = train_tokenizer(texts * 3, 300)
    tokenizer.save_pretrained(work / "tokenizer")
    num_plain = len(tokenizer) - len(SPECIAL_TOKENS)
    np.save(work / "token_vectors.npy", rng.normal(size=(num_plain, 384)))
    np.save(work / "token_shares.npy", np.full(num_plain, 1 / num_plain))
    for name, rows, width in (("text_targets", len(texts), 384), ("image_targets", 12, 1280)):
        vectors = rng.normal(size=(rows, width))
        np.save(work / f"{name}.npy", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return work
