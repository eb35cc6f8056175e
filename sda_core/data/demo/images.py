"""Product images, which show an item's category (the product), colour, pattern and shape (its motif), and clutter.

Every image has its own size, rotation, position, background, light, tone, pattern phase and sensor noise, so that no two
are equal and no single pixel encodes an attribute.  ``image_clutter`` shrinks the product and adds a scene: a patterned
wall, objects of any colour behind the product, sometimes a sticker over a corner.  The scene does not depend on the item's
attributes.

Coordinates of a product: x to the right, y down, both within -1..1.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from sda_core.data.demo.latent import World
from sda_core.seed import generator

Floats = npt.NDArray[np.float32]
Layer = Literal["body", "trim", "hole"]  # patterned cloth or glaze; plain handles and feet; see-through
Part = tuple[Layer, npt.NDArray[np.float64]]  # polygon (corners, 2)

JPEG_QUALITY = 92
SUPERSAMPLED_BELOW = 256  # pixels; larger images need no smoothing
MAX_PROPS = 6  # objects beside the product
MOST_SHRUNK = 0.25  # of the product's size, by clutter

HUE_SATURATION_VALUE = {
    "red": (0.99, 0.78, 0.80),
    "orange": (0.07, 0.82, 0.94),
    "yellow": (0.145, 0.75, 0.95),
    "green": (0.34, 0.62, 0.58),
    "teal": (0.49, 0.70, 0.66),
    "blue": (0.61, 0.74, 0.78),
    "purple": (0.76, 0.55, 0.62),
    "pink": (0.92, 0.42, 0.95),
    "brown": (0.07, 0.58, 0.42),
    "grey": (0.60, 0.03, 0.56),
}


# ------------------------------------------------------------------------------------------- the products
def _path(corners: str) -> npt.NDArray[np.float64]:
    """Corners written as in an SVG polygon: ``"x y, x y, ..."``."""
    return np.array([[float(number) for number in corner.split()] for corner in corners.split(",")])


def _box(left: float, top: float, right: float, bottom: float) -> npt.NDArray[np.float64]:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _ellipse(
    x: float, y: float, radius_x: float, radius_y: float, first: float = 0.0, last: float = 360.0
) -> npt.NDArray[np.float64]:
    """Corners of an ellipse, or of its segment between two angles in degrees (0 to the right, 90 down)."""
    angle = np.deg2rad(np.linspace(first, last, 32))
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1)


def _ring(x: float, y: float, radius_x: float, radius_y: float, width: float) -> tuple[Part, Part]:
    return ("trim", _ellipse(x, y, radius_x, radius_y)), ("hole", _ellipse(x, y, radius_x - width, radius_y - width))


# Parts in the order of painting, then position (x, y) and radius of the motif.
PRODUCTS: dict[str, tuple[tuple[Part, ...], tuple[float, float, float]]] = {
    "Mugs": (
        (
            *_ring(0.52, 0.0, 0.42, 0.44, 0.15),
            ("body", _box(-0.68, -0.72, 0.5, 0.62)),
            ("body", _ellipse(-0.09, 0.62, 0.59, 0.14)),
        ),
        (-0.09, 0.0, 0.42),
    ),
    "Bowls": (
        (
            ("trim", _box(-0.34, 0.5, 0.34, 0.76)),
            ("body", _ellipse(0.0, -0.32, 0.98, 0.98, 0.0, 180.0)),
            ("trim", _ellipse(0.0, -0.32, 0.98, 0.14)),
        ),
        (0.0, 0.2, 0.38),
    ),
    "Bottles": (
        (
            ("trim", _box(-0.17, -1.0, 0.17, -0.8)),
            ("body", _path("-0.13 -0.8, 0.13 -0.8, 0.16 -0.46, 0.44 -0.2, 0.44 0.98, -0.44 0.98, -0.44 -0.2, -0.16 -0.46")),
        ),
        (0.0, 0.36, 0.38),
    ),
    "Teapots": (
        (
            *_ring(-0.66, 0.1, 0.32, 0.38, 0.13),
            ("trim", _path("0.45 0.3, 0.82 -0.36, 1.0 -0.32, 0.6 0.56")),
            ("trim", _ellipse(0.0, -0.6, 0.14, 0.14)),
            ("trim", _box(-0.3, -0.56, 0.3, -0.4)),
            ("body", _ellipse(0.0, 0.16, 0.68, 0.62)),
        ),
        (0.0, 0.16, 0.4),
    ),
    "Backpacks": (
        (
            *_ring(0.0, -0.82, 0.24, 0.2, 0.09),
            ("trim", _box(-0.86, -0.1, -0.6, 0.72)),
            ("trim", _box(0.6, -0.1, 0.86, 0.72)),
            ("body", _ellipse(0.0, -0.28, 0.66, 0.52)),
            ("body", _box(-0.66, -0.28, 0.66, 0.92)),
            ("trim", _box(-0.66, 0.42, 0.66, 0.5)),
        ),
        (0.0, -0.14, 0.4),
    ),
    "Handbags": (
        (*_ring(0.0, -0.3, 0.5, 0.62, 0.12), ("body", _path("-0.72 -0.2, 0.72 -0.2, 0.98 0.8, -0.98 0.8"))),
        (0.0, 0.32, 0.4),
    ),
    "Pouches": (
        (
            ("body", _box(-0.96, -0.5, 0.96, 0.6)),
            ("trim", _box(-0.96, -0.6, 0.96, -0.46)),
            ("trim", _ellipse(0.86, -0.38, 0.1, 0.24)),
        ),
        (0.0, 0.08, 0.4),
    ),
    "Suitcases": (
        (
            ("trim", _box(-0.3, -0.98, 0.3, -0.7)),
            ("hole", _box(-0.18, -0.88, 0.18, -0.7)),
            ("trim", _ellipse(-0.44, 0.86, 0.14, 0.14)),
            ("trim", _ellipse(0.44, 0.86, 0.14, 0.14)),
            ("body", _box(-0.64, -0.7, 0.64, 0.8)),
            ("trim", _box(-0.64, -0.52, 0.64, -0.45)),
            ("trim", _box(-0.64, 0.56, 0.64, 0.63)),
        ),
        (0.0, 0.05, 0.42),
    ),
    "Shirts": (
        (
            (
                "body",
                _path(
                    "-0.3 -0.82, 0.3 -0.82, 0.98 -0.46, 0.8 -0.04, 0.52 -0.2, 0.52 0.86, -0.52 0.86, -0.52 -0.2, "
                    "-0.8 -0.04, -0.98 -0.46"
                ),
            ),
            ("hole", _ellipse(0.0, -0.84, 0.24, 0.2)),
        ),
        (0.0, 0.16, 0.42),
    ),
    "Dresses": (
        (
            ("trim", _box(-0.3, -0.98, -0.2, -0.6)),
            ("trim", _box(0.2, -0.98, 0.3, -0.6)),
            ("body", _path("-0.36 -0.7, 0.36 -0.7, 0.24 -0.18, 0.84 0.96, -0.84 0.96, -0.24 -0.18")),
            ("trim", _path("-0.25 -0.22, 0.25 -0.22, 0.29 -0.1, -0.29 -0.1")),
        ),
        (0.0, 0.5, 0.36),
    ),
    "Hats": (
        (
            ("body", _ellipse(0.0, 0.2, 0.66, 0.9, 180.0, 360.0)),
            ("trim", _box(-0.66, 0.18, 0.66, 0.34)),
            ("body", _ellipse(0.0, 0.42, 1.0, 0.2)),
        ),
        (0.0, -0.2, 0.36),
    ),
    "Socks": (
        (
            ("body", _path("-0.52 -0.96, 0.14 -0.96, 0.14 0.26, 0.7 0.44, 0.86 0.7, 0.7 0.94, -0.26 0.94, -0.52 0.6")),
            ("trim", _box(-0.56, -1.0, 0.18, -0.8)),
        ),
        (-0.19, -0.28, 0.33),
    ),
    "Cushions": (
        (
            (
                "body",
                _path(
                    "-0.94 -0.94, -0.5 -0.8, 0.0 -0.76, 0.5 -0.8, 0.94 -0.94, 0.8 -0.45, 0.77 0.0, 0.8 0.45, "
                    "0.94 0.94, 0.5 0.8, 0.0 0.76, -0.5 0.8, -0.94 0.94, -0.8 0.45, -0.77 0.0, -0.8 -0.45"
                ),
            ),
        ),
        (0.0, 0.0, 0.45),
    ),
    "Lamps": (
        (
            ("trim", _box(-0.07, 0.1, 0.07, 0.86)),
            ("trim", _ellipse(0.0, 0.9, 0.46, 0.1)),
            ("body", _path("-0.42 -0.94, 0.42 -0.94, 0.86 0.24, -0.86 0.24")),
        ),
        (0.0, -0.24, 0.38),
    ),
    "Vases": (
        (
            (
                "body",
                _path(
                    "-0.4 -0.96, 0.4 -0.96, 0.22 -0.66, 0.26 -0.44, 0.62 -0.06, 0.68 0.3, 0.54 0.66, 0.32 0.94, "
                    "-0.32 0.94, -0.54 0.66, -0.68 0.3, -0.62 -0.06, -0.26 -0.44, -0.22 -0.66"
                ),
            ),
            ("trim", _ellipse(0.0, -0.95, 0.41, 0.09)),
        ),
        (0.0, 0.26, 0.4),
    ),
    "Armchairs": (
        (
            ("trim", _box(-0.74, 0.66, -0.58, 0.96)),
            ("trim", _box(0.58, 0.66, 0.74, 0.96)),
            ("body", _box(-0.66, -0.78, 0.66, 0.5)),
            ("body", _ellipse(0.0, -0.76, 0.66, 0.2)),
            ("trim", _box(-0.66, 0.22, 0.66, 0.32)),
            ("body", _box(-0.7, 0.32, 0.7, 0.7)),
            ("trim", _box(-0.96, -0.12, -0.66, 0.72)),
            ("trim", _box(0.66, -0.12, 0.96, 0.72)),
        ),
        (0.0, -0.28, 0.4),
    ),
}


def _star(num_points: int, inner: float) -> npt.NDArray[np.float64]:
    angle = -np.pi / 2 + np.arange(2 * num_points) * np.pi / num_points
    radius = np.where(np.arange(2 * num_points) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


MOTIFS: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]] = {  # outline, and a hole in it
    "disc": (_ellipse(0.0, 0.0, 0.92, 0.92), None),
    "square": (_box(-0.8, -0.8, 0.8, 0.8), None),
    "triangle": (_path("0.0 -0.95, 0.95 0.75, -0.95 0.75"), None),
    "star": (_star(5, 0.42) * 1.08, None),
    "cross": (
        _path(
            "-0.3 -1.0, 0.3 -1.0, 0.3 -0.3, 1.0 -0.3, 1.0 0.3, 0.3 0.3, 0.3 1.0, -0.3 1.0, "
            "-0.3 0.3, -1.0 0.3, -1.0 -0.3, -0.3 -0.3"
        ),
        None,
    ),
    "ring": (_ellipse(0.0, 0.0, 1.0, 1.0), _ellipse(0.0, 0.0, 0.55, 0.55)),
}


# -------------------------------------------------------------------------------------------- one image
def _pattern(
    name: str, x: npt.NDArray[np.floating], y: npt.NDArray[np.floating], period: float, phase_x: float, phase_y: float
) -> npt.NDArray[np.bool_]:
    """The mask of a pattern's second tone; ``x, y`` are product coordinates."""
    u, v = x / np.float32(period) + np.float32(phase_x), y / np.float32(period) + np.float32(phase_y)
    match name:
        case "plain":
            return np.zeros(x.shape, dtype=np.bool_)
        case "stripes":
            return v % 1.0 < 0.5
        case "bars":
            return u % 1.0 < 0.5
        case "dots":
            return (u % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.3**2
        case "checks":
            return (u % 1.0 < 0.5) ^ (v % 1.0 < 0.5)
        case "zigzag":
            return (v + np.abs(u % 1.0 - 0.5)) % 1.0 < 0.5
        case _:
            raise AssertionError(name)


def _mask(side: int, parts: list[tuple[bool, npt.NDArray[np.float64]]]) -> Floats:
    """A mask ``(side, side)`` of 0 and 1: polygons in pixels, painted (True) or erased (False) in order."""
    canvas = Image.new("1", (side, side))
    draw = ImageDraw.Draw(canvas)
    for painted, corners in parts:
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=int(painted))
    return np.asarray(canvas, dtype=np.float32)


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(1.0, max(0.0, saturation)), min(1.0, max(0.0, value))), dtype=np.float32)


