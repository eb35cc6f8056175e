"""Collect images with captions, and split them by concept.

Writes ``work/images.npy`` (uint8 RGBA, ``(images, side, side, 4)``) and ``work/images.parquet``, which has one row for each
image: source, kind, title, keywords, category, concept, split, light.

A concept is a connected component of images.  Two images are connected if they share a code point, a normalised title or a
whole list of keywords, or if they are clip art with similar difference hashes.  Each concept is in one split only, over all
sources.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from pretraining.common import WORK, generator, number, settings
from pretraining.fetch import folder_of

COLOURS = {
    "red": (205, 32, 38), "orange": (242, 133, 30), "yellow": (246, 209, 40), "green": (46, 140, 60), "blue": (40, 92, 200),
    "purple": (120, 50, 150), "pink": (240, 130, 175), "brown": (120, 75, 40), "black": (25, 25, 28), "grey": (130, 130, 135),
    "white": (248, 248, 248), "turquoise": (50, 185, 185), "beige": (222, 202, 165), "navy blue": (22, 34, 90),
    "gold": (205, 160, 45), "light blue": (140, 195, 240), "olive": (115, 120, 40), "maroon": (115, 20, 35),
}  # fmt: skip
PATTERNS = ("striped", "dotted", "checkered")
_JUNK_KEYWORDS = {
    "unsorted", "clip art", "clipart", "clip", "art", "public domain", "openclipart", "image", "media", "png", "svg",
    "externalsource", "picture", "remix", "contour", "line art", "color", "colour", "icon", "icons", "theme", "hash",
    "lemon theme icon", "drawing", "illustration", "cartoon",
}  # fmt: skip
_VARIANT_WORDS = {
    "outline", "outlined", "off", "variant", "negative", "24px", "alt", "box", "circle", "duo", "flat", "filled", "bold", "plus",
    "minus", "check", "remove", "edit", "cancel",
}  # fmt: skip
_GENDER = re.compile(r"^(?:(?:man|woman|men|women|person|people|boy|girl|boys|girls)\s+)+(?=\w)")


@dataclass
class CaptionedImage:
    """One image with its caption, before the split.

    Attributes:
        source: name of the source.
        kind: ``emoji``, ``icon``, ``glyph`` or ``clip art``.
        title: title of the image.
        keywords: further terms.
        category: category of the source; may be empty.
        pixels: ``(side, side, 4)`` uint8 RGBA.
        keys: identifiers; images with a common one have the same concept.
    """

    source: str
    kind: str
    title: str
    keywords: list[str]
    category: str
    pixels: np.ndarray
    keys: list[str] = field(default_factory=list)


class Components:
    """Union-find over keys: keys that were joined, directly or indirectly, have the same root."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        """The key that represents the component of a key."""
        parent = self._parent.setdefault(key, key)
        while parent != key:
            self._parent[key] = self._parent[parent]
            key = self._parent[key]
            parent = self._parent[key]
        return key

    def join(self, keys: Iterable[str]) -> None:
        """Join all keys to one component, whose root is the smallest root in alphabetical order."""
        roots = sorted({self.root(key) for key in keys})
        for other in roots[1:]:
            self._parent[other] = roots[0]


def normalised(title: str) -> str:
    """Normalise a title: lower case, without digits, plural s and gender of people."""
    words = re.sub(r"[^a-z ]+", " ", title.lower()).split()
    text = " ".join(word.removesuffix("s") if len(word) > 3 else word for word in words)
    return _GENDER.sub("", text)


def split_of(concept: str, size: int, seed: int, share_test: float, share_valid: float, largest: int) -> str:
    """The split of a concept, which depends only on its name and size.

    Args:
        concept: name of the concept.
        size: its number of images.
        seed: seed of the split.
        share_test: share of the concepts in ``test``.
        share_valid: share of the concepts in ``valid``.
        largest: concepts with more images are in ``train``.

    Returns:
        ``train``, ``valid`` or ``test``.
    """
    place = number(seed, "split", concept) / 2**63
    if size > largest or place >= share_test + share_valid:
        return "train"
    return "test" if place < share_test else "valid"


def squared(image: Image.Image, side: int) -> np.ndarray:
    """Scale an image into a transparent square: ``(side, side, 4)`` uint8 RGBA."""
    image = image.convert("RGBA")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    canvas = np.zeros((side, side, 4), np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image)
    return canvas


def drawn(body: str, width: float, height: float, side: int) -> np.ndarray:
    """Render the body of an SVG: ``(side, side, 4)`` uint8 RGBA."""
    import resvg_py  # pyright: ignore[reportMissingImports] - only this step needs the renderer

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" color="#222">{body}</svg>'
    )
    encoded = resvg_py.svg_to_bytes(svg_string=svg, width=side)
    return squared(Image.open(io.BytesIO(bytes(encoded))), side)


def texture(
    pattern: str,
    first: tuple[int, ...],
    second: tuple[int, ...],
    side: int,
    rng: np.random.Generator,
    periods: tuple[int, int] = (10, 22),
) -> np.ndarray:
    """Draw a square with a pattern: ``(side, side, 3)`` uint8 RGB.

    Args:
        pattern: ``striped``, ``dotted``, ``checkered``, ``zigzag``, ``ringed``; any other name is plain.
        first: RGB of the ground.
        second: RGB of the pattern.
        side: side of the square in pixels.
        rng: generator of the period and direction.
        periods: range of the period in pixels, upper end excluded.
    """
    y, x = np.mgrid[:side, :side]
    period = int(rng.integers(*periods))
    match pattern:
        case "striped":
            angle = rng.choice([0.0, np.pi / 2, np.pi / 4])
            mask = (x * np.cos(angle) + y * np.sin(angle)) % period < period / 2
        case "dotted":
            mask = ((x % period) - period / 2) ** 2 + ((y % period) - period / 2) ** 2 < (period * 0.3) ** 2
        case "checkered":
            mask = (x // period + y // period) % 2 == 1
        case "zigzag":
            mask = (y + np.abs(x % (2 * period) - period)) % period < period / 2
        case "ringed":
            mask = np.hypot(x - side / 2, y - side / 2) % period < period / 2
        case _:
            mask = np.zeros((side, side), bool)
    return np.where(mask[..., None], np.array(second), np.array(first)).astype(np.uint8)


def painted(glyph: np.ndarray, name: str, variant: int, seed: int) -> tuple[np.ndarray, str]:
    """Fill a sign of one colour with a named colour or pattern; return the image and its caption."""
    rng = generator(seed, "paint", name, variant)
    first, second = rng.choice(list(COLOURS), 2, replace=False).tolist()
    jitter = rng.integers(-14, 15, (2, 3))
    rgb = [
        tuple(np.clip(np.array(COLOURS[colour]) + shift, 0, 255).tolist())
        for colour, shift in zip((first, second), jitter, strict=True)
    ]
    pattern = str(rng.choice(PATTERNS)) if variant and rng.random() < 0.6 else "plain"
    pixels = glyph.copy()
    pixels[..., :3] = texture(pattern, rgb[0], rgb[1], glyph.shape[0], rng)
    caption = f"{first} {name}" if pattern == "plain" else f"{pattern} {first} and {second} {name}"
    return pixels, caption


# ------------------------------------------------------------------------------------------------- sources
def emoji_names() -> dict[str, tuple[str, list[str], str]]:
    """Label, tags and group of emoji, by code points without variation selectors; skin tones are excluded."""
    folder = folder_of("emojibase-data") / "package"
    groups = json.loads((folder / "meta" / "groups.json").read_text(encoding="utf-8"))["groups"]
    names = {}
    for entry in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
        if "group" in entry:
            code = entry["hexcode"].lower().replace("-fe0f", "")
            names[code] = (entry["label"].lower(), entry.get("tags", []), groups[str(entry["group"])])
    return names


def iconify(name: str) -> tuple[dict[str, tuple[str, float, float]], dict[str, str]]:
    """Two mappings of an icon set: icon name to (body, width, height), and code points to icon name."""
    folder = folder_of(f"@iconify-json/{name}") / "package"
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    bodies = {key: (icon["body"], icon.get("width", width), icon.get("height", height)) for key, icon in icons["icons"].items()}
    characters = folder / "chars.json"
    return bodies, json.loads(characters.read_text(encoding="utf-8")) if characters.is_file() else {}


def emoji_sets(sets: list[str], side: int) -> Iterator[CaptionedImage]:
    """Emoji of icon sets, with names from emojibase."""
    names = emoji_names()
    # older sets have no code points, but the same icon names as their newer versions
    known = {icon: code for source in sets for code, icon in sorted(iconify(source)[1].items())}
    for source in sets:
        bodies, characters = iconify(source)
        if not characters:
            characters = {known[icon]: icon for icon in sorted(bodies) if icon in known}
        for code, icon in sorted(characters.items()):
            plain = code.lower().replace("-fe0f", "")
            if plain in names and icon in bodies:
                yield _emoji(source, plain, names[plain], drawn(*bodies[icon], side))


def emoji_3d(side: int) -> Iterator[CaptionedImage]:
    """Microsoft's three-dimensional emoji."""
    names = emoji_names()
    for file in sorted((folder_of("@lobehub/fluent-emoji-3d") / "package" / "assets").glob("*.webp")):
        plain = file.stem.lower().replace("-fe0f", "")
        if plain in names:
            with Image.open(file) as image:
                yield _emoji("fluent-emoji-3d", plain, names[plain], squared(image, side))


