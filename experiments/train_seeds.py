"""Make a workspace for each seed, with separate adapters and item vectors.

The input is a workspace whose data stages are done.  In experiments/runs/NAME/seed-SEED it links data/, writes the params with
that seed, and runs the stages train_adapter and export_embeddings of the pipeline.  Existing results are kept, so an interrupted
run resumes.  Variants: lora (LoRA, hard targets), lora_cmsa (LoRA, CMSA), infonce (MoDA, hard targets), sda (MoDA, CMSA);
zero_shot (nothing trained) is always included, computed once and linked.

    python -m experiments train_seeds --name effect --seeds 1,2,3 \\
        --set train_adapter.training.num_steps=100 --set train_adapter.training.learning_rate=0.0002
    python -m experiments compare_vectors --name effect --root 'experiments/runs/effect/seed-{seed}' \\
        --variants sda --baselines zero_shot,lora,infonce --recommenders sasrec,bert4rec,vbpr
"""

from __future__ import annotations

from pathlib import Path

from experiments.options import THREE_SEEDS, Changes, Name, Seeds, Source, Variants
from experiments.study import check_names
from experiments.workspaces import BASE, VARIANTS, adapt, params_file, prepare
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names


def main(
    name: Name,
    source: Source = Path(),
    variants: Variants = Names(("lora", "infonce", "sda")),
    seeds: Seeds = THREE_SEEDS,
    changes: Changes = None,
) -> None:
    """Make the workspaces and run the missing stages in them."""
    check_names("--variants", variants, VARIANTS)
    params_file(source, "--source")
    base = Path("experiments") / "runs" / name
    for seed in seeds:
        workspace = Workspace(base / f"seed-{seed}")
        shared = Workspace(base / f"seed-{seeds[0]}").embeddings(BASE)
        prepare(workspace, source.resolve(), shared, seed, variants, changes or [])
        for variant in variants:
            adapt(workspace, variant)
