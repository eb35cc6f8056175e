"""Text inputs: chat template, token ids, padding, and pooling over the tokens that are not padding.

* The template is rendered once around a marker and split there, so that an item's text never reaches the template engine
  or the parser of special tokens: ``<|im_end|>`` in a title is ten ordinary characters.
* Spaces that the template writes before the text are tokenised with the text, because a byte-level tokenizer joins a space
  to the following word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
import tokenizers
import torch
from torch import Tensor

from sda_core.errors import ArtifactError

_MARKER = "\ue000sda\ue001"  # private-use characters, which no template contains


@dataclass(frozen=True)
class Frame:
    """The part of a template around the text of one user turn.

    Attributes:
        before: token ids before the text.
        lead: spaces that belong to the first token of the text.
        after: token ids after the text.
    """

    before: list[int]
    lead: str
    after: list[int]


def chat_frame(tokenizer: Any, name: str, *, with_image: bool) -> Frame:
    """The frame of one user turn with a text, or with an image and a text.

    Args:
        tokenizer: a tokenizer with a chat template.
        name: name of the checkpoint, for errors.
        with_image: whether an image precedes the text.

    Raises:
        ArtifactError: there is no template, it cannot be rendered, or it does not contain the text exactly once.
    """
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    content.append({"type": "text", "text": _MARKER})
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False
        )
    except (ValueError, jinja2.TemplateError) as error:
        raise ArtifactError(name, f"chat template cannot be used ({error})", "use a checkpoint of an Instruct model") from None
    parts = rendered.split(_MARKER)
    if len(parts) != 2:
        raise ArtifactError(name, f"chat template should write the user's words once (got {len(parts) - 1} times)")
    text = parts[0].rstrip(" ")
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, parts[1]))
    return Frame(before, parts[0][len(text) :], after)


def special_frame(tokenizer: Any, name: str) -> Frame:
    """The special tokens that a tokenizer adds around a text, for models without a chat template.

    Raises:
        ArtifactError: the tokenizer does more than adding tokens before and after the text.
    """
    bare, framed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return Frame(framed[:start], "", framed[start + len(bare) :])
    raise ArtifactError(name, f"tokenizer should put special tokens around a text only (got {framed} around {bare})")


class Words:
    """A tokenizer without special tokens, so that an item's text cannot contain one.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: name of the checkpoint, for errors.

    Raises:
        ArtifactError: it is not a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ArtifactError(
                name,
                f"should have a fast tokenizer, in a tokenizer.json (got a {type(tokenizer).__name__})",
                "use a checkpoint that carries one",
            )
        self._plain = _without_added_tokens(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)

    def __call__(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """Token ids of texts, at most ``room`` each; characters that only a special token covers are dropped."""
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [[token for token in encoding.ids if token not in self._special][:room] for encoding in encodings]


def _without_added_tokens(tokenizer: Any) -> tokenizers.Tokenizer:
    """The tokenizer's model, normaliser and pre-tokeniser, without any added token.

    ``split_special_tokens`` would keep added tokens that are not marked special (``<tool_call>``).
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    description["truncation"] = None
    description["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def padded(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, side: Literal["left", "right"], length: int | None = None
) -> dict[str, Tensor]:
    """Token ids and mask, ``(B, L)``, padded to the longest row, or to ``length``."""
    width = max(map(len, rows)) if length is None else length
    ids_BL = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    mask_BL = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        kept = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BL[place, kept] = row
        mask_BL[place, kept] = 1
    return {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}


def text_positions(mask_BL: Tensor) -> Tensor:
    """Positions of the tokens from 0, without padding; padding has position 0."""
    return (mask_BL.cumsum(-1) - 1).clamp_min(0)


def pool(hidden_BLD: Tensor, mask_BL: Tensor, pooling: Literal["mean", "last"]) -> Tensor:
    """Mean over the mask in float32, or the last token (padding is on the left): ``(B, D)``."""
    if pooling == "last":
        return hidden_BLD[:, -1].float()
    keep_BL1 = mask_BL.unsqueeze(-1).bool()
    # where, not a product: a padded position may hold any value, even NaN
    total_BD = torch.where(keep_BL1, hidden_BLD.float(), 0.0).sum(1)
    return total_BD / mask_BL.sum(1, keepdim=True)
