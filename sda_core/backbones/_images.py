"""Convert images of any mode and size into RGB images that a processor accepts."""

from __future__ import annotations

import math

from PIL import Image

_GREY = (122, 116, 104)  # CLIP's mean colour, which its normalisation maps to zero


def as_rgb(image: Image.Image, max_aspect_ratio: float) -> Image.Image:
    """The image in RGB, padded with grey if one side is more than ``max_aspect_ratio`` times the other."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    long, short = max(image.size), min(image.size)
    if long <= max_aspect_ratio * short:
        return image
    side = math.ceil(long / max_aspect_ratio)
    canvas = Image.new("RGB", (max(image.width, side), max(image.height, side)), _GREY)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas
