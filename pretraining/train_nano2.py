"""Train nano 2: nano's decoder with a deeper vision tower.

In addition to the data of nano (``train.py``), each step uses scenes with known attributes (``busy_scenes.py``) and photographs
(``seen.py``).  In addition to the losses of nano there are:

* ``vector_heads``, ``token_heads``: a linear classifier for each attribute (type, colour, pattern, motif, material, garment and
  others) on the backbone's vector, and on the mean of its image tokens.  The loss is the cross-entropy divided by that of a
  uniform guess, summed over the attributes.
* ``dense``: one minus the cosine of a linear map of each image token and EfficientNet's features of the same place of the
  image; the features are transformed like the image.
* ``token_contrastive``, in the first steps: nano's contrastive loss of captions on a linear map of the mean image token, which
  costs no pass of the decoder.
* ``pooled``, ``image_rows``: the same for the backbone's vector and the mean of the features, and the similarities within a
  batch.

The heads are not exported.  ``--params FILE`` replaces settings of section ``nano2``, such as the sources or the initial
weights.

    python -m pretraining train_nano2 [--params FILE] [--work FOLDER] [--steps N]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer
from ruamel.yaml import YAML
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from pretraining.common import WORK, Work, generator, settings
from pretraining.model import PATCH, Encoder, patches
from pretraining.train import (
    Corpus,
    contrastive,
    drawn_places,
    learn,
    moved,
    moves,
    optimiser_for,
    plain,
    rate,
    relational,
    start,
    text_vectors,
    validated,
    weighted,
)


@dataclass
class Source:
    """Images of one source with captions, attributes and EfficientNet's features.

    Attributes:
        pixels: ``(images, side, side, channels)``, RGB or RGBA.
        captions: rows of each image's captions in ``Material.targets``.
        labels: ``(images, classes)``, 0 or 1.
        maps: ``(images, 7, 7, channels)`` features of EfficientNet; None if they were not computed.
        mean: mean of each channel of the maps.
        deviation: standard deviation of each channel of the maps.
        train: rows of the training images.
        valid: rows of the validation images.
        mapped: rows of the training images with maps.
        is_contrastive: whether a caption describes one image only, so that the contrastive loss can use it.
    """

    pixels: np.ndarray
    captions: list[list[int]]
    labels: np.ndarray
    maps: np.ndarray | None
    mean: np.ndarray
    deviation: np.ndarray
    train: np.ndarray
    valid: np.ndarray
    mapped: np.ndarray
    is_contrastive: bool


@dataclass
class Material:
    """The data of training: nano's corpus and the sources.

    Attributes:
        corpus: nano's corpus.
        corpus_maps: the images of the corpus as a source without labels.
        sources: the other sources by name.
        targets: ``(texts, known columns)`` targets of all texts, those of the corpus first.
        rows: token ids of all texts, in the same order.
        heads: slice of the classes by attribute.
        classes: names of the classes, ``attribute=value``.
        other_ids: rows of the training captions of contrastive sources.
    """

    corpus: Corpus
    corpus_maps: Source
    sources: dict[str, Source]
    targets: np.ndarray
    rows: list[list[int]]
    heads: dict[str, slice]
    classes: list[str]
    other_ids: np.ndarray

    @classmethod
    def read(cls, work: Path, encoder: Encoder, params: dict[str, Any], axes: np.ndarray) -> Material:
        """Read the data of a working folder, with text targets projected on ``axes`` ``(384, known columns)``."""
        corpus = Corpus.read(work, encoder, params, axes)
        tables = {name: pl.read_parquet(work / "seen" / f"{name}.parquet") for name in params["sources"]}
        known = {label for table in tables.values() for label in table.filter(pl.col("split") == "train")["labels"].explode()}
        classes = sorted(known, key=lambda label: (label.split("=")[0], label))
        heads: dict[str, slice] = {}
        for place, label in enumerate(classes):
            head = label.split("=")[0]
            heads[head] = slice(heads[head].start if head in heads else place, place + 1)
        place_of = {label: place for place, label in enumerate(classes)}
        targets, rows, sources, other_ids = [corpus.text_targets], list(corpus.rows), {}, []
        for name, table in tables.items():
            vectors = np.load(work / "seen" / f"{name}_texts.npy").astype(np.float32) @ axes
            targets.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
            lists = table["captions"].to_list()
            ends = np.cumsum([len(captions) for captions in lists]) + len(rows)
            captions = [list(range(end - len(own), end)) for end, own in zip(ends, lists, strict=True)]
            rows += encoder.words([caption for own in lists for caption in own], params["max_text_tokens"])
            labels = np.zeros((len(table), len(classes)), np.uint8)
            for image, own in enumerate(table["labels"].to_list()):
                labels[image, [place_of[label] for label in own if label in place_of]] = 1
            split = table["split"]
            train, valid = ((split == part).arg_true().to_numpy() for part in ("train", "valid"))
            is_contrastive = name in params["contrastive_sources"]
            if is_contrastive:
                other_ids += [caption for image in train for caption in captions[image]]
            pixels = np.load(work / "seen" / f"{name}.npy", mmap_mode="r")
            maps = read_maps(work, name)
            sources[name] = Source(pixels, captions, labels, *maps, train, valid, with_maps(maps[0]), is_contrastive)
        none = np.zeros(0, int)
        maps = read_maps(work, "images")
        corpus_maps = Source(
            corpus.pixels,
            corpus.captions,
            np.zeros((0, len(classes)), np.uint8),
            *maps,
            train=none,
            valid=none,
            mapped=with_maps(maps[0]),
            is_contrastive=True,
        )
        return cls(corpus, corpus_maps, sources, np.concatenate(targets), rows, heads, classes, np.array(other_ids))


def with_maps(maps: np.ndarray | None) -> np.ndarray:
    """Rows of the images that have features of EfficientNet."""
    return np.zeros(0, int) if maps is None else np.flatnonzero(np.abs(maps[:, 3, 3]).sum(-1) > 0)


def read_maps(work: Path, name: str) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Read the features of a source, with mean and standard deviation of each channel; None if they do not exist."""
    file = work / "seen" / f"{name}_maps.npy"
    if not file.is_file():
        return None, np.zeros(0, np.float32), np.ones(0, np.float32)
    with np.load(file.with_suffix(".npz")) as moments:
        return np.load(file, mmap_mode="r"), moments["mean"], moments["deviation"]


