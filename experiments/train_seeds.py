"""One workspace a seed, with adapters and item vectors of its own: what differences between variants owe to the seed.

Takes a workspace whose data stages are done.  Below ``experiments/runs/<name>/seed-<s>`` it links ``data/``, writes the params
with that seed, and runs the pipeline's own stages ``train_adapter`` and ``export_embeddings``; what is there already is kept, so
a run that was stopped goes on.  Variants: ``zero_shot`` (nothing trained), ``lora`` (LoRA, hard targets), ``lora_cmsa`` (LoRA,
CMSA), ``infonce`` (MoDA, hard targets), ``sda`` (MoDA, CMSA); ``zero_shot`` is computed once and linked.

    python experiments/train_seeds.py --name effect --seeds 1 2 3 \\
        --set train_adapter.training.num_steps=100 train_adapter.training.learning_rate=0.0002
    python experiments/compare_vectors.py --name effect --root 'experiments/runs/effect/seed-{seed}' \\
        --variants sda --baselines zero_shot lora infonce --recommenders sasrec bert4rec vbpr
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _runs import save_params
from ruamel.yaml import YAML

from sda_core import log
from sda_core.artifacts import Workspace

_log = logging.getLogger("experiments")

BASE = "zero_shot"
VARIANTS = {
    "lora": {"adapter": "lora", "loss": "infonce"},
    "lora_cmsa": {"adapter": "lora", "loss": "loss"},
    "infonce": {"adapter": "moda", "loss": "infonce"},
    "sda": {"adapter": "moda", "loss": "loss"},
}


def main() -> None:
    """Make the workspaces and run what is missing in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(), help="the project folder whose data is used")
    parser.add_argument("--name", required=True, help="folder of the workspaces below experiments/runs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["lora", "infonce", "sda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE", help="changed params, as YAML")
    options = parser.parse_args()
    log.configure()
    source = options.source.resolve()
    base = Path("experiments") / "runs" / options.name
    for seed in options.seeds:
        workspace = Workspace(base / f"seed-{seed}")
        shared = Workspace(base / f"seed-{options.seeds[0]}").embeddings(BASE)
        prepare(workspace, source, shared, seed, options.variants, options.set)
        for variant in options.variants:
            adapt(workspace, variant)


def prepare(workspace: Workspace, source: Path, shared: Path, seed: int, variants: Sequence[str], changes: Sequence[str]) -> None:
    """A workspace with the source's data, params of its own, and the vectors of zero_shot.

    Args:
        workspace: made, or completed.
        source: the project folder whose data is linked and whose params are changed; absolute.
        shared: zero_shot's vectors, which are computed once and linked from all others.
        seed, variants, changes: see :func:`write_params`.
    """
    root, own = workspace.root, workspace.embeddings(BASE)
    own.parent.mkdir(parents=True, exist_ok=True)
    if not (root / "data").is_symlink():
        (root / "data").symlink_to(source / "data")
    write_params(source / "params.yaml", root / "params.yaml", seed, variants, changes)
    if not shared.exists():
        run("export_embeddings", BASE, root)
        own.rename(shared)
    if not own.exists():
        own.symlink_to(shared.resolve())


def adapt(workspace: Workspace, variant: str) -> None:
    """A variant's adapter and its vectors, unless they are there."""
    if not workspace.adapter(variant).exists():
        run("train_adapter", variant, workspace.root)
    if not workspace.embeddings(variant).exists():
        run("export_embeddings", variant, workspace.root)


def write_params(source: Path, target: Path, seed: int, variants: Sequence[str], changes: Sequence[str]) -> None:
    """The source's params with the seed, the variants and the changes in them."""
    yaml = YAML()
    params: Any = yaml.load(source.read_text(encoding="utf-8"))
    params["variants"] = ["id", BASE, *variants]
    params["train_recommender"]["variants"] = [BASE, *variants]
    params["control_embeddings"]["variants"] = []
    params["train_adapter"]["variants"] = {variant: VARIANTS[variant] for variant in variants}
    params["train_adapter"]["training"]["seed"] = seed
    for change in changes:
        path, separator, value = change.partition("=")
        section = params
        *parents, last = path.split(".")
        for parent in parents:
            section = section.get(parent, {})
        if not separator or last not in section:
            raise SystemExit(f"--set: no such param {path!r} (got {change!r}, expected PATH=VALUE)")
        section[last] = yaml.load(value)
    save_params(params, target)


def run(stage: str, variant: str, root: Path) -> None:
    """One of the pipeline's stages, in a process of its own."""
    _log.info("%s %s in %s", stage, variant, root)
    subprocess.run([sys.executable, "-m", f"stages.{stage}", "--variant", variant, "--root", str(root)], check=True)


if __name__ == "__main__":
    main()
