"""Workspaces of an experiment: data linked from a finished run, params of their own, the pipeline's own stages, recommenders.

A workspace is a project folder below ``experiments/runs``.  A stage whose outputs exist is not run again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import polars as pl
from ruamel.yaml import YAML
from torch import nn

from experiments.corruption import How, corrupt
from experiments.study import keep_positions, logger, positions_path, retrieval_at_1
from sda_core import adapters
from sda_core.artifacts import ITEMS, Workspace
from sda_core.backbones import Backbone
from sda_core.embeddings import controls
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.errors import ArtifactError, ConfigError
from sda_core.item_vectors import read_vectors
from sda_core.local_files import watched
from sda_core.params import AdapterParams, Control, Oracle, Params, load_params

BASE = "zero_shot"
VARIANTS = {
    "lora": {"adapter": "lora", "loss": "infonce"},
    "lora_cmsa": {"adapter": "lora", "loss": "loss"},
    "infonce": {"adapter": "moda", "loss": "infonce"},
    "sda": {"adapter": "moda", "loss": "loss"},
}
NOTHING_TRAINED = ("control_embeddings.variants=[]", f"variants=[id, {BASE}]", f"train_recommender.variants=[{BASE}]")
"""Changes of params for folders in which an experiment trains by itself."""


# ------------------------------------------------------------------------------------------------- folders and params
def workspace_of(root: str, seed: int) -> tuple[Workspace, Params]:
    """The workspace that a seed's vectors come from (``{seed}`` in the root stands for it), and its params."""
    folder = Path(root.replace("{seed}", str(seed)))
    return Workspace(folder), load_params(folder / "params.yaml")


def link(path: Path, target: Path) -> None:
    """A symbolic link to what exists; a link that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def read_tree(path: Path) -> Any:
    """A params file as a tree that may be changed and saved again, comments included."""
    return YAML().load(path.read_text(encoding="utf-8"))


def save_params(params: Any, target: Path) -> None:
    """Write a changed tree of params, with the ``local_files`` that follow from it in the target's folder."""
    params["local_files"] = watched(params["dataset"], params["backbone"], target.parent)
    with target.open("w", encoding="utf-8") as stream:
        YAML().dump(params, stream)


def changed_tree(source: Path, changes: Sequence[str]) -> Any:
    """A params file as a tree, with ``PATH=VALUE`` changed in it; see :func:`apply_changes`."""
    params = read_tree(source)
    apply_changes(params, changes)
    return params


def own_params(source: Path, root: Path, changes: Sequence[str], *, replace: bool = False) -> Params:
    """The params of an experiment's folder: those of a file with some values changed, checked, in its ``params.yaml``.

    Args:
        source: a params file.
        root: the folder; made where it is missing.
        changes: ``PATH=VALUE``, as YAML.
        replace: whether other params in the folder are replaced.

    Raises:
        ConfigError: a path that the params do not have, or a wrong value; the folder holds other params.
    """
    tree = changed_tree(source, changes)
    root.mkdir(parents=True, exist_ok=True)
    wanted, own = root / "wanted.yaml", root / "params.yaml"
    save_params(tree, wanted)
    params = load_params(wanted)
    if own.exists() and not replace and load_params(own) != params:
        raise ConfigError("--name", f"{root} was made with other params", "use another name, or delete that folder")
    wanted.replace(own)
    return params


def write_params(source: Path, target: Path, seed: int, variants: Sequence[str], changes: Sequence[str]) -> None:
    """The source's params with an adapter seed, the variants and the changes in them.

    Args:
        source: a params file.
        target: another one.
        seed: of adapter training.
        variants: of :data:`VARIANTS`.
        changes: ``PATH=VALUE``, as YAML.

    Raises:
        ConfigError: a path that the params do not have.
    """
    params = read_tree(source)
    params["variants"] = ["id", BASE, *variants]
    params["train_recommender"]["variants"] = [BASE, *variants]
    params["control_embeddings"]["variants"] = []
    params["train_adapter"]["variants"] = {variant: VARIANTS[variant] for variant in variants}
    params["train_adapter"]["training"]["seed"] = seed
    apply_changes(params, changes)
    save_params(params, target)


