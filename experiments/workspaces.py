"""Workspaces of experiments: link data of a finished run, write own params, run the pipeline's stages, train recommenders.

A workspace is a project folder below ``experiments/runs``.  Stages whose outputs exist are not run again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import polars as pl
from pydantic import ValidationError
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
from sda_core.params import AdapterParams, Control, ExportParams, Oracle, Params, Section, load_params

BASE = "zero_shot"
VARIANTS = {
    "lora": {"adapter": "lora", "loss": "infonce"},
    "lora_cmsa": {"adapter": "lora", "loss": "loss"},
    "infonce": {"adapter": "moda", "loss": "infonce"},
    "sda": {"adapter": "moda", "loss": "loss"},
}
NOTHING_TRAINED = ("control_embeddings.variants=[]", f"variants=[id, {BASE}]", f"train_recommender.variants=[{BASE}]")
"""Changes of params for a folder in which the experiment starts the trainings, and not the pipeline."""

Changed = TypeVar("Changed", bound=Section)


# ------------------------------------------------------------------------------------------------- folders and params
def params_file(root: Path, option: str = "--root") -> Path:
    """The path of a project's ``params.yaml``.

    Args:
        root: the project folder.
        option: the option that names it, for the message of the error.

    Raises:
        ConfigError: the folder has no such file.
    """
    path = root / "params.yaml"
    if not path.exists():
        problem = f"expected a project folder, with params.yaml (got {root.resolve()}, which has none)"
        raise ConfigError(option, problem, f"run inside the project, or name its folder with {option}")
    return path


def project_params(root: Path, option: str = "--root") -> Params:
    """The params of a project folder; see :func:`params_file`."""
    return load_params(params_file(root, option))


def workspace_of(root: str, seed: int) -> tuple[Workspace, Params]:
    """The workspace with a seed's vectors, and its params.

    Args:
        root: its project folder, in which ``{seed}`` is replaced by the seed.
        seed: the seed.
    """
    folder = Path(root.replace("{seed}", str(seed)))
    return Workspace(folder), project_params(folder)


def link(path: Path, target: Path) -> None:
    """Make a symbolic link to an existing file or folder; an existing link is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def read_tree(path: Path) -> Any:
    """Read a params file as a tree that can be changed and saved with its comments."""
    return YAML().load(path.read_text(encoding="utf-8"))


def save_params(params: Any, target: Path) -> None:
    """Write a tree of params, with ``local_files`` computed again for the target's folder."""
    params["local_files"] = watched(params["dataset"], params["backbone"], target.parent)
    with target.open("w", encoding="utf-8") as stream:
        YAML().dump(params, stream)


def changed_tree(source: Path, changes: Sequence[str]) -> Any:
    """Read a params file and apply ``PATH=VALUE`` changes; see :func:`apply_changes`."""
    params = read_tree(source)
    apply_changes(params, changes)
    return params


def own_params(source: Path, root: Path, changes: Sequence[str], *, replace: bool = False) -> Params:
    """Write the ``params.yaml`` of an experiment's folder: a params file with some values changed.

    Args:
        source: the params file.
        root: the folder; created if it is missing.
        changes: ``PATH=VALUE``; a value is YAML.
        replace: whether to replace other params that the folder already has.

    Returns:
        The validated params.

    Raises:
        ConfigError: there is no such path, a value is wrong, or the folder has other params and ``replace`` is false.
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
    """Write a params file with another adapter seed, other variants and other changes.

    Args:
        source: the params file to read.
        target: the params file to write.
        seed: seed of adapter training.
        variants: names in :data:`VARIANTS`.
        changes: ``PATH=VALUE``; a value is YAML.

    Raises:
        ConfigError: there is no such path in the params.
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
    """Change values of a tree of params in place.

    Args:
        params: the tree.
        changes: ``PATH=VALUE``; a value is YAML.

    Raises:
        ConfigError: there is no such path in the tree.
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
    """The backbone's model with a new adapter, whose initial weights are drawn from ``seed``."""
    pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
    return adapters.build(backbone.model, adapter, modalities, pattern, num_layers, seed=seed)


