"""Compare adapted vectors on one shop with their alternatives: ids, frozen vectors, controls.

The data set is a preset of conf/dataset, with changes in the syntax of `dvc exp run -S`.  Its data stages run once.  Seed s is
the seed of the adapters, the recommenders and the random vectors, so each seed has its own adapters.

    python -m experiments adaptation --name hm --compose dataset=hm --compose dataset.local_folder=FOLDER \\
        --compose adaptation=strong --seeds 1,2,3 \\
        --vectors id,random,zero_shot,text_only,attributes,sda,lora,id+zero_shot,id+sda,id+lora

==================  =================================================================================================
id                  ids that the recommender learns
zero_shot           the backbone without an adapter
text_only           the text vectors of zero_shot; image_only: its image vectors
random, shuffled    controls: random directions, and the vectors of zero_shot assigned to other items
other_images        control: the text vectors of zero_shot joined with the image vectors of other items
mismatched          control: sda, trained on images with the texts of other items
lora, lora_cmsa     LoRA with hard targets (InfoNCE) and with soft targets (CMSA)
infonce, sda        MoDA with hard targets and with soft targets
X:text, X:image     the text or the image vectors of an adapted variant X alone (sda:text)
X+base              adapted vectors X joined with those of zero_shot, as by export_embeddings.with_base (sda+base)
X+even              vectors X, principal components scaled towards equal variance (export_embeddings.axis_scaling: even)
X+filled            vectors X; the vector of a missing text or image is filled in from the item's other modality
separate_models     MiniLM's vectors of the texts and EfficientNet-lite0's of the images: what is possible without a
                    vision-language model; separate_models:text and separate_models:image are one of the two
attributes          categories and features of the items, one-hot, with an item-specific random part
text_attributes     the text vectors of zero_shot with these attributes: a bound for what a perfect reader of photos could add
id+X                vectors X added to learned ids (representation id+content of sequential recommenders); in the recommender
                    nearest, similarity by vectors X added to similarity by users, which is what id means there
==================  =================================================================================================

The vectors are trained in the given order, all seeds of one before the next, so list the important ones first.  A stopped run
resumes at the first cell without positions.  --no-train only writes the tables, with the vectors whose seeds are all complete.
Projects and positions are below experiments/runs/adaptation/NAME.  Tables and plot are written to
experiments/results/adaptation-NAME.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments import separate_models
from experiments.options import THREE_SEEDS, Name, Recommenders, Root, Seeds
from experiments.study import (
    CUTOFF,
    Panels,
    difference,
    gains,
    is_complete,
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
    changed_section,
    fuse_vectors,
    mean_retrieval,
    own_params,
    padded,
    prepare,
    stage_failed,
    train_on_corrupted,
    vectors_of,
)
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, names
from sda_core.embeddings.controls import Vectors, read_table
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.oracle import NOISE_LENGTH, NOISE_WIDTH
from sda_core.errors import ConfigError, DataError
from sda_core.evaluation.groups import item_groups
from sda_core.item_source import item_source
from sda_core.items import ItemSource
from sda_core.params import ExportParams, NearestParams, Params, RecommenderParams, SequentialParams, load_params
from sda_core.seed import generator
from sda_core.traits import takes_modalities
from sda_core.unit_rows import unit_rows

CONTROLS = ("random", "shuffled", "image_only", "text_only")
FILLED = tuple(f"{variant}+filled" for variant in (BASE, *VARIANTS))
OTHER_IMAGES = "other_images"
SEPARATE = separate_models.NAME
EVEN = "+even"
PARTS = {"text_only": BASE, "image_only": BASE} | {
    f"{variant}:{part}": variant for variant in (*VARIANTS, SEPARATE) for part in ("text", "image")
}
"""Kinds of vectors that are one modality of a variant."""
CAN_BE_EVEN = (BASE, *PARTS, OTHER_IMAGES, *VARIANTS, SEPARATE)
KNOWN = (
    *(BASE, *CONTROLS, *PARTS, OTHER_IMAGES, SEPARATE, "attributes", "text_attributes"),
    *(*VARIANTS, *(f"{variant}+base" for variant in VARIANTS), *FILLED, *(f"{vector}{EVEN}" for vector in CAN_BE_EVEN)),
)
IDS = "id+"
MISMATCHED = "mismatched"
"""A negative control: vectors like :data:`CHECKED`, of an adapter trained on images with texts of other items."""
CHECKED = "sda"
FIRST = Names(("id", "random", BASE, "text_only", "attributes", "sda", "lora", "id+zero_shot", "id+sda", "id+lora"))
MIN_USERS = 30  # smallest group that is shown; the interval of a smaller one is too wide
_ADAPTED = ("sda", "lora", "infonce", "lora_cmsa")

QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "Can this recommender use vectors here?": [
        ("id", "random"), ("text_only", "random"), ("attributes", "random"), ("attributes", "id"), ("shuffled", BASE),
    ],
    "Does adaptation beat the frozen backbone?": [(variant, BASE) for variant in (*_ADAPTED, MISMATCHED)],
    "Does it beat the text vectors alone?": [(variant, "text_only") for variant in _ADAPTED],
    "Does it help together with ids?": [
        (f"{IDS}{BASE}", "id"), (f"{IDS}sda", f"{IDS}{BASE}"), (f"{IDS}lora", f"{IDS}{BASE}"),
        (f"{IDS}sda", f"{IDS}text_only"), (f"{IDS}random", "id"),
    ],
    "MoDA or LoRA?": [("infonce", "lora"), ("sda", "lora_cmsa")],
    "Soft or hard targets?": [("sda", "infonce"), ("lora_cmsa", "lora")],
    "Base and adapted vectors together?": [("sda+base", BASE), ("sda+base", "text_only"), ("sda+base", "sda")],
    "Is a vision-language model needed?": [
        (BASE, SEPARATE), ("text_only", f"{SEPARATE}:text"), ("image_only", f"{SEPARATE}:image"), (f"{IDS}{SEPARATE}", "id"),
        (f"{IDS}{BASE}", f"{IDS}{SEPARATE}"),
    ],
    "What do images add?": [
        ("image_only", "random"), (BASE, "text_only"), (BASE, OTHER_IMAGES), (OTHER_IMAGES, "text_only"),
        ("text_attributes", "text_only"),
    ],
    "Does scaling the components help?": [(f"{vector}{EVEN}", vector) for vector in (BASE, "text_only", "sda")],
}  # fmt: skip
"""The pairs of vectors that answer each question: first minus second."""

VectorNames = Annotated[
    Names, typer.Option("--vectors", parser=names, metavar="A,B,...", help="The vectors, in the order of training.")
]
Composed = Annotated[
    list[str] | None,
    typer.Option(
        "--compose",
        metavar="KEY=VALUE",
        help="A preset or a setting, in the syntax of dvc exp run -S.  Repeat it for more.",
        show_default=False,
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes", min=0.0, help="Start no training after this time; 0 only writes the tables.", show_default=False
    ),
]
Train = Annotated[
    bool, typer.Option("--train/--no-train", help="Train what is missing, or only write the tables of what is complete.")
]


def main(
    name: Name,
    recommenders: Recommenders = Names(("sasrec",)),
    vectors: VectorNames = FIRST,
    composed: Composed = None,
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
    train: Train = True,
) -> None:
    """Train what is missing; write the tables and the plot."""
    check_vectors(vectors, (MISMATCHED,))
    folder = root / "experiments" / "runs" / "adaptation" / name
    shop = Workspace(folder / "shop")
    params = make_shop(shop, (root / "conf").resolve(), composed or [])
    for recommender in recommenders:
        check_recommender(params, recommender, vectors)
    if train:
        for vector in vectors:
            for seed in seeds:
                train_vector(shop, folder, vector, recommenders, seed)
    tables, panels = [alignment(folder, vectors, seeds)], {}
    for recommender in recommenders:
        done = [vector for vector in vectors if is_complete(positions(folder, recommender, vector), seeds)]
        measured = measure(shop, params, folder, recommender, done, seeds)
        tables += [absolute(measured, f"{recommender}, full rank, {len(seeds)} seeds")]
        tables += [answers(measured, params, recommender, len(seeds))]
        panels |= intervals(measured, params, recommender)
    results = write_results("\n".join(text for text in tables if text), "adaptation", name, root)
    plot_intervals(results / "plot.png", panels, f"difference in NDCG@{CUTOFF}", zero=True, columns=2)


def check_vectors(vectors: Sequence[str], more: Sequence[str] = ()) -> None:
    """Check that all kinds of vectors are known.

    Args:
        vectors: the kinds.
        more: names that are known too, without ``id+``.

    Raises:
        ConfigError: a kind is unknown.
    """
    known = ("id", *more, *KNOWN)
    for vector in vectors:
        if vector not in known and vector.removeprefix(IDS) not in KNOWN:
            raise ConfigError("--vectors", f"expected some of {', '.join(known)}, or one with id+ before it (got {vector!r})")


def check_recommender(params: Params, recommender: str, vectors: Sequence[str]) -> None:
    """Check that a recommender can use these vectors.

    Raises:
        ConfigError: the recommender takes the modalities separately, or is not sequential and cannot add ids to vectors.
    """
    section = params.train_recommender.of(recommender)
    if takes_modalities(section):
        raise ConfigError(
            "--recommenders", f"{recommender} takes image and text vectors separately", "use one that takes one vector per item"
        )
    added = [vector for vector in vectors if vector.startswith(IDS)]
    if added and not isinstance(section, SequentialParams | NearestParams):
        problem = f"{recommender} has no representation id+content, so it cannot use {added[0]}"
        raise ConfigError("--vectors", problem, "leave out the vectors that begin with id+, or use sasrec, bert4rec or nearest")


# ------------------------------------------------------------------------------------------------- the shop and its vectors
def make_shop(shop: Workspace, conf: Path, composed: Sequence[str]) -> Params:
    """Make the project whose data all seeds share: compose its params and run its data stages, unless it exists.

    Args:
        shop: the project.
        conf: the folder with the presets.
        composed: ``KEY=VALUE``, in the syntax of ``dvc exp run -S``.

    Raises:
        ConfigError: a value is wrong, or the folder was made with other params.
        ArtifactError: a stage failed.
    """
    params = compose(shop, conf, composed)
    run_data_stages(shop)
    return params


def compose(shop: Workspace, conf: Path, composed: Sequence[str], changes: Sequence[str] = ()) -> Params:
    """Compose the params of a project without adapters, and write them to it.

    Args:
        shop: the project.
        conf: the folder with the presets.
        composed: ``KEY=VALUE``, in the syntax of ``dvc exp run -S``.
        changes: ``PATH=VALUE``, applied to the composed params.

    Raises:
        ConfigError: a value is wrong, or the folder was made with other params.
    """
    wanted = shop.root / "wanted.yaml"
    shop.root.mkdir(parents=True, exist_ok=True)
    try:
        compose_and_dump(str(wanted), str(conf), None, "config", "", list(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("--compose", str(error).strip().splitlines()[0], "see conf/ for presets and params") from None
    return own_params(wanted, shop.root, [*NOTHING_TRAINED, "train_adapter.variants={}", *changes])


def run_data_stages(shop: Workspace) -> None:
    """Make raw data, filtered data and images of a project, unless they exist.

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
    """The variant from which vectors are computed: ``sda`` for ``id+sda+base`` and ``sda:text``."""
    vector = vector.removeprefix(IDS).removesuffix("+base").removesuffix("+filled").removesuffix(EVEN)
    return vector.partition(":")[0]


