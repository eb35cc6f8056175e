"""Does adaptation help on a shop?  Adapted vectors against what a user would take instead, with the controls that say why.

A data set is a preset of conf/dataset, with changes as `dvc exp run -S` takes them.  Its data stages run once, and each seed has
adapters of its own: seed s trains adapter s, recommender s and draws random vectors s.

    python -m experiments adaptation --name hm --compose dataset=hm --compose dataset.local_folder=FOLDER \\
        --compose adaptation=strong --seeds 1,2,3 \\
        --vectors id,random,zero_shot,text_only,attributes,sda,lora,id+zero_shot,id+sda,id+lora

==================  =================================================================================================
id                  ids that the recommender learns
zero_shot           the backbone as it is; text_only and image_only are its parts, random and shuffled what they have to beat
lora, lora_cmsa     LoRA with hard targets (InfoNCE) and with soft ones (CMSA)
infonce, sda        MoDA with hard targets and with soft ones
X+base              adapted vectors X beside those of zero_shot, as export_embeddings.with_base joins them (sda+base)
attributes          an oracle of any shop whose items have categories and features: these, one-hot, with an item-specific part
text_attributes     the texts of zero_shot with these attributes beside them: what a perfect reader of photos could add
id+X                vectors X added to learned ids (representation id+content of sequential recommenders); others stand alone
==================  =================================================================================================

The vectors are trained in the order given, all seeds of one before the next, so the important ones come first.  What exists is
kept: a stopped run resumes a cell at a time, and --no-train makes the tables of the vectors whose seeds are all there.  Projects
and positions are kept below experiments/runs/adaptation/NAME; tables and plot are written to experiments/results/adaptation-NAME.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.options import THREE_SEEDS, Name, Recommenders, Root, Seeds
from experiments.study import (
    CUTOFF,
    Panels,
    difference,
    gains,
    keep_positions,
    logger,
    markdown_table,
    mean_and_interval,
    plot_intervals,
    positions_path,
    range_over_seeds,
    read_positions,
    retrieval_at_1,
    write_results,
)
from experiments.workspaces import (
    BASE,
    NOTHING_TRAINED,
    VARIANTS,
    adapt,
    own_params,
    prepare,
    stage_failed,
    vectors_of,
)
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.embeddings.controls import read_table
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.oracle import NOISE_LENGTH, NOISE_WIDTH
from sda_core.errors import ConfigError, DataError
from sda_core.evaluation.groups import item_groups
from sda_core.params import ExportParams, Params, SequentialParams, load_params
from sda_core.seed import generator
from sda_core.traits import takes_modalities
from sda_core.unit_rows import unit_rows

CONTROLS = ("random", "shuffled", "image_only", "text_only")
KNOWN = (BASE, *CONTROLS, "attributes", "text_attributes", *VARIANTS, *(f"{variant}+base" for variant in VARIANTS))
IDS = "id+"
FIRST = Names(("id", "random", BASE, "text_only", "attributes", "sda", "lora", "id+zero_shot", "id+sda", "id+lora"))
MIN_USERS = 30  # of a group: fewer say nothing
_ADAPTED = ("sda", "lora", "infonce", "lora_cmsa")

QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "Can this recommender use vectors here?": [
        ("id", "random"), ("text_only", "random"), ("attributes", "random"), ("attributes", "id"), ("shuffled", BASE),
    ],
    "Does adaptation beat the backbone as it is?": [(variant, BASE) for variant in _ADAPTED],
    "Does it beat the texts alone?": [(variant, "text_only") for variant in _ADAPTED],
    "Does it help beside ids?": [
        (f"{IDS}{BASE}", "id"), (f"{IDS}sda", f"{IDS}{BASE}"), (f"{IDS}lora", f"{IDS}{BASE}"),
        (f"{IDS}sda", f"{IDS}text_only"), (f"{IDS}random", "id"),
    ],
    "MoDA or LoRA?": [("infonce", "lora"), ("sda", "lora_cmsa")],
    "Soft or hard targets?": [("sda", "infonce"), ("lora_cmsa", "lora")],
    "Base and adapted vectors together?": [("sda+base", BASE), ("sda+base", "text_only"), ("sda+base", "sda")],
    "What do photos bring?": [("image_only", "random"), (BASE, "text_only"), ("text_attributes", "text_only")],
}  # fmt: skip
"""Pairs that answer a question: the first minus the second."""

Vectors = Annotated[Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="Which, in the order of training.")]
Composed = Annotated[
    list[str] | None,
    typer.Option("--compose", metavar="KEY=VALUE", help="A preset or a param, as -S takes it.  Repeat it.", show_default=False),
]
Train = Annotated[bool, typer.Option("--train/--no-train", help="Or only make the tables of what is complete.")]


def main(
    name: Name,
    recommenders: Recommenders = Names(("sasrec",)),
    vectors: Vectors = FIRST,
    composed: Composed = None,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    train: Train = True,
) -> None:
    """Train what is missing, write tables and plot."""
    _check(vectors)
    folder = root / "experiments" / "runs" / "adaptation" / name
    shop = Workspace(folder / "shop")
    params = make_shop(shop, (root / "conf").resolve(), composed or [])
    for recommender in recommenders:
        check_recommender(params, recommender, vectors)
    if train:
        for vector in vectors:
            for seed in seeds:
                workspace = workspace_of_seed(shop, folder, vector, seed)
                for recommender in recommenders:
                    train_cell(workspace, vector, recommender, seed, positions(folder, recommender, vector))
    tables, panels = [alignment(folder, vectors, seeds)], {}
    for recommender in recommenders:
        done = [vector for vector in vectors if is_complete(positions(folder, recommender, vector), seeds)]
        measured = measure(shop, params, folder, recommender, done, seeds)
        tables += [absolute(measured, recommender, len(seeds)), answers(measured, params, recommender, len(seeds))]
        panels |= intervals(measured, params, recommender)
    results = write_results("\n".join(text for text in tables if text), "adaptation", name, root)
    plot_intervals(results / "plot.png", panels, f"difference in NDCG@{CUTOFF}", zero=True, columns=2)


def _check(vectors: Sequence[str]) -> None:
    known = ("id", *KNOWN)
    for vector in vectors:
        if vector.removeprefix(IDS) not in (known if vector == "id" else KNOWN):
            raise ConfigError("--vectors", f"expected some of {', '.join(known)}, or id+ before one (got {vector!r})")


def check_recommender(params: Params, recommender: str, vectors: Sequence[str]) -> None:
    """See that a recommender takes these vectors.

    Raises:
        ConfigError: it does not.
    """
    section = params.train_recommender.of(recommender)
    if takes_modalities(section):
        raise ConfigError("--recommenders", f"{recommender} takes image and text vectors apart", "name one that takes one vector")
    added = [vector for vector in vectors if vector.startswith(IDS)]
    if added and not isinstance(section, SequentialParams):
        problem = f"{recommender} is not sequential, so it has no {added[0]}"
        raise ConfigError("--vectors", problem, "leave out what begins with id+, or name sasrec or bert4rec")


# ------------------------------------------------------------------------------------------------- the shop and its vectors
def make_shop(shop: Workspace, conf: Path, composed: Sequence[str]) -> Params:
    """The project whose data all seeds share: its params composed from ``conf``, its data stages run, unless it is there.

    Raises:
        ConfigError: a value is wrong, or the folder was made with others.
        ArtifactError: a stage failed.
    """
    params = compose(shop, conf, composed)
    run_data_stages(shop)
    return params


def compose(shop: Workspace, conf: Path, composed: Sequence[str], changes: Sequence[str] = ()) -> Params:
    """The project's params, composed from ``conf`` and then changed (``PATH=VALUE``); no adapter is among them.

    Raises:
        ConfigError: a value is wrong, or the folder was made with others.
    """
    wanted = shop.root / "wanted.yaml"
    shop.root.mkdir(parents=True, exist_ok=True)
    try:
        compose_and_dump(str(wanted), str(conf), None, "config", "", list(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("--compose", str(error).strip().splitlines()[0], "see conf/ for presets and params") from None
    return own_params(wanted, shop.root, [*NOTHING_TRAINED, "train_adapter.variants={}", *changes])


def run_data_stages(shop: Workspace) -> None:
    """Raw data, filtered data and images of a project, unless they are there.

    Raises:
        ArtifactError: a stage failed.
    """
    root = shop.root
    for stage, output in (("download", shop.raw), ("filter", shop.statistics), ("fetch_images", shop.images)):
        if not output.exists():
            logger.info("%s in %s", stage, root)
            command = [sys.executable, "-m", f"stages.{stage}", "--root", str(root)]
            if subprocess.run(command, check=False).returncode != 0:
                raise stage_failed(stage, "the shop", root)


def source_of(vector: str) -> str:
    """The variant that vectors are made of: ``sda`` for ``id+sda+base``."""
    return vector.removeprefix(IDS).removesuffix("+base")


def workspace_of_seed(shop: Workspace, folder: Path, vector: str, seed: int) -> Workspace:
    """A seed's project, with the adapter and the embeddings that vectors need."""
    workspace = Workspace(folder / f"seed-{seed}")
    shop.embeddings(BASE).parent.mkdir(parents=True, exist_ok=True)
    # All adapters are in the params from the start, so that a later one changes nothing.
    prepare(
        workspace,
        shop.root.resolve(),
        shop.embeddings(BASE),
        seed,
        list(VARIANTS),
        [f"control_embeddings.seed={seed}"],
    )
    if source_of(vector) in VARIANTS:
        adapt(workspace, source_of(vector))
    return workspace