# ------------------------------------------------------------------------------------------------- stages
def run_stage(name: str, variant: str, root: Path) -> None:
    """Run a stage of the pipeline in a separate process.

    Raises:
        ArtifactError: the stage failed.
    """
    logger.info("%s %s in %s", name, variant, root)
    command = [sys.executable, "-m", f"stages.{name}", "--variant", variant, "--root", str(root)]
    if subprocess.run(command, check=False).returncode != 0:
        raise stage_failed(name, variant, root)


def stage_failed(name: str, variant: str, root: Path) -> ArtifactError:
    """The error for a failed stage, whose own lines have the reason."""
    advice = "see the lines above; run this script again to resume"
    return ArtifactError(str(root), f"stage {name} of {variant} failed", advice)


def prepare(workspace: Workspace, source: Path, shared: Path, seed: int, variants: Sequence[str], changes: Sequence[str]) -> None:
    """Make or complete a workspace with linked data, its own params, and the vectors of zero_shot.

    Args:
        workspace: the workspace.
        source: absolute path of the project folder whose data is linked and whose params are changed.
        shared: file for the vectors of zero_shot, which are computed once and linked from all workspaces.
        seed: seed of adapter training.
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
    """Train a variant's adapter and compute its vectors, unless they exist."""
    if not workspace.adapter(variant).exists():
        run_stage("train_adapter", variant, workspace.root)
    if not workspace.embeddings(variant).exists():
        run_stage("export_embeddings", variant, workspace.root)


def train_on_corrupted(
    workspace: Workspace, variant: str, modality: Literal["image", "text"], how: How, share: float, seed: int
) -> None:
    """Train a variant's adapter on items of which a share is corrupted, unless it exists.

    The corrupted items are written to the workspace ``spoilt`` inside this one.  So later stages still use the clean items.
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
    """Read loss, retrieval and alignment by step of a variant's adapter training."""
    return pl.read_csv(workspace.adapter(variant) / "loss.tsv", separator="\t")


def mean_retrieval(paths: Sequence[Path]) -> float:
    """Retrieval@1, mean over embeddings files; see :func:`experiments.study.retrieval_at_1`."""
    return float(np.mean([retrieval_at_1(path) for path in paths]))


# ------------------------------------------------------------------------------------------------- item vectors
def vectors_of(workspace: Workspace, params: Params, variant: str, fused_dim: int | None = None) -> np.ndarray | None:
    """Item vectors of a variant or a control, for a recommender.

    Controls are computed from zero_shot, and oracles from ``data/truth.parquet``.

    Args:
        workspace: a workspace with ``embeddings/``.
        params: its params.
        variant: the variant or control.
        fused_dim: number of components, to which image and text vectors are fused again; None keeps the stored vectors.

    Returns:
        ``(I + 1, D)``; the row is the item id, and row 0 is zero.  None for ``id``.
    """
    kind = next((name for name in get_args(Control) if name == variant), None)
    if kind in get_args(Oracle):
        raw_item_ids = ITEMS.read(workspace.items).sort("item_id")["raw_item_id"].to_list()
        made = controls.oracle(cast("Oracle", kind), workspace, raw_item_ids, params.control_embeddings.seed)
        return padded(made.fused_IF)
    source = workspace.embeddings(variant if kind is None else BASE)
    if variant == "id" or (kind is None and fused_dim is None):
        return read_vectors(source)
    vectors = fused_again(workspace, params, controls.read_table(source), fused_dim)
    if kind is not None:
        seen = seen_items(workspace)
        vectors = controls.control(
            cast("controls.Derived", kind), vectors, seen, params.export_embeddings, params.control_embeddings.seed
        )
    return padded(vectors.fused_IF)


def padded(vectors_IF: np.ndarray) -> np.ndarray:
    """Item vectors ``(I + 1, F)`` for a recommender: the row is the item id, and row 0, the padding, is zero."""
    return np.concatenate([np.zeros((1, vectors_IF.shape[1]), dtype=np.float32), vectors_IF])