def _emoji(source: str, code: str, name: tuple[str, list[str], str], pixels: np.ndarray) -> CaptionedImage:
    label, tags, group = name
    keywords = [tag for tag in tags if tag not in label.split()]
    return CaptionedImage(source, "emoji", label, keywords, group, pixels, [f"code:{code}", f"title:{normalised(label)}"])


def icon_title(name: str) -> str:
    """``car-dashboard-speed-1`` -> ``car dashboard speed``."""
    return " ".join(word for word in name.split("-") if not word.isdigit() and word not in _VARIANT_WORDS)


def icon_sets(sets: list[str], side: int) -> Iterator[CaptionedImage]:
    """Icons of several colours; the title is the name of the icon."""
    for source in sets:
        for name, body in sorted(iconify(source)[0].items()):
            title = icon_title(name)
            if title:
                yield CaptionedImage(source, "icon", title, [], "", drawn(*body, side), [f"title:{normalised(title)}"])


def glyph_sets(sets: list[str], side: int, num_variants: int, seed: int) -> Iterator[CaptionedImage]:
    """Signs of one colour, filled with colours and patterns that are in the caption."""
    for source in sets:
        taken = set()
        for name, body in sorted(iconify(source)[0].items(), key=lambda item: (len(item[0]), item[0])):
            words = name.split("-")
            title = icon_title(name)
            if not title or title in taken or len(words) > 4 or len(title) < 3 or words[0] in {"alpha", "numeric", "arrow"}:
                continue
            taken.add(title)
            glyph = drawn(*body, side)
            for variant in range(num_variants):
                pixels, caption = painted(glyph, title, variant, seed)
                yield CaptionedImage(source, "glyph", caption, [], "", pixels, [f"title:{normalised(title)}"])


