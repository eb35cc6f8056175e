"""Item embeddings: each row is its item, with an adapter, merged, compiled or in half precision."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from sda_core import adapters
from sda_core.backbones import build
from sda_core.embeddings.blocks import EmbeddedItems
from sda_core.embeddings.encoding import embed_items
from sda_core.embeddings.fusion import fuse
from sda_core.errors import DataError
from sda_core.items import ItemSource
from tests.embeddings.noise_shop import (
    CPU,
    TINY,
    NoImages,
    assert_close,
    assert_equal,
    encoded,
    export_params,
    shop,
    unit,
)
from tests.tolerances import up_to_rounding


def test_each_row_is_its_item(backbone, embedded):
    source = shop(30)
    assert embedded.item_ids.tolist() == list(range(1, 31))
    assert embedded.image_ID.shape == embedded.text_ID.shape == (30, backbone.dim)
    assert embedded.image_ID.dtype == embedded.text_ID.dtype == np.float32
    batch = source.batch(np.array([17]))
    with torch.inference_mode():
        text = backbone.encode(backbone.model, backbone.text_inputs(batch.texts)).numpy()[0]
        image = backbone.encode(backbone.model, backbone.image_inputs(batch.images, source.image_prompt)).numpy()[0]
    np.testing.assert_allclose(embedded.text_ID[17], text, **up_to_rounding(text))
    np.testing.assert_allclose(embedded.image_ID[17], image, **up_to_rounding(image))
    distances = np.linalg.norm(embedded.text_ID[:, None] - embedded.text_ID[None], axis=2) + 9 * np.eye(30)
    assert distances.min() > 1e-3, "a mix-up of rows would show"


def test_order_does_not_matter(backbone, embedded, tmp_path):
    order = np.random.default_rng(1).permutation(30)
    shuffled = encoded(shop(30, order=order), backbone, tmp_path)
    np.testing.assert_allclose(shuffled.text_ID, embedded.text_ID[order], **up_to_rounding(embedded.text_ID))


def test_twice_is_byte_equal(backbone, embedded, tmp_path):
    assert_equal(encoded(shop(30), backbone, tmp_path), embedded)


def test_placeholder_counts_as_a_image(backbone, embedded):
    assert embedded.has_image.all()
    assert np.ptp(embedded.image_ID[4::5], axis=0).max() < 1e-5, "all items without an image show the same one"
    assert np.abs(embedded.image_ID[4]).sum() > 0


def test_text_only_leaves_rows_out(backbone, embedded, tmp_path):
    result = encoded(shop(30, missing_image="text_only"), backbone, tmp_path, shard_rows=5)
    absent = np.arange(1, 31) % 5 == 0
    assert np.array_equal(result.has_image, ~absent)
    assert not result.image_ID[absent].any()
    np.testing.assert_allclose(result.image_ID[~absent], embedded.image_ID[~absent], **up_to_rounding(embedded.image_ID))
    np.testing.assert_allclose(result.text_ID, embedded.text_ID, **up_to_rounding(embedded.text_ID))


def test_image_only_leaves_rows_out(backbone, embedded, tmp_path):
    plain, has_text = shop(30), np.arange(1, 31) % 3 != 0
    texts = plain.texts(np.arange(30))
    given = plain.item_ids, texts, plain.image_prompt, plain.prompt_hash, plain.store, "placeholder", has_text
    result = encoded(ItemSource(*given, "image_only"), backbone, tmp_path, shard_rows=5)
    assert np.array_equal(result.has_text, has_text)
    assert result.has_image.all()
    assert not result.text_ID[~has_text].any()
    np.testing.assert_allclose(result.text_ID[has_text], embedded.text_ID[has_text], **up_to_rounding(embedded.text_ID))
    np.testing.assert_allclose(result.image_ID, embedded.image_ID, **up_to_rounding(embedded.image_ID))
    assert_equal(encoded(ItemSource(*given), backbone, tmp_path / "placeholder"), embedded)


def test_no_image_at_all(backbone, tmp_path):
    source = ItemSource(np.arange(1, 4), ["a", "b", "c"], "p", "h", NoImages(), "text_only")
    result = encoded(source, backbone, tmp_path)
    assert not result.has_image.any()
    fused = fuse(result.image_ID, result.text_ID, result.has_image, np.array([1, 2, 3]), export_params(fusion="concat"))
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-6)
    with pytest.raises(DataError, match="no item has an image"):
        fuse(result.image_ID, result.text_ID, result.has_image, np.array([1]), export_params(fusion="image"))


def test_modality_is_set_around_its_passes(backbone, tmp_path):
    active: list[str] = []
    seen: list[tuple[str, bool]] = []

    @contextmanager
    def context(modality: str):
        active.append(modality)
        yield
        active.pop()

    def spy(_module, _arguments, named):
        seen.append((active[-1], "pixel_values" in named))

    hook = backbone.model.model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        encoded(shop(10), backbone, tmp_path, context=context)
    finally:
        hook.remove()
    assert active == []
    assert {("image", True), ("text", False)} == set(seen)


def test_adapted_model_in_its_modality(embedded, adapted, tmp_path):
    fresh, model = adapted

    def run(name: str, context) -> EmbeddedItems:
        result = embed_items(fresh, model, shop(30), export_params(), tmp_path / name, "f", CPU, context)
        assert result is not None
        return result

    with model.disable_adapter():
        assert_close(run("disabled", lambda name: adapters.modality(model, name)), embedded)
    trained = run("trained", lambda name: adapters.modality(model, name))
    assert np.abs(trained.text_ID - embedded.text_ID).max() > 0.01
    assert np.abs(trained.image_ID - embedded.image_ID).max() > 0.01
    swapped = run("swapped", lambda name: adapters.modality(model, {"image": "text", "text": "image"}[name]))
    assert np.abs(swapped.text_ID - trained.text_ID).max() > 1e-3, "the gate looks at the modality"


@pytest.mark.parametrize("sizes", [(1, 8), (3, 30), (32, 7)])
def test_merged_equals_unmerged_whatever_the_batches(adapted, tmp_path, sizes):
    """Written and loaded, as the stage does it; the base weights come back to the bit."""
    fresh, model = adapted
    unmerged = embed_items(
        fresh, model, shop(30), export_params(), tmp_path / "a", "f", CPU, lambda name: adapters.modality(model, name)
    )
    adapters.save(model, tmp_path / "adapter")
    again = build(TINY, CPU)
    before = {name: weight.clone() for name, weight in again.model.state_dict().items()}
    loaded, context = adapters.load(again.model, tmp_path / "adapter", merge=True)
    changes = {"batch_size": sizes[0], "shard_rows": sizes[1]}
    merged = embed_items(again, loaded, shop(30), export_params(**changes), tmp_path / "b", "f", CPU, context)
    assert unmerged is not None
    assert merged is not None
    assert_close(merged, unmerged)
    after = {name.replace(".base_layer", ""): weight for name, weight in again.model.state_dict().items() if "moda_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_happens_once_a_modality_and_only_for_what_is_left(adapted, tmp_path):
    fresh, model = adapted
    entered: list[str] = []

    def context(name: str):
        entered.append(name)
        return adapters.merged_modality(model, name)

    for expected in (["image", "text"], []):
        entered.clear()
        embed_items(fresh, model, shop(30), export_params(), tmp_path, "f", CPU, context)
        assert entered == expected
    (tmp_path / "text-00001.safetensors").unlink()
    embed_items(fresh, model, shop(30), export_params(), tmp_path, "f", CPU, context)
    assert entered == ["text"]


def test_half_precision(adapted, tmp_path):
    """bfloat16 weights give float32 vectors near the full ones, merged or not."""
    fresh, model = adapted
    full, half = (
        embed_items(fresh, model.to(dtype), shop(12), export_params(), tmp_path / str(dtype), "f", CPU, context)
        for dtype, context in (
            (torch.float32, lambda name: adapters.modality(model, name)),
            (torch.bfloat16, lambda name: adapters.merged_modality(model, name)),
        )
    )
    for exact, rounded in ((full.image_ID, half.image_ID), (full.text_ID, half.text_ID)):
        assert rounded.dtype == np.float32
        assert (np.sum(unit(exact) * unit(rounded), axis=1) > 0.99).all()
        assert np.abs(exact - rounded).max() > 1e-4, "it did run in half precision"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.compile needs AVX2 or newer on x86")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_equals_eager(adapted, tmp_path, monkeypatch):
    """The texts only: the compiler works for seconds, and images go through the same layers."""
    # The compiler's cache does not tell instruction sets apart: what was compiled for another one can give NaN.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    fresh, model = adapted
    source = ItemSource(np.arange(1, 17), ["good " * place for place in range(16)], "p", "h", NoImages(), "text_only")
    vectors: list[np.ndarray] = []
    counters = torch._dynamo.utils.counters
    counters.clear()  # of other tests
    for compiled in (False, True):
        params = export_params(compile=compiled, batch_size=8, shard_rows=16)
        resume = tmp_path / str(compiled)
        result = embed_items(fresh, model, source, params, resume, "f", CPU, lambda name: adapters.merged_modality(model, name))
        assert result is not None
        vectors.append(result.text_ID)
    np.testing.assert_allclose(vectors[1], vectors[0], **up_to_rounding(vectors[0]))
    assert counters["stats"]["unique_graphs"] > 0, "it was compiled"
    assert not counters["graph_break"]


def test_model_is_put_into_evaluation_mode(backbone, embedded, tmp_path):
    backbone.model.train()
    assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
    assert not backbone.model.training