def fused_again(workspace: Workspace, params: Params, vectors: controls.Vectors, fused_dim: int | None) -> controls.Vectors:
    """Fuse image and text vectors again, to ``fused_dim`` components; None returns the vectors unchanged."""
    if fused_dim is None:
        return vectors
    section = params.export_embeddings.model_copy(update={"fusion": "late_concat_pca", "fused_dim": fused_dim})
    return replace(vectors, fused_IF=fuse_vectors(workspace, vectors, section))


def fuse_vectors(
    workspace: Workspace, vectors: controls.Vectors, section: ExportParams, base: controls.Vectors | None = None
) -> np.ndarray:
    """Fuse image and text vectors; see :func:`sda_core.embeddings.fusion.fuse`.

    Args:
        workspace: a workspace with interactions; the axes are fitted on the items of its training interactions.
        vectors: the image and text vectors.
        section: the settings of the fusion.
        base: vectors of the same items by the backbone alone, to join with these.

    Returns:
        ``(I, F)`` float32.
    """
    beside = None if base is None else (base.image_ID, base.text_ID)
    fit_ids = seen_items(workspace)
    return fuse(vectors.image_ID, vectors.text_ID, vectors.has_image, fit_ids, section, beside, vectors.has_text)


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
        workspace: a workspace with the vectors and the interactions.
        params: its params.
        variant: the variant or control.
        recommender: the recommender; its section of the params is used.
        seed: seed of the training.
        folder: the folder for the positions.
        changes: changes of that section; settings that the recommender does not have are ignored, e.g. ``representation`` for
            VBPR.
        fused_dim: see :func:`vectors_of`.
    """
    if positions_path(folder, seed).exists():
        return
    section = params.train_recommender.of(recommender)
    known = {key: value for key, value in (changes or {}).items() if key in type(section).model_fields}
    section = changed_section(section, known)
    keep_positions(workspace, params, section, seed, folder, vectors=vectors_of(workspace, params, variant, fused_dim))


def changed_section(section: Changed, changes: Mapping[str, Any], where: str = "", got: str = "") -> Changed:
    """A section of the params with some values changed.

    Args:
        section: the section.
        changes: the new values by name.
        where: the option that gives the values, for the message of the error; empty for the section of a recommender in
            ``params.yaml``.
        got: the text of that option.

    Raises:
        ConfigError: a value is wrong, or the values contradict each other.
    """
    try:
        return type(section).model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = first["msg"].removeprefix("Value error, ")
        if where:
            raise ConfigError(where, f"{problem} (got {got!r})") from None
        name = ".".join(map(str, ("train_recommender", getattr(section, "kind", ""), *first["loc"])))
        raise ConfigError(f"params.yaml: {name}", problem) from None


# ------------------------------------------------------------------------------------------------- one workspace for each seed
@dataclass(frozen=True)
class Study:
    """A comparison of arms, each with several variants and seeds.

    An arm is, for example, one value of a setting or one backbone.  Each arm has a folder with one workspace for each seed.

    Attributes:
        source: the project folder whose data is used.
        folder: the folder of the comparison.
        variants: the trained variants.
        seeds: seeds of the adapters.
        changes: changes of the params, for all arms.
    """

    source: Path
    folder: Path
    variants: Sequence[str]
    seeds: Sequence[int]
    changes: Sequence[str] = ()

    def workspace(self, arm: str, seed: int) -> Workspace:
        """The workspace of an arm and a seed."""
        return Workspace(self.folder / arm / f"seed-{seed}")

    def positions(self, arm: str, name: str) -> Path:
        """The folder with an arm's positions for all seeds; ``name`` is a recommender or a variant."""
        return self.folder / arm / "positions" / name

    def params(self, arm: str) -> Params:
        """The params of an arm's first seed."""
        return load_params(self.workspace(arm, self.seeds[0]).root / "params.yaml")

    def retrieval(self, arm: str, variant: str) -> float:
        """Retrieval@1 of a variant's vectors, mean over the seeds."""
        return mean_retrieval([self.workspace(arm, seed).embeddings(variant) for seed in self.seeds])