def clip_art(side: int, max_pixels: int, max_title_uses: int) -> Iterator[CaptionedImage]:
    """Clip art of Openclipart: images of the PNG package, with titles and keywords of the SVG package.

    Images that are too large, damaged, nearly transparent, or without title and keywords are skipped.
    """
    Image.MAX_IMAGE_PIXELS = None  # the size is checked here, before anything is decoded
    root = folder_of("openclipart-png") / "usr" / "share" / "openclipart" / "png"
    words = folder_of("openclipart-svg") / "usr" / "share" / "openclipart" / "svg"
    found = []
    for file in sorted(root.rglob("*.png")):
        relative = file.relative_to(root)
        # the folder has two thousand nearly equal stars
        if not file.is_symlink() and relative.parts[:2] != ("shapes", "stars"):
            title, keywords = svg_words((words / relative).with_suffix(".svg"))
            found.append((file, relative, cleaned_title(title), keywords))
    uses = Counter(title for _, _, title, _ in found)
    for file, relative, title, keywords in found:
        # a title that many images share is the name of a collection
        named = (title if uses[title] <= max_title_uses else "") or cleaned_title(file.stem)
        if not named and not keywords:
            continue
        try:
            with Image.open(file) as image:
                if image.width * image.height > max_pixels:
                    continue
                pixels = squared(image, side)
        except (UnidentifiedImageError, OSError, SyntaxError):
            continue
        if pixels[..., 3].max() < 32:
            continue
        keys = [f"file:{relative}"]
        if named:
            keys.append(f"title:{normalised(named)}")
        if len(keywords) >= 3:
            keys.append("words:" + ",".join(sorted(keywords)))
        category = relative.parts[0] if len(relative.parts) > 1 and relative.parts[0] != "unsorted" else ""
        yield CaptionedImage("openclipart", "clip art", named or keywords[0], keywords, category, pixels, keys)


def svg_words(file: Path) -> tuple[str, list[str]]:
    """Title and keywords in the metadata of an SVG; empty if it has none or is not valid XML."""
    if not file.is_file():
        return "", []
    text = file.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"<metadata.*?</metadata>", text, re.DOTALL)
    if found is None:
        return "", []
    block = re.sub(r"(</?)[A-Za-z0-9_]+:", r"\1", found[0])  # remove the prefixes of names, which many files do not declare
    block = re.sub(r"\s[\w]+:[\w]+=\"[^\"]*\"", "", block)
    try:
        tree = ElementTree.fromstring(block)  # noqa: S314 - files of a package whose sha256 is pinned
    except ElementTree.ParseError:
        return "", []
    title = next((node.text or "" for node in tree.iter("title")), "")
    keywords = [cleaned_keyword(node.text or "") for node in tree.iter("li")]
    unique = dict.fromkeys(word for word in keywords if word and word not in _JUNK_KEYWORDS)
    return title, list(unique)[:12]


