"""The training loop: early stopping, resuming after a kill, the first losses."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sda_core.errors import ConfigError, TrainingError
from sda_core.recommenders import build, training_data
from sda_core.recommenders.batches import validation_view
from sda_core.recommenders.position import count_positions, ndcg_at_10

CPU = torch.device("cpu")

_CHILD = """
import sys
from pathlib import Path
import numpy as np, polars as pl, torch
from pydantic import TypeAdapter
from sda_core.params import RecommenderParams
from sda_core.recommenders import build, training_data

folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))  # another number gives other last bits
params = TypeAdapter(RecommenderParams).validate_json((folder / "params.json").read_text())
data = training_data(pl.read_parquet(folder / "interactions.parquet"))
model = build(params, data.num_users, data.num_items, np.load(folder / "vectors.npy"), seed=5)
model.fit(data, checkpoint=folder / "checkpoint.safetensors", fingerprint="f", device=torch.device("cpu"))
(folder / "finished").touch()
"""


@pytest.mark.parametrize("name", ["vbpr", "slmrec-fd+fm", "sasrec-id+content", "bert4rec-content"])
def test_a_killed_run_ends_as_an_undisturbed_one(name, checkerboard, recommender_cases, tmp_path, repository):
    interactions, vectors = checkerboard
    params = recommender_cases[name][0].model_copy(update={"max_epochs": 40, "patience": 40, "eval_every": 3})
    data = training_data(interactions)
    undisturbed = build(params, data.num_users, data.num_items, vectors, seed=5)
    expected = undisturbed.fit(data, checkpoint=tmp_path / "other.safetensors", fingerprint="f", device=CPU)

    interactions.write_parquet(tmp_path / "interactions.parquet")
    (tmp_path / "params.json").write_text(params.model_dump_json())
    np.save(tmp_path / "vectors.npy", vectors, allow_pickle=False)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", _CHILD, str(tmp_path), str(torch.get_num_threads())]
    child = subprocess.Popen(command, env=environment)
    checkpoint = tmp_path / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert child.poll() is None, "the child ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "finished").exists()

    # Other weights to begin with: all that counts must come from the checkpoint.
    resumed = build(params, data.num_users, data.num_items, vectors, seed=77)
    resumed.seed = 5
    records = resumed.fit(data, checkpoint=checkpoint, fingerprint="f", device=CPU)
    assert records == expected
    for key, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_a_checkpoint_of_other_inputs_is_ignored(checkerboard, recommender_cases, tmp_path, caplog):
    params = recommender_cases["bpr"][0].model_copy(update={"max_epochs": 4})
    data = training_data(checkerboard[0])
    runs = []
    for fingerprint in ("a", "b", "b"):
        model = build(params, 48, 24, None, seed=5)
        with caplog.at_level(logging.INFO):
            caplog.clear()
            runs.append(model.fit(data, checkpoint=tmp_path / "c", fingerprint=fingerprint, device=CPU))
    assert runs[0] == runs[1] == runs[2]
    assert "resumed after epoch 4" in caplog.text  # the third; it had nothing left to do


def test_the_best_weights_are_put_back(checkerboard, recommender_cases, tmp_path):
    """A learning rate that overshoots: validation falls after its best, and training stops `patience` evaluations later."""
    params = recommender_cases["sasrec-id"][0].model_copy(update={"max_epochs": 80, "patience": 3, "eval_every": 2})
    data = training_data(checkerboard[0])
    model = build(params, 48, 24, None, seed=5)
    records = model.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)
    evaluated = [record for record in records if record.valid_ndcg_10 is not None]
    assert [record.epoch for record in evaluated] == list(range(2, len(records) + 1, 2))
    best = max(evaluated, key=lambda record: (record.valid_ndcg_10, -record.epoch))
    assert [record.epoch for record in evaluated if record.is_best][-1] == best.epoch
    assert len(records) == best.epoch + 2 * 3 < 80
    assert ndcg_at_10(count_positions(model, validation_view(data), None, 16, CPU)) == best.valid_ndcg_10


def test_stopping_early_does_not_depend_on_where_a_run_was_resumed(checkerboard, recommender_cases, tmp_path):
    """Cut off after any evaluation, before, at and after the best one, and made again."""
    params = recommender_cases["sasrec-id"][0].model_copy(update={"max_epochs": 80, "patience": 3, "eval_every": 2})
    data = training_data(checkerboard[0])
    undisturbed = build(params, 48, 24, None, seed=5)
    expected = undisturbed.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)
    for num_epochs in range(2, len(expected), 2):
        cut_off = build(params.model_copy(update={"max_epochs": num_epochs}), 48, 24, None, seed=5)
        cut_off.fit(data, checkpoint=tmp_path / f"{num_epochs}", fingerprint="f", device=CPU)
        resumed = build(params, 48, 24, None, seed=77)
        resumed.seed = 5
        assert resumed.fit(data, checkpoint=tmp_path / f"{num_epochs}", fingerprint="f", device=CPU) == expected
        for key, tensor in undisturbed.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", ["bpr", "sasrec-id", "bert4rec-id"])
def test_a_loss_that_is_not_finite_is_an_error(name, checkerboard, recommender_cases, tmp_path):
    params = recommender_cases[name][0].model_copy(update={"learning_rate": 1e38})
    model = build(params, 48, 24, None, seed=5)
    with pytest.raises(TrainingError, match=r"the loss of epoch \d+ is (nan|inf); lower learning_rate"):
        model.fit(training_data(checkerboard[0]), checkpoint=tmp_path / "c", fingerprint="f", device=CPU)


def test_nothing_to_train_on_is_an_error(make_table, recommender_cases, tmp_path):
    data = training_data(make_table([[1, 2, 3], [3, 2, 1]]))  # one training item each: no transition
    model = build(recommender_cases["sasrec-id"][0], 2, 3, None, seed=5)
    with pytest.raises(TrainingError, match="no user has two training interactions"):
        model.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)


def test_heads_must_divide_the_hidden_size(recommender_cases):
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        build(recommender_cases["sasrec-id"][0].model_copy(update={"num_heads": 3}), 2, 3, None, seed=5)


def test_training_rows_by_hand(make_table, recommender_cases):
    params = recommender_cases["sasrec-id"][0].model_copy(update={"max_length": 3})
    data = training_data(make_table([[1, 2, 3, 4, 5, 6, 7], [5, 4, 1, 1]]))  # training: 1 2 3 4 5 and 5 4
    model = build(params, 2, 7, None, seed=5)
    rows = [
        (history, target)
        for batch in model.batches(data, np.random.default_rng(0))
        for history, target in [(batch["history_BL"].tolist(), batch["target_P"].tolist())]
    ]
    assert rows == [([[0, 0, 5], [2, 3, 4]], [4, 3, 4, 5])]  # the latest three transitions

    bert_params = recommender_cases["bert4rec-id"][0].model_copy(update={"max_length": 3, "last_item_mask_share": 1.0})
    bert = build(bert_params, 2, 7, None, seed=5)
    (batch,) = bert.batches(data, np.random.default_rng(0))
    assert batch["history_BL"].tolist() == [[0, 5, 8], [3, 4, 8]]
    assert batch["target_P"].tolist() == [4, 5]
    random_params = bert_params.model_copy(update={"last_item_mask_share": 0.0, "mask_probability": 0.5})
    bert = build(random_params, 2, 7, None, seed=5)
    masked = 0
    for seed in range(200):
        (batch,) = bert.batches(data, np.random.default_rng(seed))
        history, is_target = batch["history_BL"], batch["is_target_BL"]
        assert (is_target.sum(dim=1) >= 1).all()
        assert torch.equal(history == 8, is_target)
        assert torch.where(is_target, 0, history).tolist() != history.tolist()
        restored = history.clone()
        restored[is_target] = batch["target_P"]
        assert restored.tolist() == [[0, 5, 4], [3, 4, 5]]
        masked += int(is_target.sum())
    # five items at 1/2, and the last where none was hit: 5/2 + 1/4 + 1/8 a batch on average
    assert masked / 200 == pytest.approx(2.875, abs=0.25)


def test_negatives_are_never_the_target(recommender_cases):
    params = recommender_cases["sasrec-bce"][0].model_copy(update={"num_negatives": 2})
    model = build(params, 2, 4, None, seed=5)
    target = np.resize([1, 2, 4], 3_000)
    drawn = model.draw_negatives(target, np.random.default_rng(0))
    assert drawn.shape == (3_000, 2)
    assert not (drawn == target[:, None]).any()
    assert np.bincount(drawn[target == 2].ravel(), minlength=5)[[1, 3, 4]].min() > 550  # 2,000 draws over three items
    shared = build(params.model_copy(update={"loss": "gbce", "num_negatives": 50}), 2, 4, None, seed=5).draw_negatives(
        target, np.random.default_rng(0)
    )
    assert shared.shape == (50,)
    assert set(shared) == {1, 2, 3, 4}


GOLDEN = {
    "vbpr-id": [0.69383, 0.65533, 0.57026],
    "vbpr": [0.67612, 0.53310, 0.31431],
    "sasrec-id": [2.18148, 2.15735, 2.13929],
    "sasrec-content": [2.06766, 1.84149, 1.74930],
    "sasrec-bce": [0.69528, 0.68867, 0.66785],
    "sasrec-gbce": [0.62357, 0.58712, 0.54252],
    "bert4rec-id": [3.18533, 3.16216, 3.12685],
    "bert4rec-content": [3.17316, 2.98498, 2.76050],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses(name, checkerboard, recommender_cases, tmp_path):
    """A change of these numbers changes every result: it belongs into the change log."""
    params, has_vectors = recommender_cases[name]
    params = params.model_copy(update={"max_epochs": 3, "eval_every": 3})
    model = build(params, 48, 24, checkerboard[1] if has_vectors else None, seed=5)
    records = model.fit(training_data(checkerboard[0]), checkpoint=tmp_path / "c", fingerprint="f", device=CPU)
    assert [record.loss for record in records] == pytest.approx(GOLDEN[name], rel=2e-3)


@pytest.mark.parametrize("name", ["sasrec-content", "slmrec", "vbpr"])
def test_bfloat16_is_used_in_training_and_leaves_weights_and_scores_in_float32(name, checkerboard, recommender_cases, tmp_path):
    data = training_data(checkerboard[0])
    losses = []
    for dtype in ("float32", "bfloat16"):
        params = recommender_cases[name][0].model_copy(update={"max_epochs": 2, "eval_every": 2, "dtype": dtype})
        model = build(params, 48, 24, checkerboard[1], seed=5)
        losses.append([record.loss for record in model.fit(data, checkpoint=tmp_path / dtype, fingerprint="f", device=CPU)])
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert model.score(torch.tensor([1]), torch.tensor([[1, 2]])).dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
