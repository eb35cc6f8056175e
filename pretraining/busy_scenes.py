"""Draw scenes like ``scenes.py`` with more variation: 14 patterns, 30 motifs, shadows, clutter, patterned backgrounds, blur.

Types, colours, materials, outlines and vocabulary are those of ``scenes.py``.  Code, outlines and textures of the built-in shop
are not used.  Validation and test scenes have pairs of type and colour that are not in training scenes.  The output has the
format of a source of ``seen.py``: ``work/seen/scenes.npy`` and ``work/seen/scenes.parquet``.

    python -m pretraining busy_scenes
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from PIL import Image, ImageFilter

from pretraining.common import WORK, generator, settings
from pretraining.images import COLOURS
from pretraining.scenes import (
    GROUPS,
    RELATIONS,
    SPLITS,
    WORDS,
    Product,
    distance,
    drawn_background,
    fitted,
    held_out,
    outlines,
    shading,
)
from pretraining.seen import write_pool

PATTERNS = {
    "plain": "plain", "vertical": "vertically striped", "horizontal": "horizontally striped", "diagonal": "diagonally striped",
    "dots": "dotted", "checks": "checkered", "diamonds": "argyle", "zigzag": "zigzag", "waves": "wavy", "rings": "ringed",
    "grid": "grid", "tartan": "tartan", "camouflage": "camouflage", "speckles": "speckled",
}  # fmt: skip
MOTIFS = [
    "star", "heart", "moon-waning-crescent", "lightning-bolt", "plus-thick", "music-note", "water", "paw", "circle", "square",
    "triangle", "hexagon", "rhombus", "star-four-points", "clover", "leaf", "flower", "fire", "snowflake", "cloud", "crown",
    "close-thick", "circle-double", "arrow-up-bold", "eye", "cards-spade", "puzzle", "white-balance-sunny", "hexagon-outline",
    "circle-outline",
]  # fmt: skip
MOTIF_WORDS = {
    "moon-waning-crescent": "moon", "lightning-bolt": "flash", "plus-thick": "cross", "music-note": "note", "water": "drop",
    "star-four-points": "four-pointed star", "close-thick": "x", "circle-double": "double circle", "arrow-up-bold": "arrow",
    "cards-spade": "spade", "white-balance-sunny": "sun", "hexagon-outline": "hexagon outline", "circle-outline": "ring",
}  # fmt: skip


def drawn_products(split: str, rng: np.random.Generator, params: dict[str, Any], seed: int) -> tuple[list[Product], int, str]:
    """Draw the attributes of a scene independently.

    Returns:
        One kind of product or two, the number of products if there is one kind, and the colour of the background.
    """
    background, usable = drawn_background(rng, params)

    def fitting(type_: str) -> list[str]:
        share = params["share_pairs_test"]
        return [colour for colour in usable if held_out(type_, colour, seed, share) == (split != "train")]

    number_of_kinds = 2 if rng.random() < params["share_two_products"] else 1
    products = []
    for type_ in rng.choice([type_ for type_ in WORDS["types"] if fitting(type_)], number_of_kinds, replace=False).tolist():
        pattern = str(rng.choice(list(PATTERNS))) if rng.random() < params["share_patterned"] else "plain"
        colour = str(rng.choice(fitting(type_)))
        others = [other for other in COLOURS if distance(other, colour) >= params["least_colour_distance"]]
        second = "" if pattern == "plain" else str(rng.choice(["white", "black", *others, *others]))
        motif = str(rng.choice(MOTIFS)) if rng.random() < params["share_motif"] else ""
        icon = str(rng.choice(WORDS["types"][type_]["icons"]))
        products.append(Product(type_, icon, colour, pattern, second, str(rng.choice(list(WORDS["materials"]))), motif))
    count = 1 if number_of_kinds == 2 else int(rng.choice([1, 2, 3, 4], p=params["count_shares"]))
    return products, count, background


def pattern_share(pattern: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a pattern: ``(side, side)`` shares of the second colour, from 0 to 1."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    turn = float(rng.normal(0, 0.12))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period, share = float(rng.uniform(7, 8 + side / 4.5)), float(rng.uniform(0.35, 0.6))
    u, v = u + float(rng.uniform(0, period)), v + float(rng.uniform(0, period))
    match pattern:
        case "vertical":
            mask = u % period < share * period
        case "horizontal":
            mask = v % period < share * period
        case "diagonal":
            mask = (u + v * float(rng.choice([-1, 1]) * rng.uniform(0.7, 1.4))) % (1.4 * period) < 1.4 * share * period
        case "dots":
            shifted = u + (v // period % 2) * period / 2 * float(rng.random() < 0.5)
            radius = float(rng.uniform(0.22, 0.38)) * period
            mask = np.hypot(shifted % period - period / 2, v % period - period / 2) < radius
        case "checks":
            mask = (u // (0.7 * period) + v // (0.7 * period)) % 2 == 1
        case "diamonds":
            mask = ((u + 0.6 * v) // period + (u - 0.6 * v) // period) % 2 == 1
        case "zigzag":
            mask = (v + np.abs(u % period - period / 2)) % period < share * period
        case "waves":
            mask = (v + 0.3 * period * np.sin(u * 2 * np.pi / (1.6 * period))) % period < share * period
        case "rings":
            middle = rng.uniform(0.35, 0.65, 2) * side
            mask = np.hypot(x - middle[0], y - middle[1]) % period < share * period
        case "grid":
            mask = np.minimum(u % period, v % period) < max(1.5, 0.18 * period)
        case "tartan":
            return (u % period < share * period) * 0.5 + (v % period < share * period) * 0.5
        case "camouflage":
            small = max(3, round(side / period * 0.9))
            noise = Image.fromarray(rng.integers(0, 256, (small, small), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            mask = np.asarray(noise) > 135
        case "speckles":
            small = max(4, round(side / 3))
            noise = Image.fromarray(((rng.random((small, small)) < 0.14) * 255).astype(np.uint8)).resize((side, side))
            mask = np.asarray(noise) > 127
        case _:
            return np.zeros((side, side), np.float32)
    return mask.astype(np.float32)


def tone(colour: str, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Draw an RGB value near a named colour, ``(3,)`` float32."""
    light = 1 + rng.normal(0, spread / 160)
    return np.clip((np.array(COLOURS[colour]) + rng.normal(0, spread, 3)) * light, 0, 255).astype(np.float32)