def cleaned_keyword(word: str) -> str:
    """Normalise a keyword to lower case; empty if it is invalid, such as ``HASH(0x8a1b)``."""
    word = re.sub(r"[_\s]+", " ", word.lower()).strip(" .,;\"'")
    return "" if "hash(0x" in word or not re.search("[a-z]{3}", word) or len(word) > 40 else word


def cleaned_title(title: str) -> str:
    """Remove numbers, authors and underscores of a title or file name; empty if too little or too much is left."""
    text = re.sub(r"(?i)clip ?art by .*? - ", "", title)
    text = re.sub(r"(?i)\bby\b.*$|\(.*?\)|\barchitetto\b|https?:\S+", " ", text)
    text = re.sub(r"[^A-Za-z' ]+", " ", text).lower()
    words = [word.strip("'") for word in text.split()]
    text = " ".join(word for word in words if len(word) > 1)
    return text if 3 <= len(text) <= 60 else ""


def difference_hashes(pixels: np.ndarray) -> np.ndarray:
    """``(N, 64)`` bool: whether each of 8 x 8 cells of an image is darker than its right neighbour."""
    hashes = np.zeros((len(pixels), 64), bool)
    for place, rgba in enumerate(pixels):
        alpha = rgba[..., 3:].astype(np.float32) / 255
        grey = (rgba[..., :3] * alpha + 255 * (1 - alpha)).mean(-1).astype(np.uint8)
        small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX), np.int16)
        hashes[place] = (small[:, 1:] < small[:, :-1] - 2).ravel()
    return hashes


def join_near_duplicates(components: Components, keys: list[str], hashes: np.ndarray, max_difference: int) -> None:
    """Join the keys of images whose hashes differ in at most ``max_difference`` bits.

    Hashes with fewer than six set bits are not compared, because different images can have them.
    """
    signs = hashes.astype(np.float32)
    counts = signs.sum(1)
    for start in range(0, len(keys), 1024):
        block = signs[start : start + 1024]
        difference = counts[start : start + 1024, None] + counts[None] - 2 * block @ signs.T
        for row, column in zip(*np.nonzero(difference <= max_difference), strict=True):
            first = start + row
            if first < column and min(counts[first], counts[column]) >= 6:
                components.join([keys[first], keys[column]])


def main() -> None:
    """Draw, decode, group and split all images."""
    params = settings()
    image_params, seed = params["images"], params["seed"]
    side = image_params["side_pixels"]
    rows: list[dict[str, object]] = []
    pixels: list[np.ndarray] = []
    all_keys: list[list[str]] = []
    sources = (
        emoji_sets(image_params["emoji_sets"] + image_params["foreign_emoji_sets"], side),
        emoji_3d(side),
        icon_sets(image_params["icon_sets"] + image_params["foreign_icon_sets"], side),
        glyph_sets(image_params["glyph_sets"], side, image_params["glyph_variants"], seed),
        clip_art(side, image_params["max_source_pixels"], image_params["max_title_uses"]),
    )
    for images in sources:
        for image in images:
            alpha = image.pixels[..., 3:].astype(np.float32)
            brightness = float((image.pixels[..., :3] * alpha).sum() / (3 * max(float(alpha.sum()), 1.0)))
            rows.append({
                "source": image.source, "kind": image.kind, "title": image.title, "keywords": image.keywords,
                "category": image.category, "light": brightness > 200,
            })  # fmt: skip
            pixels.append(image.pixels)
            all_keys.append(image.keys)
        print(f"{len(rows)} images")
    stacked = np.stack(pixels)
    components = Components()
    for keys in all_keys:
        components.join(keys)
    art = [place for place, row in enumerate(rows) if row["kind"] == "clip art"]
    join_near_duplicates(
        components, [all_keys[place][0] for place in art], difference_hashes(stacked[art]), image_params["max_hash_difference"]
    )
    foreign = set(image_params["foreign_emoji_sets"] + image_params["foreign_icon_sets"])
    concepts = [components.root(keys[0]) for keys in all_keys]
    sizes = Counter(concepts)
    for row, concept in zip(rows, concepts, strict=True):
        row["concept"] = concept
        row["split"] = split_of(
            concept,
            sizes[concept],
            seed,
            image_params["share_test"],
            image_params["share_valid"],
            image_params["largest_concept"],
        )
        row["foreign"] = row["source"] in foreign
    np.save(WORK / "images.npy", stacked)
    table = pl.DataFrame(rows)
    table.write_parquet(WORK / "images.parquet")
    print(table.group_by("source", "kind", "foreign").agg(pl.len(), pl.col("concept").n_unique()).sort("source"))
    print(table.group_by("split").agg(pl.len(), pl.col("concept").n_unique()))
    print("largest concepts", sizes.most_common(8))