def apply_changes(params: Any, changes: Sequence[str]) -> None:
    """Set values of a tree of params.

    Args:
        params: the tree.
        changes: ``PATH=VALUE``, as YAML.

    Raises:
        ConfigError: a path that the params do not have.
    """
    for change in changes:
        path, separator, value = change.partition("=")
        section = params
        *parents, last = path.split(".")
        for parent in parents:
            section = section.get(parent, {})
        if not separator or last not in section:
            raise ConfigError("--set", f"no such param {path!r} (got {change!r}, expected PATH=VALUE)")
        section[last] = YAML().load(value)


# ------------------------------------------------------------------------------------------------- models
def untrained(backbone: Backbone, adapter: AdapterParams, modalities: Sequence[str], seed: int) -> nn.Module:
    """The backbone's model with an adapter as it is before step 0, its weights drawn from ``seed``."""
    pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    return adapters.build(backbone.model, adapter, modalities, pattern, num_layers, seed=seed)


# ------------------------------------------------------------------------------------------------- stages
def run_stage(name: str, variant: str, root: Path) -> None:
    """One of the pipeline's stages, in a process of its own.

    Raises:
        ArtifactError: it failed.
    """
    logger.info("%s %s in %s", name, variant, root)
    command = [sys.executable, "-m", f"stages.{name}", "--variant", variant, "--root", str(root)]
    if subprocess.run(command, check=False).returncode != 0:
        raise stage_failed(name, variant, root)


def stage_failed(name: str, variant: str, root: Path) -> ArtifactError:
    """The error of a stage that said itself what is wrong."""
    advice = "see the lines above; run this script again to resume"
    return ArtifactError(str(root), f"stage {name} of {variant} failed", advice)


def prepare(workspace: Workspace, source: Path, shared: Path, seed: int, variants: Sequence[str], changes: Sequence[str]) -> None:
    """A workspace with the source's data, params of its own, and the vectors of zero_shot.

    Args:
        workspace: made, or completed.
        source: the project folder whose data is linked and whose params are changed; absolute.
        shared: zero_shot's vectors, which are computed once and linked from all others.
        seed: of adapter training.
        variants: see :func:`write_params`.
        changes: see :func:`write_params`.
    """
    root, own = workspace.root, workspace.embeddings(BASE)
    own.parent.mkdir(parents=True, exist_ok=True)
    link(root / "data", source / "data")
    write_params(source / "params.yaml", root / "params.yaml", seed, variants, changes)
    if not shared.exists():
        run_stage("export_embeddings", BASE, root)
        own.rename(shared)
    if not own.exists():
        own.symlink_to(shared.resolve())


def adapt(workspace: Workspace, variant: str) -> None:
    """A variant's adapter and its vectors, unless they exist."""
    if not workspace.adapter(variant).exists():
        run_stage("train_adapter", variant, workspace.root)
    if not workspace.embeddings(variant).exists():
        run_stage("export_embeddings", variant, workspace.root)


def train_on_corrupted(
    workspace: Workspace, variant: str, modality: Literal["image", "text"], how: How, share: float, seed: int
) -> None:
    """A variant's adapter, trained on items of which a share is corrupted, unless it exists.

    The corrupted items are in ``spoilt``, a workspace below, and vectors are made from the clean ones.
    """
    if workspace.adapter(variant).exists():
        return
    spoilt = Workspace(workspace.root / "spoilt")
    spoilt.root.mkdir(exist_ok=True)
    (spoilt.root / "params.yaml").write_bytes((workspace.root / "params.yaml").read_bytes())
    corrupt(workspace, spoilt, modality, how, share, seed)
    run_stage("train_adapter", variant, spoilt.root)
    workspace.adapter(variant).parent.mkdir(exist_ok=True)
    spoilt.adapter(variant).rename(workspace.adapter(variant))


def read_curve(workspace: Workspace, variant: str) -> pl.DataFrame:
    """Loss, retrieval and alignment by step of a variant's adapter training."""
    return pl.read_csv(workspace.adapter(variant) / "loss.tsv", separator="\t")


def mean_retrieval(paths: Sequence[Path]) -> float:
    """:func:`experiments.study.retrieval_at_1`, mean over embeddings files."""
    return float(np.mean([retrieval_at_1(path) for path in paths]))


