"""Small real models to adapt."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_core.adapters import MoDAConfig, checkpoint_contexts


class Block(nn.Module):
    """Two linear layers with a residual, optionally checkpointed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks one after the other; ``use_reentrant`` None switches checkpointing off."""

    def __init__(self, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.use_reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else self._checkpointed(block, x)
        return x

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.use_reentrant:
            return checkpoint(block, x, use_reentrant=True)
        return checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)


@pytest.fixture
def make_stack() -> Callable[..., peft.PeftModel]:
    """A stack in float64 with an adapter whose parameters are all random, so that nothing is zero by accident."""

    def make(depth: int = 3, seed: int = 0, **config: object) -> peft.PeftModel:
        torch.manual_seed(seed)
        options = {"target_modules": ["up", "down"], "lora_dropout": 0.0, "modality_dim": 5, **config}
        model = peft.get_peft_model(Stack(depth=depth).double(), MoDAConfig(**options))
        for name, parameter in model.named_parameters():
            if "moda_" in name:
                nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def gradients() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Gradients by name, which are then cleared."""

    def take(model: nn.Module) -> dict[str, Tensor]:
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    return take


def _tiny_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, vision_start_token_id=91, vision_end_token_id=92
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture
def tiny_vl() -> Callable[[], nn.Module]:
    """A Qwen2.5-VL of the real architecture, the same every time; image token 90 between 91 and 92."""
    return _tiny_vl
