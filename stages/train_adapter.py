"""Phase one: an adapter trained on items alone.

Alone, or in several processes that share every batch: ``torchrun --nproc-per-node 4 -m stages.train_adapter --variant sda``
(``accelerate launch --multi_gpu --num_processes 4 -m ...`` likewise).
"""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def train_adapter(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Train the adapter of one variant (params.train_adapter.variants) and save it as a PEFT folder."""
    import shutil

    from sda_core import adapters, alignment, backbones
    from sda_core.artifacts import replace_directory, write_tsv
    from sda_core.fetch.local_files import BACKBONE, watches
    from sda_core.fingerprint import fingerprint
    from sda_core.item_source import MODALITIES, item_source
    from sda_core.processes import processes
    from sda_core.runtime import prepare_torch

    with stage("train-adapter", root, params, check=watches(root, BACKBONE)) as run, processes() as team:
        with team.raise_on_all_ranks():
            section, training = run.params.train_adapter, run.params.train_adapter.training
            adapter, loss = section.of(variant)
            device = team.device(prepare_torch(run.params.runtime))
            source = item_source(run.workspace, run.params.items)
            backbone = backbones.build(run.params.backbone, alignment.home(training, device))
            pattern, num_layers = backbone.adapter_pattern(adapter.targets), backbone.num_adapter_layers(adapter.targets)
            model = adapters.build(backbone.model, adapter, MODALITIES, pattern, num_layers, seed=training.seed)
        parts = adapter, loss, training, run.params.backbone, run.params.items, run.workspace.items, run.workspace.images
        # the revision, since a local checkpoint's files may change under one name
        inputs = team.broadcast_bytes(fingerprint(*parts, backbone.info.revision).encode() if team.is_main else None).decode()
        scratch = run.workspace.resume("train_adapter", variant)
        records = alignment.train_adapter(
            backbone, model, source, training, loss, scratch / "checkpoint.safetensors", inputs, device, team
        )
        if not team.is_main:
            return
        with replace_directory(run.workspace.adapter(variant)) as folder:
            adapters.save(model, folder, backbone.info.name, backbone.info.revision)
            write_tsv(folder / "loss.tsv", records)
        shutil.rmtree(scratch, ignore_errors=True)
        run.counts = {
            "variant": variant,
            "adapted layers": num_layers,
            "steps": training.num_steps,
            "last loss": records[-1].loss if records else "none",
        }
        if records.first_step:  # the cost of this run is that of its own steps
            run.counts |= {
                "resumed after step": records.first_step,
                "steps of this run": training.num_steps - records.first_step,
            }


if __name__ == "__main__":
    run_as_script(train_adapter)
