"""nano 2: what its training draws, its losses, its first weights, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers.vision_utils import get_vision_position_ids

from pretraining.busy_scenes import MOTIFS, PATTERNS, described, draw_scene, drawn_products, labels, pattern_share
from pretraining.common import settings
from pretraining.export import write_checkpoint
from pretraining.model import ImageGrid, patches
from pretraining.scenes import WORDS, Product, held_out
from pretraining.seen import write
from pretraining.train import plain
from pretraining.train_nano2 import (
    Heads,
    Material,
    Optimisers,
    attribute_loss,
    dense_loss,
    drawn_batch,
    first_model,
    focus_on_neighbours,
    is_inner,
    laid_over,
    losses,
    nano2_rate,
    nano2_settings,
    train,
    with_alpha,
)
from sda_core.backbones import build
from sda_core.data.demo.images import MOTIFS as SHOP_MOTIFS
from sda_core.data.demo.images import PRODUCTS
from sda_core.params import Nano

REPOSITORY = Path(__file__).parents[2]
SCENES = settings()["nano2"]["busy_scenes"]
SEED = settings()["seed"]


# ------------------------------------------------------------------------------------------------- material
def test_validation_scenes_show_pairs_that_training_never_shows():
    for place in range(200):
        for split in ("train", "valid"):
            products, count, _ = drawn_products(split, np.random.default_rng(place), SCENES, SEED)
            assert count == 1 or len(products) == 1
            assert held_out(products[0].type, products[0].colour, SEED, SCENES["share_pairs_test"]) == (split == "valid")


def test_a_caption_names_nothing_that_is_not_there():
    rng = np.random.default_rng(0)
    products = [Product("cup", "mdi:cup", "red", "dots", "white", "wool", "")]
    captions = [described(products, 1, "grey", rng) for _ in range(50)]
    assert all("red" in caption or "scarlet" in caption for caption in captions)
    assert not any("with a" in caption or "wood" in caption or "striped" in caption for caption in captions)
    assert labels(products, 1, "grey") == [
        "background=grey", "count=1", "type=cup", "colour=red", "pattern=dots", "material=wool", "motif=none",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "plain"])
def test_a_pattern_shows_both_colours(pattern):
    for seed in range(5):
        share = pattern_share(pattern, 80, np.random.default_rng(seed))
        assert 0.03 < share.mean() < 0.9
        assert share.min() == 0.0


def test_a_scene_shows_its_motif_and_is_the_same_each_time():
    masks = {key: np.full((60, 60), 255, np.uint8) for key in ("block", "motif star")}

    def shown(motif: str) -> np.ndarray:
        product = Product("cup", "block", "blue", "plain", "", "plastic", motif)
        return draw_scene([product], 1, "white", masks, 112, np.random.default_rng(3))

    assert np.array_equal(shown("star"), shown("star"))
    assert shown("star").shape == (112, 112, 3)
    assert np.abs(shown("star")[44:68, 44:68].astype(int) - shown("")[44:68, 44:68]).mean() > 10


def test_nothing_of_the_built_in_shop_is_drawn():
    source = REPOSITORY.joinpath("pretraining", "busy_scenes.py").read_text(encoding="utf-8")
    assert "sda_core.data.demo" not in source
    icons = {icon for entry in WORDS["types"].values() for icon in entry["icons"]}
    assert not icons & {*PRODUCTS, *SHOP_MOTIFS}
    assert len(set(MOTIFS)) == len(MOTIFS)


def test_photographs_of_one_sender_are_in_one_split(tmp_path):
    rows = [{"id": f"p{place}", "label": "Hat", "kids": place == 0, "sender_id": str(place % 9)} for place in range(60)]
    with zipfile.ZipFile(tmp_path / "clothing_cc0.zip", "w") as archive:
        archive.writestr("items.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
        for row in rows:
            stream = io.BytesIO()
            Image.new("RGB", (30, 40), (200, 30, 30)).save(stream, "JPEG")
            archive.writestr(f"images/{row['id']}.jpg", stream.getvalue())
    table = write(tmp_path / "clothing_cc0.zip", tmp_path, {"side_pixels": 56, "share_held_out": 0.5}, 1)
    assert np.load(tmp_path / "seen" / "clothing_cc0.npy").shape == (60, 56, 56, 3)
    splits = (
        table.with_columns(sender=pl.Series([row["sender_id"] for row in rows]))
        .group_by("sender")
        .agg(pl.col("split").n_unique())
    )
    assert splits["split"].max() == 1
    assert set(table["split"]) > {"train"}
    assert table["captions"][0].to_list() == ["kids hat"]
    assert table["labels"][1].to_list() == ["garment=Hat"]


# ------------------------------------------------------------------------------------------------- losses
def test_attributes_cost_nothing_where_known_and_one_where_guessed():
    heads = {"colour": slice(0, 3), "type": slice(3, 5)}
    wanted = torch.tensor([[1.0, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    assert attribute_loss(torch.zeros(2, 5), wanted, heads).item() == pytest.approx(2.0)
    assert attribute_loss(50 * wanted, wanted, heads).item() == pytest.approx(0.0, abs=1e-5)
    assert attribute_loss(torch.zeros(2, 5), torch.zeros(2, 5), heads).item() == 0.0
    both = torch.tensor([[1.0, 1, 0, 0, 0]])
    assert attribute_loss(50 * both, both, heads).item() == pytest.approx(np.log(2) / np.log(3), abs=1e-5)


def test_the_dense_loss_weighs_groups_of_channels_alike():
    wanted = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    assert dense_loss(wanted * 3, wanted, (2, 8)).item() == pytest.approx(0.0, abs=1e-6)
    half = torch.cat([wanted[..., :2], -wanted[..., 2:]], dim=-1)
    assert dense_loss(half, wanted, (2, 8)).item() == pytest.approx(1.0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def params():
    chosen = nano2_settings(None)
    chosen["model"] |= {
        "num_layers": 1, "intermediate_size": 64, "vision_depth": 3, "vision_intermediate_size": 64,
        "vision_full_attention_blocks": [1, 2], "vision_block_origins": [0, 1, None],
    }  # fmt: skip
    chosen["train"] |= {
        "num_threads": 1, "num_steps": 4, "num_warmup_steps": 1, "num_images": 4, "num_texts": 6, "num_seen_texts": 2,
        "num_other_captions": 8, "num_other_seen_captions": 4, "log_every": 2, "validate_every": 4, "save_every": 2,
        "half_precision": False, "compile": False, "image_shares": {"emoji": 1.0}, "text_shares": {"word": 1.0},
        "image_sizes_pixels": [[56, 56], [84, 56]], "channels": [2, 3],
        "stages": [{"until": 1, "tower_alone": True, "only_mapped": True, "sources": {"scenes": 5}, "num_images": 0}],
        "sources": {"scenes": 4, "clothing_cc0": 3}, "num_valid_images": 4,
    }  # fmt: skip
    chosen["nano2"] |= {"num_axis_texts": 10, "new_tower": False, "head_offsets": [[[0, 1], *[None] * 5], [None] * 6, [None] * 6]}
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_folder, params) -> Path:
    """A corpus of nano's form, two sources, and first weights in ``first``."""
    work = tmp_path_factory.mktemp("nano2")
    shutil.copytree(corpus_folder, work, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    (work / "seen").mkdir()
    for name, head in (("scenes", "type"), ("clothing_cc0", "garment")):
        np.save(work / "seen" / f"{name}.npy", rng.integers(0, 256, (10, 60, 60, 3), dtype=np.uint8))
        pl.DataFrame({
            "split": ["train"] * 8 + ["valid"] * 2, "captions": [[f"{name} {place}", f"a {name}"] for place in range(10)],
            "labels": [[f"{head}={'xy'[place % 2]}", f"size={place % 3}"] for place in range(10)],
        }).write_parquet(work / "seen" / f"{name}.parquet")  # fmt: skip
        np.save(work / "seen" / f"{name}_texts.npy", rng.normal(size=(20, 384)).astype(np.float16))
    maps = rng.normal(size=(10, 7, 7, 5)).astype(np.float16)
    maps[3] = 0
    np.save(work / "seen" / "scenes_maps.npy", maps)
    np.savez(work / "seen" / "scenes_maps.npz", mean=np.zeros(5, np.float32), deviation=np.ones(5, np.float32))
    old = laid_over(params, {"model": {"vision_depth": 2, "vision_full_attention_blocks": [1]}})
    model, encoder, _ = first_model(work, old, None)
    write_checkpoint(model, encoder.tokenizer, work / "first", torch.float32)
    return work


def test_added_blocks_do_nothing_at_first(folder, params):
    old, old_encoder, _ = first_model(
        folder, laid_over(params, {"model": {"vision_depth": 2, "vision_full_attention_blocks": [1]}}), None
    )
    new, encoder, axes = first_model(folder, params, folder / "first")
    rgb = torch.rand(2, 3, 84, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(old_encoder.images(rgb), encoder.images(rgb), atol=1e-5)
    assert len(new.model.visual.blocks) == len(old.model.visual.blocks) + 1
    assert np.allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-4)


def test_a_batch_holds_each_source_and_maps_move_with_their_image(folder, params):
    _, encoder, axes = first_model(folder, params, folder / "first")
    material = Material.read(folder, encoder, params["train"], axes)
    assert {head: part.stop - part.start for head, part in material.heads.items()} == {"garment": 2, "size": 3, "type": 2}
    batch = drawn_batch(material, params["train"], (56, 84), np.random.default_rng(0))
    assert batch.rgb.shape == (11, 3, 56, 84)
    assert batch.own.tolist() == [True] * 8 + [False] * 3
    assert batch.labels[:4].sum() == 0
    assert batch.labels[4:].sum(1).tolist() == [2.0] * 7
    assert set(batch.mapped.tolist()) <= {4, 5, 6, 7}
    assert batch.maps.shape[1:] == (2 * 3, 5)
    assert not set(batch.caption_ids[4:].tolist()) & set(range(len(material.corpus.rows)))


def test_training_resumed_equals_uninterrupted_and_all_losses_fall_in(folder, params):
    ends = []
    for name, stops in (("whole", (None,)), ("broken", (3, None))):
        chosen = laid_over(params, {"nano2": {"name": name, "start_from": str(folder / "first")}})
        for stop in stops:
            train(folder, chosen, stop)
        ends.append(load_file(folder / name / "training.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-6), name
    line = (folder / "whole" / "curve.tsv").read_text(encoding="utf-8").splitlines()[-1]
    parts = json.loads(line.split("\t")[-1])
    assert {"contrastive", "vector_heads", "token_heads", "dense", "pooled", "right_type", "scenes_recall_at_10"} <= parts.keys()


def test_every_loss_has_a_weight_and_a_gradient_reaches_the_tower(folder, params):
    model, encoder, axes = first_model(folder, params, folder / "first")
    material = Material.read(folder, encoder, params["train"], axes)
    heads = Heads(256, len(material.classes), 5)
    found = losses(encoder, heads, material, params["train"], 0, 2)
    assert found.keys() <= params["train"]["loss_weights"].keys()
    alone = losses(encoder, heads, material, params["train"], 0, 0)
    assert alone.keys() <= params["train"]["loss_weights"].keys()
    for name in ("token_contrastive", "token_heads"):
        (gradient,) = torch.autograd.grad(alone[name], [model.model.visual.patch_embed.proj.weight], retain_graph=True)
        assert gradient.abs().max() > 0, name
    for name in ("vector_heads", "token_heads", "dense", "pooled"):
        (gradient,) = torch.autograd.grad(found[name], [model.model.visual.patch_embed.proj.weight], retain_graph=True)
        assert gradient.abs().max() > 0, name


def test_a_stage_trains_the_tower_alone_on_mapped_images(folder, params):
    model, encoder, axes = first_model(folder, params, folder / "first")
    material = Material.read(folder, encoder, params["train"], axes)
    assert 3 not in material.sources["scenes"].mapped
    heads = Heads(256, len(material.classes), 5)
    found = losses(encoder, heads, material, params["train"], 0, 0)
    assert found.keys() == {"token_heads", "token_contrastive", "dense"}
    torch.stack(list(found.values())).sum().backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad is None
    rates = [nano2_rate(step, params["train"] | {"num_warmup_steps": 2}) for step in range(3)]
    assert rates[0] == rates[1] == 0.5


def test_a_new_tower_starts_at_whitened_patches(folder, params):
    chosen = laid_over(params, {"nano2": {"new_tower": True}})
    model, encoder, _ = first_model(folder, chosen, folder / "first")
    old, _, _ = first_model(folder, params, folder / "first")
    assert torch.equal(model.model.language_model.norm.weight, old.model.language_model.norm.weight)
    assert not torch.equal(model.model.visual.blocks[0].attn.qkv.weight, old.model.visual.blocks[0].attn.qkv.weight)
    pixels = np.load(folder / "seen" / "scenes.npy")[:8]
    rgb = plain(with_alpha(pixels), np.zeros(8, bool), 112)
    kernel = model.model.visual.patch_embed.proj.weight.flatten(1)
    found = (patches(rgb) @ kernel.T).flatten(0, 1)
    spread = (found.pow(2).mean(0)).sqrt()
    assert spread[:5].max() < 2 * spread[:5].min()
    assert encoder.images(rgb[:2]).isfinite().all()


def scores_of_a_head(model, head: int, num_patches: int = 8) -> torch.Tensor:
    """Attention of one head of the first block by rows and columns of query and key, from the biases alone."""
    visual = model.model.visual
    grid = ImageGrid.of(visual, num_patches, num_patches)
    block = visual.blocks[0]
    with torch.no_grad():
        query, key = (block.attn.qkv.bias.view(3, block.attn.num_heads, -1)[part, head] for part in (0, 1))
        turned = [one * grid.cos_ND + torch.cat([-one[16:], one[:16]]) * grid.sin_ND for one in (query, key)]
    positions = get_vision_position_ids(torch.tensor([[1, num_patches, num_patches]]), 2, kwargs={})[grid.order_N]
    places = positions[:, 0] * num_patches + positions[:, 1]
    scores = torch.zeros(num_patches**2, num_patches**2)
    scores[places[:, None], places[None]] = turned[0] @ turned[1].T / len(query) ** 0.5
    return scores.view(num_patches, num_patches, num_patches, num_patches)


@pytest.mark.parametrize("offset", [(0, 1), (0, -1), (2, 0), (-1, -1), (0, 0)])
def test_a_head_attends_to_its_neighbour_first(folder, params, offset):
    model, _, _ = first_model(folder, params, folder / "first")
    before = model.model.visual.blocks[0].attn.qkv.weight.clone()
    focus_on_neighbours(model.model.visual, [[None, list(offset), *[None] * 4], [None] * 6, [None] * 6], 4.0)
    scores = scores_of_a_head(model, 1)
    for row in range(2, 6):
        for column in range(2, 6):
            best = int(scores[row, column].argmax())
            assert (best // 8 - row, best % 8 - column) == offset
    # the formula: sharpness times the sum over both axes and two frequencies, 1 and 10 ** -0.5
    wanted = 4.0 * sum(np.cos(f * (3 - 2 - offset[0])) + np.cos(f * (5 - 2 - offset[1])) for f in (1.0, 10**-0.5))
    assert scores[2, 2, 3, 5].item() == pytest.approx(wanted, abs=1e-4)
    after = model.model.visual.blocks[0].attn.qkv.weight
    changed = (after != before).view(3, 6, -1).any(-1)
    assert changed.tolist() == [[False, True, *[False] * 4]] * 2 + [[False] * 6]


def test_both_optimisers_keep_their_state(folder, params):
    model, _, _ = first_model(folder, params, folder / "first")
    heads = Heads(256, 3, 5)
    first, second = (Optimisers(model, heads, params["train"]) for _ in range(2))
    for weight in [*model.parameters(), *heads.parameters()]:
        weight.grad = torch.ones_like(weight)
    for group in first.param_groups:
        group["lr"] = 0.0
    first.step()
    second.load_state_dict(first.state_dict())
    kept, read = first.state_dict()["state"], second.state_dict()["state"]
    assert kept.keys() == read.keys()
    assert len(kept) == len(list(model.parameters())) + len(list(heads.parameters()))
    assert sum("momentum_buffer" in state for state in kept.values()) == sum(
        weight.ndim == 2 and is_inner(name) for name, weight in model.named_parameters()
    )


# ------------------------------------------------------------------------------------------------- what is shipped
def test_the_shipped_weights_load_by_their_setting_and_enlarge_small_images():
    section = YAML(typ="safe", pure=True).load((REPOSITORY / "conf" / "backbone" / "nano2.yaml").read_text(encoding="utf-8"))
    backbone = build(Nano(**section), torch.device("cpu"))
    assert sum(weight.numel() for weight in backbone.model.parameters()) < 12e6
    assert sum(file.stat().st_size for file in (REPOSITORY / "sda_core" / "backbones" / "nano2").iterdir()) < 25e6
    small, large = (Image.new("RGB", (side, side), (200, 30, 30)) for side in (64, 112))
    with torch.inference_mode():
        first, second = (backbone.encode(backbone.model, backbone.image_inputs([image], "image")) for image in (small, large))
        red, cars = (
            backbone.encode(backbone.model, backbone.text_inputs([text])) for text in ("a red sofa", "car insurance for teachers")
        )
        couch = backbone.encode(backbone.model, backbone.text_inputs(["red couch"]))
    assert torch.nn.functional.cosine_similarity(first, second).item() > 0.99
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(red, couch).item() > cosine(red, cars).item() + 0.2
