"""One attention call for all windows of a length: the same numbers as transformers' one call a window."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from sda_core.backbones import _attention
from sda_core.backbones._attention import IMPLEMENTATION, batched_window_attention, use_batched_vision_attention
from tests.tolerances import up_to_rounding

GRIDS = {
    "equal": [[1, 8, 8]] * 4,
    "mixed": [[1, 18, 18], [1, 4, 12], [1, 8, 8], [1, 12, 4], [1, 2, 2]],  # windows of 64, 48, 32, 16 and 4 patches
    "one": [[1, 6, 10]],
}


@pytest.fixture
def model():
    """A Qwen2.5-VL with a windowed and a full layer, of random weights."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]})
    config.image_token_id, config.video_token_id = 97, 98
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2_5_VLModel._from_config(config, attn_implementation="sdpa").eval()


def patches(grid: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=generator).requires_grad_()


def output_and_gradient(tower, grid):
    pixels = patches(grid)
    out = tower(pixels, grid_thw=grid).pooler_output
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return out.detach(), pixels.grad


@pytest.mark.parametrize("grids", GRIDS)
def test_equals_one_call_a_window(model, monkeypatch, grids):
    grid = torch.tensor(GRIDS[grids])
    stock, stock_gradient = output_and_gradient(model.visual, grid)
    calls: list[int] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *arguments, **named):
        calls.append(query.shape[0])
        return sdpa(query, *arguments, **named)

    use_batched_vision_attention(model)
    monkeypatch.setattr(_attention.F, "scaled_dot_product_attention", counted)
    ours, our_gradient = output_and_gradient(model.visual, grid)
    torch.testing.assert_close(ours, stock, **up_to_rounding(stock))
    torch.testing.assert_close(our_gradient, stock_gradient, **up_to_rounding(stock_gradient))
    assert stock.abs().max() > 0.01
    lengths = {"equal": 1 + 1, "mixed": 5 + 5, "one": 3 + 1}  # windowed layer + full layer
    assert len(calls) <= lengths[grids]
    if grids == "equal":
        assert calls == [4, 4], "all windows in one call"


def test_order_of_the_windows_is_kept():
    """Against a softmax written out, with the windows in an order that sorting by length changes."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 4, generator=generator) for _ in range(3))
    borders = torch.tensor([0, 5, 7, 7, 12])  # 5, 2, none, 5
    out, weights = batched_window_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=borders, scaling=0.7)
    assert weights is None
    window = torch.tensor([0] * 5 + [1] * 2 + [2] * 5)
    scores = (query @ key.transpose(-1, -2) * 0.7).masked_fill(window[:, None] != window[None], float("-inf"))
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2))


def test_plan_made_in_inference_mode_serves_a_backward_pass(model):
    use_batched_vision_attention(model)
    grid = torch.tensor([[1, 10, 6], [1, 2, 6]])
    _attention._plan.cache_clear()
    with torch.inference_mode():
        model.visual(patches(grid), grid_thw=grid)
    assert output_and_gradient(model.visual, grid)[1].abs().sum() > 0


def test_only_the_vision_tower_changes(model):
    use_batched_vision_attention(model)
    assert model.config.vision_config._attn_implementation == IMPLEMENTATION
    assert model.config.text_config._attn_implementation == "sdpa"
    assert IMPLEMENTATION not in model.config.to_json_string()
    use_batched_vision_attention(model)
    assert model.config.vision_config._attn_implementation == IMPLEMENTATION


def test_other_choices_stay(model):
    model.set_attn_implementation("eager")
    use_batched_vision_attention(model)
    assert model.config.vision_config._attn_implementation == "eager"


def test_mask_is_refused():
    row = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="no mask"):
        batched_window_attention(torch.nn.Module(), row, row, row, torch.zeros(1), cu_seq_lens_q=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        batched_window_attention(torch.nn.Module(), row, row, row, None)
