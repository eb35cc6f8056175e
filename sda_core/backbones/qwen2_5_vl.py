"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) as an item encoder.

Choices:

* An item gives two sequences, each one user turn of the checkpoint's own chat template (with the template's default
  system line, without a generation prompt): ``picture, image prompt`` and ``text prompt``.
* Pictures go through the PIL picture processor, because the stock processor needs torchvision; text, picture tokens and
  positions are composed here.  The template is rendered once around a marker and cut there, so that what an item's
  seller wrote never meets the template engine, nor the parser of special tokens: ``<|im_end|>`` in a title is ten
  ordinary characters.
* Only the item's words are cut at ``max_text_tokens`` (which counts the template, but no picture tokens).
* Padding is on the left.  Multimodal rotary positions are computed here per sequence, padding left out, so that a
  vector depends neither on its batch nor on state kept in the model.
* The decoder's output after the final norm is pooled in float32; the language-model head is never run.
* Pictures whose sides differ so much that even one row of patches would exceed ``max_pixels`` are put on a grey canvas.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jinja2
import numpy as np
import tokenizers
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sda_core.artifacts import replace_directory
from sda_core.backbones import BackboneInfo
from sda_core.errors import ArtifactError, ConfigError, DownloadError
from sda_core.fingerprint import sha256_path
from sda_core.log import is_main_process
from sda_core.params import Qwen25VL, TinyQwen25VL
from sda_core.seed import derive

_log = logging.getLogger(__name__)

ADAPTER_PATTERN = (
    r"(?:model\.)?(?:language_model\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q_proj|k_proj|v_proj|o_proj)|mlp\.(?:gate_proj|up_proj|down_proj))"
)
"""Linear layers of the decoder, by their names in memory (``model.language_model.layers...``) and in checkpoint files
(``model.layers...``).  The vision tower's MLPs carry the same last names, but sit in ``visual.blocks``."""

_MARKER = "\ue000sda\ue001"  # private-use characters: no template writes them
_MAX_ASPECT_RATIO = 200.0  # of the picture processor; it refuses more
_GREY = (122, 116, 104)  # CLIP's mean colour, which the processor maps to zero

IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML with Qwen's default system line and picture markers, for models made here."""


