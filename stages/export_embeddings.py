"""Export item vectors: one pass per modality through the frozen model, or one for both, then fusion.

To use several processes on one or more GPUs: ``torchrun --nproc-per-node 4 -m stages.export_embeddings --variant sda`` (or
``accelerate launch``).
"""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def export_embeddings(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Embed every item for one variant; variant id has ids only, zero_shot is the bare backbone."""
    from sda_core.local_files import BACKBONE, watches
    from sda_core.processes import processes
    from sda_core.steps.export_embeddings import export
    from sda_core.variants import adapter_of, passes_of

    with stage("export-embeddings", root, params, check=watches(root, BACKBONE)) as run, processes() as team:
        sections = run.params.backbone, run.params.items, run.params.export_embeddings, run.params.runtime
        name = adapter_of(run.params, variant)
        adapter = None if name is None else run.workspace.adapter(name)
        run.counts = export(run.workspace, variant, adapter, *sections, team, passes_of(run.params, variant))


if __name__ == "__main__":
    run_as_script(export_embeddings)
