"""The generative training: what is learnt, the loss against transformers' own pass, and a resumed run."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

import sda_core.backbones
from pretraining import train_lvlm
from pretraining.common import settings, tower_folder
from pretraining.conversations import Turn
from pretraining.export import write_checkpoint
from pretraining.generative import (
    Reader,
    Rows,
    Segment,
    first_model,
    frozen,
    packed,
    row_states,
    standardise_projector,
    token_losses,
    until_full,
)
from pretraining.model import ImageGrid, configuration, first_weights, vision_blocks, vision_merged
from pretraining.scene_features import seen_at
from pretraining.scenes import drawn_scene
from pretraining.train_lvlm import Learner, Material, answered, caption_losses, losses, train

TURNS = [
    Turn("caption", "describe the image", "a red and navy blue striped cup"),
    Turn("colour", "what colour is it?", "navy blue"),
    Turn("count", "how many are there?", "two"),
]


@pytest.fixture(scope="module")
def params():
    chosen = settings()
    chosen["model"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "vision_depth": 2, "vision_hidden_size": 48,
        "vision_intermediate_size": 48, "vision_num_heads": 3, "num_free_columns": 2,
    }  # fmt: skip
    chosen["scenes"] |= {"num_train": 30, "num_valid": 4, "num_test": 4}
    chosen["lvlm"] |= {
        "num_threads": 1, "num_steps": 6, "num_warmup_steps": 2, "num_images": 3, "num_turns": 3, "num_texts": 6,
        "num_text_rows": 2, "log_every": 2, "validate_every": 6, "save_every": 2, "side_shares": {84: 0.5, 56: 0.5},
    }  # fmt: skip
    return chosen


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(Path(sda_core.backbones.__file__).parent / "nano")


@pytest.fixture(scope="module")
def tower(params, tokenizer, tmp_path_factory) -> Path:
    """A tiny checkpoint in nano's layout, whose tower is taken over."""
    folder = tmp_path_factory.mktemp("tower")
    config = configuration(params["model"], tokenizer)
    width = params["model"]["hidden_size"] - 2
    vectors = np.random.default_rng(0).normal(size=(len(tokenizer) - 8, width))
    shares = np.full(len(vectors), 1 / len(vectors))
    write_checkpoint(first_weights(config, vectors, shares, 2, 5), tokenizer, folder, torch.float16)
    return folder


@pytest.fixture(scope="module")
def learner(params, tower) -> Learner:
    return Learner.first(params, tower)


