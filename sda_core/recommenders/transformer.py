"""A small transformer encoder over item sequences.

Design: layer norm before each sub-layer and once at the end (SASRec's layout, whose residuals use the normalised input, gave
the same on Beauty and was slower for BERT4Rec); learned positions counted *from the end*, so that the last item always has
the same position and a batch can be truncated to its longest history; padding on the left, which is never attended to
(except by itself, so that an empty history has a defined output).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_mask(is_item_BL: Tensor, causal: bool) -> Tensor:
    """The attention mask: ``(B, 1, L, L)`` booleans, query by key."""
    length = is_item_BL.shape[1]
    itself_LL = torch.eye(length, dtype=torch.bool, device=is_item_BL.device)
    allowed = is_item_BL[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=is_item_BL.device).tril()
    return allowed | itself_LL


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each with pre-layer-norm and a residual connection."""

    def __init__(self, hidden_size: int, num_heads: int, feed_forward_size: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation = activation
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward_inner = nn.Linear(hidden_size, feed_forward_size)
        self.feed_forward_outer = nn.Linear(feed_forward_size, hidden_size)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x_BLD: Tensor, allowed_B1LL: Tensor, at_BL: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``; with a mask ``at_BL`` only the P positions in it are computed, ``(P, D)``."""
        B, L, D = x_BLD.shape
        projected = self.query_key_value(self.attention_norm(x_BLD))
        query, key, value = projected.view(B, L, 3, self.num_heads, D // self.num_heads).permute(
            2, 0, 3, 1, 4
        )  # each (B, H, L, D/H)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed_B1LL, dropout_p=self.dropout if self.training else 0.0
        )
        mixed_BLD = mixed.transpose(1, 2).reshape(B, L, D)
        x, mixed = (x_BLD, mixed_BLD) if at_BL is None else (x_BLD[at_BL], mixed_BLD[at_BL])
        x = x + self._drop(self.attention_output(mixed))
        inner = self.feed_forward_inner(self.feed_forward_norm(x))
        inner = F.gelu(inner) if self.activation == "gelu" else F.relu(inner)
        return x + self._drop(self.feed_forward_outer(self._drop(inner)))


class Transformer(nn.Module):
    """A transformer encoder: positions, blocks, final layer norm.

    Args:
        max_length: number of positions.
        hidden_size: width; must be a multiple of ``num_heads``.
        feed_forward_size: inner width of the feed-forward layers.
        dropout: dropout of inputs, attention weights, feed-forward layers and residual branches.
        activation: ``relu`` or ``gelu``.
        causal: whether a position attends to earlier positions only.
    """

    def __init__(
        self,
        *,
        max_length: int,
        hidden_size: int,
        num_blocks: int,
        num_heads: int,
        feed_forward_size: int,
        dropout: float,
        activation: str,
        causal: bool,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.causal = causal
        self.positions = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, feed_forward_size, dropout, activation) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, item_BLD: Tensor, is_item_BL: Tensor, at_BL: Tensor | None = None) -> Tensor:
        """Contextual states.

        Args:
            item_BLD: item embeddings, at most ``max_length`` per row, padded on the left.
            is_item_BL: False on padding.
            at_BL: the positions whose states are returned; None for all.  The layers after the last attention, most of the
                work of one block, are computed for these positions only.

        Returns:
            ``(B, L, D)``, undefined on padding.  With ``at_BL`` the P requested states, ``(P, D)``, row by row.
        """
        x_BLD = item_BLD + self.positions.weight[-item_BLD.shape[1] :]
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        allowed = attention_mask(is_item_BL, self.causal)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, allowed, at_BL if number == last else None)
        return self.norm(x_BLD)
