"""Phase one: train an adapter on items alone.

To share every batch among several processes: ``torchrun --nproc-per-node 4 -m stages.train_adapter --variant sda`` (or
``accelerate launch --multi_gpu --num_processes 4 -m ...``).
"""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def train_adapter(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Train the adapter of one variant (params.train_adapter.variants) and save it as a PEFT folder."""
    from sda_core.local_files import BACKBONE, watches
    from sda_core.processes import processes
    from sda_core.steps.train_adapter import AdapterTraining

    with stage("train-adapter", root, params, check=watches(root, BACKBONE)) as run, processes() as team:
        sections = run.params.train_adapter, run.params.backbone, run.params.items, run.params.runtime
        run.counts = AdapterTraining(run.workspace, variant, *sections).train(team)


if __name__ == "__main__":
    run_as_script(train_adapter)
