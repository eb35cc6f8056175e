"""Embeddings of the noise shop, without an adapter and with one."""

from __future__ import annotations

import pytest
import torch

from sda_core import adapters
from sda_core.backbones import build
from sda_core.seed import derive
from tests.embeddings.noise_shop import (
    CPU,
    TINY,
    encoded,
    shop,
)
from tests.sections import SHIPPED, changed


@pytest.fixture(scope="session")
def backbone():
    return build(TINY, CPU)


@pytest.fixture(scope="session")
def embedded(backbone, tmp_path_factory):
    return encoded(shop(30), backbone, tmp_path_factory.mktemp("resume"))


@pytest.fixture
def adapted():
    """A backbone with an adapter that was trained: its weights are random."""
    fresh = build(TINY, CPU)
    params = changed(SHIPPED.train_adapter.moda, r=4, lora_alpha=8.0, num_experts=2, modality_dim=8)
    pattern, num_layers = fresh.adapter_pattern("language"), fresh.num_adapter_layers("language")
    model = adapters.build(fresh.model, params, ["image", "text"], pattern, num_layers, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(derive(0, name)))
    return fresh, model
