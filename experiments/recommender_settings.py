"""Choose a recommender's settings on validation targets of several shops.

A recommender can measure the value of item vectors only if it is strong with learned ids *and* can use perfect knowledge.
Therefore each candidate is trained on `id`, on `oracle` (the true attributes) and on `zero_shot` (the backbone without an
adapter), in three shops:

    python -m experiments recommender_settings --name vbpr --recommender vbpr \\
        --try content_regularization=0.01 --try learning_rate=0.003,max_epochs=200

The settings of params.yaml are always the first candidate.  Test targets are not ranked.  Each shop is a project folder below
experiments/runs/recommender_settings.  Results of trainings are kept there, so a stopped run resumes, and a later run with more
candidates trains only the new ones.

The first table has the NDCG@10 on the validation targets at the selected epoch, mean over the seeds, and the difference from ids
with a 95 % interval over users and seeds.  The second table has, for each candidate, its NDCG@10 divided by the highest of all
candidates, mean over the shops.  Seconds are processor time of one training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from ruamel.yaml import YAML

from experiments import oracles
from experiments.options import THREE_SEEDS, Name, Recommender, Root, Seeds, Variants
from experiments.study import CUTOFF, check_names, difference, interval, logger, markdown_table, write_results
from experiments.workspaces import (
    BASE,
    NOTHING_TRAINED,
    Changed,
    changed_section,
    changed_tree,
    own_params,
    project_params,
    run_stage,
)
from sda_core import recommenders
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace, read_json, write_json
from sda_core.cli.scripts import Names, names
from sda_core.errors import ConfigError
from sda_core.evaluation.metrics import per_user
from sda_core.fingerprint import fingerprint
from sda_core.params import DemoDataset, Params, RecommenderParams
from sda_core.recommenders.batches import validation_view
from sda_core.recommenders.fit import USERS_PER_CHUNK
from sda_core.recommenders.position import count_positions
from sda_core.runtime import prepare_torch
from stages.fetch_images import fetch_images

SHOPS: Mapping[str, Sequence[str]] = {
    "default": [],
    "other-seed": ["dataset.seed=7"],
    "shared": ["dataset.image_share=0.05", "dataset.text_share=0.05", "dataset.text_completeness=1.0"],
}
VARIANTS = ("id", "random", "oracle", BASE)
REFERENCE = "id"
_MAKE_A_SHOP = ("dataset", "download", "filter", "fetch_images", "items", "backbone", "export_embeddings")

Candidates = Annotated[
    list[str] | None,
    typer.Option("--try", metavar="A=1,B=2", help="A candidate: the settings that it changes.  Repeat it for more."),
]
ShopNames = Annotated[Names, typer.Option("--shops", parser=names, metavar="A,B,...", help="Shops to use.")]


@dataclass(frozen=True)
class Trained:
    """The result of a candidate with one variant in one shop.

    Attributes:
        ndcg_SU: NDCG@10 of the validation targets, by seed and user.
        seconds: processor time of one training, mean over the seeds.
        epochs: number of epochs of one training, mean over the seeds.
    """

    ndcg_SU: np.ndarray
    seconds: float
    epochs: float


def main(
    name: Name,
    recommender: Recommender,
    candidates: Candidates = None,
    variants: Variants = Names(("id", "oracle", BASE)),
    shops: ShopNames = Names(SHOPS),
    root: Root = Path(),
    seeds: Seeds = THREE_SEEDS,
) -> None:
    """Train what is missing; write the tables."""
    check_names("--variants", variants, VARIANTS)
    check_names("--shops", shops, SHOPS)
    names_ = list(dict.fromkeys([REFERENCE, *variants]))
    usual = project_params(root).train_recommender.of(recommender)
    sections = {candidate: changed(usual, candidate) for candidate in ("", *(candidates or []))}
    made = {shop: _shop(root.resolve(), shop, with_base=BASE in names_) for shop in SHOPS if shop in shops}
    found: dict[str, dict[str, dict[str, Trained]]] = {}
    for candidate, section in sections.items():
        found[candidate] = {}
        for shop, (workspace, params) in made.items():
            found[candidate][shop] = {
                variant: _trained(workspace, params, _alone(section, usual) if variant == REFERENCE else section, variant, seeds)
                for variant in names_
            }
    any_params = next(iter(made.values()))[1]
    write_results(table(found, names_, recommender, any_params), "recommender_settings", name, root)


def changed(section: Changed, candidate: str) -> Changed:
    """A section of the params with the changes of a candidate.

    Args:
        section: the section.
        candidate: the changes, as ``A=1,B=2``; empty for none.

    Raises:
        ConfigError: there is no such setting, or a value is not allowed.
    """
    known = type(section).model_fields
    changes: dict[str, Any] = {}
    for change in filter(None, candidate.split(",")):
        key, separator, value = change.partition("=")
        if not separator or key not in known:
            raise ConfigError("--try", f"expected NAME=VALUE, with NAME one of {', '.join(known)} (got {change!r})")
        changes[key] = YAML(typ="safe").load(value)
    return changed_section(section, changes, "--try", candidate)


def _alone(section: RecommenderParams, usual: RecommenderParams) -> RecommenderParams:
    """The settings for ids alone, with the usual values of settings that affect only item vectors.

    So candidates that differ only in these share one training.
    """
    content = {key: value for key, value in usual.model_dump().items() if key.startswith("content_") or key == "representation"}
    return section.model_copy(update=content)


# ------------------------------------------------------------------------------------------------- shops
def _shop(root: Path, name: str, *, with_base: bool) -> tuple[Workspace, Params]:
    """Make the data of a shop and, with ``with_base``, the vectors of zero_shot, unless they exist."""
    changes = [*SHOPS[name], *NOTHING_TRAINED, "train_adapter.variants={}"]
    tree = changed_tree(root / "params.yaml", changes)
    made_of = fingerprint(*(json.dumps(tree[section], sort_keys=True) for section in _MAKE_A_SHOP))
    folder = root / "experiments" / "runs" / "recommender_settings" / f"{name}-{made_of[:8]}"
    workspace, params = Workspace(folder), own_params(root / "params.yaml", folder, changes, replace=True)
    if not isinstance(params.dataset, DemoDataset):
        raise ConfigError(
            "params.yaml: dataset.source", "the true attributes are known only for the built-in shop", "use dataset=demo"
        )
    oracles.make_shop(workspace, params)
    if with_base and not workspace.embeddings(BASE).exists():
        fetch_images(folder)
        run_stage("export_embeddings", BASE, folder)
    return workspace, params


def _vectors(workspace: Workspace, params: Params, variant: str, section: RecommenderParams) -> recommenders.ItemVectors | None:
    if variant == BASE:
        return recommenders.read_item_vectors(workspace.embeddings(BASE), section)
    return oracles.vectors(workspace, params, variant, section)


# ------------------------------------------------------------------------------------------------- training
def _trained(workspace: Workspace, params: Params, section: RecommenderParams, variant: str, seeds: Sequence[int]) -> Trained:
    rows = [_trained_once(workspace, params, section, variant, seed) for seed in seeds]
    ndcg_SU = np.array([row["ndcg"] for row in rows])
    return Trained(ndcg_SU, *(float(np.mean([row[key] for row in rows])) for key in ("seconds", "epochs")))


def _trained_once(workspace: Workspace, params: Params, section: RecommenderParams, variant: str, seed: int) -> dict[str, Any]:
    """Train once and keep the result in a file, or read it from there.

    The result has the NDCG@10 of each user's validation target at the selected epoch, the number of epochs, and the seconds of
    processor time.
    """
    made_of = fingerprint(section, str(seed), variant)
    path = workspace.root / "validation" / section.kind / variant / f"{made_of}.json"
    return validated(path, workspace, params, section, lambda: _vectors(workspace, params, variant, section), seed)


def validated(
    path: Path,
    workspace: Workspace,
    params: Params,
    section: RecommenderParams,
    vectors: Callable[[], recommenders.ItemVectors | None],
    seed: int,
) -> dict[str, Any]:
    """Train a recommender without the test interactions and rank the validation targets; keep the result in a file.

    Args:
        path: the file; if it exists, it is read and nothing is trained.  Its folder and name identify the settings.
        workspace: the project with the interactions.
        params: its params, of which ``runtime`` is used.
        section: settings of the recommender.
        vectors: computes the item vectors; called if the recommender is trained.
        seed: seed of the training.

    Returns:
        ``ndcg``: NDCG@10 of each user's validation target at the selected epoch; ``epochs``: their number; ``seconds`` of
        processor time.
    """
    if not path.exists():
        device = prepare_torch(params.runtime)
        interactions = INTERACTIONS.read(workspace.interactions)
        data = recommenders.training_data(
            interactions.filter(interactions["split"].is_in(["train", "valid"])),
            num_users=interactions["user_id"].n_unique(),
            num_items=ITEMS.count(workspace.items),
        )
        model = recommenders.build(section, data.num_users, data.num_items, vectors(), seed=seed)
        scratch = path.with_suffix(".safetensors")
        begin = time.process_time()
        records = model.fit(data, checkpoint=scratch, fingerprint=path.stem, device=device)
        seconds = time.process_time() - begin
        counts = count_positions(model, validation_view(data), None, USERS_PER_CHUNK, device)
        ndcg_U = per_user("ndcg", 1.0 + counts[:, 0] + counts[:, 1], CUTOFF)
        write_json(path, {"seconds": round(seconds, 2), "epochs": len(records), "ndcg": ndcg_U.tolist()})
        scratch.unlink(missing_ok=True)
        logger.info("%s %s, seed %d: %d epochs, %.4f", section.kind, path.parent.name, seed, len(records), ndcg_U.mean())
    return read_json(path, "a candidate's validation")


# ------------------------------------------------------------------------------------------------- results
def table(
    found: Mapping[str, Mapping[str, Mapping[str, Trained]]], variants: Sequence[str], recommender: str, params: Params
) -> str:
    """Two markdown tables: a row for each candidate and shop, and a row for each candidate over all shops."""
    rows: list[list[str]] = []
    for candidate, of_shops in found.items():
        for shop, of_variants in of_shops.items():
            row = [candidate or "unchanged", shop]
            ids_SU = of_variants[REFERENCE].ndcg_SU
            for variant in variants:
                own = of_variants[variant]
                row.append(f"{own.ndcg_SU.mean():.4f} ({own.epochs:.0f} epochs, {own.seconds:.1f} s)")
                if variant != REFERENCE:
                    row.append(difference(own.ndcg_SU - ids_SU, params.evaluate, shop))
            rows.append(row)
    heads = ["settings", "shop", REFERENCE]
    for variant in variants[1:]:
        heads += [variant, f"{variant} - id"]
    first = markdown_table(heads, rows, f"Validation NDCG@{CUTOFF} of {recommender}")
    return first + "\n" + markdown_table(["settings", *variants, "oracle clear in", "seconds"], _summary(found, variants, params))


def _summary(
    found: Mapping[str, Mapping[str, Mapping[str, Trained]]], variants: Sequence[str], params: Params
) -> list[list[str]]:
    """The rows of the second table, one for each candidate.

    Cells: the NDCG@10 divided by the best candidate's for each variant, mean over the shops; the number of shops in which the
    interval of oracle minus ids is above 0; and the seconds of one training, mean over shops and variants.
    """
    shops = list(next(iter(found.values())))
    best = {
        (shop, variant): max(of_shops[shop][variant].ndcg_SU.mean() for of_shops in found.values())
        for shop in shops
        for variant in variants
    }
    rows: list[list[str]] = []
    for candidate, of_shops in found.items():
        row = [candidate or "unchanged"]
        for variant in variants:
            shares = [of_shops[shop][variant].ndcg_SU.mean() / best[shop, variant] for shop in shops]
            row.append(f"{np.mean(shares):.3f}")
        clear = 0
        if "oracle" in variants:
            for shop in shops:
                gain_SU = of_shops[shop]["oracle"].ndcg_SU - of_shops[shop][REFERENCE].ndcg_SU
                clear += interval(gain_SU, params.evaluate, shop)[0] > 0.0
        seconds = np.mean([one.seconds for of_variants in of_shops.values() for one in of_variants.values()])
        rows.append([*row, f"{clear} of {len(shops)}" if "oracle" in variants else "", f"{seconds:.1f}"])
    return rows