def draw_product(
    product: Product, masks: dict[str, np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one product: ``(size, size, 3)`` RGB and ``(size, size, 1)`` opacity."""
    alpha = fitted(masks[product.icon], size, float(rng.uniform(-16, 16)), bool(rng.random() < 0.5))[..., None]
    share = pattern_share(product.pattern, size, rng)[..., None]
    first = tone(product.colour, rng, 16)
    second = tone(product.second, rng, 14) if product.second else first
    if product.second and rng.random() < 0.3:  # a lighter or darker tone of the first colour
        second = (first * 0.5 if first.mean() > 110 or rng.random() < 0.3 else first * 0.6 + 100).astype(np.float32)
    rgb = first * (1 - share) + second * share
    if product.motif:
        small = max(8, round(size * float(rng.uniform(0.32, 0.7))))
        stamp = fitted(masks[f"motif {product.motif}"], small, float(rng.uniform(-14, 14)), mirrored=False)
        top, left = ((size - small) * rng.uniform(0.3, 0.7, 2)).astype(int)
        ink = np.zeros((size, size, 1), np.float32)
        ink[top : top + small, left : left + small, 0] = stamp
        options = [colour for colour in COLOURS if distance(colour, product.colour) >= 110]
        inked = tone(str(rng.choice(["white", "black", *options])), rng, 10)
        if rng.random() < 0.4:  # a border around the motif
            grown = Image.fromarray((ink[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3 if size < 60 else 5))
            rim = np.asarray(grown, np.float32)[..., None] / 255
            rgb = rgb * (1 - rim) + (255 - inked) * rim
        rgb = rgb * (1 - ink) + inked * ink
        if rng.random() < 0.5:  # a badge, which also covers gaps of the product
            alpha = np.maximum(alpha, ink)
    shade, opacity = shading(product.material, size, rng)
    return np.clip(rgb * shade[..., None], 0, 255), alpha * (opacity if rng.random() < 0.7 else 1.0)


def ground(background: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the background ``(side, side, 3)``: a colour with a gradient, sometimes with a faint pattern."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    first = tone(background, rng, 10)
    slope = float(rng.normal(0, 22)) * y + float(rng.normal(0, 14)) * x
    canvas = first + slope[..., None]
    if rng.random() < 0.35:
        share = pattern_share(str(rng.choice(list(PATTERNS))), side, rng)[..., None]
        canvas = canvas + share * rng.normal(0, 24, 3).astype(np.float32)
    return canvas


def draw_scene(
    products: list[Product], count: int, background: str, masks: dict[str, np.ndarray], side: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw a scene: ``(side, side, 3)`` uint8 RGB."""
    canvas = ground(background, side, rng)
    keys = list(masks)

    def put(rgb: np.ndarray, alpha: np.ndarray, across: float, down: float) -> None:
        size = len(rgb)
        top = int(np.clip(round(down * side - size / 2), 0, side - size))
        left = int(np.clip(round(across * side - size / 2), 0, side - size))
        window = canvas[top : top + size, left : left + size]
        window[:] = window * (1 - alpha) + rgb * alpha

    def clutter(number_of: int) -> None:
        for _ in range(number_of):
            size = round(side * float(rng.uniform(0.12, 0.34)))
            mask = fitted(masks[keys[rng.integers(len(keys))]], size, float(rng.uniform(-180, 180)), mirrored=False)[..., None]
            edge = rng.uniform(0.02, 0.2) if rng.random() < 0.5 else rng.uniform(0.8, 0.98)
            places = [edge, rng.uniform(0, 1)] if rng.random() < 0.5 else [rng.uniform(0, 1), edge]
            colour = np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), (size, size, 3))
            put(colour, mask * float(rng.uniform(0.6, 1)), float(places[0]), float(places[1]))

    if rng.random() < 0.4:
        clutter(int(rng.integers(1, 4)))
    if len(products) == 2:
        spots, fills, drawn = list(RELATIONS.values())[rng.integers(4)], (0.4, 0.54), products
    elif count > 1:
        spots, fills, drawn = GROUPS[count], (0.36, 0.5), products * count
    else:
        spots, fills, drawn = ((rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.56)),), (0.6, 1.0), products
    for product, (across, down) in zip(drawn, spots, strict=True):
        size = round(side * float(rng.uniform(*fills)))
        rgb, alpha = draw_product(product, masks, size, rng)
        if rng.random() < 0.3:
            dark = Image.fromarray((alpha[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(3))
            put(np.zeros_like(rgb), np.asarray(dark, np.float32)[..., None] / 255 * 0.4, across + 0.02, down + 0.03)
        put(rgb, alpha, across + float(rng.uniform(-0.02, 0.02)), down + float(rng.uniform(-0.02, 0.02)))
    if rng.random() < 0.15:
        clutter(1)
    canvas = np.clip(canvas * float(rng.uniform(0.85, 1.1)) + rng.normal(0, rng.uniform(0, 7), canvas.shape), 0, 255)
    image = Image.fromarray(canvas.astype(np.uint8))
    degraded = rng.random()
    if degraded < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.6))))
    elif degraded < 0.45:  # an enlarged small image
        small = int(rng.integers(56, 97))
        image = image.resize((small, small), Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def described(products: list[Product], count: int, background: str, rng: np.random.Generator) -> str:
    """A caption with some of the attributes of a scene, all of them true."""
    parts = []
    for product in products:
        words = [] if count == 1 else [("two", "three", "four")[count - 2]]
        if product.pattern != "plain" and rng.random() < 0.85:
            words.append(PATTERNS[product.pattern])
        words.append(str(rng.choice(WORDS["colours"][product.colour])))
        if rng.random() < 0.4:
            words.append(product.material)
        words.append(str(rng.choice(WORDS["types"][product.type]["words"])))
        if product.motif and rng.random() < 0.85:
            words.append(f"with a {MOTIF_WORDS.get(product.motif, product.motif)}")
        parts.append(" ".join(words))
    caption = " and ".join(parts)
    return caption if rng.random() < 0.6 else f"{caption} on a {background} background"


def labels(products: list[Product], count: int, background: str) -> list[str]:
    """All attributes as ``attribute=value``; an attribute has two values if two kinds of product differ."""
    found = {f"background={background}": None}
    if len(products) == 1:
        found[f"count={count}"] = None
    for product in products:
        for head in ("type", "colour", "pattern", "material"):
            found[f"{head}={getattr(product, head)}"] = None
        found[f"motif={product.motif or 'none'}"] = None
    return list(found)


def all_masks(side: int) -> dict[str, np.ndarray]:
    """Outlines by icon and by ``motif NAME``; see :func:`pretraining.scenes.outlines`."""
    motifs = {f"motif {name}": f"mdi:{name}" for name in MOTIFS}
    return outlines(side, motifs)


def main() -> None:
    """Draw all scenes and write them."""
    whole = settings()
    params, seed = whole["nano2"]["busy_scenes"], whole["seed"]
    side, masks = params["side_pixels"], all_masks(params["outline_pixels"])
    pixels, rows = [], []
    for split in SPLITS:
        for place in range(params[f"num_{split}"]):
            rng = generator(seed, "busy scene", split, place)
            products, count, background = drawn_products(split, rng, params, seed)
            pixels.append(draw_scene(products, count, background, masks, side, rng))
            captions = [described(products, count, background, rng) for _ in range(params["num_captions"])]
            rows.append({"split": split, "captions": captions, "labels": labels(products, count, background)})
            if len(rows) % 2000 == 0:
                print(f"{len(rows)} scenes", flush=True)
    write_pool("scenes", np.stack(pixels), pl.DataFrame(rows), WORK)