# ------------------------------------------------------------------------------------------------- item vectors
def vectors_of(workspace: Workspace, params: Params, variant: str, fused_dim: int | None = None) -> np.ndarray | None:
    """Item vectors of a variant or a control, row number = item id, row 0 zero.

    Args:
        workspace: with ``embeddings/``.
        params: its params.
        variant: or a control, which is made of zero_shot (the oracles: of ``data/truth.parquet``).
        fused_dim: components of vectors that are fused again; None takes them as they are.
    """
    kind = next((name for name in get_args(Control) if name == variant), None)
    if kind in get_args(Oracle):
        raw_item_ids = ITEMS.read(workspace.items).sort("item_id")["raw_item_id"].to_list()
        made = controls.oracle(cast("Oracle", kind), workspace, raw_item_ids, params.control_embeddings.seed)
        return np.concatenate([np.zeros((1, made.fused_IF.shape[1]), dtype=np.float32), made.fused_IF])
    source = workspace.embeddings(variant if kind is None else BASE)
    if variant == "id" or (kind is None and fused_dim is None):
        return read_vectors(source)
    vectors = fused_again(workspace, params, controls.read_table(source), fused_dim)
    if kind is not None:
        seen = seen_items(workspace)
        vectors = controls.control(
            cast("controls.Derived", kind), vectors, seen, params.export_embeddings, params.control_embeddings.seed
        )
    return np.concatenate([np.zeros((1, vectors.fused_IF.shape[1]), dtype=np.float32), vectors.fused_IF])


def fused_again(workspace: Workspace, params: Params, vectors: controls.Vectors, fused_dim: int | None) -> controls.Vectors:
    """The vectors with other fused ones, of ``fused_dim`` components; None leaves them as they are."""
    if fused_dim is None:
        return vectors
    section = params.export_embeddings.model_copy(update={"fusion": "late_concat_pca", "fused_dim": fused_dim})
    fused = fuse(vectors.image_ID, vectors.text_ID, vectors.has_image, seen_items(workspace), section)
    return replace(vectors, fused_IF=fused)


def train_on(
    workspace: Workspace,
    params: Params,
    variant: str,
    recommender: str,
    seed: int,
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    fused_dim: int | None = None,
) -> None:
    """Train a recommender on a variant's vectors, unless its positions exist.

    Args:
        workspace: with the vectors and the interactions.
        params: its params.
        variant: or a control.
        recommender: its section of the params is used.
        seed: of the training.
        folder: where the positions are kept.
        changes: of the section; those that a recommender does not have are ignored, as ``representation`` for VBPR.
        fused_dim: see :func:`vectors_of`.
    """
    if positions_path(folder, seed).exists():
        return
    section = params.train_recommender.of(recommender)
    known = {key: value for key, value in (changes or {}).items() if key in type(section).model_fields}
    section = section.model_copy(update=known)
    keep_positions(workspace, params, section, seed, folder, vectors=vectors_of(workspace, params, variant, fused_dim))


# ------------------------------------------------------------------------------------------------- one workspace for each seed
@dataclass(frozen=True)
class Study:
    """Variants trained on several seeds, each in a workspace of its own, below one folder for each arm.

    An arm is what is compared: a value of a setting, a backbone.
    """

    source: Path
    folder: Path
    variants: Sequence[str]
    seeds: Sequence[int]
    changes: Sequence[str] = ()

    def workspace(self, arm: str, seed: int) -> Workspace:
        """Of an arm and a seed."""
        return Workspace(self.folder / arm / f"seed-{seed}")

    def positions(self, arm: str, name: str) -> Path:
        """Where an arm's positions of all seeds are kept, by recommender or variant."""
        return self.folder / arm / "positions" / name

    def params(self, arm: str) -> Params:
        """An arm's params, with the first seed."""
        return load_params(self.workspace(arm, self.seeds[0]).root / "params.yaml")

    def retrieval(self, arm: str, variant: str) -> float:
        """R@1 of a variant's vectors, mean over the seeds."""
        return mean_retrieval([self.workspace(arm, seed).embeddings(variant) for seed in self.seeds])
