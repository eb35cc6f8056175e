"""Encoding in blocks: sizes do not matter, finished blocks are kept, and what cannot run is rejected in one line."""

from __future__ import annotations

import logging
import platform
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sda_core.backbones import build
from sda_core.errors import ConfigError, DataError
from sda_core.items import ItemSource
from tests.embeddings.noise_shop import (
    CPU,
    TINY,
    NoiseImages,
    assert_close,
    assert_equal,
    encoded,
    shop,
)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 30, "shard_rows": 100}, {"batch_size": 7, "shard_rows": 5}, {"shard_rows": 1}]
)
def test_batch_and_block_sizes_do_not_matter(backbone, embedded, tmp_path, changes):
    assert_close(encoded(shop(30), backbone, tmp_path, **changes), embedded)


def test_compiling_needs_a_compiler(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"export_embeddings\.compile: needs a C\+\+ compiler .*use false"):
        encoded(shop(8), backbone, tmp_path, compile=True)


def test_compiling_needs_vector_instructions(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ConfigError, match=r"export_embeddings\.compile: needs a CPU with AVX2 or newer .*use false"):
        encoded(shop(8), backbone, tmp_path, compile=True)


def test_cut_texts_are_reported(backbone, tmp_path, caplog):
    source = ItemSource(np.arange(1, 4), ["a" * 500, "short", "b" * 160], "p", "h", NoiseImages(), "text_only")
    with caplog.at_level(logging.INFO, logger="sda_core"):
        encoded(source, backbone, tmp_path)
        assert "2 of 3 texts reach backbone.max_text_tokens" in caplog.text
        caplog.clear()
        encoded(source, backbone, tmp_path)  # resumed
        assert "2 of 3 texts reach backbone.max_text_tokens" in caplog.text


def test_vector_that_is_not_finite(tmp_path):
    broken: Any = build(TINY, CPU)
    with torch.no_grad():
        broken.model.model.language_model.norm.weight[0] = float("inf")
    with pytest.raises(DataError, match=r"image vectors: should be finite .*item_id 1, 2, 3, 4, 5"):
        encoded(shop(8), broken, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing broken is kept for later"


def test_out_of_memory_is_one_line(backbone, tmp_path):
    def exhausted(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = backbone.model.model.register_forward_pre_hook(exhausted)
    try:
        with pytest.raises(ConfigError, match=r"export_embeddings\.batch_size: 4 items do not fit .*lower it"):
            encoded(shop(8), backbone, tmp_path)
    finally:
        hook.remove()


def test_finished_blocks_are_not_computed_again(backbone, embedded, tmp_path):
    encoded(shop(30), backbone, tmp_path)
    passes: list[int] = []
    hook = backbone.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
        assert not passes
        (tmp_path / "text-00001.safetensors").unlink()
        damaged = tmp_path / "image-00002.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-50])
        assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
        assert len(passes) == 4, "two blocks of two batches"
    finally:
        hook.remove()


@pytest.mark.parametrize("change", ["fingerprint", "texts", "missing_image", "batch_size"])
def test_blocks_of_other_inputs_are_not_taken(backbone, tmp_path, change):
    encoded(shop(16), backbone, tmp_path)
    passes: list[int] = []
    hook = backbone.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        match change:
            case "fingerprint":
                encoded(shop(16), backbone, tmp_path, fingerprint="other")
            case "texts":
                encoded(shop(16, order=np.arange(16)[::-1]), backbone, tmp_path)
            case "missing_image":
                encoded(shop(16, missing_image="text_only"), backbone, tmp_path)
            case _:
                encoded(shop(16), backbone, tmp_path, batch_size=8)
    finally:
        hook.remove()
    assert len(passes) >= 4
