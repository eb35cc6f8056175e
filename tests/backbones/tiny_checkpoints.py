"""Tiny checkpoints of every family, random and real: transformers' own classes, saved as transformers saves them.

Run as a script it writes all of them: ``python tests/backbones/tiny_checkpoints.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from sda_core.backbones.qwen2_5_vl import CHAT_TEMPLATE, SPECIAL_TOKENS

hf: Any = transformers  # its configurations take more than their signatures say

HIDDEN, LAYERS, HEADS = 32, 2, 2
VISION_HIDDEN, VISION_LAYERS = 16, 3

WORDS = "the theory of tea: isn't 100 cups a lot?  the end\n User: user a tea pot, assistant Tea pots 2024 été"

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\\n'}}{% endfor %}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
)


def _merged_vocabulary() -> tuple[dict[str, int], Any]:
    """A vocabulary of 400 with merges, trained on a few words, so that words are not only bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    described = json.loads(tokenizer.to_str())["model"]
    return described["vocab"], [(left, right) for left, right in described["merges"]]


def qwen_tokenizer(special_tokens: tuple[str, ...], template: str) -> Any:
    """Qwen's tokenizer with a few merges and these special tokens."""
    vocabulary, merges = _merged_vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")  # type: ignore[arg-type]
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def smol_tokenizer() -> Any:
    """SmolVLM's kind of tokenizer: byte-level, a space joins the word behind it."""
    vocabulary, merges = _merged_vocabulary()
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *cells]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>", eos_token="<end_of_utterance>")
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = SMOLVLM_TEMPLATE
    return tokenizer


def clip_tokenizer() -> Any:
    """CLIP's tokenizer: lower case, ``</w>`` behind words, every byte known with and without it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "te", "tea</w>", "<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("t", "e"), ("te", "a</w>")]
    return hf.CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=merges)


def siglip_tokenizer() -> Any:
    """SigLIP 2's (that is Gemma's) kind of tokenizer: bytes for what it does not know, an end token, capitals kept."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁<>|_", "te", "tea"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = [("t", "e"), ("te", "a")]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **special)


# ------------------------------------------------------------------------------------------------ families
def _decoder(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more


def _tower(image_size: int, patch_size: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    } | more


Parts = tuple[Any, Any, Any]


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def qwen2_vl() -> Parts:
    tokenizer = qwen_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = hf.Qwen2VLConfig(
        text_config=_decoder(tokenizer, rope_parameters=rope),
        vision_config={"depth": VISION_LAYERS, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    processor = hf.Qwen2VLImageProcessorPil()
    return hf.Qwen2VLForConditionalGeneration(config), tokenizer, processor


def qwen2_5_vl() -> Parts:
    tokenizer = qwen_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": VISION_LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [2],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=_decoder(tokenizer, rope_parameters=rope),
        vision_config=vision,
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), tokenizer, hf.Qwen2VLImageProcessorPil()


def qwen3_vl() -> Parts:
    tokenizer = qwen_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": VISION_LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    config = hf.Qwen3VLConfig(
        text_config=_decoder(tokenizer, rope_parameters=rope, head_dim=16),
        vision_config=vision,
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )
    half = [0.5, 0.5, 0.5]
    processor = hf.Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half)
    return hf.Qwen3VLForConditionalGeneration(config), tokenizer, processor


def llava_onevision() -> Parts:
    tokenizer = qwen_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"), LLAVA_TEMPLATE)
    layouts = [[24 * rows, 24 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    config = hf.LlavaOnevisionConfig(
        text_config=_decoder(tokenizer, model_type="qwen2"),
        vision_config=_tower(24, 8, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=layouts,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=True,
    )
    half = [0.5, 0.5, 0.5]
    size = {"height": 24, "width": 24}
    processor = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=layouts, image_mean=half, image_std=half)
    return hf.LlavaOnevisionForConditionalGeneration(config), tokenizer, processor


def internvl() -> Parts:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = qwen_tokenizer(special, INTERNVL_TEMPLATE)
    config = hf.InternVLConfig(
        text_config=_decoder(tokenizer, model_type="qwen2"),
        vision_config=_tower(28, 7, attention_bias=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    processor = hf.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    return hf.InternVLForConditionalGeneration(config), tokenizer, processor


def smolvlm() -> Parts:
    tokenizer = smol_tokenizer()
    config = hf.SmolVLMConfig(
        text_config=_decoder(tokenizer, model_type="llama"),
        vision_config=_tower(32, 8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
    )
    processor = hf.SmolVLMImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    return hf.SmolVLMForConditionalGeneration(config), tokenizer, processor


def idefics3() -> Parts:
    tokenizer = smol_tokenizer()
    config = hf.Idefics3Config(
        text_config=_decoder(tokenizer, model_type="llama"),
        vision_config=_tower(32, 8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
    )
    processor = hf.Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    return hf.Idefics3ForConditionalGeneration(config), tokenizer, processor


def clip() -> Parts:
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": 40, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    config = hf.CLIPConfig(text_config=text, vision_config=_tower(24, 8), projection_dim=20)
    size = {"height": 24, "width": 24}
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)
    return hf.CLIPModel(config), tokenizer, processor


def siglip() -> Parts:
    tokenizer = siglip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": 40, "projection_size": VISION_HIDDEN,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    config = hf.SiglipConfig(text_config=text, vision_config=_tower(24, 8))
    return hf.SiglipModel(config), tokenizer, hf.SiglipImageProcessorPil(size={"height": 24, "width": 24})


FAMILIES: dict[str, Callable[[], Parts]] = {
    made.__name__: made for made in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, internvl, smolvlm, idefics3, clip, siglip)
}


def write(family: str, folder: Path) -> Path:
    """Write the tiny checkpoint of one family: weights that do something, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer, processor = FAMILIES[family]()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    weight.normal_(0.0, 1.0 if "embed" in name or "newline" in name else weight[0].numel() ** -0.5)
                elif not name.endswith("norm.weight") and "layernorm" not in name and "layer_norm" not in name:
                    weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for each in FAMILIES:
        write(each, Path(sys.argv[1]) / each)
