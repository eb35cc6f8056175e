"""The measured variation between whole runs, adapters included, in a file with the settings and targets it applies to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sda_core.artifacts import write_text
from sda_core.errors import ArtifactError, DataError
from sda_core.evaluation.groups import item_groups
from sda_core.evaluation.metrics import Metric
from sda_core.evaluation.seed_noise import Spread, spread_of_runs
from sda_core.evaluation.seeds import stack
from sda_core.params import TailParams
from sda_core.traits import WITHOUT_SEED

Tree = Mapping[str, Any]
"""The content of a ``params.yaml``."""

NAME = "seed_noise.json"
COMMAND = "python -m experiments seed_noise"
_HASH = r"^[0-9a-f]{16}$"


# ------------------------------------------------------------------------------------------------- which settings
def at(params: Tree, path: str) -> Any:
    """The value under a dotted name; None if there is none."""
    found: Any = params
    for name in path.split("."):
        found = cast("Tree", found).get(name) if isinstance(found, Mapping) else None
    return found


def _without(section: Any, *names: str) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {name: value for name, value in cast("Tree", section).items() if name not in names}


def has_adapter(params: Tree, variant: str) -> bool:
    """Whether an adapter is trained for a variant: its own, or the one that a joint variant uses."""
    return at(params, f"train_adapter.variants.{at(params, f'joint_embeddings.variants.{variant}.of') or variant}") is not None


def has_seed(params: Tree, recommender: str) -> bool:
    """Whether a recommender's training draws random numbers; true for unknown recommenders."""
    return at(params, f"train_recommender.{recommender}.kind") not in WITHOUT_SEED


def sections(params: Tree, variant: str, recommender: str) -> dict[str, Any]:
    """The settings on which a variant's result in a recommender depends, except the training seeds.

    Locations of raw files, settings of the download, and settings that only affect speed or memory are excluded.

    Args:
        params: the content of a ``params.yaml``, not validated, because another version may have other settings.
        variant: the variant.
        recommender: the recommender trained on its vectors.

    Returns:
        The settings by dotted name; None for missing ones.
    """
    drawn = () if at(params, "evaluate.protocol") == "fullrank" else ("negatives_seed",)
    found = {
        "dataset": _without(at(params, "dataset"), "reviews", "metadata", "image_archive", "image_folder", "local_folder"),
        "filter": at(params, "filter"),
        "evaluate": {name: at(params, f"evaluate.{name}") for name in ("protocol", "ties", "tail", "retrieval", *drawn)},
        f"train_recommender.{recommender}": at(params, f"train_recommender.{recommender}"),
        "number of train_recommender.seeds": len(at(params, "train_recommender.seeds") or ()),
    }
    if variant == "id":
        return found
    speed = ("engine", "num_workers", "batch_size", "shard_rows", "merge", "compile")
    found |= {
        "fetch_images.stored_pixels": at(params, "fetch_images.stored_pixels"),
        "items": at(params, "items"),
        "backbone": at(params, "backbone"),
        "export_embeddings": _without(at(params, "export_embeddings"), *speed),
    }
    joint = at(params, f"joint_embeddings.variants.{variant}")
    if joint is not None:
        found[f"joint_embeddings.variants.{variant}"] = joint
    trained = f"train_adapter.variants.{variant if joint is None else at(joint, 'of')}"
    if at(params, trained) is not None:
        speed = ("gradient_checkpointing", "sharding", "vision_cache", "check", "checkpoint_every", "log_every")
        found["train_adapter.training"] = _without(at(params, "train_adapter.training"), "seed", *speed)
        for part in ("adapter", "loss"):
            name = f"train_adapter.{at(params, f'{trained}.{part}')}"
            found[name] = at(params, name)
        found[trained] = at(params, trained)
    if variant in (at(params, "control_embeddings.variants") or ()):
        found["control_embeddings.seed"] = at(params, "control_embeddings.seed")
    imported = at(params, f"import_embeddings.variants.{variant}")
    if imported is not None:
        found[f"import_embeddings.variants.{variant}"] = imported
    return found


