"""Train nano on images with captions, and on texts with the teacher's vectors.

All losses use the vectors that the backbone returns (mean of the last hidden states), scaled to unit length.  The target of a
text is MiniLM's vector, projected on the principal axes of the teacher's vectors to the width of the model.  The axes are
orthonormal, so cosines hardly change.  Images have the target of their caption, so the decoder does not have to run over
captions.  The losses:

* ``text_cosine``: one minus the cosine of a text's vector and its target.
* ``text_rows``, ``text_squares``: similarities within a batch of texts and those of the teacher, as the Kullback-Leibler
  divergence of rows and as the mean squared difference of cosines.
* ``image_cosine``: one minus the cosine of an image's vector and the target of its caption.
* ``contrastive``: cross-entropy of an image over the target of its caption and thousands of other targets, and of a caption's
  target over the images of the batch (Radford et al. 2021); targets are softened by the similarity of captions.
* ``image_head``, ``image_rows``: an image's vector and EfficientNet's features, by a linear head that is used only in training,
  and by similarities within a batch.

The learning rate is constant after a warm-up and decreases to zero over the last ``decay_share`` of the steps.  Each step draws
its data from a generator whose seed depends on the step's number, so a resumed run equals an uninterrupted one.

    python -m pretraining train [--work FOLDER] [--steps N]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pretraining.common import WORK, Curve, Work, generator, settings
from pretraining.model import Encoder, configuration, first_weights, principal_axes


@dataclass
class Corpus:
    """The data of training, in memory or memory-mapped.

    Attributes:
        pixels: ``(images, side, side, 4)`` uint8 RGBA.
        light: ``(images,)`` bool, whether an image is so light that it needs a grey background.
        kind_places: rows of the training images of each kind in ``image_shares``.
        concepts: ``(images,)`` numbers of the concepts.
        mirrored: ``(images,)`` bool, whether an image may be mirrored.
        captions: rows of each image's captions in ``rows``.
        rows: token ids of each text.
        text_targets: ``(texts, known columns)`` unit vectors.
        caption_ids: rows of the captions of the training split.
        work: the working folder.
        text_places: rows of the training texts of each kind in ``text_shares``.
        valid_pairs: an image and its caption for each concept of the validation split.
        valid_texts: rows of validation texts.
    """

    pixels: np.ndarray
    light: np.ndarray
    kind_places: list[np.ndarray]
    concepts: np.ndarray
    mirrored: np.ndarray
    captions: list[list[int]]
    rows: list[list[int]]
    text_targets: np.ndarray
    caption_ids: np.ndarray
    work: Path
    text_places: list[np.ndarray]
    valid_pairs: list[tuple[int, int]]
    valid_texts: np.ndarray

    @classmethod
    def read(cls, work: Path, encoder: Encoder, params: dict[str, Any], axes: np.ndarray) -> Corpus:
        """Read the corpus of a working folder, with text targets projected on ``axes`` ``(384, known columns)``."""
        images, texts = pl.read_parquet(work / "images.parquet"), pl.read_parquet(work / "texts.parquet")
        captions: list[list[int]] = [[] for _ in range(len(images))]
        for image, text in pl.read_parquet(work / "captions.parquet").iter_rows():
            captions[image].append(text)
        usable = ~images["foreign"] & (images["split"] == "train")
        kinds = images["kind"]
        valid = images.with_row_index("place").filter(
            (pl.col("split") == "valid") & ~pl.col("foreign") & (pl.col("kind") != "glyph")
        )
        one_each = valid.unique("concept", keep="first", maintain_order=True)
        text_train = texts["split"] == "train"
        targets = np.load(work / "text_targets.npy").astype(np.float32) @ axes
        targets /= np.linalg.norm(targets, axis=1, keepdims=True)
        valid_texts = ((texts["split"] == "valid") & texts["kind"].is_in(["title", "entry", "gloss"])).arg_true().to_numpy()
        return cls(
            pixels=np.load(work / "images.npy", mmap_mode="r"),
            light=images["light"].to_numpy(),
            kind_places=[(usable & (kinds == kind)).arg_true().to_numpy() for kind in params["image_shares"]],
            concepts=images["concept"].to_physical().rank("dense").to_numpy(),
            mirrored=(~images["title"].str.contains(r"left|right|arrow|flag|letter|clock")).to_numpy(),
            captions=captions,
            rows=encoder.words(texts["text"].to_list(), params["max_text_tokens"]),
            text_targets=targets,
            caption_ids=(text_train & (texts["kind"] == "caption")).arg_true().to_numpy(),
            work=work,
            text_places=[(text_train & (texts["kind"] == kind)).arg_true().to_numpy() for kind in params["text_shares"]],
            valid_pairs=[(place, captions[place][-1]) for place in one_each["place"].to_list()],
            valid_texts=valid_texts[:1000],
        )

    @cached_property
    def image_targets(self) -> np.ndarray:
        """EfficientNet's features, read at first use, because they can be computed while the first steps run."""
        return np.load(self.work / "image_targets.npy", mmap_mode="r")