def matrix(workspace: Workspace, params: Params, vector: str) -> np.ndarray | None:
    """``(I + 1, D)`` vectors for a recommender, row 0 zero; None for ids alone."""
    if vector == "id":
        return None
    content = vector.removeprefix(IDS)
    if content.endswith("+base"):
        made = joined_with_base(workspace, params.export_embeddings, source_of(vector))
    elif content in ("attributes", "text_attributes"):
        made = attribute_vectors(workspace, params, with_text=content == "text_attributes")
    else:
        return vectors_of(workspace, params, content)
    return np.concatenate([np.zeros((1, made.shape[1]), dtype=np.float32), made])


def joined_with_base(workspace: Workspace, params: ExportParams, variant: str) -> np.ndarray:
    """``(I, F)``: a variant's vectors beside those of zero_shot, fused as ``export_embeddings.with_base`` does it."""
    own, base = read_table(workspace.embeddings(variant)), read_table(workspace.embeddings(BASE))
    section = params.model_copy(update={"with_base": True})
    return fuse(own.image_ID, own.text_ID, own.has_image, seen_items(workspace), section, (base.image_ID, base.text_ID))


def attribute_vectors(workspace: Workspace, params: Params, *, with_text: bool) -> np.ndarray:
    """``(I, F)``: what categories and features say of an item, beside its text or an item-specific random part.

    The one-hot part has length 1, an item's random part :data:`~sda_core.embeddings.oracle.NOISE_LENGTH` (the oracles of the
    built-in shop have the same), its text vector length 1.  Both are fused as image and text are.

    Raises:
        DataError: no item has a category or a feature.
    """
    items = ITEMS.read(workspace.items).sort("item_id")
    cells = pl.concat(
        items.select(row=pl.col("item_id") - 1, field=pl.lit(field), value=field).explode("value").drop_nulls()
        for field in ("categories", "features")
    )
    values = cells.select("field", "value").unique().sort("field", "value").with_row_index("column")
    if values.is_empty():
        raise DataError(str(workspace.items), "has neither categories nor features", "leave out attributes and text_attributes")
    known_IA = np.zeros((len(items), len(values)), dtype=np.float32)
    placed = cells.join(values, on=["field", "value"])
    known_IA[placed["row"], placed["column"]] = 1.0
    known_IA = unit_rows(known_IA)
    if with_text:
        other_ID, weight = read_table(workspace.embeddings(BASE)).text_ID, 1.0
    else:
        random = generator(params.control_embeddings.seed, "attributes")
        other_ID, weight = random.normal(size=(len(items), NOISE_WIDTH)).astype(np.float32), NOISE_LENGTH
    weights = {"image_weight": 1.0, "text_weight": weight, "balance": "none"}
    section = params.export_embeddings.model_copy(update={"fusion": "late_concat_pca", "normalize": True, **weights})
    return fuse(known_IA, other_ID, np.ones(len(items), dtype=bool), seen_items(workspace), section)