def workspace_of_seed(shop: Workspace, folder: Path, vector: str, seed: int) -> Workspace:
    """The project of a seed, with the adapter and the embeddings from which these vectors are computed."""
    workspace = Workspace(folder / f"seed-{seed}")
    shop.embeddings(BASE).parent.mkdir(parents=True, exist_ok=True)
    # All adapters are in the params from the start: a later one would change the params and make finished stages invalid.
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
    """The item vectors for a recommender.

    Returns:
        ``(I + 1, D)`` with row 0 zero; None for ``id``.

    Raises:
        DataError: see :func:`attribute_vectors`.
    """
    if vector == "id":
        return None
    content = vector.removeprefix(IDS)
    if content.endswith(EVEN):
        made = evened(workspace, params, content.removesuffix(EVEN))
    elif ":" in content or content == OTHER_IMAGES:
        made = fused_again(workspace, params, params.export_embeddings, content)
    elif content.endswith("+base"):
        made = joined_with_base(workspace, params.export_embeddings, source_of(vector))
    elif content == SEPARATE:
        made = table_of(workspace, params, content).fused_IF
    elif content in FILLED:
        made = filled(workspace, params.export_embeddings, source_of(vector))
    elif content in ("attributes", "text_attributes"):
        made = attribute_vectors(workspace, params, with_text=content == "text_attributes")
    else:
        return vectors_of(workspace, params, content)
    return padded(made)


