"""Architecture and initial weights of nano, and a batched forward pass for its training.

The forward pass of transformers loops over images and windows, and computes the first tokens of the template for each sequence.
In training all images of a batch have one size, and sequences are padded on the right.  Therefore the vision tower runs here as
one batch, with a mask if attention has windows.  The beginning of the template runs once per batch, because later tokens do not
change it (attention is causal).  A test checks that both passes return equal vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids, get_vision_window_index

from sda_core.backbones import qwen2_5_vl
from sda_core.backbones.qwen2_5_vl import IMAGE_TOKEN

PATCH, MERGE = 14, 2


def configuration(params: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The transformers configuration for the section ``model`` of the settings."""
    text = {
        "hidden_size": params["hidden_size"],
        "intermediate_size": params["intermediate_size"],
        "num_hidden_layers": params["num_layers"],
        "num_attention_heads": params["num_heads"],
        "num_key_value_heads": params["num_key_value_heads"],
        "max_position_embeddings": 2048,
    }
    vision = {
        "depth": params["vision_depth"],
        "hidden_size": params["vision_hidden_size"],
        "intermediate_size": params["vision_intermediate_size"],
        "num_heads": params["vision_num_heads"],
        "window_size": params["vision_window_pixels"],
        "fullatt_block_indexes": params["vision_full_attention_blocks"],
    }
    return qwen2_5_vl.configuration(tokenizer, text, vision, rope_theta=10_000.0)


def principal_axes(vectors: np.ndarray, count: int) -> np.ndarray:
    """``(width, count)`` orthonormal principal axes of vectors, which are not centred."""
    _, axes = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors.astype(np.float64))
    axes = axes[:, ::-1][:, :count]
    # the sign of an axis is arbitrary: make its largest entry positive
    return axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(count)])


def first_weights(
    config: Qwen2_5_VLConfig, token_vectors: np.ndarray, token_shares: np.ndarray, num_free: int, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """Initialise a model so that it starts close to a weighted bag of tokens.

    The first ``D - num_free`` columns of the token table are ``token_vectors``, scaled to the same length and multiplied by
    ``a / (a + p)`` with ``a = 1e-3`` and the token's share ``p`` of the corpus (Arora et al. 2017, "A simple but tough-to-beat
    baseline for sentence embeddings").  The norms of the decoder would undo this weight; therefore the missing length of a
    frequent token is random in the ``num_free`` free columns.  Special tokens use only the free columns.  The final norm starts
    with small weights for these, so that they hardly affect the pooled vector.  Residual branches start with small weights.

    Args:
        config: sizes and special tokens.
        token_vectors: ``(tokens, D - num_free)``, of all tokens except the special ones.
        token_shares: ``(tokens,)``, shares of the corpus.
        num_free: number of free columns.
        seed: seed of the random weights.
    """
    torch.manual_seed(seed)
    text: Any = config.text_config
    model = Qwen2_5_VLForConditionalGeneration(config)
    depth = text.num_hidden_layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = weight[0].numel()
            small = 0.5 * (2 * depth) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            weight.normal_(0.0, small * fan_in**-0.5)
        width = text.hidden_size
        num_known = width - num_free
        known = torch.from_numpy(token_vectors.astype(np.float32))
        weights = torch.from_numpy((1e-3 / (1e-3 + token_shares)).astype(np.float32))[:, None]
        known *= weights * (num_known / known.pow(2).sum(1, keepdim=True).clamp_min(1e-6)).sqrt()
        table = model.model.language_model.embed_tokens.weight
        table.zero_()
        table[: len(known), :num_known] = known
        free = torch.randn(len(table), num_free)
        lengths = torch.full((len(table), 1), num_known**0.5)
        lengths[: len(known)] *= (1 - weights**2).clamp_min(0.0).sqrt()
        table[:, num_known:] = free / free.norm(dim=1, keepdim=True) * lengths
        model.model.language_model.norm.weight[num_known:] = 0.05
    return model


# ------------------------------------------------------------------------------------------------- vision
@dataclass(frozen=True)
class ImageGrid:
    """Constants of the vision tower for images of one size, in the order of attention windows.

    Attributes:
        height: number of patches, even.
        width: number of patches, even.
        order_N: places of the patches in window order.
        inverse_M: the inverse order, of merged tokens.
        cos_ND: cosines of the rotary angles.
        sin_ND: sines of the rotary angles.
        window_mask_NN: whether two patches are in the same window.
    """

    height: int
    width: int
    order_N: Tensor
    inverse_M: Tensor
    cos_ND: Tensor
    sin_ND: Tensor
    window_mask_NN: Tensor

    @classmethod
    def of(cls, visual: nn.Module, height: int, width: int) -> ImageGrid:
        """Compute the grid of ``height`` x ``width`` patches, both even."""
        tower: Any = visual
        grid = torch.tensor([[1, height, width]])
        positions = get_vision_position_ids(grid, MERGE, kwargs={})
        window_index, bounds = get_vision_window_index(
            grid, spatial_merge_size=MERGE, window_size=tower.window_size, patch_size=PATCH, kwargs={}
        )
        get_vision_attention_seqlens(grid, tower.config, kwargs={})
        order_N = (window_index[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten()
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), positions)
        window_N = torch.bucketize(torch.arange(height * width), bounds[1:], right=True)
        return cls(
            height, width, order_N, torch.argsort(window_index), cos[order_N].float(), sin[order_N].float(),
            window_N[:, None] == window_N[None, :],
        )  # fmt: skip


def patches(rgb_BCHW: Tensor) -> Tensor:
    """``(B, N, 1176)`` patches of RGB images from 0 to 1, in blocks of 2 x 2, as by the image processor."""
    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    pixels = (rgb_BCHW - mean) / deviation
    batch, channels, height, width = pixels.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    cut = pixels.view(batch, channels, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    flat = cut.reshape(batch, rows * columns * MERGE**2, channels, 1, PATCH * PATCH)
    return flat.expand(-1, -1, -1, 2, -1).reshape(batch, -1, channels * 2 * PATCH * PATCH)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention without PyTorch's fused kernel, whose backward pass is several times slower for short sequences on a CPU."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4)
    return scores.softmax(-1).to(value.dtype) @ value


def vision_block(block: Any, hidden_BND: Tensor, cos_ND: Tensor, sin_ND: Tensor, mask_NN: Tensor | None) -> Tensor:
    """Compute one block of the vision tower: ``(B, N, D)``."""
    batch, num_patches, _ = hidden_BND.shape
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden_BND)).view(batch, num_patches, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0], qkv[1], qkv[2]
    mixed = _attended(_rotated(query, cos_ND, sin_ND), _rotated(key, cos_ND, sin_ND), value, mask_NN)
    hidden_BND = hidden_BND + attention.proj(mixed.transpose(1, 2).reshape(batch, num_patches, -1))
    return hidden_BND + block.mlp(block.norm2(hidden_BND))


