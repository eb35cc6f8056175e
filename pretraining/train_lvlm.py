"""Pre-train nano_lvlm: projector and decoder by next-token loss, with a frozen vision tower, nano 2's.

A step uses scenes with captions, lists of attributes, questions and answers.  It also uses plain texts: glosses of WordNet,
shop titles and entries, and descriptions with a question.  The loss is the mean cross-entropy of all answers and plain texts.
There is neither a contrastive loss nor a teacher.

Each step draws its data from a generator whose seed depends on the step's number, so a resumed run equals an uninterrupted one.

    python -m pretraining train_lvlm [--work FOLDER] [--steps N]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from pretraining.common import WORK, Work, generator, number, settings, tower_folder
from pretraining.conversations import CAPTION_PROMPTS, QUESTIONS, Turn, answers, caption, reading, turns
from pretraining.generative import Reader, Rows, first_model, packed, row_states, standardise_projector, token_losses, until_full
from pretraining.model import PATCH, ImageGrid, configuration, vision_merged
from pretraining.scene_features import seen_at
from pretraining.scenes import Scene, scene_of
from pretraining.texts import shop_text, synsets
from pretraining.train import learn, optimiser_for


@dataclass
class Material:
    """The data of training.

    Attributes:
        scenes: all scenes.
        places: rows of the scenes by split.
        seen_at: rows of the scenes that have features, by side in pixels.
        features: features of these scenes, by side.
        glosses: WordNet's words and glosses, without held-out ones.
    """

    scenes: list[Scene]
    places: dict[str, np.ndarray]
    seen_at: dict[int, np.ndarray]
    features: dict[int, np.ndarray]
    glosses: list[str]

    @classmethod
    def read(cls, work: Path, params: dict[str, Any]) -> Material:
        """Read the data of a working folder."""
        table = pl.read_parquet(work / "scenes.parquet")
        seed, share, sides = params["seed"], params["texts"]["share_synsets_test"], params["lvlm"]["side_shares"]
        glosses = [
            f"{', '.join(synset.words[:3])}: {synset.gloss}"
            for synset in synsets()
            if number(seed, "synset", synset.name) / 2**63 >= share
        ]
        return cls(
            scenes=[scene_of(row) for row in table.iter_rows(named=True)],
            places={split: (table["split"] == split).arg_true().to_numpy() for split in ("train", "valid", "test")},
            seen_at=seen_at(table["split"], sides, seed),
            features={side: np.load(work / "scene_features" / f"{side}.npy", mmap_mode="r") for side in sides},
            glosses=glosses,
        )

    def of(self, side: int, places: np.ndarray) -> Tensor:
        """Stored features of scenes at a side in pixels."""
        rows = np.searchsorted(self.seen_at[side], places)
        return torch.from_numpy(self.features[side][rows].astype(np.float32))


@dataclass
class Learner:
    """The model with its reader and, by side in pixels, the grids of its images."""

    model: Qwen2_5_VLForConditionalGeneration
    reader: Reader
    grids: dict[int, ImageGrid]

    @classmethod
    def first(cls, params: dict[str, Any], checkpoint: Path) -> Learner:
        """The model before the first step, with the tokenizer and the tower of a checkpoint."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        config = configuration(params["model"], tokenizer)
        config.vision_config = AutoConfig.from_pretrained(checkpoint).vision_config
        model = first_model(config, checkpoint / "model.safetensors", params["seed"])
        grids = {side: ImageGrid.of(model.model.visual, side // PATCH, side // PATCH) for side in params["lvlm"]["side_shares"]}
        return cls(model, Reader(tokenizer), grids)

    def standardise(self, material: Material, scale: float) -> None:
        """Adjust the projector's initial weights to training scenes; see :func:`standardise_projector`."""
        side = max(self.grids)
        places = np.intersect1d(material.places["train"], material.seen_at[side])[:300]
        standardise_projector(self.model, material.of(side, places), self.grids[side], scale)

    def read_images(self, rows: Rows, features: Tensor, side: int) -> Tensor:
        """``(B, L, D)`` last hidden states of rows about images, from features of the tower."""
        tokens = vision_merged(self.model.model.visual, features, self.grids[side])
        return row_states(self.model, self.reader, rows, tokens, self.grids[side])


def text_segments(learner: Learner, material: Material, section: dict[str, Any], rng: np.random.Generator) -> list[Any]:
    """Draw plain texts of all kinds, more than fit in the rows of a step."""
    kinds = list(section["text_shares"])
    shares = np.array(list(section["text_shares"].values()))
    found = []
    reader, longest = learner.reader, section["text_row_tokens"]
    for kind in rng.choice(kinds, section["num_texts"], p=shares / shares.sum()).tolist():
        if kind == "description":
            scene = material.scenes[int(rng.choice(material.places["train"]))]
            text, turn = reading(scene, rng)
            found.append(reader.turn(turn, text))
        elif kind == "gloss":
            found.append(reader.text(material.glosses[int(rng.integers(len(material.glosses)))], longest))
        else:
            found.append(reader.text(shop_text(rng, with_fields=kind == "entry"), longest))
    return found


def losses(
    learner: Learner, material: Material, section: dict[str, Any], seed: int, step: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step, and values for the curve: mean cross-entropies about images and of plain texts, among others."""
    rng = generator(seed, "lvlm step", step)
    shares = np.array(list(section["side_shares"].values()))
    side = int(rng.choice(list(section["side_shares"]), p=shares / shares.sum()))
    usable = np.intersect1d(material.places["train"], material.seen_at[side])
    places = rng.choice(usable, section["num_images"], replace=False)
    about = [
        until_full(
            [learner.reader.turn(turn) for turn in turns(material.scenes[place], section["num_turns"], rng)],
            section["row_tokens"],
        )
        for place in places
    ]
    rows = Rows.of(about)
    states = learner.read_images(rows, material.of(side, places), side)
    image_losses, right, _ = token_losses(learner.model, rows, states)
    parts = {"images": image_losses.mean().item(), "image tokens right": right.float().mean().item()}
    texts = packed(text_segments(learner, material, section, rng), section["text_row_tokens"])[: section["num_text_rows"]]
    rows = Rows.of(texts)
    text_losses, _, _ = token_losses(learner.model, rows, row_states(learner.model, learner.reader, rows))
    parts |= {"texts": text_losses.mean().item(), "learnt tokens": len(image_losses) + len(text_losses)}
    return torch.cat([image_losses, text_losses]).mean(), parts


@torch.inference_mode()
def caption_losses(learner: Learner, material: Material, places: np.ndarray, side: int, *, shuffled: bool) -> np.ndarray:
    """The cross-entropy of one caption of each scene, and its number of tokens.

    Args:
        learner: the model.
        material: the data.
        places: rows of the scenes.
        side: side of the images in pixels.
        shuffled: whether to use the image of another scene.

    Returns:
        ``(scenes, 2)``.
    """
    found = []
    for batch in np.array_split(places, max(1, len(places) // 64)):
        asked = [
            learner.reader.turn(
                Turn("caption", CAPTION_PROMPTS[0], caption(material.scenes[place], generator("held out", place)))
            )
            for place in batch
        ]
        rows = Rows.of([[segment] for segment in asked])
        shown = np.roll(batch, 1) if shuffled else batch
        states = learner.read_images(rows, material.of(side, shown), side)
        each, _, at = token_losses(learner.model, rows, states)
        found.append(np.stack([np.bincount(at[:, 0], each, len(batch)), np.bincount(at[:, 0], minlength=len(batch))], axis=1))
    return np.concatenate(found)


@torch.inference_mode()
def answered(
    learner: Learner, material: Material, places: np.ndarray, side: int, *, shuffled: bool = False
) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Check by attribute whether greedy decoding gives exactly the correct answer.

    It does if each token of the answer is the most probable one after the tokens before it.

    Args:
        learner: the model.
        material: the data.
        places: rows of the scenes.
        side: side of the images in pixels.
        shuffled: whether to use the image of another scene.

    Returns:
        By attribute: for each question whether the answer is correct, and the correct answers.
    """
    hits: dict[str, list[bool]] = {}
    wanted: dict[str, list[str]] = {}
    for batch in np.array_split(places, max(1, len(places) // 32)):
        known = [list(answers(material.scenes[place]).items()) for place in batch]
        segments = [[learner.reader.turn(Turn(about, QUESTIONS[about][0], answer)) for about, answer in items] for items in known]
        rows = Rows.of(segments)
        shown = np.roll(batch, 1) if shuffled else batch
        states = learner.read_images(rows, material.of(side, shown), side)
        _, right, at = token_losses(learner.model, rows, states)
        number_of = rows.segment[at[:, 0], at[:, 1]]
        for row, items in enumerate(known):
            for index, (about, answer) in enumerate(items):
                hits.setdefault(about, []).append(bool(right[(at[:, 0] == row) & (number_of == index)].all()))
                wanted.setdefault(about, []).append(answer)
    return {about: (np.array(hits[about]), wanted[about]) for about in sorted(hits)}


def validated(learner: Learner, material: Material, section: dict[str, Any]) -> dict[str, Any]:
    """Measures on the validation split.

    Returns: By side, the caption loss with the correct image and how much it increases with another image (``gap``); and the
    share of correct answers by attribute.
    """
    places, found = material.places["valid"], {}
    for side in section["side_shares"]:
        right, other = (caption_losses(learner, material, places, side, shuffled=flag).sum(0) for flag in (False, True))
        found |= {f"caption {side}": right[0] / right[1], f"gap {side}": other[0] / other[1] - right[0] / right[1]}
    answers_found = answered(learner, material, places, max(section["side_shares"]))
    return found | {about: float(hits.mean()) for about, (hits, _) in answers_found.items()}


def train(work: Path, params: dict[str, Any], checkpoint: Path, stop_after: int | None = None) -> None:
    """Run or resume the training in ``work`` with the tokenizer and the tower of a checkpoint.

    ``stop_after`` ends the run at this step, like an interruption.
    """
    section, seed = params["lvlm"], params["seed"]
    torch.set_num_threads(section["num_threads"])
    learner = Learner.first(params, checkpoint)
    material = Material.read(work, params)
    model, heads, file = learner.model, nn.Identity(), work / "lvlm_training.safetensors"
    if not file.is_file():
        learner.standardise(material, section["image_token_deviation"])
    learn(
        file, work / "lvlm_curve.tsv", model, heads, optimiser_for(model, heads, section), section, stop_after,
        lambda step: losses(learner, material, section, seed, step), lambda: validated(learner, material, section),
    )  # fmt: skip


def main(
    work: Work = WORK,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps; the schedule does not change.")] = None,
) -> None:
    """Train with the settings; a stopped run resumes from its last saved state."""
    params = settings()
    train(work, params, tower_folder(params), stop_after=steps)
