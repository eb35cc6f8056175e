"""The joint pass: one sequence for an item's image and text, with the modality of each token."""

from __future__ import annotations

import io
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sda_core import adapters
from sda_core.adapters.merging import moda_layers
from sda_core.adapters.moda.modality import current_block
from sda_core.backbones import build
from sda_core.embeddings.blocks import EmbeddedItems
from sda_core.embeddings.encoding import embed_items
from sda_core.embeddings.fusion import fuse_joint
from sda_core.errors import ConfigError, DataError
from sda_core.items import ItemSource
from sda_core.modalities import JOINT
from sda_core.seed import derive
from tests.embeddings.noise_shop import CPU, TINY, NoiseImages, export_params, nothing, random_halves, shop, unit
from tests.sections import SHIPPED, changed
from tests.tolerances import up_to_rounding

# peft 0.21 asks a transformers 5.23 model for an attribute that transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPT = "The picture shows a product."
NUM_ITEMS = 16
WITHOUT_IMAGE = np.arange(1, NUM_ITEMS + 1) % 5 == 0
WITHOUT_TEXT = 2  # its row


def joint(source: ItemSource, backbone: Any, resume: Any, model: Any = None, context: Any = nothing, **changes: Any) -> Any:
    params = export_params(**changes)
    found = embed_items(backbone, model or backbone.model, source, params, resume, "f", CPU, context, passes=JOINT)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def embedded_jointly(backbone, tmp_path_factory) -> EmbeddedItems:
    return joint(shop(NUM_ITEMS), backbone, tmp_path_factory.mktemp("joint"))


def image_of(item_id: int) -> Image.Image:
    encoded = NoiseImages().get(item_id)
    assert encoded is not None
    return Image.open(io.BytesIO(encoded)).convert("RGB")


