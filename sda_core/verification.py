"""Check every artifact of a run: schema, hashes, and consistency with the other artifacts.

There is one check per file or folder.  Checks cover the contents: tables and vectors are read, the index is searched,
recommenders are loaded, metrics are recomputed.  Artifacts that do not exist yet are reported as absent, and checks that depend
on an absent or damaged artifact are skipped, so each damage is reported once.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sda_core import evaluation, recommenders
from sda_core.artifacts import (
    EMBEDDINGS,
    INTERACTIONS,
    ITEMS,
    NEGATIVES,
    SEED_POSITIONS,
    TRUTH,
    USERS,
    Table,
    Workspace,
    read_json,
    tsv,
)
from sda_core.data.prompts import prompt_hash
from sda_core.embeddings.fusion import has_content
from sda_core.embeddings.table import read_metadata
from sda_core.errors import ArtifactError, SDAError
from sda_core.fetch import download, images, manifest
from sda_core.fingerprint import fingerprint, sha256_path
from sda_core.image_store import FORMAT_PREFIX, STATUSES, format_count, read_images
from sda_core.index import load_index
from sda_core.item_vectors import read_vectors
from sda_core.local_files import user_folder
from sda_core.params import CLIP, AdapterParams, Checkpoint, DemoDataset, Nano, Oracle, Params, SigLIP
from sda_core.recommenders.history import HISTORY, mean_over_seeds, read_history, validation_metrics
from sda_core.runtime import prepare_torch
from sda_core.traits import seeds_of
from sda_core.variants import adapter_of, controls, indexed_variants, reported

Status = Literal["ok", "absent", "skipped", "problem"]

_AGAIN = "run `dvc repro` to make it again"
_TAKEN = "run `dvc repro`, which reads the current local files"
_UNIT = 1e-3  # tolerance of a unit vector's length
_SAME = 1e-9  # tolerance between a number in a JSON file and its recomputed value
_NUM_QUERIES = 50


@dataclass(frozen=True)
class Finding:
    """The result of a check: the path (relative to the project folder), and a line of text."""

    status: Status
    path: str
    text: str


class _Skipped(Exception):  # noqa: N818 (no error: it ends a check)
    """An input of the check is absent, or damaged and already reported."""


def verify(workspace: Workspace, params: Params) -> Iterator[Finding]:
    """Check all artifacts of a run with these params, in the order of the pipeline.

    Args:
        workspace: paths of a finished or unfinished run.
        params: params of the project, with which the artifacts are compared.

    Yields:
        One finding per file or folder.
    """
    run = _Run(workspace, params)
    for path, check in run.checks():
        name = path.relative_to(workspace.root).as_posix()
        if not path.exists():
            yield Finding("absent", name, "not made yet")
            continue
        try:
            yield Finding("ok", name, check())
        except _Skipped as skipped:
            yield Finding("skipped", name, str(skipped))
        except SDAError as error:
            where = "" if error.where == str(path) else f"{error.where}: "
            yield Finding("problem", name, f"{where}{error.problem}" + (f"; {error.advice}" if error.advice else ""))
    yield from _locked(workspace.root)


class _Run:
    """A workspace with its tables, each of which is read once."""

    def __init__(self, workspace: Workspace, params: Params) -> None:
        self.workspace, self.params = workspace, params

    def checks(self) -> Iterator[tuple[Path, Callable[[], str]]]:
        """Every path with its check."""
        at, params = self.workspace, self.params
        yield at.raw, self.raw
        yield at.truth, self.truth
        yield at.interactions, self.check_interactions
        yield at.items, self.check_items
        yield at.users, self.check_users
        yield at.statistics, self.statistics
        yield at.images, self.images
        for variant in params.train_adapter.variants:
            yield at.adapter(variant), partial(self.adapter, variant)
        for variant in params.variants:
            yield at.embeddings(variant), partial(self.check_embeddings, variant)
        for variant in indexed_variants(params):
            yield at.index(variant), partial(self.index, variant)
        pairs = [(variant, recommender) for variant in params.variants for recommender in params.recommenders]
        for pair in pairs:
            for seed in self._seeds(pair[1]):
                yield at.model(*pair, seed), partial(self.recommender, *pair, seed)
            yield at.recommender(*pair) / HISTORY, partial(self.history, *pair)
        if params.evaluate.protocol != "fullrank":
            yield (path := at.negatives(params.evaluate.protocol)), partial(self.negatives, path)
        for pair in pairs:
            yield at.positions(*pair), partial(self.check_positions, *pair)
            yield at.metrics(*pair), partial(self.metrics, *pair)
        yield at.comparisons, self.comparisons
        yield at.report, self.report

    # ------------------------------------------------------------------------------------------- tables, once
    def _table(self, table: Table, path: Path) -> pl.DataFrame:
        """Check that a table is readable; another check covers its contents."""
        try:
            return table.read(path)
        except SDAError:
            relative = path.relative_to(self.workspace.root).as_posix()
            state = "is broken" if path.exists() else "is absent"
            raise _Skipped(f"not checked: {relative} {state}") from None

    @cached_property
    def interactions(self) -> pl.DataFrame:
        return self._table(INTERACTIONS, self.workspace.interactions)

    @cached_property
    def items(self) -> pl.DataFrame:
        return self._table(ITEMS, self.workspace.items)

    @property
    def num_items(self) -> int:
        return len(self.items)

    def _vectors(self, variant: str) -> np.ndarray | None:
        path = self.workspace.embeddings(variant)
        self._table(EMBEDDINGS, path)
        try:
            return read_vectors(path)
        except SDAError:
            raise _Skipped(f"not checked: embeddings/{variant}.parquet is broken") from None

    # --------------------------------------------------------------------------------------------------- data
    def raw(self) -> str:
        manifest.check(self.workspace.raw)
        changed = download.changed_sources(self.workspace.raw, self.workspace.root)
        if changed:
            raise ArtifactError(str(self.workspace.raw), " | ".join(changed))
        files = manifest.read_manifest(self.workspace.raw)
        return f"{len(files)} files, {sum(file.bytes for file in files):,} bytes, sha256 as in the manifest"

    def truth(self) -> str:
        path, table = self.workspace.truth, TRUTH.read(self.workspace.truth)
        if not isinstance(self.params.dataset, DemoDataset):
            _expect(table.is_empty(), path, "has rows, but the dataset is not the built-in shop")
            return "empty, because the dataset is not the built-in shop"
        missing = self.items.join(table, on="raw_item_id", how="anti")
        _expect(missing.is_empty(), path, f"has no attributes of {len(missing)} items of items.parquet")
        return f"{table['attribute'].n_unique()} attributes of {table['raw_item_id'].n_unique():,} items"

    def check_interactions(self) -> str:
        path = self.workspace.interactions
        table = INTERACTIONS.read(path)
        num_users, num_items = (_contiguous(table[column], path, column) for column in ("user_id", "item_id"))
        unknown = set(table["split"].unique()) - {"train", "valid", "test", "valid_rest", "test_rest"}
        _expect(not unknown, path, f"unknown splits {', '.join(sorted(unknown))}")
        in_order = (pl.col("user_id").diff() > 0) | ((pl.col("user_id").diff() == 0) & (pl.col("timestamp").diff() >= 0))
        _expect(bool(table.select(in_order.all()).item()), path, "rows are not sorted by user and time")
        for split in ("valid", "test"):
            most = table.filter(pl.col("split") == split).group_by("user_id").len()["len"].max()
            _expect(most is None or most == 1, path, f"a user has {most} {split} items, where one at most is the target")
        if self.params.filter.duplicates != "keep":
            twice = len(table) - table.select("user_id", "item_id").n_unique()
            _expect(twice == 0, path, f"{twice} rows repeat a user's item, although filter.duplicates keeps one")
        return f"{len(table):,} rows, {num_users:,} users, {num_items:,} items"

    def check_items(self) -> str:
        path = self.workspace.items
        table = ITEMS.read(path)
        self._runs_from_1(table["item_id"], path)
        _expect(table["raw_item_id"].is_unique().all(), path, "a raw_item_id occurs twice")
        self._as_many("item_id", len(table), path)
        return f"{len(table):,} items"

    def check_users(self) -> str:
        path = self.workspace.users
        table = USERS.read(path)
        self._runs_from_1(table["user_id"], path)
        _expect(table["raw_user_id"].is_unique().all(), path, "a raw_user_id occurs twice")
        self._as_many("user_id", len(table), path)
        return f"{len(table):,} users"

    @staticmethod
    def _runs_from_1(ids: pl.Series, path: Path) -> None:
        expected = np.arange(1, len(ids) + 1)
        _expect(np.array_equal(ids.to_numpy(), expected), path, f"{ids.name} should run from 1 to {len(ids)} in order")

    def _as_many(self, column: str, number: int, path: Path) -> None:
        most = self.interactions[column].max()
        _expect(most == number, path, f"has {number} rows, but the interactions go up to {column} {most}")

    def statistics(self) -> str:
        path, table = self.workspace.statistics, self.interactions
        found = _mapping(path, "statistics of the filter stage")
        counted = {
            "num_interactions": len(table),
            "num_users": table["user_id"].n_unique(),
            "num_items": table["item_id"].n_unique(),
            **{f"num_{split}": int((table["split"] == split).sum()) for split in ("train", "valid", "test")},
        }
        for name, value in counted.items():
            _expect(found.get(name) == value, path, f"{name} is {found.get(name)}, the tables have {value}")
        return f"{len(counted)} counts as in the tables"

    def images(self) -> str:
        folder, counts, ids = self.workspace.images, dict.fromkeys(STATUSES, 0), list[int]()
        formats = Counter[str]()
        raw = dict(self.items.select("item_id", "raw_item_id").iter_rows())
        for shard in read_images(folder):
            for row in shard.iter_rows(named=True):
                item = row["item_id"]
                ids.append(item)
                _expect(
                    raw.get(item) == row["raw_item_id"], folder, f"item {item} is {row['raw_item_id']!r}, not as in the items"
                )
                _expect(row["status"] in counts, folder, f"item {item} has the unknown status {row['status']!r}")
                counts[row["status"]] += 1
                if row["status"] == "unsupported":
                    formats[format_count(row["reason"])] += 1
                named = row["reason"] is not None
                _expect(named == (row["status"] == "unsupported"), folder, f"item {item} has the reason {row['reason']!r}")
                if row["status"] == "ok":
                    _check_image(row, folder)
        _expect(ids == sorted(raw), folder, f"holds {len(ids)} items, the items table {len(raw)}, or in another order")
        found = _mapping(self.workspace.image_coverage, "coverage of the image stage")
        for status, number in counts.items():
            told = found.get(f"num_{status}")
            _expect(told == number, self.workspace.image_coverage, f"num_{status} is {told}, the shards have {number}")
        told = {name: value for name, value in found.items() if name.startswith(FORMAT_PREFIX)}
        _expect(told == formats, self.workspace.image_coverage, f"counts {told} by format, the shards have {dict(formats)}")
        return f"{len(ids):,} items, {counts['ok']:,} images{self._local_images()}"

    def _local_images(self) -> str:
        """Check images against the local folders; returns a remark if these are not on this machine."""
        dataset, root = self.params.dataset, self.workspace.root
        local, other = (
            user_folder(text, root, f"params.yaml: dataset.{name}")
            for name, text in (("local_folder", dataset.local_folder), ("image_folder", dataset.image_folder))
        )
        if local is None and other is None:
            return ""
        for folder in (local, other):
            if folder is not None and not folder.is_dir():
                return f" (not compared with {folder}, which is not there)"
        at = self.workspace
        changed = images.changed_images(self.items, at.raw, local, other, self.params.fetch_images, at.images)
        _expect(
            not changed,
            at.images,
            f"{len(changed)} images are not those of the local files and params now, e.g. of {changed[:1]}",
            _TAKEN,
        )
        return ", as in the local files"

    # ------------------------------------------------------------------------------------------------ vectors
    def adapter(self, variant: str) -> str:
        folder = self.workspace.adapter(variant)
        section, _ = self.params.train_adapter.of(variant)
        path = folder / "adapter_config.json"
        config = _mapping(path, "adapter configuration")
        for name in set(AdapterParams.model_fields) - {"targets"}:
            _as_params(path, f"train_adapter: {name} of {variant}", config.get(name), getattr(section, name))
        weights = _tensors(folder / "adapter_model.safetensors")
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, tensor in weights.items():
            layer, _, kind = name.removeprefix("base_model.model.").rpartition(".")
            layers.setdefault(layer, {})[kind] = tuple(tensor.shape)
        _expect(bool(layers), folder, "holds no weights")
        from sda_core import adapters  # loads PEFT, which takes seconds

        for name in ("modalities", "target_modules"):
            _expect(name in config, path, f"has no {name}")
        named, pattern = config["modalities"], config["target_modules"]
        is_list = isinstance(named, list) and all(isinstance(modality, str) for modality in named)
        _expect(is_list, path, f"modalities should be a list of names (got {named!r})")
        _expect(isinstance(pattern, str) and _is_pattern(pattern), path, f"target_modules should be a pattern (got {pattern!r})")
        adapter = adapters.config_of(section, config["modalities"], config["target_modules"])
        lora_rank = adapter.rank_per_expert * adapter.num_experts
        for layer, shapes in layers.items():
            _expect(re.fullmatch(config["target_modules"], layer) is not None, folder, f"{layer} is not one of its targets")
            expected = {
                "moda_A": (lora_rank, *shapes.get("moda_A", ())[1:]),
                "moda_B": (*shapes.get("moda_B", ())[:1], lora_rank),
                **adapter.gate_shapes,
            }
            _expect(shapes == expected, folder, f"{layer} has {shapes}, where {expected} is expected")
        steps = _curve(folder / "loss.tsv")
        if len(steps):
            finite = "loss" in steps.columns and steps["loss"].cast(pl.Float64, strict=False).is_finite().fill_null(False).all()
            _expect(bool(finite), folder / "loss.tsv", "has a loss that is not a finite number")
        return f"{len(layers)} layers, {sum(tensor.numel() for tensor in weights.values()):,} weights, all finite"

    def check_embeddings(self, variant: str) -> str:
        path = self.workspace.embeddings(variant)
        vectors = read_vectors(path)
        table = EMBEDDINGS.read(path)
        items = self.items
        same = np.array_equal(table["item_id"].to_numpy(), items["item_id"].to_numpy())
        _expect(
            same and table["raw_item_id"].equals(items["raw_item_id"]), path, "its items are not those of items.parquet, in order"
        )
        described = read_metadata(path)
        if variant == "id":
            _expect(vectors is None, path, "the variant id should have no vectors")
            return f"{len(table):,} ids"
        if vectors is None:
            raise ArtifactError(str(path), "holds no vectors", _AGAIN)
        for name, value in self._expected_metadata(variant).items():
            _as_params(path, name, described.get(name), value)
        is_joint = variant in self.params.joint_embeddings.variants
        is_imported = variant in self.params.import_embeddings.variants  # these may lack a modality or differ in width
        columns = ("image_embedding", "text_embedding")
        _expect(
            not (is_joint and {*columns} & {*table.columns}), path, "has vectors of one modality beside those of a joint pass"
        )
        for column in columns if not (is_joint or is_imported) else ():
            modality = read_vectors(path, column, fill="mean")
            width = None if modality is None else str(modality.shape[1])
            _expect(width == described.get("modality_dim"), path, f"{column} is {width} wide, its metadata says another width")
        _expect(str(vectors.shape[1]) == described.get("embedding_dim"), path, "embedding_dim in its metadata is another width")
        if self.params.export_embeddings.normalize:
            lengths = np.linalg.norm(vectors[1:], axis=1)
            off = int(((np.abs(lengths - 1) > _UNIT) & (lengths != 0)).sum())
            _expect(off == 0, path, f"{off} of {len(lengths)} vectors are not of unit length, although normalize is true")
        zeros, expected = int((~vectors[1:].any(axis=1)).sum()), self._num_without_content(variant, table, described)
        _expect(zeros == expected, path, f"{zeros} of its vectors are zero, but {expected} items have nothing to embed")
        return f"{len(table):,} vectors of width {vectors.shape[1]}, finite"

    def _num_without_content(self, variant: str, table: pl.DataFrame, described: Mapping[str, str]) -> int:
        """Number of items whose vector should be zero, because they have none of the fused modalities."""
        if "imported_missing_items" in described and described.get("fusion") == "none":
            return int(described["imported_missing_items"])
        columns = ("image_embedding", "text_embedding")
        if variant == "random" or not {*columns} <= {*table.columns}:  # random directions, or a joint pass
            return 0
        has_image, has_text = (table[column].is_not_null().to_numpy() for column in columns)
        if variant in ("image_only", "text_only"):
            return int((~(has_image if variant == "image_only" else has_text)).sum())
        return int((~has_content(has_image, has_text, self.params.export_embeddings)).sum())

    def _expected_metadata(self, variant: str) -> dict[str, str]:
        backbone, section = self.params.backbone, self.params.export_embeddings
        if variant in self.params.import_embeddings.variants:
            source = Path(self.params.import_embeddings.of(variant).path)
            return {"imported_from": source.name, "normalized": str(section.normalize).lower()}
        if variant in get_args(Oracle):
            return {"control": variant, "control_seed": str(self.params.control_embeddings.seed)}
        expected = {
            "prompt_hash": prompt_hash(self.params.items),
            "fusion": section.fusion,
            "normalized": str(section.normalize).lower(),
            "backbone_kind": backbone.kind,
        }
        if variant in self.params.joint_embeddings.variants:
            expected |= {"pass": "joint"}
        if not isinstance(backbone, CLIP | SigLIP):
            expected["backbone_pooling"] = backbone.pooling
        if isinstance(backbone, Nano):
            expected["backbone_name"] = backbone.kind
        if isinstance(backbone, Checkpoint):
            revision = self._local_revision or backbone.revision
            if revision is not None:
                expected |= {"backbone_name": backbone.name, "backbone_revision": revision}
        adapter = adapter_of(self.params, variant)
        if adapter is None:
            expected["adapter_hash"] = ""
        elif self.workspace.adapter(adapter).is_dir():
            expected["adapter_hash"] = fingerprint(self.workspace.adapter(adapter))
        return expected

    @cached_property
    def _local_revision(self) -> str | None:
        """The revision of a checkpoint folder as in ``sda_core.backbones``; None if the backbone is not a folder here."""
        assert isinstance(self.params.backbone, Checkpoint)
        folder = user_folder(self.params.backbone.name, self.workspace.root, "params.yaml: backbone.name")
        return f"sha256:{sha256_path(folder)}" if folder is not None and folder.is_dir() else None

    def index(self, variant: str) -> str:
        folder, section = self.workspace.index(variant), self.params.build_index
        opened = load_index(folder)
        for name in ("factory", "nprobe", "ef_search"):
            _as_params(folder, f"build_index.{name}", opened.metadata.get(name), getattr(section, name))
        vectors = self._vectors(variant)
        if vectors is None:
            raise ArtifactError(str(folder), f"is of a variant without vectors, {variant}")
        described, width = np.flatnonzero(vectors.any(axis=1)), vectors.shape[1]  # a row of zeros is an item without a vector
        shape = len(opened.item_ids), int(opened.index.d)
        expected = len(described), width
        _expect(shape == expected, folder, f"holds {shape[0]} vectors of width {shape[1]}, not {expected[0]} of {width}")
        same = np.array_equal(np.sort(opened.item_ids), described)
        _expect(same, folder, f"its items are not the {len(described)} of {variant} that have a vector")
        queries = described[np.unique(np.linspace(0, len(described) - 1, min(_NUM_QUERIES, len(described))).round().astype(int))]
        found = opened.search(vectors[queries], 1)[0][:, 0]
        lengths = np.linalg.norm(vectors, axis=1)
        cosines = np.einsum("qd,qd->q", vectors[queries], vectors[found]) / (lengths[queries] * np.maximum(lengths[found], 1e-12))
        share = float((cosines > 1 - _UNIT).mean())  # the nearest item is the item itself, or one with the same vector
        _expect(
            share >= section.min_recall,
            folder,
            f"{share:.0%} of {len(queries)} items are their own nearest neighbour in {variant}",
        )
        opened.check_vectors(vectors[1:])  # also a few changed vectors, which the search may miss
        return f"{opened.metadata['factory']}, {shape[0]:,} vectors of width {width}, items are their own nearest neighbours"

    # -------------------------------------------------------------------------------------------- recommenders
    def _seeds(self, recommender: str) -> tuple[int, ...]:
        section = self.params.train_recommender
        return seeds_of(section.of(recommender), section.seeds)

    def recommender(self, variant: str, recommender: str, seed: int) -> str:
        folder = self.workspace.model(variant, recommender, seed)
        saved = recommenders.saved_params(folder)
        _expect(recommenders.saved_seed(folder) == seed, folder, "was trained with another seed than its folder's name")
        _expect(
            saved == self.params.train_recommender.of(recommender),
            folder,
            f"was trained with other settings than params.yaml: train_recommender.{recommender} has",
        )
        self._vectors(variant)  # damaged ones are reported by their own check
        vectors = recommenders.read_item_vectors(self.workspace.embeddings(variant), saved)
        model = recommenders.load(folder, vectors, prepare_torch(self.params.runtime))
        sizes = self.interactions["user_id"].max(), self.num_items
        _expect(
            (model.num_users, model.num_items) == sizes,
            folder,
            f"is of {model.num_users} users and {model.num_items} items, the data of {sizes[0]} and {sizes[1]}",
        )
        broken = [name for name, value in model.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
        _expect(not broken, folder, f"weights that are not finite: {', '.join(broken)}")
        return f"{sum(value.numel() for value in model.state_dict().values()):,} numbers, loads"

    def history(self, variant: str, recommender: str) -> str:
        seeds = self._seeds(recommender)
        for seed in seeds:
            if not self.workspace.model(variant, recommender, seed).exists():
                raise _Skipped(f"not checked: models/{variant}/{recommender}/{seed} is absent")
        path = self.workspace.recommender(variant, recommender) / HISTORY
        mean = mean_over_seeds([read_history(self.workspace.model(variant, recommender, seed)) for seed in seeds])
        _expect(path.read_text(encoding="utf-8") == tsv(mean), path, "is not the mean of the seeds' curves")
        return f"mean of {_seeds_text(len(seeds))}"

    def negatives(self, path: Path) -> str:
        drawn = evaluation.read_negatives(path, self.interactions, self.params.evaluate)
        rows = NEGATIVES.read(path).explode("candidates").filter(pl.col("candidates") != 0)
        rows = rows.select("user_id", item_id="candidates")
        _expect(rows.is_duplicated().sum() == 0, path, "a user has a negative twice")
        inside = rows.select(pl.col("item_id").is_between(1, self.num_items).all()).item()
        _expect(bool(inside), path, f"a negative is not one of the items 1..{self.num_items}")
        known = len(rows.join(self.interactions, on=["user_id", "item_id"], how="semi"))
        _expect(known == 0, path, f"{known} negatives are items that their users have interacted with")
        return f"{len(rows):,} negatives, sha256 {str(drawn.sha256)[:12]} as drawn"

    def check_positions(self, variant: str, recommender: str) -> str:
        path = self.workspace.positions(variant, recommender)
        whole = SEED_POSITIONS.read(path)
        seeds = tuple(whole["seed"].unique(maintain_order=True))
        expected = self._seeds(recommender)
        _expect(seeds == expected, path, f"is of the seeds {list(seeds)}, params.yaml has {list(expected)}")
        for seed in seeds:
            self._check_places(path, whole.filter(pl.col("seed") == seed).drop("seed"))
        return f"{len(whole) // len(seeds):,} targets, {_seeds_text(len(seeds))}"

    def _check_places(self, path: Path, table: pl.DataFrame) -> None:
        """Check the positions of one seed."""
        test = self.interactions.filter(pl.col("split") == "test").sort("user_id")
        targets = test["user_id"].to_list(), test["item_id"].to_list()
        found = table["user_id"].to_list(), table["target_item_id"].to_list()
        _expect(found == targets, path, "its users and targets are not the test rows of the interactions, in order")
        inside = table.select(((pl.col("position") >= 1) & (pl.col("position") <= pl.col("candidates"))).all()).item()
        _expect(bool(inside), path, "a position lies outside 1..candidates")
        most = self.num_items if self.params.evaluate.protocol == "fullrank" else min(self.num_items, 101)
        fits = table.select((pl.col("candidates") <= most).all()).item()
        _expect(bool(fits), path, f"a target has more than {most} candidates under {self.params.evaluate.protocol}")
        placed = evaluation.score_positions(table.drop("position"), self.params.evaluate.ties)
        _expect(
            placed["position"].equals(table["position"]),
            path,
            f"positions do not follow from num_better and num_tied under evaluate.ties: {self.params.evaluate.ties}",
        )

    def metrics(self, variant: str, recommender: str) -> str:
        path = self.workspace.metrics(variant, recommender)
        table = self._table(SEED_POSITIONS, self.workspace.positions(variant, recommender))
        computed = evaluation.summarise(table, self.interactions, self.params.evaluate, self.num_items)
        computed |= self._validation(variant, recommender)
        found = dict(_mapping(path, "metrics"))
        hashed = {name: found.pop(name) for name in ("negatives_sha256",) if name in found}
        expected = evaluation.negatives_of(self.workspace.positions(variant, recommender))
        _expect(hashed == expected, path, f"names the negatives {hashed}, but the positions were computed with {expected}")
        if self.params.evaluate.retrieval is not None:
            recall = found.pop(
                "retrieval_recall@10", 1.0
            )  # missing for a recommender without an index; measuring needs the model
            _expect(isinstance(recall, float) and 0.0 <= recall <= 1.0, path, f"retrieval_recall@10 is {recall}")
        return _equal_numbers(path, found, computed)

    def _validation(self, variant: str, recommender: str) -> dict[str, float]:
        try:
            return validation_metrics(self.workspace, variant, recommender, self._seeds(recommender))
        except SDAError:
            raise _Skipped(f"not checked: models/{variant}/{recommender} is absent or broken") from None

    def comparisons(self) -> str:
        pairs = {
            (variant, recommender): self._table(SEED_POSITIONS, self.workspace.positions(variant, recommender))
            for recommender in self.params.recommenders
            for variant in self.params.variants
        }
        found = evaluation.compare_variants(
            pairs,
            evaluation.BASELINES,
            self.interactions,
            self.params.evaluate,
            self.params.report.cutoff,
            self.num_items,
            controls(self.params),
        )
        computed = evaluation.flat_gains(found, reported(self.params), ("zero_shot", "id"))
        return _equal_numbers(self.workspace.comparisons, _mapping(self.workspace.comparisons, "comparisons"), computed)

    def report(self) -> str:
        path = self.workspace.report
        text = path.read_text(encoding="utf-8", errors="replace")
        _expect(text.startswith("<!doctype html>") and text.rstrip().endswith("</html>"), path, "is not a complete page")
        return f"{len(text):,} characters, complete"


# ------------------------------------------------------------------------------------------------------ parts
def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _curve(path: Path) -> pl.DataFrame:
    """The table of a training's steps; empty if there is none."""
    if not path.is_file():
        return pl.DataFrame()
    try:
        return pl.read_csv(path, separator="\t", infer_schema_length=None, raise_if_empty=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ArtifactError(str(path), f"cannot be read as a table ({reason})", _AGAIN) from None


def _expect(holds: bool, path: Path, problem: str, advice: str = _AGAIN) -> None:
    if not holds:
        raise ArtifactError(str(path), problem, advice)


def _seeds_text(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _contiguous(ids: pl.Series, path: Path, name: str) -> int:
    """Check that distinct ids run from 1 without gaps; returns their number."""
    distinct = ids.unique().sort().to_numpy()
    _expect(
        len(distinct) > 0 and np.array_equal(distinct, np.arange(1, len(distinct) + 1)),
        path,
        f"{name} should take every value from 1 to {len(distinct)}",
    )
    return len(distinct)


def _mapping(path: Path, name: str) -> Mapping[str, Any]:
    found = read_json(path, name)
    _expect(isinstance(found, dict), path, f"{name} should be names with values")
    return found


def _as_params(path: Path, name: str, found: object, expected: object) -> None:
    problem = f"{name} is {found!r}, by params.yaml and its inputs it should be {expected!r}"
    _expect(found == expected and type(found) is type(expected), path, problem)


def _equal_numbers(path: Path, found: Mapping[str, Any], computed: Mapping[str, float]) -> str:
    """Compare a flat JSON file with the expected numbers."""
    missing, further = computed.keys() - found.keys(), found.keys() - computed.keys()
    _expect(not missing, path, f"lacks {', '.join(sorted(missing))}")
    _expect(not further, path, f"has {', '.join(sorted(further))}, which cannot be computed from the positions")
    for name, value in computed.items():
        told = found[name]
        is_number = isinstance(told, int | float) and not isinstance(told, bool)
        _expect(is_number and abs(told - value) <= _SAME, path, f"{name} is {told}, from the positions it is {value}")
    return f"{len(found)} numbers, equal when recomputed"


def _tensors(path: Path) -> Mapping[str, Any]:
    """Read the tensors of a safetensors file, and check that they are finite."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(str(path), f"is not a readable safetensors file ({error})", _AGAIN) from None
    broken = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    _expect(not broken, path, f"weights that are not finite: {', '.join(broken[:3])}")
    return found


def _check_image(row: Mapping[str, Any], folder: Path) -> None:
    """Check that a stored image can be opened and has the recorded size."""
    try:
        with Image.open(io.BytesIO(row["image"] or b"")) as opened:
            size = opened.size
    except (OSError, ValueError) as error:
        raise ArtifactError(str(folder), f"the image of item {row['item_id']} cannot be opened ({error})", _AGAIN) from None
    told = row["width"], row["height"]
    _expect(size == told, folder, f"the image of item {row['item_id']} is {size}, its row says {told}")


# --------------------------------------------------------------------------------------------------- dvc.lock
def _md5(path: Path) -> str:
    """The MD5 hash as in DVC: of a file's bytes, or of a folder's sorted list of names and hashes as JSON."""
    # `dvc data status` does not read files with unchanged time and size, so it misses a flipped bit; it also needs `.dvc` and
    # writes to it.
    if path.is_file():
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "md5").hexdigest()
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".tmp")
    listed = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in inside]
    text = json.dumps(sorted(listed, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _locked(root: Path) -> Iterator[Finding]:
    """Compare the existing outputs with the hashes in ``dvc.lock``."""
    path = root / "dvc.lock"
    if not path.is_file():
        yield Finding("absent", path.name, "not made yet")
        return
    try:
        stages = YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"]
        outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())}
    except (YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        yield Finding("problem", path.name, f"is not a lock file of DVC ({type(error).__name__})")
        return
    there = {name: expected for name, expected in outs.items() if (root / name).exists()}
    differing = [name for name, expected in there.items() if _md5(root / name) != expected]
    for name in differing:
        advice = "`dvc checkout` restores the locked version, `dvc repro` makes it again"
        yield Finding("problem", name, f"differs from dvc.lock; {advice}")
    if not differing:
        absent = len(outs) - len(there)
        yield Finding("ok", path.name, f"{len(there)} outputs match dvc.lock" + (f", {absent} absent" if absent else ""))