class Heads(nn.Module):
    """Weights that only training uses: linear maps to attributes, EfficientNet's features and captions, and the temperature."""

    def __init__(self, width: int, num_classes: int, num_channels: int) -> None:
        super().__init__()
        self.vector = nn.Linear(width, num_classes)
        self.tokens = nn.Linear(width, num_classes)
        self.dense = nn.Linear(width, num_channels)
        self.pooled = nn.Linear(width, num_channels)
        self.caption = nn.Linear(width, width)
        self.log_inverse_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class Optimisers:
    """Muon for the matrices of blocks and layers and AdamW for all other weights, with the interface of one optimiser."""

    def __init__(self, model: nn.Module, heads: Heads, params: dict[str, Any]) -> None:
        muon = {id(weight) for name, weight in model.named_parameters() if weight.ndim == 2 and is_inner(name)}
        self.adam = optimiser_for(model, heads, params)
        inner = [weight for group in self.adam.param_groups for weight in group["params"] if id(weight) in muon]
        for group in self.adam.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in muon]
        self.muon = torch.optim.Muon(
            inner, lr=params["learning_rate"], weight_decay=params["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )
        self.muon.param_groups[0]["scale"] = params["muon_rate"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both optimisers."""
        return [*self.adam.param_groups, *self.muon.param_groups]

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    def step(self) -> None:
        """Make one step with both optimisers; weights without a gradient do not change."""
        self.adam.step()
        with torch.autocast("cpu", enabled=False):
            self.muon.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimisers; the numbers of Muon's weights follow those of AdamW's."""
        adam, muon = self.adam.state_dict()["state"], self.muon.state_dict()["state"]
        return {"state": adam | {self._offset() + place: state for place, state in muon.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        for optimiser, low, high in ((self.adam, 0, self._offset()), (self.muon, self._offset(), None)):
            own = optimiser.state_dict()
            own["state"] = {
                place - low: state
                for place, state in state_dict["state"].items()
                if place >= low and (high is None or place < high)
            }
            optimiser.load_state_dict(own)

    def _offset(self) -> int:
        return sum(len(group["params"]) for group in self.adam.param_groups)


def is_inner(name: str) -> bool:
    """Whether a weight is part of the tower's blocks, its merger or the decoder's layers."""
    return any(part in name for part in ("blocks.", "merger.", "layers."))


@dataclass
class Batch:
    """The images of a step.

    Attributes:
        rgb: ``(B, 3, H, W)``, 0 to 1.
        caption_ids: row of one caption of each image in ``Material.targets``.
        own: ``(B,)`` bool, whether the contrastive loss uses the image.
        labels: ``(B, classes)``.
        maps: ``(K, cells, channels)`` standardised features of the images in ``mapped``.
        mapped: ``(K,)`` rows of the batch with features.
    """

    rgb: Tensor
    caption_ids: np.ndarray
    own: np.ndarray
    labels: Tensor
    maps: Tensor
    mapped: Tensor


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    """Convert RGB images to RGBA; RGBA is returned unchanged."""
    if pixels.shape[-1] == 4:
        return pixels
    return np.concatenate([pixels, np.full((*pixels.shape[:3], 1), 255, np.uint8)], axis=-1)


def drawn_batch(material: Material, params: dict[str, Any], size: tuple[int, int], rng: np.random.Generator) -> Batch:
    """Draw and augment images of nano's corpus and of each source, all of one size."""
    corpus, (height, width) = material.corpus, size
    parts: list[tuple[Source, np.ndarray, np.ndarray, np.ndarray]] = []
    if params["num_images"]:
        places = drawn_places(corpus.kind_places, list(params["image_shares"].values()), 2 * params["num_images"], rng)
        if params["only_mapped"]:
            places = rng.choice(material.corpus_maps.mapped, 2 * params["num_images"])
        _, first = np.unique(corpus.concepts[places], return_index=True)
        places = places[np.sort(first)][: params["num_images"]]
        parts.append((material.corpus_maps, places, corpus.light[places], corpus.mirrored[places]))
    for name, count in params["sources"].items():
        source = material.sources[name]
        usable = source.mapped if params["only_mapped"] else source.train
        places = rng.choice(usable, min(count, len(usable)), replace=False)
        parts.append((source, places, np.zeros(len(places), bool), np.ones(len(places), bool)))
    rgb, caption_ids, own, labels, maps, mapped = [], [], [], [], [], []
    done = 0
    for source, places, light, mirrored in parts:
        chosen_moves = moves(mirrored, rng)
        rgb.append(moved(with_alpha(source.pixels[places]), light, chosen_moves, height, width, rng))
        caption_ids += [source.captions[place][rng.integers(len(source.captions[place]))] for place in places]
        own += [source.is_contrastive] * len(places)
        labels.append(source.labels[places] if len(source.labels) else np.zeros((len(places), len(material.classes)), np.uint8))
        values = source.maps[places].astype(np.float32) if source.maps is not None else np.zeros((len(places), 1, 1, 1))
        known = np.abs(values).sum((1, 2, 3)) > 0
        if known.any():
            standard = torch.from_numpy((values[known] - source.mean) / source.deviation).permute(0, 3, 1, 2)
            grid_shape = [len(standard), 1, height // 28, width // 28]
            cells = F.affine_grid(chosen_moves[torch.from_numpy(known)], grid_shape, align_corners=False)
            found = F.grid_sample(standard, cells, mode="bilinear", padding_mode="border", align_corners=False)
            maps.append(found.flatten(2).transpose(1, 2))
            mapped.append(done + np.flatnonzero(known))
        done += len(places)
    return Batch(
        torch.cat(rgb), np.array(caption_ids), np.array(own), torch.from_numpy(np.concatenate(labels)).float(),
        torch.cat(maps) if maps else torch.zeros(0, 1, 1),
        torch.from_numpy(np.concatenate([np.zeros(0, int), *mapped])),
    )  # fmt: skip


def attribute_loss(
    logits_BC: Tensor, labels_BC: Tensor, heads: Mapping[str, slice], weights: Mapping[str, float] | None = None
) -> Tensor:
    """The sum over attributes of the cross-entropy divided by that of a uniform guess.

    Args:
        logits_BC: logits of all classes.
        labels_BC: 0 or 1; several values of an attribute share the target, and images without one are excluded.
        heads: slice of the classes by attribute.
        weights: weights of attributes; missing ones are 1.
    """
    total = logits_BC.new_zeros(())
    for head, part in heads.items():
        wanted = labels_BC[:, part]
        count = wanted.sum(1)
        known = count > 0
        if wanted.shape[1] > 1 and known.any():
            goal = wanted[known] / count[known, None]
            entropy = -(goal * logits_BC[known][:, part].log_softmax(-1)).sum(-1).mean()
            total = total + (weights or {}).get(head, 1.0) * entropy / math.log(wanted.shape[1])
    return total


def dense_loss(found: Tensor, wanted: Tensor, parts: tuple[int, ...]) -> Tensor:
    """The mean of one minus the cosine, computed separately for each group of channels of the given widths."""
    pairs = zip(found.split(parts, -1), wanted.split(parts, -1), strict=True)
    return torch.stack([1 - F.cosine_similarity(first, second, dim=-1).mean() for first, second in pairs]).mean()


def staged(params: dict[str, Any], step: int) -> dict[str, Any]:
    """The settings with the changes of the stage that contains a step; unchanged if there is none."""
    for stage in params["stages"]:
        if step < stage["until"]:
            return laid_over(params, stage)
    return params


def drawn_captions(material: Material, params: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Draw other captions for the contrastive loss, of nano's corpus and of contrastive sources: rows of the targets."""
    sides = (
        (material.corpus.caption_ids, params["num_other_captions"]),
        (material.other_ids, params["num_other_seen_captions"]),
    )
    return np.concatenate([rng.choice(ids, min(count, len(ids)), replace=False) for ids, count in sides])


def caption_loss(
    heads: Heads, material: Material, batch: Batch, images_BD: Tensor, other_ids: np.ndarray, params: dict[str, Any]
) -> Tensor:
    """nano's contrastive loss of the images whose caption describes them only.

    Args:
        heads: the temperature.
        material: the targets of all captions.
        batch: the images of the step.
        images_BD: vectors of all images of the batch, in the columns of the targets.
        other_ids: result of :func:`drawn_captions`.
        params: the settings of the step.
    """
    ids = batch.caption_ids[batch.own]
    targets, others = (torch.from_numpy(material.targets[chosen]) for chosen in (ids, other_ids))
    same = torch.from_numpy(ids[:, None] == other_ids[None])
    scale = heads.log_inverse_temperature.exp().clamp(max=50.0)
    return contrastive(images_BD[torch.from_numpy(batch.own)], targets, others, same, scale, params["softness"])


def losses(encoder: Encoder, heads: Heads, material: Material, params: dict[str, Any], seed: int, step: int) -> dict[str, Tensor]:
    """The losses of one step by name, not yet weighted."""
    corpus = material.corpus
    rng = generator(seed, "nano 2 step", step)
    sizes = params["image_sizes_pixels"]
    size = sizes[rng.integers(len(sizes))]
    params = staged(params, step)
    if params["tower_alone"]:
        return tower_losses(encoder, heads, material, params, size, rng)
    batch = drawn_batch(material, params, size, rng)
    text_ids = drawn_places(corpus.text_places, list(params["text_shares"].values()), params["num_texts"], rng)
    num_seen_texts = min(params["num_seen_texts"], len(material.other_ids))
    text_ids = np.concatenate([text_ids, rng.choice(material.other_ids, num_seen_texts, replace=False)])
    other_ids = drawn_captions(material, params, rng)
    prompt = int(rng.integers(len(params["image_prompts"])))
    with torch.autocast("cpu", torch.bfloat16, enabled=params["half_precision"]):
        texts = text_vectors(encoder, [material.rows[place] for place in text_ids], params["text_batch_size"])
        tokens, grid = encoder.image_tokens(batch.rgb)
        images = F.normalize(encoder.image_vectors(tokens, grid, prompt), dim=-1)
        dense, token_logits = token_outputs(heads, tokens, batch.mapped)
    known_width = material.targets.shape[1]
    targets, caption_targets = (torch.from_numpy(material.targets[ids]) for ids in (text_ids, batch.caption_ids))
    text_part, image_part = texts[:, :known_width], images[:, :known_width]
    text_rows, text_squares = relational(texts, targets, params["relational_temperature"])
    vector_logits = heads.vector(images * images.shape[1] ** 0.5)
    found = {
        "contrastive": caption_loss(heads, material, batch, image_part, other_ids, params),
        "text_cosine": 1 - (text_part * targets).sum(-1).mean(),
        "text_rows": text_rows,
        "text_squares": text_squares,
        "image_cosine": 1 - (image_part * caption_targets).sum(-1).mean(),
        "vector_heads": attribute_loss(vector_logits, batch.labels, material.heads, params["head_weights"]),
        "token_heads": attribute_loss(token_logits, batch.labels, material.heads, params["head_weights"]),
    }
    if len(batch.mapped):
        features = batch.maps.mean(1)
        found["dense"] = dense_loss(dense, batch.maps, tuple(params["channels"]))
        found["pooled"] = dense_loss(heads.pooled(images[batch.mapped]), features, tuple(params["channels"]))
        found["image_rows"], _ = relational(
            images[batch.mapped], F.normalize(features, dim=-1), params["image_relational_temperature"]
        )
    return found


def token_outputs(heads: Heads, tokens_BMD: Tensor, mapped: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the heads on image tokens: features of the mapped images by place, and logits from the mean token."""
    level = F.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:])
    return heads.dense(level[mapped]).float(), heads.tokens(mean_token(tokens_BMD)).float()


def mean_token(tokens_BMD: Tensor) -> Tensor:
    """``(B, D)`` standardised mean of the standardised image tokens."""
    level = F.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:])
    return F.layer_norm(level.mean(1), level.shape[-1:])


def tower_losses(
    encoder: Encoder, heads: Heads, material: Material, params: dict[str, Any], size: tuple[int, int], rng: np.random.Generator
) -> dict[str, Tensor]:
    """The losses on image tokens, for the first steps, in which the tower is trained without the decoder."""
    batch = drawn_batch(material, params, size, rng)
    other_ids = drawn_captions(material, params, rng)
    with torch.autocast("cpu", torch.bfloat16, enabled=params["half_precision"]):
        tokens, _ = encoder.image_tokens(batch.rgb)
        dense, logits = token_outputs(heads, tokens, batch.mapped)
    seen = F.normalize(heads.caption(mean_token(tokens))[:, : material.targets.shape[1]], dim=-1)
    found = {
        "token_heads": attribute_loss(logits, batch.labels, material.heads, params["head_weights"]),
        "token_contrastive": caption_loss(heads, material, batch, seen, other_ids, params),
    }
    if len(batch.mapped):
        found["dense"] = dense_loss(dense, batch.maps, tuple(params["channels"]))
    return found


@torch.inference_mode()
def validated_sources(encoder: Encoder, heads: Heads, material: Material, params: dict[str, Any]) -> dict[str, float]:
    """Accuracy of the attributes by the heads on validation images, and R@10 of images by captions of contrastive sources."""
    right: dict[str, list[bool]] = {}
    results = {}
    for name, source in material.sources.items():
        places = source.valid[: params["num_valid_images"]]
        if not len(places):
            continue
        light = np.zeros(len(places), bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=params["half_precision"]):
            vectors, seen = [], []
            for batch in np.array_split(np.arange(len(places)), len(places) // 64 + 1):
                tokens, grid = encoder.image_tokens(plain(with_alpha(source.pixels[places[batch]]), light[batch], 112))
                vectors.append(encoder.image_vectors(tokens, grid))
                seen.append(token_outputs(heads, tokens, torch.zeros(0, dtype=torch.long))[1])
            images = F.normalize(torch.cat(vectors), dim=-1)
            words = text_vectors(encoder, [material.rows[source.captions[place][0]] for place in places], 64)
        labels = torch.from_numpy(source.labels[places])
        for reader, logits in (("", heads.vector(images * images.shape[1] ** 0.5)), ("tokens_", torch.cat(seen))):
            for head, part in material.heads.items():
                known = labels[:, part].sum(1) > 0
                guess = logits[:, part].argmax(1)
                hits = labels[:, part].gather(1, guess[:, None])[:, 0][known]
                right.setdefault(reader + head, []).extend((hits > 0).tolist())
        if source.is_contrastive:
            scores = words @ images.T
            results[f"{name}_recall_at_10"] = ((scores > scores.diag()[:, None]).sum(1) < 10).float().mean().item()
    return results | {f"right_{head}": sum(hits) / len(hits) for head, hits in right.items() if hits}


def nano2_settings(file: Path | None) -> dict[str, Any]:
    """The settings, in which section ``nano2`` replaces values of ``model`` and ``train``.

    Args:
        file: a YAML file whose values first replace those of section ``nano2``; None for none.
    """
    whole = settings()
    section = whole["nano2"]
    if file is not None:
        section = laid_over(section, YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8")))
    whole["nano2"] = section
    whole["model"] = laid_over(whole["model"], section["model"])
    whole["train"] = laid_over(whole["train"], section["train"])
    return whole


def laid_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Replace values of ``lower`` by those of ``upper``, also in nested dictionaries; ``sources`` is replaced as a whole."""
    result = dict(lower)
    for key, value in upper.items():
        is_deep = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "sources"
        result[key] = laid_over(result[key], value) if is_deep else value
    return result


def first_model(
    work: Path, params: dict[str, Any], folder: Path | None, *, turned: bool = True
) -> tuple[Any, Encoder, np.ndarray]:
    """The model before the first step, its encoder, and the axes of the text targets.

    ``model.vision_block_origins`` has, for each block of the tower, the block of ``folder`` from which it starts.  A block
    without an origin has an output projection of zero, so at first it does not change its input.

    Args:
        work: the working folder.
        params: all settings.
        folder: checkpoint with the initial weights; None initialises like nano.
        turned: whether to rotate the axes by :func:`turned_axes`, which only training needs.
    """
    model, _, encoder, axes = start(work, params)
    if folder is None:
        return model, encoder, axes
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    origins = params["model"]["vision_block_origins"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            source = name
            if params["nano2"]["new_tower"] and ".visual." in f".{name}":
                continue
            if ".visual.blocks." in f".{name}":
                before, after = name.split("blocks.")
                place, _, rest = after.partition(".")
                origin = origins[int(place)]
                if origin is None:
                    if rest.startswith(("attn.proj", "mlp.down_proj")):
                        weight.zero_()
                    continue
                source = f"{before}blocks.{origin}.{rest}"
            weight.copy_(stored[source])
    if params["nano2"]["new_tower"]:
        whiten(model.model.visual, work, params["train"])
        focus_on_neighbours(model.model.visual, params["nano2"]["head_offsets"], params["nano2"]["head_sharpness"])
    if not turned:
        return model, encoder, axes
    return model, encoder, turned_axes(work, encoder, axes, params["nano2"]["num_axis_texts"])


@torch.no_grad()
def whiten(visual: nn.Module, work: Path, params: dict[str, Any]) -> None:
    """Initialise the first layer of the tower by whitened principal axes of patches.

    Edges and textures have a hundredth of the variance of plain colour.  Without whitening, the first steps learn only from
    colour.
    """
    kernel: Any = visual.get_parameter("patch_embed.proj.weight")
    seen = []
    for name in params["sources"]:
        pixels = np.load(work / "seen" / f"{name}.npy", mmap_mode="r")
        train = (pl.read_parquet(work / "seen" / f"{name}.parquet")["split"] == "train").arg_true().to_numpy()
        places = np.sort(generator("whiten", name).permutation(train)[:400])
        rgb = plain(with_alpha(pixels[places]), np.zeros(len(places), bool), 112)
        seen.append(patches(rgb).view(-1, 3, 2, PATCH * PATCH)[:, :, 0].flatten(1))
    flat = torch.cat(seen)
    powers, axes = torch.linalg.eigh((flat.T @ flat / len(flat)).double())
    powers, axes = powers.flip(0)[: len(kernel)], axes.flip(1)[:, : len(kernel)]
    rows = (axes / (powers + 0.05).sqrt()).T.float().view(len(kernel), 3, 1, PATCH * PATCH) / 2
    kernel.copy_(rows.expand(-1, -1, 2, -1).reshape(kernel.shape))


@torch.no_grad()
def focus_on_neighbours(visual: nn.Module, offsets: Sequence[Sequence[Sequence[int] | None]], sharpness: float) -> None:
    """Initialise attention heads so that each attends to one neighbour of its patch, as a convolution does.

    A tower that starts at random has to learn which patches are neighbours (d'Ascoli et al. 2021, "ConViT: improving vision
    transformers with soft convolutional inductive biases").  Rotary embeddings turn a constant query and key by angles
    proportional to their positions; so constants in the biases alone give the scores

        sharpness * sum over axes and the two highest frequencies f of cos(f * (position of key - position of query - offset)),

    which are largest at the offset.  The weights of query and key, which depend on the content, become smaller by a factor of 4
    in these heads.

    Args:
        visual: the tower.
        offsets: for each block and head the offset of the key in patches, ``[rows, columns]``; None leaves a head random.
        sharpness: scale of the scores.
    """
    tower: Any = visual
    for block, own in zip(tower.blocks, offsets, strict=True):
        linear, num_heads = block.attn.qkv, block.attn.num_heads
        width = linear.in_features // num_heads
        weight_3HDI, bias_3HD = linear.weight.view(3, num_heads, width, -1), linear.bias.view(3, num_heads, width)
        frequencies = tower.rotary_pos_emb.inv_freq
        length = math.sqrt(sharpness * math.sqrt(width))
        for head, offset in enumerate(own):
            if offset is None:
                continue
            weight_3HDI[:2, head] /= 4
            for axis, distance in enumerate(offset):
                for place in range(2):
                    # pairs of dimensions that rotate together: half the width apart, first those of rows, then of columns
                    first = axis * len(frequencies) + place
                    angle = frequencies[place] * distance
                    bias_3HD[0, head, first] = length
                    bias_3HD[1, head, first] = length * torch.cos(angle)
                    bias_3HD[1, head, first + width // 2] = -length * torch.sin(angle)


@torch.inference_mode()
def turned_axes(work: Path, encoder: Encoder, axes: np.ndarray, count: int) -> np.ndarray:
    """Rotate the axes so that the targets agree with the texts' vectors of the model.

    This is needed because the sign of principal axes is arbitrary, and so is the order of equal ones.  The rotation is the
    orthogonal matrix that maps the targets of ``count`` texts closest to the model's vectors (orthogonal Procrustes).
    """
    texts = pl.read_parquet(work / "texts.parquet").with_row_index("place").filter(pl.col("split") == "train")
    order = generator("axes", len(texts)).permutation(len(texts))[:count].tolist()
    places, words = texts["place"].gather(order).to_numpy(), texts["text"].gather(order).to_list()
    targets = np.load(work / "text_targets.npy", mmap_mode="r")[places].astype(np.float32) @ axes
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    own = text_vectors(encoder, encoder.words(words, 64), 64)[:, : targets.shape[1]].numpy()
    left, _, right = np.linalg.svd(targets.T @ own)
    return (axes @ (left @ right)).astype(np.float32)


def nano2_rate(step: int, params: dict[str, Any]) -> float:
    """The learning rate as in ``train.py``, with a second warm-up at the first step that trains the decoder."""
    joint = step - max((stage["until"] for stage in params["stages"] if stage["tower_alone"]), default=-(10**9))
    return min(rate(step, params), (joint + 1) / params["num_warmup_steps"] if joint >= 0 else 1.0)


def train(work: Path, params: dict[str, Any], stop_after: int | None = None) -> None:
    """Run or resume the training; ``stop_after`` ends the run at this step, like an interruption."""
    section, seed = params["train"], params["seed"]
    torch.set_num_threads(section["num_threads"])
    target = work / params["nano2"]["name"]
    target.mkdir(exist_ok=True)
    folder = params["nano2"]["start_from"]
    model, encoder, axes = first_model(work, params, folder and Path(folder))
    if section["compile"]:
        encoder.compile()
    material = Material.read(work, encoder, section, axes)
    heads = Heads(params["model"]["hidden_size"], len(material.classes), sum(section["channels"]))
    optimiser = Optimisers(model, heads, section)

    def at_step(step: int) -> dict[str, Any]:
        stage = staged(section, step)
        optimiser.muon.param_groups[0]["scale"] = stage["muon_rate"]
        return stage

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = losses(encoder, heads, material, section, seed, step)
        return weighted(parts, staged(section, step)["loss_weights"]), parts

    def measured() -> dict[str, float]:
        with encoder.uncompiled():
            return validated(encoder, material.corpus, section) | validated_sources(encoder, heads, material, section)

    learn(
        target / "training.safetensors", target / "curve.tsv", model, heads, optimiser, section, stop_after,
        loss_of, measured, share_of=nano2_rate, at_step=at_step,
    )  # fmt: skip


def main(
    params: Annotated[Path | None, typer.Option("--params", help="Settings that replace those of section nano2.")] = None,
    work: Work = WORK,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps; the schedule does not change.")] = None,
) -> None:
    """Train with the settings; a stopped run resumes from its last saved state."""
    train(work, nano2_settings(params), steps)
