"""Train and score the other libraries of :mod:`experiments.agreement`.

Each library is run by another Python, in which this project is not installed.

    PYTHON experiments/agreement_sides.py EXPORT FOLDER '{"side": "cornac", "seed": 1, "settings": {...}}'

EXPORT is the output of ``sda export --format recbole``.  The script writes two files to FOLDER: ``scores.npy``, a score of
every item for every user with a test target, and ``result.json``, which has the tokens of its rows and columns, the library's
own metrics of the same scores without the history, and the processor seconds of the training.

Dimensions: U users with a test target, I items.
"""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import csv
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
K = 10
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Export:
    """The content of an export.

    Attributes:
        folder: the folder of the export.
        users, items: tokens, in the order of the files.
        rows: pairs of user and item by split.
        vectors: item vectors ``(I, D)`` in the order of ``items``; None if the export has none.
    """

    folder: Path
    users: list[str]
    items: list[str]
    rows: dict[str, list[tuple[str, str]]]
    vectors: Floats | None


@dataclass(frozen=True)
class Scored:
    """The result of a library.

    Attributes:
        users, items: tokens of the rows and columns of the scores.
        score_UI: scores ``(U, I)``.
        metrics: the library's own metrics of these scores: hit, ndcg; ndcg_with_history ranks the history, too.
        losses: loss by epoch, if the library reports it.
        valid: the library's own validation NDCG@10 by evaluation, if it validates.
        seconds: processor seconds of the training.
        versions: versions of the installed libraries.
    """

    users: list[str]
    items: list[str]
    score_UI: Floats
    metrics: dict[str, float]
    losses: list[float]
    valid: list[float]
    seconds: float
    versions: str


def read_export(folder: Path) -> Export:
    """Read an export without code of this project: tab-separated files with a header of names and types."""

    def column_names(path: Path) -> list[dict[str, str]]:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = csv.DictReader(handle, delimiter="\t")
            return [{name.partition(":")[0]: value for name, value in row.items()} for row in rows]

    name = folder.name
    rows = {
        split: [(row["user_id"], row["item_id"]) for row in column_names(folder / f"{name}.{split}.inter")] for split in SPLITS
    }
    items = [row["item_id"] for row in column_names(folder / f"{name}.item")]
    users = list(dict.fromkeys(user for split in SPLITS for user, _ in rows[split]))
    vectors = None
    if (file := folder / f"{name}.itememb").exists():
        of_item = {row["iid"]: np.array(row["item_emb"].split(), dtype=np.float32) for row in column_names(file)}
        vectors = np.stack([of_item[item] for item in items])
    return Export(folder, users, items, rows, vectors)


def standardised(vectors: Floats) -> Floats:
    """Vectors ``(I, D)`` centred over the items and divided by one number, so that their mean squared length is 1."""
    rows = vectors.astype(np.float64)
    rows -= rows.mean(axis=0)
    return (rows / np.sqrt((rows**2).sum(axis=1).mean())).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- Cornac
def run_cornac(export: Export, seed: int, settings: dict[str, Any]) -> Scored:
    """Train Cornac's VBPR on the vectors of the export; the metrics are those of its ``ranking_eval``.

    Args:
        export: the export, with vectors.
        seed: seed of the training.
        settings: arguments of Cornac's VBPR, and ``changes``: ``start`` draws normal initial weights with ``initial_std``, as
            in our VBPR; ``bias`` calls :func:`own_visual_bias`.
    """
    import torch
    from cornac.data import Dataset, ImageModality
    from cornac.eval_methods.base_method import ranking_eval
    from cornac.metrics import NDCG, HitRatio
    from cornac.models import VBPR

    torch.set_num_threads(1)
    assert export.vectors is not None, "VBPR requires vectors: export a variant that has vectors"
    user_map, item_map = ({name: place for place, name in enumerate(names)} for names in (export.users, export.items))
    train, valid, test = (
        Dataset.build(
            [(user, item, 1.0) for user, item in export.rows[split]],
            global_uid_map=user_map,
            global_iid_map=item_map,
            exclude_unknowns=False,
        )
        for split in SPLITS
    )
    features = standardised(export.vectors)
    images = ImageModality(features=features, ids=export.items, normalized=False)
    images.build(id_map=item_map)
    train.add_modalities(item_image=images)
    settings = dict(settings)
    changes, std = settings.pop("changes", []), settings.pop("initial_std", None)
    if "bias" in changes:
        own_visual_bias()
    if "start" in changes:
        draw = np.random.default_rng(seed).normal
        sizes = {"Gu": (len(export.users), settings["k"]), "Gi": (len(export.items), settings["k"])}
        sizes |= {"Tu": (len(export.users), settings["k2"]), "E": (features.shape[1], settings["k2"])}
        settings["init_params"] = {name: draw(scale=std, size=size).astype(np.float32) for name, size in sizes.items()}
        settings["init_params"] |= {
            "Bi": np.zeros(len(export.items), np.float32),
            "Bp": np.zeros((features.shape[1], 1), np.float32),
        }
    model = VBPR(use_gpu=False, seed=seed, verbose=False, **settings)
    seconds = timed(lambda: model.fit(train))
    found, _ = ranking_eval(
        model,
        [HitRatio(k=K), NDCG(k=K)],
        train_set=train,
        test_set=test,
        val_set=valid,
        exclude_unknowns=False,
        verbose=False,
    )
    users = list(dict.fromkeys(user for user, _ in export.rows["test"]))
    score_UI = np.stack([model.score(user_map[user]) for user in users]).astype(np.float32)
    metrics = {"hit": float(found[0]), "ndcg": float(found[1])}
    return Scored(users, export.items, score_UI, metrics, [], [], seconds, versions("cornac", "torch"))


