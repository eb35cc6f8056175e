"""The sides of the comparison of recommenders; each runs with a separate Python in which only its library is installed.

    PYTHON bench/recommender_sides.py FOLDER '{"side": ..., "model": ..., "loss": ..., "batch": ..., "epochs": ...}'

Reads ``rows.npz`` of the folder and writes ``result.json`` there.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = dict[str, Array]  # user, item (both from 1), time, split (0 train, 1 valid, 2 test): one entry per interaction
SHAPE = {"hidden": 64, "blocks": 1, "heads": 1, "length": 50, "dropout": 0.2, "learning_rate": 1e-3, "mask_probability": 0.3}
FACTORS, CONTENT_WIDTH, PAIRS_PER_BATCH, USERS_PER_CHUNK = 32, 64, 1024, 256
K = 10


def vectors_for(num_items: int) -> Array:
    """Random content vectors ``(I + 1, CONTENT_WIDTH)``; row 0 is zero."""
    vectors = np.random.default_rng(0).normal(size=(num_items + 1, CONTENT_WIDTH)).astype(np.float32)
    vectors[0] = 0.0
    return vectors


def ndcg(best: dict[int, list[int]], rows: Rows) -> float:
    """Mean NDCG@10 of the test targets, from the best items of each user."""
    is_test = rows["split"] == 2
    gains = []
    for user, item in zip(rows["user"][is_test].tolist(), rows["item"][is_test].tolist(), strict=True):
        found = best.get(user, [])[:K]
        gains.append(1.0 / np.log2(found.index(item) + 2) if item in found else 0.0)
    return float(np.mean(gains))


# -------------------------------------------------------------------------------------------------------------- sides
def run_ours(model_name: str, loss: str, batch: int, epochs: int, rows: Rows) -> dict[str, Any]:
    """This project, with its own epoch and evaluation."""
    import polars as pl
    import torch

    from sda_core import evaluation, ranking, recommenders
    from sda_core.params import BERT4RecParams, RuntimeParams, SASRecParams, VBPRParams
    from sda_core.recommenders.adam import Adam
    from sda_core.recommenders.fit import TrainedRecommender, train_epoch
    from sda_core.runtime import prepare_torch

    device = prepare_torch(RuntimeParams(device="cpu", num_threads=1, num_trainings=1))
    fit: dict[str, Any] = {
        "max_epochs": epochs, "patience": 1, "eval_every": 1, "batch_size": batch, "weight_decay": 0.0,
        "learning_rate": SHAPE["learning_rate"], "dtype": "float32",
    }  # fmt: skip
    sequence: dict[str, Any] = fit | {
        "representation": "id", "hidden_size": SHAPE["hidden"], "num_blocks": SHAPE["blocks"], "num_heads": SHAPE["heads"],
        "max_length": SHAPE["length"], "dropout": SHAPE["dropout"], "loss": loss, "num_negatives": 1, "gbce_t": 0.75,
        "id_dropout": 0.0, "new_item_cost": None,
        "align_weight": 0.0, "align_temperature": 2.0,
    }  # fmt: skip
    params: SASRecParams | BERT4RecParams | VBPRParams
    if model_name == "sasrec":
        params = SASRecParams(kind="sasrec", causal=True, **sequence)
    elif model_name == "bert4rec":
        params = BERT4RecParams(kind="bert4rec", mask_probability=SHAPE["mask_probability"], last_item_mask_share=0.0, **sequence)
    else:
        params = VBPRParams(
            kind="vbpr", factor_size=FACTORS, content_factor_size=FACTORS, embedding_regularization=0.01,
            content_item_regularization=0.0, content_regularization=0.01, content_bias_regularization=0.01, **fit,
        )  # fmt: skip
    interactions = pl.DataFrame(
        {
            "user_id": rows["user"].astype(np.int32),
            "item_id": rows["item"].astype(np.int32),
            "timestamp": rows["time"].astype(np.int64),
            "rating": np.full(len(rows["user"]), 5.0, dtype=np.float32),
            "split": np.array(["train", "valid", "test"])[rows["split"]],
        }
    )
    data = recommenders.training_data(interactions)
    torch.manual_seed(0)
    model = recommenders.build(
        params, data.num_users, data.num_items, vectors_for(data.num_items) if model_name == "vbpr" else None, seed=0
    )
    optimizer = Adam(model.parameters(), params.learning_rate, params.weight_decay)
    assert isinstance(model, TrainedRecommender)
    seconds = [timed(lambda epoch=epoch: train_epoch(model, data, optimizer, epoch, device)) for epoch in range(1, epochs + 1)]

    def evaluate() -> float:
        placed = ranking.place_targets(model, recommenders.evaluation_data(interactions), None, USERS_PER_CHUNK, device)
        return evaluation.ndcg(evaluation.score_positions(placed, "pessimistic")["position"].to_numpy(), K)

    begin = time.process_time()
    quality = evaluate()
    return {"epochs": seconds, "evaluation": time.process_time() - begin, "ndcg": quality, "versions": versions("torch")}


def run_rectools(model_name: str, loss: str, batch: int, epochs: int, rows: Rows) -> dict[str, Any]:
    """RecTools: epochs are measured by hooks of its trainer; the evaluation is ``recommend`` for all test users."""
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds: list[float] = []

    class Clock(Callback):
        """Measures the duration of epochs."""

        def on_train_epoch_start(self, *_: Any) -> None:
            self.begin = time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            seconds.append(time.process_time() - self.begin)

    def trainer() -> Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
        return Trainer(max_epochs=epochs, min_epochs=epochs, accelerator="cpu", devices=1, callbacks=[Clock()], **quiet)

    frame = pd.DataFrame(
        {
            Columns.User: rows["user"],
            Columns.Item: rows["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(rows["time"], unit="D"),
        }
    )
    common: dict[str, Any] = {
        "n_blocks": SHAPE["blocks"], "n_heads": SHAPE["heads"], "n_factors": SHAPE["hidden"], "dropout_rate": SHAPE["dropout"],
        "session_max_len": SHAPE["length"], "lr": SHAPE["learning_rate"], "batch_size": batch, "get_trainer_func": trainer,
        "loss": {"softmax": "softmax", "bce": "BCE"}[loss], "n_negatives": 1, "recommend_batch_size": USERS_PER_CHUNK,
        "recommend_torch_device": "cpu",
    }  # fmt: skip
    model = SASRecModel(**common) if model_name == "sasrec" else BERT4RecModel(mask_prob=SHAPE["mask_probability"], **common)
    model.fit(Dataset.construct(frame[rows["split"] == 0]))
    begin = time.process_time()
    found = model.recommend(
        users=np.unique(rows["user"][rows["split"] == 2]),
        dataset=Dataset.construct(frame[rows["split"] < 2]),
        k=K,
        filter_viewed=True,
        on_unsupported_targets="ignore",
    )
    spent = time.process_time() - begin
    best = found.sort_values([Columns.User, Columns.Rank]).groupby(Columns.User)[Columns.Item].agg(list).to_dict()
    return {"epochs": seconds, "evaluation": spent, "ndcg": ndcg(best, rows), "versions": versions("rectools", "torch")}


def run_recbole(model_name: str, loss: str, batch: int, epochs: int, rows: Rows) -> dict[str, Any]:
    """RecBole: epochs and evaluation by its trainer, which ranks seen items, too, so NDCG@10 is computed separately."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer

    torch.set_num_threads(1)
    name = {"sasrec": "SASRec", "bert4rec": "BERT4Rec"}[model_name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shop").mkdir()
        lines = np.column_stack([rows["user"], rows["item"], rows["time"]])
        header = "user_id:token\titem_id:token\ttimestamp:float"
        np.savetxt(Path(folder) / "shop" / "shop.inter", lines, "%d", "\t", header=header, comments="")
        settings: dict[str, Any] = {
            "data_path": folder, "checkpoint_dir": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "use_gpu": False, "gpu_id": "", "seed": 0, "state": "ERROR", "show_progress": False, "worker": 0,
            "epochs": epochs, "train_batch_size": batch, "eval_batch_size": USERS_PER_CHUNK,
            "learning_rate": SHAPE["learning_rate"], "learner": "adam", "weight_decay": 0.0,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "metrics": ["NDCG"], "topk": [K], "valid_metric": f"NDCG@{K}",
            "MAX_ITEM_LIST_LENGTH": SHAPE["length"], "hidden_size": SHAPE["hidden"], "n_layers": SHAPE["blocks"],
            "n_heads": SHAPE["heads"], "inner_size": SHAPE["hidden"] * (1 if model_name == "sasrec" else 4),
            "hidden_dropout_prob": SHAPE["dropout"], "attn_dropout_prob": SHAPE["dropout"],
            "hidden_act": "relu" if model_name == "sasrec" else "gelu",
            "mask_ratio": SHAPE["mask_probability"], "ft_ratio": 0.0,
            "loss_type": {"softmax": "CE", "bce": "BPR"}[loss],
            "train_neg_sample_args": None if loss == "softmax" else {"distribution": "uniform", "sample_num": 1},
        }  # fmt: skip
        saved, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads the command line, too
        config = Config(model=name, dataset="shop", config_dict=settings)
        sys.argv = saved
        dataset = create_dataset(config)
        train, _, test = data_preparation(config, dataset)
        torch.manual_seed(0)
        model = get_model(name)(config, train.dataset).to("cpu")
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
        seconds = [timed(lambda epoch=epoch: trainer._train_epoch(train, epoch, show_progress=False)) for epoch in range(epochs)]
        spent = timed(lambda: trainer.evaluate(test, load_best_model=False, show_progress=False))
        best: dict[int, list[int]] = {}
        seen: dict[int, set[int]] = {}
        for user, item, split in zip(rows["user"].tolist(), rows["item"].tolist(), rows["split"].tolist(), strict=True):
            if split < 2:
                seen.setdefault(user, set()).add(item)
        with torch.no_grad():
            for interaction, *_ in test:
                order = model.full_sort_predict(interaction).view(len(interaction), -1)[:, : dataset.item_num].clone()
                order[:, 0] = -torch.inf
                order = order.topk(K + max(map(len, seen.values())), dim=1).indices
                users = dataset.id2token("user_id", interaction["user_id"])
                for user, items in zip(users, dataset.id2token("item_id", order), strict=True):
                    own = seen.get(int(user), set())
                    best[int(user)] = [int(item) for item in items if int(item) not in own][:K]
    return {"epochs": seconds, "evaluation": spent, "ndcg": ndcg(best, rows), "versions": versions("recbole", "torch")}


def run_cornac(model_name: str, loss: str, batch: int, epochs: int, rows: Rows) -> dict[str, Any]:  # noqa: ARG001 (as the others)
    """Cornac: the time of an epoch is that of ``fit`` divided by their number; the evaluation is its ``ranking_eval``."""
    from cornac.data import Dataset, ImageModality
    from cornac.eval_methods.base_method import ranking_eval
    from cornac.metrics import NDCG
    from cornac.models import VBPR

    def triples(split: int) -> list[tuple[int, int, float]]:
        chosen = rows["split"] == split
        return [(u, i, 1.0) for u, i in zip(rows["user"][chosen].tolist(), rows["item"][chosen].tolist(), strict=True)]

    import torch

    torch.set_num_threads(1)
    num_items = int(rows["item"].max())
    # Ids of all items in the order of the vectors; cold items are kept, as on the other side.
    uid_map, iid_map = (
        {name: place for place, name in enumerate(range(1, int(rows[key].max()) + 1))} for key in ("user", "item")
    )
    train, valid, test = (
        Dataset.build(triples(split), global_uid_map=uid_map, global_iid_map=iid_map, exclude_unknowns=False)
        for split in range(3)
    )
    images = ImageModality(features=vectors_for(num_items)[1:], ids=list(range(1, num_items + 1)), normalized=False)
    images.build(id_map=iid_map)
    train.add_modalities(item_image=images)
    model = VBPR(
        k=FACTORS, k2=FACTORS, n_epochs=epochs, batch_size=batch, learning_rate=SHAPE["learning_rate"], lambda_w=0.01,
        lambda_b=0.01, lambda_e=0.01, use_gpu=False, seed=0, verbose=False,
    )  # fmt: skip
    spent = timed(lambda: model.fit(train))
    begin = time.process_time()
    found, _ = ranking_eval(
        model, [NDCG(k=K)], train_set=train, test_set=test, val_set=valid, exclude_unknowns=False, verbose=False
    )
    return {
        "epochs": [spent / epochs],
        "evaluation": time.process_time() - begin,
        "ndcg": float(found[0]),
        "versions": versions("cornac", "torch"),
    }


def timed(run: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def versions(*names: str) -> str:
    """Installed versions as text."""
    return ", ".join(f"{name} {version(name)}" for name in names)


SIDES = {"ours": run_ours, "rectools": run_rectools, "recbole": run_recbole, "cornac": run_cornac}


def run_side(folder: Path, side: str, model: str, loss: str, batch: int, epochs: int) -> None:
    """Run one side on the rows in a folder, and write its result to the folder."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with np.load(folder / "rows.npz") as rows:
        result = SIDES[side](model, loss, PAIRS_PER_BATCH if model == "vbpr" else batch, epochs, dict(rows))
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    run_side(Path(sys.argv[1]), **json.loads(sys.argv[2]))
