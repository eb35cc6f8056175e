"""Next-token loss over packed conversations: tokens, attention mask, positions, and the loss.

A row has a context (an image, or nothing) and *segments*, which are conversations about it.  A segment attends to the beginning
of the template, to the context and to itself, but not to other segments.  Its positions follow those of the context.  So the
loss of a row equals the loss of its segments as separate sequences, and the image tokens are computed once for all of them.  A
test compares it with the forward pass of transformers.

Only answers and plain texts are part of the loss, and not questions, the template and image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pretraining.conversations import Turn
from pretraining.model import MERGE, ImageGrid, language_states, vision_merged
from sda_core.backbones.qwen2_5_vl import IMAGE_TOKEN

_MARKS = ("\ue000", "\ue001")


@dataclass(frozen=True)
class Segment:
    """Token ids, and for each whether it is part of the loss; the first one never is."""

    ids: list[int]
    learnt: list[bool]


class Reader:
    """Converter of conversations and texts to segments, with the tokenizer's chat template.

    Raises:
        ValueError: the chat template begins differently for texts and images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        question, answer = _MARKS
        whole = self._rendered(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        )
        before, rest = whole.split(question)
        self._between, after = rest.split(answer)
        ids = self.ids(before)
        image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        image_at = ids.index(image_token)
        self.prefix = self.ids(self._rendered({"role": "user", "content": question}).split(question)[0])
        if ids[: len(self.prefix)] != self.prefix:
            raise ValueError("chat template: messages with a text and with an image should begin with the same tokens")
        self.before_image, self.after_image = ids[len(self.prefix) : image_at], ids[image_at + 1 :]
        # the end of an answer, without the template's line feed
        self._end = after.rstrip("\n")

    def _rendered(self, *messages: dict[str, Any]) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, which may contain special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def turn(self, turn: Turn, text: str = "") -> Segment:
        """The segment of an optional text, a question and its answer; the text and the answer are part of the loss."""
        asked = f"{text} {turn.question}".strip() + self._between
        first, whole = len(self.ids(asked)), self.ids(asked + turn.answer + self._end)
        num_text = len(self.ids(text))
        return Segment(whole, [0 < place < num_text or place >= first for place in range(len(whole))])

    def text(self, text: str, max_tokens: int) -> Segment:
        """The segment of a plain text as the user's message, at most ``max_tokens`` long; all of it is part of the loss."""
        ids = self.ids(text + self._end)[:max_tokens]
        return Segment(ids, [place > 0 for place in range(len(ids))])


def packed(segments: Sequence[Segment], length: int) -> list[list[Segment]]:
    """Pack segments in their order to rows of at most ``length`` tokens.

    Raises:
        ValueError: a segment is longer than a row.
    """
    rows: list[list[Segment]] = []
    room = 0
    for segment in segments:
        if len(segment.ids) > length:
            raise ValueError(f"a segment of {len(segment.ids)} tokens does not fit rows of {length}")
        if len(segment.ids) > room:
            rows.append([])
            room = length
        rows[-1].append(segment)
        room -= len(segment.ids)
    return rows


def until_full(segments: Sequence[Segment], length: int) -> list[Segment]:
    """The first segments that fit together in ``length`` tokens."""
    (first, *_) = packed(segments, length)
    return first


@dataclass(frozen=True)
class Rows:
    """Packed segments as tensors ``(B, L)``.

    Attributes:
        ids: token ids.
        segment: number of the segment within the row; -1 for padding.
        place: place of the token within its segment.
        learnt: whether the token is part of the loss.
    """

    ids: Tensor
    segment: Tensor
    place: Tensor
    learnt: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[Segment]]) -> Rows:
        """Convert rows of segments, padded on the right."""
        length = max(sum(len(segment.ids) for segment in row) for row in rows)
        ids, number, place = (torch.full((len(rows), length), fill) for fill in (0, -1, 0))
        learnt = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, segments in enumerate(rows):
            at = 0
            for index, segment in enumerate(segments):
                end = at + len(segment.ids)
                ids[row, at:end] = torch.tensor(segment.ids)
                number[row, at:end] = index
                place[row, at:end] = torch.arange(len(segment.ids))
                learnt[row, at:end] = torch.tensor(segment.learnt)
                at = end
        return cls(ids, number, place, learnt)