def own_visual_bias() -> None:
    """Make the product of features and beta' a vector.

    Cornac adds it as a column ``(B, 1)`` to the other terms ``(B,)``.  The sum is a matrix ``(B, B)`` that combines each triple
    with the visual bias of every other triple, and the loss is B times as large relative to its penalties.
    """
    import torch

    product = torch.Tensor.mm

    def mm(left: Any, right: Any) -> Any:
        found = product(left, right)
        return found[:, 0] if right.shape[1] == 1 else found

    torch.Tensor.mm = mm  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------------------- RecBole
def run_recbole(export: Export, seed: int, settings: dict[str, Any]) -> Scored:
    """Train RecBole's SASRec with the configuration of the export; the epoch with the best validation NDCG@10 is kept.

    The metrics are those of its own evaluator.  The scores of the history are removed first, because RecBole would rank it.

    Args:
        export: the export, with its ``_sequential.yaml``.
        seed: seed of the training.
        settings: settings of RecBole, which replace those of the file.  ``max_epochs``, ``eval_every`` and ``patience`` are
            settings of the training loop, ``changes`` are names in :func:`changed_sasrec`.
    """
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.evaluator import Collector, Evaluator
    from recbole.utils import get_trainer, init_seed

    torch.set_num_threads(1)
    settings = dict(settings)
    max_epochs, eval_every, patience = (settings.pop(name) for name in ("max_epochs", "eval_every", "patience"))
    changes = settings.pop("changes", [])
    name = export.folder.name
    fixed: dict[str, Any] = {
        "data_path": str(export.folder.parent), "use_gpu": False, "gpu_id": "", "seed": seed, "reproducibility": True,
        "state": "ERROR", "show_progress": False, "worker": 0, "epochs": max_epochs, "eval_batch_size": 256, "learner": "adam",
        "weight_decay": 0.0, "metrics": ["NDCG", "Hit"], "topk": [K], "valid_metric": f"NDCG@{K}", "metric_decimal_place": 15,
    }  # fmt: skip
    saved, sys.argv = sys.argv, sys.argv[:1]  # because RecBole also reads the command line
    config = Config(
        model="SASRec",
        dataset=name,
        config_file_list=[str(export.folder / f"{name}_sequential.yaml")],
        config_dict=fixed | settings,
    )
    sys.argv = saved
    init_seed(seed, True)
    dataset = create_dataset(config)
    shorten(dataset, config["MAX_ITEM_LIST_LENGTH"])
    train, valid, test = data_preparation(config, dataset)
    model = changed_sasrec(changes)(config, train.dataset).to("cpu")
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    losses: list[float] = []
    of_validation: list[float] = []
    best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    num_without_gain = 0
    begin = time.process_time()
    while len(losses) < max_epochs and num_without_gain < patience:
        losses.append(float(trainer._train_epoch(train, len(losses), show_progress=False)))
        if len(losses) % eval_every and len(losses) < max_epochs:
            continue
        ndcg = float(trainer._valid_epoch(valid, show_progress=False)[0])
        num_without_gain = 0 if ndcg > max(of_validation, default=-1.0) else num_without_gain + 1
        of_validation.append(ndcg)
        if num_without_gain == 0:
            best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        print(f"epoch {len(losses)}: loss {losses[-1]:.4f}, valid ndcg {ndcg:.4f}", file=sys.stderr, flush=True)
    seconds = time.process_time() - begin
    model.load_state_dict(best)
    model.eval()

    seen: dict[str, list[str]] = {}
    for split in ("train", "valid"):
        for user, item in export.rows[split]:
            seen.setdefault(user, []).append(item)
    collectors = {"ndcg": Collector(config), "ndcg_with_history": Collector(config)}
    users: list[str] = []
    blocks: list[Floats] = []
    with torch.no_grad():
        for interaction, _, positive_u, positive_i in test:
            score_BI = model.full_sort_predict(interaction).view(-1, dataset.item_num)
            score_BI[:, 0] = -torch.inf  # padding
            names = [str(user) for user in dataset.id2token("user_id", interaction["user_id"].numpy())]
            collectors["ndcg_with_history"].eval_batch_collect(score_BI.clone(), interaction, positive_u, positive_i)
            users += names
            blocks.append(score_BI[:, 1:].numpy().copy())
            for row, user in enumerate(names):
                score_BI[row, dataset.token2id("item_id", np.array(seen[user]))] = -torch.inf
            collectors["ndcg"].eval_batch_collect(score_BI, interaction, positive_u, positive_i)
    found = {key: Evaluator(config).evaluate(collector.get_data_struct()) for key, collector in collectors.items()}
    metrics = {"hit": float(found["ndcg"][f"hit@{K}"])} | {key: float(values[f"ndcg@{K}"]) for key, values in found.items()}
    items = [str(item) for item in dataset.id2token("item_id", np.arange(1, dataset.item_num))]
    scores = np.concatenate(blocks)
    return Scored(users, items, scores, metrics, losses, of_validation, seconds, versions("recbole", "torch"))


