"""Item embeddings: standardising, the merged projector, representations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.recommenders.features import ItemEncoder, Projector, standardise


def _vectors(num_items: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.zeros((num_items + 1, width), dtype=np.float32)
    vectors[1:] = np.random.default_rng(seed).normal(loc=3.0, size=(num_items, width))
    return vectors


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(0, 9))
def test_standardised_vectors_are_centred_of_mean_squared_length_one_and_know_no_scale(num_items, width, scale, seed):
    vectors = _vectors(num_items, width, seed)
    standard = standardise(vectors)
    assert (standard[0] == 0).all()
    np.testing.assert_allclose(standard[1:].mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose((standard[1:] ** 2).sum(axis=1).mean(), 1.0, rtol=1e-4)
    np.testing.assert_allclose(standardise(vectors * np.float32(scale)), standard, atol=1e-3)


def test_standardising_keeps_the_shape_of_the_cloud():
    vectors = _vectors(20, 5)
    standard = standardise(vectors)
    ratio = np.linalg.norm(standard[1] - standard[2:], axis=1) / np.linalg.norm(vectors[1] - vectors[2:], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_items_without_a_vector_stay_at_the_centre_and_do_not_move_the_others():
    vectors = _vectors(30, 6) + 5.0  # far from the origin, like the vectors of a vision-language model
    vectors[0] = 0.0
    is_missing = np.arange(31) % 4 == 1
    vectors[is_missing] = 0.0
    standard = standardise(vectors)
    assert (standard[is_missing] == 0).all()
    kept = np.flatnonzero(vectors.any(axis=1))
    alone = standardise(np.concatenate([np.zeros((1, 6), dtype=np.float32), vectors[kept]]))
    np.testing.assert_array_equal(standard[kept], alone[1:])
    assert (standardise(np.zeros((5, 3), dtype=np.float32)) == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_vectors_become_zero(value):
    vectors = np.full((9, 3), value, dtype=np.float32)
    assert (standardise(vectors) == 0).all()


@pytest.mark.parametrize(("in_size", "inner_size"), [(1, 1), (8, 8), (20, 16), (64, 32), (1536, 768)])
def test_the_projector_equals_its_two_layers(in_size, inner_size):
    torch.manual_seed(0)
    projector = Projector(in_size, 16, 0.02)
    torch.nn.init.normal_(projector.inner.bias)
    torch.nn.init.normal_(projector.outer.bias)
    assert projector.inner.out_features == inner_size
    x_nD = torch.randn(5, in_size)
    torch.testing.assert_close(projector(x_nD), projector.outer(projector.inner(x_nD)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [4, 64, 1024])
def test_projected_embeddings_begin_at_the_scale_of_learned_ones(width):
    torch.manual_seed(0)
    vectors = _vectors(400, width)
    content = ItemEncoder(400, 32, vectors, "content", 0.0).table()[1:]
    learned = ItemEncoder(400, 32, None, "content", 0.0).table()[1:]
    assert content.std().item() == pytest.approx(learned.std().item(), rel=0.35)


def test_representations():
    torch.manual_seed(0)
    vectors = _vectors(6, 3)
    content = ItemEncoder(6, 4, vectors, "content", 0.0)
    both = ItemEncoder(6, 4, vectors, "id+content", 0.0)
    ids = ItemEncoder(6, 4, None, "content", 0.0)
    assert [name for name, _ in ItemEncoder(6, 4, vectors, "id", 0.0).named_parameters()] == ["ids.weight"]
    assert {name for name, _ in content.named_parameters()} == {
        f"projector.{part}" for part in ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    }
    assert [name for name, _ in ids.named_parameters()] == ["ids.weight"]
    assert {name for name, _ in both.named_parameters()} == {"ids.weight", *(name for name, _ in content.named_parameters())}
    both.projector.load_state_dict(content.projector.state_dict())
    torch.testing.assert_close(both.table(), content.table() + both.ids.weight)
    for encoder in (content, both, ids):
        rows = torch.tensor([3, 3, 1, 6])
        torch.testing.assert_close(encoder(rows), encoder.table()[rows])


def test_dropout_has_one_mask_an_item_and_is_off_when_scoring():
    torch.manual_seed(0)
    encoder = ItemEncoder(50, 64, _vectors(50, 3), "id+content", 0.5)
    dropped = encoder.table()[1:]
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    encoder.eval()
    kept = encoder.table()[1:]
    assert not (kept == 0).any()
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


def test_beside_content_an_item_that_training_never_saw_has_no_learned_id():
    torch.manual_seed(0)
    vectors, seen = _vectors(6, 3), torch.tensor([2, 5, 5, 6])
    both = ItemEncoder(6, 4, vectors, "id+content", 0.0)
    before = both.table()
    both.keep_ids_of(seen)
    content = both.projected(torch.arange(7))
    torch.testing.assert_close(both.table()[seen], before[seen])
    unseen = torch.tensor([1, 3, 4])
    torch.testing.assert_close(both.table()[unseen], content[unseen])
    torch.testing.assert_close(both(unseen), content[unseen])
    # no step gives it one: the loss pushes every entry
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.1)
    for rows in (None, torch.arange(1, 7)):
        optimizer.zero_grad()
        (both.table() if rows is None else both(rows)).sum().backward()
        optimizer.step()
    assert not both.ids.weight[unseen].any()
    assert both.ids.weight[seen].all()
    # and a loaded model needs no list
    again = ItemEncoder(6, 4, vectors, "id+content", 0.0)
    again.load_state_dict(both.state_dict())
    torch.testing.assert_close(again.table(), both.table())


@pytest.mark.parametrize(("representation", "has_vectors"), [("id", True), ("content", True), ("id+content", False)])
def test_without_both_every_item_stays_as_it_is(representation, has_vectors):
    torch.manual_seed(0)
    encoder = ItemEncoder(6, 4, _vectors(6, 3) if has_vectors else None, representation, 0.0, 0.0)
    before, names = encoder.table(), set(encoder.state_dict())
    encoder.keep_ids_of(torch.tensor([1]))
    torch.testing.assert_close(encoder.table(), before, rtol=0, atol=0)
    assert set(encoder.state_dict()) == names


def test_ids_are_left_out_as_often_as_asked_and_only_in_training():
    torch.manual_seed(0)
    count = 4_000
    encoder = ItemEncoder(count, 4, _vectors(count, 3), "id+content", 0.0, 0.3)
    encoder.keep_ids_of(torch.arange(1, count))  # the last one was not seen
    content = encoder.projected(torch.arange(count + 1))
    whole = content + encoder.ids.weight
    for table in (encoder.table(), encoder(torch.arange(count + 1))):
        is_content = torch.isclose(table, content, atol=1e-7).all(dim=1)
        assert torch.isclose(table[~is_content], whole[~is_content]).all()
        assert is_content[-1]
        assert abs(is_content[1:].float().mean().item() - 0.3) < 0.03  # four standard deviations
    encoder.eval()
    torch.testing.assert_close(encoder.table(), whole)
