from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from sda_core.backbones import build
from sda_core.params import BackboneParams, Qwen25VL, TinyQwen25VL

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_params():
    """Make params of the tiny backbone with some values changed."""

    def make(**changes) -> TinyQwen25VL:
        values = {
            "kind": "tiny_qwen2_5_vl",
            "seed": 0,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vision_hidden_size": 32,
            "vision_depth": 2,
            "min_pixels": 784,
            "max_pixels": 12544,
            "max_text_tokens": 256,
            "pooling": "mean",
        }
        return TinyQwen25VL(**(values | changes))

    return make


@pytest.fixture(scope="session")
def tiny(tiny_params):
    return build(tiny_params(), CPU)


@pytest.fixture(scope="session")
def saved_folder(tiny, tmp_path_factory):
    """The tiny backbone as a checkpoint folder; not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_params():
    """Make params that load a checkpoint."""

    def make(name, **changes) -> Qwen25VL:
        values = {
            "kind": "qwen2_5_vl",
            "name": str(name),
            "revision": None,
            "dtype": "float32",
            "attention": "auto",
            "min_pixels": 784,
            "max_pixels": 12544,
            "max_text_tokens": 256,
            "pooling": "mean",
        }
        return Qwen25VL(**(values | changes))

    return make


@pytest.fixture(scope="session")
def noise_image():
    """Make an image of noise."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


# ------------------------------------------------------------------------------------------- other families
@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a family's tiny checkpoint, written at its first use; not to be written to."""
    root = tmp_path_factory.mktemp("families")
    path = Path(__file__).with_name("tiny_checkpoints.py")
    spec = importlib.util.spec_from_file_location("tiny_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)

    @cache
    def make(family: str) -> Path:
        return writer.write(family, root / family)

    return make


@pytest.fixture(scope="session")
def family_params(tiny_folder):
    """Make the params of a family's tiny checkpoint, with some values changed."""

    def make(family: str, **changes):
        kind = "smolvlm" if family == "idefics3" else family
        values = {"kind": kind, "name": str(tiny_folder(family)), "revision": None, "dtype": "float32", "attention": "auto"}
        if kind in {"clip", "siglip"}:
            values |= {"max_text_tokens": 40}
        elif kind.startswith("qwen"):
            values |= {"max_text_tokens": 160, "min_pixels": 784, "max_pixels": 9408, "pooling": "mean"}
        else:
            values |= {"max_text_tokens": 160, "max_tiles": 4, "pooling": "mean"}
        return TypeAdapter(BackboneParams).validate_python(values | changes)

    return make


@pytest.fixture(scope="session")
def family(family_params):
    """A family's tiny backbone, one for all tests; not to be changed."""
    return cache(lambda name: build(family_params(name), CPU))