def _wall(pixels: Floats, column: Floats, row: Floats, clutter: float, draw: np.random.Generator) -> Floats:
    """The background, patterned with probability ``clutter``; ``column, row`` are pixels from the centre."""
    size = len(pixels)
    name = str(draw.choice(("stripes", "bars", "dots", "checks", "zigzag")))
    tone = _rgb(draw.random(), draw.uniform(0.1, 0.6), draw.uniform(0.4, 0.9))
    depth, period = np.float32(draw.uniform(0.15, 0.45)), size * draw.uniform(0.1, 0.3)
    x, y = np.broadcast_to(column, (size, size)), np.broadcast_to(row, (size, size))
    spots = _pattern(name, x, y, period, draw.random(), draw.random()).astype(np.float32)
    is_there = draw.random() < clutter
    return (pixels + (tone - pixels) * depth * spots[..., None]).astype(np.float32) if is_there else pixels


def _prop(size: int, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """Corners of an object beside the product, in pixels; anywhere, because the product is painted over it."""
    kind = draw.integers(3)
    radius = size * draw.uniform(0.07, 0.2)
    stretch, turn = draw.uniform(0.5, 1.6), draw.uniform(0.0, np.pi)
    place = size * draw.uniform(0.02, 0.98, size=2)
    corners = (_ellipse(0.0, 0.0, 1.0, stretch), _box(-0.9, -stretch, 0.9, stretch), _path("0 -1, 1 0.8, -1 0.8"))[kind]
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return place + corners @ turned * radius


def _with_props(pixels: Floats, clutter: float, draw: np.random.Generator) -> Floats:
    """Up to :data:`MAX_PROPS` objects in any colour."""
    is_there = draw.random(MAX_PROPS) < clutter
    for there in is_there:
        colouring = _rgb(draw.random(), draw.uniform(0.2, 0.9), draw.uniform(0.3, 0.95))
        corners = _prop(len(pixels), draw)
        if there:
            pixels = np.where(_mask(len(pixels), [(True, corners)])[..., None] > 0.0, colouring, pixels)
    return pixels


def _with_sticker(pixels: Floats, clutter: float, draw: np.random.Generator) -> Floats:
    """A round badge over a corner, with probability ``clutter / 2``."""
    size = len(pixels)
    corner = np.where(draw.random(2) < 0.5, 0.1, 0.9) * size
    corners = corner + _ellipse(0.0, 0.0, 1.0, 1.0) * size * draw.uniform(0.09, 0.15)
    colouring = _rgb(draw.random(), draw.uniform(0.6, 0.95), draw.uniform(0.6, 0.95))
    is_there = draw.random() < clutter / 2
    return np.where(_mask(size, [(True, corners)])[..., None] > 0.0, colouring, pixels) if is_there else pixels


def draw_product(
    category: str, colour: str, pattern: str, shape: str, side: int, clutter: float, draw: np.random.Generator
) -> Image.Image:
    """One RGB image of ``side`` x ``side`` pixels; all randomness comes from ``draw``.

    Args:
        category, colour, pattern, shape: the attributes shown.
        side: side length in pixels.
        clutter: amount of clutter, 0 to 1; apart from its size, the product looks the same.
        draw: random generator for everything that does not depend on an attribute.
    """
    scene = np.random.default_rng(draw.integers(2**63))
    factor = 2 if side < SUPERSAMPLED_BELOW else 1
    size = side * factor
    parts, (motif_x, motif_y, motif_radius) = PRODUCTS[category]
    scale = size * draw.uniform(0.33, 0.42) * (1.0 - MOST_SHRUNK * clutter * scene.random())
    turn = np.deg2rad(draw.uniform(-14.0, 14.0))
    centre_x, centre_y = size * (0.5 + draw.uniform(-0.06, 0.06, size=2))
    stretch = draw.uniform(0.92, 1.08)
    cosine, sine = np.cos(turn), np.sin(turn)

    def to_pixels(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x, y = points[:, 0] * stretch * scale, points[:, 1] / stretch * scale
        return np.stack([centre_x + cosine * x - sine * y, centre_y + sine * x + cosine * y], axis=1)

    pixel = np.arange(size, dtype=np.float32)
    column, row = pixel[None, :] - np.float32(centre_x), pixel[:, None] - np.float32(centre_y)
    product_x = (np.float32(cosine) * column + np.float32(sine) * row) / np.float32(scale * stretch)
    product_y = (np.float32(cosine) * row - np.float32(sine) * column) / np.float32(scale / stretch)

    hue, saturation, value = HUE_SATURATION_VALUE[colour]
    tone = _rgb(hue + draw.normal(0.0, 0.01), saturation * draw.uniform(0.88, 1.1), value * draw.uniform(0.92, 1.06))
    second = (
        tone + (1.0 - tone) * np.float32(draw.uniform(0.5, 0.7))
        if draw.random() < 0.5
        else tone * np.float32(draw.uniform(0.42, 0.58))
    )
    trim = _rgb(draw.random(), 0.12, draw.uniform(0.22, 0.4))
    backdrop = _rgb(draw.random(), draw.uniform(0.0, 0.14), draw.uniform(0.78, 0.97))
    slope_x, slope_y = draw.uniform(-0.12, 0.12, size=2)
    pixels = backdrop * (1.0 + np.float32(slope_x) * (column / size) + np.float32(slope_y) * (row / size))[..., None]

    pixels = _with_props(_wall(pixels.astype(np.float32), column, row, clutter, scene), clutter, scene)
    foot = np.float32(0.95 / stretch) * np.float32(scale)  # a soft shadow where the product stands
    shadow = np.exp(-((column / np.float32(0.75 * scale)) ** 2) - ((row - foot) / np.float32(0.16 * scale)) ** 2)
    pixels *= (1.0 - np.float32(draw.uniform(0.1, 0.35)) * shadow)[..., None]

    corners = [(layer, to_pixels(polygon)) for layer, polygon in parts]
    whole = _mask(size, [(layer != "hole", polygon) for layer, polygon in corners])
    body = _mask(size, [(layer == "body", polygon) for layer, polygon in corners])
    spots = _pattern(pattern, product_x, product_y, draw.uniform(0.36, 0.46), draw.random(), draw.random())
    surface = np.where(spots[..., None], second, tone)
    surface = np.where(body[..., None] > 0.0, surface, trim)

    outline, cut = MOTIFS[shape]
    radius = motif_radius * draw.uniform(0.88, 1.02)
    tilt = np.deg2rad(draw.uniform(-12.0, 12.0))
    tilted = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    place = np.array([motif_x, motif_y]) + draw.uniform(-0.04, 0.04, size=2)
    pale = draw.random() < 0.5
    ink, rim = (_rgb(0.12, 0.08, 0.98), _rgb(0.6, 0.3, 0.14))[:: 1 if pale else -1]
    for grown, colouring in ((1.24, rim), (1.0, ink)):
        motif: list[tuple[bool, npt.NDArray[np.float64]]] = [(True, to_pixels(place + outline @ tilted * radius * grown))]
        if cut is not None:
            motif.append((False, to_pixels(place + cut @ tilted * radius * (2.0 - grown))))
        surface = np.where(_mask(size, motif)[..., None] > 0.0, colouring, surface)

    light = draw.uniform(-0.28, 0.28, size=2)  # the product is shaded to one side
    surface = surface * (1.0 + np.float32(light[0]) * product_x + np.float32(light[1]) * product_y)[..., None]
    pixels = _with_sticker(np.where(whole[..., None] > 0.0, surface, pixels), clutter, scene)
    pixels = pixels * np.float32(draw.uniform(0.86, 1.1))
    if factor > 1:
        pixels = pixels.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
    pixels = pixels + draw.normal(0.0, draw.uniform(0.004, 0.02), size=pixels.shape).astype(np.float32)
    image = Image.fromarray(np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 0.9))) if draw.random() < 0.2 else image


def draw_item(shop: World, item: int, seed: int, side: int, clutter: float) -> Image.Image:
    """The image of an item; depends only on its visible attributes, its index in the shop, the seed and the clutter."""
    return draw_product(
        shop.value("category", item),
        shop.value("colour", item),
        shop.value("pattern", item),
        shop.value("shape", item),
        side,
        clutter,
        generator(seed, "demo", "picture", item),
    )


def encoded_images(shop: World, seed: int, side: int, clutter: float) -> Iterator[tuple[str, bytes]]:
    """``(asin, JPEG bytes)`` of every item that has an image, in the shop's order."""
    for item, asin in enumerate(shop.asins):
        if shop.has_image[item] and shop.has_metadata[item]:
            buffer = io.BytesIO()
            draw_item(shop, item, seed, side, clutter).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
            yield asin, buffer.getvalue()