def vision_forward(
    visual: nn.Module, patches_BNP: Tensor, grid: ImageGrid, block: Callable[..., Tensor] = vision_block
) -> Tensor:
    """``(B, N / 4, D)`` merged image tokens of images of one size; equal to the output of the tower in transformers."""
    return vision_merged(visual, vision_blocks(visual, patches_BNP, grid, block), grid)


def vision_blocks(visual: nn.Module, patches_BNP: Tensor, grid: ImageGrid, block: Callable[..., Tensor] = vision_block) -> Tensor:
    """``(B, N, vision width)`` output of the tower's last block, before the merger, in window order.

    Args:
        visual: the tower.
        patches_BNP: the result of :func:`patches`.
        grid: the grid of these images.
        block: :func:`vision_block`, compiled or not.
    """
    tower: Any = visual
    kernel = tower.patch_embed.proj.weight.flatten(1)
    hidden = F.linear(patches_BNP, kernel)[:, grid.order_N]
    for place, module in enumerate(tower.blocks):
        mask = None if place in tower.fullatt_block_indexes else grid.window_mask_NN
        hidden = block(module, hidden, grid.cos_ND, grid.sin_ND, mask)
    return hidden


def vision_merged(visual: nn.Module, hidden_BND: Tensor, grid: ImageGrid) -> Tensor:
    """``(B, N / 4, D)`` image tokens by rows: the merger (projector) applied to the result of :func:`vision_blocks`."""
    tower: Any = visual
    batch, num_patches, width = hidden_BND.shape
    merged = tower.merger(hidden_BND.reshape(batch * num_patches, width)).view(batch, num_patches // MERGE**2, -1)
    return merged[:, grid.inverse_M]


# ------------------------------------------------------------------------------------------------- language
def language_layer(
    layer: Any, prefix: Tensor, suffix: Tensor, angles_P: tuple[Tensor, Tensor], angles_L: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one layer of the decoder for the shared prefix ``(1, P, D)`` and the rest ``(B, L, D)``."""
    attention = layer.self_attn
    num_prefix, (batch, length, width) = prefix.shape[1], suffix.shape

    def heads(x: Tensor, projection: nn.Module) -> Tensor:
        return projection(x).view(x.shape[0], x.shape[1], -1, attention.head_dim).transpose(1, 2)

    first, rest = layer.input_layernorm(prefix), layer.input_layernorm(suffix)
    groups = attention.num_key_value_groups
    query_P = _rotated(heads(first, attention.q_proj), *angles_P)
    key_P = _rotated(heads(first, attention.k_proj), *angles_P).repeat_interleave(groups, 1)
    value_P = heads(first, attention.v_proj).repeat_interleave(groups, 1)
    query_L = _rotated(heads(rest, attention.q_proj), *angles_L)
    key_L = _rotated(heads(rest, attention.k_proj), *angles_L).repeat_interleave(groups, 1)
    value_L = heads(rest, attention.v_proj).repeat_interleave(groups, 1)
    mixed_P = _attended(query_P, key_P, value_P, torch.ones(num_prefix, num_prefix, dtype=torch.bool).tril())
    keys = torch.cat([key_P.expand(batch, -1, -1, -1), key_L], dim=2)
    values = torch.cat([value_P.expand(batch, -1, -1, -1), value_L], dim=2)
    mixed_L = _attended(query_L, keys, values, mask)
    prefix = prefix + attention.o_proj(mixed_P.transpose(1, 2).reshape(1, num_prefix, width))
    suffix = suffix + attention.o_proj(mixed_L.transpose(1, 2).reshape(batch, length, width))
    prefix = prefix + layer.mlp(layer.post_attention_layernorm(prefix))
    return prefix, suffix + layer.mlp(layer.post_attention_layernorm(suffix))


def language_forward(
    language: nn.Module,
    prefix_PD: Tensor,
    suffix_BLD: Tensor,
    suffix_positions_3L: Tensor,
    lengths_B: Tensor,
    layer: Callable[..., tuple[Tensor, Tensor]] = language_layer,
) -> Tensor:
    """``(B, D)`` float32 mean of the last hidden states over the prefix and the tokens of each sequence.

    Args:
        language: the decoder.
        prefix_PD: embeddings of the tokens that all sequences begin with; positions 0 to P - 1.
        suffix_BLD: embeddings of the rest, padded on the right.
        suffix_positions_3L: multimodal positions of the rest, equal for the whole batch.
        lengths_B: number of tokens of each sequence in the rest.
        layer: :func:`language_layer`, compiled or not.
    """
    num_prefix, length = len(prefix_PD), suffix_BLD.shape[1]
    allowed_LL = torch.ones(length, length, dtype=torch.bool).tril()
    prefix, suffix = language_states(language, prefix_PD, suffix_BLD, suffix_positions_3L[:, None], allowed_LL, layer)
    kept_BL1 = (torch.arange(length) < lengths_B[:, None]).unsqueeze(-1)
    total_BD = prefix.sum(1) + (suffix * kept_BL1).sum(1)
    return total_BD / (num_prefix + lengths_B[:, None])


def language_states(
    language: nn.Module,
    prefix_PD: Tensor,
    suffix_BLD: Tensor,
    positions_3BL: Tensor,
    allowed: Tensor,
    layer: Callable[..., tuple[Tensor, Tensor]] = language_layer,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the shared prefix ``(1, P, D)`` and of the rest ``(B, L, D)``, float32.

    Args:
        language: the decoder.
        prefix_PD: embeddings of the tokens that all sequences begin with; positions 0 to P - 1.
        suffix_BLD: embeddings of the rest.
        positions_3BL: multimodal positions of the rest; ``(3, 1, L)`` if they are equal for all sequences.
        allowed: ``(L, L)`` or ``(B, L, L)`` bool, whether a token of the rest attends to another one; all attend to the prefix.
        layer: :func:`language_layer`, compiled or not.
    """
    decoder: Any = language
    num_prefix, length = len(prefix_PD), suffix_BLD.shape[1]
    positions = torch.arange(num_prefix).expand(3, -1)
    cos_P, sin_P = (angle[0] for angle in decoder.rotary_emb(prefix_PD.float(), positions[:, None]))
    cos_L, sin_L = (angle[:, None] for angle in decoder.rotary_emb(suffix_BLD.float(), positions_3BL))
    allowed = allowed.view(-1, 1, length, length)
    mask = torch.cat([torch.ones(len(allowed), 1, length, num_prefix, dtype=torch.bool), allowed], dim=-1)
    prefix, suffix = prefix_PD[None], suffix_BLD
    for module in decoder.layers:
        prefix, suffix = layer(module, prefix, suffix, (cos_P, sin_P), (cos_L, sin_L), mask)
    return decoder.norm(prefix).float(), decoder.norm(suffix).float()


class Encoder:
    """Encoder of texts and images in batches, with gradients; its vectors equal those of the backbone's ``encode``.

    Args:
        model: the model in training.
        tokenizer: its tokenizer with the chat template.
        image_prompts: the possible texts beside an image.

    Raises:
        ValueError: the chat template begins differently for texts and images.
    """

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, image_prompts: Sequence[str]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.block: Callable[..., Tensor] = vision_block
        self.layer: Callable[..., tuple[Tensor, Tensor]] = language_layer
        self._grids: dict[tuple[int, int], ImageGrid] = {}
        marker = "\ue000"
        text_frame = self._rendered([{"type": "text", "text": marker}]).split(marker)
        image_frame = self._rendered([{"type": "image"}, {"type": "text", "text": marker}]).split(marker)
        before, after = (self._ids(part) for part in text_frame)
        image_before, _ = (self._ids(part) for part in image_frame)
        if image_before[: len(before)] != before:
            raise ValueError("chat template: messages with a text and with an image should begin with the same tokens")
        self.prefix, self.after = before, after
        image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        image_at = image_before.index(image_token)
        self._before_image = image_before[len(before) : image_at]
        self._after_image = [[*image_before[image_at + 1 :], *row, *after] for row in self.words(image_prompts, 1000)]

    def compile(self) -> None:
        """Compile blocks and layers, which needs a C++ compiler.

        A step then takes half the time; each new shape takes a minute to compile.
        """
        self.block = torch.compile(vision_block, dynamic=False)
        self.layer = torch.compile(language_layer, dynamic=True)

    @contextmanager
    def uncompiled(self) -> Generator[None]:
        """Use the functions without compilation in a ``with`` block, for batches of many shapes."""
        kept = self.block, self.layer
        self.block, self.layer = vision_block, language_layer
        try:
            yield
        finally:
            self.block, self.layer = kept

    def _rendered(self, content: list[dict[str, str]]) -> str:
        conversation: Any = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(conversation, tokenize=False))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def words(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of texts without the template, at most ``max_tokens`` each."""
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [row[:max_tokens] for row in rows]  # type: ignore[union-attr]

    def _embedded(self, ids: Any) -> Tensor:
        return self.model.model.language_model.embed_tokens(torch.as_tensor(ids))

    def texts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``(B, D)`` vectors of texts, from their token ids."""
        full = [[*row, *self.after] for row in rows]
        lengths_B = torch.tensor([len(row) for row in full])
        ids_BL = torch.zeros(len(full), int(lengths_B.max()), dtype=torch.long)
        for place, row in enumerate(full):
            ids_BL[place, : len(row)] = torch.tensor(row)
        positions_3L = (len(self.prefix) + torch.arange(ids_BL.shape[1])).expand(3, -1)
        language = self.model.model.language_model
        prefix, suffix = self._embedded(self.prefix), self._embedded(ids_BL)
        return language_forward(language, prefix, suffix, positions_3L, lengths_B, self.layer)

    def grid(self, height: int, width: int) -> ImageGrid:
        """The grid of a size in patches, computed once."""
        if (height, width) not in self._grids:
            self._grids[height, width] = ImageGrid.of(self.model.model.visual, height, width)
        return self._grids[height, width]

    def images(self, rgb_BCHW: Tensor, prompt: int = 0) -> Tensor:
        """``(B, D)`` vectors of images.

        Args:
            rgb_BCHW: RGB from 0 to 1, both sides multiples of 28.
            prompt: index of the text beside the images.
        """
        return self.image_vectors(*self.image_tokens(rgb_BCHW), prompt)

    def image_tokens(self, rgb_BCHW: Tensor) -> tuple[Tensor, ImageGrid]:
        """``(B, M, D)`` image tokens by rows, and their grid."""
        grid = self.grid(rgb_BCHW.shape[2] // PATCH, rgb_BCHW.shape[3] // PATCH)
        return vision_forward(self.model.model.visual, patches(rgb_BCHW), grid, self.block), grid

    def image_vectors(self, tokens_BMD: Tensor, grid: ImageGrid, prompt: int = 0) -> Tensor:
        """``(B, D)`` vectors of images, from their image tokens."""
        batch, num_tokens, _ = tokens_BMD.shape
        start, end = self._embedded(self._before_image), self._embedded(self._after_image[prompt])
        suffix = torch.cat([start.expand(batch, -1, -1), tokens_BMD.to(start.dtype), end.expand(batch, -1, -1)], dim=1)
        first = len(self.prefix) + len(start)
        rows, columns = grid.height // MERGE, grid.width // MERGE
        cells = torch.arange(num_tokens)
        positions_3L = torch.cat([
            (len(self.prefix) + torch.arange(len(start))).expand(3, -1),
            first + torch.stack([torch.zeros_like(cells), cells // columns, cells % columns]),
            (first + max(rows, columns) + torch.arange(len(end))).expand(3, -1),
        ], dim=1)  # fmt: skip
        lengths_B = torch.full((batch,), suffix.shape[1])
        language = self.model.model.language_model
        return language_forward(language, self._embedded(self.prefix), suffix, positions_3L, lengths_B, self.layer)