def table_of(workspace: Workspace, params: Params, variant: str) -> Vectors:
    """The image, text and fused vectors of a variant; those of ``separate_models`` are computed once for all seeds.

    Args:
        workspace: a project with the embeddings of zero_shot.
        params: its params.
        variant: the variant.
    """
    return read_table(table_path(workspace, params, variant))


def table_path(workspace: Workspace, params: Params, variant: str) -> Path:
    """The table of :func:`table_of`."""
    if variant != SEPARATE:
        return workspace.embeddings(variant)
    path = workspace.embeddings(BASE).resolve().with_stem(SEPARATE)  # all seeds link the file of zero_shot
    separate_models.write(workspace, params, path)
    return path


def joined_with_base(workspace: Workspace, params: ExportParams, variant: str) -> np.ndarray:
    """``(I, F)`` vectors of a variant joined with those of zero_shot, as by ``export_embeddings.with_base``."""
    own, base = read_table(workspace.embeddings(variant)), read_table(workspace.embeddings(BASE))
    return fuse_vectors(workspace, own, params.model_copy(update={"with_base": True}), base)


def with_other_images(workspace: Workspace, params: Params) -> Vectors:
    """The vectors of zero_shot, with image vectors of other items; ``fused_IF`` is unchanged.

    The items that have an image exchange them along a seeded cycle, so that each of them has another item's image.  Thus the
    image vectors are as many and as varied as before, and what they say about an item is wrong.

    Args:
        workspace: a project with the embeddings of zero_shot.
        params: its params; ``control_embeddings.seed`` is the seed of the cycle.
    """
    own = read_table(workspace.embeddings(BASE))
    order = generator(params.control_embeddings.seed, OTHER_IMAGES).permutation(np.flatnonzero(own.has_image))
    image_ID = own.image_ID.copy()
    image_ID[order] = own.image_ID[np.roll(order, 1)]
    return replace(own, image_ID=image_ID)


