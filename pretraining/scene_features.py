"""Compute the features of all scenes by the frozen vision tower.

Writes ``work/scene_features/SIDE.npy`` for each side in pixels: float16 ``(scenes, patches, vision width)``, the output of the
last block before the merger, because the merger is trained.  A training scene has features at one side, drawn at random; a
held-out scene at all sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from pretraining.common import WORK, Work, generator, settings, tower_folder
from pretraining.model import PATCH, ImageGrid, patches, vision_blocks


def seen_at(splits: pl.Series, sides: dict[int, float], seed: int) -> dict[int, np.ndarray]:
    """Rows of the scenes that get features at each side, ascending."""
    shares = np.array(list(sides.values()))
    drawn = generator(seed, "side").choice(list(sides), len(splits), p=shares / shares.sum())
    training = (splits == "train").to_numpy()
    return {side: np.flatnonzero(~training | (drawn == side)) for side in sides}


@torch.inference_mode()
def features(visual: Any, pixels: np.ndarray, side: int, batch_size: int) -> np.ndarray:
    """``(N, patches, vision width)`` float16 features of images.

    Args:
        visual: the tower.
        pixels: ``(N, S, S, 3)`` uint8 RGB.
        side: side in pixels to which the images are scaled.
        batch_size: number of images per batch.
    """
    grid = ImageGrid.of(visual, side // PATCH, side // PATCH)
    found = np.zeros((len(pixels), grid.height * grid.width, visual.config.hidden_size), np.float16)
    for start in range(0, len(pixels), batch_size):
        rgb = torch.from_numpy(pixels[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
        rgb = F.interpolate(rgb, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found[start : start + batch_size] = vision_blocks(visual, patches(rgb), grid).half().numpy()
    return found


def main(work: Work = WORK) -> None:
    """Compute and write the features of all scenes."""
    params = settings()
    section = params["lvlm"]
    torch.set_num_threads(section["num_threads"])
    visual = Qwen2_5_VLForConditionalGeneration.from_pretrained(tower_folder(params), dtype=torch.float32).model.visual
    pixels = np.load(work / "scenes.npy", mmap_mode="r")
    folder = work / "scene_features"
    folder.mkdir(exist_ok=True)
    splits = pl.read_parquet(work / "scenes.parquet")["split"]
    for side, places in seen_at(splits, section["side_shares"], params["seed"]).items():
        found = features(visual, pixels[places], side, 64)
        temporary = folder / f"{side}.tmp"
        with temporary.open("wb") as stream:
            np.save(stream, found)
        temporary.replace(folder / f"{side}.npy")
        print(f"{side} pixels: {found.shape}, largest {np.abs(found).max():.1f}", flush=True)