def shorten(dataset: Any, length: int) -> None:
    """Keep the latest items of each history; of a list in the file RecBole would keep the oldest."""
    field = dataset.item_id_list_field
    dataset.inter_feat[field] = dataset.inter_feat[field].map(lambda items: items[-length:])
    dataset.inter_feat[dataset.item_list_length_field] = dataset.inter_feat[field].map(len)
    dataset.set_field_property(field, dataset.field2type[field], dataset.field2source[field], length)


def changed_sasrec(changes: list[str]) -> type:
    """RecBole's SASRec, unchanged or with some of our choices.

    scaled    item embeddings are multiplied by the root of their width when they are inputs
    dropped   dropout of the item table: one mask for each step, for both inputs and output weights
    unnormed  no layer norm of the inputs
    ends      positions are counted from the end of a history
    """
    import torch
    from recbole.model.sequential_recommender.sasrec import SASRec
    from torch.nn import functional

    class Changed(SASRec):
        """See :func:`changed_sasrec`."""

        def calculate_loss(self, interaction: Any) -> Any:
            """Cross-entropy over all items, as in the original."""
            table = self.item_embedding.weight
            if "dropped" in changes:
                table = functional.dropout(table, self.dropout.p, self.training)
            state = self.states(table, interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
            return self.loss_fct(state @ table.T, interaction[self.POS_ITEM_ID])

        def forward(self, item_seq: Any, item_seq_len: Any) -> Any:
            """The state after a history."""
            return self.states(self.item_embedding.weight, item_seq, item_seq_len)

        def states(self, table: Any, item_seq: Any, item_seq_len: Any) -> Any:
            """The forward pass of the original, with a given item table."""
            items = functional.embedding(item_seq, table)
            if "scaled" in changes:
                items = items * self.hidden_size**0.5
            positions = torch.arange(item_seq.size(1))
            if "ends" in changes:
                positions = (item_seq_len[:, None] - 1 - positions).clamp(min=0)
            inputs = items + self.position_embedding(positions)
            if "unnormed" not in changes:
                inputs = self.LayerNorm(inputs)
            mask = self.get_attention_mask(item_seq)
            encoded = self.trm_encoder(self.dropout(inputs), mask, output_all_encoded_layers=True)[-1]
            return self.gather_indexes(encoded, item_seq_len - 1)

    return Changed if changes else SASRec


# ---------------------------------------------------------------------------------------------------------------- both
SIDES: dict[str, Callable[[Export, int, dict[str, Any]], Scored]] = {"cornac": run_cornac, "recbole": run_recbole}


def timed(run: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def versions(*names: str) -> str:
    """The names of libraries with their installed versions."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def write_scored(scored: Scored, folder: Path) -> None:
    """Write ``scores.npy`` and then ``result.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "scores.npy", scored.score_UI)
    names = ("users", "items", "metrics", "losses", "valid", "seconds", "versions")
    text = json.dumps({name: getattr(scored, name) for name in names})
    (folder / "result.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    _request = json.loads(sys.argv[3])
    write_scored(
        SIDES[_request["side"]](read_export(Path(sys.argv[1])), _request["seed"], _request["settings"]), Path(sys.argv[2])
    )
