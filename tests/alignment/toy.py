"""A small encoder and a small shop, trained in every way that the tests compare."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sda_core import backbones
from sda_core.adapters import build
from sda_core.alignment import StepRecord, train_adapter
from sda_core.checkpoint import load_checkpoint
from sda_core.items import ItemSource
from sda_core.params import AdapterParams, LossParams, TrainingParams
from sda_core.processes import ALONE, Processes
from tests.sections import SHIPPED, changed, tiny_section

CPU = torch.device("cpu")


MODA = changed(SHIPPED.train_adapter.moda, r=4, lora_alpha=8.0, num_experts=2, modality_dim=4)
LORA = changed(MODA, num_experts=1, gate="uniform")
LOSS = changed(SHIPPED.train_adapter.loss, center="none", temperature=0.1, learn_temperature=True)  # the paper's formula
TRAINING = changed(
    SHIPPED.train_adapter.training, seed=3, num_steps=12, batch_size=6, learning_rate=0.01, weight_decay=0.01, warmup_steps=3,
    vision_cache="never", checkpoint_every=5, log_every=4,
)  # fmt: skip
SHARED = changed(TRAINING, num_steps=6, batch_size=8, micro_batch_size=2, checkpoint_every=2, log_every=2)


class Encoder:
    """A real, small encoder: a frozen two-layer network on 8 x 8 grey images or on letter counts."""

    def __init__(self, delay_seconds: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
        self.delay_seconds = delay_seconds

    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        assert prompt == "A picture."
        time.sleep(self.delay_seconds)
        return {
            "x": torch.stack([torch.from_numpy(np.array(image.convert("L").resize((8, 8)))).flatten() / 255 for image in images])
        }

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([torch.bincount(torch.tensor([ord(c) % 64 for c in text]), minlength=64).float() for text in texts])
        }

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(inputs["x"].to(next(model.parameters()).dtype))


class Images:
    """Images in memory; item 7 has none."""

    def get(self, item_id: int) -> bytes | None:
        if item_id == 7:
            return None
        buffer = io.BytesIO()
        noise = np.random.default_rng(item_id).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue()

    def status(self, item_id: int) -> str:
        return "missing_url" if item_id == 7 else "ok"


def items(num_items: int = 20, missing_image: Any = "text_only") -> ItemSource:
    texts = [f"item {'abcdefghij'[i % 10] * (i + 1)} of brand {i * 7919}" for i in range(num_items)]
    return ItemSource(np.arange(1, num_items + 1), texts, "A picture.", "hash", Images(), missing_image)


def run(
    folder: Path, training: TrainingParams = TRAINING, loss: LossParams = LOSS, adapter: AdapterParams = MODA, **options: Any
) -> tuple[nn.Module, list[StepRecord]]:
    encoder = options.get("encoder", Encoder())
    model = build(encoder.model, adapter, ["image", "text"], "0|2", 2, seed=1).to(options.get("dtype"))
    source, team = options.get("source", items()), options.get("team", ALONE)
    curve = train_adapter(encoder, model, source, training, loss, folder / "checkpoint", "inputs", CPU, team)
    return model, curve


def run_shared(folder: Path, team: Processes, encoder: Encoder, **options: Any) -> tuple[nn.Module, list[StepRecord]]:
    """In chunks whose draws do not depend on the number of processes."""
    return run(folder, SHARED, team=team, encoder=encoder, dtype=torch.float64, **options)


def run_whole(folder: Path, team: Processes, center: str) -> tuple[nn.Module, list[StepRecord]]:
    """Each process its part at once, without dropout; the base teaches, and vectors are centred."""
    training = changed(SHARED, micro_batch_size=None)
    loss = changed(LOSS, teacher_source="base", keep_base=0.2, center=center)
    return run(folder, training, loss, adapter=changed(MODA, lora_dropout=0.0), team=team, dtype=torch.float64)


def tiny_backbone() -> Any:
    """A Qwen2.5-VL architecture of two layers."""
    tiny = tiny_section(hidden_size=32, num_heads=2, vision_depth=1, max_pixels=784, max_text_tokens=96)
    return backbones.build(tiny, CPU)


def run_tiny(folder: Path, team: Processes = ALONE, **changes: Any) -> tuple[nn.Module, list[StepRecord]]:
    """That architecture trained, images and words through its own inputs."""
    adapter = changed(MODA, targets=changes.pop("targets", "language"))
    loss = changed(LOSS, teacher_source=changes.pop("teacher_source", "adapted"))
    training = changed(TRAINING, **({"num_steps": 4, "batch_size": 4} | changes))
    backbone = tiny_backbone()
    layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    model = build(backbone.model, adapter, ["image", "text"], *layers, seed=1)
    return model, train_adapter(backbone, model, items(), training, loss, folder / "checkpoint", "inputs", CPU, team)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".moda_" in name}


def assert_bit_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Same tensors (optimizer included) and state; the bytes of safetensors' metadata have no fixed order."""
    (one, state), (two, other) = (load_checkpoint(path, "inputs") for path in (first, second))  # type: ignore[misc]
    assert state == other
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