# ------------------------------------------------------------------------------------------------- the sequence
def by_hand(backbone: Any, image: Image.Image, text: str) -> dict[str, Tensor]:
    """The inputs of one item, from the checkpoint's own template, tokenizer and image processor."""
    tokenizer = backbone._tokenizer
    content = [{"type": "image"}, {"type": "text", "text": f"{PROMPT}\n{text}"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    pixels = backbone._image_processor([image], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // backbone.model.config.vision_config.spatial_merge_size**2
    token = backbone.image_token
    ids = torch.tensor([tokenizer(rendered.replace(token, token * count))["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids(token)).int(),
    }


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states, positions worked out by the model itself."""
    with torch.inference_mode():
        found = model(**inputs, output_hidden_states=True).hidden_states[-1].mean(1)[0]
    model.model.rope_deltas = None
    return found


def test_a_vector_is_that_of_one_forward_pass_over_the_composed_prompt(backbone, embedded_jointly):
    source = shop(NUM_ITEMS)
    for row in (0, 7, 10):
        (text,) = source.texts(np.array([row]))
        expected = forward(backbone.model, by_hand(backbone, image_of(row + 1), text)).numpy()
        np.testing.assert_allclose(embedded_jointly.joint_ID[row], expected, **up_to_rounding(expected))
    assert embedded_jointly.vectors.keys() == {"joint"}
    assert embedded_jointly.joint_ID.shape == (NUM_ITEMS, backbone.dim)


def test_tokens_of_the_image_are_the_image_s_and_all_others_the_text_s(backbone):
    images = [image_of(1), image_of(2)]
    inputs = backbone.joint_inputs(images, ["A kettle", ""], PROMPT)
    ids_BL = backbone.token_modalities(inputs)
    assert ids_BL.shape == inputs["input_ids"].shape
    is_image = inputs["input_ids"] == backbone._tokenizer.convert_tokens_to_ids(backbone.image_token)
    assert torch.equal(ids_BL == 0, is_image)
    assert torch.equal(ids_BL == 1, ~is_image)
    merged = inputs["image_grid_thw"].prod(-1) // backbone.model.config.vision_config.spatial_merge_size**2
    assert torch.equal((ids_BL == 0).sum(1), merged)
    assert not (ids_BL == 0)[~inputs["attention_mask"].bool()].any(), "padding is not the image's"
    assert bool((backbone.token_modalities(backbone.text_inputs(["tea"])) == 1).all())


def test_an_item_without_text_has_the_sequence_of_its_image(backbone):
    images = [image_of(1), image_of(2)]
    alone, both = backbone.image_inputs(images, PROMPT), backbone.joint_inputs(images, ["", ""], PROMPT)
    assert alone.keys() == both.keys()
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_what_fills_the_limit_is_cut_and_counted(backbone, tmp_path, caplog):
    source = ItemSource(np.arange(1, 4), ["x" * 500, "short", "y" * 500], PROMPT, "h", NoiseImages(), "placeholder")
    with caplog.at_level("INFO", logger="sda_core"):
        joint(source, backbone, tmp_path)
    assert "2 of 3 texts reach backbone.max_text_tokens" in caplog.text
    inputs = backbone.joint_inputs([image_of(1)], ["x" * 500], PROMPT)
    kept = inputs["attention_mask"] * backbone.token_modalities(inputs)
    assert int(kept.sum()) == TINY.max_text_tokens, "image tokens are not counted"


# ------------------------------------------------------------------------------------------ what an item is shown
@pytest.mark.parametrize("missing_image", ["placeholder", "text_only"])
def test_an_item_lacks_a_modality_and_takes_nobody_else_s(backbone, embedded, tmp_path, missing_image):
    """Without an image it is its text's vector, without a text its image's, whatever stands in elsewhere."""
    found = joint(shop(NUM_ITEMS, missing_image), backbone, tmp_path)
    texts, images = embedded.text_ID[:NUM_ITEMS], embedded.image_ID[:NUM_ITEMS]
    np.testing.assert_allclose(found.joint_ID[WITHOUT_IMAGE], texts[WITHOUT_IMAGE], **up_to_rounding(texts))
    np.testing.assert_allclose(found.joint_ID[WITHOUT_TEXT], images[WITHOUT_TEXT], **up_to_rounding(images))
    rest = ~WITHOUT_IMAGE & (np.arange(NUM_ITEMS) != WITHOUT_TEXT)
    for other in (texts, images):
        assert np.linalg.norm(found.joint_ID[rest] - other[rest], axis=1).min() > 1e-3


def test_both_modalities_count(backbone, embedded_jointly, tmp_path):
    class OneOther(NoiseImages):
        def get(self, item_id: int) -> bytes | None:
            return super().get(item_id + 1000 if item_id == 1 else item_id)

    source = shop(NUM_ITEMS)
    texts = source.texts(np.arange(NUM_ITEMS))
    texts[1] = "Something else altogether"
    other = ItemSource(source.item_ids, texts, PROMPT, "h", OneOther(), "placeholder")
    moved = np.linalg.norm(joint(other, backbone, tmp_path).joint_ID - embedded_jointly.joint_ID, axis=1)
    assert moved[:2].min() > 1e-3
    assert moved[2:].max() < 1e-4, "an item's vector depends on that item alone"


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 30, "shard_rows": 100}, {"batch_size": 7, "shard_rows": 5}]
)
def test_batches_and_blocks_do_not_matter(backbone, embedded_jointly, tmp_path, changes):
    found = joint(shop(NUM_ITEMS), backbone, tmp_path, **changes).joint_ID
    np.testing.assert_allclose(unit(found), unit(embedded_jointly.joint_ID), rtol=0, atol=1e-4)


def test_the_order_of_the_items_does_not_matter(backbone, embedded_jointly, tmp_path):
    class Moved(NoiseImages):
        def __init__(self, order: np.ndarray) -> None:
            self.order = order

        def get(self, item_id: int) -> bytes | None:
            return super().get(int(self.order[item_id - 1]) + 1)

        def status(self, item_id: int) -> str:
            return super().status(int(self.order[item_id - 1]) + 1)

    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    texts = shop(NUM_ITEMS).texts(order)
    moved = ItemSource(np.arange(1, NUM_ITEMS + 1), texts, PROMPT, "h", Moved(order), "placeholder")
    found = joint(moved, backbone, tmp_path).joint_ID
    np.testing.assert_allclose(unit(found), unit(embedded_jointly.joint_ID[order]), rtol=0, atol=1e-4)


def test_finished_blocks_are_not_computed_again(backbone, embedded_jointly, tmp_path):
    joint(shop(NUM_ITEMS), backbone, tmp_path)
    passes: list[int] = []
    hook = backbone.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        again = joint(shop(NUM_ITEMS), backbone, tmp_path)
        assert not passes
        (tmp_path / "joint-00001.safetensors").unlink()
        resumed = joint(shop(NUM_ITEMS), backbone, tmp_path)
    finally:
        hook.remove()
    assert len(passes) == 3, "seven items with an image and one without, four a batch"
    for found in (again, resumed):
        assert found.joint_ID.tobytes() == embedded_jointly.joint_ID.tobytes()


# ------------------------------------------------------------------------------------------------- adapters
def per_token(fresh: Any, model: nn.Module, is_image_BL: Tensor) -> ExitStack:
    """The base model with every adapted layer computed from two whole matrices, chosen token by token: no MoDA code runs."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in moda_layers(model)}
    stack = ExitStack()
    for name, module in fresh.model.named_modules():
        if name not in layers:
            continue
        image_OD, text_OD = (layers[name].get_delta_weight("default", of).detach() for of in ("image", "text"))

        def adapted(linear, arguments, result, image_OD=image_OD, text_OD=text_OD):
            (x_BLD,) = arguments
            return result + torch.where(is_image_BL[..., None], F.linear(x_BLD, image_OD), F.linear(x_BLD, text_OD))

        stack.callback(module.register_forward_hook(adapted).remove)
    return stack


def test_an_adapted_vector_is_the_base_s_with_one_matrix_for_each_modality_s_tokens(adapted, tmp_path):
    backbone, model = adapted
    source = shop(NUM_ITEMS)
    found = joint(source, backbone, tmp_path, model, lambda name: adapters.modality(model, name)).joint_ID
    fresh: Any = build(TINY, CPU)
    for row in (0, 7):
        inputs = by_hand(fresh, image_of(row + 1), source.texts(np.array([row]))[0])
        with per_token(fresh, model, inputs["mm_token_type_ids"].bool()):
            expected = forward(fresh.model, inputs).numpy()
        np.testing.assert_allclose(found[row], expected, **up_to_rounding(expected))
        with per_token(fresh, model, ~inputs["mm_token_type_ids"].bool()):
            swapped = forward(fresh.model, inputs).numpy()
        assert np.abs(found[row] - swapped).max() > 1e-3, "a mix-up of the two would show"
    assert np.abs(found[0] - forward(fresh.model, by_hand(fresh, image_of(1), "Item 1 good")).numpy()).max() > 0.01


def test_every_layer_sees_the_ids_of_its_batch(adapted, tmp_path):
    backbone, model = adapted
    seen: list[tuple[tuple[int, ...], Tensor]] = []
    (_, layer), *_ = moda_layers(model)

    def spy(module, arguments):
        block = current_block(module.moda_owner)
        assert block is not None
        assert block.value.ids is not None
        seen.append((tuple(arguments[0].shape[:2]), block.value.ids))

    hook = layer.register_forward_pre_hook(spy)
    try:
        joint(shop(10), backbone, tmp_path, model, lambda name: adapters.modality(model, name))
    finally:
        hook.remove()
    assert all(shape == tuple(ids.shape) for shape, ids in seen)
    assert [bool((ids == 0).any(1).all()) for _, ids in seen] == [True, True, False, True, False], "by block: images, then texts"
    assert all(bool((ids == 1).any(1).all()) for _, ids in seen)


@pytest.mark.parametrize("adapter", ["lora", "moda"])
def test_merging_changes_nothing_and_is_done_where_one_weight_is_enough(tmp_path, adapter, monkeypatch):
    backbone = build(TINY, CPU)
    params = changed(getattr(SHIPPED.train_adapter, adapter), r=4, lora_alpha=8.0)
    layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, params, ["image", "text"], *layers, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(derive(0, name)))
    assert adapters.depends_on_modality(model) == (adapter == "moda")
    adapters.save(model, tmp_path / "adapter")
    merged: list[str] = []
    real = adapters.merged_modality
    monkeypatch.setattr("sda_core.adapters.saving.merged_modality", lambda m, name: merged.append(name) or real(m, name))
    found = []
    for merge in (False, True):
        again = build(TINY, CPU)
        loaded, context = adapters.load(again.model, tmp_path / "adapter", merge=merge)
        found.append(joint(shop(NUM_ITEMS), again, tmp_path / str(merge), loaded, context, merge=merge).joint_ID)
    np.testing.assert_allclose(found[1], found[0], **up_to_rounding(found[0]))
    assert len(merged) == (adapter == "lora")
    with model.disable_adapter():
        bare = joint(shop(NUM_ITEMS), backbone, tmp_path / "bare", model, lambda name: adapters.modality(model, name))
    assert np.abs(bare.joint_ID - found[0]).max() > 0.01


def test_an_adapter_of_the_vision_tower_is_rejected_where_it_looks_at_the_modality(tmp_path):
    for gate, expected in (("modality", "[0-9]+ layers of the vision tower by the modality"), ("uniform", None)):
        backbone = build(TINY, CPU)
        params = changed(SHIPPED.train_adapter.moda, r=4, gate=gate, targets="language_and_vision")
        layers = backbone.adapter_pattern(params.targets), backbone.num_adapter_layers(params.targets)
        model = adapters.build(backbone.model, params, ["image", "text"], *layers, seed=1)
        if expected is None:
            joint(shop(5), backbone, tmp_path, model, lambda name, model=model: adapters.modality(model, name))
            continue
        with pytest.raises(ConfigError, match=expected) as caught:
            joint(shop(5), backbone, tmp_path, model, lambda name, model=model: adapters.modality(model, name))
        assert "\n" not in str(caught.value)


def test_two_towers_are_rejected_in_one_line(backbone, tmp_path):
    class TwoTowers:
        info, dim, model = backbone.info, backbone.dim, backbone.model
        image_inputs, text_inputs, encode = backbone.image_inputs, backbone.text_inputs, backbone.encode

    with pytest.raises(ConfigError, match=r"joint_embeddings\.variants: a joint pass needs one decoder .* has a tower") as caught:
        joint(shop(5), TwoTowers(), tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- one vector
def test_components_are_those_of_the_singular_value_decomposition():
    joint_ID = random_halves(40, 12)[0]
    fit_ids = np.array([1, 1, *range(3, 31)])
    found = fuse_joint(joint_ID, fit_ids, export_params(fused_dim=5, normalize=False))
    fitted = joint_ID[np.unique(fit_ids) - 1].astype(np.float64)
    axes = np.linalg.svd(fitted - fitted.mean(0))[2][:5]
    expected = (joint_ID - fitted.mean(0)) @ axes.T
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    with pytest.raises(DataError, match=r"should lie in 1\.\.40"):
        fuse_joint(joint_ID, np.array([41]), export_params())


@pytest.mark.parametrize("fusion", ["concat", "mean", "image", "text"])
def test_other_fusions_leave_the_vector_as_it_is(fusion):
    joint_ID = random_halves(10, 6)[0]
    plain = fuse_joint(joint_ID, np.array([1]), export_params(fusion=fusion, normalize=False))
    np.testing.assert_array_equal(plain, joint_ID)
    np.testing.assert_allclose(fuse_joint(joint_ID, np.array([1]), export_params(fusion=fusion)), unit(joint_ID), rtol=1e-5)