# ------------------------------------------------------------------------------------------------- training
def positions(folder: Path, recommender: str, vector: str) -> Path:
    """Where the positions of all seeds of a cell are kept."""
    return folder / "positions" / recommender / vector


def train_cell(workspace: Workspace, vector: str, recommender: str, seed: int, place: Path) -> None:
    """Train one recommender on one kind of vectors, unless its positions exist."""
    if positions_path(place, seed).exists():
        return
    params = load_params(workspace.root / "params.yaml")
    section = params.train_recommender.of(recommender)
    if isinstance(section, SequentialParams):
        chosen: Any = "id+content" if vector.startswith(IDS) else "content"
        section = section.model_copy(update={"representation": chosen})
    keep_positions(workspace, params, section, seed, place, vectors=matrix(workspace, params, vector))


def is_complete(place: Path, seeds: Sequence[int]) -> bool:
    """Whether all seeds of a cell are done."""
    return all(positions_path(place, seed).exists() for seed in seeds)


# ------------------------------------------------------------------------------------------------- results
Measured = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]  # by group (users in its name), by vectors: NDCG, Hit


def measure(
    shop: Workspace, params: Params, folder: Path, recommender: str, vectors: Sequence[str], seeds: Sequence[int]
) -> Measured:
    """NDCG and Hit ``(S, U)`` of all users, of those with a tail target and with a cold one, where there are enough of them."""
    interactions = INTERACTIONS.read(shop.interactions)
    items = item_groups(interactions, params.evaluate.tail, ITEMS.count(shop.items))
    target_U = interactions.filter(pl.col("split") == "test").sort("user_id")["item_id"].to_numpy()
    masks = {"all": np.ones(len(target_U), dtype=bool), "tail": items.tail[target_U], "cold": items.cold[target_U]}
    read = {vector: read_positions(positions(folder, recommender, vector), seeds) for vector in vectors}
    return {
        f"{group} ({mask.sum():,})": {
            vector: (gains("ndcg", frames, mask), gains("hit", frames, mask)) for vector, frames in read.items()
        }
        for group, mask in masks.items()
        if group == "all" or mask.sum() >= MIN_USERS
    }