@pytest.fixture(scope="module")
def work(params, tmp_path_factory) -> Path:
    """Scenes whose features are noise; enough for the loop."""
    folder = tmp_path_factory.mktemp("work")
    rows, rng = [], np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        for place in range(params["scenes"][f"num_{split}"]):
            rows.append({"split": split, **asdict(drawn_scene(split, params["seed"], place, params["scenes"]))})
    table = pl.DataFrame(rows)
    table.write_parquet(folder / "scenes.parquet")
    (folder / "scene_features").mkdir()
    for side, places in seen_at(table["split"], params["lvlm"]["side_shares"], params["seed"]).items():
        found = rng.normal(size=(len(places), (side // 14) ** 2, params["model"]["vision_hidden_size"]))
        np.save(folder / "scene_features" / f"{side}.npy", found.astype(np.float16))
    return folder


@pytest.fixture
def _few_glosses(monkeypatch):
    """WordNet need not be there."""
    from pretraining.texts import Synset

    few = [Synset("noun", f"noun:{place}", 6, ("cup",), "a small open container") for place in range(40)]
    monkeypatch.setattr(train_lvlm, "synsets", lambda: iter(few))


# ------------------------------------------------------------------------------------------------ what is learnt
def test_only_the_answer_and_its_end_are_learnt(tokenizer):
    reader = Reader(tokenizer)
    for turn in TURNS:
        segment = reader.turn(turn)
        learnt = [token for token, flag in zip(segment.ids, segment.learnt, strict=True) if flag]
        assert tokenizer.decode(learnt).strip() == f"{turn.answer}<|im_end|>"
        rest = [token for token, flag in zip(segment.ids, segment.learnt, strict=True) if not flag]
        assert tokenizer.decode(rest).strip().startswith(turn.question.split("?")[0])
        assert not segment.learnt[0]


def test_a_segment_is_the_chat_templates_own_sequence(tokenizer):
    reader = Reader(tokenizer)
    for turn in TURNS:
        content = [{"type": "image"}, {"type": "text", "text": turn.question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n"), add_special_tokens=False)[
            "input_ids"
        ]
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert [*reader.prefix, *reader.before_image, image, *reader.after_image, *reader.turn(turn).ids] == whole


def test_a_text_is_learnt_and_a_question_about_it_is_not(tokenizer):
    reader = Reader(tokenizer)
    segment = reader.turn(TURNS[1], "colour: navy blue; type: cup")
    learnt = tokenizer.decode([token for token, flag in zip(segment.ids, segment.learnt, strict=True) if flag])
    assert "what colour" not in learnt
    assert "type : cup" in learnt
    assert learnt.endswith("navy blue<|im_end|>")
    text = reader.text("a small open container", 50)
    assert text.learnt == [False, *[True] * (len(text.ids) - 1)]
    assert tokenizer.decode(text.ids[-1]) == "<|im_end|>"
    assert reader.text("a small open container", 3).ids == text.ids[:3]


def test_packing_keeps_the_order_and_the_limit():
    segments = [Segment([place] * length, [False] * length) for place, length in enumerate((4, 5, 3, 9, 1))]
    rows = packed(segments, 9)
    assert [[segment.ids[0] for segment in row] for row in rows] == [[0, 1], [2], [3], [4]]
    assert [segment.ids[0] for segment in until_full(segments, 9)] == [0, 1]
    with pytest.raises(ValueError, match="does not fit"):
        packed(segments, 8)


def test_padding_and_unlearnt_tokens_are_no_part_of_the_loss(learner):
    reader = learner.reader
    rows = Rows.of([[reader.turn(TURNS[0])], [reader.turn(TURNS[2])]])
    assert rows.learnt.sum() == sum(sum(reader.turn(turn).learnt) for turn in (TURNS[0], TURNS[2]))
    assert not rows.learnt[rows.segment < 0].any()
    each, _, at = token_losses(learner.model, rows, row_states(learner.model, reader, rows))
    assert len(each) == len(at) == rows.learnt.sum()


# ----------------------------------------------------------------------------------------------------- the loss
def stock_losses(learner: Learner, segment: Segment, pixels: torch.Tensor, side: int) -> np.ndarray:
    """Transformers' own pass over one sequence, and cross-entropy written out in NumPy."""
    reader, cells = learner.reader, (side // 28) ** 2
    image = learner.model.config.image_token_id
    before = [*reader.prefix, *reader.before_image]
    ids = torch.tensor([[*before, *[image] * cells, *reader.after_image, *segment.ids]])
    patches_each_way = side // 14
    with torch.no_grad():
        logits = learner.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, patches_each_way, patches_each_way]]),
            mm_token_type_ids=(ids == image).int(),
        ).logits[0].double().numpy()  # fmt: skip
    start = ids.shape[1] - len(segment.ids)
    found = []
    for place, flag in enumerate(segment.learnt):
        if flag:
            row = logits[start + place - 1]
            top = row.max()
            found.append(top + np.log(np.exp(row - top).sum()) - row[segment.ids[place]])
    return np.array(found)


@pytest.mark.parametrize("side", [56, 84])
def test_the_loss_of_packed_segments_equals_an_explicit_cross_entropy(learner, side):
    """Segments about one image, in one row, against sequences of their own through transformers."""
    from pretraining.model import patches

    grid = ImageGrid.of(learner.model.model.visual, side // 14, side // 14)
    rgb = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    cut = patches(rgb)
    segments = [[learner.reader.turn(turn) for turn in TURNS], [learner.reader.turn(turn) for turn in TURNS[1:]]]
    rows = Rows.of(segments)
    with torch.no_grad():
        tokens = vision_merged(learner.model.model.visual, vision_blocks(learner.model.model.visual, cut, grid), grid)
        each, _, at = token_losses(learner.model, rows, row_states(learner.model, learner.reader, rows, tokens, grid))
    for row, own in enumerate(segments):
        expected = np.concatenate([stock_losses(learner, segment, cut[row], side) for segment in own])
        assert each[at[:, 0] == row].numpy() == pytest.approx(expected, abs=2e-4)
    assert each.std() > 0.05


def test_packed_texts_equal_texts_alone(learner):
    segments = [learner.reader.text(text, 40) for text in ("a small open container", "red cup; wood")]
    together = Rows.of([segments])
    with torch.no_grad():
        packed_losses, _, _ = token_losses(learner.model, together, row_states(learner.model, learner.reader, together))
        alone = []
        for segment in segments:
            rows = Rows.of([[segment]])
            alone.append(token_losses(learner.model, rows, row_states(learner.model, learner.reader, rows))[0])
    assert torch.allclose(packed_losses, torch.cat(alone), atol=1e-5)


def test_an_answer_depends_on_the_image_and_not_on_other_segments(learner):
    grid = ImageGrid.of(learner.model.model.visual, 4, 4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4, learner.model.config.text_config.hidden_size, generator=generator)
    first, second, other = (learner.reader.turn(turn) for turn in TURNS)

    def of(segments: list[Segment], shown: torch.Tensor) -> torch.Tensor:
        rows = Rows.of([segments])
        with torch.no_grad():
            return token_losses(learner.model, rows, row_states(learner.model, learner.reader, rows, shown, grid))[0]

    count = sum(second.learnt)
    assert torch.allclose(of([first, second], tokens)[-count:], of([other, second], tokens)[-count:], atol=1e-5)
    assert (of([first, second], tokens) - of([first, second], tokens.flip(1))).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- the training
def test_the_tower_is_taken_over_and_frozen_and_all_else_is_new(params, tower, tokenizer):
    config = configuration(params["model"], tokenizer)
    given = Qwen2_5_VLForConditionalGeneration.from_pretrained(tower, dtype=torch.float32)
    made = first_model(config, tower / "model.safetensors", 1)
    theirs = dict(given.named_parameters())
    for name, weight in made.named_parameters():
        assert weight.requires_grad != frozen(name)
        if frozen(name):
            assert torch.equal(weight, theirs[name])
        elif weight.ndim > 1:
            assert not torch.allclose(weight, theirs[name], atol=1e-3), name
    assert any("merger" in name and weight.requires_grad for name, weight in made.named_parameters())


def test_the_tower_may_have_other_sizes_than_nano(params, tower):
    """nano 2's tower is deeper, so the sizes of the tower are those of its checkpoint and not those of the settings."""
    other = {**params, "model": params["model"] | {"vision_depth": params["model"]["vision_depth"] + 1}}
    assert len(Learner.first(other, tower).model.model.visual.blocks) == params["model"]["vision_depth"]


def test_the_released_tower_fits_the_settings():
    params = settings()
    visual = Learner.first(params, tower_folder(params)).model.model.visual
    given = load_file(tower_folder(params) / "model.safetensors")
    (name,) = (name for name in given if name.endswith("visual.blocks.5.attn.qkv.weight"))
    assert torch.equal(visual.blocks[5].attn.qkv.weight, given[name].float())


def test_a_standardised_projector_has_spread_in_and_out(params, tower):
    """Features with a large common part give image tokens without one."""
    learner = Learner.first(params, tower)
    visual, grid = learner.model.model.visual, learner.grids[56]
    generator = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(1, 1, visual.config.hidden_size, generator=generator)
    features = common + torch.randn(64, 16, visual.config.hidden_size, generator=generator)

    def tokens() -> torch.Tensor:
        with torch.no_grad():
            return vision_merged(visual, features, grid).flatten(0, 1)

    def share_in_common(found: torch.Tensor) -> float:
        return (found.mean(0).norm() / found.norm(dim=1).mean()).item()

    before = tokens()
    standardise_projector(learner.model, features, grid, 0.2)
    after = tokens()
    assert share_in_common(before) > 0.5
    assert share_in_common(after) < 1e-3
    assert after.std(0).mean().item() == pytest.approx(0.2, rel=1e-3)
    # four patches that are all the mean patch give a first layer of zeros
    with torch.no_grad():
        mean = visual.merger.ln_q(features).flatten(0, 1).mean(0)
        assert visual.merger.mlp[0](mean.repeat(4)).abs().max() < 1e-4


@pytest.mark.usefixtures("_few_glosses")
def test_projector_and_decoder_get_a_gradient_and_the_tower_none(params, tower, work):
    learner, material = Learner.first(params, tower), Material.read(work, params)
    total, parts = losses(learner, material, params["lvlm"], params["seed"], 0)
    total.backward()
    for name, weight in learner.model.named_parameters():
        if frozen(name):
            assert weight.grad is None
        else:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
    assert parts["learnt tokens"] > 40


@pytest.mark.usefixtures("_few_glosses")
def test_a_resumed_run_equals_an_undisturbed_one(params, tower, work, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        shutil.copytree(work, folder)
    train(whole, params, tower)
    train(broken, params, tower, stop_after=3)
    stopped = load_file(broken / "lvlm_training.safetensors")
    train(broken, params, tower)
    first, second = (load_file(folder / "lvlm_training.safetensors") for folder in (whole, broken))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-6), name
    name = "model.model.visual.merger.mlp.0.weight"
    assert (stopped[name] - second[name]).abs().max() > 1e-4
    assert len((whole / "lvlm_curve.tsv").read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.usefixtures("_few_glosses")
def test_held_out_measures_of_a_model_that_knows_nothing(learner, params, work):
    material = Material.read(work, params)
    places = material.places["valid"]
    right, other = (caption_losses(learner, material, places, 56, shuffled=flag) for flag in (False, True))
    assert np.array_equal(right[:, 1], other[:, 1])
    assert right[:, 0].sum() / right[:, 1].sum() == pytest.approx(np.log(12288), abs=1.5)
    found = answered(learner, material, places, 56)
    assert "type" in found
    assert all(len(hits) == len(wanted) for hits, wanted in found.values())
    assert np.concatenate([hits for hits, _ in found.values()]).mean() < 0.2