def evened(workspace: Workspace, params: Params, vector: str) -> np.ndarray:
    """``(I, F)`` vectors whose principal components are scaled towards equal variance (``export_embeddings.axis_scaling: even``).

    Args:
        workspace: a project with the embeddings.
        params: its params.
        vector: a kind in :data:`CAN_BE_EVEN`.
    """
    even = {"fusion": "late_concat_pca", "axis_scaling": "even"}
    return fused_again(workspace, params, params.export_embeddings.model_copy(update=even), vector)


def fused_again(workspace: Workspace, params: Params, section: ExportParams, vector: str) -> np.ndarray:
    """``(I, F)`` vectors with another fusion than that of the project.

    Args:
        workspace: a project with the embeddings.
        params: its params.
        section: the fusion.
        vector: a kind in :data:`CAN_BE_EVEN`.  A kind in :data:`PARTS` is always fused by principal components.
    """
    if vector == OTHER_IMAGES:
        own = with_other_images(workspace, params)
    else:
        own = table_of(workspace, params, PARTS.get(vector, vector))
    if vector in PARTS:
        other = "image_weight" if "text" in vector else "text_weight"
        section = section.model_copy(update={"fusion": "late_concat_pca", other: 0.0})
    return fuse_vectors(workspace, own, section)


def filled(workspace: Workspace, params: ExportParams, variant: str) -> np.ndarray:
    """``(I, F)`` vectors of a variant; a missing modality is filled in from the item's other one.

    For an item without a text, ``text = image - mean image + mean text``, where the means are those of items that have both, and
    the vectors have unit length if ``params.normalize``.  For an item without an image, likewise.  Such a vector has a meaning
    only in a space that image and text share.  Everything else is as in :func:`~sda_core.embeddings.fusion.fuse`, and without a
    missing vector the result is that of the variant.
    """
    own = read_table(workspace.embeddings(variant))
    image_ID, text_ID, has_image, has_text = fill_in(own.image_ID, own.text_ID, own.has_image, own.has_text, params.normalize)
    return fuse(image_ID, text_ID, has_image, seen_items(workspace), params, has_text=has_text)


