"""Params sections for tests: those of params.yaml and conf/, with the values that a test changes; positions of several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from ruamel.yaml import YAML

from sda_core.params import TinyQwen25VL, load_params

_ROOT = Path(__file__).resolve().parents[1]

SHIPPED = load_params(_ROOT / "params.yaml")


def changed(section: Any, **changes: Any) -> Any:
    """A section with other values, validated."""
    return type(section)(**{**section.model_dump(), **changes})


def short_ladder(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of params with the variants of conf/ladder/short.yaml, which any data set can have; changed in place."""
    tree["variants"] = ["id", "zero_shot", "lora", "sda"]
    tree["train_recommender"]["variants"] = ["zero_shot", "lora", "sda"]
    tree["control_embeddings"]["variants"] = []
    return tree


def tiny_section(**changes: Any) -> TinyQwen25VL:
    """The random backbone of conf/backbone/tiny.yaml."""
    values = YAML(typ="safe").load((_ROOT / "conf" / "backbone" / "tiny.yaml").read_text(encoding="utf-8"))
    return TinyQwen25VL(**(values | changes))


def seeded(*tables: pl.DataFrame, first: int = 1) -> pl.DataFrame:
    """POSITIONS tables, one of each seed, as one table SEED_POSITIONS; the seeds count from ``first``."""
    parts = [table.select(pl.lit(seed, pl.Int32).alias("seed"), pl.all()) for seed, table in enumerate(tables, first)]
    return pl.concat(parts)