def row_states(
    model: Qwen2_5_VLForConditionalGeneration,
    reader: Reader,
    rows: Rows,
    image_tokens_BMD: Tensor | None = None,
    grid: ImageGrid | None = None,
) -> Tensor:
    """``(B, L, D)`` last hidden states of the rows' tokens.

    Args:
        model: the model.
        reader: its reader.
        rows: the rows.
        image_tokens_BMD: image tokens of each row's image; None for rows without images.
        grid: the grid of the images.
    """
    language: Any = model.model.language_model
    num_prefix, (batch, length) = len(reader.prefix), rows.ids.shape
    embedded = language.embed_tokens(rows.ids)
    same_BLL = (rows.segment[:, :, None] == rows.segment[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    prefix = language.embed_tokens(torch.tensor(reader.prefix))
    if image_tokens_BMD is None or grid is None:
        positions_3BL = (num_prefix + rows.place).expand(3, -1, -1)
        return language_states(language, prefix, embedded, positions_3BL, same_BLL)[1]
    start, end = (language.embed_tokens(torch.tensor(ids)) for ids in (reader.before_image, reader.after_image))
    suffix = torch.cat([start.expand(batch, -1, -1), image_tokens_BMD, end.expand(batch, -1, -1), embedded], dim=1)
    num_tokens, across, down = image_tokens_BMD.shape[1], grid.width // MERGE, grid.height // MERGE
    cells = torch.arange(num_tokens)
    first = num_prefix + len(start)
    context_3C = torch.cat([
        (num_prefix + torch.arange(len(start))).expand(3, -1),
        first + torch.stack([torch.zeros_like(cells), cells // across, cells % across]),
        (first + max(across, down) + torch.arange(len(end))).expand(3, -1),
    ], dim=1)  # fmt: skip
    begin = first + max(across, down) + len(end)
    positions_3BL = torch.cat([context_3C[:, None].expand(-1, batch, -1), (begin + rows.place).expand(3, -1, -1)], dim=2)
    num_context = context_3C.shape[1]
    allowed = torch.ones(batch, num_context + length, num_context + length, dtype=torch.bool).tril()
    allowed[:, num_context:, num_context:] = same_BLL
    return language_states(language, prefix, suffix, positions_3BL, allowed)[1][:, num_context:]


def token_losses(model: Qwen2_5_VLForConditionalGeneration, rows: Rows, states_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token that is part of it.

    Returns:
        ``(N,)`` cross-entropies; ``(N,)`` bool, whether the token is the most probable one; ``(N, 2)`` its row and place.
    """
    at = rows.learnt.nonzero()
    table = model.model.language_model.embed_tokens.weight  # type: ignore[union-attr]
    logits = F.linear(states_BLD[at[:, 0], at[:, 1] - 1], table)  # type: ignore[arg-type]
    wanted = rows.ids[at[:, 0], at[:, 1]]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted, at


def first_model(config: Qwen2_5_VLConfig, tower: Any, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Initialise a model with a given vision tower, which is frozen, and random other weights.

    The merger (projector), the decoder and the token table are random, so they contain nothing from the training of the tower.

    Args:
        config: sizes and special tokens.
        tower: the ``model.safetensors`` of the checkpoint with the tower.
        seed: seed of the random weights.
    """
    torch.manual_seed(seed)
    text: Any = config.text_config
    model = Qwen2_5_VLForConditionalGeneration(config)
    with safe_open(tower, "pt") as stored, torch.no_grad():
        names = {name.split("visual.")[-1]: name for name in stored.keys() if "visual." in name}  # noqa: SIM118
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                weight.normal_(0.0, 0.1)
            else:
                branch = name.endswith(("o_proj.weight", "down_proj.weight", "merger.mlp.2.weight"))
                small = (2 * text.num_hidden_layers) ** -0.5 if branch else 1.0
                weight.normal_(0.0, small * weight[0].numel() ** -0.5)
            if frozen(name):
                weight.copy_(stored.get_tensor(names[name.split("visual.")[1]]))
                weight.requires_grad = False
    return model


@torch.no_grad()
def standardise_projector(model: Qwen2_5_VLForConditionalGeneration, features_BND: Tensor, grid: ImageGrid, scale: float) -> None:
    """Standardise the inputs and outputs of a random projector on a sample of images.

    The features of the tower have a large common part, so the image tokens of a random projector are nearly equal, and the
    decoder learns to ignore them.  Without this function, the caption loss after 150 steps was .015 nats per token lower with
    the correct image than with another one; with it, .09 after 100 steps.

    Args:
        model: its projector is changed in place, so that its inputs have a standard deviation of 1 and the image tokens
            ``scale``.
        features_BND: features of the tower.
        grid: the grid of these images.
        scale: standard deviation of the image tokens.
    """
    merger: Any = model.model.visual.merger
    inputs = merger.ln_q(features_BND).flatten(0, 1)
    mean, deviation = inputs.mean(0), inputs.std(0)
    first, last = merger.mlp[0], merger.mlp[2]
    by_patch = first.weight.view(len(first.weight), -1, len(mean)) / deviation
    first.weight.copy_(by_patch.flatten(1))
    first.bias.copy_(-(by_patch @ mean).sum(1))
    tokens = vision_merged(model.model.visual, features_BND, grid).flatten(0, 1)
    factor = scale / tokens.std(0).mean()
    last.weight.mul_(factor)
    last.bias.copy_(-factor * tokens.mean(0))


def frozen(name: str) -> bool:
    """Whether a weight is frozen: those of the tower's patch embedding and blocks, and not of the merger."""
    return "visual." in name and "merger" not in name
