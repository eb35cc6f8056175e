"""The transformer against torch's own layers, and what a position may see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sda_core.recommenders.transformer import Transformer, attention_mask
from tests.tolerances import up_to_rounding


def _transformer(activation: str, causal: bool, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        max_length=7,
        hidden_size=8,
        num_blocks=2,
        num_heads=2,
        feed_forward_size=12,
        dropout=dropout,
        activation=activation,
        causal=causal,
    )


@pytest.mark.parametrize(("activation", "causal"), [("relu", True), ("gelu", False)])
def test_equals_torch_encoder_layers(activation, causal):
    transformer = _transformer(activation, causal).eval()
    item_BLD = torch.randn(3, 5, 8)
    is_item_BL = torch.ones(3, 5, dtype=torch.bool)
    is_item_BL[1, :2] = False
    x = item_BLD + transformer.positions.weight[-5:]
    hidden = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1) if causal else torch.zeros(5, 5, dtype=torch.bool)
    hidden = (hidden | ~is_item_BL[:, None, :]) & ~torch.eye(5, dtype=torch.bool)  # torch's True is "may not"
    for block in transformer.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=activation, batch_first=True, norm_first=True)
        layer.train()  # the inference shortcut of torch takes no mask by row
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(block.query_key_value.weight)
            layer.self_attn.in_proj_bias.copy_(block.query_key_value.bias)
        layer.self_attn.out_proj.load_state_dict(block.attention_output.state_dict())
        layer.linear1.load_state_dict(block.feed_forward_inner.state_dict())
        layer.linear2.load_state_dict(block.feed_forward_outer.state_dict())
        x = layer(x, src_mask=hidden.repeat_interleave(2, dim=0))
    torch.testing.assert_close(transformer(item_BLD, is_item_BL), transformer.norm(x), rtol=1e-4, atol=1e-5)


def test_states_that_are_wanted_are_those_of_all_positions():
    transformer = _transformer("gelu", causal=False).eval()
    item_BLD = torch.randn(3, 5, 8)
    is_item_BL = torch.ones(3, 5, dtype=torch.bool)
    is_item_BL[1, :2] = False
    at_BL = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    expected = transformer(item_BLD, is_item_BL)[at_BL]
    torch.testing.assert_close(transformer(item_BLD, is_item_BL, at_BL), expected, **up_to_rounding(expected))


def test_attention_mask_by_hand():
    is_item_BL = torch.tensor([[False, True, True]])
    assert attention_mask(is_item_BL, causal=True)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert attention_mask(is_item_BL, causal=False)[0, 0].int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]


def test_a_causal_gradient_reaches_no_later_item():
    transformer = _transformer("relu", causal=True)
    item_BLD = torch.randn(1, 6, 8, requires_grad=True)
    state = transformer(item_BLD, torch.ones(1, 6, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(state[0, 3].square().sum(), item_BLD)
    assert (gradient[0, 4:] == 0).all()
    assert (gradient[0, :4].abs().sum(dim=1) > 0).all()


def test_dropout_is_off_when_scoring():
    transformer = _transformer("relu", causal=True, dropout=0.5)
    item_BLD, is_item_BL = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    assert not torch.equal(transformer(item_BLD, is_item_BL), transformer(item_BLD, is_item_BL))
    transformer.eval()
    assert torch.equal(transformer(item_BLD, is_item_BL), transformer(item_BLD, is_item_BL))
