"""Draw scenes with known attributes: products with colours, patterns, materials and motifs, on a background.

Writes ``work/scenes.npy`` (uint8 RGB, ``(scenes, side, side, 3)``) and ``work/scenes.parquet`` (split and attributes of each
scene).  The outlines are signs of one colour from the icon sets; the drawing code of the built-in shop is not used.

A share of the pairs of type and colour is held out: each test scene has one of them, and no training scene has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from PIL import Image
from ruamel.yaml import YAML

from pretraining.common import HERE, WORK, generator, number, settings
from pretraining.images import COLOURS, drawn, iconify, texture

WORDS: dict[str, Any] = YAML(typ="safe", pure=True).load((HERE / "scene_words.yaml").read_text(encoding="utf-8"))
SPLITS = ("train", "valid", "test")
# centre of a single product, in shares of the side (x, y)
PLACES = {"centre": (0.5, 0.5), "left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26), "bottom": (0.5, 0.74)}
# centres of the first and the second product, by the relation of the first to the second
RELATIONS = {
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
GROUPS = {
    1: ((0.5, 0.5),),
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.27, 0.27), (0.73, 0.27), (0.5, 0.73)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}


@dataclass(frozen=True)
class Product:
    """The visible attributes of a product; ``second`` is empty if the pattern is plain, and ``motif`` if it has none.

    ``motif_colour`` is empty if there is no motif, and in ``busy_scenes.py``, which chooses the colour when it draws.
    """

    type: str
    icon: str
    colour: str
    pattern: str
    second: str
    material: str
    motif: str
    motif_colour: str = ""


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Attributes:
        products: one kind of product, or two kinds.
        count: number of products, if there is one kind.
        size: ``small`` or ``large`` for a single product, else empty.
        place: a key of ``PLACES`` for a single product, else empty.
        relation: a key of ``RELATIONS``, from the first to the second kind; empty if there is one kind.
        background: colour of the background.
    """

    products: tuple[Product, ...]
    count: int
    size: str
    place: str
    relation: str
    background: str


def held_out(type_: str, colour: str, seed: int, share: float) -> bool:
    """Whether a pair of type and colour is held out of training."""
    return number(seed, "pair", type_, colour) / 2**63 < share


def distance(first: str, second: str) -> float:
    """The Euclidean distance of two named colours in RGB, from 0 to 442."""
    return float(np.linalg.norm(np.subtract(COLOURS[first], COLOURS[second])))


def _colour_apart(rng: np.random.Generator, others: list[str], least: float) -> str:
    """Draw a colour with a distance of at least ``least`` from all ``others``."""
    usable = [colour for colour in COLOURS if all(distance(colour, other) >= least for other in others)]
    return str(rng.choice(usable))


def drawn_background(rng: np.random.Generator, params: dict[str, Any]) -> tuple[str, list[str]]:
    """Draw the colour of a background.

    Returns:
        The colour, and the colours of products that differ enough from it.
    """
    light = rng.random() < params["share_light_background"]
    background = str(rng.choice(["white", "grey", "beige"] if light else list(COLOURS)))
    return background, [colour for colour in COLOURS if distance(colour, background) >= params["least_colour_distance"]]


