"""What every recommender must do; a new one is one more case in conftest.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from sda_core.errors import ArtifactError, DataError, TrainingError
from sda_core.params import FitParams
from sda_core.ranking import place, place_targets
from sda_core.recommenders import build, evaluation_data, load, training_data
from tests.tolerances import up_to_rounding

CPU = torch.device("cpu")
WITHOUT_FACTORS = ("pop", "nearest-id", "nearest-id+content")  # whose scores are not inner products


def _fit_short(params, data, vectors, folder: Path):
    """A fresh fit of three epochs."""
    if isinstance(params, FitParams):
        params = params.model_copy(update={"max_epochs": 3, "eval_every": 1})
    recommender = build(params, data.num_users, data.num_items, vectors, seed=5)
    records = recommender.fit(data, checkpoint=folder / "checkpoint.safetensors", fingerprint="f", device=CPU)
    return recommender, records


def _some_scores(recommender, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    history = random.integers(1, recommender.num_items + 1, size=(6, 5))
    history[0], history[1, :3] = 0, 0
    users = random.integers(0, recommender.num_users + 1, size=6)
    return recommender.score(torch.from_numpy(users), torch.from_numpy(history))


def test_beats_chance_on_a_checkerboard(case, fitted, checkerboard):
    if case == "pop":
        pytest.skip("popularity knows no taste; see test_pop.py")
    if case == "sasrec-bidirectional":
        pytest.skip(
            "its training targets are visible to it: it may learn to copy, and is here for comparison with the paper only"
        )
    recommender, _, _ = fitted(case)
    data = evaluation_data(checkerboard[0])
    placed = place_targets(recommender, data, None, 7, CPU)
    assert placed["candidates"].to_list() == [14] * 48
    # 14 candidates, two of the right kind: chance puts 2/14 of the targets among the first two, knowing the kind all.
    hits = (placed["num_better"] + placed["num_tied"] < 2).mean()
    assert hits > 0.6, f"hit@2 {hits:.3f} (chance 0.143)"


def test_padding_has_no_score_and_items_have_finite_ones(case, fitted):
    recommender, _, _ = fitted(case)
    scores = _some_scores(recommender)
    assert scores.shape == (6, recommender.num_items + 1)  # no column for a mask
    assert (scores[:, 0] == -torch.inf).all()
    assert torch.isfinite(scores[:, 1:]).all()


def test_scores_are_the_inner_products_of_queries_and_items(case, fitted):
    recommender, _, _ = fitted(case)
    random = np.random.default_rng(3)
    history = torch.from_numpy(random.integers(0, recommender.num_items + 1, size=(9, 14)))
    users = torch.from_numpy(random.integers(0, recommender.num_users + 1, size=9))
    items = recommender.item_matrix()
    if case in WITHOUT_FACTORS:
        assert items is None
        return
    queries = recommender.queries(users, history)
    assert queries.shape == (9, items.shape[1])
    assert len(items) == recommender.num_items + 1
    assert not queries.requires_grad
    assert not items.requires_grad
    expected = recommender.score(users, history)
    torch.testing.assert_close((queries @ items.T)[:, 1:], expected[:, 1:], **up_to_rounding(expected[:, 1:]))
    assert recommender.queries(users[:0], history[:0]).shape == (0, items.shape[1])


def test_positions_through_an_exact_index_are_the_exact_ones(case, fitted, checkerboard, retrieval_params):
    """Up to the depth; a target that is not found is last."""
    recommender, _, _ = fitted(case)
    data = evaluation_data(checkerboard[0])
    exact = place_targets(recommender, data, None, 7, CPU)
    placed, told = place(recommender, data, None, retrieval_params(depth=24), CPU)
    assert placed.equals(exact)
    assert placed.schema == exact.schema
    assert told == ({} if case in WITHOUT_FACTORS else {"retrieval_recall@10": 1.0})
    placed, _ = place(recommender, data, None, retrieval_params(depth=1), CPU)
    if case in WITHOUT_FACTORS:  # all scores are computed
        assert placed.equals(exact)
        return
    is_first = (exact["num_better"] + exact["num_tied"] == 0).to_numpy()
    assert is_first.any()
    assert not is_first.all()
    assert placed.filter(is_first).equals(exact.filter(is_first))
    last = placed.filter(~is_first)
    assert (last["num_better"] == last["candidates"] - 1).all()
    assert (last["num_tied"] == 0).all()
    assert last["candidates"].equals(exact.filter(~is_first)["candidates"])


def test_never_recommends_padding_or_seen_items(case, fitted):
    recommender, _, data = fitted(case)
    users = np.arange(1, data.num_users + 1)
    history = torch.from_numpy(data.train.last(users, 15).astype(np.int64))
    items, scores = recommender.recommend(torch.from_numpy(users), history, 100)
    assert items.shape == (data.num_users, data.num_items)  # capped at the catalogue
    for row, user in enumerate(users):
        seen = set(data.train.of(user).tolist())
        recommended = items[row][scores[row] > -torch.inf].tolist()
        assert not seen & set(recommended)
        assert sorted(recommended) == sorted(set(range(1, data.num_items + 1)) - seen)
        assert (items[row][scores[row] == -torch.inf] == 0).all()


def test_save_and_load_give_the_same_scores(case, fitted, checkerboard, recommender_cases, tmp_path):
    recommender, _, _ = fitted(case)
    vectors = checkerboard[1] if recommender_cases[case][1] else None
    recommender.save(tmp_path / "a")
    recommender.save(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model.json", "model.safetensors"]
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = load(tmp_path / "a", vectors, CPU)
    assert torch.equal(_some_scores(again), _some_scores(recommender))
    assert (again.params, again.seed) == (recommender.params, 5)


def test_content_vectors_are_not_saved(fitted, tmp_path):
    recommender, _, _ = fitted("sasrec-content")
    assert not [name for name in recommender.state_dict() if "vectors" in name]
    recommender.save(tmp_path)
    with pytest.raises(ArtifactError, match="other item vectors"):
        load(tmp_path, np.zeros((25, 7), dtype=np.float32), CPU)


def test_loading_a_damaged_model_says_so(fitted, tmp_path):
    recommender, _, _ = fitted("vbpr-id")
    with pytest.raises(ArtifactError, match="missing"):
        load(tmp_path, None, CPU)
    recommender.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path, None, CPU)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "model.json").write_text(text.replace('"num_items": 24', '"num_items": 23'))
    with pytest.raises(ArtifactError, match="does not fit"):
        load(tmp_path, None, CPU)
    (tmp_path / "model.json").write_text(text.replace('"factor_size"', '"factorsize"'))
    with pytest.raises(ArtifactError, match=r"model.json: params"):
        load(tmp_path, None, CPU)


def test_two_fits_are_bit_equal(case, checkerboard, recommender_cases, tmp_path):
    params, has_vectors = recommender_cases[case]
    data = training_data(checkerboard[0])
    vectors = checkerboard[1] if has_vectors else None
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, records_one = _fit_short(params, data, vectors, tmp_path / "a")
    torch.rand(17)  # the global generator's state must not matter
    two, records_two = _fit_short(params, data, vectors, tmp_path / "b")
    assert records_one == records_two
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_fit_leaves_the_global_generator_alone(checkerboard, recommender_cases, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _fit_short(recommender_cases["sasrec-id"][0], training_data(checkerboard[0]), None, tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_test_rows_change_nothing(case, checkerboard, recommender_cases, tmp_path):
    """A planted test item that occurs nowhere else leaves no trace in the data, the weights or the curve."""
    interactions, vectors = checkerboard
    planted = interactions.with_columns(
        item_id=pl.when((pl.col("split") == "test") & (pl.col("user_id") % 3 == 0))
        .then(pl.lit(24, pl.Int32))
        .otherwise(pl.col("item_id"))
    ).filter(~((pl.col("item_id") == 24) & (pl.col("split") != "test")))
    params, has_vectors = recommender_cases[case]
    with_test = training_data(planted, num_users=48, num_items=24)
    without_test = training_data(planted.filter(pl.col("split") != "test"), num_users=48, num_items=24)
    assert 24 not in with_test.train.item_ids
    assert 24 not in with_test.valid_target
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, records_one = _fit_short(params, with_test, vectors if has_vectors else None, tmp_path / "a")
    two, records_two = _fit_short(params, without_test, vectors if has_vectors else None, tmp_path / "b")
    assert records_one == records_two
    assert torch.equal(_some_scores(one), _some_scores(two))


def test_causal_models_do_not_see_the_future(case, fitted):
    recommender, _, _ = fitted(case)
    if not hasattr(recommender, "states"):
        pytest.skip("has no positions")
    random = np.random.default_rng(4)
    history = torch.from_numpy(random.integers(1, 25, size=(8, 9)))
    history[3, :4] = 0
    changed = history.clone()
    changed[:, 6:] = torch.from_numpy(random.integers(1, 25, size=(8, 3)))
    table = recommender.item_table()
    with torch.no_grad():
        before = recommender.states(table[history], history)[:, :6]
        after = recommender.states(table[changed], changed)[:, :6]
    is_item = history[:, :6] != 0
    if recommender.is_causal:
        torch.testing.assert_close(after[is_item], before[is_item], **up_to_rounding(before[is_item]))
    else:
        assert (after - before)[is_item].abs().amax() > 1e-3, "a model that is not causal should see it"


def test_padding_is_never_attended_to(case, fitted):
    """More padding on the left, or a batch with longer histories, leaves the scores as they are."""
    recommender, _, _ = fitted(case)
    history = torch.tensor([[3, 5, 9], [0, 7, 1], [0, 0, 2], [0, 0, 0]])
    users = torch.tensor([1, 2, 3, 4])
    padded = torch.nn.functional.pad(history, (6, 0))
    expected = recommender.score(users, history)
    torch.testing.assert_close(recommender.score(users, padded)[:, 1:], expected[:, 1:], **up_to_rounding(expected[:, 1:]))
    if recommender.history_length == 0:
        return
    cut = recommender.score(
        users[:1], torch.cat([torch.arange(1, 25)[None], history[:1]], dim=1)[:, -recommender.history_length :]
    )
    full = recommender.score(users[:1], torch.cat([torch.arange(1, 25)[None], history[:1]], dim=1))
    torch.testing.assert_close(full[:, 1:], cut[:, 1:], **up_to_rounding(cut[:, 1:]))


@pytest.mark.parametrize("name", ["sasrec-content", "sasrec-bidirectional", "bert4rec-content"])
def test_permuting_items_permutes_the_scores(name, fitted, checkerboard, recommender_cases):
    """Content alone, tied: no weight belongs to an item, so the same weights on renamed items give renamed scores."""
    recommender, _, data = fitted(name)
    params, _ = recommender_cases[name]
    renamed = np.concatenate([[0], 1 + np.random.default_rng(6).permutation(24)])
    vectors = np.zeros_like(checkerboard[1])
    vectors[renamed] = checkerboard[1]
    other = build(params, data.num_users, data.num_items, vectors, seed=5)
    other.load_state_dict(recommender.state_dict())
    users = torch.arange(1, 9)
    history = torch.from_numpy(data.train.last(users.numpy(), 8).astype(np.int64))
    expected = recommender.score(users, history)
    torch.testing.assert_close(other.score(users, torch.from_numpy(renamed)[history])[:, renamed], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 33])
@pytest.mark.parametrize(
    "name", ["vbpr", "slmrec", "sasrec-content", "sasrec-id+content", "bert4rec-content", "nearest-content", "nearest-id+content"]
)
def test_vectors_of_any_width_and_scale(name, width, checkerboard, recommender_cases, tmp_path):
    data = training_data(checkerboard[0])
    for folder, scale in (("small", 1e-4), ("large", 1e4)):
        (tmp_path / folder).mkdir()
        vectors = np.zeros((25, width), dtype=np.float32)
        vectors[1:] = scale * np.random.default_rng(7).normal(size=(24, width))
        recommender, records = _fit_short(recommender_cases[name][0], data, vectors, tmp_path / folder)
        found = records[0].loss if records[0].loss is not None else records[0].valid_ndcg_10
        if folder == "small":
            first = found
        assert found == pytest.approx(first, rel=1e-3)
        assert torch.isfinite(_some_scores(recommender)[:, 1:]).all()


@pytest.mark.parametrize("vectors", [np.ones((24, 3)), np.ones(25), np.full((25, 3), np.nan)], ids=["rows", "shape", "nan"])
def test_vectors_that_do_not_fit_are_refused(vectors, recommender_cases):
    with pytest.raises(DataError, match="item vectors"):
        build(recommender_cases["sasrec-content"][0], 48, 24, vectors.astype(np.float32), seed=5)


def test_data_of_another_size_is_refused(case, checkerboard, recommender_cases, tmp_path):
    recommender = build(recommender_cases[case][0], 48, 23, None, seed=5)
    with pytest.raises(TrainingError, match="24 items, expected 48 and 23"):
        recommender.fit(training_data(checkerboard[0]), checkpoint=tmp_path / "c", fingerprint="f", device=CPU)


def test_one_user_with_a_long_history(case, make_table, recommender_cases, tmp_path):
    data = training_data(make_table([[1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 5, 7, 10, 11]]), num_items=11)
    params, has_vectors = recommender_cases[case]
    vectors = np.concatenate([np.zeros((1, 4)), np.random.default_rng(8).normal(size=(11, 4))]).astype(np.float32)
    recommender, _ = _fit_short(params, data, vectors if has_vectors else None, tmp_path)
    assert torch.isfinite(recommender.score(torch.tensor([1]), torch.tensor([[1, 2]]))[:, 1:]).all()


def test_one_item(case, make_table, recommender_cases, tmp_path):
    """A catalogue of one: nothing to learn, but nothing to break either (BPR and its kin have no negative and say so)."""
    data = training_data(make_table([[1, 1, 1, 1]] * 3))
    params, has_vectors = recommender_cases[case]
    vectors = np.array([[0.0, 0.0], [1.0, 2.0]], dtype=np.float32)
    if params.kind in {"bpr", "vbpr", "slmrec"}:
        with pytest.raises(TrainingError, match="every user has every item"):
            _fit_short(params, data, vectors if has_vectors else None, tmp_path)
        return
    recommender, _ = _fit_short(params, data, vectors if has_vectors else None, tmp_path)
    scores = recommender.score(torch.tensor([1]), torch.tensor([[1]]))
    assert scores.shape == (1, 2)
    assert torch.isfinite(scores[0, 1])


def test_users_without_validation_target(case, make_table, recommender_cases, tmp_path):
    """Some have none: they are trained on, and not evaluated.  All have none: every epoch runs, the last weights count."""
    interactions = make_table([[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [6, 5, 4, 3, 2]])
    params, _ = recommender_cases[case]
    some = training_data(interactions.filter((pl.col("user_id") == 1) | (pl.col("split") != "valid")))
    assert some.valid_target.tolist() == [0, 4, 0, 0]
    (tmp_path / "some").mkdir()
    recommender, records = _fit_short(params, some, None, tmp_path / "some")
    none = training_data(interactions.filter(pl.col("split") == "train"))
    (tmp_path / "none").mkdir()
    recommender, records = _fit_short(params, none, None, tmp_path / "none")
    if isinstance(params, FitParams):
        assert [(record.epoch, record.valid_ndcg_10, record.is_best) for record in records] == [
            (epoch, None, True) for epoch in (1, 2, 3)
        ]
    assert torch.isfinite(_some_scores(recommender)[:, 1:]).all()


def test_leaked_items_are_refused_by_all_but_pop_all(case, checkerboard, recommender_cases, tmp_path, caplog):
    data = training_data(checkerboard[0], leaked_test_items=np.array([1, 2]))
    assert "not comparable" in caplog.text
    recommender = build(recommender_cases[case][0], 48, 24, None, seed=5)
    with pytest.raises(TrainingError, match="was given test interactions"):
        recommender.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)


def test_empty_history_and_unknown_user_have_scores(case, fitted):
    recommender, _, _ = fitted(case)
    scores = recommender.score(torch.tensor([0, 1]), torch.zeros((2, 0), dtype=torch.int64))
    assert torch.isfinite(scores[:, 1:]).all()