def fill_in(
    image_ID: np.ndarray, text_ID: np.ndarray, has_image: np.ndarray, has_text: np.ndarray, normalize: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image and text vectors, with a missing one filled in from the item's other one (see :func:`filled`), and their flags."""
    made = {"image": image_ID.copy(), "text": text_ID.copy()}
    has = {"image": has_image, "text": has_text}
    if normalize:
        made = {modality: unit_rows(rows_ID) for modality, rows_ID in made.items()}
    both = has_image & has_text
    if both.any():
        mean = {modality: rows_ID[both].mean(axis=0, dtype=np.float64) for modality, rows_ID in made.items()}
        for to, source in (("text", "image"), ("image", "text")):
            lost = ~has[to] & has[source]
            made[to][lost] = made[source][lost] - mean[source] + mean[to]
        has = dict.fromkeys(has, has_image | has_text)
    return made["image"], made["text"], has["image"], has["text"]


def attribute_vectors(workspace: Workspace, params: Params, *, with_text: bool) -> np.ndarray:
    """``(I, F)`` vectors of the items' categories and features, fused with the text vector or an item-specific random part.

    The one-hot vector of an item is scaled to length 1.  The second part has length 1 if it is the text vector, and
    :data:`~sda_core.embeddings.oracle.NOISE_LENGTH` if it is random, as in the oracles of the built-in shop.  The two parts take
    the places of image and text in ``late_concat_pca``.

    Args:
        workspace: a project with items, and with the embeddings of zero_shot if the text is used.
        params: its params.
        with_text: whether the second part is the text vector of zero_shot.

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
    """The folder with the positions of one recommender and one kind of vectors, for all seeds."""
    return folder / "positions" / recommender / vector


def train_cell(workspace: Workspace, vector: str, recommender: str, seed: int, place: Path) -> None:
    """Train one recommender on one kind of vectors, unless its positions exist."""
    if positions_path(place, seed).exists():
        return
    params = load_params(workspace.root / "params.yaml")
    section = with_representation(params.train_recommender.of(recommender), vector)
    keep_positions(workspace, params, section, seed, place, vectors=matrix(workspace, params, vector))


def with_representation(section: RecommenderParams, vector: str) -> RecommenderParams:
    """A recommender's section with the representation that a kind of vectors asks for: ``id+content`` for ``id+X``.

    ``nearest`` does not scale the axes, because ``X+even`` are vectors of their own.

    Raises:
        ConfigError: the section contradicts this representation.
    """
    if not isinstance(section, SequentialParams | NearestParams):
        return section
    changes: dict[str, Any] = {"representation": "id+content" if vector.startswith(IDS) else "content"}
    if isinstance(section, NearestParams):
        changes["axis_scaling"] = "none"
        if not vector.startswith(IDS):
            changes["content_weight"] = None
    return changed_section(section, changes)


def as_in_the_pipeline(section: RecommenderParams, vector: str) -> RecommenderParams:
    """:func:`with_representation`, but ``nearest`` scales the axes as its section says.

    Raises:
        ConfigError: see there.
    """
    changed = with_representation(section, vector)
    return changed_section(changed, {"axis_scaling": section.axis_scaling}) if isinstance(section, NearestParams) else changed


def project(folder: Path, vector: str) -> Path:
    """The folder of the seeds' projects; the mismatched adapters have a separate one."""
    return folder / MISMATCHED if vector == MISMATCHED else folder


def train_vector(shop: Workspace, folder: Path, vector: str, recommenders: Sequence[str], seed: int) -> None:
    """Make one kind of vectors with one seed, and train the recommenders on them, unless their positions exist.

    Args:
        shop: the project with the data.
        folder: the folder with the seeds' projects and the positions.
        vector: the kind of vectors.
        recommenders: names.
        seed: seed of the adapter and the recommenders.
    """
    is_control = vector == MISMATCHED
    workspace = workspace_of_seed(shop, project(folder, vector), BASE if is_control else vector, seed)
    if is_control:
        train_on_corrupted(workspace, CHECKED, "text", "shuffle", 1.0, seed)
        adapt(workspace, CHECKED)
    for recommender in recommenders:
        place = positions(folder, recommender, vector)
        train_cell(workspace, CHECKED if is_control else vector, recommender, seed, place)


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        wanted: the files that it makes.
        run: makes them.
    """

    wanted: Sequence[Path]
    run: Callable[[], None]


def run_jobs(groups: Iterable[tuple[str, Sequence[Job]]], max_minutes: float | None) -> None:
    """Run the jobs whose files are missing, in the given order.

    Args:
        groups: jobs by label; the log says when the jobs of a label are complete.
        max_minutes: time after which no job starts; None for no limit.
    """
    begin = time.monotonic()
    for label, jobs in groups:
        for job in jobs:
            if all(path.exists() for path in job.wanted):
                continue
            if max_minutes is not None and time.monotonic() - begin >= 60.0 * max_minutes:
                logger.info("%g minutes are over; run it again to resume", max_minutes)
                return
            job.run()
        logger.info("%s: complete, %.1f minutes", label, (time.monotonic() - begin) / 60.0)


# ------------------------------------------------------------------------------------------------- results
Measured = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]  # by group with its number of users, by vectors: NDCG, Hit


def measure(
    shop: Workspace, params: Params, folder: Path, recommender: str, vectors: Sequence[str], seeds: Sequence[int]
) -> Measured:
    """NDCG and Hit ``(S, U)`` by seed and user: of all users, and of the groups of :func:`target_groups`."""
    read = {vector: read_positions(positions(folder, recommender, vector), seeds) for vector in vectors}
    return {
        group: {vector: (gains("ndcg", frames, mask), gains("hit", frames, mask)) for vector, frames in read.items()}
        for group, mask in target_groups(shop, params).items()
    }


def target_groups(shop: Workspace, params: Params) -> dict[str, np.ndarray]:
    """Masks ``(U,)`` of test users by their target, with the number of users in the name.

    The groups are all users, tail and cold targets, and targets whose text is unique or shared with other items.  Text vectors
    alone cannot tell items with one text apart, so there any other vector gains.  Groups with fewer than :data:`MIN_USERS` users
    are left out, and those of the text if nearly all texts are unique.
    """
    interactions = INTERACTIONS.read(shop.interactions)
    items = item_groups(interactions, params.evaluate.tail, ITEMS.count(shop.items))
    target_U = interactions.filter(pl.col("split") == "test").sort("user_id")["item_id"].to_numpy()
    masks = {"all": np.ones(len(target_U), dtype=bool), "tail": items.tail[target_U], "cold": items.cold[target_U]}
    shared_U = shares_text(item_source(shop, params.items))[target_U - 1]
    if shared_U.sum() >= MIN_USERS:
        masks |= {"unique text": ~shared_U, "shared text": shared_U}
    return {f"{group} ({mask.sum():,})": mask for group, mask in masks.items() if group == "all" or mask.sum() >= MIN_USERS}


def shares_text(source: ItemSource) -> np.ndarray:
    """``(I,)`` bool: whether another item has the same text."""
    _, group_I, count_G = np.unique(source.texts(np.arange(len(source))), return_inverse=True, return_counts=True)
    return count_G[group_I] > 1


def absolute(measured: Measured, title: str) -> str:
    """The Markdown table of NDCG and Hit of each group, with a row for each kind of vectors."""
    vectors = list(next(iter(measured.values())))
    heads = ["vectors", *(f"{group}: {metric}@{CUTOFF}" for group in measured for metric in ("NDCG", "Hit"))]
    rows = [[vector, *(f"{gain.mean():.4f}" for of in measured.values() for gain in of[vector])] for vector in vectors]
    return markdown_table(heads, rows, title)


def _pairs(measured: Measured) -> list[tuple[str, str, str]]:
    """Question, first, second, of each pair whose vectors were both measured."""
    known = next(iter(measured.values()))
    return [(asked, *pair) for asked, pairs in QUESTIONS.items() for pair in pairs if known.keys() >= {*pair}]


def answers(measured: Measured, params: Params, recommender: str, num_seeds: int) -> str:
    """The markdown table of differences, with a row for each measured pair of :data:`QUESTIONS`.

    Differences are in NDCG@10, with paired 95 % intervals over users and seeds.  Empty if no pair was measured.
    """
    rows: list[list[str]] = []
    for asked, first, second in _pairs(measured):
        shown = "" if asked in [row[0] for row in rows] else asked
        rows.append([shown, f"{first} - {second}", *difference_cells(measured, params, first, second)])
    heads = ["question", "difference", *difference_heads(measured)]
    return markdown_table(heads, rows, f"{recommender}, answers, {num_seeds} seeds") if rows else ""


def difference_cells(measured: Measured, params: Params, first: str, second: str) -> list[str]:
    """The cells of a pair of vectors under :func:`difference_heads`: NDCG of the first minus that of the second, by group."""
    cells: list[str] = []
    for group, of in measured.items():
        paired_SU = of[first][0] - of[second][0]
        cells.append(difference(paired_SU, params.evaluate, f"{first} - {second}"))
        if group.startswith("all"):
            cells.append(range_over_seeds(paired_SU))
    return cells


def difference_heads(measured: Measured) -> list[str]:
    """The heads of :func:`difference_cells`: a column for each group, and the range over the seeds of all users."""
    heads: list[str] = []
    for group in measured:
        heads += [f"{group}: NDCG@{CUTOFF} [95 %]", *(["over seeds"] if group.startswith("all") else [])]
    return heads


def intervals(measured: Measured, params: Params, recommender: str) -> Panels:
    """The differences of :func:`answers`, for a plot: a panel for each group, a line for each pair."""
    panels: Panels = {}
    for group, of in measured.items():
        lines = {
            f"{first} - {second}": mean_and_interval(of[first][0] - of[second][0], params.evaluate, f"{first} - {second}")
            for _, first, second in _pairs(measured)
        }
        if any(any(line) for line in lines.values()):
            panels[f"{recommender}, {group}"] = lines
    return panels


def embeddings_of(folder: Path, variant: str, seeds: Sequence[int]) -> list[Path]:
    """The embeddings of a variant by seed; those of the mismatched adapters are in separate projects."""
    trained = CHECKED if variant == MISMATCHED else variant
    return [Workspace(project(folder, variant) / f"seed-{seed}").embeddings(trained) for seed in seeds]


def mean_alignment(folder: Path, vector: str, seeds: Sequence[int]) -> str:
    """Retrieval@1 of a kind of vectors, mean over the seeds; empty if embeddings are missing."""
    paths = embeddings_of(folder, vector, seeds)
    return f"{mean_retrieval(paths):.4f}" if all(path.exists() for path in paths) else ""


def alignment(folder: Path, vectors: Sequence[str], seeds: Sequence[int]) -> str:
    """The markdown table of retrieval@1 by seed, which shows whether training aligned the modalities.

    It has a row for each variant whose embeddings exist for all seeds.
    """
    rows: list[list[str]] = []
    for variant in dict.fromkeys(source_of(vector) for vector in (BASE, *vectors)):
        paths = embeddings_of(folder, variant, seeds)
        if variant in (BASE, *VARIANTS, MISMATCHED) and all(path.exists() for path in paths):
            found = [retrieval_at_1(path) for path in (paths[:1] if variant == BASE else paths)]
            rows.append([variant, " ".join(f"{value:.4f}" for value in found)])
    title = "Retrieval@1 of image and text without their means, at most 2,000 items"
    return markdown_table(["variant", "by seed"], rows, title) if rows else ""