def drawn_scene(split: str, seed: int, place: int, params: dict[str, Any]) -> Scene:
    """Draw the attributes of a scene independently."""
    rng = generator(seed, "scene", split, place)
    share = params["share_pairs_test"]
    background, usable = drawn_background(rng, params)
    num_products = 2 if rng.random() < params["share_two_products"] else 1

    def fitting(type_: str, *, never_trained: bool) -> list[str]:
        return [colour for colour in usable if held_out(type_, colour, seed, share) == never_trained]

    possible = [type_ for type_ in WORDS["types"] if fitting(type_, never_trained=split == "test")]
    products = []
    for index, type_ in enumerate(rng.choice(possible, num_products, replace=False).tolist()):
        colour = str(rng.choice(fitting(type_, never_trained=split == "test" and index == 0)))
        pattern = str(rng.choice(list(WORDS["patterns"]))) if rng.random() < params["share_patterned"] else "plain"
        second = "" if pattern == "plain" else _colour_apart(rng, [colour, background], params["least_colour_distance"])
        material = str(rng.choice(list(WORDS["materials"])))
        motif = str(rng.choice(list(WORDS["motifs"]))) if pattern == "plain" and rng.random() < params["share_motif"] else ""
        motif_colour = _colour_apart(rng, [colour], params["least_colour_distance"] * 1.3) if motif else ""
        icon = str(rng.choice(WORDS["types"][type_]["icons"]))
        products.append(Product(type_, icon, colour, pattern, second, material, motif, motif_colour))
    if num_products == 2:
        return Scene(tuple(products), 1, "", "", str(rng.choice(list(RELATIONS))), background)
    count = int(rng.choice([1, 2, 3, 4], p=params["count_shares"]))
    if count > 1:
        return Scene(tuple(products), count, "", "", "", background)
    size = str(rng.choice(["small", "large"]))
    where = "centre" if size == "large" else str(rng.choice(list(PLACES)))
    return Scene(tuple(products), 1, size, where, "", background)