def absolute(measured: Measured, recommender: str, num_seeds: int) -> str:
    """A row for each kind of vectors: Hit and NDCG of each group."""
    vectors = list(next(iter(measured.values())))
    heads = ["vectors", *(f"{group}: {metric}@{CUTOFF}" for group in measured for metric in ("NDCG", "Hit"))]
    rows = [[vector, *(f"{gain.mean():.4f}" for of in measured.values() for gain in of[vector])] for vector in vectors]
    return markdown_table(heads, rows, f"{recommender}, full rank, {num_seeds} seeds")


def _pairs(measured: Measured) -> list[tuple[str, str, str]]:
    """Question, first, second; of what was measured."""
    known = next(iter(measured.values()))
    return [(asked, *pair) for asked, pairs in QUESTIONS.items() for pair in pairs if known.keys() >= {*pair}]


def answers(measured: Measured, params: Params, recommender: str, num_seeds: int) -> str:
    """A row for each pair of :data:`QUESTIONS` that is complete, with paired intervals over users and seeds."""
    rows: list[list[str]] = []
    for asked, first, second in _pairs(measured):
        row = ["" if rows and asked in [row[0] for row in rows] else asked, f"{first} - {second}"]
        for group, of in measured.items():
            paired_SU = of[first][0] - of[second][0]
            row.append(difference(paired_SU, params.evaluate, f"{first} - {second}"))
            if group.startswith("all"):
                row.append(range_over_seeds(paired_SU))
        rows.append(row)
    heads = ["question", "difference"]
    for group in measured:
        heads += [f"{group}: NDCG@{CUTOFF} [95 %]", *(["over seeds"] if group.startswith("all") else [])]
    return markdown_table(heads, rows, f"{recommender}, answers, {num_seeds} seeds") if rows else ""


def intervals(measured: Measured, params: Params, recommender: str) -> Panels:
    """The differences of :func:`answers` for a plot."""
    panels: Panels = {}
    for group, of in measured.items():
        lines = {
            f"{first} - {second}": mean_and_interval(of[first][0] - of[second][0], params.evaluate, f"{first} - {second}")
            for _, first, second in _pairs(measured)
        }
        if any(any(line) for line in lines.values()):
            panels[f"{recommender}, {group}"] = lines
    return panels


def alignment(folder: Path, vectors: Sequence[str], seeds: Sequence[int]) -> str:
    """Retrieval@1 of the variants whose embeddings of all seeds are there: was anything aligned?"""
    rows: list[list[str]] = []
    for variant in dict.fromkeys(source_of(vector) for vector in (BASE, *vectors)):
        paths = [Workspace(folder / f"seed-{seed}").embeddings(variant) for seed in seeds]
        if variant in (BASE, *VARIANTS) and all(path.exists() for path in paths):
            found = [retrieval_at_1(path) for path in (paths[:1] if variant == BASE else paths)]
            rows.append([variant, " ".join(f"{value:.4f}" for value in found)])
    title = "Retrieval@1 of image and text without their means, at most 2,000 items"
    return markdown_table(["variant", "by seed"], rows, title) if rows else ""