class Qwen25VLBackbone:
    """A Qwen2.5-VL checkpoint as an item encoder; see :class:`sda_core.backbones.Backbone` for the contract.

    Args:
        model: the model; it is frozen and put into evaluation mode.
        tokenizer: its fast tokenizer, with a chat template.
        image_processor: its picture processor.
        info: what the vectors depend on.

    Raises:
        ConfigError: ``max_text_tokens`` leaves no room for text, or ``min_pixels`` exceeds ``max_pixels``.
        ArtifactError: tokenizer, template and model do not belong together.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Any,
        image_processor: Qwen2VLImageProcessorPil,
        info: BackboneInfo,
    ) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.info = info
        config: Any = model.config
        self.dim: int = config.text_config.hidden_size
        self.adapter_pattern = ADAPTER_PATTERN
        self.num_adapter_layers: int = 7 * config.text_config.num_hidden_layers
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._merge_size: int = config.vision_config.spatial_merge_size
        self._image_token_id: int = config.image_token_id

        if info.min_pixels > info.max_pixels:
            got = f"{info.min_pixels} > {info.max_pixels}"
            raise ConfigError("params.yaml: backbone.min_pixels", f"should be at most max_pixels (got {got})")
        image_processor.size = {"shortest_edge": info.min_pixels, "longest_edge": info.max_pixels}  # type: ignore[assignment]
        factor = image_processor.patch_size * image_processor.merge_size
        self._max_aspect_ratio = min(_MAX_ASPECT_RATIO, max(1.0, info.max_pixels / factor**2))

        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != self._image_token_id:
            got = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            raise ArtifactError(
                info.name,
                f"tokenizer and model disagree on {IMAGE_TOKEN} (got {got}, expected {self._image_token_id})",
                "fetch the checkpoint anew, its tokenizer files are missing or of another model",
            )
        self._pad_token_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._plain = _without_added_tokens(tokenizer)
        self._text_frame = self._frame(with_image=False)
        before, after = self._frame(with_image=True)
        image_at = [place for place, token in enumerate(before) if token == self._image_token_id]
        if len(image_at) != 1:
            raise ArtifactError(
                info.name, f"chat template should write {IMAGE_TOKEN} once before the text (got {len(image_at)} times)"
            )
        self._image_frame = (before[: image_at[0]], before[image_at[0] + 1 :], after)

        longest = max(sum(map(len, self._text_frame)), sum(map(len, self._image_frame)))
        if info.max_text_tokens <= longest:
            raise ConfigError(
                "params.yaml: backbone.max_text_tokens",
                f"should be more than {longest}, the length of the chat template (got {info.max_text_tokens})",
            )

    # ------------------------------------------------------------------------------------------- inputs
    def image_inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
        """One sequence a picture: template, picture tokens, prompt.

        Args:
            images: B pictures of any mode and size.
            prompt: the words beside each picture.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L), ``position_ids`` (3, B, L), ``pixel_values`` (patches of all pictures,
            flattened), ``image_grid_thw`` (B, 3); on the CPU.
        """
        pixels = self._image_processor([self._prepared(image) for image in images], return_tensors="pt")
        grid_B3: Tensor = pixels["image_grid_thw"]
        num_image_tokens = (grid_B3.prod(-1) // self._merge_size**2).tolist()
        start, between, end = self._image_frame
        words = self._words([prompt], sum(map(len, self._image_frame)))[0]
        rows = [[*start, *[self._image_token_id] * count, *between, *words, *end] for count in num_image_tokens]
        inputs = self._padded(rows)
        inputs["position_ids"] = self._image_positions(
            inputs["attention_mask"], num_image_tokens, grid_B3, image_start=len(start)
        )
        inputs["pixel_values"] = pixels["pixel_values"]
        inputs["image_grid_thw"] = grid_B3
        return inputs

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One sequence a text: template and the text, cut so that both fit into ``max_text_tokens``.

        Args:
            texts: B texts; empty ones are allowed, special tokens in them are plain characters.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L), ``position_ids`` (3, B, L); on the CPU.
        """
        before, after = self._text_frame
        rows = [[*before, *words, *after] for words in self._words(texts, len(before) + len(after))]
        inputs = self._padded(rows)
        inputs["position_ids"] = _text_positions(inputs["attention_mask"]).expand(3, -1, -1).contiguous()
        return inputs

    # ------------------------------------------------------------------------------------------- vectors
    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled last hidden states.

        Args:
            model: :attr:`model`, or a PEFT model around it.
            inputs: of :meth:`image_inputs` or :meth:`text_inputs`, on any device.

        Returns:
            ``(B, D)`` float32, not normalised; with a gradient where the adapter has one.
        """
        inner = cast(Qwen2_5_VLForConditionalGeneration, model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
        moved = {name: tensor.to(inner.device, non_blocking=True) for name, tensor in inputs.items()}
        # The inner model has no language-model head: logits over 150,000 words are the largest tensor of a pass, and unused.
        hidden_BLD = inner.model(**moved, use_cache=False).last_hidden_state
        return _pool(hidden_BLD, moved["attention_mask"], self.info.pooling)

    # ------------------------------------------------------------------------------------------- files
    def save(self, folder: Path) -> None:
        """Write model, tokenizer, picture processor and chat template; see :func:`sda_core.backbones.save_backbone`."""
        if any(hasattr(module, "base_layer") for module in self.model.modules()):
            raise ConfigError(
                str(folder), "a backbone with an adapter attached cannot be saved", "unload or merge the adapter first"
            )
        _quiet_transformers()
        with replace_directory(folder) as temporary:
            self.model.save_pretrained(temporary)
            self._tokenizer.save_pretrained(temporary)
            self._image_processor.save_pretrained(temporary)

    # ------------------------------------------------------------------------------------------- parts
    def _frame(self, *, with_image: bool) -> tuple[list[int], list[int]]:
        """The template's tokens before and after the user's words."""
        content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": _MARKER})
        try:
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False
            )
        except (ValueError, jinja2.TemplateError) as error:
            raise ArtifactError(
                self.info.name, f"chat template cannot be used ({error})", "use a checkpoint of an Instruct model"
            ) from None
        parts = rendered.split(_MARKER)
        if len(parts) != 2:
            raise ArtifactError(self.info.name, f"chat template should write the user's words once (got {len(parts) - 1} times)")
        before, after = (self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return before, after

    def _words(self, texts: Sequence[str], frame_length: int) -> list[list[int]]:
        """Token ids of texts, special tokens taken as plain characters, cut to what the template leaves."""
        room = self.info.max_text_tokens - frame_length
        return [encoding.ids[:room] for encoding in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids and mask, padded on the left to the longest row."""
        length = max(map(len, rows))
        ids_BL = np.full((len(rows), length), self._pad_token_id, dtype=np.int64)
        mask_BL = np.zeros((len(rows), length), dtype=np.int64)
        for place, row in enumerate(rows):
            ids_BL[place, length - len(row) :] = row
            mask_BL[place, length - len(row) :] = 1
        return {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL)}

    def _image_positions(self, mask_BL: Tensor, num_image_tokens: Sequence[int], grid_B3: Tensor, image_start: int) -> Tensor:
        """Multimodal rotary positions (temporal, height, width), ``(3, B, L)``; padding has position 0.

        Words count up in all three.  A picture of h x w merged patches that begins at position s has (s, s + row,
        s + column); the next word continues at s + max(h, w)  (Wang et al. 2024, arXiv 2409.12191, section 2.1).
        """
        positions_3BL = torch.zeros((3, *mask_BL.shape), dtype=torch.long)
        length = mask_BL.shape[1]
        for place, (num_tokens, grid) in enumerate(zip(num_image_tokens, grid_B3.tolist(), strict=True)):
            height, width = grid[1] // self._merge_size, grid[2] // self._merge_size
            row_length = int(mask_BL[place].sum())
            image_end = image_start + num_tokens
            row_3L = torch.arange(row_length).expand(3, -1).clone()
            cells = torch.arange(num_tokens)
            row_3L[:, image_start:image_end] = image_start + torch.stack([torch.zeros_like(cells), cells // width, cells % width])
            row_3L[:, image_end:] += max(height, width) - num_tokens
            positions_3BL[:, place, length - row_length :] = row_3L
        return positions_3BL

    def _prepared(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, on a grey canvas where its sides differ too much for the processor."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        long, short = max(image.size), min(image.size)
        if long <= self._max_aspect_ratio * short:
            return image
        side = math.ceil(long / self._max_aspect_ratio)
        canvas = Image.new("RGB", (max(image.width, side), max(image.height, side)), _GREY)
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        return canvas


def _pool(hidden_BLD: Tensor, mask_BL: Tensor, pooling: Literal["mean", "last"]) -> Tensor:
    """Mean over the mask in float32, or the last token (padding is on the left); ``(B, D)``."""
    if pooling == "last":
        return hidden_BLD[:, -1].float()
    keep_BL1 = mask_BL.unsqueeze(-1).bool()
    # where, not a product: a padded place may hold anything, even NaN
    total_BD = torch.where(keep_BL1, hidden_BLD.float(), 0.0).sum(1)
    return total_BD / mask_BL.sum(1, keepdim=True)


def _text_positions(mask_BL: Tensor) -> Tensor:
    """Positions that count the kept tokens from 0; padding has position 0."""
    return (mask_BL.cumsum(-1) - 1).clamp_min(0)


def _without_added_tokens(tokenizer: Any) -> tokenizers.Tokenizer:
    """The tokenizer's model, normaliser and pre-tokeniser, without any added token.

    ``split_special_tokens`` would leave the added tokens that are not marked special (``<tool_call>``) in force.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    description["truncation"] = None
    description["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(description))


# --------------------------------------------------------------------------------------------- checkpoints
def load(params: Qwen25VL, device: torch.device) -> Qwen25VLBackbone:
    """Load a published or local Qwen2.5-VL checkpoint; raises as :func:`sda_core.backbones.build`."""
    _quiet_transformers()
    folder, revision = _checkpoint_folder(params)
    attention = _attention(params, device)
    damaged = ("is damaged or incomplete", "delete it and fetch it anew, or name another checkpoint in backbone.name")
    try:
        # code that comes with a checkpoint is refused, not asked about
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, Qwen2_5_VLConfig):
            raise ConfigError(
                "params.yaml: backbone.name",
                f"should be a Qwen2.5-VL checkpoint (got {params.name!r} of type {config.model_type!r})",
            )
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, params.dtype),
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ArtifactError(params.name, f"{damaged[0]} ({type(error).__name__}: {first_line})", damaged[1]) from None
    model, report = loaded
    # transformers fills what a file lacks with random numbers and only warns
    absent = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if absent:
        raise ArtifactError(
            params.name, f"{damaged[0]} ({len(absent)} weights missing or of another shape, e.g. {absent[0]})", damaged[1]
        )
    _ensure_chat_template(tokenizer, folder)
    info = BackboneInfo(
        kind=params.kind,
        name=params.name,
        revision=revision,
        dtype=params.dtype,
        attention=attention,
        pooling=params.pooling,
        min_pixels=params.min_pixels,
        max_pixels=params.max_pixels,
        max_text_tokens=params.max_text_tokens,
    )
    return Qwen25VLBackbone(model.to(device), tokenizer, image_processor, info)


def _checkpoint_folder(params: Qwen25VL) -> tuple[Path, str]:
    """The local folder of a checkpoint, fetched first where it is a hub id, and its revision."""
    where = "params.yaml: backbone.name"
    folder = Path(params.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ArtifactError(params.name, "is no checkpoint folder (it has no config.json)", f"correct {where}")
        return folder, f"sha256:{sha256_path(folder)}"
    if folder.is_file() or params.name.startswith((".", "/", "~")) or params.name.count("/") != 1:
        raise ArtifactError(params.name, "is neither a checkpoint folder nor a hub id such as owner/name", f"correct {where}")
    if params.revision is None or not re.fullmatch(r"[0-9a-f]{40}", params.revision):
        raise ConfigError(
            "params.yaml: backbone.revision",
            f"should pin a commit of {params.name}, 40 hexadecimal digits (got {params.revision!r})",
            "take it from the checkpoint's list of commits; only a local folder needs none",
        )
    try:
        # code files and pickled weights are never fetched
        snapshot = snapshot_download(
            params.name, revision=params.revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        )
    except HFValidationError as error:
        raise ConfigError(where, f"is no hub id ({error})") from None
    except OSError as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise DownloadError(
            f"{params.name}@{params.revision}",
            f"is neither in the local cache nor can it be fetched ({reason})",
            "check name, revision and network, or set backbone.name to a folder that holds the checkpoint",
        ) from None
    return Path(snapshot), params.revision


def _attention(params: Qwen25VL, device: torch.device) -> str:
    """The attention implementation: FlashAttention-2 where it can run, else PyTorch's own (SDPA)."""
    installed = importlib.util.find_spec("flash_attn") is not None
    fits = device.type == "cuda" and params.dtype != "float32"
    match params.attention:
        case "auto":
            return "flash_attention_2" if installed and fits else "sdpa"
        case "flash_attention_2":
            if not (installed and fits):
                raise ConfigError(
                    "params.yaml: backbone.attention",
                    f"flash_attention_2 needs the package flash-attn, a GPU and a half-precision dtype"
                    f" (got {'installed' if installed else 'not installed'}, {device.type}, {params.dtype})",
                    "use 'auto'",
                )
            return "flash_attention_2"
        case "sdpa" | "eager":
            return params.attention


def _ensure_chat_template(tokenizer: Any, folder: Path) -> None:
    """Take the processor's template where a checkpoint keeps it apart from the tokenizer (``chat_template.json``)."""
    legacy = folder / "chat_template.json"
    if tokenizer.chat_template is None and legacy.is_file():
        try:
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ArtifactError(str(legacy), "holds no chat template", "fetch the checkpoint anew") from None


def _quiet_transformers() -> None:
    """No loading bars off a terminal or off process 0."""
    if not (sys.stderr.isatty() and is_main_process()):
        transformers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------- tiny model
def make_tiny(params: TinyQwen25VL, device: torch.device) -> Qwen25VLBackbone:
    """A randomly initialised Qwen2.5-VL with a byte-level tokenizer; needs no file and no network.

    All of the architecture is there: windowed and full attention in the vision tower, patch merger, grouped-query
    attention, multimodal rotary positions.  Weights are normal with standard deviation ``1 / sqrt(hidden size)``, which keeps
    the hidden states' scale.  Each tensor has its own seed, so the weights do not depend on the order in which
    transformers makes them, and torch's global generators are left as they were.

    Raises:
        ConfigError: the sizes do not fit (heads, rotary sections).
    """
    tokenizer = _byte_tokenizer()
    config = _tiny_config(params, tokenizer)
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            width = params.vision_hidden_size if ".visual." in name else params.hidden_size
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                generator = torch.Generator().manual_seed(derive(params.seed, "tiny_qwen2_5_vl", name))
                weight.normal_(0.0, width**-0.5, generator=generator)
    info = BackboneInfo(
        kind=params.kind,
        name="tiny_qwen2_5_vl",
        revision=f"seed:{params.seed}",
        dtype="float32",
        attention="sdpa",
        pooling=params.pooling,
        min_pixels=params.min_pixels,
        max_pixels=params.max_pixels,
        max_text_tokens=params.max_text_tokens,
    )
    on_device = cast(nn.Module, model).to(device)
    return Qwen25VLBackbone(cast(Qwen2_5_VLForConditionalGeneration, on_device), tokenizer, Qwen2VLImageProcessorPil(), info)


def _byte_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with an empty merge table: 256 bytes and the special tokens."""
    vocabulary = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=SPECIAL_TOKENS[2])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny_config(params: TinyQwen25VL, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    head_dim, remainder = divmod(params.hidden_size, params.num_heads)
    if remainder or head_dim % 2:
        raise ConfigError(
            "params.yaml: backbone.num_heads",
            f"should divide hidden_size into an even head width (got {params.num_heads} heads for {params.hidden_size})",
        )
    # Qwen's 16 : 24 : 24 of half a head's width for time, height and width, as near as whole numbers allow
    temporal = head_dim // 8
    height = (head_dim // 2 - temporal) // 2
    sections = [temporal, height, head_dim // 2 - temporal - height]
    token = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": params.hidden_size,
            "intermediate_size": 4 * params.hidden_size,
            "num_hidden_layers": params.num_layers,
            "num_attention_heads": params.num_heads,
            "num_key_value_heads": params.num_heads // 2 if params.num_heads % 2 == 0 else params.num_heads,
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections},
        },  # type: ignore[arg-type]
        vision_config={
            "depth": params.vision_depth,
            "hidden_size": params.vision_hidden_size,
            "intermediate_size": 4 * params.vision_hidden_size,
            "num_heads": params.vision_hidden_size // 16,
            "out_hidden_size": params.hidden_size,
            "fullatt_block_indexes": [params.vision_depth - 1],  # the last sees the whole picture, the others a window
        },  # type: ignore[arg-type]
        image_token_id=token[IMAGE_TOKEN],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
