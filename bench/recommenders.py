"""Compare SASRec, BERT4Rec and VBPR with other libraries: RecTools, RecBole and Cornac, seconds per epoch and per evaluation.

Every side runs in a separate process and Python, on one thread, in turns; the best of all rounds counts.  Processor seconds
are measured, which other work on the machine disturbs less than wall-clock seconds.

All sides have the same users, items and split, the same widths, blocks, heads, dropout, batch, learning rate and history length,
and the same family of loss.  An epoch is defined by the library: RecBole makes a row with one target of every prefix of a
history, the others make one row per user with all its targets; the number of targets per epoch is the same.  An evaluation
scores all items for every user with a test target, as implemented in the library.  NDCG@10 is computed by one formula from the
best items of each side, without items of the history, to show that all sides have learned; after so few epochs it is not a
comparison of quality.

    python -m bench recommenders --rectools PYTHON --recbole PYTHON --cornac PYTHON
    python -m bench recommenders --rectools PYTHON --reviews FOLDER/reviews_Beauty_5.json.gz --models sasrec

where PYTHON is the interpreter of a virtual environment with one of these (``--install`` prints them again):

    pip install "rectools[torch]"
    pip install "recbole==1.2.1" "numpy<2" "pandas<3"    # it uses names that newer releases have dropped
    pip install cornac

Without ``--reviews`` a random shop of the size of the Amazon 2014 Beauty 5-core is used, which has no structure to learn.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import typer

from bench.common import random_shop
from bench.recommender_sides import PAIRS_PER_BATCH, Rows
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError

SIDES_FILE = Path(__file__).resolve().with_name("recommender_sides.py")
MODELS = {"sasrec": ("ours", "rectools", "recbole"), "bert4rec": ("ours", "rectools", "recbole"), "vbpr": ("ours", "cornac")}
WHAT_TO_INSTALL = {"rectools": '"rectools[torch]"', "recbole": '"recbole==1.2.1" "numpy<2" "pandas<3"', "cornac": "cornac"}


# --------------------------------------------------------------------------------------------------------------- data
def random_rows() -> Rows:
    """A random shop of the size of the Amazon 2014 Beauty 5-core."""
    frame = random_shop(22_363, 12_101, 9).rename({"user_id": "user", "item_id": "item", "timestamp": "time"})
    split = np.tile([*[0] * 7, 1, 2], 22_363)
    return {name: frame[name].to_numpy() for name in ("user", "item", "time")} | {"split": split}


def rows_of(reviews: Path) -> Rows:
    """Interactions of a reviews file of the 2014 edition, split by leave-one-out."""
    frame = pl.read_ndjson(gzip.decompress(reviews.read_bytes()))
    frame = frame.select(
        user=pl.col("reviewerID").rank("dense").cast(pl.Int64),
        item=pl.col("asin").rank("dense").cast(pl.Int64),
        time=pl.col("unixReviewTime"),
    ).sort("user", "time", maintain_order=True)
    from_end = pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user")
    frame = frame.with_columns(split=(2 - from_end.cast(pl.Int64)).clip(0, 2), time=pl.int_range(pl.len()).over("user"))
    return {name: frame[name].to_numpy() for name in frame.columns}


# ------------------------------------------------------------------------------------------------------------ compare
def compare(
    pythons: Mapping[str, Path], rows: Rows, models: Sequence[str], loss: str, batch: int, epochs: int, rounds: int, kind: str
) -> None:
    """Run all sides in turns and print a table.

    Args:
        pythons: interpreters by side.
        rows: the interactions.
        models: names in :data:`MODELS`.
        loss: loss of SASRec and BERT4Rec.
        batch: rows per batch of SASRec and BERT4Rec.
        epochs: number of epochs per training.
        rounds: number of rounds, of which the best counts.
        kind: description of the data, for the heading.
    """
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "rows.npz", **rows)
        one_thread = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"], "1")
        environment = {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""}
        for turn in range(rounds):
            for model in models:
                for side in [side for side in MODELS[model] if side in pythons]:
                    request = {"side": side, "model": model, "loss": loss, "batch": batch, "epochs": epochs}
                    subprocess.run(
                        [pythons[side].absolute(), SIDES_FILE, name, json.dumps(request)],
                        check=True,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        cwd=name,  # RecBole writes logs to the working directory
                    )
                    result = json.loads((Path(name) / "result.json").read_text(encoding="utf-8"))
                    results.setdefault((model, side), []).append(result)
                    print(f"round {turn + 1}: {model} of {side}: {result}", file=sys.stderr, flush=True)
    print(
        f"{rows['user'].max():,} users, {rows['item'].max():,} items, {len(rows['user']):,} interactions"
        f"{kind}; loss {loss}, batch {batch}, {epochs} epochs, "
        f"one thread per side, best of {rounds} rounds; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    columns = ("model", "side", "s/epoch", "x ours", "s/evaluation", "x ours", "NDCG@10", "versions")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (model, side), found in results.items():
        epoch, spent = (min(min(one["epochs"]) for one in found), min(one["evaluation"] for one in found))
        own = results[model, "ours"]
        own_epoch, own_spent = min(min(one["epochs"]) for one in own), min(one["evaluation"] for one in own)
        print(
            f"| {model} | {side} | {epoch:.2f} | {epoch / own_epoch:.2f} | {spent:.2f} | {spent / own_spent:.2f} "
            f"| {found[0]['ndcg']:.4f} | {found[0]['versions']} |"
        )


def main(
    rectools: Annotated[Path | None, typer.Option(help="Python interpreter with RecTools.", show_default=False)] = None,
    recbole: Annotated[Path | None, typer.Option(help="Python interpreter with RecBole.", show_default=False)] = None,
    cornac: Annotated[Path | None, typer.Option(help="Python interpreter with Cornac.", show_default=False)] = None,
    install: Annotated[bool, typer.Option("--install", help="Print what to install, and exit.")] = False,
    reviews: Annotated[
        Path | None, typer.Option(help="Reviews of the 2014 edition, gzip-compressed JSON lines.", show_default=False)
    ] = None,
    users: Annotated[int | None, typer.Option(help="Use only the first users, and their items.")] = None,
    models: Annotated[Names, typer.Option(parser=names, metavar="A,B,...")] = Names(MODELS),
    loss: Annotated[
        Literal["softmax", "bce"], typer.Option(help="Loss of SASRec and BERT4Rec; in RecBole CE or BPR.")
    ] = "softmax",
    batch: Annotated[int, typer.Option(help=f"Batch size of SASRec and BERT4Rec; that of VBPR is {PAIRS_PER_BATCH}.")] = 128,
    epochs: int = 3,
    rounds: int = 2,
) -> None:
    """Compare this project with the libraries whose interpreters are given."""
    if install:
        for side, packages in WHAT_TO_INSTALL.items():
            print(f"python -m venv {side} && {side}/bin/pip install {packages}    # then --{side} {side}/bin/python")
        return
    if unknown := set(models) - set(MODELS):
        raise ConfigError("--models", f"expected some of {', '.join(MODELS)} (got {', '.join(sorted(unknown))})")
    given = {"ours": Path(sys.executable), "rectools": rectools, "recbole": recbole, "cornac": cornac}
    rows = rows_of(reviews) if reviews else random_rows()
    if users:
        chosen = rows["user"] <= users
        rows = {name: column[chosen] for name, column in rows.items()}
        rows["item"] = np.unique(rows["item"], return_inverse=True)[1] + 1
    pythons = {side: python for side, python in given.items() if python}
    compare(pythons, rows, models, loss, batch, epochs, rounds, "" if reviews else " (random)")