def settings_hashes(params: Tree, variant: str, recommender: str) -> dict[str, str]:
    """Hashes of :func:`sections`: 16 hex digits of the SHA-256 of the JSON of each."""
    return {name: _digest(content) for name, content in sections(params, variant, recommender).items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def targets_hash(positions: pl.DataFrame) -> str:
    """A hash of the users, targets and numbers of candidates in a SEED_POSITIONS table, 16 hex digits."""
    placed = stack(positions)
    table = np.stack([column.astype(np.int64) for column in (placed.user_U, placed.target_U, placed.candidates_U)], axis=1)
    return hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- the file
@dataclass(frozen=True)
class SeedNoise:
    """Metrics of several runs that differ only in their seeds.

    Attributes:
        seeds: seeds of the adapters, one run each.
        settings: hash of each section by :func:`settings_hashes`, over all variants and recommenders.
        targets: see :func:`targets_hash`.
        values: by ``variant/recommender/metric``, one value per seed.
    """

    seeds: tuple[int, ...]
    settings: Mapping[str, str]
    targets: str
    values: Mapping[str, tuple[float, ...]]

    def spread(self, variant: str, recommender: str, metric: str) -> Spread | None:
        """The spread of a metric, e.g. ``tail_ndcg@10``; None if it was not measured."""
        found = self.values.get(f"{variant}/{recommender}/{metric}")
        return None if found is None else spread_of_runs(found)

    def unlike(self, params: Tree, variant: str, recommender: str) -> list[str]:
        """The sections of params in which a run differs from the measured runs; if empty, the variation applies to the run."""
        hashes = settings_hashes(params, variant, recommender)
        return [name for name, digest in hashes.items() if self.settings.get(name) != digest]


def metric_values(
    positions: pl.DataFrame, interactions: pl.DataFrame, tail: TailParams, cutoffs: Collection[int], num_items: int | None = None
) -> dict[str, float]:
    """Hit and NDCG of one evaluation, mean over its seeds, of all users and of those with a tail target.

    Args:
        positions: SEED_POSITIONS table.
        interactions: the whole table, all splits.
        tail: the definition of tail.
        cutoffs: cut-offs of the metrics.
        num_items: I; None as in :func:`sda_core.evaluation.groups.catalogue_size`.
    """
    placed = stack(positions)
    masks = {"": None, "tail_": item_groups(interactions, tail, num_items).tail}
    metrics: tuple[Metric, ...] = ("hit", "ndcg")
    return {
        f"{prefix}{metric}@{cutoff}": float(value_SU.mean())
        for prefix, mask in masks.items()
        for metric in metrics
        for cutoff in sorted(set(cutoffs))
        if (value_SU := placed.values(metric, cutoff, mask)).size
    }


def gather(
    runs: Mapping[int, Mapping[tuple[str, str], pl.DataFrame]],
    settings: Mapping[str, str],
    interactions: pl.DataFrame,
    tail: TailParams,
    cutoffs: Collection[int],
    num_items: int | None = None,
) -> SeedNoise:
    """Collect the metrics of several runs.

    Args:
        runs: by seed, the SEED_POSITIONS tables by (variant, recommender).
        settings: settings of the runs, see :class:`SeedNoise`.
        interactions, tail, cutoffs, num_items: see :func:`metric_values`.

    Raises:
        DataError: the runs differ in their targets, variants or recommenders.
    """
    values: dict[str, list[float]] = {}
    hashes: set[str] = set()
    seeds = tuple(sorted(runs))
    for seed in seeds:
        if runs[seed].keys() != runs[seeds[0]].keys():
            raise DataError(
                "variation between seeds", f"seeds {seeds[0]} and {seed} do not have the same variants and recommenders"
            )
        for (variant, recommender), positions in runs[seed].items():
            hashes.add(targets_hash(positions))
            for name, value in metric_values(positions, interactions, tail, cutoffs, num_items).items():
                values.setdefault(f"{variant}/{recommender}/{name}", []).append(value)
    if len(hashes) != 1:
        raise DataError(
            "variation between seeds",
            f"the runs have {len(hashes)} sets of targets, expected one",
            "evaluate them on the same data",
        )
    return SeedNoise(seeds, settings, hashes.pop(), {name: tuple(found) for name, found in values.items()})


def write(noise: SeedNoise, path: Path) -> None:
    """Write the file: JSON with one line per setting and metric, so that Git shows changes."""
    write_text(path, "\n".join(_lines(noise)) + "\n")


def _lines(noise: SeedNoise) -> Iterator[str]:
    def block(name: str, rows: Tree, end: str) -> Iterator[str]:
        yield f"  {json.dumps(name)}: {{"
        yield ",\n".join(f"    {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in rows.items())
        yield f"  }}{end}"

    yield "{"
    yield f'  "seeds": {json.dumps(noise.seeds)},'
    yield f'  "targets": {json.dumps(noise.targets)},'
    yield from block("settings", dict(noise.settings), ",")
    yield from block("values", {name: list(values) for name, values in noise.values.items()}, "")
    yield "}"


def read(path: Path) -> SeedNoise:
    """Read a file written by :func:`write`.

    Raises:
        ArtifactError: the file is missing or has another format.
    """
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ArtifactError(str(path), problem, f"run `{COMMAND}` to measure it")
    advice = f"restore it (`git checkout -- {path.name}`), or run `{COMMAND}` to measure it again"
    try:
        found = _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(str(path), f"{place or 'the file'}: {first['msg']}", advice) from None
    for name, values in found.values.items():
        if name.count("/") != 2 or len(values) != len(found.seeds):
            problem = f"{name!r} has {len(values)} numbers, expected VARIANT/RECOMMENDER/METRIC with {len(found.seeds)}"
            raise ArtifactError(str(path), problem, advice)
    if len(set(found.seeds)) != len(found.seeds):
        raise ArtifactError(str(path), f"a seed occurs twice (got {', '.join(map(str, found.seeds))})", advice)
    return SeedNoise(found.seeds, found.settings, found.targets, found.values)


class _File(BaseModel):
    """The file's schema."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    seeds: Annotated[tuple[int, ...], Field(min_length=2)]
    targets: Annotated[str, Field(pattern=_HASH)]
    settings: dict[str, Annotated[str, Field(pattern=_HASH)]]
    values: dict[str, tuple[Annotated[float, Field(ge=0, le=1)], ...]]