class Heads(nn.Module):
    """Weights that only training uses: a linear map to EfficientNet's features, and the log inverse temperature."""

    def __init__(self, width: int, image_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, image_width)
        self.log_inverse_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def drawn_places(places: list[np.ndarray], shares: list[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` rows with replacement: first the kind by its share, then a row of this kind."""
    kinds = rng.choice(len(places), count, p=np.array(shares) / sum(shares))
    return np.array([places[kind][rng.integers(len(places[kind]))] for kind in kinds])


def augmented(
    rgba: np.ndarray, light: np.ndarray, mirrored: np.ndarray, height: int, width: int, rng: np.random.Generator
) -> Tensor:
    """Augment images by :func:`moves` and :func:`moved`: ``(B, 3, height, width)`` RGB from 0 to 1."""
    return moved(rgba, light, moves(mirrored, rng), height, width, rng)


def moves(mirrored: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw ``(B, 2, 3)`` affine maps for ``torch.affine_grid``, which rotate, shift, scale and mirror the images."""
    batch = len(mirrored)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, batch).astype(np.float32))

    angle, size, stretch = uniform(-0.15, 0.15), uniform(0.8, 1.25), uniform(0.92, 1.08)
    sign = torch.from_numpy(np.where((rng.random(batch) < 0.5) & mirrored, -1.0, 1.0).astype(np.float32))
    rows = [
        torch.stack([sign * angle.cos() * size * stretch, -angle.sin() * size * sign, uniform(-0.08, 0.08)], dim=1),
        torch.stack([angle.sin() * size, angle.cos() * size / stretch, uniform(-0.08, 0.08)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def moved(rgba: np.ndarray, light: np.ndarray, moves_B23: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Apply affine maps to images, and draw backgrounds, contrasts and brightness.

    Args:
        rgba: ``(B, side, side, 4)`` uint8.
        light: ``(B,)`` bool, whether an image needs a dark background.
        moves_B23: the result of :func:`moves`.
        height: height of the result in pixels.
        width: width of the result in pixels.
        rng: generator of backgrounds, contrasts and brightness.

    Returns:
        ``(B, 3, height, width)`` RGB from 0 to 1.
    """
    batch = len(rgba)
    pixels = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1)
    places = F.affine_grid(moves_B23, [batch, 4, height, width], align_corners=False)
    pixels = F.grid_sample(pixels, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    choice = rng.random((batch, 1))
    ground = np.where(choice < 0.6, 1.0, np.where(choice < 0.85, rng.uniform(0.75, 1.0, (batch, 3)), rng.random((batch, 3))))
    dark = np.where(choice < 0.6, 0.5, rng.uniform(0.0, 0.6, (batch, 3)))
    ground = np.where(light[:, None], dark, ground).astype(np.float32)
    rgb = pixels[:, :3] + torch.from_numpy(ground)[:, :, None, None] * (1 - pixels[:, 3:])
    contrast = torch.from_numpy(rng.uniform(0.85, 1.15, (batch, 1, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.06, 0.06, (batch, 1, 1, 1)).astype(np.float32))
    return ((rgb - 0.5) * contrast + 0.5 + shift).clamp(0, 1)


def plain(rgba: np.ndarray, light: np.ndarray, side: int) -> Tensor:
    """``(B, 3, side, side)`` RGB from 0 to 1 without augmentation, on white; light images on grey."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(0, 3, 1, 2).float() / 255
    ground = torch.from_numpy(np.where(light, 0.5, 1.0).astype(np.float32)).view(-1, 1, 1, 1)
    rgb = pixels[:, :3] * pixels[:, 3:] + ground * (1 - pixels[:, 3:])
    return F.interpolate(rgb, size=(side, side), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def relational(student_BD: Tensor, teacher_BD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compare the similarities of unit vectors with those of the teacher, without the diagonal.

    Args:
        student_BD: unit vectors.
        teacher_BD: unit vectors of the teacher; may have another width.
        temperature: temperature of the softmax.

    Returns:
        The mean Kullback-Leibler divergence of the softmax over rows, and the mean squared difference of cosines.
    """
    student, teacher = student_BD @ student_BD.T, teacher_BD @ teacher_BD.T
    itself = torch.eye(len(student), dtype=torch.bool)
    target = (teacher / temperature).masked_fill(itself, -torch.inf).softmax(-1)
    log_rows = (student / temperature).masked_fill(itself, -1e4).log_softmax(-1)
    divergence = (torch.special.xlogy(target, target) - target * log_rows).sum(-1).mean()
    return divergence, (student - teacher).pow(2)[~itself].mean()


def contrastive(
    images_BD: Tensor, captions_BD: Tensor, others_ND: Tensor, same_BN: Tensor, scale: Tensor, softness: float
) -> Tensor:
    """Mean of the cross-entropies of images over captions and of captions over images.

    Args:
        images_BD: unit vectors of images.
        captions_BD: targets of their captions.
        others_ND: targets of other captions, used only for images over captions.
        same_BN: whether one of the others is equal to the image's caption; it is excluded.
        scale: inverse temperature.
        softness: share of the target distribution that is spread over all captions by a softmax of their cosines.
    """
    bank = torch.cat([captions_BD, others_ND])
    left_out = torch.cat([torch.zeros(len(captions_BD), len(captions_BD), dtype=torch.bool), same_BN], dim=1)
    alike = (captions_BD @ bank.T / 0.05).masked_fill(left_out, -torch.inf).softmax(-1)
    own = torch.eye(len(captions_BD), len(bank))
    rows = (scale * images_BD @ bank.T).masked_fill(left_out, -1e4).log_softmax(-1)
    forth = -(((1 - softness) * own + softness * alike) * rows).sum(-1).mean()
    among = (captions_BD @ captions_BD.T / 0.05).softmax(-1)
    columns = (scale * captions_BD @ images_BD.T).log_softmax(-1)
    back = -(((1 - softness) * torch.eye(len(captions_BD)) + softness * among) * columns).sum(-1).mean()
    return (forth + back) / 2


def text_vectors(encoder: Encoder, rows: list[list[int]], batch_size: int) -> Tensor:
    """``(N, D)`` unit vectors of texts in the given order, computed in batches of similar lengths."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    parts = [
        encoder.texts([rows[place] for place in order[start : start + batch_size]]) for start in range(0, len(rows), batch_size)
    ]
    return F.normalize(torch.cat(parts)[torch.from_numpy(np.argsort(order))], dim=-1)


def losses(encoder: Encoder, heads: Heads, corpus: Corpus, params: dict[str, Any], seed: int, step: int) -> dict[str, Tensor]:
    """The losses of one step by name, as in the module's list; not yet weighted."""
    rng = generator(seed, "step", step)
    places = drawn_places(corpus.kind_places, list(params["image_shares"].values()), 2 * params["num_images"], rng)
    _, first = np.unique(corpus.concepts[places], return_index=True)
    places = places[np.sort(first)][: params["num_images"]]
    caption_ids = np.array([corpus.captions[place][rng.integers(len(corpus.captions[place]))] for place in places])
    text_ids = drawn_places(corpus.text_places, list(params["text_shares"].values()), params["num_texts"], rng)
    sizes = params[
        "last_image_sizes_pixels" if rate(step, params) < 1 and step > params["num_warmup_steps"] else "first_image_sizes_pixels"
    ]
    height, width = sizes[rng.integers(len(sizes))]
    rgb = augmented(corpus.pixels[places], corpus.light[places], corpus.mirrored[places], height, width, rng)
    prompt = int(rng.integers(len(params["image_prompts"])))
    other_ids = rng.choice(corpus.caption_ids, min(params["num_other_captions"], len(corpus.caption_ids)), replace=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=params["half_precision"]):
        texts = text_vectors(encoder, [corpus.rows[place] for place in text_ids], params["text_batch_size"])
        images = F.normalize(encoder.images(rgb, prompt), dim=-1)
    known_width = corpus.text_targets.shape[1]
    targets, caption_targets, others = (torch.from_numpy(corpus.text_targets[ids]) for ids in (text_ids, caption_ids, other_ids))
    # the free columns are part of a vector's length, and zero in all targets
    text_part, image_part = texts[:, :known_width], images[:, :known_width]
    same = torch.from_numpy(caption_ids[:, None] == other_ids[None])
    scale = heads.log_inverse_temperature.exp().clamp(max=50.0)
    text_rows, text_squares = relational(texts, targets, params["relational_temperature"])
    image_head = image_rows = torch.zeros(())
    if step >= params["image_teacher_first_step"]:
        features = torch.from_numpy(corpus.image_targets[places].astype(np.float32))
        known = features.abs().sum(1) > 0
        image_head = 1 - F.cosine_similarity(heads.image(images[known]), features[known]).mean()
        image_rows, _ = relational(images[known], features[known], params["image_relational_temperature"])
    return {
        "contrastive": contrastive(image_part, caption_targets, others, same, scale, params["softness"]),
        "text_cosine": 1 - (text_part * targets).sum(-1).mean(),
        "text_rows": text_rows,
        "text_squares": text_squares,
        "image_cosine": 1 - (image_part * caption_targets).sum(-1).mean(),
        "image_head": image_head,
        "image_rows": image_rows,
    }


def rate(step: int, params: dict[str, Any]) -> float:
    """The learning rate of a step, counted from 0, as a share of the highest."""
    decay_steps = round(params["num_steps"] * params["decay_share"])
    return min(1.0, (step + 1) / params["num_warmup_steps"], (params["num_steps"] - step) / max(decay_steps, 1))


class Optimiser(Protocol):
    """The methods of an optimiser that :func:`learn` calls; the ``scale`` of a group multiplies the learning rate."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters."""
        ...

    def zero_grad(self) -> None:
        """Remove all gradients."""
        ...

    def step(self) -> object:
        """Update the parameters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state by position of the parameter."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the value of :meth:`state_dict`."""
        ...


def optimiser_for(model: nn.Module, heads: nn.Module, params: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with weight decay only for matrices, and with a separate learning rate for the token table."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": params["weight_decay"], "scale": 1.0},
        {"params": [], "weight_decay": 0.0, "scale": 1.0},
        {"params": [], "weight_decay": 0.0, "scale": params["token_table_rate"]},
    ]
    for name, weight in [*model.named_parameters(), *heads.named_parameters()]:
        groups[2 if "embed_tokens" in name else 0 if weight.ndim > 1 else 1]["params"].append(weight)
    return torch.optim.AdamW(groups, lr=params["learning_rate"], betas=(0.9, 0.98), eps=1e-6)


def save(file: Path, step: int, model: nn.Module, heads: nn.Module, optimiser: Optimiser) -> None:
    """Write the state that a resumed run needs, completely or not at all."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    tensors |= {f"heads.{name}": weight.detach() for name, weight in heads.named_parameters()}
    for place, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{place}.{name}": value for name, value in state.items()}
    temporary = file.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(file)


def resume(file: Path, model: nn.Module, heads: nn.Module, optimiser: Optimiser | None) -> int:
    """Restore the state that :func:`save` wrote.

    Args:
        file: the stored state.
        model: its weights are replaced.
        heads: their weights are replaced.
        optimiser: its state is replaced, unless it is None.

    Returns:
        The number of completed steps.
    """
    with safe_open(file, "pt") as stored:
        step = int(stored.metadata()["step"])
        with torch.no_grad():
            for prefix, module in (("model", model), ("heads", heads)):
                for name, weight in module.named_parameters():
                    weight.copy_(stored.get_tensor(f"{prefix}.{name}"))
        if optimiser is not None:
            description = optimiser.state_dict()
            state: dict[int, dict[str, Tensor]] = {}
            for key in stored.keys():  # noqa: SIM118 - not a dictionary
                if key.startswith("adam."):
                    _, place, name = key.split(".")
                    state.setdefault(int(place), {})[name] = stored.get_tensor(key)
            description["state"] = state
            optimiser.load_state_dict(description)
    return step


@torch.inference_mode()
def validated(encoder: Encoder, corpus: Corpus, params: dict[str, Any]) -> dict[str, float]:
    """Measures on the validation split.

    Returns:
        ``valid_recall_at_10``, the R@10 of images by their captions over concepts, and ``valid_spearman``, the rank correlation
        of the cosines of texts with those of the targets.
    """
    places, ids = np.array(corpus.valid_pairs).T
    with torch.autocast("cpu", torch.bfloat16, enabled=params["half_precision"]):
        images = torch.cat(
            [
                encoder.images(plain(corpus.pixels[batch], corpus.light[batch], 112))
                for batch in np.array_split(places, len(places) // 64 + 1)
            ]
        )
        words = text_vectors(encoder, [corpus.rows[place] for place in ids], 64)
        texts = text_vectors(encoder, [corpus.rows[place] for place in corpus.valid_texts], 64)
    scores = words @ F.normalize(images, dim=-1).T
    positions = (scores > scores.diag()[:, None]).sum(1)
    targets = corpus.text_targets[corpus.valid_texts]
    upper = np.triu_indices(len(targets), 1)
    return {
        "valid_recall_at_10": (positions < 10).float().mean().item(),
        "valid_spearman": spearman((texts @ texts.T).numpy()[upper], (targets @ targets.T)[upper]),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two arrays; ties are ordered arbitrarily, because they are rare among cosines."""
    left, right = (np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second))
    return float(np.corrcoef(left, right)[0, 1])


def start(work: Path, params: dict[str, Any]) -> tuple[Any, Heads, Encoder, np.ndarray]:
    """Model, heads and encoder before the first step, and ``(384, known columns)`` axes of the text targets."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    config = configuration(params["model"], tokenizer)
    num_free = params["model"]["num_free_columns"]
    sample = np.load(work / "text_targets.npy", mmap_mode="r")[::8].astype(np.float32)
    axes = principal_axes(sample, params["model"]["hidden_size"] - num_free).astype(np.float32)
    vectors = np.load(work / "token_vectors.npy") @ axes
    model = first_weights(config, vectors, np.load(work / "token_shares.npy"), num_free, params["seed"])
    heads = Heads(params["model"]["hidden_size"], 1280)
    return model, heads, Encoder(model, tokenizer, params["train"]["image_prompts"]), axes


def learn(
    file: Path,
    curve: Path,
    model: nn.Module,
    heads: nn.Module,
    optimiser: Optimiser,
    section: dict[str, Any],
    stop_after: int | None,
    loss_of: Callable[[int], tuple[Tensor, Mapping[str, float | Tensor]]],
    measured: Callable[[], dict[str, float]],
    *,
    share_of: Callable[[int, dict[str, Any]], float] = rate,
    at_step: Callable[[int], Mapping[str, Any]] | None = None,
) -> None:
    """Train from the last saved state, or from the start if there is none.

    Args:
        file: the state that :func:`save` writes.
        curve: the file of the curve; a resumed run appends to it.
        model: the model that is trained.
        heads: modules that only the training needs.
        optimiser: the optimiser of both.
        section: the settings: number of steps, learning rate, and the intervals of logging, validation and saving.
        stop_after: the run ends after this step, like an interruption; None for all steps.
        loss_of: the loss of a step, counted from 0, and its parts for the curve.
        measured: the measures on the validation split.
        share_of: the learning rate of a step as a share of the highest.
        at_step: called before each step; returns the settings of this step, and may change the ``scale`` of a group.
    """
    done = resume(file, model, heads, optimiser) if file.is_file() else 0
    rows = Curve(curve)
    for step in range(done, min(section["num_steps"], stop_after or section["num_steps"])):
        stage = section if at_step is None else at_step(step)
        for group in optimiser.param_groups:
            group["lr"] = stage["learning_rate"] * group["scale"] * share_of(step, section)
        total, parts = loss_of(step)
        optimiser.zero_grad()
        total.backward()
        length = nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], section["max_gradient_norm"])
        optimiser.step()
        found = {"loss": total, **parts, "gradient": length}
        rows.add({name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()})
        last = step + 1 == section["num_steps"]
        if (step + 1) % section["log_every"] == 0 or last:
            is_validated = (step + 1) % section["validate_every"] == 0 or last
            rows.write(step + 1, share_of(step, section), measured() if is_validated else {})
        if (step + 1) % section["save_every"] == 0 or last or step + 1 == stop_after:
            save(file, step + 1, model, heads, optimiser)


def weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of losses."""
    return torch.stack([weights[name] * value for name, value in parts.items()]).sum()


def train(work: Path, params: dict[str, Any], stop_after: int | None = None) -> None:
    """Run or resume the training in ``work``; ``stop_after`` ends the run at this step, like an interruption."""
    section, seed = params["train"], params["seed"]
    torch.set_num_threads(section["num_threads"])
    model, heads, encoder, axes = start(work, params)
    corpus = Corpus.read(work, encoder, section, axes)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = losses(encoder, heads, corpus, section, seed, step)
        return weighted(parts, section["loss_weights"]), parts

    optimiser = optimiser_for(model, heads, section)
    learn(
        work / "training.safetensors", work / "curve.tsv", model, heads, optimiser, section, stop_after,
        loss_of, lambda: validated(encoder, corpus, section),
    )  # fmt: skip


def main(
    work: Work = WORK,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps; the schedule does not change.")] = None,
) -> None:
    """Train with the settings; a stopped run resumes from its last saved state."""
    train(work, settings(), steps)
