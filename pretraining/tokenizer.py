"""Train nano's tokenizer: byte-level BPE with Qwen's special tokens and chat template.

Texts are converted to lower case, digits and punctuation are separate tokens, and each piece begins with one space.  So a word
has the same tokens at any place of a text, which saves entries of the vocabulary of 12,000 tokens.  The merges are learned from
WordNet, captions and the shop vocabulary, without composed brands.

Writes ``work/tokenizer`` and the initial values of the token table: ``work/token_vectors.npy``, MiniLM's vector of each token
except the special ones, and ``work/token_shares.npy``, the share of each token in the training texts.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from pretraining.common import WORK, settings
from pretraining.teachers import TextTeacher
from pretraining.texts import SHOP_WORDS
from sda_core.backbones.qwen2_5_vl import CHAT_TEMPLATE, SPECIAL_TOKENS


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of ``vocabulary_size`` tokens, of which the special ones have the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[2], pad_token=SPECIAL_TOKENS[0], clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    """Train the tokenizer, and compute the initial values of the token table."""
    table = pl.read_parquet(WORK / "texts.parquet").filter(pl.col("split") == "train")
    natural = table.filter(pl.col("kind").is_in(["word", "gloss"]))["text"].to_list()
    captions = table.filter(pl.col("kind") == "caption")["text"].to_list()
    shop = [phrase for parts in SHOP_WORDS["departments"].values() for part in parts.values() for phrase in part]
    params = settings()
    tokenizer = train_tokenizer([*natural, *captions, *shop * 20], params["tokenizer"]["vocabulary_size"])
    tokenizer.save_pretrained(WORK / "tokenizer")
    num_plain = len(tokenizer) - len(SPECIAL_TOKENS)
    teacher = TextTeacher(params["teachers"]["max_text_tokens"], half=params["teachers"]["half_precision"])
    alone = [str(tokenizer.decode([token])).strip() or "." for token in range(num_plain)]
    np.save(WORK / "token_vectors.npy", teacher.encode(alone))
    counts = np.ones(num_plain)
    for row in tokenizer(table["text"].to_list(), add_special_tokens=False)["input_ids"]:
        np.add.at(counts, row, 1)
    np.save(WORK / "token_shares.npy", counts / counts.sum())
    for text in ("Neutral Moisturizing Hand Cream, 8.5 fl. oz (Pack of 2)", "a red striped cup"):
        print(len(tokenizer), tokenizer.tokenize(text))