# ------------------------------------------------------------------------------------------------- drawing
def shading(material: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """``(side, side)`` brightness around 1 that represents a material, and its opacity."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    phase = float(rng.uniform(0, 2 * np.pi))
    match material:
        case "wood":
            grain = np.sin(y * 1.1 + 2.2 * np.sin(x * 0.09 + phase) + phase)
            return 1 - 0.32 * np.clip(grain, 0, 1), 1.0
        case "metal":
            band = np.sin((x + y) * (2.2 * np.pi / side) + phase)
            return 1 + 0.45 * band * np.abs(band), 1.0
        case "glass":
            streak = np.abs((x - y + side * rng.uniform(-0.3, 0.3)) % (side * 0.7) - side * 0.12) < side * 0.07
            return 1 + 0.5 * streak, 0.62
        case "wool":
            return 1 + 0.26 * np.sin(x * np.pi / 2) * np.sin(y * np.pi / 2 + (x // 4) * np.pi), 1.0
        case _:
            return 1.1 - 0.2 * y / side, 1.0


def _tone(colour: str, rng: np.random.Generator, spread: int) -> tuple[int, ...]:
    """Draw an RGB value near a named colour."""
    return tuple(np.clip(np.array(COLOURS[colour]) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist())


def fitted(mask: np.ndarray, side: int, angle: float, mirrored: bool) -> np.ndarray:
    """``(side, side)`` mask from 0 to 1: a mask ``(S, S)`` from 0 to 255, rotated and scaled."""
    image = Image.fromarray(mask[:, ::-1] if mirrored else mask).rotate(angle, Image.Resampling.BICUBIC)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255


def rendered(scene: Scene, masks: dict[str, np.ndarray], side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: ``(side, side, 3)`` uint8 RGB; ``masks`` are the result of :func:`outlines`."""
    y = np.linspace(-1, 1, side, dtype=np.float32)[:, None, None]
    canvas = np.array(_tone(scene.background, rng, 12), np.float32) + float(rng.uniform(-14, 14)) * y
    canvas = np.broadcast_to(canvas, (side, side, 3)).copy()
    if scene.relation:
        spots, fills = RELATIONS[scene.relation], (0.4, 0.5)
    elif scene.count > 1:
        spots, fills = GROUPS[scene.count], (0.36, 0.48)
    else:
        spots, fills = (PLACES[scene.place],), (0.74, 0.94) if scene.size == "large" else (0.34, 0.46)
    products = scene.products if scene.relation else scene.products * scene.count
    tones = {product: (_tone(product.colour, rng, 14), _tone(product.second or product.colour, rng, 14)) for product in products}
    for product, (across, down) in zip(products, spots, strict=True):
        size = round(side * float(rng.uniform(*fills)))
        alpha = fitted(masks[product.icon], size, float(rng.uniform(-12, 12)), bool(rng.random() < 0.5))
        smallest = 7 if size < 0.6 * side else 9
        rgb = texture(product.pattern, *tones[product], size, rng, (smallest, smallest + 6)).astype(np.float32)
        if product.motif:
            small = round(size * float(rng.uniform(0.32, 0.42)))
            ink = np.zeros((size, size, 1), np.float32)
            corner = (size - small) // 2
            ink[corner : corner + small, corner : corner + small, 0] = fitted(masks[product.motif], small, 0.0, mirrored=False)
            rgb = rgb * (1 - ink) + np.array(_tone(product.motif_colour, rng, 10), np.float32) * ink
        shade, opacity = shading(product.material, size, rng)
        rgb = np.clip(rgb * shade[..., None], 0, 255)
        top = int(np.clip(round(down * side + rng.uniform(-0.03, 0.03) * side - size / 2), 0, side - size))
        left = int(np.clip(round(across * side + rng.uniform(-0.03, 0.03) * side - size / 2), 0, side - size))
        window = canvas[top : top + size, left : left + size]
        weight = opacity * alpha[..., None]
        window[:] = window * (1 - weight) + rgb * weight
    light = float(rng.uniform(0.93, 1.07))
    return np.clip(canvas * light + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8)


def outlines(side: int, motifs: dict[str, str] | None = None) -> dict[str, np.ndarray]:
    """``(side, side)`` masks from 0 to 255 by icon and by motif, scaled to fill the square; ``motifs`` maps names to icons."""
    names = [icon for entry in WORDS["types"].values() for icon in entry["icons"]]
    wanted = {name: name for name in names} | dict(WORDS["motifs"] if motifs is None else motifs)
    bodies = {icon_set: iconify(icon_set)[0] for icon_set in sorted({icon.split(":")[0] for icon in wanted.values()})}
    found = {}
    for key, icon in wanted.items():
        icon_set, name = icon.split(":")
        alpha = drawn(*bodies[icon_set][name], side)[..., 3]
        rows, columns = (np.flatnonzero(alpha.max(axis) > 32) for axis in (1, 0))
        cut = Image.fromarray(alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        scale = side / max(cut.size)
        cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.BICUBIC)
        whole = Image.new("L", (side, side))
        whole.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        found[key] = np.asarray(whole)
    return found


def scene_of(row: dict[str, Any]) -> Scene:
    """Build a scene from its row of ``scenes.parquet``."""
    products = tuple(Product(**product) for product in row["products"])
    return Scene(products, row["count"], row["size"], row["place"], row["relation"], row["background"])


def scenes(params: dict[str, Any], seed: int) -> Iterator[tuple[str, int, Scene]]:
    """Draw all scenes: split, number within the split, scene."""
    for split in SPLITS:
        for place in range(params[f"num_{split}"]):
            yield split, place, drawn_scene(split, seed, place, params)


def main() -> None:
    """Draw all scenes and write them."""
    params, seed = settings()["scenes"], settings()["seed"]
    masks, side = outlines(params["outline_pixels"]), params["side_pixels"]
    total = sum(params[f"num_{split}"] for split in SPLITS)
    file = WORK / "scenes.npy"
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (total, side, side, 3)})
        rows = []
        for split, place, scene in scenes(params, seed):
            stream.write(rendered(scene, masks, side, generator(seed, "rendered", split, place)).tobytes())
            rows.append({"split": split, **asdict(scene)})
            if len(rows) % 5000 == 0:
                print(f"{len(rows)} of {total} scenes", flush=True)
    temporary.replace(file)
    table = pl.DataFrame(rows)
    table.write_parquet(WORK / "scenes.parquet")
    print(table.group_by("split").agg(pl.len()).sort("split"))
